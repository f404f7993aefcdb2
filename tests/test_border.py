"""Any geometry, any buffers: the border computes what is legal and refuses the rest unharmed.

The rules are stated a second time here, in integers without a limit, so that a product that wraps
around in the compiled code shows as a call that is not refused.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sepconv import _native
from sepconv.spec import ACTIVATIONS, Geometry

MANY = settings(max_examples=10 * settings.default.max_examples)
GUARD = 5

LIMIT, WORK_LIMIT = 2**48, 2**60
RANGES = {
    "batch": (0, LIMIT),
    "in_height": (0, LIMIT),
    "in_width": (0, LIMIT),
    "in_channels": (1, LIMIT),
    "depth_multiplier": (1, LIMIT),
    "out_height": (0, LIMIT),
    "out_width": (0, LIMIT),
    "out_channels": (1, LIMIT),
    "kernel_height": (1, LIMIT),
    "kernel_width": (1, LIMIT),
    "stride_height": (1, LIMIT),
    "stride_width": (1, LIMIT),
    "dilation_height": (1, LIMIT),
    "dilation_width": (1, LIMIT),
    "pad_top": (0, LIMIT),
    "pad_left": (0, LIMIT),
    "layout": (0, 1),
    "input_activation": (0, len(ACTIVATIONS) - 1),
    "depthwise_activation": (0, len(ACTIVATIONS) - 1),
    "activation": (0, len(ACTIVATIONS) - 1),
    "has_depthwise_bias": (0, 1),
    "has_bias": (0, 1),
}
EDGES = sorted(
    {
        sign * 2**power + step
        for sign in (1, -1)
        for power in (31, 32, 48, 62)
        for step in (-1, 0, 1)
    }
    | {-(2**63), -1, 0, 2**16, 2**24, 2**47, 2**63 - 1}
)

# How elements travel, and the code of `dtype` that says what they are.
ELEMENTS = [
    (np.dtype(np.float32), -1),
    (np.dtype(np.float32), 0),
    (np.dtype(np.float64), -1),
    (np.dtype(np.float64), 1),
    (np.dtype(np.uint16), 2),
    (np.dtype(np.float16), -1),
    (np.dtype(np.uint16), 3),
]
INPUTS = ("x", "depthwise_kernel", "pointwise_kernel", "depthwise_bias", "bias")
GRADIENTS = ("dx", "d_depthwise_kernel", "d_pointwise_kernel", "d_depthwise_bias", "d_bias")
MOST = 2**16  # elements of an array, and the largest integer of a call that computes
UNIT = [1] * 14 + [0] * 8  # one pixel, one weight, no padding
NO_CODES = [4, -2, 2**31, 2**63 - 1, -(2**63), 2**64, None, 1.5, "float32"]
REASON = r"must|incompatible function arguments"
NO_ARRAYS: list[Any] = [object(), "text", 3, 1.5, [1.0, 2.0], b"\0" * 4, memoryview(b"\0" * 8), {}]
OTHER_DTYPES = ["int8", "int32", "int64", "uint32", "bool", "complex64", "datetime64[s]", "O", "U3"]


def test_the_rules_are_those_of_the_geometry():
    assert tuple(RANGES) == Geometry._fields


def is_legal(g: Geometry, itemsize: int) -> bool:
    """Whether the core promises to compute this, if memory suffices."""
    if any(not low <= value <= high for value, (low, high) in zip(g, RANGES.values(), strict=True)):
        return False

    def product(*factors: int) -> int:
        return math.prod(max(factor, 1) for factor in factors)

    def reach(out_size: int, stride: int, kernel_size: int, dilation: int) -> int:
        return max(out_size - 1, 0) * stride + (kernel_size - 1) * dilation

    taps = g.kernel_height * g.kernel_width
    return (
        product(g.batch, g.in_height, g.in_width, g.in_channels, itemsize) <= LIMIT
        and product(g.batch, g.out_height, g.out_width, g.out_channels, itemsize) <= LIMIT
        and product(taps, g.in_channels, g.depth_multiplier, itemsize) <= LIMIT
        and product(g.in_channels, g.depth_multiplier, g.out_channels, itemsize) <= LIMIT
        and reach(g.out_height, g.stride_height, g.kernel_height, g.dilation_height) <= LIMIT
        and reach(g.out_width, g.stride_width, g.kernel_width, g.dilation_width) <= LIMIT
        and product(
            g.batch,
            g.out_height,
            g.out_width,
            g.in_channels,
            g.depth_multiplier,
            g.out_channels + taps,
        )
        <= WORK_LIMIT
    )


def sizes_of(g: Geometry) -> dict[str, int]:
    x = g.batch * g.in_height * g.in_width * g.in_channels
    y = g.batch * g.out_height * g.out_width * g.out_channels
    between = g.in_channels * g.depth_multiplier
    sizes = {
        "x": x,
        "depthwise_kernel": g.kernel_height * g.kernel_width * between,
        "pointwise_kernel": between * g.out_channels,
        "depthwise_bias": between,
        "bias": g.out_channels,
    }
    return (
        sizes | {f"d{'' if n == 'x' else '_'}{n}": s for n, s in sizes.items()} | {"y": y, "dy": y}
    )


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Small and legal, but for up to three fields."""
    small = {
        name: draw(st.integers(low, min(high, low + 4))) for name, (low, high) in RANGES.items()
    }
    wrong = draw(
        st.dictionaries(
            st.sampled_from(sorted(RANGES)),
            st.one_of(st.sampled_from(EDGES), st.integers(-(2**63), 2**63 - 1)),
            max_size=3,
        )
    )
    return Geometry(**(small | wrong))


