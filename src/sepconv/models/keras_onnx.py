"""Whole models of Keras as ONNX: the calls of their graphs, one or a few nodes each.

Between the layers an image has its channels first, whatever the model says: a transpose is needed
where a model takes, gives or flattens images with the channels last, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from sepconv.keras import SeparableConv2D, _fused_name
from sepconv.models.keras_chains import _activation_of
from sepconv.models.keras_files import hard_sigmoid_of_keras_2
from sepconv.models.keras_fused import FusedSeparableConv2D
from sepconv.models.keras_graph import Call, Graph, Reading
from sepconv.models.onnx import DTYPES, Nodes, in_words, of_keras, window
from sepconv.models.weights import depthwise_to_torch
from sepconv.progress import tracked
from sepconv.spec import ACTIVATIONS, ConvSpec

__all__ = ["model_to_onnx"]

_OPSET = 20
_LINEAR = ACTIVATIONS[0]


def model_to_onnx(model: keras.Model, *, opset: int | None) -> Any:
    """Does what `sepconv.models.onnx.to_onnx` does, for a model of Keras.

    Args:
        model: A built functional or sequential model.
        opset: Of the operators; `None` for 20.

    Raises:
        ValueError: a layer is none that is known here, or the model has no graph.
    """
    reading = Reading(model)
    if not reading.graphs:
        raise ValueError(
            "`layer` must be a functional or a sequential model: only they have a graph. "
            f"Received: {model.name}, of the class {type(model).__name__}"
        )
    return _Network(reading, _OPSET if opset is None else int(opset)).model()


class _Network:
    """The values of a model in a graph of ONNX, by tensor of Keras."""

    def __init__(self, reading: Reading, opset: int) -> None:
        self._reading = reading
        self._whole = reading.graphs[0]
        dtypes = {tensor.dtype for tensor in self._whole.model.inputs} | {
            operation.compute_dtype
            for operation in reading.operations()
            if isinstance(operation, keras.Layer)
        }
        (dtype, *others) = sorted(dtypes)
        if others or dtype not in DTYPES:
            raise ValueError(
                "`layer` must compute in one dtype of floating-point numbers; a model of mixed "
                "precision has the same weights as one with the dtype policy float32. "
                f"Received: {', '.join(sorted(dtypes))}"
            )
        self.nodes = Nodes(opset, keras.ops.convert_to_numpy(keras.ops.zeros((), dtype)).dtype)
        # As Keras has it, and, of images with the channels last, with the channels first.
        self._plain: dict[int, str] = {}
        self._first: dict[int, str] = {}
        self._used: set[str] = set()

    def model(self) -> Any:
        model = self._whole.model
        for tensor in model.inputs:
            self._plain[id(tensor)] = self.unique(tensor.name)
        inputs = {self._plain[id(each)]: _shape(each, each.name) for each in model.inputs}
        self._run(self._whole)
        outputs = {}
        for tensor, name in zip(model.outputs, _output_names(model), strict=True):
            output = self.unique(name)
            self.nodes.add("Identity", [self.plain(tensor)], output)
            outputs[output] = _shape(tensor, output)
        return self.nodes.model(model.name, inputs, outputs)

    def _run(self, graph: Graph) -> None:
        nested = {id(each.model): each for each in self._reading.graphs}
        calls = tracked(graph.calls, "layers exported") if graph is self._whole else graph.calls
        for call in calls:
            inner = nested.get(id(call.operation))
            if inner is not None:
                self._copy(call.inputs, inner.model.inputs)
                self._run(inner)
                self._copy(inner.model.outputs, call.outputs)
                continue
            name = self._reading.name(call.operation)
            write = _writer_of(call.operation)
            if id(call.operation) in self._reading.in_training:
                raise ValueError(
                    f"`layer` must be for inference. Received: {name} with training=True"
                )
            if write is None:
                raise ValueError(
                    "`layer` must be made of layers that have a form in ONNX here. "
                    f"Received: {name}, of the class {type(call.operation).__name__}"
                )
            write(self, call, self.unique(name))

    def _copy(self, sources: Sequence[Any], targets: Sequence[Any]) -> None:
        for source, target in zip(sources, targets, strict=True):
            for values in (self._plain, self._first):
                # From an earlier call of the same inner model.
                values.pop(id(target), None)
                if id(source) in values:
                    values[id(target)] = values[id(source)]

    def unique(self, name: str) -> str:
        """Returns a name that no value has yet."""
        name, number = name.replace(":", "_"), 1
        chosen = name
        while chosen in self._used:
            number += 1
            chosen = f"{name}_{number}"
        self._used.add(chosen)
        return chosen

    def plain(self, tensor: Any) -> str:
        """Returns a value as Keras has it."""
        return self._value(tensor, self._plain, self._first, [0, 2, 3, 1])

    def first(self, tensor: Any) -> str:
        """Returns an image that has its channels last in Keras, with the channels first."""
        return self._value(tensor, self._first, self._plain, [0, 3, 1, 2])

    def has_first(self, tensor: Any) -> bool:
        """Whether that is there without a transpose."""
        return id(tensor) in self._first

    def image(self, tensor: Any, data_format: str) -> str:
        """Returns an image with the channels first, wherever Keras has them."""
        return self.first(tensor) if _is_last(data_format) else self.plain(tensor)

    def set(self, tensor: Any, value: str, *, is_first: bool = False) -> None:
        """Says which value a tensor is, and in which form."""
        for values in (self._plain, self._first):
            values.pop(id(tensor), None)
        (self._first if is_first else self._plain)[id(tensor)] = value

    def set_image(self, tensor: Any, value: str, data_format: str) -> None:
        """As `set`, for an image with the channels first."""
        self.set(tensor, value, is_first=_is_last(data_format))

    def integers(self, name: str, values: Sequence[int]) -> str:
        """A constant of sizes or axes."""
        return self.nodes.constant(name, values, np.int64)

    def _value(
        self, tensor: Any, wanted: dict[int, str], other: dict[int, str], order: list[int]
    ) -> str:
        if id(tensor) not in wanted:
            source = other[id(tensor)]
            output = self.unique(f"{source}/transposed")
            wanted[id(tensor)] = self.nodes.add("Transpose", [source], output, perm=order)
        return wanted[id(tensor)]


def _is_last(data_format: str) -> bool:
    return ConvSpec(data_format=data_format).channels_axis == 3


def _shape(tensor: Any, name: str) -> list[int | str]:
    words = ["batch", *(f"{name}_{axis}" for axis in range(1, len(tensor.shape)))]
    return in_words(tensor.shape, words)


def _output_names(model: Any) -> list[str]:
    return [f"{tensor._keras_history.operation.name}_output" for tensor in model.outputs]


def _array(variable: Any) -> Any:
    return keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable))


def _sizes(tensor: Any, data_format: str) -> list[int | None]:
    """Height and width of an image."""
    return list(tensor.shape[1:3] if _is_last(data_format) else tensor.shape[2:4])


# ------------------------------------------------------------------------------------ convolutions


def _separable(network: _Network, call: Call, name: str) -> None:
    layer = call.operation
    weights, spec = of_keras(layer, _fused_name(layer.activation) or _LINEAR)
    x = network.image(call.inputs[0], layer.data_format)
    sizes = _sizes(call.inputs[0], layer.data_format)
    value = network.nodes.separable(x, weights, spec, sizes, f"{name}/")
    if _fused_name(layer.activation) is None:
        _set_activated(network, call, value, name)
    else:
        network.set_image(call.outputs[0], value, layer.data_format)


def _convolution(network: _Network, call: Call, name: str) -> None:
    layer = call.operation
    kernel = _array(layer.kernel)
    is_depthwise = isinstance(layer, layers.DepthwiseConv2D)
    weight = depthwise_to_torch(kernel) if is_depthwise else kernel.transpose(3, 2, 0, 1)
    spec = ConvSpec(
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    value = network.nodes.convolution(
        network.image(call.inputs[0], layer.data_format),
        name,
        weight,
        _array(layer.bias) if layer.use_bias else None,
        group=kernel.shape[2] if is_depthwise else layer.groups,
        **window(spec, kernel.shape[:2], _sizes(call.inputs[0], layer.data_format)),
    )
    _set_activated(network, call, value, name)


def _transposed_convolution(network: _Network, call: Call, name: str) -> None:
    layer = call.operation
    kernel = _array(layer.kernel)
    further = layer.output_padding
    if further is None or isinstance(further, int):
        further = (further, further)
    ends = [
        _transposed_ends((size - 1) * dilation + 1, stride, added, layer.padding)
        for size, dilation, stride, added in zip(
            kernel.shape[:2], layer.dilation_rate, layer.strides, further, strict=True
        )
    ]
    value = network.nodes.convolution(
        network.image(call.inputs[0], layer.data_format),
        name,
        kernel.transpose(3, 2, 0, 1),
        _array(layer.bias) if layer.use_bias else None,
        "ConvTranspose",
        strides=list(layer.strides),
        dilations=list(layer.dilation_rate),
        pads=[before for before, _, _ in ends] + [after for _, after, _ in ends],
        output_padding=[more for _, _, more in ends],
    )
    _set_activated(network, call, value, name)


def _transposed_ends(
    reach: int, stride: int, added: int | None, padding: str
) -> tuple[int, int, int]:
    """What a transposed convolution cuts off before and after, and how much it then adds after.

    Args:
        reach: Of the kernel, with its gaps.
        stride: Of the convolution.
        added: `output_padding` of Keras.
        padding: Of Keras.
    """
    if padding == ConvSpec().padding:
        return 0, 0, max(stride - reach, 0) if added is None else added
    total = stride + reach - 2 if added is None else reach + reach % 2 - 2 + added
    before = min(total - total // 2, reach - 1)
    after = reach - 1 - (total - before)
    return reach - 1 - before, max(after, 0), max(-after, 0)


def _set_activated(network: _Network, call: Call, value: str, name: str) -> None:
    """Ends a convolution: its activation, and the output of its call."""
    layer = call.operation
    is_first = _is_last(layer.data_format)
    value = _function(network, layer.activation, value, f"{name}/activated", is_first=is_first)
    network.set_image(call.outputs[0], value, layer.data_format)


def _pooling(operator: str) -> Callable[[_Network, Call, str], None]:
    def write(network: _Network, call: Call, name: str) -> None:
        layer = call.operation
        spec = ConvSpec(strides=layer.strides, padding=layer.padding, data_format=layer.data_format)
        attributes = window(spec, layer.pool_size, _sizes(call.inputs[0], layer.data_format))
        del attributes["dilations"]
        x = network.image(call.inputs[0], layer.data_format)
        sizes = list(layer.pool_size)
        value = network.nodes.add(operator, [x], name, kernel_shape=sizes, **attributes)
        network.set_image(call.outputs[0], value, layer.data_format)

    return write


def _global_pooling(operator: str) -> Callable[[_Network, Call, str], None]:
    def write(network: _Network, call: Call, name: str) -> None:
        layer = call.operation
        x = network.image(call.inputs[0], layer.data_format)
        value = network.nodes.add(operator, [x], name)
        if layer.keepdims:
            network.set_image(call.outputs[0], value, layer.data_format)
        else:
            network.set(call.outputs[0], network.nodes.add("Flatten", [value], f"{name}/flat"))

    return write


def _zero_padding(network: _Network, call: Call, name: str) -> None:
    layer = call.operation
    (top, bottom), (left, right) = layer.padding
    amounts = network.integers(f"{name}/amounts", [0, 0, top, left, 0, 0, bottom, right])
    x = network.image(call.inputs[0], layer.data_format)
    value = network.nodes.add("Pad", [x, amounts], name)
    network.set_image(call.outputs[0], value, layer.data_format)


def _cropping(network: _Network, call: Call, name: str) -> None:
    layer = call.operation
    (top, bottom), (left, right) = layer.cropping
    far = 2**62
    starts = network.integers(f"{name}/starts", [top, left])
    ends = network.integers(f"{name}/ends", [-bottom or far, -right or far])
    axes = network.integers(f"{name}/axes", [2, 3])
    x = network.image(call.inputs[0], layer.data_format)
    value = network.nodes.add("Slice", [x, starts, ends, axes], name)
    network.set_image(call.outputs[0], value, layer.data_format)


_INTERPOLATIONS = {
    "nearest": {
        "mode": "nearest",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    },
    "bilinear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
}


def _up_sampling(network: _Network, call: Call, name: str) -> None:
    layer = call.operation
    attributes = _INTERPOLATIONS.get(layer.interpolation)
    if attributes is None:
        raise ValueError(
            f"`layer` must interpolate by one of {', '.join(_INTERPOLATIONS)}. "
            f"Received: {name} with interpolation={layer.interpolation!r}"
        )
    scales = network.nodes.constant(f"{name}/scales", [1, 1, *layer.size], np.float32)
    x = network.image(call.inputs[0], layer.data_format)
    value = network.nodes.add("Resize", [x, "", scales], name, **attributes)
    network.set_image(call.outputs[0], value, layer.data_format)


# ------------------------------------------------------------------------- activations and numbers


def _function(
    network: _Network, function: Any, value: str, output: str, *, is_first: bool = False
) -> str:
    """Applies an activation function of Keras."""
    name = _fused_name(function)
    if name is not None:
        return network.nodes.activation(name, value, output)
    operator = _FUNCTIONS.get(function)
    if operator is None:
        raise ValueError(
            "`layer` must have activations that have a form in ONNX here. "
            f"Received: {function} for {output}"
        )
    # Those of several numbers are along the last axis of Keras.
    axis = {"axis": 1 if is_first else -1} if operator in ("Softmax", "LogSoftmax") else {}
    return network.nodes.add(operator, [value], output, **axis)


_FUNCTIONS = {
    keras.activations.softmax: "Softmax",
    keras.activations.log_softmax: "LogSoftmax",
    keras.activations.softplus: "Softplus",
    keras.activations.softsign: "Softsign",
    keras.activations.exponential: "Exp",
    # With the slope that is its default in ONNX.
    hard_sigmoid_of_keras_2: "HardSigmoid",
}


def _pointwise(
    write: Callable[[_Network, Call, str, str, bool], str],
) -> Callable[[_Network, Call, str], None]:
    """What goes over every number alone, in the form in which the values are there."""

    def handle(network: _Network, call: Call, name: str) -> None:
        tensor = call.inputs[0]
        is_first = network.has_first(tensor)
        value = network.first(tensor) if is_first else network.plain(tensor)
        network.set(call.outputs[0], write(network, call, value, name, is_first), is_first=is_first)

    return handle


@_pointwise
def _pass_on(network: _Network, call: Call, value: str, name: str, is_first: bool) -> str:
    return value


@_pointwise
def _activation(network: _Network, call: Call, value: str, name: str, is_first: bool) -> str:
    known = _activation_of(call.operation)
    if known is not None:
        return network.nodes.activation(known, value, name)
    return _function(network, call.operation.activation, value, name, is_first=is_first)


@_pointwise
def _relu(network: _Network, call: Call, value: str, name: str, is_first: bool) -> str:
    layer = call.operation
    known = _activation_of(layer)
    most: Any = getattr(layer, "max_value", None)
    slope = float(layer.negative_slope)
    if known is not None:
        return network.nodes.activation(known, value, name)
    if getattr(layer, "threshold", 0) or (slope and most is not None):
        raise ValueError(
            f"`layer` must have no relu with a threshold, or with a slope and a largest value. "
            f"Received: {name}"
        )
    if slope:
        return network.nodes.add("LeakyRelu", [value], name, alpha=slope)
    ends = [network.nodes.constant(f"{name}/{each}", each) for each in (0.0, float(most))]
    return network.nodes.add("Clip", [value, *ends], name)


@_pointwise
def _prelu(network: _Network, call: Call, value: str, name: str, is_first: bool) -> str:
    alpha = _array(call.operation.alpha)
    slope = network.nodes.constant(
        f"{name}/alpha", np.moveaxis(alpha, -1, 0) if is_first else alpha
    )
    return network.nodes.add("PRelu", [value, slope], name)


def _softmax(network: _Network, call: Call, name: str) -> None:
    axis = call.operation.axis
    if not isinstance(axis, int) or len(call.inputs) != 1:
        raise ValueError(f"`layer` must have softmax along one axis, unmasked. Received: {name}")
    value = network.nodes.add("Softmax", [network.plain(call.inputs[0])], name, axis=axis)
    network.set(call.outputs[0], value)


def _batch_norm(network: _Network, call: Call, name: str) -> None:
    layer, tensor = call.operation, call.inputs[0]
    rank = len(tensor.shape)
    axis = layer.axis % rank
    if len(call.inputs) != 1 or (axis != 1 and (rank, axis) != (4, 3)):
        raise ValueError(
            f"`layer` must have batch norms along the channels, without masks. Received: {name}"
        )
    size = tensor.shape[axis]
    ones, zeros = np.ones(size), np.zeros(size)
    arrays = {
        "gamma": ones if layer.gamma is None else _array(layer.gamma),
        "beta": zeros if layer.beta is None else _array(layer.beta),
        "mean": _array(layer.moving_mean),
        "variance": _array(layer.moving_variance),
    }
    weights = [network.nodes.constant(f"{name}/{word}", each) for word, each in arrays.items()]
    is_first = axis == 3
    x = network.first(tensor) if is_first else network.plain(tensor)
    value = network.nodes.add(
        "BatchNormalization", [x, *weights], name, epsilon=float(layer.epsilon)
    )
    network.set(call.outputs[0], value, is_first=is_first)


def _affine(scale: Any, shift: Any, network: _Network, call: Call, name: str) -> None:
    value = network.plain(call.inputs[0])
    factor = network.nodes.constant(f"{name}/scale", scale)
    value = network.nodes.add("Mul", [value, factor], f"{name}/scaled")
    addend = network.nodes.constant(f"{name}/shift", shift)
    network.set(call.outputs[0], network.nodes.add("Add", [value, addend], name))


def _rescaling(network: _Network, call: Call, name: str) -> None:
    layer = call.operation
    _affine(layer.scale, layer.offset, network, call, name)


def _normalization(network: _Network, call: Call, name: str) -> None:
    layer = call.operation
    if layer.invert:
        raise ValueError(f"`layer` must have no inverted normalization. Received: {name}")
    mean, variance = (_array(each).astype(np.float64) for each in (layer.mean, layer.variance))
    scale = 1 / np.maximum(np.sqrt(variance), keras.config.epsilon())
    _affine(scale, -mean * scale, network, call, name)


def _dense(network: _Network, call: Call, name: str) -> None:
    layer, x = call.operation, network.plain(call.inputs[0])
    kernel = network.nodes.constant(f"{name}/kernel", _array(layer.kernel))
    bias = [network.nodes.constant(f"{name}/bias", _array(layer.bias))] if layer.use_bias else []
    if len(call.inputs[0].shape) == 2:
        value = network.nodes.add("Gemm", [x, kernel, *bias], name)
    else:
        value = network.nodes.add("MatMul", [x, kernel], name)
        for each in bias:
            value = network.nodes.add("Add", [value, each], f"{name}/biased")
    value = _function(network, layer.activation, value, f"{name}/activated")
    network.set(call.outputs[0], value)


# ----------------------------------------------------------------------------------- several inputs


def _combined(operator: str) -> Callable[[_Network, Call, str], None]:
    """An operator of any number of values, which are broadcast."""

    def write(network: _Network, call: Call, name: str) -> None:
        operands = keras.tree.flatten((call.arguments.args, call.arguments.kwargs))
        tensors = [each for each in operands if isinstance(each, keras.KerasTensor)]
        others = [each for each in operands if not isinstance(each, keras.KerasTensor)]
        if any(not isinstance(each, int | float) for each in others):
            raise ValueError(f"`layer` must combine tensors and numbers. Received: {name}")
        is_first = any(map(network.has_first, tensors)) and all(
            len(each.shape) == 4 for each in tensors
        )
        values = []
        for number, each in enumerate(operands):
            if isinstance(each, keras.KerasTensor):
                values.append(network.first(each) if is_first else network.plain(each))
            else:
                values.append(network.nodes.constant(f"{name}/{number}", each))
        if operator in ("Sum", "Mean", "Max", "Min"):
            value = network.nodes.add(operator, values, name)
        else:
            value = values[0]
            for number, each in enumerate(values[1:], start=1):
                last = number == len(values) - 1
                output = name if last else f"{name}/{number}_of_{len(values)}"
                value = network.nodes.add(operator, [value, each], output)
        network.set(call.outputs[0], value, is_first=is_first)

    return write


def _concatenate(network: _Network, call: Call, name: str) -> None:
    axis, rank = call.operation.axis, len(call.inputs[0].shape)
    is_first = any(map(network.has_first, call.inputs))
    values = [network.first(each) if is_first else network.plain(each) for each in call.inputs]
    place = axis % rank
    if is_first:
        place = (0, 2, 3, 1)[place]
    value = network.nodes.add("Concat", values, name, axis=place)
    network.set(call.outputs[0], value, is_first=is_first)


# ------------------------------------------------------------------------------------------ shapes


def _flatten(network: _Network, call: Call, name: str) -> None:
    tensor = call.inputs[0]
    last = _is_last(call.operation.data_format)
    if len(tensor.shape) == 4 and not last:
        # Keras moves the channels to the end before it flattens.
        x = network.nodes.add(
            "Transpose", [network.plain(tensor)], f"{name}/moved", perm=[0, 2, 3, 1]
        )
    elif len(tensor.shape) in (2, 4) or last:
        x = network.plain(tensor)
    else:
        raise ValueError(f"`layer` must flatten images or vectors. Received: {name}")
    network.set(call.outputs[0], network.nodes.add("Flatten", [x], name))


def _reshape(network: _Network, call: Call, name: str) -> None:
    tensor, output = call.inputs[0], call.outputs[0]
    shape = [0, *(-1 if size is None else size for size in output.shape[1:])]
    if shape.count(-1) > 1:
        raise ValueError(f"`layer` must have known shapes. Received: {name} to {output.shape}")
    # One pixel: the numbers lie in the same order with the channels first.
    is_first = len(shape) == 4 and shape[1:3] == [1, 1]
    if is_first:
        shape = [0, shape[3], 1, 1]
    is_pixel = len(tensor.shape) == 4 and tuple(tensor.shape[1:3]) == (1, 1)
    x = network.first(tensor) if is_pixel and network.has_first(tensor) else network.plain(tensor)
    sizes = network.integers(f"{name}/sizes", shape)
    value = network.nodes.add("Reshape", [x, sizes], name)
    network.set(output, value, is_first=is_first)


_WRITERS: dict[type, Callable[[_Network, Call, str], None]] = {
    layers.SeparableConv2D: _separable,
    SeparableConv2D: _separable,
    FusedSeparableConv2D: _separable,
    layers.Conv2D: _convolution,
    layers.DepthwiseConv2D: _convolution,
    layers.Conv2DTranspose: _transposed_convolution,
    layers.MaxPooling2D: _pooling("MaxPool"),
    layers.AveragePooling2D: _pooling("AveragePool"),
    layers.GlobalAveragePooling2D: _global_pooling("GlobalAveragePool"),
    layers.GlobalMaxPooling2D: _global_pooling("GlobalMaxPool"),
    layers.ZeroPadding2D: _zero_padding,
    layers.Cropping2D: _cropping,
    layers.UpSampling2D: _up_sampling,
    layers.Activation: _activation,
    layers.ReLU: _relu,
    layers.LeakyReLU: _relu,
    layers.PReLU: _prelu,
    layers.Softmax: _softmax,
    layers.BatchNormalization: _batch_norm,
    layers.Rescaling: _rescaling,
    layers.Normalization: _normalization,
    layers.Dense: _dense,
    layers.Add: _combined("Sum"),
    layers.Average: _combined("Mean"),
    layers.Maximum: _combined("Max"),
    layers.Minimum: _combined("Min"),
    layers.Multiply: _combined("Mul"),
    layers.Subtract: _combined("Sub"),
    layers.Concatenate: _concatenate,
    layers.Flatten: _flatten,
    layers.Reshape: _reshape,
    # Nothing in inference.
    layers.ActivityRegularization: _pass_on,
    layers.AlphaDropout: _pass_on,
    layers.Dropout: _pass_on,
    layers.GaussianDropout: _pass_on,
    layers.GaussianNoise: _pass_on,
    layers.Identity: _pass_on,
    layers.SpatialDropout2D: _pass_on,
}
# `x + 3.0` and `keras.ops.add(x, y)` between layers.
_OPERATIONS = {
    "Add": _combined("Add"),
    "Subtract": _combined("Sub"),
    "Multiply": _combined("Mul"),
    "Divide": _combined("Div"),
    "TrueDivide": _combined("Div"),
    "Maximum": _combined("Max"),
    "Minimum": _combined("Min"),
}


def _writer_of(operation: Any) -> Callable[[_Network, Call, str], None] | None:
    kind = type(operation)
    if kind in _WRITERS:
        return _WRITERS[kind]
    is_function = kind.__module__.startswith("keras.") and not isinstance(operation, keras.Layer)
    if is_function and kind.__name__ in _OPERATIONS:
        return _OPERATIONS[kind.__name__]
    return None if _activation_of(operation) is None else _activation
