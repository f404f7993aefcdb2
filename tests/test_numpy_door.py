"""The NumPy door: arguments, layouts, dtypes, errors, goldens, finite differences, examples."""

from __future__ import annotations

import doctest
import importlib
import re
from typing import Any

import goldens
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from strategies import Problem, problems

import sepconv
from sepconv import ConvSpec, _native, reference
from sepconv.numpy import prepare, separable_conv2d, separable_conv2d_grad
from sepconv.spec import ACTIVATIONS

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


def call(problem: Problem, arrays: Any) -> tuple[np.ndarray, reference.Gradients]:
    """Forward and gradients through the door; a fifth gradient only with `depthwise_bias`."""
    x, kernel, pointwise, bias, between, dy = arrays
    keywords = problem.spec_kwargs | {"depthwise_bias": between}
    y = separable_conv2d(x, kernel, pointwise, bias, **keywords)
    gradients = separable_conv2d_grad(dy, x, kernel, pointwise, bias, **keywords)
    assert len(gradients) == (4 if between is None else 5)
    return y, reference.Gradients(*gradients, *([None] if between is None else []))


@given(problems())
@pytest.mark.parametrize("dtype", DTYPES)
def test_door_agrees_with_the_reference(dtype, problem):
    g, arrays = problem.geometry, problem.arrays(dtype)
    y, gradients = call(problem, arrays)
    assert y.dtype == dtype
    y_bound, bounds = reference.error_bounds(g, np.dtype(dtype).name, *arrays.backward)
    goldens.assert_within(y, reference.forward(g, *arrays.forward), y_bound, "y")
    true = reference.backward(g, *arrays.backward)
    for name, gradient, expected, bound in zip(true._fields, gradients, true, bounds, strict=True):
        assert (gradient is None) == (expected is None), name
        if gradient is not None:
            assert gradient.dtype == dtype
            goldens.assert_within(gradient, expected, bound, name)


@pytest.mark.parametrize("case", goldens.load_cases(), ids=goldens.case_ids)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_goldens(dtype, case):
    inputs, dy = case.inputs(dtype), case.upstream(dtype)
    y = separable_conv2d(*inputs, **case.spec_kwargs)
    if case.outside_activation is not None:  # The door takes names that the kernels fuse.
        outside = goldens.OUTSIDE_ACTIVATIONS[case.outside_activation]
        y, dy = outside.value(y), outside.vjp(y, dy).astype(dtype)
    goldens.check(case, dtype, y, separable_conv2d_grad(dy, *inputs, **case.spec_kwargs))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_agree_with_finite_differences(activation, data_format):
    problem = Problem(
        spec=ConvSpec(
            strides=(1, 2),
            dilation_rate=(2, 1),
            padding=((1, 0), (2, 1)),
            data_format=data_format,
            activation=activation,
            input_activation=activation,
            depthwise_activation=activation,
        ),
        batch=2,
        height=6,
        width=7,
        channels=3,
        depth_multiplier=2,
        kernel_size=(2, 3),
        filters=5,
        use_depthwise_bias=True,
        seed=11,
    )
    arrays = problem.arrays()
    _, gradients = call(problem, arrays)
    rng, step = np.random.default_rng(3), 1e-6
    for index, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)

        def loss(amount, index=index, direction=direction):
            moved = list(arrays)
            moved[index] = moved[index] + amount * direction
            keywords = problem.spec_kwargs | {"depthwise_bias": moved[4]}
            return float((arrays.dy * separable_conv2d(*moved[:4], **keywords)).sum())

        slope = (loss(step) - loss(-step)) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-7, abs=1e-7)


