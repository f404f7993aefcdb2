"""Named tensors as the weights of a Keras model, whoever named them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy.typing as npt

from sepconv.models.keras_graph import Reading, inner_layers

__all__ = ["assign"]

Array = npt.NDArray[Any]

# What others call the weights of layers, by what Keras 3 calls them.
_SYNONYMS = {
    "kernel": ("kernel", "weights", "depthwise_kernel", "depthwise_weights"),
    "depthwise_kernel": ("depthwise_kernel", "depthwise_weights"),
    "pointwise_kernel": ("pointwise_kernel", "pointwise_weights"),
    "bias": ("bias", "biases"),
}


def assign(model: keras.Model, tensors: Mapping[str, Array]) -> dict[str, str]:
    """Gives the weights of a model the values of tensors, by their names.

    A tensor `scope/word` belongs to the weight `word` of the layer in the same scope. Words are
    those of Keras, `tf.layers` and slim. One scope may have more in front than the other: the layer
    `block1/sep` takes `Net/block1/sep/depthwise_weights`.

    Args:
        model: A built model.
        tensors: By name, in the layouts of Keras, without the state of an optimizer.

    Returns:
        The names of the tensors, by those of the weights.

    Raises:
        ValueError: a weight has no tensor, or several, or one of another shape; or two weights have
            the same tensor. The model is as it was.

    Example:
        >>> import numpy as np
        >>> net = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(2, 1, name="c")])
        >>> tensors = {"Net/c/weights": np.ones((1, 1, 1, 2)), "Net/c/biases": np.ones(2)}
        >>> assign(net, tensors)
        {'c/kernel': 'Net/c/weights', 'c/bias': 'Net/c/biases'}
    """
    by_word: dict[str, list[tuple[list[str], str]]] = {}
    for name in tensors:
        *scope, word = name.removesuffix(":0").split("/")
        by_word.setdefault(word, []).append((scope, name))
    reading = Reading(model)
    # A layer comes before those inside of it. The path of a weight may begin with its model.
    owners = {id(each): layer for layer in inner_layers(model) for each in layer.weights}
    chosen: dict[str, str] = {}
    found_for: list[tuple[Any, str]] = []
    for variable in model.weights:
        layer = reading.name(owners[id(variable)])
        scope, word = layer.split("/"), variable.name
        weight = f"{layer}/{word}"
        # Scopes that fit in full come before those that fit from their end.
        fits = [
            (found == scope, name)
            for synonym in _SYNONYMS.get(word, (word,))
            for found, name in by_word.get(synonym, [])
            if _is_end(found, scope) or _is_end(scope, found)
        ]
        names = [name for is_full, name in fits if is_full] or [name for _, name in fits]
        if len(names) != 1:
            raise ValueError(
                f"`tensors` must have one for the weight {weight!r}. Received: {names or 'none'}"
            )
        (name,) = names
        if tuple(tensors[name].shape) != tuple(variable.shape):
            raise ValueError(
                f"`tensors` must have the shapes of the weights, {tuple(variable.shape)} for "
                f"{weight!r}. Received: {name!r} of {tensors[name].shape}"
            )
        if name in chosen.values():
            raise ValueError(
                f"`tensors` must have one for each weight. Received: {name!r}, which {weight!r} "
                "and another one would take"
            )
        chosen[weight] = name
        found_for.append((variable, name))
    for variable, name in found_for:
        variable.assign(tensors[name])
    return chosen


def _is_end(end: list[str], whole: list[str]) -> bool:
    return not end or whole[-len(end) :] == end
