"""Separable convolutions as ONNX: two convolutions, and what surrounds them.

    [Transpose] -> [input activation] -> Conv(group=channels) -> [depthwise activation] -> Conv
        -> [activation] -> [Transpose]

The transposes are there in the layout channels_last alone. A layer of Keras or `tf.layers`, which
has no activation but the last, is at most 5 nodes; activations of the input and between the stages
are one node each.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sepconv.models.atomic import replacing
from sepconv.models.weights import (
    SeparableWeights,
    depthwise_from_torch,
    depthwise_to_torch,
    pointwise_from_torch,
    pointwise_to_torch,
)
from sepconv.spec import ACTIVATIONS, ConvSpec, canonical_activation

__all__ = ["export_onnx", "to_onnx"]

Array = npt.NDArray[Any]
Shape = Sequence[int | None]


class _Operator(NamedTuple):
    name: str
    """Of the operator of ONNX."""
    opset: int
    """The first that has it in the form that is used here."""
    attributes: dict[str, float] = {}  # noqa: RUF012 - it is never changed
    constants: tuple[float, ...] = ()
    """Further inputs."""


_OPERATORS = {
    "relu": _Operator("Relu", 14),
    "relu6": _Operator("Clip", 13, constants=(0.0, 6.0)),
    "leaky_relu": _Operator("LeakyRelu", 6, {"alpha": 0.2}),
    "sigmoid": _Operator("Sigmoid", 13),
    "tanh": _Operator("Tanh", 13),
    "silu": _Operator("Swish", 24, {"alpha": 1.0}),
    "gelu": _Operator("Gelu", 20),
    "hard_sigmoid": _Operator("HardSigmoid", 6, {"alpha": 1 / 6, "beta": 0.5}),
    "hard_silu": _Operator("HardSwish", 14),
    "elu": _Operator("Elu", 6, {"alpha": 1.0}),
}
# The first with every operator above in all dtypes of floating-point numbers, but for those that
# name a later one.
_OPSET = 14
# What protocol buffers can hold, in one message.
_MOST_BYTES = 2**31 - 2**20
# A size that no kernel reaches across.
_FAR = 2**40


def export_onnx(
    layer: Any,
    path: str | os.PathLike[str],
    *,
    spec: ConvSpec | None = None,
    input_shape: Shape | None = None,
    opset: int | None = None,
) -> None:
    """Writes a separable convolution as an ONNX file.

    Args:
        layer: As for `to_onnx`, as are all arguments that follow.
        path: Of the file. It is written beside and renamed, so that it is never there in half.
        spec: The hyper-parameters, for weights alone.
        input_shape: In the layout of the layer.
        opset: The version of the operators.

    Raises:
        ImportError: the package onnx is missing.
        TypeError: `layer` is none of these.
        ValueError: ONNX cannot express the layer.
    """
    model = to_onnx(layer, spec=spec, input_shape=input_shape, opset=opset)
    with replacing(path) as beside:
        _onnx().save(model, beside)


def to_onnx(
    layer: Any,
    *,
    spec: ConvSpec | None = None,
    input_shape: Shape | None = None,
    opset: int | None = None,
) -> Any:
    """Returns a separable convolution as an ONNX model with one input `x` and one output `y`.

    Args:
        layer: A built `SeparableConv2D` of Keras, ours or the stock one, on any backend; a
            `sepconv.torch.SeparableConv2d`; or weights: `SeparableWeights`, or a tuple
            (depthwise_kernel, pointwise_kernel, bias or `None`, depthwise_bias or `None`) of arrays
            in the layouts of Keras, of which the biases may be left out.
        spec: The hyper-parameters, for weights alone; `None` stands for `ConvSpec()`.
        input_shape: Shape of the input, four sizes in the layout of the layer; unknown ones are
            `None`. `None` stands for nothing but the channels known.
        opset: The version of the operators of ONNX; `None` for the first that has all of them:
            14, for gelu 20, for silu 24. In an older one, silu is two nodes.

    Returns:
        An `onnx.ModelProto` that the checker of onnx accepts.

    Raises:
        ImportError: the package onnx is missing.
        TypeError: `layer` is none of these, or `spec` is given for a layer that has its own.
        ValueError: ONNX cannot express it: an activation without an operator, an output without
            elements, or padding "same" with strides and dilation for an unknown size.

    Example:
        >>> weights = np.ones((3, 3, 2, 1), "float32"), np.ones((1, 1, 2, 4), "float32")
        >>> model = to_onnx(weights, spec=ConvSpec(padding="same", activation="relu"))
        >>> [node.op_type for node in model.graph.node]
        ['Transpose', 'Conv', 'Conv', 'Relu', 'Transpose']
    """
    onnx = _onnx()
    weights, own_spec = _weights_and_spec(layer)
    if own_spec is not None and spec is not None:
        raise TypeError(f"`spec` is for weights alone. Received: spec={spec}, layer={layer}")
    graph = _Graph(onnx, weights, own_spec or spec or ConvSpec(), input_shape, opset)
    model = graph.model()
    onnx.checker.check_model(model, full_check=True)
    return model


def _onnx() -> Any:
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(
            "Export needs the package onnx. Run: pip install 'sepconv[models]'"
        ) from error


# ------------------------------------------------------------------------ weights of the frameworks


def _weights_and_spec(layer: Any) -> tuple[SeparableWeights, ConvSpec | None]:
    keras, torch_door = sys.modules.get("keras"), sys.modules.get("sepconv.torch")
    if keras is not None and isinstance(layer, keras.layers.SeparableConv2D):
        return _of_keras(keras, layer)
    if torch_door is not None and isinstance(layer, torch_door.SeparableConv2d):
        return _of_torch(layer)
    if isinstance(layer, tuple | list) and 2 <= len(layer) <= 4:
        padded = [*layer, None, None][:4]
        arrays = [None if array is None else np.asarray(array) for array in padded]
        return SeparableWeights(*arrays), None  # type: ignore[arg-type]
    raise TypeError(
        "`layer` must be a SeparableConv2D of Keras, a sepconv.torch.SeparableConv2d, or a tuple "
        f"of 2 to 4 arrays. Received: layer={layer!r}"
    )


def _of_keras(keras: Any, layer: Any) -> tuple[SeparableWeights, ConvSpec]:
    if not layer.built:
        raise ValueError(f"`layer` must be built: it has no weights yet. Received: layer={layer}")
    activation = getattr(layer.activation, "__name__", None)
    known = [name for name in ACTIVATIONS if getattr(keras.activations, name) is layer.activation]
    if not known:
        raise ValueError(
            f"`layer` must have an activation that ONNX has in one node, {', '.join(ACTIVATIONS)}. "
            f"Received: activation={activation or layer.activation!r}"
        )
    variables = [layer.depthwise_kernel, layer.pointwise_kernel]
    if layer.use_bias:
        variables.append(layer.bias)
    tensors = [keras.ops.convert_to_tensor(variable) for variable in variables]
    depthwise, pointwise, *bias = (keras.ops.convert_to_numpy(tensor) for tensor in tensors)
    spec = ConvSpec(
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
        activation=known[0],
    )
    return SeparableWeights(depthwise, pointwise, bias[0] if bias else None), spec


def _of_torch(layer: Any) -> tuple[SeparableWeights, ConvSpec]:
    arrays: list[Any] = [
        None if tensor is None else tensor.detach().cpu().numpy()
        for stage in (layer.depthwise, layer.pointwise)
        for tensor in (stage.weight, stage.bias)
    ]
    depthwise, depthwise_bias, pointwise, bias = arrays
    padding = layer.padding
    if not isinstance(padding, str):
        padding = [each if isinstance(each, tuple | list) else (each, each) for each in padding]
    spec = ConvSpec(
        strides=layer.stride,
        padding=padding,
        dilation_rate=layer.dilation,
        data_format="channels_first",
        activation=layer.activation,
        input_activation=layer.input_activation,
        depthwise_activation=layer.depthwise_activation,
    )
    weights = SeparableWeights(
        depthwise_from_torch(depthwise, layer.in_channels),
        pointwise_from_torch(pointwise),
        bias,
        depthwise_bias,
    )
    return weights, spec


# ------------------------------------------------------------------------------------------- graph


class _Graph:
    """The nodes of one layer, in the order in which they run."""

    def __init__(
        self,
        onnx: Any,
        weights: SeparableWeights,
        spec: ConvSpec,
        input_shape: Shape | None,
        opset: int | None,
    ) -> None:
        self._onnx = onnx
        self._weights = weights
        self._spec = spec
        names = (spec.activation, spec.input_activation, spec.depthwise_activation)
        used = [_OPERATORS[name].opset for name in names if name in _OPERATORS]
        self._opset = max(_OPSET, *used, 0) if opset is None else int(opset)
        if self._opset < _OPSET:
            raise ValueError(f"`opset` must be at least {_OPSET}. Received: opset={opset}")
        self._x_shape, self._y_shape = self._shapes(input_shape)
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def model(self) -> Any:
        helper = self._onnx.helper
        spec, weights = self._spec, self._weights
        last = spec.channels_axis == 3
        value = "x"
        if last:
            value = self._node("Transpose", [value], "x_channels_first", perm=[0, 3, 1, 2])
        value = self._activated(spec.input_activation, value, "x_activated")
        value = self._convolved(
            value,
            "depthwise",
            depthwise_to_torch(weights.depthwise_kernel),
            weights.depthwise_bias,
            group=weights.depthwise_kernel.shape[2],
            strides=list(spec.strides),
            dilations=list(spec.dilation_rate),
            **self._padding(),
        )
        value = self._activated(spec.depthwise_activation, value, "depthwise_activated")
        value = self._convolved(
            value, "pointwise", pointwise_to_torch(weights.pointwise_kernel), weights.bias
        )
        value = self._activated(spec.activation, value, "activated")
        if last:
            value = self._node("Transpose", [value], "y_channels_last", perm=[0, 2, 3, 1])
        self._nodes[-1].output[0] = "y"
        kind = helper.np_dtype_to_tensor_dtype(weights.depthwise_kernel.dtype)
        graph = helper.make_graph(
            self._nodes,
            "separable_conv2d",
            [helper.make_tensor_value_info("x", kind, self._x_shape)],
            [helper.make_tensor_value_info("y", kind, self._y_shape)],
            self._constants,
        )
        opsets = [helper.make_opsetid("", self._opset)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="sepconv",
        )

    def _shapes(self, input_shape: Shape | None) -> tuple[list[Any], list[Any]]:
        """Of the input and the output, with words for what is not known; both are checked."""
        weights, spec = self._weights, self._spec
        kernel, pointwise = np.shape(weights.depthwise_kernel), np.shape(weights.pointwise_kernel)
        sizes: list[int | None] = [None] * 4 if input_shape is None else list(input_shape)
        # The plan checks the shapes of the weights against each other, on an input that fits.
        largest = [(k - 1) * d + 1 for k, d in zip(kernel[:2], spec.dilation_rate, strict=False)]
        least = [1, *largest]
        least.insert(spec.channels_axis, kernel[2] if len(kernel) == 4 else 1)
        if len(sizes) != 4:
            raise ValueError(f"`input_shape` must have four sizes. Received: {input_shape!r}")
        known = [small if size is None else size for size, small in zip(sizes, least, strict=False)]
        bias, depthwise_bias = (
            None if each is None else np.shape(each)
            for each in (weights.bias, weights.depthwise_bias)
        )
        geometry = spec.resolve(known, kernel, pointwise, bias, depthwise_bias)
        for name, array in weights._asdict().items():
            if array is not None and array.dtype != weights.depthwise_kernel.dtype:
                raise ValueError(
                    f"`{name}` must have the dtype of `depthwise_kernel`, "
                    f"{weights.depthwise_kernel.dtype}. Received: {name}.dtype={array.dtype}"
                )
        if weights.depthwise_kernel.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            raise ValueError(
                "`depthwise_kernel` must be made of floating-point numbers. "
                f"Received: depthwise_kernel.dtype={weights.depthwise_kernel.dtype}"
            )
        if sum(array.nbytes for array in weights if array is not None) > _MOST_BYTES:
            raise ValueError("`layer` must have less than 2 GB of weights: ONNX is limited to that")
        sizes[spec.channels_axis] = geometry.in_channels
        outputs = list(spec.output_shape(sizes, kernel[:2], geometry.out_channels))
        if 0 in outputs:
            raise ValueError(
                "`input_shape` must be one with a non-empty output: ONNX has no convolution "
                f"without. Received: input_shape={tuple(sizes)}, output shape {tuple(outputs)}"
            )
        words = ["batch", "height", "width"]
        words.insert(spec.channels_axis, "channels")
        x_shape = [w if size is None else size for size, w in zip(sizes, words, strict=True)]
        # Sizes of the output have names of their own, but for the batch.
        y_words = [word if word == "batch" else f"out_{word}" for word in words]
        y_shape = [w if size is None else size for size, w in zip(outputs, y_words, strict=True)]
        self._in_sizes = [size for axis, size in enumerate(sizes) if axis]
        self._in_sizes.pop(spec.channels_axis - 1)
        return x_shape, y_shape

    def _padding(self) -> dict[str, Any]:
        spec, kernel = self._spec, self._weights.depthwise_kernel.shape[:2]
        height, width = self._in_sizes
        if height is not None and width is not None:
            amounts = {spec.padding_amounts(height, width, kernel)}
        else:
            # It depends on the remainder of a size by the stride, if on anything.
            sizes = range(_FAR, _FAR + max(spec.strides))
            amounts = {spec.padding_amounts(size, size, kernel) for size in sizes}
        if len(amounts) == 1:
            ((top, bottom), (left, right)) = amounts.pop()
            return {"pads": [top, left, bottom, right]}
        if spec.dilation_rate == (1, 1) and all(
            size >= stride for size, stride in zip(kernel, spec.strides, strict=True)
        ):
            return {"auto_pad": "SAME_UPPER"}
        raise ValueError(
            "`input_shape` must have a known height and width: with these strides, kernel and "
            f"dilation the padding depends on them. Received: strides={spec.strides}, "
            f"kernel_size={tuple(kernel)}, dilation_rate={spec.dilation_rate}"
        )

    def _convolved(
        self, value: str, stage: str, weight: Array, bias: Array | None, **attributes: Any
    ) -> str:
        inputs = [value, self._constant(f"{stage}_weight", weight)]
        if bias is not None:
            inputs.append(self._constant(f"{stage}_bias", bias))
        return self._node("Conv", inputs, stage, **attributes)

    def _activated(self, name: str, value: str, output: str) -> str:
        if canonical_activation(name) == canonical_activation(None):
            return value
        operator = _OPERATORS[name]
        if operator.opset > self._opset:
            if operator is _OPERATORS["silu"]:
                gate = self._node("Sigmoid", [value], f"{output}_gate")
                return self._node("Mul", [value, gate], output)
            raise ValueError(
                f"`opset` must be at least {operator.opset} for the activation {name}. "
                f"Received: opset={self._opset}"
            )
        dtype = self._weights.depthwise_kernel.dtype
        constants = [
            self._constant(f"{output}_{number}", np.array(constant, dtype))
            for number, constant in enumerate(operator.constants)
        ]
        return self._node(operator.name, [value, *constants], output, **operator.attributes)

    def _constant(self, name: str, array: Array) -> str:
        self._constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, [output], **attributes))
        return output
