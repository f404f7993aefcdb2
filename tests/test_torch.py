"""The PyTorch door: values, derivatives, transformations, the module, and what is saved."""

from __future__ import annotations

import contextlib
import copy
import doctest
import io
import itertools
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import goldens
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import KINDS, Problem, odd_problem, problems, small_problem
from torch import nn

import sepconv.torch
from sepconv import ConvSpec, _native, backends, reference
from sepconv.spec import ACTIVATIONS
from sepconv.torch import (
    SeparableConv2d,
    at_once,
    operators,
    plans,
    separable_conv2d,
    separable_conv2d_keras,
    why_not,
)
from sepconv.torch.composition import activate, composition

ROOT = Path(__file__).parent.parent
# torch itself scripts some functions when it first differentiates forward, or compiles.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
OUTSIDE_ACTIVATIONS = {
    "softplus": nn.functional.softplus,
    "softmax": lambda z: torch.softmax(z, -1),
    "hard_sigmoid": lambda z: torch.clamp(0.2 * z + 0.5, 0.0, 1.0),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def tensor_of(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array.copy())


def array_of(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def present(problem: Problem) -> list[bool]:
    return [True, True, True, problem.use_bias, problem.use_depthwise_bias]


def as_torch(problem: Problem, arrays: Any, memory_format: str = "") -> list[torch.Tensor]:
    """Arrays of a problem, those that there are, as tensors in the layouts of torch."""
    last = problem.spec.data_format == "channels_last"
    x, kernel, pointwise, *rest = (None if a is None else tensor_of(a) for a in arrays)
    x = x.permute(0, 3, 1, 2) if last else x
    if memory_format:
        x = x.contiguous(memory_format=FORMATS[memory_format])
    height, width = problem.kernel_size
    kernel = kernel.permute(2, 3, 0, 1).reshape(-1, 1, height, width)
    return [t for t in (x, kernel, pointwise.permute(3, 2, 0, 1), *rest) if t is not None]


def like_arrays(problem: Problem, tensors: Any) -> list[np.ndarray]:
    """The reverse of `as_torch`, for gradients."""
    x, kernel, pointwise, *biases = tensors
    g = problem.geometry
    kernel = kernel.reshape(g.in_channels, g.depth_multiplier, g.kernel_height, g.kernel_width)
    images = [image_of(problem, x), kernel.permute(2, 3, 0, 1), pointwise.permute(2, 3, 1, 0)]
    return [array_of(tensor) for tensor in (*images, *biases)]


def image_of(problem: Problem, y: torch.Tensor) -> torch.Tensor:
    return y.permute(0, 2, 3, 1) if problem.spec.data_format == "channels_last" else y


def keywords(problem: Problem) -> dict[str, Any]:
    spec = problem.spec
    names = ("activation", "input_activation", "depthwise_activation")
    return {
        "stride": spec.strides,
        "padding": spec.padding,
        "dilation": spec.dilation_rate,
        **{name: getattr(spec, name) for name in names},
    }


def function_of(problem: Problem, operation: Any = separable_conv2d) -> Any:
    """A function of the tensors that the problem has: x, two weights, bias, depthwise_bias."""

    def function(x: Any, depthwise: Any, pointwise: Any, *biases: Any) -> Any:
        rest = list(biases)
        bias = rest.pop(0) if problem.use_bias else None
        between = rest.pop(0) if problem.use_depthwise_bias else None
        return operation(x, depthwise, pointwise, bias, depthwise_bias=between, **keywords(problem))

    return function


def by_pair(problem: Problem) -> Any:
    """The same function by torch's own convolutions."""

    def operation(x: Any, depthwise: Any, pointwise: Any, bias: Any, **rest: Any) -> Any:
        g = problem.geometry._replace(layout=1)
        shape = (g.in_channels, g.depth_multiplier, g.kernel_height, g.kernel_width)
        return composition(
            g,
            x,
            depthwise.reshape(shape).permute(2, 3, 0, 1),
            pointwise.permute(2, 3, 1, 0),
            rest["depthwise_bias"],
            bias,
        )

    return function_of(problem, operation)


def prepared(problem: Problem, dtype: Any = np.float64) -> tuple[Any, list[torch.Tensor], Any]:
    """The function, its tensors, and an upstream gradient, all of torch."""
    *arrays, dy = problem.arrays(dtype)
    upstream = tensor_of(dy)
    if problem.spec.data_format == "channels_last":
        upstream = upstream.permute(0, 3, 1, 2)
    return function_of(problem), as_torch(problem, arrays), upstream


def tracked(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def weighed(function: Any, dy: Any) -> Any:
    """A scalar of the output that is not linear in it."""
    return lambda *args: (dy * torch.sin(function(*args))).sum()


def assert_lies(y: torch.Tensor, memory_format: str, x: torch.Tensor) -> None:
    """That the output has the memory format of its input, where that has one and no other."""
    if y.numel() and sum(x.is_contiguous(memory_format=f) for f in FORMATS.values()) == 1:
        assert y.is_contiguous(memory_format=FORMATS[memory_format])


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    ours, theirs = (
        torch.utils._pytree.tree_leaves(actual),
        torch.utils._pytree.tree_leaves(expected),
    )
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        scale = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", goldens.load_cases(), ids=goldens.case_ids)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_goldens(dtype, case, memory_format):
    x, kernel, pointwise, bias = (
        None if array is None else torch.from_numpy(array) for array in case.inputs(dtype)
    )
    g, spec = case.geometry, ConvSpec(**case.spec_kwargs)
    last = spec.data_format == "channels_last"
    x = (x.permute(0, 3, 1, 2) if last else x).contiguous(memory_format=FORMATS[memory_format])
    depthwise = kernel.permute(2, 3, 0, 1).reshape(-1, 1, g.kernel_height, g.kernel_width)
    inputs = tracked([x, depthwise, pointwise.permute(3, 2, 0, 1)])
    inputs += [] if bias is None else tracked([bias])
    y = separable_conv2d(
        *inputs,
        stride=spec.strides,
        padding=spec.padding,
        dilation=spec.dilation_rate,
        activation=spec.activation,
    )
    assert_lies(y, memory_format, x)
    out = y.permute(0, 2, 3, 1) if last else y
    if case.outside_activation is not None:
        out = OUTSIDE_ACTIVATIONS[case.outside_activation](out)
    dx, d_depthwise, d_pointwise, *d_bias = torch.autograd.grad(
        out, inputs, torch.from_numpy(case.upstream(dtype))
    )
    shape = (g.in_channels, g.depth_multiplier, g.kernel_height, g.kernel_width)
    gradients = [
        dx.permute(0, 2, 3, 1) if last else dx,
        d_depthwise.reshape(shape).permute(2, 3, 0, 1),
        d_pointwise.permute(2, 3, 1, 0),
        *d_bias,
    ]
    goldens.check(case, dtype, out.detach().numpy(), [each.numpy() for each in gradients])
    with torch.no_grad():  # Another way through the code.
        again = separable_conv2d(
            *inputs,
            stride=spec.strides,
            padding=spec.padding,
            dilation=spec.dilation_rate,
            activation=spec.activation,
        )
    assert torch.equal(again, y)


@pytest.mark.parametrize("case", goldens.load_cases(), ids=goldens.case_ids)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_goldens_in_the_layouts_of_keras(dtype, case):
    inputs = [torch.from_numpy(a).requires_grad_() for a in case.inputs(dtype) if a is not None]
    y = separable_conv2d_keras(*inputs, **case.spec_kwargs)
    if case.outside_activation is not None:
        y = OUTSIDE_ACTIVATIONS[case.outside_activation](y)
    gradients = torch.autograd.grad(y, inputs, torch.from_numpy(case.upstream(dtype)))
    goldens.check(case, dtype, y.detach().numpy(), [each.numpy() for each in gradients])


@settings(max_examples=25)
@given(problem=problems())
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_door_agrees_with_the_reference(dtype, memory_format, problem):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    g, arrays = problem.geometry, problem.arrays(stored)
    function, _, dy = prepared(problem, stored)
    args = tracked(as_torch(problem, arrays[:5], memory_format))
    y = function(*args)
    assert y.dtype == getattr(torch, dtype)
    assert_lies(y, memory_format, args[0])
    gradients = torch.autograd.grad(y, args, dy)
    y_bound, bounds = reference.error_bounds(g, dtype, *arrays.backward, from_output=True)
    goldens.assert_within(
        array_of(image_of(problem, y)), reference.forward(g, *arrays.forward), y_bound, "y"
    )
    true = reference.backward(g, *arrays.backward)
    rows = [(name, *pair) for name, *pair in zip(true._fields, true, bounds, strict=True)]
    rows = [row for row in rows if row[1] is not None]
    for gradient, (name, expected, bound) in zip(
        like_arrays(problem, gradients), rows, strict=True
    ):
        goldens.assert_within(gradient, expected, bound, name)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_memory_formats_of_outputs_and_gradients_are_those_of_torch(memory_format):
    pair = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 5, 1)
    shapes = [(2, 6, 5, 4), (2, 6, 1, 1), (1, 6, 5, 1), (2, 1, 5, 4), (1, 1, 1, 1), (2, 1, 1, 1)]
    for shape in shapes:
        channels = shape[1]
        weights = [
            pair[0].weight[:channels].detach(),
            pair[1].weight[:, :channels].detach(),
        ]
        x = torch.randn(shape).contiguous(memory_format=FORMATS[memory_format])
        y = separable_conv2d(x, *weights, padding=1)
        u = nn.functional.conv2d(x, weights[0], padding=1, groups=channels)
        expected = nn.functional.conv2d(u, weights[1])
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        if max(shape[2:]) > 1 or channels == 1:
            assert y.stride() == expected.stride(), shape


def views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = torch.full((2, 6, 8, 9), torch.nan, dtype=x.dtype)
    wide[:, 1:5, 2:7, 1:7] = x
    thin = wide.contiguous(memory_format=torch.channels_last)
    spread = torch.zeros(*x.shape, 2, dtype=x.dtype)
    spread[..., 1] = x
    return {
        "sliced": wide[:, 1:5, 2:7, 1:7],
        "sliced channels_last": thin[:, 1:5, 2:7, 1:7],
        "strided": spread[..., 1],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "negated": torch._neg_view(-x),
        "flipped": x.flip(3).flip(3),
    }


def test_views_give_what_their_copies_give():
    x = torch.randn(2, 4, 5, 6)
    weights = [torch.randn(4, 1, 3, 3), torch.randn(7, 4, 1, 1), torch.randn(7)]
    expected = separable_conv2d(x, *weights, padding="same")
    for name, view in views(x).items():
        assert torch.equal(view, x), name
        y = separable_conv2d(view, *weights, padding="same")
        last = name == "sliced channels_last"
        assert y.is_contiguous(memory_format=FORMATS["channels_last" if last else "contiguous"])
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    spread = [torch.stack([weight, weight], -1)[..., 1] for weight in weights]
    negated = [torch._neg_view(-weight) for weight in weights]
    for others in (spread, negated):
        torch.testing.assert_close(separable_conv2d(x, *others, padding="same"), expected)


def test_expanded_tensors_and_gradients():
    one = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = tracked(
        [
            torch.randn(4, 1, 3, 3).double(),
            torch.randn(7, 4, 1, 1).double(),
            torch.randn(1).double(),
        ]
    )
    x = one.expand(2, 4, 5, 6)
    y = separable_conv2d(x, *weights[:2], weights[2].expand(7))
    u = nn.functional.conv2d(x, weights[0], groups=4)
    expected = nn.functional.conv2d(u, weights[1], weights[2].expand(7))
    everything = [one, *weights]
    # The gradient of a sum is an expanded tensor.
    assert_close(
        torch.autograd.grad(y.sum(), everything), torch.autograd.grad(expected.sum(), everything)
    )


def test_same_padding_with_a_stride_is_that_of_tensorflow():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    ones = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1)
    y = separable_conv2d(x, *ones, stride=2, padding="same")
    # No zero before the first row and column, one after the last.
    assert y[0, 0].tolist() == [[45.0, 39.0], [66.0, 50.0]]
    even = separable_conv2d(x, *ones, stride=2, padding=1)
    assert even[0, 0, 0, 0] == 10.0
    unstrided = separable_conv2d(x, *ones, padding="same")
    torch.testing.assert_close(unstrided, nn.functional.conv2d(x, ones[0], padding="same"))


def test_padding_in_every_form():
    x, weights = torch.randn(1, 2, 6, 5), (torch.randn(2, 1, 3, 3), torch.randn(3, 2, 1, 1))
    expected = nn.functional.conv2d(
        nn.functional.conv2d(x, weights[0], padding=(2, 1), groups=2), weights[1]
    )
    for padding in ((2, 1), [2, 1], np.array([2, 1]), ((2, 2), (1, 1)), [[2, 2], [1, 1]]):
        y = separable_conv2d(x, *weights, padding=padding)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    lopsided = separable_conv2d(x, *weights, padding=((2, 0), (0, 1)))
    padded = nn.functional.pad(x, (0, 1, 2, 0))
    torch.testing.assert_close(lopsided, separable_conv2d(padded, *weights), rtol=1e-5, atol=1e-5)
    assert torch.equal(
        separable_conv2d(x, *weights, padding="valid"), separable_conv2d(x, *weights)
    )


def test_an_image_without_a_batch():
    x, weights = torch.randn(2, 5, 6), (torch.randn(2, 1, 3, 3), torch.randn(3, 2, 1, 1))
    y = separable_conv2d(x, *weights)
    assert torch.equal(y, separable_conv2d(x[None], *weights)[0])
    assert why_not(x, *weights) is None


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 2, 1, 4), (0, 2, 1, 1)])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_empty_outputs_have_a_shape_and_zero_gradients(shape, memory_format):
    x = torch.ones(shape).contiguous(memory_format=FORMATS[memory_format])
    args = tracked([x, torch.ones(2, 1, 2, 2), torch.ones(3, 2, 1, 1), torch.ones(3)])
    y = separable_conv2d(*args, activation="relu")
    assert y.shape == (shape[0], 3, shape[2] - 1, shape[3] - 1)
    for gradient, arg in zip(torch.autograd.grad(y.sum(), args), args, strict=True):
        assert_close(gradient, torch.zeros_like(arg), 0.0)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("channels", "filters", "side"), [(48, 40, 12), (2048, 16, 5), (16, 2048, 5)]
)
def test_error_in_float32_is_at_most_twice_that_of_torch(channels, filters, side, memory_format):
    # Root mean squares: the largest error of thousands is a matter of one rounding.
    squares, largest = np.zeros((2, 5)), np.zeros((2, 5))
    for seed in range(4):
        problem = Problem(
            spec=ConvSpec(padding="same", data_format="channels_first", activation="silu"),
            batch=2,
            height=side,
            width=side - 1,
            channels=channels,
            depth_multiplier=1,
            kernel_size=(3, 3),
            filters=filters,
            seed=seed,
        )
        g, arrays = problem.geometry, problem.arrays(np.float32)
        true = [reference.forward(g, *arrays.forward), *reference.backward(g, *arrays.backward)[:4]]
        for row, function in enumerate((function_of(problem), by_pair(problem))):
            args = tracked(as_torch(problem, arrays[:5], memory_format))
            y = function(*args)
            gradients = torch.autograd.grad(y, args, tensor_of(arrays.dy))
            values = [array_of(y), *like_arrays(problem, gradients)]
            for column, (value, exact) in enumerate(zip(values, true, strict=True)):
                errors = np.abs(value.astype(np.float64) - exact)
                squares[row, column] += np.square(errors).mean()
                largest[row, column] = max(largest[row, column], errors.max())
    assert (squares[0] <= 4 * squares[1]).all(), np.sqrt(squares)
    assert (largest[0] <= 4 * largest[1]).all(), largest


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "same", "data_format": "channels_first"},
        {"padding": ((0, 3), (4, 1)), "dilation_rate": (2, 1), "strides": (2, 3)},
        {"padding": ((2, 1), (1, 1)), "strides": (2, 1)},
        {"strides": (4, 4), "activation": "hard_silu"},  # Ends before the input does.
        {"input_activation": "relu6", "depthwise_activation": "elu", "activation": "hard_sigmoid"},
    ],
)
def test_the_pair_and_gradients_in_parts_agree_with_the_reference(arguments):
    problem = odd_problem(**arguments)
    g, arrays = problem.geometry, problem.arrays(np.float64)
    _, args, dy = prepared(problem)
    for function in (by_pair(problem), function_of(problem)):
        inputs = tracked(args)
        y = function(*inputs)
        expected = reference.forward(g, *arrays.forward)
        np.testing.assert_allclose(array_of(image_of(problem, y)), expected, rtol=0, atol=1e-12)
        gradients = like_arrays(problem, torch.autograd.grad(y, inputs, dy, create_graph=True))
        for one, other in zip(gradients, reference.backward(g, *arrays.backward), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)


