"""What a file of a model or of weights holds."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from sepconv.models.convert import tensors_of
from sepconv.models.load import holds_model, load, optimizer_tensors
from sepconv.models.tensors import read_tensors
from sepconv.models.weights import (
    chosen_tensors,
    is_moving_average,
    is_optimizer_slot,
    separable_names,
)

__all__ = ["Contents", "Layer", "Variable", "inspect"]

Array = npt.NDArray[Any]


class Layer(NamedTuple):
    """A layer of a model; `None` stands for what the file does not tell."""

    name: str
    kind: str
    output_shape: tuple[int | None, ...] | None
    macs: int | None
    """Multiply-adds an image over all calls, of convolutions and dense layers."""
    parameters: int
    bytes: int


class Variable(NamedTuple):
    """A named tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    role: str
    """`"weight"`, `"optimizer slot"` or `"moving average"`."""


class Contents(NamedTuple):
    """What a file holds: its layers and its tensors."""

    path: str
    layers: tuple[Layer, ...]
    variables: tuple[Variable, ...]

    def facts(self) -> dict[str, Any]:
        """Returns the contents as what JSON can hold."""
        return {
            "path": self.path,
            "layers": [layer._asdict() for layer in self.layers],
            "variables": [variable._asdict() for variable in self.variables],
        }


def inspect(path: str | os.PathLike[str]) -> Contents:
    """Returns what a file holds.

    Layers are those of a model, in the order of their calls, or else the separable convolutions
    among the tensors. Variables are the weights, and what optimizers have stored.

    Args:
        path: What `sepconv.load` reads; errors are the same.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from sepconv.models.tensors import write_tensors
        >>> path = f"{tempfile.mkdtemp()}/net.safetensors"
        >>> tensors = {"sep/depthwise_kernel": np.ones((3, 3, 4, 1), "float32"),
        ...            "sep/pointwise_kernel": np.ones((1, 1, 4, 5), "float32")}
        >>> write_tensors(path, tensors)
        >>> layer = inspect(path).layers[0]
        >>> layer.name, layer.parameters, layer.bytes
        ('sep', 56, 224)
    """
    path = Path(path)
    model = load(path) if holds_model(path) else None
    if model is None:
        tensors = read_tensors(path)
        layers = _separable_layers(tensors)
    else:
        tensors = tensors_of(model)
        tensors |= optimizer_tensors(path)
        layers = _layers_of(model)
    variables = tuple(
        Variable(name, tuple(array.shape), str(array.dtype), array.nbytes, _role(name))
        for name, array in tensors.items()
    )
    return Contents(str(path), tuple(layers), variables)


def _role(name: str) -> str:
    if is_optimizer_slot(name):
        return "optimizer slot"
    return "moving average" if is_moving_average(name) else "weight"


def _separable_layers(tensors: Mapping[str, Array]) -> Iterator[Layer]:
    weights = chosen_tensors(tensors)
    for layer, names in separable_names(weights).items():
        arrays = [weights[name] for name in names[:4] if name is not None]
        yield Layer(
            layer,
            "torch pair" if names.is_torch else "SeparableConv2D",
            None,
            None,
            sum(array.size for array in arrays),
            sum(array.nbytes for array in arrays),
        )


def _layers_of(model: Any) -> Iterator[Layer]:
    from sepconv.models.keras_graph import Reading, inner_layers

    reading = Reading(model)
    called = list(reading.operations())
    # Those that the code of other layers calls have shapes that nobody wrote down.
    held = [layer for owner in reading.opaque for layer in inner_layers(owner)]
    seen = {id(graph.model) for graph in reading.graphs}
    for layer in (*called, *held):
        if id(layer) in seen or not hasattr(layer, "weights"):
            continue
        seen.add(id(layer))
        calls = reading.calls.get(id(layer), [])
        yield Layer(
            reading.name(layer),
            type(layer).__name__,
            tuple(calls[0].outputs[0].shape) if calls else None,
            _macs(layer, calls),
            sum(math.prod(each.shape) for each in layer.weights),
            sum(each.numpy().nbytes for each in layer.weights),
        )


# At each position of the output, one multiply-add for each number of a kernel.
_CONVOLUTIONS = {
    *(f"{kind}Conv{rank}D" for kind in ("", "Separable", "Depthwise") for rank in (1, 2, 3)),
    "FusedSeparableConv2D",
}
# The same at each position of the input.
_TRANSPOSED = {f"Conv{rank}DTranspose" for rank in (1, 2, 3)}


def _macs(layer: Any, calls: list[Any]) -> int | None:
    kind, total = type(layer).__name__, 0
    kernels = sum(math.prod(each.shape) for each in layer.weights if len(each.shape) > 1)
    for call in calls:
        if kind in _TRANSPOSED:
            shape = call.inputs[0].shape
        elif kind in _CONVOLUTIONS or kind == "Dense":
            shape = call.outputs[0].shape
        else:
            return None
        axis = 1 if getattr(layer, "data_format", "").endswith("first") else len(shape) - 1
        positions = [size for place, size in enumerate(shape) if place not in (0, axis)]
        if None in positions:
            return None
        total += math.prod(positions) * kernels
    return total if calls else None
