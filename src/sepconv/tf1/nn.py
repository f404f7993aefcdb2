"""`tf.nn`: the activations and few operations that legacy code writes around the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from sepconv.tf1.tensors import operand

__all__ = [
    "avg_pool",
    "bias_add",
    "conv2d",
    "elu",
    "hard_sigmoid",
    "l2_loss",
    "leaky_relu",
    "log_softmax",
    "max_pool",
    "moments",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "softmax",
    "softmax_cross_entropy_with_logits",
    "softplus",
    "softsign",
    "sparse_softmax_cross_entropy_with_logits",
    "swish",
    "tanh",
]

KERAS_ACTIVATIONS: dict[Callable[..., Any], str] = {}
"""The functions of this module that are Keras activations, with their Keras names."""


def _activation(name: str) -> Callable[..., Any]:
    operation = keras.activations.get(name)

    def activation(features: Any, name: str | None = None) -> Any:
        return operation(operand(features))

    activation.__name__ = activation.__qualname__ = name
    activation.__doc__ = f"Computes `keras.activations.{name}` of a tensor."
    KERAS_ACTIVATIONS[activation] = name
    return activation


def keras_function(function: Any) -> Any:
    """Returns the Keras activation that a function of this module is; any other, as it is.

    Args:
        function: An activation.
    """
    try:
        name = KERAS_ACTIVATIONS.get(function)
    except TypeError:  # Not hashable.
        return function
    return function if name is None else keras.activations.get(name)


relu = _activation("relu")
relu6 = _activation("relu6")
elu = _activation("elu")
selu = _activation("selu")
sigmoid = _activation("sigmoid")
tanh = _activation("tanh")
softplus = _activation("softplus")
softsign = _activation("softsign")
swish = _activation("silu")


def hard_sigmoid(x: Any) -> Any:
    """Computes `clip(0.2*x + 0.5, 0, 1)`, the original's form; Keras 3 has a slope of 1/6.

    Args:
        x: A tensor.

    Example:
        >>> import keras
        >>> from sepconv.tf1 import nn
        >>> float(nn.hard_sigmoid(keras.ops.convert_to_tensor(1.0))) - 0.7 < 1e-6
        True
    """
    return ops.clip(0.2 * x + 0.5, 0.0, 1.0)


def leaky_relu(features: Any, alpha: float = 0.2, name: str | None = None) -> Any:
    """Computes `x` where positive, `alpha * x` elsewhere."""
    return ops.leaky_relu(operand(features), negative_slope=alpha)


def softmax(logits: Any, axis: int = -1, name: str | None = None) -> Any:
    """Computes `exp(x) / sum(exp(x))` along an axis."""
    return ops.softmax(operand(logits), axis=axis)


def log_softmax(logits: Any, axis: int = -1, name: str | None = None) -> Any:
    """Computes the logarithm of `softmax`."""
    return ops.log_softmax(operand(logits), axis=axis)


def l2_loss(t: Any, name: str | None = None) -> Any:
    """Computes `sum(t**2) / 2`."""
    return ops.sum(ops.square(operand(t))) / 2


def bias_add(value: Any, bias: Any, data_format: str = "NHWC", name: str | None = None) -> Any:
    """Adds a bias along the channels: the last axis, or axis 1 where `data_format` is `NCHW`."""
    value, bias = operand(value), operand(bias)
    if data_format.startswith("NC"):
        bias = ops.reshape(bias, (1, -1) + (1,) * (len(value.shape) - 2))
    return value + bias  # On TensorFlow, ops.add guesses the axis of a bias by its size.


def moments(x: Any, axes: Sequence[int], name: str | None = None, keepdims: bool = False) -> Any:
    """Returns mean and variance along axes."""
    return ops.moments(operand(x), axes=tuple(axes), keepdims=keepdims)


def _window(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[1], value[2]) if len(value) == 4 else (value[0], value[1])


def conv2d(input: Any, filter: Any, strides: Any, padding: str, name: str | None = None) -> Any:
    """Computes an ordinary convolution of a channels-last tensor.

    Args:
        input: (batch, height, width, channels).
        filter: (kernel_height, kernel_width, channels, filters).
        strides: An integer, a pair, or four as in `[1, 2, 2, 1]`.
        padding: `SAME` or `VALID`.
        name: Not used.
    """
    return ops.conv(
        operand(input),
        operand(filter),
        _window(strides),
        padding.lower(),
        data_format="channels_last",
    )


def max_pool(value: Any, ksize: Any, strides: Any, padding: str, name: str | None = None) -> Any:
    """Takes the maximum over windows of a channels-last tensor; arguments as in `conv2d`."""
    return ops.max_pool(
        operand(value),
        _window(ksize),
        _window(strides),
        padding.lower(),
        data_format="channels_last",
    )


def avg_pool(value: Any, ksize: Any, strides: Any, padding: str, name: str | None = None) -> Any:
    """Takes the mean over windows of a channels-last tensor; arguments as in `conv2d`."""
    return ops.average_pool(
        operand(value),
        _window(ksize),
        _window(strides),
        padding.lower(),
        data_format="channels_last",
    )


def softmax_cross_entropy_with_logits(
    labels: Any = None, logits: Any = None, axis: int = -1, name: str | None = None
) -> Any:
    """Computes `-sum(labels * log_softmax(logits))` along an axis."""
    return -ops.sum(
        ops.multiply(operand(labels), ops.log_softmax(operand(logits), axis=axis)), axis=axis
    )


def sparse_softmax_cross_entropy_with_logits(
    labels: Any = None, logits: Any = None, name: str | None = None
) -> Any:
    """Computes the cross entropy of class numbers and logits, one loss per example."""
    return ops.sparse_categorical_crossentropy(operand(labels), operand(logits), from_logits=True)
