"""What the contract tests share."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import keras
import numpy as np
import pytest

import sepconv.tf1 as tf
from sepconv.tf1.tensors import to_numpy

BACKEND = keras.backend.backend()
HAS_GRADIENTS = BACKEND != "numpy"

needs_gradients = pytest.mark.skipif(
    not HAS_GRADIENTS, reason="the NumPy backend of Keras has no gradients: forward items only"
)

SepConv = tf.layers.SeparableConv2D
PARTS = ("depthwise_kernel", "pointwise_kernel", "bias")


def sep(*args: Any, **kwargs: Any) -> Any:
    """The function, without its warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tf.layers.LegacyWarning)
        return tf.layers.separable_conv2d(*args, **kwargs)


def images(shape: tuple[int, ...] = (2, 8, 8, 3), dtype: str = "float32") -> Any:
    """A tensor of the backend with given sizes."""
    values = np.random.default_rng(3).standard_normal(shape)
    return tf.cast(tf.constant(values), dtype)


def array(tensor: Any) -> np.ndarray:
    """A tensor as a NumPy array."""
    return np.array(tensor) if isinstance(tensor, keras.Variable) else to_numpy(tensor)


def names(variables: Any) -> list[str]:
    """Op names of variables."""
    return [variable.op.name for variable in variables]


def parts(scope: str, count: int = 3) -> list[str]:
    """Names that the variables of a layer in a scope have."""
    return [f"{scope}/{part}" for part in PARTS[:count]]


def dtype_of(tensor: Any) -> str:
    return keras.backend.standardize_dtype(tensor.dtype)


def values(losses: Any) -> list[float]:
    """Losses as numbers."""
    return [float(array(loss)) for loss in losses]


def sum_of(tensor: Any) -> Any:
    """A regularizer: the sum."""
    return tf.reduce_sum(tensor)


def total(scale: float) -> Any:
    """A regularizer: the sum, scaled."""
    return lambda tensor: scale * tf.reduce_sum(tensor)


ROUNDED = {
    "numpy": ("exponential", "hard_sigmoid", "mish", "selu", "softplus", "softsign"),
    "tensorflow": ("gelu", "leaky_relu"),
}
"""Activations of Keras that no kernel of ours computes there and that round float64 to float32."""


def rounding(activation: str | None, dtype: str) -> float:
    """How much an activation of Keras rounds in float64, relatively; mostly 0.

    On NumPy, `convert_to_tensor` makes a float32 array of a float64 one unless told a type, and so
    do the functions that go through it. TensorFlow's have float32 constants.
    """
    if dtype != "float64" or activation not in ROUNDED.get(BACKEND, ()):
        return 0.0
    if BACKEND == "numpy":
        assert keras.ops.convert_to_tensor(np.ones(1, "float64")).dtype == "float32"
    return 2.0**-24


def defaults(function: Any) -> list[tuple[str, Any]]:
    """Names and defaults of a function's arguments, `self` and `**kwargs` left out."""
    return [
        (parameter.name, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