def some_arrays(dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = ((2, 5, 6, 3), (3, 2, 3, 2), (1, 1, 6, 4), (4,), (6,), (2, 3, 5, 4))
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def strided(array: np.ndarray) -> np.ndarray:
    return np.stack([array, array], -1)[..., 1]


def unaligned(array: np.ndarray) -> np.ndarray:
    memory = np.zeros(array.nbytes + 1, np.uint8)
    moved = memory[1:].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "form", [strided, unaligned, read_only, np.asfortranarray, np.ndarray.tolist]
)
def test_memory_order_does_not_matter(form):
    x, kernel, pointwise, bias, between, dy = some_arrays(np.float64)
    expected = separable_conv2d_grad(dy, x, kernel, pointwise, bias, depthwise_bias=between)
    x, kernel, pointwise, bias, between, dy = map(form, (x, kernel, pointwise, bias, between, dy))
    received = separable_conv2d_grad(dy, x, kernel, pointwise, bias, depthwise_bias=between)
    assert [array.tobytes() for array in received] == [array.tobytes() for array in expected]
    y = separable_conv2d(x, kernel, pointwise, bias, depthwise_bias=between)
    assert type(y) is np.ndarray
    assert y.flags.c_contiguous
    assert y.flags.writeable


def test_channels_first_is_the_transposed_problem():
    x, kernel, pointwise, bias, _, _ = some_arrays()
    y = separable_conv2d(x, kernel, pointwise, bias, padding="same")
    first = separable_conv2d(
        x.transpose(0, 3, 1, 2),
        kernel,
        pointwise,
        bias,
        padding="same",
        data_format="channels_first",
    )
    np.testing.assert_allclose(first.transpose(0, 2, 3, 1), y, rtol=1e-5, atol=1e-5)


def test_numbers_are_taken_in_every_form():
    x, kernel, pointwise, _, _, _ = some_arrays()
    y = separable_conv2d(x, kernel, pointwise, strides=2, padding=((1, 1), (1, 1)))
    for strides, padding in (
        ((2, 2), [[1, 1], [1, 1]]),
        ([2, 2], np.ones((2, 2), int)),
        (np.int64(2), ((1, np.int8(1)), (1, 1))),
    ):
        again = separable_conv2d(x, kernel, pointwise, strides=strides, padding=padding)
        assert again.tobytes() == y.tobytes()


def test_empty_outputs():
    _, kernel, pointwise, bias, between, _ = some_arrays()
    for x in (np.zeros((0, 5, 6, 3), np.float32), np.zeros((2, 2, 6, 3), np.float32)):
        y = separable_conv2d(x, kernel, pointwise, bias, depthwise_bias=between)
        assert y.size == 0
        dx, *weights = separable_conv2d_grad(y, x, kernel, pointwise, bias, depthwise_bias=between)
        assert dx.shape == x.shape
        assert not dx.any()
        assert [gradient.any() for gradient in weights] == [False] * 4


@given(problems())
@pytest.mark.parametrize("dtype", DTYPES)
def test_prepared_weights_give_the_same_bits_as_those_of_the_call(dtype, problem):
    x, kernel, pointwise, bias, between, _ = problem.arrays(dtype)
    keywords = problem.spec_kwargs | {"depthwise_bias": between}
    y = separable_conv2d(x, kernel, pointwise, bias, **keywords)
    layer = prepare(kernel, pointwise, bias, **keywords)
    for weight in (kernel, pointwise, bias, between):
        if weight is not None:
            weight[...] = np.nan  # It has copies.
    out = np.full(y.shape, np.nan, dtype)
    assert layer(x, out=out) is out
    assert out.tobytes() == layer(x).tobytes() == y.tobytes()


