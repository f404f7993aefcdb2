"""One call and its gradients through each door, on and to NumPy arrays in the layouts of Keras.

Every function takes a problem and its arrays and returns (y, gradients). Frameworks are imported by
the door that needs them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from strategies import Arrays, Problem

from sepconv import reference

Results = tuple[np.ndarray, reference.Gradients]


def by_numpy(problem: Problem, arrays: Arrays) -> Results:
    from sepconv.numpy import separable_conv2d, separable_conv2d_grad

    x, kernel, pointwise, bias, between, dy = arrays
    keywords = {"depthwise_bias": between, **problem.spec_kwargs}
    y = separable_conv2d(x, kernel, pointwise, bias, **keywords)
    gradients = separable_conv2d_grad(dy, x, kernel, pointwise, bias, **keywords)
    return y, reference.Gradients(*gradients, *[None] * (5 - len(gradients)))


def _tensor(array: np.ndarray | None) -> Any:
    import torch

    if array is None:
        return None
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _array(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _by_autograd(operation: Callable[..., Any], arrays: Arrays) -> Results:
    """`operation` on tensors of these arrays, `None` where there is no bias."""
    import torch

    *inputs, dy = map(_tensor, arrays)
    given = [tensor.requires_grad_() for tensor in inputs if tensor is not None]
    y = operation(*inputs)
    found = iter(torch.autograd.grad(y, given, dy))
    gradients = [None if tensor is None else _array(next(found)) for tensor in inputs]
    return _array(y), reference.Gradients(*gradients)


def by_torch_keras(problem: Problem, arrays: Arrays) -> Results:
    from sepconv.torch import separable_conv2d_keras

    def operation(x: Any, kernel: Any, pointwise: Any, bias: Any, between: Any) -> Any:
        return separable_conv2d_keras(
            x, kernel, pointwise, bias, depthwise_bias=between, **problem.spec_kwargs
        )

    return _by_autograd(operation, arrays)


def by_torch(problem: Problem, arrays: Arrays) -> Results:
    """The function in the layouts of torch; images in channels_last lie so in memory."""
    from sepconv.torch import separable_conv2d

    spec = problem.spec
    last = problem.geometry.layout == 0

    def in_layouts_of_torch(x: Any, kernel: Any, pointwise: Any, bias: Any, between: Any) -> Any:
        y = separable_conv2d(
            x.permute(0, 3, 1, 2) if last else x,
            kernel.permute(2, 3, 0, 1).reshape(-1, 1, *problem.kernel_size),
            pointwise.permute(3, 2, 0, 1),
            bias,
            stride=spec.strides,
            padding=spec.padding,
            dilation=spec.dilation_rate,
            activation=spec.activation,
            input_activation=spec.input_activation,
            depthwise_bias=between,
            depthwise_activation=spec.depthwise_activation,
        )
        return y.permute(0, 2, 3, 1) if last else y

    return _by_autograd(in_layouts_of_torch, arrays)


def by_pair_of_torch(problem: Problem, arrays: Arrays) -> Results:
    """The same by torch's own two convolutions, which errors are compared with."""
    from sepconv.torch.composition import composition

    g = problem.geometry

    def operation(x: Any, kernel: Any, pointwise: Any, bias: Any, between: Any) -> Any:
        return composition(g, x, kernel, pointwise, between, bias)

    return _by_autograd(operation, arrays)


def by_jax(problem: Problem, arrays: Arrays) -> Results:
    import jax

    from sepconv.jax import separable_conv2d

    # JAX has float64 only when told so, and the dtype is that of the arrays in any case.
    with jax.enable_x64(True):
        *inputs, dy = (None if array is None else jax.numpy.asarray(array) for array in arrays)
        given = [array for array in inputs if array is not None]

        def function(*present: Any) -> Any:
            rest = list(present[3:])
            bias = rest.pop(0) if problem.use_bias else None
            between = rest.pop(0) if problem.use_depthwise_bias else None
            return separable_conv2d(
                *present[:3], bias, depthwise_bias=between, **problem.spec_kwargs
            )

        y, pullback = jax.vjp(function, *given)
        found = iter(pullback(dy))
        gradients = [None if array is None else np.asarray(next(found)) for array in inputs]
        return np.asarray(y), reference.Gradients(*gradients)


@functools.cache
def _keras_on_torch() -> Any:
    if os.environ.setdefault("KERAS_BACKEND", "torch") != "torch":
        raise RuntimeError("the door `keras` is tried with torch: set KERAS_BACKEND=torch")
    import sepconv.keras

    return sepconv.keras


def by_keras(problem: Problem, arrays: Arrays) -> Results:
    """The layer, with torch as the backend of Keras."""
    keras, spec = _keras_on_torch(), problem.spec
    layer = keras.SeparableConv2D(
        problem.filters,
        problem.kernel_size,
        strides=spec.strides,
        padding=spec.padding,
        data_format=spec.data_format,
        dilation_rate=spec.dilation_rate,
        depth_multiplier=problem.depth_multiplier,
        activation=spec.activation,
        use_bias=problem.use_bias,
        dtype=arrays.x.dtype.name,
    )
    layer.build(arrays.x.shape)

    def operation(x: Any, kernel: Any, pointwise: Any, bias: Any, between: Any) -> Any:
        # Not assigned but handed in, so that the gradients belong to the tensors of this call.
        weights = [weight for weight in (kernel, pointwise, bias) if weight is not None]
        y, _ = layer.stateless_call(weights, [], x)
        return y

    return _by_autograd(operation, arrays)


DOORS: dict[str, Callable[[Problem, Arrays], Results]] = {
    "numpy": by_numpy,
    "torch": by_torch,
    "torch_keras": by_torch_keras,
    "keras": by_keras,
    "jax": by_jax,
}
# These keep the stored output for the backward pass where the slope of the activation follows from
# it, and so have the larger bound of it.
SAVING = frozenset(DOORS) - {"numpy"}
