"""Which operations of a Keras model may become one layer, why others may not, and that layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from sepconv.keras import SeparableConv2D, _fused_name
from sepconv.models.exclusion import Exclusion
from sepconv.models.keras_fused import FusedSeparableConv2D
from sepconv.models.keras_graph import Reading
from sepconv.spec import ACTIVATIONS, ConvSpec

__all__ = ["Chain", "find_chains", "why_not_stock"]

Array = npt.NDArray[Any]

_LINEAR = ACTIVATIONS[0]
_WORDS = ("initializer", "regularizer", "constraint")


@dataclass
class _Affine:
    """A batch norm in inference: scale * x + shift, by channel."""

    scale: Any = 1.0
    shift: Any = 0.0
    is_identity: bool = True

    def then(self, norm: Any) -> _Affine:
        values = {
            name: None if variable is None else _numbers(variable)
            for name, variable in (
                ("gamma", norm.gamma),
                ("beta", norm.beta),
                ("mean", norm.moving_mean),
                ("variance", norm.moving_variance),
            )
        }
        factor = 1 / np.sqrt(values["variance"] + norm.epsilon)
        if values["gamma"] is not None:
            factor = factor * values["gamma"]
        shift = (self.shift - values["mean"]) * factor
        if values["beta"] is not None:
            shift = shift + values["beta"]
        return _Affine(self.scale * factor, shift, is_identity=False)

    def of(self, bias: Any, size: int) -> Array:
        """A bias that may be none, after it."""
        start = 0.0 if bias is None else _numbers(bias)
        return np.broadcast_to(start * self.scale + self.shift, (size,))


@dataclass(eq=False)
class Chain:
    """Operations that follow each other and become one layer, or a candidate that does not."""

    convolution: Any
    pointwise: Any = None
    """The second layer of a pair."""
    reason: str | None = None
    before: list[Any] = field(default_factory=list)
    between: list[Any] = field(default_factory=list)
    after: list[Any] = field(default_factory=list)
    input_activation: str = _LINEAR
    padding: Any = None
    depthwise_activation: str = _LINEAR
    activation: str | None = None
    """One that was absorbed; otherwise that of the layer stays."""
    between_affine: _Affine = field(default_factory=_Affine)
    after_affine: _Affine = field(default_factory=_Affine)

    @property
    def convolutions(self) -> list[Any]:
        """The layer, or both of the pair."""
        return [self.convolution] if self.pointwise is None else [self.convolution, self.pointwise]

    @property
    def carrier(self) -> Any:
        """The operation in whose place the new layer comes, under its name."""
        return self.convolutions[-1]

    @property
    def operations(self) -> list[Any]:
        """What it is made of, in the order of the data; the first layer alone if it stays."""
        if self.reason is not None:
            return [self.convolution]
        convolutions = [self.convolution, *self.between]
        if self.pointwise is not None:
            convolutions.append(self.pointwise)
        return [*self.before, *convolutions, *self.after]

    def make(self) -> Any:
        """The new layer, not built."""
        last = self.carrier
        config = self.convolution.get_config()
        for key in ("filters", "name", "use_bias", "activation", "activity_regularizer"):
            config[key] = last.get_config()[key]
        if self.pointwise is not None:
            theirs = self.pointwise.get_config()
            for word in _WORDS:
                config[f"depthwise_bias_{word}"] = config[f"bias_{word}"]
                config[f"pointwise_{word}"] = theirs[f"kernel_{word}"]
                config[f"bias_{word}"] = theirs[f"bias_{word}"]
            config["depthwise_name"] = self.convolution.name
            config["use_depthwise_bias"] = self._has_depthwise_bias
            config["depthwise_activation"] = self.depthwise_activation
        if not self.after_affine.is_identity:
            config["use_bias"] = True
        if self.activation is not None:
            config["activation"] = self.activation
        if self.before:
            config["input_activation"] = self.input_activation
        if self.padding is not None:
            config["padding"] = self.padding
        is_plain = self.pointwise is None and not self.before
        return (SeparableConv2D if is_plain else FusedSeparableConv2D).from_config(config)

    def load_weights(self, layer: Any) -> None:
        """Sets the weights of the new layer, once it is built."""
        if not self.is_folded:
            # Nothing to compute: the very bits.
            layer.set_weights([keras.ops.convert_to_numpy(each) for each in self._weights()])
            return
        depthwise, pointwise, bias, depthwise_bias = self._all_weights()
        kernel = _numbers(depthwise)
        weights = [kernel, _numbers(pointwise) * self.after_affine.scale]
        if layer.use_bias:
            weights.append(self.after_affine.of(bias, layer.filters))
        if self._has_depthwise_bias:
            channels = kernel.shape[2:]
            scale = np.broadcast_to(self.between_affine.scale, (int(np.prod(channels)),))
            weights[0] = kernel * scale.reshape(channels)
            weights.append(self.between_affine.of(depthwise_bias, scale.size))
        layer.set_weights(weights)

    def renamed(self, layer: Any) -> dict[str, str]:
        """Paths of the weights that live on, and those in the new layer, where they differ."""
        if self.is_folded:
            return {}
        pairs = zip(self._weights(), layer.weights, strict=True)
        return {old.path: new.path for old, new in pairs if old.path != new.path}

    @property
    def is_folded(self) -> bool:
        """Whether batch norms are part of its weights."""
        return not (self.between_affine.is_identity and self.after_affine.is_identity)

    def _all_weights(self) -> list[Any]:
        """In the order of the new layer: of both stages, of the output, between the stages."""
        first, last = self.convolution, self.carrier
        bias = last.bias if last.use_bias else None
        if self.pointwise is None:
            return [first.depthwise_kernel, first.pointwise_kernel, bias, None]
        return [first.kernel, last.kernel, bias, first.bias if first.use_bias else None]

    def _weights(self) -> list[Any]:
        return [weight for weight in self._all_weights() if weight is not None]

    @property
    def _has_depthwise_bias(self) -> bool:
        is_biased = self.pointwise is not None and self.convolution.use_bias
        return is_biased or not self.between_affine.is_identity


def find_chains(reading: Reading, inference: bool, excluded: Exclusion) -> list[Chain]:
    """Every candidate in the graphs."""
    chains = []
    for operation in reading.operations():
        if isinstance(operation, layers.SeparableConv2D):
            if isinstance(operation, SeparableConv2D) and not inference:
                continue
            if type(operation) is FusedSeparableConv2D:
                continue
            chains.append(Chain(operation, reason=why_not_stock(operation)))
        elif isinstance(operation, layers.DepthwiseConv2D):
            chains.append(_pair_chain(reading, operation, inference))
    for chain in chains:
        _refuse_what_cannot_be_one(reading, chain, excluded)
    if inference:
        taken: set[int] = set()
        swapped = [chain for chain in chains if chain.reason is None]
        for chain in swapped:
            taken.update(map(id, chain.operations))
        # All take what follows first: it is cheaper to apply once, on the way out.
        for chain in swapped:
            _absorb_after(reading, chain, taken, excluded)
        for chain in swapped:
            _absorb_before(reading, chain, taken, excluded)
    # One of ours that nothing was folded into is what it was.
    return [
        chain
        for chain in chains
        if type(chain.convolution) is not SeparableConv2D or len(chain.operations) > 1
    ]


def why_not_stock(layer: Any) -> str | None:
    """Why nobody knows what a layer computes, which extends one of Keras, or `None`."""
    if type(layer) in (layers.SeparableConv2D, SeparableConv2D, layers.DepthwiseConv2D):
        return None
    return f"{type(layer).__name__} is a class of its own, and may compute something else"


def _pair_chain(reading: Reading, depthwise: Any, inference: bool) -> Chain:
    """A depthwise convolution, and the pointwise one that all its output goes to."""
    chain = Chain(depthwise, reason=why_not_stock(depthwise))
    if chain.reason is not None:
        return chain
    activation = _fused_name(depthwise.activation)
    if activation is None:
        chain.reason = "its activation is none that the kernel has"
        return chain
    operation = depthwise
    while True:
        following, why = reading.follower(operation)
        if following is None:
            chain.reason = why if operation is depthwise else f"{reading.name(operation)}: {why}"
            return chain
        name, kind = reading.name(following), type(following).__name__
        if isinstance(following, layers.Conv2D) and not isinstance(
            following, layers.DepthwiseConv2D
        ):
            break
        stage = _activation_of(following)
        if isinstance(following, layers.BatchNormalization):
            if not inference:
                chain.reason = (
                    f"batch norm {name} between the stages follows the data in training: "
                    "fuse with inference=True"
                )
            elif activation != _LINEAR:
                chain.reason = f"batch norm {name} comes after the activation between the stages"
            else:
                chain.reason = _why_not_folded(reading, following, depthwise)
        elif stage is None:
            chain.reason = f"it is followed by {name} ({kind}), not by a convolution of 1x1 pixels"
        elif activation != _LINEAR and stage != _LINEAR:
            chain.reason = f"{name} is a second activation between the stages"
        if chain.reason is not None:
            return chain
        if stage is None:
            chain.between_affine = chain.between_affine.then(following)
        elif stage != _LINEAR:
            activation = stage
        chain.between.append(following)
        operation = following
    chain.reason = _why_not_pointwise(following, name)
    chain.pointwise = following
    chain.depthwise_activation = activation
    if chain.reason is None and not inference:
        if depthwise.trainable != following.trainable:
            chain.reason = "one layer of the pair is frozen and the other is not"
        elif any(
            getattr(each, "activity_regularizer", None) is not None
            for each in (depthwise, *chain.between)
        ):
            chain.reason = "a penalty on what is between the stages needs it in memory"
    return chain


def _why_not_pointwise(layer: Any, name: str) -> str | None:
    if type(layer) is not layers.Conv2D:
        return f"{name} ({type(layer).__name__}) may compute something else than a convolution"
    if tuple(layer.kernel_size) != (1, 1):
        return f"{name}, which follows, has a kernel of {layer.kernel_size} pixels, not of 1x1"
    if tuple(layer.strides) != (1, 1):
        return f"{name}, which follows, has strides: {layer.strides}"
    if layer.groups != 1:
        return f"{name}, which follows, has {layer.groups} groups"
    return None


def _refuse_what_cannot_be_one(reading: Reading, chain: Chain, excluded: Exclusion) -> None:
    named = [(reading.name(each), each) for each in chain.operations]
    if any(excluded(name, each) for name, each in named):
        chain.reason = "excluded"
    if chain.reason is not None:
        return
    first = chain.convolution
    for name, layer in named:
        if not isinstance(layer, keras.Layer):
            continue
        if layer.dtype_policy.name != first.dtype_policy.name:
            chain.reason = (
                f"{name} has the dtype policy {layer.dtype_policy.name}, and "
                f"{reading.name(first)} has {first.dtype_policy.name}"
            )
        elif getattr(layer, "lora_enabled", False):
            chain.reason = f"{name} has low-rank additions to its kernel"
        elif getattr(layer, "quantization_mode", None) is not None:
            chain.reason = f"{name} is quantized"
    last = chain.carrier
    if last.data_format != first.data_format:
        chain.reason = f"{reading.name(last)} has another data_format"


def _absorb_after(reading: Reading, chain: Chain, taken: set[int], excluded: Exclusion) -> None:
    if chain.carrier.activity_regularizer is not None:
        return
    activation = _fused_name(chain.carrier.activation)
    operation = chain.carrier
    while activation == _LINEAR:
        operation, _ = reading.follower(operation)
        if operation is None or id(operation) in taken:
            return
        stage = _activation_of(operation)
        if not _may_join(reading, chain, operation, excluded):
            return
        if stage is not None:
            activation = chain.activation = stage
        elif isinstance(operation, layers.BatchNormalization) and (
            _why_not_folded(reading, operation, chain.carrier) is None
        ):
            chain.after_affine = chain.after_affine.then(operation)
        else:
            return
        chain.after.append(operation)
        taken.add(id(operation))


def _absorb_before(reading: Reading, chain: Chain, taken: set[int], excluded: Exclusion) -> None:
    first = chain.convolution
    producer = reading.producer(first)
    if (
        type(producer) is layers.ZeroPadding2D
        and first.padding == ConvSpec().padding  # Which adds none of its own.
        and producer.data_format == first.data_format
        and _may_join(reading, chain, producer, excluded)
        and id(producer) not in taken
    ):
        chain.padding = tuple(map(tuple, producer.padding))
        chain.before.insert(0, producer)
        taken.add(id(producer))
        producer = reading.producer(producer)
    if producer is None or id(producer) in taken:
        return
    stage = _activation_of(producer)
    if stage is not None and _may_join(reading, chain, producer, excluded):
        chain.input_activation = stage
        chain.before.insert(0, producer)
        taken.add(id(producer))


def _may_join(reading: Reading, chain: Chain, operation: Any, excluded: Exclusion) -> bool:
    if isinstance(operation, keras.Layer):
        if operation.compute_dtype != chain.convolution.compute_dtype:
            return False
        if operation.activity_regularizer is not None:
            return False
    return not excluded(reading.name(operation), operation)


def _why_not_folded(reading: Reading, norm: Any, convolution: Any) -> str | None:
    """Why a batch norm is not a scale and a shift of the channels of a convolution."""
    name = reading.name(norm)
    if type(norm) is not layers.BatchNormalization:
        return f"{name} ({type(norm).__name__}) may compute something else than a batch norm"
    spec = ConvSpec(data_format=convolution.data_format)
    axes = [norm.axis] if isinstance(norm.axis, int) else list(norm.axis)
    if [axis % 4 for axis in axes] != [spec.channels_axis]:
        return f"batch norm {name} is not along the channels"
    if id(norm) in reading.in_training:
        return f"batch norm {name} is called with training=True"
    for call in reading.calls[id(norm)]:
        if len(call.arguments.args) > 1 or call.arguments.kwargs.get("mask") is not None:
            return f"batch norm {name} is called with a mask, or with `training` by position"
    return None


def _activation_of(operation: Any) -> str | None:
    """The name of the activation that an operation is, or `None`."""
    kind = type(operation)
    if kind is layers.Activation:
        function = operation.activation
        return (
            _activation_of(function) if isinstance(function, keras.Layer) else _fused_name(function)
        )
    if kind is layers.ReLU:
        return _relu_name(operation.max_value, operation.negative_slope, operation.threshold)
    if kind is layers.LeakyReLU:
        return _relu_name(None, operation.negative_slope, 0.0)
    if kind is layers.ELU:
        return "elu" if operation.alpha == 1.0 else None
    if kind.__module__.startswith("keras."):  # `keras.ops.relu(x)`, `keras.activations.relu(x)`.
        if kind.__name__ == "ReLU" and not isinstance(operation, keras.Layer):
            return _relu_name(operation.max_value, operation.negative_slope, operation.threshold)
        if kind.__name__ == "LeakyRelu":
            return _relu_name(None, operation.negative_slope, 0.0)
        if kind.__name__ == "Elu":
            return "elu" if operation.alpha == 1.0 else None
        if kind.__name__ == "Gelu":
            return None if operation.approximate else "gelu"
        return _OPERATIONS.get(kind.__name__)
    return None


_OPERATIONS = {
    "Relu": "relu",
    "Relu6": "relu6",
    "Sigmoid": "sigmoid",
    "Silu": "silu",
    "Tanh": "tanh",
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_silu",
}


def _relu_name(max_value: Any, negative_slope: float, threshold: float) -> str | None:
    names = {(None, 0.0, 0.0): "relu", (6.0, 0.0, 0.0): "relu6", (None, 0.2, 0.0): "leaky_relu"}
    return names.get((max_value, round(float(negative_slope), 7), float(threshold)))


def _numbers(variable: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)
