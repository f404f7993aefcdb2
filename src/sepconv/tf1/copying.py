"""Copies and pickles of legacy layers: the constructor is replayed, then the state is laid over."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import keras
import numpy as np

from sepconv.tf1 import graphs, scopes
from sepconv.tf1.variables import Variable

__all__ = ["deep_copy", "reduced", "shallow_copy"]

_KEPT_STATE = ("name", "base_name", "reuse", "trainable", "dtype_known", "batch_input_shape")


def deep_copy(layer: Any, memo: dict[int, Any]) -> Any:
    """Returns a layer of its own with equal values; its variables are in no collection.

    Args:
        layer: A legacy layer.
        memo: Of `copy.deepcopy`.
    """
    content = _content(layer)
    twin = _restored(type(layer), copy.deepcopy(content, memo))
    memo[id(layer)] = twin
    twin._legacy.graph = layer._legacy.graph
    return twin


def reduced(layer: Any) -> Any:
    """Returns what `pickle` stores of a layer.

    It comes back without a graph: the next call gives it one.

    Args:
        layer: A legacy layer.
    """
    return _restored, (type(layer), _content(layer))


def shallow_copy(layer: Any) -> Any:
    """Returns a layer that shares variables, and everything else, with another.

    Args:
        layer: A legacy layer.
    """
    cls = layer.__class__
    twin = cls.__new__(cls)
    state = copy.copy(layer._legacy)
    own = {"build", "quantize", "construction", "_legacy"}  # Bound to the layer, or set above.
    twin.__dict__.update({k: v for k, v in vars(layer).items() if k not in own})
    object.__setattr__(twin, "_legacy", state)
    object.__setattr__(twin, "construction", layer.construction)
    return twin


def _content(layer: Any) -> dict[str, Any]:
    state = layer._legacy
    args, kwargs = layer.construction
    return {
        "args": args,
        "kwargs": {k: v for k, v in kwargs.items() if k not in ("_scope", "scope")},
        "attributes": {
            name: value for name, value in vars(layer).items() if _is_plain(name, value)
        },
        "state": {name: getattr(state, name) for name in _KEPT_STATE},
        "activity_regularizer": state.activity_regularizer,
        "policy": layer._dtype_policy.get_config() if state.dtype_known else None,
        "scope": copy.copy(state.scope),
        "build": layer.get_build_config() if layer.built else None,
        "variables": [
            {
                "name": variable.op.name,
                "value": np.array(variable),
                "dtype": str(variable.dtype),
                "trainable": bool(variable._trainable),
                "held": id(variable) in state.held,
                "constraint": variable.constraint,
            }
            for variable in layer.weights
        ],
    }


def _is_plain(name: str, value: Any) -> bool:
    return (
        not name.startswith("_")
        and name not in ("build", "quantize", "built", "construction", "call_signature_parameters")
        and not isinstance(value, (keras.Variable, inspect.Signature))
    )


def _restored(cls: type, content: dict[str, Any]) -> Any:
    with graphs.get_default_graph().layer_names_kept():
        layer: Any = cls(*content["args"], **content["kwargs"])
    state = layer._legacy
    for name, value in content["state"].items():
        setattr(state, name, value)
    state.activity_regularizer = content["activity_regularizer"]
    if content["policy"] is not None:
        layer._dtype_policy = keras.DTypePolicy(**content["policy"])
    state.scope = content["scope"]
    for name, value in content["attributes"].items():
        setattr(layer, name, value)
    made = {each["name"]: _variable(layer, **each) for each in content["variables"]}
    if content["build"] is not None:
        state.initial_weights = None
        with scopes.detached(made):
            layer.build_from_config(content["build"])
    return layer


def _variable(
    layer: Any, name: str, value: Any, dtype: str, trainable: bool, held: bool, constraint: Any
) -> Variable:
    variable = Variable.made(
        keras.initializers.Zeros(), name, value.shape, dtype, trainable, constraint
    )
    variable.assign(value)
    layer._keep(variable, not held)
    return variable
