"""Variable scopes: names, reuse, and defaults that variables inherit from where they are made."""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from sepconv.tf1 import graphs, initializers
from sepconv.tf1.graphs import DeferredLoss, GraphKeys
from sepconv.tf1.tensors import as_dtype, natural_dtype
from sepconv.tf1.variables import Variable

__all__ = [
    "AUTO_REUSE",
    "VariableScope",
    "get_variable",
    "get_variable_scope",
    "name_scope",
    "no_regularizer",
    "variable_scope",
]


class _ReuseMode(enum.Enum):
    AUTO_REUSE = 1

    def __repr__(self) -> str:
        return "tf.AUTO_REUSE"


AUTO_REUSE = _ReuseMode.AUTO_REUSE
"""Makes a variable that is not there and shares one that is."""

_VALID_SCOPE = re.compile(r"^[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*$")


def no_regularizer(_: Any) -> None:
    """Stands for no regularizer where the scope around has one."""


class VariableScope:
    """Where variables are made: the front of their names, and what they take if told nothing else.

    Made by `variable_scope`; not to be made by hand.

    Attributes:
        name: Full name of the scope; empty for the outermost.
        reuse: `False` or `None`, `True`, or `AUTO_REUSE`.
        initializer: Taken by variables without one.
        regularizer: Taken by variables without one, each time adding a loss to the collection.
        constraint: Taken by `get_variable` without one; not inherited by scopes inside.
        dtype: Taken by `get_variable` without one.
        custom_getter: Called instead of making or finding a variable, or `None`.
        original_name_scope: The name scope that was opened with this scope, with a slash behind it.
    """

    def __init__(
        self,
        reuse: Any,
        name: str = "",
        initializer: Any = None,
        regularizer: Any = None,
        custom_getter: Callable[..., Any] | None = None,
        name_scope: str = "",
        dtype: Any = "float32",
        constraint: Any = None,
    ) -> None:
        self.reuse = reuse
        self.name = name
        self.initializer = initializer
        self.regularizer = regularizer
        self.custom_getter = custom_getter
        self.original_name_scope = name_scope
        self.dtype = dtype
        self.constraint = constraint
        self.partitioner = None

    def __repr__(self) -> str:
        return f"<VariableScope {self.name!r} reuse={self.reuse!r}>"

    def __getstate__(self) -> dict[str, Any]:
        # Getters are mostly local functions, which pickle refuses; a layer that comes back from a
        # pickle has its variables and asks for no more.
        return {**self.__dict__, "custom_getter": None}

    def reuse_variables(self) -> None:
        """Sets `reuse` to `True` from here on."""
        self.reuse = True

    def set_initializer(self, initializer: Any) -> None:
        """Sets `initializer` from here on."""
        self.initializer = initializer

    def set_regularizer(self, regularizer: Any) -> None:
        """Sets `regularizer` from here on."""
        self.regularizer = regularizer

    def set_custom_getter(self, custom_getter: Callable[..., Any] | None) -> None:
        """Sets `custom_getter` from here on."""
        self.custom_getter = custom_getter

    def set_dtype(self, dtype: Any) -> None:
        """Sets `dtype` from here on."""
        self.dtype = dtype

    def set_partitioner(self, partitioner: Any) -> None:
        """Raises: variables are not split here.

        Raises:
            NotImplementedError: `partitioner` is not `None`.
        """
        _refuse_partitioner(partitioner)

    def get_collection(self, name: str) -> list[Any]:
        """Returns the items of a collection whose names start with this scope."""
        return graphs.get_collection(name, f"{self.name}/" if self.name else "")

    def global_variables(self) -> list[Any]:
        """Returns the variables of this scope."""
        return self.get_collection(GraphKeys.GLOBAL_VARIABLES)

    def trainable_variables(self) -> list[Any]:
        """Returns the trainable variables of this scope."""
        return self.get_collection(GraphKeys.TRAINABLE_VARIABLES)

    def get_variable(
        self,
        name: str,
        shape: Any = None,
        dtype: Any = None,
        initializer: Any = None,
        regularizer: Any = None,
        trainable: bool | None = None,
        collections: Sequence[str] | None = None,
        partitioner: Any = None,
        custom_getter: Callable[..., Any] | None = None,
        constraint: Any = None,
        **ignored: Any,
    ) -> Any:
        """Returns the variable `name` of this scope, made or shared as `reuse` says.

        Args and errors: as in the function `get_variable`.
        """
        _refuse_partitioner(partitioner)
        unknown = set(ignored) - _PLACEMENT_KEYWORDS
        if unknown:
            raise TypeError(f"get_variable() got an unexpected keyword argument {min(unknown)!r}")
        getter: Callable[..., Any] = _find_or_make
        for outer in (self.custom_getter, custom_getter):
            if outer is not None:
                if not callable(outer):
                    raise ValueError(
                        f"`custom_getter` must be callable. Received: custom_getter={outer!r}"
                    )
                getter = functools.partial(outer, getter)
        detached = _state().detached
        if detached is not None:
            return detached[f"{self.name}/{name}" if self.name else name]
        regularizer = self.regularizer if regularizer is None else regularizer
        return getter(
            f"{self.name}/{name}" if self.name else name,
            shape=shape,
            dtype=self.dtype if dtype is None else dtype,
            initializer=self.initializer if initializer is None else initializer,
            regularizer=regularizer,
            reuse=self.reuse,
            trainable=trainable,
            collections=collections,
            constraint=self.constraint if constraint is None else constraint,
            **dict.fromkeys(_PLACEMENT_KEYWORDS) | ignored,
        )


