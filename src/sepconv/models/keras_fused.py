"""The Keras layer that holds every stage of the kernel: what a pair of layers becomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

import sepconv.keras as door
from sepconv.keras import SeparableConv2D
from sepconv.spec import ACTIVATIONS, canonical_activation, canonical_padding

__all__ = ["FusedSeparableConv2D"]


@keras.saving.register_keras_serializable(package="sepconv")
class FusedSeparableConv2D(SeparableConv2D):
    """A separable convolution with stages before, between and after, in one pass over memory.

        u = depthwise_activation(depthwise(input_activation(x)) + depthwise_bias)
        y = activation(pointwise(u) + bias)

    It is what `sepconv.fuse` makes of a `DepthwiseConv2D` and a `Conv2D` of 1x1 pixels, of what
    lies between them, and of what lies before and after. It can be trained, saved and loaded, and
    runs on every backend of Keras, on some by the operations of Keras; `why_not` tells.

    Args:
        filters: Channels of the output.
        kernel_size: Of the depthwise stage: an int, or (height, width).
        padding: `"valid"`, `"same"`, or `((top, bottom), (left, right))`.
        input_activation: Name of the activation of the input, in `sepconv.spec.ACTIVATIONS`, or
            `None`.
        depthwise_activation: Name of the activation between the stages, or `None`.
        use_depthwise_bias: Whether there is a bias between the stages.
        depthwise_bias_initializer: Of that bias.
        depthwise_bias_regularizer: Of that bias.
        depthwise_bias_constraint: Of that bias.
        depthwise_name: What `sepconv.to_stock` calls the first layer of the pair. With `None`, and
            without stages between, it makes a `SeparableConv2D`.
        **arguments: All others of `keras.layers.SeparableConv2D`.

    Example:
        >>> import numpy as np
        >>> layer = FusedSeparableConv2D(
        ...     4, 3, strides=2, padding=((0, 1), (0, 1)), depthwise_activation="relu6"
        ... )
        >>> tuple(layer(np.ones((1, 6, 6, 2), "float32")).shape)
        (1, 3, 3, 4)
    """

    def __init__(
        self,
        filters: int,
        kernel_size: Any,
        *,
        padding: str | Sequence[Sequence[int]] = "valid",
        input_activation: str | None = None,
        depthwise_activation: str | None = None,
        use_depthwise_bias: bool = False,
        depthwise_bias_initializer: Any = "zeros",
        depthwise_bias_regularizer: Any = None,
        depthwise_bias_constraint: Any = None,
        depthwise_name: str | None = None,
        **arguments: Any,
    ) -> None:
        canonical = canonical_padding(padding)
        if isinstance(canonical, str):
            arguments["padding"] = canonical
        super().__init__(filters, kernel_size, **arguments)
        self.padding = canonical
        self.input_activation = canonical_activation(input_activation, "input_activation")
        self.depthwise_activation = canonical_activation(
            depthwise_activation, "depthwise_activation"
        )
        self.use_depthwise_bias = bool(use_depthwise_bias)
        self.depthwise_bias_initializer = keras.initializers.get(depthwise_bias_initializer)
        self.depthwise_bias_regularizer = keras.regularizers.get(depthwise_bias_regularizer)
        self.depthwise_bias_constraint = keras.constraints.get(depthwise_bias_constraint)
        self.depthwise_name = depthwise_name

    def build(self, input_shape: Any) -> None:
        """Creates the weights."""
        super().build(input_shape)
        self.depthwise_bias = None
        if self.use_depthwise_bias:
            channels = input_shape[self._conv_spec.channels_axis]
            self.depthwise_bias = self.add_weight(
                name="depthwise_bias",
                shape=(channels * self.depth_multiplier,),
                initializer=self.depthwise_bias_initializer,
                regularizer=self.depthwise_bias_regularizer,
                constraint=self.depthwise_bias_constraint,
                trainable=True,
                dtype=self.dtype,
            )

    def call(self, inputs: Any) -> Any:
        """Computes the layer. Keras calls it, with the inputs in the compute dtype."""
        arrays = [None if w is None else ops.convert_to_tensor(w) for w in self._all_weights()]
        dtypes = [
            keras.backend.standardize_dtype(array.dtype) for array in arrays if array is not None
        ]
        # As in the layer that this one extends: nobody may ask for a refusal while torch compiles.
        if not door._is_compiling():
            dtype = keras.backend.standardize_dtype(inputs.dtype)
            device = self._device_of(inputs)
            if self._refusal(tuple(inputs.shape), dtype, *dtypes, device=device) is not None:
                return self._stock_call(inputs)
        depthwise_kernel, pointwise_kernel, bias, depthwise_bias = arrays
        fused = door._fused_name(self.activation)
        outputs = getattr(door._DOOR, door._OPERATION)(
            inputs,
            depthwise_kernel,
            pointwise_kernel,
            bias,
            **self._geometric_arguments(),
            activation=fused,
            input_activation=self.input_activation,
            depthwise_bias=depthwise_bias,
            depthwise_activation=self.depthwise_activation,
        )
        return self.activation(outputs) if fused is None else outputs

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, for saving."""
        return super().get_config() | {
            "input_activation": self.input_activation,
            "depthwise_activation": self.depthwise_activation,
            "use_depthwise_bias": self.use_depthwise_bias,
            "depthwise_bias_initializer": keras.initializers.serialize(
                self.depthwise_bias_initializer
            ),
            "depthwise_bias_regularizer": keras.regularizers.serialize(
                self.depthwise_bias_regularizer
            ),
            "depthwise_bias_constraint": keras.constraints.serialize(
                self.depthwise_bias_constraint
            ),
            "depthwise_name": self.depthwise_name,
        }

    def stock_layers(self) -> list[keras.layers.Layer]:
        """Returns new layers of Keras that compute the same one after the other.

        They have the weights of this layer once they are built; `load_stock_weights` puts them
        there.

        Returns:
            `DepthwiseConv2D` and `Conv2D`, or a `SeparableConv2D`; before them an activation and a
            padding where there are such stages.
        """
        before: list[keras.layers.Layer] = []
        if self.input_activation != ACTIVATIONS[0]:
            before.append(
                keras.layers.Activation(self.input_activation, name=f"{self.name}_input_activation")
            )
        padding = self.padding
        if not isinstance(padding, str):
            before.append(
                keras.layers.ZeroPadding2D(
                    padding, data_format=self.data_format, name=f"{self.name}_padding"
                )
            )
            padding = "valid"
        config = self.get_config()
        if self._is_one_stock_layer:
            for key in _OWN_KEYS:
                del config[key]
            config["padding"] = padding
            return [*before, keras.layers.SeparableConv2D.from_config(config)]
        common = {key: config[key] for key in ("data_format", "dtype", "trainable")}
        depthwise = keras.layers.DepthwiseConv2D(
            self.kernel_size,
            strides=self.strides,
            padding=padding,
            dilation_rate=self.dilation_rate,
            depth_multiplier=self.depth_multiplier,
            activation=self.depthwise_activation,
            use_bias=self.use_depthwise_bias,
            bias_initializer=config["depthwise_bias_initializer"],
            bias_regularizer=config["depthwise_bias_regularizer"],
            bias_constraint=config["depthwise_bias_constraint"],
            name=self.depthwise_name or f"{self.name}_depthwise",
            **{key: config[key] for key in _DEPTHWISE_KEYS},
            **common,
        )
        pointwise = keras.layers.Conv2D(
            self.filters,
            1,
            activation=config["activation"],
            use_bias=self.use_bias,
            activity_regularizer=config["activity_regularizer"],
            name=self.name,
            **{f"kernel_{word}": config[f"pointwise_{word}"] for word in _WORDS},
            **{f"bias_{word}": config[f"bias_{word}"] for word in _WORDS},
            **common,
        )
        return [*before, depthwise, pointwise]

    def load_stock_weights(self, layers: Sequence[keras.layers.Layer]) -> None:
        """Sets the weights of the built layers that `stock_layers` returned to those of this one.

        Args:
            layers: What `stock_layers` returned.
        """
        depthwise_kernel, pointwise_kernel, bias, depthwise_bias = self._all_weights()
        parts: list[tuple[Any, tuple[Any, ...]]]
        if self._is_one_stock_layer:
            parts = [(layers[-1], (depthwise_kernel, pointwise_kernel, bias))]
        else:
            parts = [
                (layers[-2], (depthwise_kernel, depthwise_bias)),
                (layers[-1], (pointwise_kernel, bias)),
            ]
        for layer, weights in parts:
            layer.set_weights([keras.ops.convert_to_numpy(w) for w in weights if w is not None])

    @property
    def _is_one_stock_layer(self) -> bool:
        has_stage = self.use_depthwise_bias or self.depthwise_activation != ACTIVATIONS[0]
        return self.depthwise_name is None and not has_stage

    def _all_weights(self) -> list[Any]:
        bias = self.bias if self.use_bias else None
        return [self.depthwise_kernel, self.pointwise_kernel, bias, self.depthwise_bias]

    def _stock_call(self, inputs: Any) -> Any:
        shape = self.compute_output_shape(tuple(inputs.shape))
        if 0 in shape and None not in shape:  # Backends fail here, or return some elements.
            weights = [weight for weight in self._all_weights() if weight is not None]
            nothing = sum(0 * ops.sum(array) for array in (inputs, *weights))
            return self.activation(ops.broadcast_to(nothing, shape))
        arguments = self._geometric_arguments()
        x = getattr(keras.activations, self.input_activation)(inputs)
        if not isinstance(self.padding, str):
            amounts = [(0, 0), *self.padding]
            amounts.insert(self._conv_spec.channels_axis, (0, 0))
            x = ops.pad(x, amounts)
            arguments["padding"] = "valid"
        u = ops.depthwise_conv(x, self.depthwise_kernel, **arguments)
        u = self._plus(u, self.depthwise_bias)
        u = getattr(keras.activations, self.depthwise_activation)(u)
        y = ops.conv(u, self.pointwise_kernel, data_format=self.data_format)
        return self.activation(self._plus(y, self.bias))

    def _plus(self, image: Any, vector: Any) -> Any:
        if vector is None:
            return image
        shape = [1, 1, 1, 1]
        shape[self._conv_spec.channels_axis] = -1
        # Subtracted: Keras on TensorFlow adds a (1, F, 1, 1) along the last axis if that has F
        # elements too.
        return ops.subtract(image, ops.reshape(ops.negative(vector), shape))

    def _refusal_of_door(self, shape: tuple[int, ...], dtype: str) -> str | None:
        if door._BACKEND != "jax":
            return None
        import jax

        arrays = [
            None if each is None else jax.ShapeDtypeStruct(each, dtype)
            for each in self._call_shapes(shape)
        ]
        *first, depthwise_bias = arrays
        return door._DOOR.why_not(
            *first, **self._geometric_arguments(), depthwise_bias=depthwise_bias
        )

    def _call_shapes(self, input_shape: tuple[int, ...]) -> list[Any]:
        channels = input_shape[self._conv_spec.channels_axis] * self.depth_multiplier
        return [
            *super()._call_shapes(input_shape)[:3],
            (self.filters,) if self.use_bias else None,
            (channels,) if self.use_depthwise_bias else None,
        ]


_WORDS = ("initializer", "regularizer", "constraint")
_DEPTHWISE_KEYS = tuple(f"depthwise_{word}" for word in _WORDS)
_OWN_KEYS = (
    "input_activation",
    "depthwise_activation",
    "use_depthwise_bias",
    "depthwise_name",
    *(f"depthwise_bias_{word}" for word in _WORDS),
)