def test_tensors_whose_numbers_are_not_in_memory():
    weights = torch.randn(4, 1, 3, 3), torch.randn(5, 4, 1, 1)
    image = torch.randn(1, 4, 6, 6)
    y = separable_conv2d(image, *weights, padding=1)
    torch.testing.assert_close(separable_conv2d(torch._neg_view(-image), *weights, padding=1), y)
    # It has no memory at all.
    zeros = torch._efficientzerotensor((1, 4, 6, 6))
    y = separable_conv2d(zeros, *weights, torch.ones(5), padding=1)
    assert torch.equal(y, torch.ones_like(y))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_at_kinks_are_those_of_the_reference(activation):
    # As the kernel has them, as the pair has them, and as second derivatives see them.
    code, one = ACTIVATIONS.index(activation), torch.ones(1, 1, 1, 1)
    kinks = torch.tensor([-3.0, 0.0, 3.0, 6.0]).reshape(1, 1, 1, 4).requires_grad_()
    expected = reference.ACTIVATION_TABLE[activation].slope(kinks.detach().double().numpy())
    y = separable_conv2d(kinks, one, one, activation=activation)
    ones = torch.ones_like(y)
    slopes = [
        torch.autograd.grad(y, kinks, ones, retain_graph=True)[0],
        torch.autograd.grad(y, kinks, ones, create_graph=True)[0].detach(),
        torch.autograd.grad(activate(code, kinks), kinks, ones)[0],
    ]
    for slope in slopes:
        np.testing.assert_allclose(slope.numpy(), expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, memory_format):
    problem = small_problem(**KINDS[kind])
    function, args, _ = prepared(problem)
    args[0] = args[0].contiguous(memory_format=FORMATS[memory_format])
    args = tracked(args)
    assert torch.autograd.gradcheck(function, args, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, args, fast_mode=True)