_PLACEMENT_KEYWORDS = {
    "aggregation",
    "caching_device",
    "synchronization",
    "use_resource",
    "validate_shape",
}
"""Where and how a variable is stored: getters see them, and they change nothing here."""


def _refuse_partitioner(partitioner: Any) -> None:
    if partitioner is not None:
        raise NotImplementedError(
            "`partitioner` is not supported: variables are not split into parts. "
            f"Received: partitioner={partitioner!r}"
        )


def _find_or_make(
    name: str,
    shape: Any = None,
    dtype: Any = "float32",
    initializer: Any = None,
    regularizer: Any = None,
    reuse: Any = None,
    trainable: bool | None = None,
    collections: Sequence[str] | None = None,
    constraint: Any = None,
    **placement: Any,
) -> Variable:
    """The getter at the bottom of every chain of custom getters."""
    graph = graphs.get_default_graph()
    dtype = as_dtype(dtype)
    found = graph.variables.get(name)
    if found is not None:
        if not reuse:
            raise ValueError(
                f"Variable {name} already exists, disallowed. Did you mean to set reuse=True or "
                "reuse=tf.AUTO_REUSE in VarScope?"
            )
        if shape is not None and tuple(found.shape) != _sizes(shape):
            raise ValueError(
                f"Trying to share variable {name}, but specified shape {_sizes(shape)} and found "
                f"shape {tuple(found.shape)}."
            )
        if found.dtype != dtype:
            raise ValueError(
                f"Trying to share variable {name}, but specified dtype {dtype} and found dtype "
                f"{found.dtype}."
            )
        return found
    if reuse is True:
        raise ValueError(
            f"Variable {name} does not exist, or was not created with tf.get_variable(). Did you "
            "mean to set reuse=tf.AUTO_REUSE in VarScope?"
        )
    if initializer is not None and not callable(initializer):
        if shape is not None:
            raise ValueError(
                f"`shape` of variable {name} must not be given where `initializer` is a value. "
                f"Received: shape={shape}"
            )
        value, shape = initializer, np.shape(initializer)

        def initializer(shape: Any, dtype: Any = None) -> Any:
            return keras.ops.convert_to_tensor(value, dtype=dtype)

    elif shape is None:
        raise ValueError(f"`shape` of variable {name} must be specified. Received: shape=None")
    variable = make_variable(name, shape, dtype, initializer, trainable, constraint, collections)
    graph.variables[name] = variable
    if regularizer is not None:
        add_variable_loss(variable, regularizer)
    return variable


def make_variable(
    name: str,
    shape: Any,
    dtype: Any,
    initializer: Any = None,
    trainable: bool | None = None,
    constraint: Any = None,
    collections: Sequence[str] | None = None,
) -> Variable:
    """Makes a variable and puts it into collections, whether or not its name is taken.

    Args:
        name: Full name.
        shape: Sizes.
        dtype: Element type.
        initializer: A function of `(shape, dtype=...)`, or `None` for Glorot uniform (zeros for
            integers).
        trainable: Whether optimizers may change it; `None` stands for `True`.
        constraint: A function of the variable, or `None`.
        collections: Keys; `None` stands for `GLOBAL_VARIABLES`.
    """
    dtype = as_dtype(dtype)
    default = keras.initializers.GlorotUniform if dtype.is_floating else keras.initializers.Zeros
    variable = Variable.made(
        initializers.for_variable(initializer, name, default),
        name,
        _sizes(shape),
        dtype,
        trainable is None or bool(trainable),
        constraint,
    )
    variable.record(collections)
    return variable


