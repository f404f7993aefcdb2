"""Copies of Keras models, with other layers in some places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from sepconv.models.keras_graph import has_graph, inner_layers

__all__ = ["Rebuilding"]


class _Sequence(NamedTuple):
    """Layers that are called one after the other in the place of one; none hands the input on."""

    members: list[Any]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if not self.members:
            return arguments[0]
        outputs = self.members[0](*arguments, **keywords)
        for member in self.members[1:]:
            outputs = member(outputs)
        return outputs


class Rebuilding:
    """Builds a copy of a model.

    Args:
        replacement: What comes in the place of an operation of a graph: layers to call one after
            the other, or `None` for a copy of it. Whoever makes them sets their weights.
        held_class: What layers become that the code of another layer calls.
        accepts: Whether such a layer becomes one.
    """

    def __init__(
        self,
        replacement: Callable[[Any], list[Any] | None],
        held_class: type,
        accepts: Callable[[Any], bool],
    ) -> None:
        self._replacement = replacement
        self._held_class = held_class
        self._accepts = accepts
        self._done: dict[int, _Sequence] = {}
        self._replaced: set[int] = set()
        self._copies: list[tuple[Any, Any]] = []
        """Every layer or model with its copy, outer ones before those inside."""
        self.changed: list[Any] = []
        """Layers of the original whose copies are of the other class."""
        self.notes: list[str] = []

    def model(self, model: keras.Model, inputs: Any) -> keras.Model:
        """Returns the copy.

        Args:
            model: A built model.
            inputs: What to build the copy on if the model is no graph; `None` for the shapes that
                the model knows.

        Raises:
            ValueError: it cannot be made again from its config.
        """
        if has_graph(model):
            new = self._of(model).members[0]
        else:
            new = _copy(model)
            _build(model, new, inputs)
            self._copies.append((model, new))
        for old, copy in self._copies:
            # A model sets what is inside, so the layers inside come after it.
            copy.trainable = old.trainable
            # What stands in the place of another layer gets its weights from who made it.
            if not has_graph(old) and id(old) not in self._replaced and type(copy) is type(old):
                self._fill(old, copy)
        return new

    def _of(self, operation: Any) -> _Sequence:
        if id(operation) not in self._done:
            place = len(self._copies)
            members = self._replacement(operation)
            if members is not None:
                self._replaced.add(id(operation))
            else:
                is_graph = has_graph(operation)
                members = [self._with_graph(operation) if is_graph else _copy(operation)]
            self._done[id(operation)] = _Sequence(members)
            if isinstance(operation, keras.Layer):
                self._copies[place:place] = [(operation, each) for each in members]
        return self._done[id(operation)]

    def _with_graph(self, model: Any) -> Any:
        if isinstance(model, keras.Sequential):
            members = [member for layer in model.layers for member in self._of(layer).members]
            (tensor,) = model.inputs
            inputs = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)
            new = keras.Sequential([inputs, *members], name=model.name)
            if model.compiled:
                new.compile_from_config(model.get_compile_config())
        else:
            new = keras.models.clone_model(
                model,
                clone_function=self._of,
                call_function=lambda sequence, *arguments, **keywords: sequence(
                    *arguments, **keywords
                ),
            )
        if type(new) is not type(model):
            self.notes.append(
                f"{model.name} is of the class {type(model).__name__}; its copy is a "
                f"{type(new).__name__} model without the methods of that class"
            )
        return new

    def _fill(self, old: Any, copy: Any) -> None:
        """Gives a layer whose code is its own what the original has."""
        for theirs, mine in zip(old.variables, copy.variables, strict=True):
            # Not the array itself: JAX takes its memory away when one of the models is trained.
            mine.assign(keras.ops.convert_to_numpy(theirs))
        is_changed = False
        for theirs, mine in zip(inner_layers(old), inner_layers(copy), strict=True):
            mine.trainable = theirs.trainable
            if self._accepts(theirs):
                # Both classes have the same state, and differ in what they do with it. The object
                # stays where the code of the layer around it looks for it, shared or in lists.
                mine.__class__ = self._held_class
                self.changed.append(theirs)
                is_changed = True
        if is_changed:
            self.notes.append(
                f"{old.name} makes its layers itself: from a file, it comes back with those that "
                f"the code of {type(old).__name__} makes"
            )


def _copy(layer: Any) -> Any:
    try:
        copy = type(layer).from_config(layer.get_config())
    except Exception as error:
        raise ValueError(
            f"`model` must be made of layers that can be made again from their config. "
            f"Received: {layer.name}, of the class {type(layer).__name__}: {error}"
        ) from error
    if isinstance(layer, keras.Model) and layer.compiled:
        copy.compile_from_config(layer.get_compile_config())
    return copy


def _build(old: Any, new: Any, inputs: Any) -> None:
    if inputs is not None:
        new(inputs)
    else:
        new.build_from_config(old.get_build_config() or {})
    if [v.shape for v in new.weights] != [v.shape for v in old.weights]:
        raise ValueError(
            "`model` must have the same weights when it is built again from its config. "
            f"Received: {old.name}, of the class {type(old).__name__}"
        )