def test_gradgradcheck_with_every_element():
    problem = small_problem(activation="gelu", use_bias=True)
    function, args, _ = prepared(problem)
    assert torch.autograd.gradcheck(function, tracked(args))
    assert torch.autograd.gradgradcheck(function, tracked(args))


@pytest.mark.parametrize(
    "order", ["reverse-reverse", "forward-reverse", "reverse-forward", "plain"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_agree_with_those_of_the_pair(kind, order):
    problem = small_problem(**KINDS[kind])
    ours, args, dy = prepared(problem)
    every = tuple(range(len(args)))
    directions = tuple(torch.cos(3.0 * tensor) for tensor in args)

    def along(gradients: Any) -> torch.Tensor:
        return sum((a * b).sum() for a, b in zip(gradients, directions, strict=True))

    def second(function: Any) -> Any:
        scalar = weighed(function, dy)
        gradient = torch.func.grad(scalar, every)
        if order == "plain":
            inputs = tracked(args)
            first = torch.autograd.grad(scalar(*inputs), inputs, create_graph=True)
            return torch.autograd.grad(along(first), inputs)
        if order == "reverse-reverse":
            return torch.func.grad(lambda *args: along(gradient(*args)), every)(*args)
        if order == "forward-reverse":
            return torch.func.jvp(gradient, tuple(args), directions)[1]
        tangent = lambda *args: torch.func.jvp(scalar, args, directions)[1]  # noqa: E731
        return torch.func.grad(tangent, every)(*args)

    assert_close(second(ours), second(by_pair(problem)))


def test_third_derivatives_agree_with_those_of_the_pair():
    problem = small_problem(activation="tanh")
    ours, (x, depthwise, pointwise), dy = prepared(problem)

    def third(function: Any) -> Any:
        def scalar(t: torch.Tensor) -> torch.Tensor:
            return weighed(function, dy)(x * t, depthwise * t, pointwise + t)

        t = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
        value = scalar(t)
        for _ in range(3):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        nested = torch.func.grad(torch.func.grad(torch.func.grad(scalar)))(t.detach())
        return value, nested

    assert_close(third(ours), third(by_pair(problem)))


@pytest.mark.parametrize("transformation", ["jacfwd", "jacrev", "hessian"])
def test_jacobians_and_hessians(transformation):
    problem = replace(small_problem(activation="tanh", use_bias=True), batch=1, height=2, width=2)
    ours, args, dy = prepared(problem)
    for position in range(len(args)):
        results = []
        for function in (ours, by_pair(problem)):
            target = weighed(function, dy) if transformation == "hessian" else function
            results.append(getattr(torch.func, transformation)(target, position)(*args))
        assert_close(*results)


def test_forward_mode_without_torch_func():
    function, args, _ = prepared(small_problem(activation="silu", use_bias=True))
    tangents = [torch.cos(arg) for arg in args]
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(*pair) for pair in zip(args, tangents, strict=True)
        ]
        y = torch.autograd.forward_ad.unpack_dual(function(*duals))
    expected = torch.func.jvp(function, tuple(args), tuple(tangents))
    assert_close((y.primal, y.tangent), expected)


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {3}, {4}, {0, 3}, {1, 2, 4}])
def test_gradients_of_some_inputs_only(wanted, short, monkeypatch):
    problem = small_problem(activation="relu", use_bias=True, use_depthwise_bias=True)
    function, args, dy = prepared(problem)
    full = torch.autograd.grad(function(*(every := tracked(args))), every, dy)
    inputs = [t.requires_grad_() if i in wanted else t for i, t in enumerate(args)]
    asked = []

    def noting(inner: Any) -> Any:
        def call(*arguments: Any) -> Any:
            gradients = inner(*arguments)
            asked.append(sum(gradient is not None for gradient in gradients))
            return gradients

        return call

    for room, name in ((operators, "run_backward"), (at_once, "run_backward_at_once")):
        monkeypatch.setattr(room, name, noting(getattr(room, name)))
    chosen = [inputs[i] for i in sorted(wanted)]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with contextlib.nullcontext() if short else hooks:
        gradients = torch.autograd.grad(function(*inputs), chosen, dy)
    assert_close(gradients, [full[i] for i in sorted(wanted)], 0.0)
    assert asked == [len(wanted)]


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between them, in memory as no kernel reads it."""
    return torch.stack([tensor.contiguous(), torch.zeros_like(tensor)], -1)[..., 0]


@pytest.mark.parametrize("moved", [(), (1, 2), (0, 3), range(5)])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("activation", ["linear", "relu", "silu"])
def test_the_short_way_equals_the_long_way(activation, data_format, moved):
    # A profiler wants to see every operator, and so has the long way taken.
    problem = small_problem(True, True, activation=activation, data_format=data_format)
    function, args, dy = prepared(problem)
    args = [spread(arg) if i in moved else arg for i, arg in enumerate(args)]
    longer = torch.profiler.profile
    results = []
    for forward, backward in itertools.product((contextlib.nullcontext, longer), repeat=2):
        inputs = tracked(args)
        with forward():
            y = function(*inputs)
        short = type(y.grad_fn).__name__ == "_AtOnceBackward"
        assert short == (forward is contextlib.nullcontext)
        with backward():
            first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
            expanded = torch.autograd.grad(y.sum(), inputs)
        twice = torch.autograd.grad(function(*inputs), inputs, dy, create_graph=True)
        squares = sum((g * g).sum() for g in twice)
        second = torch.autograd.grad(squares, inputs, materialize_grads=True)
        for i, (gradient, tensor) in enumerate(zip(first, inputs, strict=True)):
            assert gradient.stride() == tensor.stride() or i in moved
        results.append((y.detach(), *first, *expanded, *second))
    for other in results[1:]:
        assert_close(other, results[0], 0.0)


def test_the_two_convolutions_of_torch_where_no_window_reaches_the_image():
    # Found by the audit: more was cut off below than the image has rows.
    problem = Problem(
        spec=ConvSpec(strides=(3, 1), padding=((3, 0), (1, 0))),
        batch=1,
        height=1,
        width=6,
        channels=2,
        depth_multiplier=2,
        kernel_size=(2, 2),
        filters=3,
        use_bias=True,
    )
    function, args, dy = prepared(problem)
    inputs, others = tracked(args), tracked(args)
    y, other = function(*inputs), by_pair(problem)(*others)
    assert_close(y, other)
    gradients = torch.autograd.grad(y, inputs, dy, materialize_grads=True)
    assert_close(gradients, torch.autograd.grad(other, others, dy, materialize_grads=True))


def test_double_use_in_one_graph():
    problem = Problem(
        spec=ConvSpec(padding="same", activation="tanh", data_format="channels_first"),
        batch=2,
        height=4,
        width=4,
        channels=3,
        depth_multiplier=1,
        kernel_size=(3, 3),
        filters=3,
    )
    ours, args, dy = prepared(problem)

    def gradients(function: Any) -> Any:
        inputs = tracked(args)
        y = function(function(*inputs), *inputs[1:]) + function(*inputs)
        return torch.autograd.grad(y, inputs, dy)

    assert_close(gradients(ours), gradients(by_pair(problem)))


def test_a_change_in_place_before_backward_is_noticed():
    layer = SeparableConv2d(3, 4, 3)
    y = layer(torch.randn(1, 3, 5, 5))
    with torch.no_grad():
        layer.pointwise.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---------------------------------------------------------------------------- other transformations


# Positions among x, depthwise_weight, pointwise_weight and bias.
@pytest.mark.parametrize("mapped", [{0}, {1}, {3}, {0, 2}, {0, 3}, {0, 1, 2, 3}])
def test_vmap_is_a_loop(mapped):
    function, args, dy = prepared(small_problem(activation="tanh", use_bias=True))
    axes = tuple((1 if i == 0 else 0) if i in mapped else None for i in range(4))
    scales = (1.0, -0.5, 2.0)
    stacked = [
        tensor if axis is None else torch.stack([tensor * scale for scale in scales], axis)
        for tensor, axis in zip(args, axes, strict=True)
    ]

    def sliced(args: Any, i: int) -> Any:
        pairs = zip(args, axes, strict=True)
        return [tensor if axis is None else tensor.select(axis, i) for tensor, axis in pairs]

    def values_and_gradients(*args: Any) -> Any:
        y, pullback = torch.func.vjp(function, *args)
        return y, *pullback(dy * y)

    looped = [values_and_gradients(*sliced(stacked, i)) for i in range(len(scales))]
    looped = [torch.stack(each) for each in zip(*looped, strict=True)]
    assert_close(list(torch.func.vmap(values_and_gradients, axes)(*stacked)), looped)

    def total(*args: Any) -> Any:
        return sum((dy * function(*sliced(args, i)) ** 2).sum() for i in range(len(scales)))

    mapped_total = lambda *args: (dy * torch.func.vmap(function, axes)(*args) ** 2).sum()  # noqa: E731
    every = tuple(range(4))
    assert_close(
        torch.func.grad(mapped_total, every)(*stacked), torch.func.grad(total, every)(*stacked)
    )


def test_vmap_of_the_input_is_one_call(monkeypatch):
    function, (x, *weights), _ = prepared(small_problem(activation="relu", use_bias=True))
    calls = []
    for name in ("run_forward", "run_backward"):
        inner = getattr(operators, name)
        monkeypatch.setattr(
            operators,
            name,
            lambda *args, name=name, inner=inner: calls.append(name) or inner(*args),
        )
    mapped = torch.func.vmap(lambda x: function(x, *weights))
    many = torch.stack([x, x, x]).requires_grad_()
    torch.autograd.grad(mapped(many).sum(), many)
    assert calls == ["run_forward", "run_backward"]


def test_a_tensor_that_left_its_transform_is_taken_as_what_it_holds():
    left: list[torch.Tensor] = []
    x, weights = torch.randn(1, 2, 5, 6), [torch.randn(2, 1, 3, 3), torch.randn(3, 2, 1, 1)]
    torch.func.grad(lambda x: left.append(x) or x.sum())(x)
    expected = separable_conv2d(x, *weights)
    for args in (weights, tracked(weights)):
        torch.testing.assert_close(separable_conv2d(left[0], *args).detach(), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    function, args, dy = prepared(small_problem(activation="silu", use_bias=True))
    plain, saved = tracked(args), tracked(args)
    function(*plain).backward(dy)
    torch.utils.checkpoint.checkpoint(function, *saved, use_reentrant=use_reentrant).backward(dy)
    assert_close([t.grad for t in saved], [t.grad for t in plain], 0.0)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_inference_mode_no_grad_and_training_give_the_same(memory_format):
    layer = SeparableConv2d(5, 7, 3, padding=1, activation="gelu")
    x = torch.randn(2, 5, 6, 4).contiguous(memory_format=FORMATS[memory_format])
    y = layer(x)
    assert y.requires_grad
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    with torch.inference_mode():
        inferred = layer(x)
        assert inferred.is_inference()
        assert torch.equal(layer(x.clone()), y)
    assert torch.equal(inferred, y)
    assert inferred.stride() == y.stride()


def test_autocast_computes_in_the_lower_precision():
    layer = SeparableConv2d(5, 7, 3, padding=1, activation="tanh")
    x = torch.randn(2, 5, 6, 4)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert y.dtype == dtype
        lower = copy.deepcopy(layer).to(dtype)
        assert torch.equal(y, lower(x.to(dtype)))
        y.float().square().sum().backward()
        assert layer.pointwise.weight.grad.dtype == torch.float32
        double = copy.deepcopy(layer).double()
        with torch.autocast("cpu", dtype):
            assert double(x.double()).dtype == torch.float64


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    problem = small_problem(activation="tanh", use_bias=True)
    function, args, dy = prepared(problem)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert_close(compiled(*args), function(*args), 1e-14)
    plain, inputs = tracked(args), tracked(args)
    expected = torch.autograd.grad(function(*plain), plain, dy)
    assert_close(torch.autograd.grad(compiled(*inputs), inputs, dy), expected, 1e-14)


class Graphs:
    """A compiler that keeps the operators of what it is given, after autograd has been traced."""

    def __init__(self) -> None:
        self.operators: list[list[str]] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=self._note, bw_compiler=self._note)(graph, inputs)

    def _note(self, graph: Any, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func

        nodes = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        self.operators.append(nodes)
        return make_boxed_func(graph.forward)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_compiled_module_is_one_operator_forward_and_one_backward(memory_format):
    layer = SeparableConv2d(4, 6, 3, stride=2, padding="same", activation="relu")
    x = torch.randn(2, 4, 7, 6).contiguous(memory_format=FORMATS[memory_format])
    graphs = Graphs()
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    y = compiled(x.requires_grad_())
    assert y.is_contiguous(memory_format=FORMATS[memory_format])
    assert torch.equal(y, layer(x))
    y.sum().backward()
    forward, backward = graphs.operators
    assert forward.count("sepconv.forward.default") == 1
    assert backward.count("sepconv.backward.default") == 1
    for graph in graphs.operators:
        names = {operator.split(".")[1] for operator in graph if operator.startswith("aten")}
        assert not names & {"convolution", "clone", "_to_copy", "contiguous", "empty"}, names


def test_a_compiled_step_with_sizes_that_change():
    layer = SeparableConv2d(3, 5, 3, stride=2, padding="same", activation="silu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, height, width in ((2, 7, 9), (3, 8, 11), (5, 12, 6)):
        x = torch.randn(batch, 3, height, width)
        y = compiled(x)
        assert torch.equal(y, layer(x))
        gradients = [
            torch.autograd.grad(out.square().sum(), list(layer.parameters()))
            for out in (y, layer(x))
        ]
        assert_close(*gradients, 1e-6)


def test_compile_under_autocast():
    layer = SeparableConv2d(3, 5, 3, padding=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))
        assert compiled(x).dtype == torch.bfloat16


def test_compile_of_the_keras_layouts():
    args = [torch.randn(2, 6, 5, 3), torch.randn(3, 3, 3, 2), torch.randn(1, 1, 6, 4)]
    function = lambda *args: separable_conv2d_keras(  # noqa: E731
        *args, strides=2, padding="same", activation="elu"
    )
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), function(*args))


# Weights that are dense but not contiguous are "incomplete" to the archive, and arrive unharmed.
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group:UserWarning")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict, tmp_path):
    layer = SeparableConv2d(3, 5, 3, stride=2, padding="same", activation="relu").eval()
    x = torch.randn(2, 3, 7, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    for program in (loaded, loaded.run_decompositions()):
        module = program.module()
        for size in (1, 2, 5):
            many = torch.randn(size, 3, 7, 8)
            assert torch.equal(module(many), layer(many))
    names = [str(node.target) for node in loaded.run_decompositions().graph.nodes]
    assert names.count("sepconv.forward.default") == 1
    assert not any("convolution" in name for name in names)


def opcheck_arguments(kind: str, geometry_last: bool = True) -> Any:
    problem = small_problem(**KINDS[kind])
    x, kernel, pointwise, bias, between, dy = (
        None if array is None else torch.from_numpy(array) for array in problem.arrays()
    )
    return problem.geometry, dy, [x, kernel, pointwise, between, bias]


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    geometry, dy, operands = opcheck_arguments(kind)
    differentiable = [None if t is None else t.requires_grad_() for t in operands]
    operators = torch.ops.sepconv
    torch.library.opcheck(operators.forward.default, (*differentiable, list(geometry)))
    wrt = [i for i, operand in enumerate(operands) if operand is not None]
    torch.library.opcheck(
        operators.backward.default,
        (dy.requires_grad_(), *differentiable, None, list(geometry), wrt),
    )
    torch.library.opcheck(
        operators.backward.default, (dy, *differentiable, dy.detach(), list(geometry), wrt[::2])
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck_of_the_doors():
    x, weights = torch.randn(1, 2, 6, 5), (torch.randn(2, 1, 3, 3), torch.randn(3, 2, 1, 1))
    tensors = (x, *weights, None, torch.randn(3))
    names = ("relu", "linear", "linear")
    args = (*tracked([*tensors[:3]]), None, tensors[4], [1, 2], "same", [], [1, 1], *names)
    torch.library.opcheck(torch.ops.sepconv.separable_conv2d.default, args)


def test_weights_on_another_device_are_refused():
    layer, x = SeparableConv2d(3, 5, 3), torch.empty(2, 3, 7, 8, device="meta")
    with pytest.raises(ValueError, match=r"on the device of `x`. Received: cpu, x.device=meta"):
        layer(x)
    with pytest.raises(ValueError, match=r"on the device of `x`. Received: meta, x.device=cpu"):
        SeparableConv2d(3, 5, 3, device="meta")(torch.randn(2, 3, 7, 8))


def test_fake_and_meta_tensors_have_the_shape_and_the_memory_format():
    layer = SeparableConv2d(3, 5, 3, stride=2, padding="same", device="meta")
    x = torch.empty(2, 3, 7, 8, device="meta")
    for memory_format in FORMATS.values():
        image = x.to(memory_format=memory_format)
        y = layer(image)
        assert y.is_meta
        assert y.shape == (2, 5, 4, 4)
        assert y.is_contiguous(memory_format=memory_format)
        (gradient,) = torch.autograd.grad(y.sum(), layer.pointwise.weight)
        assert gradient.shape == layer.pointwise.weight.shape
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = SeparableConv2d(3, 5, 3)(torch.randn(2, 3, 7, 8))
        y.sum().backward()
    assert type(y).__name__ == "FakeTensor"
    assert y.shape == (2, 5, 5, 6)


def test_the_short_way_gives_way_to_whoever_listens():
    layer, x = SeparableConv2d(3, 5, 3).requires_grad_(False), torch.randn(2, 3, 7, 8)
    y = layer(x)
    seen: list[str] = []

    class Listener(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Listener():
        assert torch.equal(layer(x), y)
    assert seen.count("sepconv.forward.default") == 1
    with torch.profiler.profile() as profile:
        layer(x)
    assert "sepconv::forward" in {event.key for event in profile.key_averages()}

    class Own(torch.Tensor):
        pass

    assert (
        type(
            separable_conv2d(
                x.as_subclass(Own), *layer.to_pair()[0].parameters(), torch.ones(5, 3, 1, 1)
            )
        )
        is Own
    )


# ---------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_inputs_and_what_the_slope_needs_are_saved(activation, memory_format):
    layer = SeparableConv2d(6, 4, 3, padding=1, depth_multiplier=2, activation=activation)
    x = torch.randn(2, 6, 9, 8).contiguous(memory_format=FORMATS[memory_format]).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    expected = {t.data_ptr() for t in (x, *layer.parameters())}
    follows = _native.slope_follows_from_output(ACTIVATIONS.index(activation))
    if activation != "linear" and follows:
        expected.add(y.data_ptr())
    assert {t.data_ptr() for t in saved} == expected
    assert len(saved) == len(expected)
    sizes = {t.data_ptr(): t.untyped_storage().nbytes() for t in saved}
    tensors = [x, *layer.parameters(), *([y] if y.data_ptr() in expected else [])]
    assert sum(sizes.values()) == sum(t.numel() * t.element_size() for t in tensors)
    # And where no hook looks.
    y = layer(x)
    kept = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
    inputs = {t.data_ptr() for t in (x, *layer.parameters())}
    assert kept == (inputs | {y.data_ptr()} if activation != "linear" and follows else inputs)


def test_a_compiled_step_saves_no_more():
    layer = SeparableConv2d(6, 4, 3, padding=1, depth_multiplier=2, activation="silu")
    x = torch.randn(2, 6, 9, 8, requires_grad=True)
    saved: list[torch.Tensor] = []
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compiled(x)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (x, *layer.parameters())}


# -------------------------------------------------------------------------------------- the module


def make_pair(**changes: Any) -> tuple[nn.Conv2d, nn.Conv2d]:
    arguments = {"padding": 1, "groups": 4, "bias": False} | changes
    return nn.Conv2d(4, 8, 3, **arguments), nn.Conv2d(8, 5, 1)


def test_parameters_are_those_of_the_pair():
    torch.manual_seed(3)
    depthwise, pointwise = make_pair()
    torch.manual_seed(3)
    layer = SeparableConv2d(4, 5, 3, padding=1, depth_multiplier=2)
    assert torch.equal(layer.depthwise.weight, depthwise.weight)
    assert torch.equal(layer.pointwise.weight, pointwise.weight)
    assert torch.equal(layer.pointwise.bias, pointwise.bias)
    both = nn.ModuleDict({"depthwise": depthwise, "pointwise": pointwise})
    fresh = SeparableConv2d(4, 5, 3, padding=1, depth_multiplier=2)
    assert fresh.load_state_dict(both.state_dict()) == ([], [])
    x = torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(fresh(x), pointwise(depthwise(x)), rtol=1e-5, atol=1e-6)
    both.load_state_dict(fresh.state_dict())


def lies_ready(layer: SeparableConv2d) -> bool:
    """Neither weight needs a copy, and neither do their gradients or the optimizer's moments."""
    return (
        layer.depthwise.weight.permute(2, 3, 0, 1).is_contiguous()
        and layer.pointwise.weight.permute(2, 3, 1, 0).is_contiguous()
    )