class Buffers:
    """The arrays of a call, between guards; `intact` looks whether anything but outputs changed."""

    def __init__(self, element: np.dtype) -> None:
        self.element = element
        self.kept: list[tuple[np.ndarray, bytes, slice]] = []

    def array(self, size: int, output: bool) -> np.ndarray:
        whole = np.zeros(size + 2 * GUARD, self.element)
        written = slice(GUARD, GUARD + size if output else GUARD)
        self.kept.append((whole, whole.tobytes(), written))
        return whole[GUARD : GUARD + size]

    def intact(self, outputs_too: bool) -> bool:
        for whole, before, written in self.kept:
            after = whole.copy()
            if not outputs_too:
                after[written] = 0
            if after.tobytes() != before:
                return False
        return True


FAULTS = ["shorter", "longer", "strided", "read-only", "unaligned", "absent", "no array", "dtype"]


def spoiled(draw: Any, array: np.ndarray | None, fault: str, output: bool, optional: bool) -> Any:
    """What stands in the place of `array` and makes the call illegal."""
    if array is None:  # a bias that the geometry does not have
        return np.zeros(1, np.float32)
    if fault == "no array":
        return draw(st.sampled_from(NO_ARRAYS))
    if fault == "dtype":
        return np.zeros(array.size, draw(st.sampled_from(OTHER_DTYPES)))
    if fault == "absent" and not optional:
        return None
    if fault == "shorter" and array.size > 0:
        return array[1:]
    if fault == "strided" and array.size > 1:
        return np.zeros(2 * array.size, array.dtype)[::2]
    if fault == "read-only" and output:
        array.flags.writeable = False
        return array
    if fault == "unaligned" and array.size > 0:
        return np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype)
    return np.zeros(array.size + 1, array.dtype)


def check(
    draw: Any,
    call: Any,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    optional: str,
    most: int = MOST,
) -> None:
    """One call: a legal one computes, any other is refused with a reason and writes nothing.

    No integer of a call that computes is greater than `most`.
    """
    g = draw(geometries())
    element, code = draw(st.sampled_from(ELEMENTS))
    legal, sizes = is_legal(g, element.itemsize), sizes_of(g)
    buffers = Buffers(element)
    arguments: dict[str, Any] = {}
    for name in (*inputs, *outputs):
        if getattr(g, f"has_{name.removeprefix('d_')}", 1) == 0:
            arguments[name] = None
        elif 0 <= sizes[name] <= MOST and max(map(abs, g)) <= most:
            arguments[name] = buffers.array(sizes[name], name in outputs)
        else:
            # No memory is that large, or the rows of an image without pixels are: such a call has
            # an array too few or too many elements and is never legal.
            legal = False
            arguments[name] = buffers.array(sizes[name] + 1 if sizes[name] == 0 else 7, False)

    fault_of = st.dictionaries(st.sampled_from([*arguments]), st.sampled_from(FAULTS), max_size=2)
    for name, fault in draw(fault_of).items():
        legal = False
        arguments[name] = spoiled(
            draw, arguments[name], fault, name in outputs, name in optional.split()
        )
    if draw(st.integers(0, 9)) == 9:
        legal, code = False, draw(st.sampled_from(NO_CODES))

    with nullcontext() if legal else pytest.raises((ValueError, TypeError), match=REASON):
        call(np.array(g, np.int64), **arguments, dtype=code)
    assert buffers.intact(outputs_too=not legal), "written where nothing may be"


@MANY
@given(data=st.data())
def test_any_forward_call_computes_or_is_refused(data):
    check(data.draw, _native.forward, INPUTS, ("y",), optional="")


@MANY
@given(data=st.data())
def test_any_weights_are_packed_or_refused(data):
    check(data.draw, _native.pack, INPUTS[1:], (), "", most=LIMIT)


