"""`tf.layers` around its `SeparableConv2D`: the class, its function, and their base class."""

from __future__ import annotations

import copy
import math
import types
import warnings
from collections.abc import Callable
from typing import Any

import keras

import sepconv.keras
from sepconv.spec import ConvSpec
from sepconv.tf1 import arguments, nn
from sepconv.tf1.base import Layer, LegacyWarning, keras_style_scope, set_keras_style
from sepconv.tf1.initializers import zeros_initializer
from sepconv.tf1.provided import not_provided

__all__ = [
    "InputSpec",
    "Layer",
    "LegacyWarning",
    "SeparableConv2D",
    "experimental",
    "separable_conv2d",
]

InputSpec = keras.layers.InputSpec

experimental = types.SimpleNamespace(
    keras_style_scope=keras_style_scope, set_keras_style=set_keras_style
)

_CHECKED_TYPES = ("float16", "bfloat16", "float32", "float64")


@keras.saving.register_keras_serializable(package="sepconv.tf1")
class SeparableConv2D(sepconv.keras.SeparableConv2D, Layer):
    """Depthwise convolution, then pointwise convolution, bias and activation, as one operation.

        D[n, y, x, c*M + m] =
            sum over i, j of X[n, y*sh + i*dh - top, x*sw + j*dw - left, c] * Kd[i, j, c, m]
        Y[n, y, x, f] = activation(bias[f] + sum over q of D[n, y, x, q] * Kp[0, 0, q, f])

    M is `depth_multiplier`, (sh, sw) `strides`, (dh, dw) `dilation_rate`; X is 0 outside, and
    `same` padding puts the odd row and column last.

    Args:
        filters: Number of output channels.
        kernel_size: Of the depthwise stage: an integer, or (height, width).
        strides: An integer, or (height, width). Unlike in the original, the two may differ, and may
            be combined with a dilation.
        padding: `valid` or `same`, in any case.
        data_format: `channels_last` or `channels_first`; `None` for the process-wide Keras setting.
        dilation_rate: An integer, or (height, width).
        depth_multiplier: Depthwise channels per input channel.
        activation: A function, a Keras name, or `None` for the identity. `hard_sigmoid` is the
            original's `clip(0.2*x + 0.5, 0, 1)`.
        use_bias: Whether to add a bias.
        depthwise_initializer: `None` for that of the variable scope, else Glorot uniform.
        pointwise_initializer: `None` for that of the variable scope, else Glorot uniform.
        bias_initializer: `None` for that of the variable scope, else Glorot uniform.
        depthwise_regularizer: A function of the variable; its result is a loss.
        pointwise_regularizer: The same for the pointwise kernel.
        bias_regularizer: The same for the bias.
        activity_regularizer: A function of the output; its result over the batch size is a loss.
        depthwise_constraint: A function of the variable that optimizers apply after each update.
        pointwise_constraint: The same for the pointwise kernel.
        bias_constraint: The same for the bias.
        trainable: Whether the variables that the first call makes are trainable.
        name: Name of the layer, and what its scope's name starts from; `None` for a made-up one.
        **kwargs: `dtype` (of the variables; `None` takes that of the first input), `_scope`,
            `_reuse`, `autocast`, `weights`, `input_shape`, `batch_input_shape`, `batch_size`,
            `input_dim`, `groups`; some more of the original are taken without effect.

    Attributes:
        depthwise_kernel: (kernel height, kernel width, channels, depth_multiplier), once built.
        pointwise_kernel: (1, 1, channels * depth_multiplier, filters), once built.
        bias: (filters,), or `None`, once built.

    Raises:
        ValueError: an argument is out of range or unknown.
        TypeError: an argument is of a type that cannot be used, or a keyword is not known.

    Example:
        >>> import numpy as np
        >>> import sepconv.tf1 as tf
        >>> with tf.Graph().as_default():
        ...     layer = tf.layers.SeparableConv2D(4, 3, padding="SAME", activation=tf.nn.relu)
        ...     y = layer(np.ones((2, 8, 8, 3), "float32"))
        ...     tuple(y.shape), layer.name, [v.name for v in tf.trainable_variables()][0]
        ((2, 8, 8, 4), 'separable_conv2d_1', 'separable_conv2d/depthwise_kernel:0')
    """

    KEYWORDS = Layer.KEYWORDS | {
        "conv_op",
        "groups",
        "kernel_constraint",
        "kernel_initializer",
        "kernel_regularizer",
    }

    def __init__(
        self,
        filters: Any,
        kernel_size: Any,
        strides: Any = (1, 1),
        padding: Any = "valid",
        data_format: Any = "channels_last",
        dilation_rate: Any = (1, 1),
        depth_multiplier: Any = 1,
        activation: Any = None,
        use_bias: Any = True,
        depthwise_initializer: Any = None,
        pointwise_initializer: Any = None,
        bias_initializer: Any = zeros_initializer(),  # noqa: B008 - the original's default
        depthwise_regularizer: Any = None,
        pointwise_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        depthwise_constraint: Any = None,
        pointwise_constraint: Any = None,
        bias_constraint: Any = None,
        trainable: Any = True,
        name: Any = None,
        **kwargs: Any,
    ) -> None:
        if "rank" in kwargs:
            raise TypeError("`rank` must not be given: the layer is two-dimensional")
        resolved = {
            "activation": arguments.activation(activation),
            "depthwise_initializer": arguments.initializer(depthwise_initializer),
            "pointwise_initializer": arguments.initializer(pointwise_initializer),
            "bias_initializer": arguments.initializer(bias_initializer),
            "depthwise_regularizer": arguments.regularizer(depthwise_regularizer),
            "pointwise_regularizer": arguments.regularizer(pointwise_regularizer),
            "bias_regularizer": arguments.regularizer(bias_regularizer),
            "activity_regularizer": arguments.regularizer(activity_regularizer),
            "depthwise_constraint": arguments.constraint(depthwise_constraint),
            "pointwise_constraint": arguments.constraint(pointwise_constraint),
            "bias_constraint": arguments.constraint(bias_constraint),
        }
        self.check_keywords({k: v for k, v in kwargs.items() if k != "dtype"})
        if kwargs.get("dtype") is not None:
            kwargs["dtype"] = arguments.dtype_policy(kwargs["dtype"])
        resolved |= {
            "filters": arguments.filters(filters),
            "kernel_size": arguments.pair("kernel_size", kernel_size, minimum=1),
            "strides": arguments.pair("strides", strides, minimum=0),
            "padding": arguments.padding(padding),
            "data_format": arguments.data_format(data_format),
            "dilation_rate": arguments.pair("dilation_rate", dilation_rate, minimum=1),
        }
        groups = kwargs.get("groups") or 1
        if resolved["filters"] % groups:
            raise ValueError(
                "The number of filters must be evenly divisible by the number of groups. "
                f"Received: groups={groups}, filters={filters}"
            )
        if 0 in resolved["strides"]:
            raise ValueError(
                f"The argument `strides` cannot contains 0(s). Received: strides={strides!r}"
            )
        resolved["depth_multiplier"] = arguments.depth_multiplier(depth_multiplier)
        super().__init__(use_bias=use_bias, trainable=trainable, name=name, **resolved, **kwargs)
        self.groups = groups
        if isinstance(self.activation, keras.layers.Layer):
            # As in the original, the weights of a layer given as activation are not this layer's.
            self._tracker.untrack(self.activation)

    def build(self, input_shape: Any) -> None:
        """Makes or shares the variables, as the first call would. A second time does nothing.

        Args:
            input_shape: Four sizes, of which that of the channels must be known.

        Raises:
            ValueError: it does not have four sizes, the channels are not known, or the kernel does
                not fit; or a variable exists and must not, or must and does not.
        """
        if self.built:
            return
        self._set_scope()
        shape = self._checked_shape(input_shape)
        with self._all_or_nothing():
            self._know_dtype("float32")
            super().build(shape)
            self.input_spec = InputSpec(
                ndim=4, axes={self._channel_axis: shape[self._channel_axis]}
            )
            self._legacy.built_shape = shape
            self._apply_initial_weights()
            self._belong_to_graph()

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """Returns the shape of the output, without building the layer.

        Args:
            input_shape: Four sizes, `None` where one is not known. That of the channels is not
                looked at.

        Returns:
            Four sizes. 0 is a legal one.

        Raises:
            ValueError: there are not four sizes, or one of the output would be negative.
        """
        if input_shape is None:
            raise ValueError("`input_shape` must have 4 sizes. Received: input_shape=None")
        shape = tuple(input_shape)
        if len(shape) != 4:
            raise ValueError(f"`input_shape` must have 4 sizes. Received: input_shape={shape}")
        try:
            return self._plan.output_shape(shape, self.kernel_size, self.filters)
        except ValueError as error:
            raise ValueError(
                "One of the dimensions in the output is <= 0 due to downsampling in "
                f'layer "{self.name}": {error}'
            ) from None

    def call(self, inputs: Any) -> Any:
        """Computes the layer. Keras calls it, with checked inputs."""
        given = self.activation
        own = nn.keras_function(given)
        if own is given:
            return super().call(inputs)
        # Keras's own functions run inside the kernel; `tf.nn.relu` is one under another name.
        object.__setattr__(self, "activation", own)
        try:
            return super().call(inputs)
        finally:
            object.__setattr__(self, "activation", given)

    def _stock_call(self, inputs: Any) -> Any:
        plan, (rows, columns) = self._plan, self.strides
        first = 1 if plan.channels_axis == 3 else 2
        height, width = inputs.shape[first : first + 2]
        if keras.backend.backend() != "tensorflow" or rows == columns or None in (height, width):
            return super()._stock_call(inputs)
        # On a CPU, TensorFlow has no unequal strides: this computes more rows, or columns, and
        # leaves out those that are too many.
        common = math.gcd(rows, columns)
        amounts = [(0, 0)] * 4
        amounts[first : first + 2] = plan.padding_amounts(height, width, self.kernel_size)
        outputs = keras.ops.separable_conv(
            keras.ops.pad(inputs, amounts),
            self.depthwise_kernel,
            self.pointwise_kernel,
            strides=common,
            padding="valid",
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
        )
        steps = [slice(None)] * 4
        steps[first : first + 2] = (
            slice(None, None, rows // common),
            slice(None, None, columns // common),
        )
        outputs = outputs[tuple(steps)]
        if self.use_bias:
            shape = [1] * 4
            shape[plan.channels_axis] = self.filters
            outputs = outputs + keras.ops.reshape(self.bias, shape)
        return self.activation(outputs)

    def why_not(self, inputs: Any = None) -> str | None:
        """Tells why a call would run the computation of Keras instead of our kernel.

        Args:
            inputs: As in `sepconv.keras.SeparableConv2D.why_not`.

        Returns:
            `None` if our kernel runs the convolution, else the reason.
        """
        layer = self
        if not self._legacy.dtype_known:
            layer = copy.copy(self)
            layer._know_dtype("float32" if inputs is None else inputs.dtype)
        reason: str | None = super(SeparableConv2D, layer).why_not(inputs)
        return reason

    @property
    def _plan(self) -> ConvSpec:
        """The sizes; from the attributes, which may change before the first call."""
        return ConvSpec(
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )

    @property
    def _channel_axis(self) -> int:
        return self._plan.channels_axis - 4

    def _checked_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """What the shape of an input must fulfil before anything is made or computed."""
        shape = tuple(input_shape)
        axis = self._channel_axis
        rank = "ndim=4" if self.built or len(shape) > 4 else "min_ndim=4"
        front = f'Input 0 of layer "{self.name}" is incompatible with the layer: '
        received = f"Received input shape: {shape}"
        if len(shape) != 4:
            raise ValueError(f"{front}expected {rank}, found ndim={len(shape)}. {received}")
        if self.built:
            expected = self.depthwise_kernel.shape[2]
            if shape[axis] not in (None, expected):
                raise ValueError(
                    f"{front}expected axis {axis} of input shape to have value {expected}. "
                    f"{received}"
                )
        elif not shape[axis]:
            state = "be defined" if shape[axis] is None else "have at least one channel"
            raise ValueError(
                f"The channel dimension of the inputs should {state} (axis {axis}). {received}"
            )
        self.compute_output_shape(shape)
        return shape

    def _to_tensors(self, inputs: Any) -> Any:
        if isinstance(inputs, (list, tuple, dict)):
            raise ValueError(
                f'Layer "{self.name}" expects 1 input(s), but it received a '
                f"{type(inputs).__name__} of {len(inputs)}"
            )
        if isinstance(inputs, keras.Variable):
            inputs = inputs.value
        if not hasattr(inputs, "dtype") or not hasattr(inputs, "shape"):
            raise TypeError(
                f"Inputs to a layer should be tensors. Got {inputs!r} (of type {type(inputs)}) "
                f'as input for layer "{self.name}"'
            )
        dtype = self._checked_dtype(inputs)
        self._checked_shape(inputs.shape)
        tensor = super()._to_tensors(inputs)
        if self._legacy.dtype_known and dtype != self.compute_dtype:
            tensor = keras.ops.cast(tensor, self.compute_dtype)
        return tensor

    def _checked_dtype(self, inputs: Any) -> str:
        try:
            dtype: str = keras.backend.standardize_dtype(inputs.dtype)
        except (ValueError, TypeError):
            dtype = str(inputs.dtype)
        if dtype.startswith("complex"):
            raise ValueError(f'Inputs of layer "{self.name}" must be real. Received: dtype={dtype}')
        if dtype not in _CHECKED_TYPES:
            raise TypeError(
                f'Inputs of layer "{self.name}" must be of a floating-point type, one of '
                f"{', '.join(_CHECKED_TYPES)}. Received: dtype={dtype}"
            )
        expected = self.compute_dtype
        if expected is None or dtype == expected:
            return dtype
        if expected not in _CHECKED_TYPES or not self._legacy.casts_inputs:
            raise TypeError(
                f'Inputs of layer "{self.name}" must be of type {expected}, in which it computes '
                f"(autocast=True would cast them). Received: dtype={dtype}"
            )
        return dtype

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor arguments, ready for JSON."""
        config = Layer.get_config(self)
        config |= {
            name: getattr(self, name)
            for name in (
                "filters",
                "kernel_size",
                "strides",
                "padding",
                "data_format",
                "dilation_rate",
                "depth_multiplier",
                "use_bias",
            )
        }
        config |= {
            name: None if getattr(self, name) is None else arguments.serialized(getattr(self, name))
            for name in (
                "activation",
                "depthwise_initializer",
                "pointwise_initializer",
                "bias_initializer",
                "depthwise_regularizer",
                "pointwise_regularizer",
                "bias_regularizer",
                "activity_regularizer",
                "depthwise_constraint",
                "pointwise_constraint",
                "bias_constraint",
            )
        }
        return config


def separable_conv2d(
    inputs: Any,
    filters: Any,
    kernel_size: Any,
    strides: Any = (1, 1),
    padding: Any = "valid",
    data_format: Any = "channels_last",
    dilation_rate: Any = (1, 1),
    depth_multiplier: Any = 1,
    activation: Any = None,
    use_bias: Any = True,
    depthwise_initializer: Any = None,
    pointwise_initializer: Any = None,
    bias_initializer: Any = zeros_initializer(),  # noqa: B008 - the original's default
    depthwise_regularizer: Any = None,
    pointwise_regularizer: Any = None,
    bias_regularizer: Any = None,
    activity_regularizer: Any = None,
    depthwise_constraint: Any = None,
    pointwise_constraint: Any = None,
    bias_constraint: Any = None,
    trainable: Any = True,
    name: Any = None,
    reuse: Any = None,
) -> Any:
    """Makes a `SeparableConv2D` with `_scope=name` and `_reuse=reuse`, and calls it once.

    Deprecated as in the original, and warns so.

    Args:
        inputs: (batch, height, width, channels), or as `data_format` says.
        filters: As in the class, like all that follow but the last two.
        kernel_size: As in the class.
        strides: As in the class.
        padding: As in the class.
        data_format: As in the class.
        dilation_rate: As in the class.
        depth_multiplier: As in the class.
        activation: As in the class.
        use_bias: As in the class.
        depthwise_initializer: As in the class.
        pointwise_initializer: As in the class.
        bias_initializer: As in the class.
        depthwise_regularizer: As in the class.
        pointwise_regularizer: As in the class.
        bias_regularizer: As in the class.
        activity_regularizer: As in the class.
        depthwise_constraint: As in the class.
        pointwise_constraint: As in the class.
        bias_constraint: As in the class.
        trainable: As in the class.
        name: Name of the variable scope, not made unique; a scope object is that very scope; `None`
            for a made-up one.
        reuse: `None`, `False`, `True` or `tf.AUTO_REUSE`.

    Returns:
        The output. The variables are found by name.

    Raises:
        ValueError: as in the class; also where the variables exist and `reuse` does not allow it.
        TypeError: as in the class.

    Example:
        >>> import warnings
        >>> import numpy as np
        >>> import sepconv.tf1 as tf
        >>> x = np.ones((2, 8, 8, 3), "float32")
        >>> with tf.Graph().as_default(), warnings.catch_warnings(action="ignore"):
        ...     y = tf.layers.separable_conv2d(x, 4, 3, name="sep")
        ...     shared = tf.layers.separable_conv2d(x, 4, 3, name="sep", reuse=True)
        ...     [v.name for v in tf.global_variables()][-1]
        'sep/bias:0'
    """
    warnings.warn(
        "`tf.layers.separable_conv2d` is deprecated and will be removed in a future version. "
        "Please use `tf.keras.layers.SeparableConv2D` instead.",
        LegacyWarning,
        stacklevel=2,
    )
    layer = SeparableConv2D(
        filters,
        kernel_size,
        strides,
        padding,
        data_format,
        dilation_rate,
        depth_multiplier,
        activation,
        use_bias,
        depthwise_initializer,
        pointwise_initializer,
        bias_initializer,
        depthwise_regularizer,
        pointwise_regularizer,
        bias_regularizer,
        activity_regularizer,
        depthwise_constraint,
        pointwise_constraint,
        bias_constraint,
        trainable,
        name,
        _scope=name,
        _reuse=reuse,
    )
    return layer(inputs)


def __getattr__(name: str) -> Callable[..., Any]:
    return not_provided(name, "layers")