def test_weights_keep_lying_as_the_kernel_reads_them(tmp_path):
    layer = SeparableConv2d(4, 5, 3, padding=1, depth_multiplier=2, activation="relu")
    x = torch.randn(2, 4, 6, 5)
    y = layer(x)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    loaded = SeparableConv2d(4, 5, 3, padding=1, depth_multiplier=2, activation="relu")
    loaded.load_state_dict(torch.load(stream))
    others = {
        "itself": layer,
        "loaded": loaded,
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "channels_last": copy.deepcopy(layer).to(memory_format=torch.channels_last),
        "and back": copy.deepcopy(layer).double().float(),
        "emptied": copy.deepcopy(layer).to_empty(device="cpu"),
    }
    others["emptied"].load_state_dict(layer.state_dict())
    for name, other in others.items():
        assert lies_ready(other), name
        assert torch.equal(other(x), y), name
    optimizer = torch.optim.Adam(layer.parameters())
    layer(x).sum().backward()
    optimizer.step()
    for parameter in layer.parameters():
        assert parameter.grad.stride() == parameter.stride()
        assert optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
    assert lies_ready(layer)


def test_weights_that_lie_otherwise_work():
    layer = SeparableConv2d(4, 5, 3)
    x, expected = torch.randn(2, 4, 6, 5), None
    expected = layer(x)
    for module in (layer.depthwise, layer.pointwise):
        module.weight = nn.Parameter(module.weight.detach().contiguous())
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    nn.utils.parametrizations.weight_norm(layer.pointwise)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.functional_call(layer, dict(layer.named_parameters()), x), expected
        )