# Several panels of filters with a part of one at the end, whole and odd depths, one pixel and many.
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("restore_threads")
def test_prepared_weights_serve_any_image_target_and_number_of_threads(dtype, data_format, target):
    generator = np.random.default_rng(7)

    def array(*shape: int, scale: float = 1) -> np.ndarray:
        return (scale * generator.standard_normal(shape)).astype(dtype)

    def images(scale: float) -> list[np.ndarray]:
        sizes = ((1, 3, 3), (1, 9, 7), (3, 30, 31))
        channels_last = [array(*size, 65, scale=scale) for size in sizes]
        if data_format == "channels_last":
            return channels_last
        return [np.ascontiguousarray(x.transpose(0, 3, 1, 2)) for x in channels_last]

    for scale in (1.0, 1e-20):  # Where bfloat16 has products that no pair may lose.
        if scale != 1 and ml_dtypes.finfo(dtype).tiny > scale:
            continue
        pointwise, bias = array(1, 1, 65, 150, scale=scale), array(150, scale=scale**2)
        weights = (array(3, 3, 65, 1), pointwise, bias)
        keywords = {"padding": "same", "data_format": data_format, "activation": "relu"}
        layer = prepare(*weights, **keywords)
        _native.set_target("portable")  # What it was packed for is not what runs now.
        elsewhere = prepare(*weights, **keywords)
        _native.set_target(target)
        for x in images(scale):
            sepconv.set_num_threads(1)
            y = separable_conv2d(x, *weights, **keywords)
            for threads in (1, 2, 5):
                sepconv.set_num_threads(threads)
                assert layer(x).tobytes() == elsewhere(x).tobytes() == y.tobytes()


