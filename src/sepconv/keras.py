"""The Keras layer: the stock `SeparableConv2D` with its computation replaced.

Importing this module imports Keras. If nothing says which backend Keras shall use, it picks the
first of JAX, torch and TensorFlow that is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sepconv import backends
from sepconv.spec import ACTIVATIONS, ConvSpec

__all__ = ["SeparableConv2D"]

# What Keras writes into keras.json at its first import, whatever backend runs it. Nobody's choice.
_UNTOUCHED_CONFIG = {
    "floatx": "float32",
    "epsilon": 1e-07,
    "backend": "tensorflow",
    "image_data_format": "channels_last",
}


def _backend_is_chosen() -> bool:
    if "keras" in sys.modules or os.environ.get("KERAS_BACKEND"):
        return True
    home = os.environ.get("KERAS_HOME")
    if home is None:
        user = os.path.expanduser("~")
        home = os.path.join(user if os.access(user, os.W_OK) else "/tmp", ".keras")
    try:
        config = json.loads(Path(home, "keras.json").expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(config != _UNTOUCHED_CONFIG)


def _choose_backend() -> None:
    for name in ("jax", "torch", "tensorflow"):
        if importlib.util.find_spec(name) is not None:
            os.environ["KERAS_BACKEND"] = name
            logging.getLogger(__name__).info(
                "No Keras backend was chosen: using %s. Set KERAS_BACKEND to use another one.", name
            )
            return


if not _backend_is_chosen():
    _choose_backend()

import keras  # noqa: E402
from keras import ops  # noqa: E402

_BACKEND = keras.config.backend()
# The doors that take the arrays of a Keras backend, and the operation there that takes the layouts
# of Keras.
_DOORS = {
    "jax": ("sepconv.jax", "separable_conv2d"),
    "numpy": ("sepconv.numpy", "separable_conv2d"),
    "torch": ("sepconv.torch", "separable_conv2d_keras"),
}
_DOOR: Any = importlib.import_module(_DOORS[_BACKEND][0]) if _BACKEND in _DOORS else None
_OPERATION = _DOORS[_BACKEND][1] if _BACKEND in _DOORS else ""

_is_compiling: Callable[[], bool] = (
    importlib.import_module("torch").compiler.is_compiling if _BACKEND == "torch" else lambda: False
)
_FUSED = tuple((getattr(keras.activations, name), name) for name in ACTIVATIONS)


def _fused_name(activation: Callable[..., Any]) -> str | None:
    """The name of a fused activation if the function is that of Keras itself, else None."""
    return next((name for function, name in _FUSED if function is activation), None)


@functools.lru_cache(maxsize=4096)
def _spec(**arguments: Any) -> ConvSpec:
    return ConvSpec(**arguments)


@keras.saving.register_keras_serializable(package="sepconv")
class SeparableConv2D(keras.layers.SeparableConv2D):
    """A depthwise-separable 2-D convolution layer that computes in one pass over memory.

        y = activation(pointwise(depthwise(x)) + bias)

    Arguments, weights, config, saving and every other behaviour are those of
    `keras.layers.SeparableConv2D`; only the computation differs. Beyond it, an output of size 0 is
    legal and empty. On the JAX, torch and NumPy backends of Keras the kernel of this library runs,
    on others the computation of Keras; `why_not` tells which.

    The activation is part of the kernel if it is one of Keras' own functions relu, relu6,
    leaky_relu, sigmoid, tanh, silu, gelu, hard_sigmoid, hard_silu, elu or linear, in its default
    form. Any other callable runs in the framework, on the result of the kernel.

    Example:
        >>> import numpy as np
        >>> layer = SeparableConv2D(4, 3, padding="same", activation="relu")
        >>> tuple(layer(np.ones((1, 5, 5, 2), "float32")).shape)
        (1, 5, 5, 4)
        >>> stock = keras.layers.SeparableConv2D(4, 3)
        >>> ours = SeparableConv2D.from_config(stock.get_config())
    """

    def call(self, inputs: Any) -> Any:
        """Computes the layer. Keras calls it, with the inputs in the compute dtype."""
        weights = [ops.convert_to_tensor(weight) for weight in self._weights_in_use()]
        dtypes = [keras.backend.standardize_dtype(array.dtype) for array in (inputs, *weights)]
        # While torch compiles, the door must decide: what follows is no part of a graph.
        if not _is_compiling():
            device = self._device_of(inputs)
            if self._refusal(tuple(inputs.shape), *dtypes, device=device) is not None:
                return self._stock_call(inputs)
        fused = _fused_name(self.activation)
        outputs = getattr(_DOOR, _OPERATION)(
            inputs,
            *weights,
            **self._geometric_arguments(),
            activation=fused,
        )
        return self.activation(outputs) if fused is None else outputs

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, int | None, int | None, int | None]:
        """Returns the shape of the output; unknown sizes stay `None`, and 0 is legal."""
        return self._conv_spec.output_shape(input_shape, self.kernel_size, self.filters)

    def why_not(self, inputs: Any = None) -> str | None:
        """Tells why a call would run the computation of Keras instead of our kernel.

        Args:
            inputs: What the layer would be called on: an array, a symbolic Keras tensor, or
                anything that has a `shape` and a `dtype`. `None` stands for the smallest input
                that the layer can get.

        Returns:
            `None` if our kernel runs the convolution, else the reason.

        Example:
            >>> SeparableConv2D(4, 3).why_not() is None
            True
        """
        dtype = self.compute_dtype
        given: tuple[int | None, ...] = (None,) * 4
        if inputs is not None:
            given = tuple(inputs.shape)
            own = keras.backend.standardize_dtype(inputs.dtype)
            dtype = dtype if self.autocast and keras.backend.is_float_dtype(own) else own
        shape = self._with_known_sizes(given)
        device = self._device_of(inputs)
        reason = self._refusal(shape, dtype, self.compute_dtype, device=device)
        return reason or self._refusal_of_door(shape, dtype)

    def _refusal(
        self, shape: tuple[int, ...], dtype: str, *weight_dtypes: str, device: str
    ) -> str | None:
        if _DOOR is None:
            return f"sepconv has no kernel for the {_BACKEND} backend of Keras"
        for weight_dtype in weight_dtypes:
            if dtype != weight_dtype:
                return f"the input is {dtype}, and the layer computes in {weight_dtype}"
        # The batch decides nothing, and may be symbolic.
        shapes = self._call_shapes((1, *shape[1:]))
        return backends.why_not(self._conv_spec.resolve(*shapes), dtype, device)

    def _device_of(self, inputs: Any) -> str:
        """Where a call would run. JAX decides when it lowers, and counts as the CPU until then."""
        if _BACKEND != "torch":
            return "cpu"
        if self.built and not hasattr(inputs, "device"):  # Symbolic, or nothing at all.
            inputs = self.depthwise_kernel.value
        device: str = getattr(getattr(inputs, "device", None), "type", "cpu")
        # Keras takes its shapes from there.
        return "cpu" if device == "meta" else device

    def _refusal_of_door(self, shape: tuple[int, ...], dtype: str) -> str | None:
        if _BACKEND != "jax":
            return None
        import jax

        arrays = [jax.ShapeDtypeStruct(each, dtype) for each in self._call_shapes(shape)]
        return _DOOR.why_not(*arrays, **self._geometric_arguments())

    def _stock_call(self, inputs: Any) -> Any:
        """The computation of Keras, without two of its faults."""
        shape = self.compute_output_shape(tuple(inputs.shape))
        if 0 in shape and None not in shape:  # Backends fail here, or return some elements.
            nothing = sum(0 * ops.sum(array) for array in (inputs, *self._weights_in_use()))
            return self.activation(ops.broadcast_to(nothing, shape))
        if not self.use_bias or self._conv_spec.channels_axis == 3:
            return super().call(inputs)
        # On TensorFlow, Keras adds a (1, F, 1, 1) along the last axis if that has F elements too.
        outputs = ops.separable_conv(
            inputs,
            self.depthwise_kernel,
            self.pointwise_kernel,
            **self._geometric_arguments(),
        )
        minus_bias = ops.reshape(ops.negative(self.bias), (1, self.filters, 1, 1))
        return self.activation(ops.subtract(outputs, minus_bias))

    @property
    def _conv_spec(self) -> ConvSpec:
        return _spec(**self._geometric_arguments())

    def _geometric_arguments(self) -> dict[str, Any]:
        return {
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "data_format": self.data_format,
        }

    def _weights_in_use(self) -> list[Any]:
        kernels = [self.depthwise_kernel, self.pointwise_kernel]
        return [*kernels, self.bias] if self.use_bias else kernels

    def _call_shapes(self, input_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes of the input and of the weights that fit it."""
        channels = input_shape[self._conv_spec.channels_axis]
        shapes = [
            input_shape,
            (*self.kernel_size, channels, self.depth_multiplier),
            (1, 1, channels * self.depth_multiplier, self.filters),
        ]
        return [*shapes, (self.filters,)] if self.use_bias else shapes

    def _with_known_sizes(self, shape: tuple[int | None, ...]) -> tuple[int, ...]:
        """Puts the smallest legal size where a size is not known."""
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation_rate, strict=True)]
        sizes = [1, *reach]
        sizes.insert(
            self._conv_spec.channels_axis, self.depthwise_kernel.shape[2] if self.built else 1
        )
        return tuple(
            least if size is None else size for size, least in zip(shape, sizes, strict=True)
        )