@pytest.mark.parametrize("bias", [False, True])
def test_from_pair_takes_the_parameters_over(bias):
    depthwise, pointwise = make_pair(stride=(1, 2), dilation=(2, 1), bias=bias)
    optimizer = torch.optim.SGD([*depthwise.parameters(), *pointwise.parameters()], lr=0.1)
    x = torch.randn(2, 4, 6, 5)
    expected = torch.relu(pointwise(depthwise(x)))
    layer = SeparableConv2d.from_pair(depthwise.eval(), pointwise, activation="relu")
    assert not layer.training
    assert lies_ready(layer)
    assert layer.depthwise.weight is depthwise.weight
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    layer(x).sum().backward()
    before = layer(x)
    optimizer.step()
    assert not torch.equal(layer(x), before)
    again = layer.to_pair()
    assert [repr(module) for module in again] == [repr(depthwise), repr(pointwise)]
    torch.testing.assert_close(torch.relu(again[1](again[0](x))), layer(x), rtol=1e-5, atol=1e-6)
    depthwise, pointwise = make_pair(padding="same")
    twin = SeparableConv2d.from_pair(depthwise, pointwise)
    torch.testing.assert_close(twin(x), pointwise(depthwise(x)), rtol=1e-5, atol=1e-6)
    assert twin.to_pair()[0].padding == "same"