def _sizes(shape: Any) -> tuple[int, ...]:
    return (int(shape),) if isinstance(shape, int) else tuple(int(size) for size in shape)


def add_variable_loss(variable: Any, regularizer: Callable[[Any], Any]) -> DeferredLoss | None:
    """Adds a variable's loss to the collection of the current graph, if one is current.

    Args:
        variable: What the regularizer is called with, at every access to the loss.
        regularizer: A function that returns a loss, or `None` for no loss.

    Returns:
        The loss, or `None`.
    """
    if regularizer(variable) is None:
        return None
    name = getattr(getattr(variable, "op", None), "name", "")
    loss = DeferredLoss(functools.partial(regularizer, variable), f"{name}/Regularizer")
    graph = graphs.graph_mode()
    if graph is not None:
        graph.add_to_collection(GraphKeys.REGULARIZATION_LOSSES, loss)
    return loss


class _State:
    """What one thread knows of the scopes of one graph."""

    def __init__(self) -> None:
        self.current = VariableScope(False)
        self.counts: dict[str, int] = {}
        self.name_scope = ""
        self.detached: dict[str, Variable] | None = None

    def open(self, full_name: str) -> None:
        self.counts[full_name] = self.counts.get(full_name, 0) + 1

    def forget_children(self, full_name: str) -> None:
        for name in self.counts:
            if name.startswith(f"{full_name}/"):
                self.counts[name] = 0

    def free_name(self, base: str) -> str:
        """Returns `base`, `base_1`, ...: the first that was not opened in the current scope."""
        front = f"{self.current.name}/" if self.current.name else ""
        name, number = base, 0
        while self.counts.get(front + name, 0):
            number += 1
            name = f"{base}_{number}"
        return name


def _state() -> _State:
    local = graphs.get_default_graph().scope_state
    if not hasattr(local, "state"):
        local.state = _State()
    state: _State = local.state
    return state


def get_variable_scope() -> VariableScope:
    """Returns the scope that is open here, of the current graph and thread."""
    return _state().current


