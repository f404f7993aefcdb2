"""Separable convolutions as ONNX: two convolutions, and what surrounds them; and whole models.

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
from collections.abc import Mapping, Sequence
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

__all__ = ["DTYPES", "Nodes", "export_onnx", "in_words", "of_keras", "to_onnx", "window"]

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
DTYPES = ("float16", "bfloat16", "float32", "float64")
"""Of the numbers of a graph."""
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
    """Writes a separable convolution, or a model of Keras, as an ONNX file.

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
    """Returns a separable convolution, or a model of Keras, as a model of ONNX.

    A layer has one input `x` and one output `y`. A functional or sequential model has the names of
    its inputs and outputs; it is for inference, and any backend of Keras will do. Images have their
    channels first in between, so that transposes are at the edges alone.

    Args:
        layer: A functional or sequential model of Keras, made of layers that image networks have; a
            built `SeparableConv2D` of Keras, ours or the stock one, on any backend; a
            `sepconv.torch.SeparableConv2d`; or weights: `SeparableWeights`, or a tuple
            (depthwise_kernel, pointwise_kernel, bias or `None`, depthwise_bias or `None`) of arrays
            in the layouts of Keras, of which the biases may be left out.
        spec: The hyper-parameters, for weights alone; `None` stands for `ConvSpec()`.
        input_shape: Shape of the input, four sizes in the layout of the layer; unknown ones are
            `None`. `None` stands for nothing but the channels known.
        opset: The version of the operators of ONNX; `None` for the first that has all of them:
            14, for gelu 20, for silu 24; for a model 20. In an older one, silu is two nodes.

    Returns:
        An `onnx.ModelProto` that the checker of onnx accepts.

    Raises:
        ImportError: the package onnx is missing.
        TypeError: `layer` is none of these, or `spec` is given for what has its own.
        ValueError: ONNX cannot express it: a layer of a model that is not known here, an activation
            without an operator, an output without elements, or padding "same" with strides and
            dilation for an unknown size.

    Example:
        >>> weights = np.ones((3, 3, 2, 1), "float32"), np.ones((1, 1, 2, 4), "float32")
        >>> model = to_onnx(weights, spec=ConvSpec(padding="same", activation="relu"))
        >>> " ".join(node.op_type for node in model.graph.node)
        'Transpose Conv Conv Relu Transpose'
    """
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(layer, keras.Model):
        if spec is not None or input_shape is not None:
            raise TypeError(
                "`spec` and `input_shape` are for single layers: a model has them. "
                f"Received: spec={spec}, input_shape={input_shape}"
            )
        from sepconv.models import keras_onnx

        return keras_onnx.model_to_onnx(layer, opset=opset)
    weights, own_spec = _weights_and_spec(layer)
    if own_spec is not None and spec is not None:
        raise TypeError(f"`spec` is for weights alone. Received: spec={spec}, layer={layer}")
    return _layer_to_onnx(weights, own_spec or spec or ConvSpec(), input_shape, opset)


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
    return of_keras(layer, known[0])


def of_keras(layer: Any, activation: str) -> tuple[SeparableWeights, ConvSpec]:
    """Returns the weights of a built layer of Keras, and its hyper-parameters with an activation.

    Args:
        layer: A `SeparableConv2D`.
        activation: One of `ACTIVATIONS`, in place of that of the layer.
    """
    ops = sys.modules["keras"].ops
    variables = [
        layer.depthwise_kernel,
        layer.pointwise_kernel,
        layer.bias if layer.use_bias else None,
        # A fused layer has this as well.
        getattr(layer, "depthwise_bias", None),
    ]
    arrays: list[Any] = [
        None if each is None else ops.convert_to_numpy(ops.convert_to_tensor(each))
        for each in variables
    ]
    spec = ConvSpec(
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
        activation=activation,
        input_activation=getattr(layer, "input_activation", None),
        depthwise_activation=getattr(layer, "depthwise_activation", None),
    )
    return SeparableWeights(*arrays), spec


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