@pytest.mark.parametrize(
    ("changes", "pointwise", "words"),
    [
        ({"groups": 2}, {}, "`conv_dw` must have as many groups"),
        ({"padding_mode": "reflect"}, {}, "`conv_dw` must pad with zeros"),
        ({}, {"kernel_size": 3}, "`conv_pw` must be a convolution of 1x1 pixels"),
        ({}, {"padding": 1}, "`conv_pw` must be a convolution of 1x1 pixels"),
        ({}, {"stride": 2}, "`conv_pw` must be a convolution of 1x1 pixels"),
        ({}, {"groups": 2, "out_channels": 6}, "`conv_pw` must be a convolution of 1x1 pixels"),
        ({}, {"in_channels": 4}, "`conv_pw` must take the channels"),
    ],
)
def test_from_pair_refuses_what_is_no_pair(changes, pointwise, words):
    arguments = {"in_channels": 8, "out_channels": 5, "kernel_size": 1} | pointwise
    with pytest.raises(ValueError, match=re.escape(words)):
        SeparableConv2d.from_pair(make_pair(**changes)[0], nn.Conv2d(**arguments))


def test_to_pair_refuses_padding_that_torch_does_not_have():
    with pytest.raises(ValueError, match="must be the same on both sides"):
        SeparableConv2d(3, 4, 3, padding=((0, 1), (1, 1))).to_pair()
    with pytest.raises(ValueError, match="not supported for strided"):
        SeparableConv2d(3, 4, 3, stride=2, padding="same").to_pair()