class variable_scope:
    """Opens a variable scope.

    Opened by text it is a child of the scope that is open; opened by a scope object it is that
    scope, wherever we are. Without a name, `default_name` is made unique among the children of the
    scope that is open. When a scope is left, the names of its children are forgotten: opened again,
    it gives the same names again.

    Args:
        name_or_scope: Text, a scope object, or `None`.
        default_name: Used, made unique, where `name_or_scope` is `None`.
        values: Not used.
        initializer: Taken by variables inside that name none.
        regularizer: Taken by variables inside that name none.
        caching_device: Not used.
        partitioner: Must be `None`: variables are not split here.
        custom_getter: Called as `custom_getter(getter, name, **keywords)` for every variable
            inside.
        reuse: `None` and `False` inherit; `True` shares variables that exist and refuses others;
            `AUTO_REUSE` shares those that exist and makes others.
        dtype: Taken by `get_variable` inside; the layer takes that of its input.
        use_resource: Not used.
        constraint: Taken by `get_variable` in this very scope; the layer has its own.
        auxiliary_name_scope: Whether to open a name scope too.

    Raises:
        TypeError: neither a name nor a default name is given, or the name is no text.
        ValueError: `reuse` is none of the above, or is given without a name; the name has
            characters that scopes must not have.
        NotImplementedError: `partitioner` is given.

    Example:
        >>> import sepconv.tf1 as tf
        >>> with tf.Graph().as_default():
        ...     with tf.variable_scope("net"):
        ...         made = tf.get_variable("v", [2])
        ...     with tf.variable_scope("net", reuse=True):
        ...         shared = tf.get_variable("v", [2])
        ...     made is shared, made.name
        (True, 'net/v:0')
    """

    def __init__(
        self,
        name_or_scope: str | VariableScope | None,
        default_name: str | None = None,
        values: Any = None,
        initializer: Any = None,
        regularizer: Any = None,
        caching_device: Any = None,
        partitioner: Any = None,
        custom_getter: Callable[..., Any] | None = None,
        reuse: Any = None,
        dtype: Any = None,
        use_resource: Any = None,
        constraint: Any = None,
        auxiliary_name_scope: bool = True,
    ) -> None:
        if name_or_scope is None and default_name is None:
            raise TypeError("`name_or_scope` is required where `default_name` is None")
        _refuse_partitioner(partitioner)
        self._reuse = check_reuse(reuse)
        self._name_or_scope = name_or_scope
        self._default_name = default_name
        self._own: dict[str, Any] = {
            "initializer": initializer,
            "regularizer": regularizer,
            "dtype": dtype,
        }
        self._custom_getter = custom_getter
        self._constraint = constraint
        self._auxiliary_name_scope = auxiliary_name_scope
        self._exits: list[contextlib.ExitStack] = []

    def __enter__(self) -> VariableScope:
        state = _state()
        with contextlib.ExitStack() as stack:
            if isinstance(self._name_or_scope, VariableScope):
                scope = self._enter_object(state, stack, self._name_or_scope)
            else:
                scope = self._enter_text(state, stack)
            self._exits.append(stack.pop_all())
        return scope

    def __exit__(self, *error: Any) -> None:
        self._exits.pop().__exit__(*error)

    def _enter_object(
        self, state: _State, stack: contextlib.ExitStack, origin: VariableScope
    ) -> VariableScope:
        if self._auxiliary_name_scope and origin.name:
            stack.enter_context(name_scope(origin.name.rpartition("/")[2]))
        scope = self._derived(origin, origin.name, origin.original_name_scope)
        state.open(origin.name)
        counts = dict(state.counts)
        stack.callback(setattr, state, "counts", counts)
        self._make_current(state, stack, scope)
        return scope

    def _enter_text(self, state: _State, stack: contextlib.ExitStack) -> VariableScope:
        name = self._name_or_scope
        if name is None:
            if self._reuse:
                raise ValueError("reuse=True cannot be used without a name_or_scope")
            name = self._default_name
        if not isinstance(name, str):
            raise TypeError(
                f"`name_or_scope` must be text or a VariableScope. Received: name_or_scope={name!r}"
            )
        parent = state.current
        _check_scope_name(parent.name, name)
        opened_names = f"{parent.original_name_scope}{name}/"
        if self._auxiliary_name_scope and name:
            opened_names = stack.enter_context(name_scope(name))
        if self._name_or_scope is None:
            # A context that is entered again keeps the name that it was given first.
            name = self._name_or_scope = state.free_name(name)
        scope = self._derived(
            parent, f"{parent.name}/{name}" if parent.name else name, opened_names
        )
        state.open(scope.name)
        stack.callback(state.forget_children, scope.name)
        self._make_current(state, stack, scope)
        return scope

    def _derived(self, origin: VariableScope, name: str, names: str) -> VariableScope:
        scope = copy.copy(origin)
        # The copy protocol goes through __getstate__, which leaves the getter out.
        scope.custom_getter = origin.custom_getter
        scope.name = name
        scope.original_name_scope = names
        scope.reuse = self._reuse or origin.reuse
        scope.constraint = self._constraint
        for attribute, value in self._own.items():
            if value is not None:
                setattr(scope, attribute, value)
        if self._custom_getter is not None:
            scope.custom_getter = _chained(self._custom_getter, origin.custom_getter)
        return scope

    @staticmethod
    def _make_current(state: _State, stack: contextlib.ExitStack, scope: VariableScope) -> None:
        stack.callback(setattr, state, "current", state.current)
        state.current = scope


def check_reuse(reuse: Any) -> Any:
    """Returns a `reuse` argument with `None` for `False`.

    Args:
        reuse: `None`, `False`, `True` or `AUTO_REUSE`.

    Raises:
        ValueError: it is none of these.
    """
    if reuse is None or reuse is False:
        return None
    if reuse is True or reuse is AUTO_REUSE:
        return reuse
    raise ValueError(
        f"The reuse parameter must be True, False, None or tf.AUTO_REUSE. Received: reuse={reuse!r}"
    )


