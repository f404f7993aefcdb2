"""Graphs as legacy code uses them: containers of variables, names and collections.

Nothing is recorded and nothing is run later: a layer called while a graph is current computes at
once. A graph holds variables by full name, collections by key, and the counters that make names
unique. Outside every graph there is one such container per process; `disable_eager_execution` makes
it current.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sepconv.tf1.variables import Variable

__all__ = [
    "Graph",
    "GraphKeys",
    "add_to_collection",
    "add_to_collections",
    "disable_eager_execution",
    "disable_v2_behavior",
    "enable_eager_execution",
    "enable_v2_behavior",
    "executing_eagerly",
    "get_collection",
    "get_collection_ref",
    "get_default_graph",
    "global_variables",
    "local_variables",
    "model_variables",
    "reset_default_graph",
    "set_random_seed",
    "trainable_variables",
]


class GraphKeys:
    """The keys under which legacy code finds its collections."""

    GLOBAL_VARIABLES = "variables"
    VARIABLES = "variables"
    LOCAL_VARIABLES = "local_variables"
    METRIC_VARIABLES = "metric_variables"
    MODEL_VARIABLES = "model_variables"
    TRAINABLE_VARIABLES = "trainable_variables"
    MOVING_AVERAGE_VARIABLES = "moving_average_variables"
    REGULARIZATION_LOSSES = "regularization_losses"
    LOSSES = "losses"
    UPDATE_OPS = "update_ops"
    SUMMARIES = "summaries"
    ACTIVATIONS = "activations"
    BIASES = "biases"
    WEIGHTS = "weights"
    GLOBAL_STEP = "global_step"
    TRAIN_OP = "train_op"
    EVAL_STEP = "eval_step"


class DeferredLoss:
    """A loss that collections and layers hold as its formula: every access computes it anew.

    A tensor computed when a variable was made would neither follow the variable nor have a
    gradient.

    Args:
        compute: A function of no arguments that returns the loss.
        name: What a collection look-up by scope compares.
    """

    def __init__(self, compute: Callable[[], Any], name: str = "") -> None:
        self.compute = compute
        self.name = name


class CallLoss:
    """A loss of one computation, as collections hold it: inside a step it is out of date.

    Args:
        value: A tensor.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self.name = ""


