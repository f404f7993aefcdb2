"""Fused layers in place of stock ones, in a copy of a model that exists, and back."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from sepconv.models.exclusion import Exclusion
from sepconv.models.report import Report

__all__ = ["Fused", "fuse", "to_stock"]


class Fused(NamedTuple):
    """What `fuse` returns: `model, report = sepconv.fuse(...)`."""

    model: Any
    """The new model; the original is as it was, and shares nothing with it."""
    report: Report
    """What was swapped, what was not and why, and the differences."""


def fuse(
    model: Any,
    *,
    inference: bool = False,
    inputs: Any = None,
    exclude: Any = (),
    tolerance: float | None = None,
) -> Fused:
    """Returns a copy of a model with fused layers in place of separable convolutions.

    In Keras models, stock `SeparableConv2D` layers, and pairs of `DepthwiseConv2D` and a `Conv2D`
    of 1x1 pixels, become layers of ours. In torch models, pairs of a `Conv2d` with as many groups
    as channels and a `Conv2d` of 1x1 pixels do. Both models are called, and what they give is
    compared.

    Args:
        model: A built `keras.Model`, or a `torch.nn.Module`.
        inference: Whether to fold batch norms, activations and paddings around and between the
            stages into them. The new model is for inference: a torch model is in eval mode.
        inputs: What to call the models on: one batch as the model takes it, for torch a tensor or
            the tuple of arguments. `None` stands for seeded random numbers.
        exclude: What has to stay as it is: names, layers or modules, or a function of a layer;
            one, or several in a list. The name of a model holds for what is in it.
        tolerance: Largest ratio of a difference to the largest value of the output, of a layer and
            of the model. `None` stands for the square root of the spacing of the numbers, 0.00035
            in float32; `float("inf")` for no check.

    Returns:
        The new model and the report.

    Raises:
        TypeError: `model` is of neither framework.
        ValueError: outputs differ by more than the tolerance; `exclude` names nothing in the model;
            or the model cannot be copied.

    Example:
        >>> import keras
        >>> net = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.SeparableConv2D(4, 3)])
        >>> model, report = fuse(net)
        >>> len(report.swapped), type(model.layers[0]).__module__
        (1, 'sepconv.keras')
    """
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"`tolerance` must be non-negative. Received: tolerance={tolerance!r}")
    framework = _framework_of(model)
    new, report = framework.fuse(
        model,
        inference=bool(inference),
        inputs=inputs,
        excluded=Exclusion(exclude),
        tolerance=tolerance,
    )
    report.check()
    return Fused(new, report)


def to_stock(model: Any) -> Any:
    """Returns a copy of a model with the layers of its framework in place of ours.

    Folded batch norms stay folded. Where a pair was swapped, the pair comes back, under its names.

    Args:
        model: A built `keras.Model`, or a `torch.nn.Module`.

    Returns:
        The new model. It computes the same, and needs sepconv no more.

    Raises:
        TypeError: `model` is of neither framework.
        ValueError: the model cannot be copied.

    Example:
        >>> import keras
        >>> from sepconv.keras import SeparableConv2D
        >>> net = keras.Sequential([keras.Input((8, 8, 3)), SeparableConv2D(4, 3)])
        >>> type(to_stock(net).layers[0]) is keras.layers.SeparableConv2D
        True
    """
    return _framework_of(model).to_stock(model)


def _framework_of(model: Any) -> Any:
    # A model brings its framework along, so nothing is imported that is not there already.
    # On the torch backend, a model of Keras is a module of torch as well.
    if "keras" in sys.modules and isinstance(model, sys.modules["keras"].Layer):
        from sepconv.models import keras_fuse

        return keras_fuse
    if "torch" in sys.modules and isinstance(model, sys.modules["torch"].nn.Module):
        from sepconv.models import torch_fuse

        return torch_fuse
    raise TypeError(
        f"`model` must be a keras.Model or a torch.nn.Module. Received: type(model)={type(model)}"
    )
