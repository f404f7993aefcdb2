"""`tf.layers.Layer`: a Keras layer with names, scopes, losses and dtypes as in legacy code."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from sepconv.tf1 import arguments, copying, graphs, scopes
from sepconv.tf1.graphs import DeferredLoss, GraphKeys
from sepconv.tf1.scopes import VariableScope, variable_scope
from sepconv.tf1.tensors import TensorSpec, allow_float64
from sepconv.tf1.variables import Variable

__all__ = ["Layer", "LegacyWarning", "keras_style_scope", "set_keras_style"]


class LegacyWarning(UserWarning, DeprecationWarning):
    """Warns of something that the original deprecates."""


class _KerasStyle:
    """Whether layers made now leave variable scopes alone, for the whole process."""

    on = False


@contextlib.contextmanager
def keras_style_scope() -> Iterator[None]:
    """Layers made inside never share variables and take no part in variable scopes.

    Their `scope_name` stays unavailable, and `_scope`, `_reuse` and `scope=` are refused.
    """
    before, _KerasStyle.on = _KerasStyle.on, True
    try:
        yield
    finally:
        _KerasStyle.on = before


def set_keras_style() -> None:
    """Does what `keras_style_scope` does, from here to the end of the process."""
    _KerasStyle.on = True


class _Unset:
    """Stands for the graph of a layer that has not been called."""


class LayerState:
    """What a legacy layer knows beyond a Keras layer.

    One object, because Keras looks through every list that is an attribute of a layer.
    """

    def __init__(self) -> None:
        self.constructed = False
        self.name: Any = None
        self.base_name: Any = None
        self.scope: VariableScope | None = None
        self.reuse: Any = None
        self.graph: Any = _Unset
        self.keras_style = _KerasStyle.on
        self.keras_style_prefix: str | None = None
        self.dtype_known = False
        self.casts_inputs = False
        self.trainable: Any = True
        self.activity_regularizer: Any = None
        self.computing = False
        self.nested = False
        self.deferred_losses: list[DeferredLoss] = []
        self.loss_inputs: dict[int, Any] = {}
        self.updates: list[Any] = []
        self.held: set[int] = set()
        self.initial_weights: Any = None
        self.batch_input_shape: tuple[Any, ...] | None = None
        self.built_shape: tuple[Any, ...] | None = None


class Layer(keras.layers.Layer):
    """The base class of legacy layers.

    Its variables live in a variable scope, which the layer takes at its first call (or when it is
    made, with `_scope`), and are shared as the scope's `reuse` says. A call that fails leaves
    nothing behind but the scope.

    Args:
        trainable: Whether the variables that the first call makes are trainable.
        name: Name of the layer, and what its scope's name starts from; `None` for a made-up one.
        dtype: Of the variables; `None` takes that of the first input.
        **kwargs: `_scope`, `_reuse`, `autocast`, `activity_regularizer`, `weights`, `input_shape`,
            `batch_input_shape`, `batch_size`, `input_dim`; `dynamic` and `implementation` are taken
            without effect.

    Raises:
        TypeError: a keyword is not known; its arguments are `('Keyword argument not understood:',
            name)`.
        ValueError: `_reuse` is none of `None`, `False`, `True`, `tf.AUTO_REUSE`.

    Example:
        >>> import numpy as np
        >>> import sepconv.tf1 as tf
        >>> class Scale(tf.layers.Layer):
        ...     def build(self, input_shape):
        ...         self.factor = self.add_weight("factor", [], initializer=tf.ones_initializer())
        ...     def call(self, inputs):
        ...         return inputs * self.factor
        >>> layer = Scale(name="scale")
        >>> layer(np.ones((2, 3), "float32")).shape == (2, 3), layer.variables[0].name
        (True, 'scale/factor:0')
    """

    input_spec: Any
    _legacy: LayerState
    construction: tuple[tuple[Any, ...], dict[str, Any]]

    KEYWORDS: frozenset[str] = frozenset(
        {
            "_reuse",
            "_scope",
            "activity_regularizer",
            "autocast",
            "batch_input_shape",
            "batch_size",
            "dynamic",
            "implementation",
            "input_dim",
            "input_shape",
            "weights",
        }
    )
    """What the constructor takes beyond its named arguments."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Layer:
        """Notes the arguments, which a copy is made from."""
        layer: Layer = super().__new__(cls, *args, **kwargs)
        object.__setattr__(layer, "construction", (args, kwargs))
        object.__setattr__(layer, "_legacy", LayerState())
        return layer

    def __init__(
        self, trainable: Any = True, name: Any = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        self.check_keywords(kwargs)
        state = self._legacy
        state.trainable = trainable
        state.dtype_known = dtype is not None
        policy = arguments.dtype_policy("float32" if dtype is None else dtype)
        state.casts_inputs = bool(kwargs.get("autocast", False))
        state.initial_weights = kwargs.get("weights")
        state.batch_input_shape = _batch_input_shape(kwargs)
        self._name_layer(name)
        super().__init__(
            trainable=bool(trainable),
            name=_keras_name(state.name),
            dtype=policy,
            # Inputs have the right dtype when Keras sees them; this lets it cast the variables.
            autocast=True,
        )
        state.activity_regularizer = arguments.regularizer(kwargs.get("activity_regularizer"))
        self.stateful = False
        self.dynamic = False
        scope, reuse = kwargs.get("_scope"), kwargs.get("_reuse")
        if state.keras_style:
            for argument, value in (("scope", scope), ("reuse", reuse)):
                if value is not None:
                    raise ValueError(
                        f"`{argument}` is not allowed when keras style layers are enabled. "
                        f"Received: {argument}={value!r}"
                    )
        state.reuse = scopes.check_reuse(reuse)
        if scope:
            with variable_scope(scope) as state.scope:
                pass
        state.constructed = True

    @classmethod
    def check_keywords(cls, kwargs: dict[str, Any]) -> None:
        """Raises for the first keyword that the constructor does not take.

        Args:
            kwargs: Keywords beyond the named arguments.

        Raises:
            TypeError: there is one.
        """
        for keyword in kwargs:
            if keyword not in cls.KEYWORDS:
                raise TypeError("Keyword argument not understood:", keyword)

    def _name_layer(self, name: Any) -> None:
        state = self._legacy
        made_up = _snake_case(type(self).__name__)
        state.base_name, state.name = name, name
        if isinstance(name, VariableScope):
            state.base_name = name.name
        if isinstance(name, VariableScope) or not name:
            state.name = graphs.get_default_graph().unique_layer_name(made_up)
        if not state.base_name:
            state.base_name = made_up

    def __dir__(self) -> list[str]:
        # Whoever reads every listed attribute, as Keras's saving does, would set off its warning.
        return [name for name in super().__dir__() if name != "graph"]

    # Names.

    @property
    def name(self) -> Any:
        """The name of the layer, set when it is made."""
        return self._legacy.name

    @name.setter
    def name(self, value: Any) -> None:
        # Keras's constructor sets the name it was given, which has no slashes.
        if self._legacy.constructed:
            raise AttributeError(
                f"`name` of layer {self._legacy.name!r} has no setter. Received: name={value!r}"
            )

    @property
    def scope_name(self) -> str:
        """Full name of the variable scope that the layer's variables live in.

        Raises:
            ValueError: the layer has no scope yet.
        """
        if self._legacy.scope is None:
            raise ValueError(
                "No name available for layer scope because the layer "
                f'"{self._legacy.name}" has not been used yet. It is taken at the first call.'
            )
        return self._legacy.scope.name

    @property
    def graph(self) -> None:
        """Deprecated: warns, then is `None` in a graph.

        Raises:
            RuntimeError: no graph is current.
        """
        warnings.warn(
            "`Layer.graph` is deprecated: layers no longer track their graph.",
            LegacyWarning,
            stacklevel=2,
        )
        if graphs.executing_eagerly():
            raise RuntimeError("`Layer.graph` is not supported when executing eagerly.")

    def _set_scope(self, scope: Any = None) -> None:
        state = self._legacy
        if state.scope is not None or state.keras_style:
            return
        if state.reuse and scope is None:
            scope = state.base_name
        with variable_scope(scope, default_name=state.base_name) as state.scope:
            pass

    def _open_name_scope(self) -> Any:
        # Keras's name scopes take no slashes, which legacy names may have.
        return keras.name_scope(_keras_name(self._legacy.name) or "layer", caller=self)

    # Dtypes.

    @property
    def dtype(self) -> Any:
        """Name of the variables' element type; `None` before the first call if none was given."""
        return self.variable_dtype

    @property
    def variable_dtype(self) -> Any:
        """The same as `dtype`."""
        return super().variable_dtype if self._legacy.dtype_known else None

    @property
    def compute_dtype(self) -> Any:
        """Name of the element type that the layer computes in; `None` where `dtype` is."""
        return super().compute_dtype if self._legacy.dtype_known else None

    def _know_dtype(self, dtype: Any) -> None:
        if not self._legacy.dtype_known:
            self._dtype_policy = arguments.dtype_policy(dtype)
            self._legacy.dtype_known = True

    # Weights.

    def add_weight(
        self,
        name: str | None = None,
        shape: Any = None,
        dtype: Any = None,
        initializer: Any = None,
        regularizer: Any = None,
        trainable: Any = None,
        constraint: Any = None,
        use_resource: Any = None,
        synchronization: Any = None,
        aggregation: Any = None,
        partitioner: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Makes a variable in the layer's scope, or shares one that is there.

        Args:
            name: Last part of its name.
            shape: Sizes; `None` for a number.
            dtype: Element type; `None` for that of the layer, else float32.
            initializer: `None` for that of the scope, else Glorot uniform.
            regularizer: A function of the variable; a variable that was there gets no loss.
            trainable: `None` for `True`; a layer that is not trainable makes no trainable
                variables.
            constraint: A function of the variable, for optimizers.
            use_resource: Not used.
            synchronization: Not used.
            aggregation: Not used.
            partitioner: Must be `None`.
            **kwargs: `autocast` and others of Keras that change nothing here.

        Returns:
            The variable, or what a custom getter of the scope returns.

        Raises:
            ValueError: as in `tf.get_variable`.
        """
        for keyword in kwargs:
            if keyword not in ("autocast", "experimental_autocast", "overwrite_with_gradient"):
                raise TypeError("Unknown keyword argument:", keyword)
        state = self._legacy
        if name is None:
            name = f"variable_{len(self.weights)}" if self.weights else "variable"
        wanted = (trainable is None or bool(trainable)) and bool(self.trainable)
        keywords = {
            "shape": () if shape is None else shape,
            "dtype": dtype or self.dtype or "float32",
            "initializer": arguments.initializer(initializer),
            "trainable": wanted,
            "constraint": arguments.constraint(constraint),
        }
        regularizer = arguments.regularizer(regularizer)
        graph = graphs.get_default_graph()
        existing = {id(variable) for variable in graph.variables.values()}
        if state.keras_style:
            if state.keras_style_prefix is None:
                state.keras_style_prefix = graph.unique_name(str(self.name))
            variable = scopes.make_variable(f"{state.keras_style_prefix}/{name}", **keywords)
        else:
            self._set_scope()
            reuse = self.built or state.reuse
            with variable_scope(state.scope, reuse=reuse, auxiliary_name_scope=False) as scope:
                variable = scope.get_variable(name, partitioner=partitioner, **keywords)
        if regularizer is not None and id(variable) not in existing:
            loss = scopes.add_variable_loss(variable, regularizer)
            if loss is not None:
                state.deferred_losses.append(loss)
        self._belong_to_graph()
        if isinstance(variable, keras.Variable):
            self._keep(variable, wanted)
        return variable

    def _keep(self, variable: Any, wanted: bool) -> None:
        """Lists a variable among the layer's; Keras's own way would switch its `trainable` off."""
        if not wanted:
            self._legacy.held.add(id(variable))
        if isinstance(variable, Variable):
            variable.owned_by(self)
        store = "trainable_variables" if variable.trainable else "non_trainable_variables"
        if self._tracker.is_in_store(store, variable):
            return
        locked = self._tracker.locked
        self._tracker.unlock()
        self._tracker.add_to_store(store, variable)
        if locked:
            self._lock_state()
        self._post_track_variable(variable)

    def add_variable(self, *args: Any, **kwargs: Any) -> Any:
        """Does what `add_weight` does, with a warning."""
        warnings.warn(
            "`Layer.add_variable` is deprecated: use `add_weight`.", LegacyWarning, stacklevel=2
        )
        return self.add_weight(*args, **kwargs)

    @property
    def trainable(self) -> Any:
        """Whether the layer's trainable variables count as such; as given, tested for truth.

        It moves variables between `trainable_weights` and `non_trainable_weights`. Collections, and
        the variables themselves, stay as they were made.
        """
        return self._legacy.trainable

    @trainable.setter
    def trainable(self, value: Any) -> None:
        self._legacy.trainable = value
        for layer in self._layers:
            layer.trainable = value

    @property
    def runs_in_keras_model(self) -> bool:
        """Whether a Keras model has run the layer: then `trainable` decides for its variables."""
        return self._legacy.nested or bool(self._inbound_nodes)

    def _counts_as_trainable(self, variable: Any) -> bool:
        return bool(variable.trainable) and id(variable) not in self._legacy.held

    @property
    def weights(self) -> list[Any]:
        """The variables, trainable ones first, otherwise in the order in which they were made."""
        weights = super().weights
        return [
            *(v for v in weights if self._counts_as_trainable(v)),
            *(v for v in weights if not self._counts_as_trainable(v)),
        ]

    @property
    def trainable_weights(self) -> list[Any]:
        """The variables that optimizers may change; empty while the layer is not trainable."""
        if not self.trainable:
            return []
        return [v for v in super().weights if self._counts_as_trainable(v)]

    @property
    def non_trainable_weights(self) -> list[Any]:
        """The other variables."""
        if not self.trainable:
            return self.weights
        return [v for v in super().weights if not self._counts_as_trainable(v)]

    @property
    def trainable_variables(self) -> list[Any]:
        """The same as `trainable_weights`."""
        return self.trainable_weights

    @property
    def non_trainable_variables(self) -> list[Any]:
        """The same as `non_trainable_weights`, and the state of random generators inside."""
        trainable = {id(variable) for variable in self.trainable_weights}
        return [variable for variable in self.variables if id(variable) not in trainable]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the values of all variables, or of none.

        Args:
            weights: Arrays, in the order of `self.weights`.

        Raises:
            ValueError: their number or a shape is wrong.
        """
        variables = self.weights
        if len(weights) != len(variables):
            raise ValueError(
                f'You called `set_weights(weights)` on layer "{self.name}" with a weight list of '
                f"length {len(weights)}, but the layer was expecting {len(variables)} weights."
            )
        for variable, value in zip(variables, weights, strict=True):
            if tuple(variable.shape) != tuple(np.shape(value)):
                raise ValueError(
                    f"Layer weight shape {tuple(variable.shape)} is not compatible with provided "
                    f"weight shape {tuple(np.shape(value))} (variable {variable.name})."
                )
        for variable, value in zip(variables, weights, strict=True):
            variable.assign(value)

    def _apply_initial_weights(self) -> None:
        """Sets the values that the constructor was given, once the variables are there."""
        if self._legacy.initial_weights is not None and self.weights:
            weights, self._legacy.initial_weights = self._legacy.initial_weights, None
            try:
                self.set_weights(weights)
            except ValueError:
                self._legacy.initial_weights = weights
                raise

    def get_build_config(self) -> dict[str, Any] | None:
        """Returns what Keras's saving needs to build the layer again."""
        if self._legacy.built_shape is not None:
            return {"input_shape": self._legacy.built_shape}
        config: dict[str, Any] | None = super().get_build_config()
        return config

    # Losses and updates.

    @property
    def activity_regularizer(self) -> Any:
        """A function of the output; at every call its result, over the batch size, is a loss."""
        # Keras would add the loss itself, but takes no numbers and fails for None.
        return None if self._legacy.computing else self._legacy.activity_regularizer

    @activity_regularizer.setter
    def activity_regularizer(self, value: Any) -> None:
        self._legacy.activity_regularizer = value

    def add_loss(self, losses: Any, inputs: Any = None) -> None:
        """Adds to `self.losses` and, in a graph, to `REGULARIZATION_LOSSES`.

        Args:
            losses: A tensor, a number, a function of no arguments, `None`, or a list of these. A
                function is called at every access to the losses.
            inputs: What the loss depends on, for `get_losses_for`.

        Raises:
            ValueError: a tensor or number outside a call while no graph is current: it would be
                gone at the next call.
        """
        graph = graphs.graph_mode()
        for loss in losses if isinstance(losses, (list, tuple)) else (losses,):
            if loss is None:
                continue
            if callable(loss) and not ops.is_tensor(loss):
                deferred = DeferredLoss(loss)
                self._legacy.deferred_losses.append(deferred)
                if graph is not None:
                    graph.add_to_collection(GraphKeys.REGULARIZATION_LOSSES, deferred)
            elif graph is None and not self._legacy.computing:
                raise ValueError(
                    "Expected a function of no arguments: outside a call, with no graph current, "
                    f"a loss that is a value would be gone at the next call. Received: {loss!r}"
                )
            else:
                self._add_call_loss(ops.convert_to_tensor(loss), inputs)

    def _add_call_loss(self, loss: Any, inputs: Any) -> None:
        stored = len(self._losses)
        super().add_loss(loss)
        self._legacy.loss_inputs[id(loss)] = inputs
        graph = graphs.graph_mode()
        # While Keras traces a function the loss exists only inside it, and a model that runs the
        # layer collects its losses itself.
        if graph is None or self._legacy.nested:
            return
        if graph.in_step or len(self._losses) > stored:
            graph.add_call_loss(
                GraphKeys.REGULARIZATION_LOSSES, loss, lambda: self._forget_loss(loss)
            )

    def _forget_loss(self, loss: Any) -> None:
        self._losses[:] = [kept for kept in self._losses if kept is not loss]
        self._legacy.loss_inputs.pop(id(loss), None)

    def _add_activity_losses(self, outputs: Any, inputs: Any) -> None:
        regularizer = self.activity_regularizer
        for output in keras.tree.flatten(outputs):
            if isinstance(output, keras.KerasTensor):
                continue
            loss = regularizer(output)
            if loss is None:
                raise ValueError(
                    "`activity_regularizer` must return a value. "
                    f"Received: None from {regularizer!r}"
                )
            if not ops.is_tensor(loss):
                loss = ops.convert_to_tensor(loss, dtype=output.dtype)
            batch = ops.cast(ops.shape(output)[0], keras.backend.standardize_dtype(loss.dtype))
            mean = loss / ops.maximum(batch, 1)
            self._add_call_loss(ops.where(batch == 0, ops.zeros_like(mean), mean), inputs)

    def _get_own_losses(self) -> list[Any]:
        values = [loss.compute() for loss in self._legacy.deferred_losses]
        return [*super()._get_own_losses(), *(value for value in values if value is not None)]

    def _clear_losses(self) -> None:
        super()._clear_losses()
        self._legacy.loss_inputs.clear()

    def _get_call_context(self) -> Any:
        # The outermost layer of a call drops the losses of the call before: right where no graph is
        # current, but a graph keeps the losses of every call.
        losses, inputs = list(self._losses), dict(self._legacy.loss_inputs)
        context = super()._get_call_context()
        self._legacy.nested = context.entry_layer is not self
        if not self._legacy.nested and not graphs.executing_eagerly():
            self._losses[:] = losses
            self._legacy.loss_inputs = inputs
        return context

    @property
    def get_losses_for(self) -> Callable[[Any], list[Any]]:
        """In a graph, a function of `inputs` that returns the losses of calls on them.

        For `None` it returns the losses that depend on no input.

        Raises:
            AttributeError: no graph is current.
        """
        if graphs.executing_eagerly():
            raise AttributeError("`get_losses_for` exists only in a graph")
        return self._losses_for

    def _losses_for(self, inputs: Any) -> list[Any]:
        def on(loss: Any) -> list[int]:
            return [id(x) for x in keras.tree.flatten(self._legacy.loss_inputs.get(id(loss)))]

        losses = super()._get_own_losses()
        if inputs is not None:
            wanted = {id(tensor) for tensor in keras.tree.flatten(inputs)}
            return [loss for loss in losses if not wanted.isdisjoint(on(loss))]
        of_calls = [loss for loss in losses if self._legacy.loss_inputs.get(id(loss)) is None]
        values = [loss.compute() for loss in self._legacy.deferred_losses]
        return [*of_calls, *(value for value in values if value is not None)]

    @property
    def updates(self) -> list[Any]:
        """What `add_update` was given."""
        return list(self._legacy.updates)

    def add_update(self, updates: Any, inputs: Any = None) -> None:
        """In a graph, adds to `self.updates`, and at the next call to `UPDATE_OPS`.

        Args:
            updates: Anything, or a list.
            inputs: Not used.
        """
        if not graphs.executing_eagerly():
            self._legacy.updates += updates if isinstance(updates, (list, tuple)) else [updates]

    # Calls.

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer."""
        return self(*args, **kwargs)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Computes the layer, after making or finding its variables if this is the first call.

        Args:
            inputs: Tensors, arrays or Keras tensors.
            *args: For `call`.
            **kwargs: For `call`; `scope` decides the variable scope at the first call.

        Returns:
            What `call` returns.

        Raises:
            ValueError: the layer belongs to another graph; the inputs do not fit; a variable exists
                and must not, or must and does not.
            TypeError: the inputs are no tensors, or of another element type than the variables.
        """
        state = self._legacy
        scope = kwargs.pop("scope", None)
        if state.keras_style and scope is not None:
            raise ValueError(
                "`scope` is not allowed when keras style layers are enabled. "
                f"Received: scope={scope!r}"
            )
        self._check_graph()
        self._set_scope(scope)
        tensors = self._to_tensors(inputs)
        with contextlib.ExitStack() as stack:
            if not self.built:
                stack.enter_context(self._all_or_nothing())
                self._know_dtype(_first_dtype(tensors))
            if not state.keras_style:
                reuse = True if self.built else state.reuse
                opened = variable_scope(state.scope, reuse=reuse, auxiliary_name_scope=False)
                current = stack.enter_context(opened)
                if "scope" in self.call_signature_parameters:
                    kwargs["scope"] = current
            outputs = self._compute(tensors, args, kwargs)
            self._apply_initial_weights()
            if self.activity_regularizer is not None:
                self._add_activity_losses(outputs, inputs)
        self._belong_to_graph()
        graph = graphs.graph_mode()
        if graph is not None:
            listed = graph.get_collection_ref(GraphKeys.UPDATE_OPS)
            listed += [u for u in state.updates if not any(u is other for other in listed)]
        return outputs

    def _compute(self, tensors: Any, args: Any, kwargs: Any) -> Any:
        state = self._legacy
        before, state.computing = state.computing, True
        try:
            outputs = super().__call__(tensors, *args, **kwargs)
        finally:
            state.computing = before
        if outputs is None:
            raise ValueError(f'`call` of layer "{self.name}" must return tensors. Received: None')
        return outputs

    def stateless_call(
        self,
        trainable_variables: Sequence[Any],
        non_trainable_variables: Sequence[Any],
        *args: Any,
        return_losses: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Computes the layer with the given values of its variables: `keras.Layer.stateless_call`.

        Unlike there, the losses include that of `activity_regularizer`.

        Args:
            trainable_variables: Values for `self.trainable_variables`.
            non_trainable_variables: Values for `self.non_trainable_variables`.
            *args: For the call.
            return_losses: Whether to return the losses of this call too.
            **kwargs: For the call.

        Returns:
            (outputs, values of the non-trainable variables) and, if asked for, losses.
        """
        if not return_losses or self.activity_regularizer is None:
            return super().stateless_call(
                trainable_variables,
                non_trainable_variables,
                *args,
                return_losses=return_losses,
                **kwargs,
            )
        others = self.non_trainable_variables
        values = [
            *zip(self.trainable_variables, trainable_variables, strict=True),
            *zip(others, non_trainable_variables, strict=True),
        ]
        with keras.StatelessScope(state_mapping=values, collect_losses=True) as scope:
            outputs = self(*args, **kwargs)
            losses = self.losses
        return outputs, [scope.get_current_value(variable) for variable in others], losses

    def _to_tensors(self, inputs: Any) -> Any:
        """Arrays become tensors of their own element type; Keras would round them to float32."""

        def to_tensor(leaf: Any) -> Any:
            if isinstance(leaf, (np.ndarray, np.generic)):
                allow_float64(str(leaf.dtype))
                return ops.convert_to_tensor(
                    leaf, dtype=keras.backend.standardize_dtype(leaf.dtype)
                )
            return leaf

        return keras.tree.map_structure(to_tensor, inputs)

    def _check_graph(self) -> None:
        home, current = self._legacy.graph, graphs.graph_mode()
        if isinstance(home, graphs.Graph) and home is not current:
            here = "no graph is current" if current is None else f"{current.label} is current"
            raise ValueError(
                f'Layer "{self.name}" belongs to {home.label}, the graph of its first call, and '
                f"must be called there. Received: a call while {here}"
            )

    def _belong_to_graph(self) -> None:
        if self._legacy.graph is _Unset:
            self._legacy.graph = graphs.graph_mode()

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Takes back all that a failed first call or build made, but not the scope."""
        state = self._legacy
        attributes = set(vars(self))
        kept = {id(variable) for variable in super().variables}
        spec, policy, known = self.input_spec, self._dtype_policy, state.dtype_known
        home, deferred, losses = state.graph, list(state.deferred_losses), list(self._losses)
        try:
            with graphs.get_default_graph().transaction():
                yield
        except BaseException:
            for variable in super().variables:
                if id(variable) not in kept:
                    self._untrack_variable(variable)
            for name in set(vars(self)) - attributes:
                object.__delattr__(self, name)
            self._tracker.unlock()
            self.built = False
            self.input_spec, self._dtype_policy = spec, policy
            state.dtype_known, state.graph, state.deferred_losses = known, home, deferred
            self._losses[:] = losses
            raise

    # Shapes and connections.

    def compute_output_signature(self, input_signature: Any) -> TensorSpec:
        """Returns shape and element type of the output, without building the layer.

        Args:
            input_signature: Has `shape` and `dtype`.
        """
        dtype = self.compute_dtype or keras.backend.standardize_dtype(input_signature.dtype)
        return TensorSpec(self.compute_output_shape(input_signature.shape), dtype)

    def _connected(self, what: str) -> None:
        if not self._inbound_nodes:
            raise AttributeError(
                f'Layer "{self.name}" has no defined {what}: it was not called on a Keras tensor.'
            )

    @property
    def input(self) -> Any:
        """The Keras tensor that the layer was called on.

        Raises:
            AttributeError: there is none.
        """
        self._connected("input")
        return super().input

    @property
    def output(self) -> Any:
        """The Keras tensor that came of it.

        Raises:
            AttributeError: there is none.
        """
        self._connected("output")
        return super().output

    @property
    def input_shape(self) -> Any:
        """Shape of `input`."""
        self._connected("input shape")
        return keras.tree.map_structure(lambda tensor: tuple(tensor.shape), super().input)

    @property
    def output_shape(self) -> Any:
        """Shape of `output`."""
        self._connected("output shape")
        return keras.tree.map_structure(lambda tensor: tuple(tensor.shape), super().output)

    @property
    def input_mask(self) -> Any:
        """`None` where there is an `input`."""
        self._connected("input mask")

    @property
    def output_mask(self) -> Any:
        """`None` where there is an `output`."""
        self._connected("output mask")

    @property
    def inbound_nodes(self) -> list[Any]:
        """The layer's calls on Keras tensors."""
        return list(self._inbound_nodes)

    @property
    def outbound_nodes(self) -> list[Any]:
        """The uses of what came of these calls."""
        return list(self._outbound_nodes)

    def get_input_at(self, node_index: int) -> Any:
        """Returns the Keras tensor of one call.

        Args:
            node_index: Number of the call, from 0.

        Raises:
            RuntimeError: there is no such call.
        """
        return self._at(node_index, "input_tensors")

    def get_output_at(self, node_index: int) -> Any:
        """Returns the Keras tensor that came of one call.

        Args:
            node_index: Number of the call, from 0.

        Raises:
            RuntimeError: there is no such call.
        """
        return self._at(node_index, "output_tensors")

    def _at(self, node_index: int, attribute: str) -> Any:
        try:
            tensors = getattr(self._inbound_nodes[node_index], attribute)
        except IndexError:
            raise RuntimeError(
                f'Layer "{self.name}" was called on {len(self._inbound_nodes)} Keras tensors. '
                f"Received: node_index={node_index}"
            ) from None
        return tensors[0] if len(tensors) == 1 else tensors

    # Copies.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copying.deep_copy(self, memo)

    def __copy__(self) -> Any:
        return copying.shallow_copy(self)

    def __reduce__(self) -> Any:
        return copying.reduced(self)

    def get_config(self) -> dict[str, Any]:
        """Returns name, flag and element type, ready for JSON."""
        config: dict[str, Any] = {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": self._dtype_config(),
        }
        if self._legacy.activity_regularizer is not None:
            config["activity_regularizer"] = arguments.serialized(self._legacy.activity_regularizer)
        return self._with_input_shape(config)

    def _with_input_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        if self._legacy.batch_input_shape is not None:
            config["batch_input_shape"] = self._legacy.batch_input_shape
        return config

    def _dtype_config(self) -> Any:
        if not self._legacy.dtype_known:
            return None
        policy = self._dtype_policy
        if policy.compute_dtype == policy.variable_dtype == policy.name:
            return policy.name
        return keras.dtype_policies.serialize(policy)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes a layer from what `get_config` returned, here or from the original.

        Args:
            config: Its constructor arguments.

        Raises:
            TypeError: one is not known.
        """
        return cls(**config)


def _first_dtype(tensors: Any) -> Any:
    for tensor in keras.tree.flatten(tensors):
        if hasattr(tensor, "dtype"):
            return keras.backend.standardize_dtype(tensor.dtype)
    return "float32"


def _batch_input_shape(kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    if kwargs.get("batch_input_shape") is not None:
        return tuple(kwargs["batch_input_shape"])
    shape = kwargs.get("input_shape")
    if shape is None and kwargs.get("input_dim") is not None:
        shape = (kwargs["input_dim"],)
    return None if shape is None else (kwargs.get("batch_size"), *shape)


def _keras_name(name: Any) -> str:
    return str(name).replace("/", "_")


def _snake_case(name: str) -> str:
    words = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", name)
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()
    return f"private{words}" if words.startswith("_") else words
