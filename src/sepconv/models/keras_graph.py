"""A Keras model as graphs of calls.

A model is read as a set of graphs: its own, and those of the functional and sequential models in
it. A graph is a list of calls. What is said of an operation holds for all its calls in all graphs,
so a layer that several places share is swapped in all of them or in none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras

__all__ = ["Call", "Graph", "Reading", "has_graph", "inner_layers"]


class Call(NamedTuple):
    """One call of an operation in a graph; tensors by identity."""

    operation: Any
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    arguments: Any
    """As Keras keeps them: `args`, `kwargs`, and `fill_in` for values in place of tensors."""

    @property
    def is_in_training(self) -> bool:
        """Whether the code of the model says so at this call."""
        return self.arguments.kwargs.get("training") not in (None, False)


class Graph(NamedTuple):
    """The calls of a functional or sequential model, each after those whose outputs it takes."""

    model: Any
    calls: list[Call]


def has_graph(model: Any) -> bool:
    """Whether calling a model is nothing but the calls of its graph."""
    if not isinstance(model, keras.Model) or not isinstance(
        model, keras.Sequential | keras.Function
    ):
        return False
    # A class of the user may have a `call` of its own. Some sequential models have no graph.
    return type(model).call.__module__.startswith("keras.") and hasattr(model, "outputs")


class Reading:
    """A model as graphs: who calls whom."""

    def __init__(self, model: keras.Model) -> None:
        if not isinstance(model, keras.Model):
            raise TypeError(f"`model` must be a model of Keras. Received: {type(model)}")
        if not model.built:
            raise ValueError(
                f"`model` must be built, so that its weights exist. Received: {model.name}"
            )
        self.model = model
        self.graphs: list[Graph] = []
        self.names: dict[int, str] = {}
        self.opaque: list[Any] = []
        """Layers that are neither models with graphs nor convolutions of Keras, in order."""
        self.calls: dict[int, list[Call]] = {}
        self.consumers: dict[int, list[Call]] = {}
        self.producers: dict[int, Call] = {}
        self.results: set[int] = set()
        """Tensors that a graph returns."""
        self.in_training: set[int] = set()
        """Operations that a call puts in training mode, whatever the model is called for."""
        self._read(model, "", False)

    def name(self, operation: Any) -> str:
        """Returns the name of an operation, with those of the models around it."""
        return self.names.get(id(operation)) or str(operation.name)

    def operations(self) -> Iterator[Any]:
        """Every operation once, in the order of its first call."""
        seen: set[int] = set()
        for graph in self.graphs:
            for call in graph.calls:
                if id(call.operation) not in seen:
                    seen.add(id(call.operation))
                    yield call.operation

    def follower(self, operation: Any) -> tuple[Any, str]:
        """The one operation that takes all that this one gives, or `None` and why there is none."""
        followers = []
        for call in self.calls[id(operation)]:
            if len(call.outputs) != 1:
                return None, "it has several outputs"
            output = id(call.outputs[0])
            consumers = self.consumers.get(output, [])
            if output in self.results:
                return None, "its output is an output of a model"
            if len(consumers) != 1:
                return None, self._crowd(consumers)
            followers.append(consumers[0])
        operations = {id(call.operation) for call in followers}
        if len(operations) != 1:
            names = ", ".join(sorted({self.name(call.operation) for call in followers}))
            return None, f"its calls are followed by different layers: {names}"
        follower = followers[0].operation
        name = self.name(follower)
        if len(self.calls[id(follower)]) != len(followers):
            return None, f"{name}, which follows, is also called elsewhere"
        if any(len(call.inputs) != 1 for call in followers):
            return None, f"it is followed by {name} ({type(follower).__name__})"
        return follower, ""

    def producer(self, operation: Any) -> Any:
        """The one operation that gives all that this one takes, and gives it to no other."""
        calls = self.calls[id(operation)]
        if len(calls[0].inputs) != 1:
            return None
        first = self.producers.get(id(calls[0].inputs[0]))
        if first is None or self.follower(first.operation)[0] is not operation:
            return None
        return first.operation

    def _crowd(self, consumers: Sequence[Call]) -> str:
        kinds = {type(call.operation).__name__ for call in consumers}
        names = ", ".join(self.name(call.operation) for call in consumers)
        if kinds & {"GlobalAveragePooling2D", "Mean"} and "Multiply" in kinds:
            return f"squeeze-and-excite between the stages: its output goes to {names}"
        return f"its output goes to {len(consumers)} places: {names}"

    def _read(self, model: Any, prefix: str, in_training: bool) -> None:
        if not has_graph(model):
            self._read_opaque(model, prefix)
            return
        graph = Graph(model, _calls_of(model))
        self.graphs.append(graph)
        self.results.update(map(id, model.outputs))
        inner = []
        for call in graph.calls:
            operation = call.operation
            if id(operation) not in self.calls:
                self.names[id(operation)] = prefix + operation.name
                inner.append(operation)
            if in_training or call.is_in_training:
                self.in_training.add(id(operation))
            self.calls.setdefault(id(operation), []).append(call)
            for tensor in call.inputs:
                self.consumers.setdefault(id(tensor), []).append(call)
            for tensor in call.outputs:
                self.producers[id(tensor)] = call
        for operation in inner:
            if isinstance(operation, keras.Layer) and not _is_leaf(operation):
                self._read(
                    operation, f"{prefix}{operation.name}/", id(operation) in self.in_training
                )

    def _read_opaque(self, layer: Any, prefix: str) -> None:
        self.opaque.append(layer)
        for inner in inner_layers(layer):
            self.names.setdefault(id(inner), prefix + inner.name)


def _calls_of(model: Any) -> list[Call]:
    """The calls between inputs and outputs of a model, in order."""
    inputs = {id(tensor) for tensor in model.inputs}
    calls: list[Call] = []
    done: set[int] = set()
    # Depth first, without recursion: networks are deeper than Python's stack.
    stack = [(tensor, False) for tensor in reversed(model.outputs)]
    while stack:
        tensor, is_ready = stack.pop()
        operation, index, _ = tensor._keras_history
        if id(tensor) in inputs or operation is None:
            continue
        node = operation._inbound_nodes[index]
        if id(node) in done:
            continue
        if not is_ready:
            stack.append((tensor, True))
            stack.extend((each, False) for each in reversed(node.input_tensors))
            continue
        done.add(id(node))
        if node.input_tensors:
            calls.append(
                Call(
                    operation,
                    tuple(node.input_tensors),
                    tuple(node.outputs),
                    node.arguments,
                )
            )
    return calls


def inner_layers(layer: Any) -> list[Any]:
    """The layers inside of a layer, at any depth, in the order in which it tracks them."""
    return list(layer._flatten_layers(include_self=False, recursive=True))


def _is_leaf(layer: Any) -> bool:
    return not has_graph(layer) and not inner_layers(layer)