def test_repr():
    layer = SeparableConv2d(3, 8, 3, 2, "same", depth_multiplier=2, activation="swish")
    assert layer.extra_repr() == (
        "3, 8, kernel_size=(3, 3), stride=(2, 2), padding='same', dilation=(1, 1), "
        "depth_multiplier=2, activation='silu'"
    )


def test_attributes_that_change_later_count():
    layer, x = SeparableConv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    layer.stride, layer.padding, layer.activation = (2, 2), "same", "relu"
    expected = separable_conv2d(
        x, *(p for p in layer.parameters()), stride=2, padding="same", activation="relu"
    )
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("foreach", [True, False])
def test_training_follows_the_pair(foreach):
    torch.manual_seed(0)
    ours = nn.Sequential(
        SeparableConv2d(3, 6, 3, stride=2, padding=1, activation="relu"),
        SeparableConv2d(6, 4, 3, padding=1),
    )
    theirs = nn.Sequential(*ours[0].to_pair(), nn.ReLU(), *ours[1].to_pair())
    theirs = copy.deepcopy(theirs)
    x, target = torch.randn(8, 3, 9, 9), torch.randn(8, 4, 5, 5)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, foreach=foreach)
        losses.append([])
        for _ in range(15):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][-1] < 0.95 * losses[0][0]


# ---------------------------------------------------------------------------- threads and processes

PROCESSES = """
import os, sys, warnings
warnings.simplefilter("error")
import torch
from torch import nn
from sepconv.torch import SeparableConv2d, separable_conv2d

class Images(torch.utils.data.Dataset):
    weights = torch.ones(8, 1, 3, 3), torch.ones(8, 8, 1, 1)
    def __len__(self): return 6
    def __getitem__(self, i):
        x = torch.full((8, 32, 32), float(i))
        return separable_conv2d(x, *self.weights, padding="same")[0, 5, 5]

def workers():
    dataset = Images()
    expected = [float(dataset[i]) for i in range(6)]  # The pool of threads runs before the fork.
    for _ in range(2):
        loader = torch.utils.data.DataLoader(
            dataset, num_workers=1, multiprocessing_context="fork", timeout=60
        )
        assert [float(batch) for batch in loader] == expected

def train(rank, size, path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=size
    )
    torch.manual_seed(0)
    model = nn.Sequential(
        SeparableConv2d(3, 6, 3, padding=1, activation="relu"), SeparableConv2d(6, 4, 3, bias=False)
    )
    x = torch.randn(4, 3, 8, 8)
    model(x).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        parallel(x[rank * 2:][:2]).square().mean().backward()
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)
            assert p.grad.stride() == p.stride()
    # See `leave` in test_scale_out.py.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)

if __name__ == "__main__":
    if sys.argv[1] == "workers":
        workers()
    else:
        train(int(sys.argv[1]), 2, sys.argv[2])
"""


def test_workers_of_a_data_loader_may_call_after_a_fork(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROCESSES)
    subprocess.run([sys.executable, str(program), "workers"], check=True, timeout=120)


def test_distributed_training_gives_the_gradients_of_one_process(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROCESSES)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program)]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert not any("stride" in error or "Warning" in error for error in errors), errors


# ----------------------------------------------------------------------------- arguments and errors


def test_why_not():
    x, weights = torch.randn(1, 2, 6, 5), (torch.randn(2, 1, 3, 3), torch.randn(3, 2, 1, 1))
    assert why_not(x, *weights) is None
    complexes = [tensor.to(torch.complex64) for tensor in (x, *weights)]
    assert "complex64" in why_not(*complexes)
    y = separable_conv2d(*complexes, padding=1)
    u = nn.functional.conv2d(complexes[0], complexes[1], padding=1, groups=2)
    torch.testing.assert_close(y, nn.functional.conv2d(u, complexes[2]))
    assert SeparableConv2d(2, 3, 3).why_not(x) is None
    with pytest.raises(ValueError, match="`stride` must be positive"):
        why_not(x, *weights, stride=0)


def test_why_not_asks_about_the_call_that_the_layer_would_make(monkeypatch):
    asked = []
    monkeypatch.setattr(backends, "why_not", lambda *call: asked.append(call))
    names = {"activation": "silu", "input_activation": "relu6", "depthwise_activation": "elu"}
    arguments = {"stride": 2, "padding": ((0, 1), (2, 3)), "dilation": (2, 1), **names}
    layer = SeparableConv2d(3, 5, (3, 2), depthwise_bias=True, **arguments)
    assert layer.why_not(torch.ones(2, 3, 9, 8)) is None
    shapes = (2, 3, 9, 8), (3, 2, 3, 1), (1, 1, 3, 5), (5,), (3,)
    spec = ConvSpec(
        strides=2,
        padding=((0, 1), (2, 3)),
        dilation_rate=(2, 1),
        data_format="channels_first",
        **names,
    )
    assert asked == [(spec.resolve(*shapes), "float32", "cpu")]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_without_a_kernel_the_pair_runs_and_why_not_says_so(memory_format, monkeypatch):
    layer = SeparableConv2d(3, 5, 3, stride=2, padding="same", activation="hard_silu")
    x = torch.randn(2, 3, 7, 8).contiguous(memory_format=FORMATS[memory_format])
    expected = layer(x)
    gradients = torch.autograd.grad(expected.sum(), list(layer.parameters()))
    refuse = lambda geometry, dtype, device: "no kernel today"  # noqa: E731
    monkeypatch.setattr(backends, "why_not", refuse)
    for cached in (plans.torch_plan_cached, plans.keras_plan_cached):
        cached.cache_clear()
    try:
        assert layer.why_not(x) == "no kernel today"
        y = layer(x)
        assert "Convolution" in str(walk(y.grad_fn))
        assert y.is_contiguous(memory_format=FORMATS[memory_format])
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), list(layer.parameters())), gradients, rtol=1e-4, atol=1e-4
        )
    finally:
        for cached in (plans.torch_plan_cached, plans.keras_plan_cached):
            cached.cache_clear()