def test_out_is_checked():
    x, kernel, pointwise, bias, between, _ = some_arrays()
    y = separable_conv2d(x, kernel, pointwise, bias, depthwise_bias=between)
    layer = prepare(kernel, pointwise, bias, depthwise_bias=between)
    weights = np.zeros(pointwise.size + y.size, np.float32)
    pointwise_inside = weights[: pointwise.size].reshape(pointwise.shape)
    frozen = np.empty_like(y)
    frozen.flags.writeable = False
    wrong = [
        ([*y], TypeError, "`out` must be an array of NumPy. Received: list"),
        (y.astype(np.float64), TypeError, "`out` must have the dtype of `x`. Received: out.dtype="),
        (y[:1], ValueError, f"`out` must have the shape of the output, {y.shape}. Received: out."),
        (np.asfortranarray(y), ValueError, "`out` must be contiguous, aligned and writable."),
        (frozen, ValueError, "`out` must be contiguous, aligned and writable."),
    ]
    for out, exception, message in wrong:
        for call in (
            lambda out: separable_conv2d(x, kernel, pointwise, bias, out=out),
            lambda out: layer(x, out=out),
        ):
            with pytest.raises(exception, match="^" + re.escape(message)):
                call(out)
    shared = weights[-y.size - 1 : -1].reshape(y.shape)
    with pytest.raises(ValueError, match="`out` must not share memory with `x` or the weights"):
        separable_conv2d(x, kernel, pointwise_inside, bias, out=shared)
    image = np.zeros((1, 4, 4, 1), np.float32)
    one = np.ones((1, 1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="`out` must not share memory with `x` or the weights"):
        prepare(one, one)(image, out=image)


def test_bad_arguments_of_prepared_layers_are_named():
    x, kernel, pointwise, bias, _, _ = some_arrays()
    layer = prepare(kernel, pointwise, bias)
    with pytest.raises(TypeError, match=r"^`x` must have the dtype of `depthwise_kernel`\. Rec"):
        layer(x.astype(np.float64))
    with pytest.raises(ValueError, match=r"^`x` must have 4 dimensions"):
        layer(x[0])
    wrong = [
        ((kernel.astype(int), pointwise), TypeError, "`depthwise_kernel` must have one of the dty"),
        ((kernel, pointwise.astype(float)), TypeError, "`pointwise_kernel` must have the dtype of"),
        ((kernel, pointwise[:, :, 1:]), ValueError, "`pointwise_kernel` must have the shape"),
        ((kernel[0], pointwise), ValueError, "`depthwise_kernel` must have 4 dimensions"),
        ((kernel, pointwise, bias[1:]), ValueError, "`bias` must have the shape"),
    ]
    for weights, exception, message in wrong:
        with pytest.raises(exception, match="^" + message):
            prepare(*weights)
    for name, value in (("padding", "full"), ("strides", 0), ("activation", "softmax")):
        with pytest.raises(ValueError, match=f"^`{name}` must be"):
            prepare(kernel, pointwise, **{name: value})


DTYPE_RULE = "`x` must have one of the dtypes float32, float64, bfloat16, float16, in native byte"
# (changes, exception, start of the message, its end)
ERRORS = [
    ({"x": np.int32}, TypeError, DTYPE_RULE, "Received: x.dtype=int32"),
    ({"x": ">f4"}, TypeError, DTYPE_RULE, "Received: x.dtype=>f4"),
    ({"x": np.complex64}, TypeError, DTYPE_RULE, "Received: x.dtype=complex64"),
    (
        {"depthwise_kernel": np.float64},
        TypeError,
        "`depthwise_kernel` must have the dtype of `x`.",
        "Received: depthwise_kernel.dtype=float64, x.dtype=float32",
    ),
    (
        {"pointwise_kernel": ml_dtypes.bfloat16},
        TypeError,
        "`pointwise_kernel` must have the dtype of `x`.",
        "Received: pointwise_kernel.dtype=bfloat16, x.dtype=float32",
    ),
    ({"bias": np.float16}, TypeError, "`bias` must have the dtype of `x`.", "x.dtype=float32"),
    ({"depthwise_bias": int}, TypeError, "`depthwise_bias` must have", "x.dtype=float32"),
    ({"dy": np.float64}, TypeError, "`dy` must have the dtype of `x`.", "x.dtype=float32"),
    ({"x": (5, 6, 3)}, ValueError, "`x` must have 4 dimensions", "x.shape=(5, 6, 3)"),
    ({"bias": (3,)}, ValueError, "`bias` must have the shape (4,).", "bias.shape=(3,)"),
    ({"dy": (2, 3, 5, 3)}, ValueError, "`dy` must have the shape of the output, (2, 3, 5, 4).", ""),
    ({"strides": (1.0, 1)}, TypeError, "`strides` must be made of integers.", "=(1.0, 1)"),
    ({"strides": True}, TypeError, "`strides` must be made of integers.", "strides=True"),
    ({"dilation_rate": 0}, ValueError, "`dilation_rate` must be positive.", "dilation_rate=0"),
    ({"padding": "full"}, ValueError, '`padding` must be "valid"', "padding='full'"),
    ({"padding": None}, ValueError, '`padding` must be "valid"', "padding=None"),
    ({"data_format": ["NHWC"]}, ValueError, "`data_format` must be", "data_format=['NHWC']"),
    ({"activation": "softmax"}, ValueError, "`activation` must be one of", "='softmax'"),
    ({"activation": ["relu"]}, TypeError, "`activation` must be the name", "=['relu']"),
    ({"input_activation": abs}, TypeError, "`input_activation` must be the name", ""),
]


@pytest.mark.parametrize(("changes", "exception", "start", "end"), ERRORS)
def test_a_bad_argument_is_named(changes, exception, start, end):
    # The calls before fill the cache of plans with the equal but legal values.
    names = ("x", "depthwise_kernel", "pointwise_kernel", "bias", "depthwise_bias", "dy")
    arguments: dict[str, Any] = dict(zip(names, some_arrays(), strict=True))
    separable_conv2d_grad(**arguments, strides=(1, 1))
    separable_conv2d_grad(**arguments, strides=1)
    for name, change in changes.items():
        if name not in names:
            arguments[name] = change
        elif isinstance(change, tuple):
            arguments[name] = np.zeros(change, np.float32)
        else:
            arguments[name] = arguments[name].astype(change)
    calls = [lambda: separable_conv2d_grad(**arguments)]
    if "dy" not in changes:
        calls.append(lambda: separable_conv2d(**{k: v for k, v in arguments.items() if k != "dy"}))
    for attempt in calls:
        with pytest.raises(exception, match="^" + re.escape(start)) as caught:
            attempt()
        assert str(caught.value).endswith(end)
        assert "Received: " in str(caught.value)


@pytest.mark.parametrize(
    "module",
    [
        "sepconv",
        "sepconv.spec",
        "sepconv.plans",
        "sepconv.backends",
        "sepconv.numpy",
        "sepconv.reference",
    ],
)
def test_examples_in_docstrings_run(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0