class Nodes:
    """The nodes of a graph so far, in the order in which they run, and its constants.

    Args:
        opset: The version of the operators.
        dtype: Of the numbers.
    """

    def __init__(self, opset: int, dtype: np.dtype[Any]) -> None:
        self.opset = opset
        self.dtype = dtype
        self._onnx = _onnx()
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._names: dict[Any, str] = {}
        self._nbytes = 0

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Adds a node, and returns the name of its output, which is `output`."""
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(self, name: str, array: Any, dtype: Any = None) -> str:
        """Adds a constant, in the dtype of the graph if none is given, and returns its name.

        That is the name of another one with the same numbers, if there is one: layers are shared.
        """
        array = np.asarray(array, self.dtype if dtype is None else dtype)
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self._names:
            self._names[key] = name
            self._nbytes += array.nbytes
            self._constants.append(self._onnx.numpy_helper.from_array(array, name))
        return self._names[key]

    def activation(self, name: str, value: str, output: str) -> str:
        """Adds one of `ACTIVATIONS`: a node, or two for silu before opset 24."""
        if canonical_activation(name) == canonical_activation(None):
            return value
        operator = _OPERATORS[name]
        if operator.opset > self.opset:
            if operator is _OPERATORS["silu"]:
                gate = self.add("Sigmoid", [value], f"{output}/gate")
                return self.add("Mul", [value, gate], output)
            raise ValueError(
                f"`opset` must be at least {operator.opset} for the activation {name}. "
                f"Received: opset={self.opset}"
            )
        constants = [
            self.constant(f"{output}/{number}", constant)
            for number, constant in enumerate(operator.constants)
        ]
        return self.add(operator.name, [value, *constants], output, **operator.attributes)

    def convolution(
        self,
        value: str,
        output: str,
        weight: Array,
        bias: Any = None,
        operator: str = "Conv",
        **attributes: Any,
    ) -> str:
        """Adds a convolution with a weight in the layout of ONNX."""
        inputs = [value, self.constant(f"{output}/weight", weight)]
        if bias is not None:
            inputs.append(self.constant(f"{output}/bias", bias))
        return self.add(operator, inputs, output, **attributes)

    def separable(
        self,
        value: str,
        weights: SeparableWeights,
        spec: ConvSpec,
        in_sizes: Sequence[int | None],
        scope: str = "",
    ) -> str:
        """Adds a separable convolution of images with the channels first.

        Args:
            value: Its input.
            weights: In the layouts of Keras.
            spec: Its hyper-parameters.
            in_sizes: Height and width of the input.
            scope: Comes before the names of its nodes.
        """
        value = self.activation(spec.input_activation, value, f"{scope}x_activated")
        value = self.convolution(
            value,
            f"{scope}depthwise",
            depthwise_to_torch(weights.depthwise_kernel),
            weights.depthwise_bias,
            group=weights.depthwise_kernel.shape[2],
            **window(spec, weights.depthwise_kernel.shape[:2], in_sizes),
        )
        value = self.activation(spec.depthwise_activation, value, f"{scope}depthwise_activated")
        value = self.convolution(
            value, f"{scope}pointwise", pointwise_to_torch(weights.pointwise_kernel), weights.bias
        )
        return self.activation(spec.activation, value, f"{scope}activated")

    def rename_last(self, output: str) -> None:
        """Gives what the last node computes another name."""
        self._nodes[-1].output[0] = output

    def model(
        self, name: str, inputs: Mapping[str, Sequence[Any]], outputs: Mapping[str, Sequence[Any]]
    ) -> Any:
        """Returns the graph as a model, checked.

        Args:
            name: Of the graph.
            inputs: Shapes by name; words stand for sizes that are not known.
            outputs: The same.
        """
        if self._nbytes > _MOST_BYTES:
            raise ValueError("`layer` must have less than 2 GB of weights: ONNX is limited to that")
        helper = self._onnx.helper
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        graph = helper.make_graph(
            self._nodes,
            name,
            *(
                [helper.make_tensor_value_info(each, kind, shape) for each, shape in ends.items()]
                for ends in (inputs, outputs)
            ),
            self._constants,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="sepconv",
        )
        self._onnx.checker.check_model(model, full_check=True)
        return model


def window(spec: ConvSpec, kernel: Sequence[int], in_sizes: Sequence[int | None]) -> dict[str, Any]:
    """Returns the attributes of a convolution that tell where its kernel goes.

    Args:
        spec: Its hyper-parameters.
        kernel: Height and width of the kernel.
        in_sizes: Those of the input; `None` where they are not known.

    Raises:
        ValueError: the padding depends on what is not known, and ONNX has no word for it.
    """
    attributes = {"strides": list(spec.strides), "dilations": list(spec.dilation_rate)}
    height, width = in_sizes
    if height is not None and width is not None:
        amounts = {spec.padding_amounts(height, width, tuple(kernel))}
    else:
        # It depends on the remainder of a size by the stride, if on anything.
        sizes = range(_FAR, _FAR + max(spec.strides))
        amounts = {spec.padding_amounts(size, size, tuple(kernel)) for size in sizes}
    if len(amounts) == 1:
        ((top, bottom), (left, right)) = amounts.pop()
        return {**attributes, "pads": [top, left, bottom, right]}
    if spec.dilation_rate == (1, 1) and all(
        size >= stride for size, stride in zip(kernel, spec.strides, strict=True)
    ):
        return {**attributes, "auto_pad": "SAME_UPPER"}
    raise ValueError(
        "`input_shape` must have a known height and width: with these strides, kernel and "
        f"dilation the padding depends on them. Received: strides={spec.strides}, "
        f"kernel_size={tuple(kernel)}, dilation_rate={spec.dilation_rate}"
    )


def _layer_to_onnx(
    weights: SeparableWeights, spec: ConvSpec, input_shape: Shape | None, opset: int | None
) -> Any:
    names = (spec.activation, spec.input_activation, spec.depthwise_activation)
    used = [_OPERATORS[name].opset for name in names if name in _OPERATORS]
    chosen = max(_OPSET, *used, 0) if opset is None else int(opset)
    if chosen < _OPSET:
        raise ValueError(f"`opset` must be at least {_OPSET}. Received: opset={opset}")
    in_shape, out_shape = _shapes(weights, spec, input_shape)
    nodes = Nodes(chosen, weights.depthwise_kernel.dtype)
    value, is_last = "x", spec.channels_axis == 3
    if is_last:
        value = nodes.add("Transpose", [value], "x_channels_first", perm=[0, 3, 1, 2])
    in_sizes = [size for axis, size in enumerate(in_shape) if axis not in (0, spec.channels_axis)]
    value = nodes.separable(value, weights, spec, in_sizes)
    if is_last:
        nodes.add("Transpose", [value], "y_channels_last", perm=[0, 2, 3, 1])
    nodes.rename_last("y")
    words = ["batch", "height", "width"]
    words.insert(spec.channels_axis, "channels")
    # Sizes of the output have names of their own, but for the batch.
    y_words = [word if word == "batch" else f"out_{word}" for word in words]
    return nodes.model(
        "separable_conv2d", {"x": in_words(in_shape, words)}, {"y": in_words(out_shape, y_words)}
    )


def in_words(shape: Sequence[int | None], words: Sequence[str]) -> list[int | str]:
    """Returns a shape with words for the sizes that are not known."""
    return [word if size is None else size for size, word in zip(shape, words, strict=True)]


def _shapes(
    weights: SeparableWeights, spec: ConvSpec, input_shape: Shape | None
) -> tuple[list[int | None], list[int | None]]:
    """Of the input and the output; all shapes and dtypes are checked."""
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
        None if each is None else np.shape(each) for each in (weights.bias, weights.depthwise_bias)
    )
    geometry = spec.resolve(known, kernel, pointwise, bias, depthwise_bias)
    dtype = weights.depthwise_kernel.dtype
    for name, array in weights._asdict().items():
        if array is not None and array.dtype != dtype:
            raise ValueError(
                f"`{name}` must have the dtype of `depthwise_kernel`, {dtype}. "
                f"Received: {name}.dtype={array.dtype}"
            )
    if dtype.name not in DTYPES:
        raise ValueError(
            "`depthwise_kernel` must be made of floating-point numbers. "
            f"Received: depthwise_kernel.dtype={dtype}"
        )
    sizes[spec.channels_axis] = geometry.in_channels
    outputs = list(spec.output_shape(sizes, kernel[:2], geometry.out_channels))
    if 0 in outputs:
        raise ValueError(
            "`input_shape` must be one with a non-empty output: ONNX has no convolution "
            f"without. Received: input_shape={tuple(sizes)}, output shape {tuple(outputs)}"
        )
    return sizes, outputs