OF_WEIGHTS = (
    "kernel_height",
    "kernel_width",
    "in_channels",
    "depth_multiplier",
    "out_channels",
    "has_depthwise_bias",
    "has_bias",
)


@MANY
@given(data=st.data())
def test_any_call_with_packed_weights_computes_or_is_refused(data):
    small = st.builds(
        Geometry, **{n: st.integers(low, min(high, low + 2)) for n, (low, high) in RANGES.items()}
    )
    packed_for, g = data.draw(small), data.draw(small)
    element, code = data.draw(st.sampled_from(ELEMENTS))
    if data.draw(st.booleans()):
        g = g._replace(**{name: getattr(packed_for, name) for name in OF_WEIGHTS})
    legal = all(getattr(packed_for, name) == getattr(g, name) for name in OF_WEIGHTS)
    weights = {
        name: np.ones(sizes_of(packed_for)[name], element)
        for name in INPUTS[1:]
        if getattr(packed_for, f"has_{name}", 1)
    }
    packed = _native.pack(np.array(packed_for), **(dict.fromkeys(INPUTS[1:]) | weights), dtype=code)

    buffers = Buffers(element)
    arrays: dict[str, Any] = {n: buffers.array(sizes_of(g)[n], n == "y") for n in ("x", "y")}
    fault = data.draw(st.sampled_from([None, *FAULTS]))
    if fault:
        legal, name = False, data.draw(st.sampled_from([*arrays]))
        arrays[name] = spoiled(data.draw, arrays[name], fault, name == "y", False)
    with nullcontext() if legal else pytest.raises((ValueError, TypeError), match=REASON):
        _native.forward_packed(np.array(g), arrays["x"], packed, arrays["y"])
    assert buffers.intact(outputs_too=not legal), "written where nothing may be"


@pytest.mark.parametrize("weights", [None, 1, "text", object(), np.zeros(1, np.float32)])
def test_only_packed_weights_are_taken_for_them(weights):
    one = np.ones(1, np.float32)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _native.forward_packed(np.array(UNIT), one, weights, one.copy())


@MANY
@given(data=st.data())
def test_any_backward_call_computes_or_is_refused(data):
    optional = " ".join(("y", *GRADIENTS))
    check(data.draw, _native.backward, ("dy", *INPUTS, "y"), GRADIENTS, optional)


# The example's weights, which a 16-bit call widens, fit no memory: a plan once tried to hold them.
@MANY
@given(g=geometries(), dtype=st.sampled_from(["float32", "float64", "bfloat16", "float16"]))
@example(g=Geometry(*[1] * 3, 2, 2**31 - 1, *[1] * 9, *[0] * 8), dtype="bfloat16")
def test_any_geometry_has_a_plan_or_is_refused(g, dtype):
    legal = is_legal(g, {"float32": 4, "float64": 8}.get(dtype, 2))
    # A plan walks over the taps: of a kernel that no memory holds, for hours.
    assume(not legal or max(g.kernel_height, g.kernel_width) <= MOST)
    for backward in (False, True):
        if legal:
            assert all(value >= 0 for value in _native.plan(list(g), dtype, backward).values())
        else:
            with pytest.raises(ValueError, match=r"must be at (least|most) .*Received: "):
                _native.plan(list(g), dtype, backward)


@settings(max_examples=settings.default.max_examples)
@given(
    geometry=st.one_of(
        st.lists(st.integers(-(2**64), 2**64), max_size=30),
        st.sampled_from([*NO_ARRAYS, None, np.zeros(22), np.zeros((22, 1), np.int32)]),
    )
)
def test_a_geometry_that_is_none_is_refused(geometry):
    with pytest.raises((ValueError, TypeError)):
        _native.plan(geometry, "float32", False)
    one = np.ones(1, np.float32)
    with pytest.raises((ValueError, TypeError)):
        _native.forward(geometry, one, one, one, None, None, one.copy())


@settings(max_examples=3 * settings.default.max_examples)
@given(size=st.integers(0, 64), view=st.sampled_from(["int64", "uint64", "float64", "int32", "u1"]))
def test_only_22_integers_are_a_geometry(size, view):
    one, y = np.ones(1, np.float32), np.zeros(1, np.float32)
    geometry = np.array(UNIT, np.int64).view(view)
    geometry = np.resize(geometry, size)
    if size == len(UNIT) and view == "int64":
        _native.forward(geometry, one, one, one, None, None, y)
        assert y[0] == 1
    else:
        with pytest.raises((ValueError, TypeError), match="`geometry` must"):
            _native.forward(geometry, one, one, one, None, None, y)
        assert y[0] == 0