def walk(node: Any) -> list[str]:
    return [
        node.name(),
        *(name for child, _ in node.next_functions if child for name in walk(child)),
    ]


X, DEPTHWISE, POINTWISE = (2, 3, 5, 6), (6, 1, 3, 2), (4, 6, 1, 1)
ERRORS = [
    ({"x": torch.float64}, TypeError, "`depthwise_weight` must have the dtype of `x`. Received: "),
    ({"bias": torch.float16}, TypeError, "`bias` must have the dtype of `x`. Received: bias.dtype"),
    ({"depthwise_bias": torch.int32}, TypeError, "`depthwise_bias` must have the dtype of `x`."),
    ({"x": (5, 6)}, ValueError, "`x` must have 4 dimensions, (batch, channels, height, width), or"),
    ({"depthwise_weight": (6, 3, 3)}, ValueError, "`depthwise_weight` must have the shape (chan"),
    ({"depthwise_weight": (6, 2, 3, 3)}, ValueError, "`depthwise_weight` must have the shape (ch"),
    ({"depthwise_weight": (7, 1, 3, 3)}, ValueError, "`depthwise_weight` must have a multiple of"),
    ({"pointwise_weight": (4, 5, 1, 1)}, ValueError, "`pointwise_weight` must have the shape (fil"),
    ({"pointwise_weight": (4, 6)}, ValueError, "`pointwise_weight` must have the shape (filters,"),
    ({"bias": (3,)}, ValueError, "`bias` must have the shape (4,)."),
    ({"depthwise_bias": (6, 1)}, ValueError, "`depthwise_bias` must have the shape (6,)."),
    ({"x": (2, 3, 1, 6)}, ValueError, "`kernel_size`, dilated, must fit into the padded input"),
    ({"stride": (1.0, 1)}, TypeError, "`stride` must be made of integers."),
    ({"stride": 0}, ValueError, "`stride` must be positive. Received: stride=0"),
    ({"dilation": True}, TypeError, "`dilation` must be made of integers."),
    ({"dilation": (1, 2, 3)}, ValueError, "`dilation` must be an integer or a pair of integers."),
    ({"padding": -1}, ValueError, "`padding` must be non-negative. Received: padding=-1"),
    ({"padding": "full"}, ValueError, '`padding` must be "valid"'),
    ({"padding": 1.5}, TypeError, "`padding` must be made of integers."),
    ({"padding": None}, TypeError, "`padding` must be made of integers."),
    ({"activation": "softmax"}, ValueError, "`activation` must be one of"),
    ({"activation": torch.relu}, TypeError, "`activation` must be the name"),
    ({"input_activation": ["relu"]}, TypeError, "`input_activation` must be the name"),
]


@pytest.mark.parametrize(("changes", "exception", "start"), ERRORS)
def test_a_bad_argument_is_named(changes, exception, start):
    # The calls before fill the cache of plans with the equal but legal values.
    shapes = {"x": X, "depthwise_weight": DEPTHWISE, "pointwise_weight": POINTWISE}
    shapes |= {"bias": (4,), "depthwise_bias": (6,)}
    arguments: dict[str, Any] = {name: torch.ones(shape) for name, shape in shapes.items()}
    separable_conv2d(**arguments, stride=(1, 1))
    separable_conv2d(**arguments, dilation=1)
    for name, change in changes.items():
        if name not in shapes:
            arguments[name] = change
        elif isinstance(change, tuple):
            arguments[name] = torch.ones(change)
        else:
            arguments[name] = arguments[name].to(change)
    for call in (separable_conv2d, why_not):
        with pytest.raises(exception, match="^" + re.escape(start)) as caught:
            call(**arguments)
        assert "Received: " in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "exception", "words"),
    [
        ({"in_channels": 0}, ValueError, "`in_channels` must be positive."),
        ({"out_channels": 1.5}, TypeError, "`out_channels` must be made of integers."),
        ({"kernel_size": (3, 0)}, ValueError, "`kernel_size` must be positive."),
        ({"depth_multiplier": -1}, ValueError, "`depth_multiplier` must be positive."),
        ({"stride": 0}, ValueError, "`stride` must be positive."),
        ({"padding": "full"}, ValueError, '`padding` must be "valid"'),
        ({"activation": "softmax"}, ValueError, "`activation` must be one of"),
        ({"depthwise_activation": 3}, TypeError, "`depthwise_activation` must be the name"),
    ],
)
def test_the_module_refuses_bad_arguments(arguments, exception, words):
    good = {"in_channels": 3, "out_channels": 4, "kernel_size": 3}
    with pytest.raises(exception, match=re.escape(words)):
        SeparableConv2d(**(good | arguments))


def test_the_border_takes_tensors_in_any_order_without_gaps():
    g = small_problem().geometry
    x, kernel, pointwise, *_ = (torch.from_numpy(a) for a in small_problem().arrays()[:3])
    flat, y = np.array(g, np.int64), torch.empty(g.y_shape, dtype=torch.float64)
    _native.forward(flat, x.permute(0, 3, 1, 2), kernel, pointwise, None, None, y)
    again = torch.empty_like(y)
    _native.forward(flat, x, kernel.requires_grad_(), pointwise, None, None, again)
    assert torch.equal(y, again)
    holes = torch.empty(*x.shape, 2, dtype=x.dtype)[..., 0]
    overlap = x[:1].expand(x.shape)
    for bad in (holes, overlap, x.as_strided(x.shape, (24, 2, 2, 1))):
        with pytest.raises(ValueError, match="`x` must be C-contiguous"):
            _native.forward(flat, bad, kernel, pointwise, None, None, y)
    with pytest.raises(TypeError, match="must be an array that DLPack"):
        _native.forward(flat, x.to("meta"), kernel, pointwise, None, None, y)


def test_the_page_runs(tmp_path):
    page = (ROOT / "docs" / "torch.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) >= 5
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(snippets)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.parametrize("name", sepconv.torch.__all__)
def test_examples_run(name):
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    # By hand: the module says that it is of the package, and its methods are of their file.
    names = vars(sepconv.torch) | {"torch": torch}
    for test in finder.find(getattr(sepconv.torch, name), name, module=False, globs=names):
        runner.run(test)
    results = runner.summarize()
    assert results.attempted >= 3
    assert results.failed == 0