def _chained(inner: Callable[..., Any], outer: Callable[..., Any] | None) -> Callable[..., Any]:
    if outer is None:
        return inner

    def chained(getter: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return inner(functools.partial(outer, getter), *args, **kwargs)

    return chained


def _check_scope_name(parent: str, name: str) -> None:
    if name and not _VALID_SCOPE.match(f"{parent}/{name}" if parent else name):
        kind = "scope name" if parent else "root scope name"
        raise ValueError(f"{name!r} is not a valid {kind}: it must match {_VALID_SCOPE.pattern}")


def get_variable(
    name: str,
    shape: Any = None,
    dtype: Any = None,
    initializer: Any = None,
    regularizer: Any = None,
    trainable: bool | None = None,
    collections: Sequence[str] | None = None,
    caching_device: Any = None,
    partitioner: Any = None,
    validate_shape: bool = True,
    use_resource: Any = None,
    custom_getter: Callable[..., Any] | None = None,
    constraint: Any = None,
    synchronization: Any = None,
    aggregation: Any = None,
) -> Any:
    """Returns the variable `name` of the open variable scope, made or shared as its `reuse` says.

    Args:
        name: Last part of the name.
        shape: Sizes. Not to be given where `initializer` is a value.
        dtype: Element type; `None` stands for that of the scope, float32 unless set.
        initializer: A function of `(shape, dtype=...)`, a value, or `None` for that of the scope,
            else Glorot uniform (zeros for integers).
        regularizer: Called with a variable that this call makes; its result goes to the collection
            `REGULARIZATION_LOSSES`.
        trainable: Whether optimizers may change it; `None` stands for `True`.
        collections: Keys of the collections to put it in; `None` stands for `GLOBAL_VARIABLES`.
        caching_device: Not used.
        partitioner: Must be `None`.
        validate_shape: Not used.
        use_resource: Not used.
        custom_getter: As in `variable_scope`, for this variable.
        constraint: A function of the variable that returns its projected value.
        synchronization: Not used.
        aggregation: Not used.

    Returns:
        A `Variable`, or what a custom getter returns.

    Raises:
        ValueError: the variable exists and must not, or must and does not, or has another shape or
            element type.

    Example:
        >>> import sepconv.tf1 as tf
        >>> with tf.Graph().as_default(), tf.variable_scope("net"):
        ...     tf.get_variable("v", [2], initializer=tf.ones_initializer()).numpy().tolist()
        [1.0, 1.0]
    """
    if dtype is None and initializer is not None and not callable(initializer):
        dtype = natural_dtype(initializer)
    return get_variable_scope().get_variable(
        name,
        shape,
        dtype,
        initializer,
        regularizer,
        trainable,
        collections,
        partitioner,
        custom_getter,
        constraint,
        caching_device=caching_device,
        validate_shape=validate_shape,
        use_resource=use_resource,
        synchronization=synchronization,
        aggregation=aggregation,
    )


class name_scope:
    """Opens a name scope: the front of the names of operations, not of variables.

    Args:
        name: Text, made unique; `None` for `default_name`; empty to go back to the outermost.
        default_name: Used where `name` is `None`.
        values: Not used.

    Returns:
        On entering, the full name with a slash behind it.

    Example:
        >>> import sepconv.tf1 as tf
        >>> with tf.Graph().as_default(), tf.name_scope("tower") as scope:
        ...     scope, tf.get_variable("v", [1]).name
        ('tower/', 'v:0')
    """

    def __init__(
        self, name: str | None, default_name: str | None = None, values: Any = None
    ) -> None:
        self.name = default_name if name is None else name
        self._before: list[str] = []

    def __enter__(self) -> str:
        state = _state()
        self._before.append(state.name_scope)
        if not self.name:
            state.name_scope = ""
        elif self.name.endswith("/"):
            state.name_scope = self.name
        else:
            graph = graphs.get_default_graph()
            state.name_scope = graph.unique_name(state.name_scope + self.name) + "/"
        return state.name_scope

    def __exit__(self, *error: Any) -> None:
        _state().name_scope = self._before.pop()


@contextlib.contextmanager
def detached(variables: dict[str, Variable]) -> Iterator[None]:
    """Not a scope of legacy code: inside it, variables are found among the given ones only.

    Copies of a layer have variables of the same names, and a graph has each name once.

    Args:
        variables: By full name.
    """
    state = _state()
    before, state.detached = state.detached, variables
    try:
        yield
    finally:
        state.detached = before
