"""ConvSpec and Geometry: sizes against brute force, canonical forms, every error message."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import problems, specs

import sepconv
from sepconv import ConvSpec
from sepconv.backends import BACKENDS, Backend, choose, why_not
from sepconv.spec import ACTIVATIONS, canonical_activation, canonical_padding, canonical_pair


def windows_that_fit(size: int, reach: int, stride: int) -> int:
    return sum(1 for start in range(0, size, stride) if start + reach <= size)


@given(
    size=st.integers(1, 40),
    kernel=st.integers(1, 9),
    stride=st.integers(1, 6),
    dilation=st.integers(1, 5),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
)
def test_sizes_agree_with_counting_windows(size, kernel, stride, dilation, before, after):
    reach = (kernel - 1) * dilation + 1

    def along_width(padding):
        spec = ConvSpec(strides=(1, stride), padding=padding, dilation_rate=(1, dilation))
        out = spec.output_shape((1, 1, size, 1), (1, kernel), 1)[2]
        assert spec.padding_amounts(1, size, (1, kernel))[0] == (0, 0)
        return out, spec.padding_amounts(1, size, (1, kernel))[1]

    for amounts in ((0, 0), (before, after)):
        padded = size + sum(amounts)
        padding = "valid" if amounts == (0, 0) else ((0, 0), amounts)
        if padded >= reach:
            assert along_width(padding) == (windows_that_fit(padded, reach, stride), amounts)
        elif padded >= reach - stride:
            assert along_width(padding) == (0, amounts)
        else:
            with pytest.raises(ValueError, match="must fit into the padded input"):
                along_width(padding)

    # "same" pads as little as lets one window start at every stride-th pixel, the odd zero last.
    out = len(range(0, size, stride))
    total = next(t for t in itertools.count() if windows_that_fit(size + t, reach, stride) >= out)
    assert along_width("same") == (out, (total // 2, total - total // 2))


def test_same_padding_puts_the_extra_row_last():
    assert ConvSpec(padding="same").padding_amounts(5, 5, 4) == ((1, 2), (1, 2))
    assert ConvSpec(padding="same", strides=2).padding_amounts(6, 7, 3) == ((0, 1), (1, 1))


@given(problems())
def test_geometry_and_output_shape_agree(problem):
    g = problem.geometry
    assert g.x_shape == problem.x_shape
    shape = problem.spec.output_shape(problem.x_shape, problem.kernel_size, problem.filters)
    assert shape == g.y_shape
    unknown = problem.spec.output_shape((None,) * 4, problem.kernel_size, problem.filters)
    channels = problem.spec.channels_axis
    assert unknown == tuple(problem.filters if i == channels else None for i in range(4))
    height_axis = 1 if channels == 3 else 2
    known = tuple(g.x_shape[i] if i == height_axis else None for i in range(4))
    partly = problem.spec.output_shape(known, problem.kernel_size, problem.filters)
    assert partly[height_axis] == g.out_height
    assert partly[height_axis + 1] is None
    assert all(type(size) is int for size in g)
    assert g.depthwise_kernel_shape[2] * g.depthwise_kernel_shape[3] == g.depthwise_channels
    assert g.pointwise_kernel_shape == (1, 1, *g.depthwise_bias_shape, *g.bias_shape)


def test_geometry_lists_its_integers():
    spec = ConvSpec(
        strides=(2, 1),
        padding=((1, 0), (2, 3)),
        dilation_rate=(1, 2),
        data_format="Channels_First",
        activation="elu",
        input_activation="relu",
        depthwise_activation="swish",
    )
    g = spec.resolve((5, 3, 8, 9), (3, 2, 3, 2), (1, 1, 6, 4), depthwise_bias_shape=(6,))
    assert g == (5, 8, 9, 3, 2, 4, 12, 4, 3, 2, 2, 1, 1, 2, 1, 2, 1, 1, 6, 10, 1, 0)
    assert g.x_shape == (5, 3, 8, 9)
    assert g.y_shape == (5, 4, 4, 12)
    assert g.macs == 5 * 4 * 12 * (6 * 6 + 6 * 4)


@given(specs())
def test_spec_is_canonical_hashable_and_travels(spec):
    same = ConvSpec(
        strides=np.array(spec.strides),
        padding=spec.padding.upper() if isinstance(spec.padding, str) else np.array(spec.padding),
        dilation_rate=list(spec.dilation_rate),
        data_format=spec.data_format.upper(),
        activation=spec.activation,
        input_activation=spec.input_activation,
        depthwise_activation=spec.depthwise_activation,
    )
    assert same == spec
    assert hash(same) == hash(spec)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec
    assert eval(repr(spec), {"ConvSpec": ConvSpec}) == spec


def test_canonical_forms():
    assert ConvSpec(strides=np.int64(2)) == ConvSpec(strides=[2, 2]) == ConvSpec(strides=2)
    assert ConvSpec() == ConvSpec(activation="linear", padding="VALID", strides=1, dilation_rate=1)
    assert [canonical_activation(name) for name in (None, "swish", "hard_swish")] == [
        "linear",
        "silu",
        "hard_silu",
    ]
    assert [canonical_activation(name) for name in ACTIVATIONS] == list(ACTIVATIONS)
    assert canonical_pair("a", (1, 2)) == (1, 2)
    assert canonical_padding([[np.int8(1), 2], (3, 4)]) == ((1, 2), (3, 4))
    with pytest.raises(AttributeError):
        ConvSpec().strides = (2, 2)


class Symbol:
    """A size that is not hashable, like the symbolic sizes of a tracer."""

    __hash__ = None

    def __init__(self, value):
        self.value = value

    def _combine(self, other, operation):
        return Symbol(operation(self.value, getattr(other, "value", other)))

    def __add__(self, other):
        return self._combine(other, lambda a, b: a + b)

    def __sub__(self, other):
        return self._combine(other, lambda a, b: a - b)

    def __rsub__(self, other):
        return self._combine(other, lambda a, b: b - a)

    def __mul__(self, other):
        return self._combine(other, lambda a, b: a * b)

    def __floordiv__(self, other):
        return self._combine(other, lambda a, b: a // b)

    def __lt__(self, other):
        return self.value < getattr(other, "value", other)

    def __gt__(self, other):
        return self.value > getattr(other, "value", other)

    def __eq__(self, other):
        return self.value == getattr(other, "value", other)

    __radd__, __rmul__ = __add__, __mul__


@given(problems())
def test_symbolic_sizes_pass_through(problem):
    g = problem.geometry
    symbolic = problem.spec.resolve(
        [Symbol(size) for size in g.x_shape],
        g.depthwise_kernel_shape,
        g.pointwise_kernel_shape,
        g.bias_shape if g.has_bias else None,
        g.depthwise_bias_shape if g.has_depthwise_bias else None,
    )
    assert list(symbolic) == list(g)
    assert isinstance(symbolic.batch, Symbol)


PADDING = 'must be "valid", "same" or ((top, bottom), (left, right)).'
# (argument, value, exception, rule). The argument, the rule and the value all appear.
SPEC_ERRORS = [
    ("strides", (0, 1), ValueError, "must be positive."),
    ("strides", -2, ValueError, "must be positive."),
    ("strides", 1.0, TypeError, "must be made of integers."),
    ("strides", (2.0, 1), TypeError, "must be made of integers."),
    ("strides", True, TypeError, "must be made of integers."),
    ("strides", (1, False), TypeError, "must be made of integers."),
    ("strides", np.True_, TypeError, "must be made of integers."),
    ("strides", np.array(1.5), TypeError, "must be made of integers."),
    ("strides", None, TypeError, "must be made of integers."),
    ("strides", "11", TypeError, "must be made of integers."),
    ("strides", (1, 2, 3), ValueError, "must be an integer or a pair of integers."),
    ("strides", 2**63, ValueError, "must be below 2**63."),
    ("dilation_rate", (1, 0), ValueError, "must be positive."),
    ("dilation_rate", "2", TypeError, "must be made of integers."),
    ("padding", "full", ValueError, PADDING),
    ("padding", None, ValueError, PADDING),
    ("padding", 1, ValueError, PADDING),
    ("padding", (1, 1), ValueError, PADDING),
    ("padding", ((1, 1), (1, 1), (1, 1)), ValueError, PADDING),
    ("padding", ((1, 1, 1), (1, 1)), ValueError, PADDING),
    ("padding", ((0, -1), (0, 0)), ValueError, "must be non-negative."),
    ("padding", ((0.5, 1), (0, 0)), TypeError, "must be made of integers."),
    ("data_format", "NHWC", ValueError, 'must be "channels_last" or "channels_first".'),
    ("data_format", None, ValueError, 'must be "channels_last" or "channels_first".'),
    ("activation", "softmax", ValueError, f"must be one of {', '.join(ACTIVATIONS)}, swish"),
    ("activation", "Relu", ValueError, "must be one of linear, "),
    ("input_activation", "gelu ", ValueError, "must be one of linear, "),
    ("depthwise_activation", 3, TypeError, "must be the name of an activation or None."),
    ("activation", max, TypeError, "must be the name of an activation or None."),
]


@pytest.mark.parametrize(("argument", "value", "exception", "rule"), SPEC_ERRORS)
def test_a_bad_argument_is_named(argument, value, exception, rule):
    with pytest.raises(exception) as caught:
        ConvSpec(**{argument: value})
    message = str(caught.value)
    assert message.startswith(f"`{argument}` {rule}")
    assert message.endswith(f"Received: {argument}={value!r}")


RESOLVE = {
    "x_shape": (1, 8, 9, 3),
    "depthwise_kernel_shape": (3, 3, 3, 2),
    "pointwise_kernel_shape": (1, 1, 6, 4),
}
FIT = (
    "`kernel_size`, dilated, must fit into the padded input so that no output size is negative. "
    "Received: width=1, padding='valid', kernel_size=3, dilation_rate=1, strides=1, which would "
    "give an output width of -1"
)
EXTENT = "`kernel_size` and `dilation_rate` must keep the padded input below 2**63 rows and columns"
# (changes to RESOLVE, arguments of ConvSpec, rule). A single changed shape appears as well.
SHAPE_ERRORS = [
    ({"x_shape": (8, 9, 3)}, {}, "`x` must have 4 dimensions, (batch, height, width, channels)."),
    (
        {"x_shape": (8, 9, 3)},
        {"data_format": "channels_first"},
        "`x` must have 4 dimensions, (batch, channels, height, width).",
    ),
    ({"x_shape": (1, 8, 9, 0)}, {}, "`x` must have at least one channel."),
    ({"x_shape": (-1, 8, 9, 3)}, {}, "`x.shape` must not have negative sizes."),
    (
        {"depthwise_kernel_shape": (3, 3, 3)},
        {},
        "`depthwise_kernel` must have 4 dimensions, (kernel_height, kernel_width, channels, "
        "depth_multiplier).",
    ),
    ({"depthwise_kernel_shape": (0, 3, 3, 2)}, {}, "`depthwise_kernel` must have positive sizes."),
    (
        {"depthwise_kernel_shape": (3, 3, 4, 2)},
        {},
        "`depthwise_kernel` must have the 3 channels of `x` along axis 2.",
    ),
    (
        {"pointwise_kernel_shape": (6, 4)},
        {},
        "`pointwise_kernel` must have 4 dimensions, (1, 1, channels * depth_multiplier, filters).",
    ),
    ({"pointwise_kernel_shape": (1, 1, 6, 0)}, {}, "`pointwise_kernel` must have positive sizes."),
    (
        {"pointwise_kernel_shape": (1, 1, 3, 4)},
        {},
        "`pointwise_kernel` must have the shape (1, 1, 6",
    ),
    (
        {"pointwise_kernel_shape": (3, 3, 6, 4)},
        {},
        "`pointwise_kernel` must have the shape (1, 1, 6",
    ),
    ({"bias_shape": (5,)}, {}, "`bias` must have the shape (4,)."),
    ({"bias_shape": (1, 4)}, {}, "`bias` must have the shape (4,)."),
    ({"depthwise_bias_shape": ()}, {}, "`depthwise_bias` must have the shape (6,)."),
    ({"x_shape": (1, 8, 1, 3)}, {}, FIT),
    (
        {"x_shape": (2**40, 2**20, 9, 3)},
        {"padding": "same"},
        "`x` must have fewer than 2**63 elements.",
    ),
    (
        {"pointwise_kernel_shape": (1, 1, 6, 2**61)},
        {},
        "`pointwise_kernel` must have fewer than 2**63 elements.",
    ),
    (
        {"x_shape": (2**30, 8, 9, 3), "pointwise_kernel_shape": (1, 1, 6, 2**30)},
        {},
        "`y` must have fewer than 2**63 elements.",
    ),
    (
        {"depthwise_kernel_shape": (2**31, 2**31, 3, 2)},
        {"padding": "same"},
        "`depthwise_kernel` must have fewer than 2**63 elements.",
    ),
    ({}, {"padding": "same", "dilation_rate": 2**62}, EXTENT),
    ({}, {"padding": ((2**62, 2**62), (0, 0))}, EXTENT),
]


@pytest.mark.parametrize(("changes", "kwargs", "rule"), SHAPE_ERRORS)
def test_a_bad_shape_is_named(changes, kwargs, rule):
    with pytest.raises(ValueError, match="^" + re.escape(rule)) as caught:
        ConvSpec(**kwargs).resolve(**(RESOLVE | changes))
    message = str(caught.value)
    assert "Received: " in message
    if len(changes) == 1 and rule is not FIT:
        ((argument, shape),) = changes.items()
        assert f"{argument.removesuffix('_shape')}.shape={shape}" in message


OUTPUT_SHAPE_ERRORS = [
    (((1, 8, 9), 3, 4), ValueError, "`x_shape` must have 4 dimensions"),
    (((1, -8, 9, 3), 3, 4), ValueError, "Received: x_shape=(1, -8, 9, 3)"),
    (((1, 8, 9, 3), 0, 4), ValueError, "`kernel_size` must be positive. Received: kernel_size=0"),
    (((1, 8, 9, 3), 3, 0), ValueError, "`filters` must be positive. Received: filters=0"),
    (((1, 8, 9, 3), 3, 4.7), TypeError, "`filters` must be made of integers."),
    (((None, 6, None, None), 8, 4), ValueError, "Received: height=6"),
]


@pytest.mark.parametrize(("arguments", "exception", "message"), OUTPUT_SHAPE_ERRORS)
def test_a_bad_output_shape_argument_is_named(arguments, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        ConvSpec().output_shape(*arguments)


def test_backends_say_why_not():
    g = ConvSpec().resolve(**RESOLVE)
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        assert why_not(g, dtype) is None
        assert choose(g, dtype).name == "native"
    assert "float8" in why_not(g, "float8")
    assert "'gpu'" in why_not(g, "float32", "gpu")
    with pytest.raises(ValueError, match="the data is on 'gpu'"):
        choose(g, "float32", "gpu")
    with pytest.raises(ValueError, match="`name` must not be empty"):
        Backend("", "cpu", BACKENDS[0].refusal, BACKENDS[0].load)


def test_importing_the_library_imports_no_framework():
    code = (
        "import sys, sepconv, sepconv.numpy, sepconv.reference; "
        "print(sorted({'jax', 'jaxlib', 'keras', 'tensorflow', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert sepconv.__version__ == version("sepconv")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sepconv.nothing  # noqa: B018