class Graph:
    """A container of variables, collections and names.

    Example:
        >>> import sepconv.tf1 as tf
        >>> with tf.Graph().as_default() as graph:
        ...     graph.add_to_collection("endpoints", "logits")
        ...     tf.get_collection("endpoints")
        ['logits']
    """

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.label = f"graph {next(self._numbers)}"
        self.variables: dict[str, Variable] = {}
        self._collections: dict[str, list[Any]] = {}
        self._layer_counts: dict[str, int] = {}
        self._op_counts: dict[str, int] = {}
        self._seed: int | None = None
        self._draws = 0
        self._step: list[tuple[str, Any, Callable[[], None]]] | None = None
        self.scope_state = threading.local()

    def __repr__(self) -> str:
        return f"<sepconv.tf1.Graph {self.label}: {len(self.variables)} variables>"

    def as_default(self) -> contextlib.AbstractContextManager[Graph]:
        """Returns a context in which this graph is the current one."""
        return self._as_default()

    @contextlib.contextmanager
    def _as_default(self) -> Iterator[Graph]:
        stack = _stack()
        stack.append(self)
        try:
            yield self
        finally:
            stack.pop()

    # Collections.

    def add_to_collection(self, name: str, value: Any) -> None:
        """Appends `value` to the collection `name`.

        Args:
            name: Key of the collection; made if it is not there.
            value: Anything.
        """
        self._collections.setdefault(name, []).append(value)

    def add_to_collections(self, names: Any, value: Any) -> None:
        """Appends `value` to every collection in `names`, once each.

        Args:
            names: A key, or several.
            value: Anything.
        """
        for name in dict.fromkeys((names,) if isinstance(names, str) else names):
            self.add_to_collection(name, value)

    def get_collection(self, name: str, scope: str | None = None) -> list[Any]:
        """Returns a new list of what a collection holds.

        Losses of variables are computed by this call, from the values that the variables have now.

        Args:
            name: Key of the collection. One that does not exist is empty.
            scope: If given, only items whose name it matches at the front, as a regular expression;
                items without a name are left out.

        Returns:
            The items, in the order in which they were added.
        """
        items = list(self._collections.get(name, ()))
        if self._step is not None:
            items = [item for item in items if not isinstance(item, CallLoss)]
            items += [loss for key, loss, _ in self._step if key == name]
        if scope:
            matches = re.compile(scope).match
            items = [item for item in items if matches(getattr(item, "name", None) or "")]
        return [_seen(item) for item in items]

    def get_collection_ref(self, name: str) -> list[Any]:
        """Returns the list itself: changing it changes the collection.

        Args:
            name: Key of the collection; made if it is not there.
        """
        return self._collections.setdefault(name, [])

    def clear_collection(self, name: str) -> None:
        """Empties a collection.

        Args:
            name: Key of the collection.
        """
        self._collections.pop(name, None)

    def get_all_collection_keys(self) -> list[str]:
        """Returns the keys of all collections."""
        return list(self._collections)

    @property
    def collections(self) -> list[str]:
        """The keys of all collections."""
        return self.get_all_collection_keys()

    # Names.

    def unique_layer_name(self, base: str) -> str:
        """Returns `base_1`, `base_2`, ...: names of layers that were given none.

        Args:
            base: Class name in snake case.
        """
        self._layer_counts[base] = self._layer_counts.get(base, 0) + 1
        return f"{base}_{self._layer_counts[base]}"

    @contextlib.contextmanager
    def layer_names_kept(self) -> Iterator[None]:
        """Forgets the layer names that are made up inside it: a copy's name is its original's."""
        counts = dict(self._layer_counts)
        try:
            yield
        finally:
            self._layer_counts = counts

    def unique_name(self, name: str, mark_as_used: bool = True) -> str:
        """Returns a name for an operation or a name scope: `name`, `name_1`, ...

        Args:
            name: What to start from.
            mark_as_used: Whether the name is gone afterwards.
        """
        counts = self._op_counts
        count = counts.get(name.lower(), 0)
        unique = name
        while unique.lower() in counts:
            unique = f"{name}_{count}"
            count += 1
        if mark_as_used:
            counts[name.lower()] = counts.get(name.lower(), 0) + 1
            counts.setdefault(unique.lower(), 1)
        return unique

    # Seeds.

    @property
    def seed(self) -> int | None:
        """What `set_random_seed` set while this graph was current."""
        return self._seed

    def set_seed(self, seed: int | None) -> None:
        """Makes the initial values of the variables that follow repeatable.

        Args:
            seed: A non-negative integer, or `None` for the seed of the process.
        """
        self._seed = seed
        self._draws = 0

    def next_seed(self) -> int:
        """Returns a seed for one variable, drawn from the graph's seed.

        Without one it comes from Python's generator, which `keras.utils.set_random_seed` seeds.
        """
        if self._seed is None:
            return random.randint(1, 2**30)
        self._draws += 1
        return int(np.random.SeedSequence([abs(self._seed), self._draws]).generate_state(1)[0] >> 2)

    # All or nothing.

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Takes back the variables and collection entries made inside it if an error leaves it."""
        names = set(self.variables)
        lengths = {key: len(items) for key, items in self._collections.items()}
        try:
            yield
        except BaseException:
            for name in set(self.variables) - names:
                del self.variables[name]
            for key, items in self._collections.items():
                del items[lengths.get(key, 0) :]
            raise

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Keeps the losses of calls made inside it only until its end.

        A training step calls the layers again, and each call has its own activity losses: without a
        step around it they would pile up in the collections. Losses of calls before the step are
        not seen inside it. The numbers in names of operations go back at its end, too.
        """
        before, self._step = self._step, []
        counts = dict(self._op_counts)
        try:
            yield
        finally:
            self._op_counts = counts
            for _, _, forget in self._step:
                forget()
            self._step = before

    @property
    def in_step(self) -> bool:
        """Whether a `step` is open."""
        return self._step is not None

    def add_call_loss(
        self, name: str, loss: Any, forget: Callable[[], None] = lambda: None
    ) -> None:
        """Adds a loss that one computation made to a collection, until the end of the step.

        Args:
            name: Key of the collection.
            loss: A tensor.
            forget: Called at the end of the step that is open, if one is.
        """
        if self._step is not None:
            self._step.append((name, loss, forget))
        else:
            self.add_to_collection(name, CallLoss(loss))


