"""What a file of a model or of weights holds."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from sepconv.models.convert import tensors_of
from sepconv.models.load import holds_model, load
from sepconv.models.tensors import is_moving_average, is_optimizer_slot, read_tensors

__all__ = ["Contents", "Layer", "Variable", "inspect"]


class Layer(NamedTuple):
    """A layer of a model; `None` stands for what the file does not tell."""

    name: str
    kind: str
    output_shape: tuple[int | None, ...] | None
    macs: int | None
    """Multiply-adds an image, of convolutions and dense layers."""
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
    """What a file holds: the layers of its model, if it has one, and its tensors."""

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

    Args:
        path: What `sepconv.load` reads; errors are the same.
    """
    path = Path(path)
    model = load(path) if holds_model(path) else None
    tensors = read_tensors(path) if model is None else tensors_of(model)
    variables = tuple(
        Variable(name, tuple(array.shape), str(array.dtype), array.nbytes, _role(name))
        for name, array in tensors.items()
    )
    layers = () if model is None else tuple(map(_layer, _leaves(model)))
    return Contents(str(path), layers, variables)


def _role(name: str) -> str:
    if is_optimizer_slot(name):
        return "optimizer slot"
    return "moving average" if is_moving_average(name) else "weight"


def _leaves(model: Any) -> list[Any]:
    leaves = []
    for layer in model.layers:
        leaves.extend(_leaves(layer) if getattr(layer, "layers", None) else [layer])
    return leaves


def _layer(layer: Any) -> Layer:
    try:
        shape = tuple(layer.output.shape)
    except (AttributeError, ValueError):  # Lists of outputs, and layers that were never called.
        shape = None
    parameters = sum(math.prod(weight.shape) for weight in layer.weights)
    size = sum(weight.numpy().nbytes for weight in layer.weights)
    return Layer(layer.name, type(layer).__name__, shape, _macs(layer, shape), parameters, size)


def _macs(layer: Any, shape: tuple[int | None, ...] | None) -> int | None:
    # One multiply-add at each output position for each number of a kernel.
    kinds = {"SeparableConv2D", "DepthwiseConv2D", "Conv2D", "Dense"}
    if type(layer).__name__ not in kinds or shape is None:
        return None
    kernels = [weight for weight in layer.weights if len(weight.shape) > 1]
    positions = 1
    if len(shape) == 4:
        spatial = shape[2:] if layer.data_format.endswith("first") else shape[1:3]
        if None in spatial:
            return None
        positions = math.prod(size for size in spatial if size is not None)
    elif len(shape) != 2:
        return None
    return positions * sum(int(math.prod(kernel.shape)) for kernel in kernels)