def _seen(item: Any) -> Any:
    """What legacy code sees of an item of a collection."""
    if isinstance(item, DeferredLoss):
        return item.compute()
    return item.value if isinstance(item, CallLoss) else item


class _Process:
    """What exists once per process: the container outside every graph, and its mode."""

    graph = Graph()
    eager = True


_local = threading.local()


def _stack() -> list[Graph]:
    if not hasattr(_local, "stack"):
        _local.stack = []
    stack: list[Graph] = _local.stack
    return stack


def get_default_graph() -> Graph:
    """Returns the current graph; outside every graph, the container of the process."""
    stack = _stack()
    return stack[-1] if stack else _Process.graph


def executing_eagerly() -> bool:
    """Returns whether no graph is current."""
    return _Process.eager and not _stack()


def graph_mode() -> Graph | None:
    """Returns the graph that is current, or `None` if none is."""
    return None if executing_eagerly() else get_default_graph()


def reset_default_graph() -> None:
    """Replaces the container of the process by an empty one.

    Raises:
        AssertionError: inside a `Graph.as_default` context.
    """
    if _stack():
        raise AssertionError(
            "`reset_default_graph` must not be called inside a graph. Make a new one with "
            "`with tf.Graph().as_default():` instead."
        )
    _Process.graph = Graph()


def disable_eager_execution() -> None:
    """Makes the container of the process a current graph, for every thread that has no other."""
    _Process.eager = False


def enable_eager_execution() -> None:
    """Undoes `disable_eager_execution`."""
    _Process.eager = True


def disable_v2_behavior() -> None:
    """Does what `disable_eager_execution` does."""
    disable_eager_execution()


def enable_v2_behavior() -> None:
    """Does what `enable_eager_execution` does."""
    enable_eager_execution()


def set_random_seed(seed: int | None) -> None:
    """Makes the initial values of the variables that follow in the current graph repeatable.

    Args:
        seed: A non-negative integer, or `None` for the seed of the process.

    Example:
        >>> import sepconv.tf1 as tf
        >>> def first_value():
        ...     with tf.Graph().as_default():
        ...         tf.set_random_seed(7)
        ...         return tf.get_variable("v", []).numpy()
        >>> bool(first_value() == first_value())
        True
    """
    get_default_graph().set_seed(seed)


def add_to_collection(name: str, value: Any) -> None:
    """Appends to a collection of the current graph: `Graph.add_to_collection`."""
    get_default_graph().add_to_collection(name, value)


def add_to_collections(names: Any, value: Any) -> None:
    """Appends to several collections of the current graph: `Graph.add_to_collections`."""
    get_default_graph().add_to_collections(names, value)


def get_collection(key: str, scope: str | None = None) -> list[Any]:
    """Returns a collection of the current graph: `Graph.get_collection`."""
    return get_default_graph().get_collection(key, scope)


def get_collection_ref(key: str) -> list[Any]:
    """Returns the list behind a collection of the current graph: `Graph.get_collection_ref`."""
    return get_default_graph().get_collection_ref(key)


def global_variables(scope: str | None = None) -> list[Any]:
    """Returns the variables made in the current graph, in order.

    Args:
        scope: If given, only those whose name it matches at the front, as a regular expression.
    """
    return get_collection(GraphKeys.GLOBAL_VARIABLES, scope)


def trainable_variables(scope: str | None = None) -> list[Any]:
    """Returns the trainable variables made in the current graph, in order.

    Args:
        scope: If given, only those whose name it matches at the front, as a regular expression.
    """
    return get_collection(GraphKeys.TRAINABLE_VARIABLES, scope)


def local_variables(scope: str | None = None) -> list[Any]:
    """Returns the collection `LOCAL_VARIABLES`, to which nothing adds by itself."""
    return get_collection(GraphKeys.LOCAL_VARIABLES, scope)


def model_variables(scope: str | None = None) -> list[Any]:
    """Returns the collection `MODEL_VARIABLES`, to which nothing adds by itself."""
    return get_collection(GraphKeys.MODEL_VARIABLES, scope)
