"""What the arguments of the layer become, and what they raise."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from sepconv.spec import ConvSpec, canonical_padding
from sepconv.tf1 import initializers, nn
from sepconv.tf1.tensors import as_dtype

__all__ = [
    "activation",
    "constraint",
    "data_format",
    "depth_multiplier",
    "dtype_policy",
    "filters",
    "initializer",
    "padding",
    "pair",
    "regularizer",
    "serialized",
]


def pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """Returns a size as two plain ints.

    Args:
        name: Of the argument, for the error.
        value: An integer, or two of them; whole floats among the two will do.
        minimum: Smallest legal size, 0 or 1.

    Raises:
        ValueError: there are not two elements, one is no number, or one is too small.
        TypeError: an element is a boolean, a float with a fraction, or text.
    """
    rule = f"The `{name}` argument must be a tuple of 2 integers."
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{rule} Received: {name}={value!r}")
    if isinstance(value, (int, np.integer)):
        elements: tuple[Any, ...] = (value, value)
    elif isinstance(value, Iterable) and not (isinstance(value, np.ndarray) and value.ndim == 0):
        elements = tuple(value)
    else:
        raise ValueError(f"{rule} Received: {name}={value!r}")
    if len(elements) != 2:
        raise ValueError(f"{rule} Received: {name}={value!r}")
    first, second = (_element(rule, name, value, element) for element in elements)
    if min(first, second) < minimum:
        requirement = ">= 0" if minimum == 0 else "> 0"
        raise ValueError(
            f"{rule} Received: {name}={value!r}, which does not satisfy the requirement "
            f"`{requirement}`."
        )
    return first, second


def _element(rule: str, name: str, value: Any, element: Any) -> int:
    received = f"Received: {name}={value!r} including element {element!r} of type {type(element)}"
    if isinstance(element, (bool, np.bool_)):
        raise TypeError(f"{rule} {received}")
    try:
        number = int(element)
    except (TypeError, ValueError):
        raise ValueError(f"{rule} {received}") from None
    if isinstance(element, (str, bytes)) or number != element:
        raise TypeError(f"{rule} {received}")
    return number


def filters(value: Any) -> int:
    """Returns `filters` as a plain int; a float is cut.

    Args:
        value: A positive number.

    Raises:
        ValueError: it is `None`, or not positive.
        TypeError: it is no number.
    """
    if value is None or (isinstance(value, np.floating) and type(value) is not np.float64):
        raise ValueError(f"`filters` must be an integer. Received: filters={value!r}")
    if isinstance(value, float):
        value = int(value)
    if value is True:
        raise TypeError("`filters` must be an integer. Received: filters=True")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`filters` must be an integer. Received: filters={value!r}") from None
    if number <= 0:
        raise ValueError(
            "Invalid value for argument `filters`. Expected a strictly positive value. "
            f"Received: filters={value!r}"
        )
    return number


def depth_multiplier(value: Any) -> int:
    """Returns `depth_multiplier` as a plain int.

    Args:
        value: A positive integer.

    Raises:
        ValueError: it is below 1.
        TypeError: it is no integer.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"`depth_multiplier` must be an integer. Received: depth_multiplier={value!r}"
        ) from None
    if number < 1:
        raise ValueError(
            "Invalid value for argument `depth_multiplier`. Expected a strictly positive value. "
            f"Received: depth_multiplier={value!r}"
        )
    return number


def padding(value: Any) -> str:
    """Returns `padding` in lower case.

    Args:
        value: Text.

    Raises:
        ValueError: it is neither `valid` nor `same`.
    """
    if isinstance(value, str):
        if value.lower() == "causal":
            raise ValueError(
                "Causal padding is only supported for one-dimensional convolutions. "
                f"Received: padding={value!r}"
            )
        try:
            return str(canonical_padding(value))
        except ValueError:
            pass
    raise ValueError(
        f'The `padding` argument must be "valid" or "same". Received: padding={value!r}'
    )


def data_format(value: Any) -> str:
    """Returns `data_format` in lower case; for `None`, the process-wide Keras setting.

    Args:
        value: Text, or `None`.

    Raises:
        ValueError: it is neither `channels_last` nor `channels_first`.
    """
    if value is None:
        value = keras.config.image_data_format()
    try:
        return ConvSpec(data_format=value).data_format
    except ValueError:
        raise ValueError(
            'The `data_format` argument must be one of "channels_first", "channels_last". '
            f"Received: data_format={value!r}"
        ) from None


def activation(value: Any) -> Callable[..., Any]:
    """Returns an activation function.

    Args:
        value: A Keras name, a callable, a config dict, or `None` for the identity.

    Raises:
        ValueError: the name is not known, or the dict is no config.
        TypeError: it is none of these.
    """
    if isinstance(value, str) and value == nn.hard_sigmoid.__name__:
        return nn.hard_sigmoid
    if value is not None and not isinstance(value, (str, dict)) and not callable(value):
        raise TypeError(f"Could not interpret activation function identifier: {value!r}")
    if isinstance(value, dict) and not {"class_name", "config"} <= set(value):
        raise ValueError(
            "`activation` must have the keys `class_name` and `config` if it is a dict. "
            f"Received: activation={value!r}"
        )
    try:
        function: Callable[..., Any] = keras.activations.get(value)
    except (ValueError, TypeError):
        raise ValueError(f"Unknown activation function: {value!r}") from None
    return function


def initializer(value: Any) -> Any:
    """Returns an initializer, or `None` for `None`.

    Args:
        value: A Keras name, an object, a class, a callable, a config dict, or `None`.

    Raises:
        ValueError: it is none of these, or the name is not known.
    """
    if value is None:
        return None
    if inspect.isclass(value):
        return value()
    if isinstance(value, dict):
        value = _without_dtype(value)
    elif callable(value):
        return value
    return _resolved("initializer", keras.initializers.get, value)


def _without_dtype(config: dict[str, Any]) -> dict[str, Any]:
    """Drops the element type, which the original's initializers have in their configs."""
    inner = config.get("config")
    if isinstance(inner, dict) and str(config.get("module", "keras")).startswith("keras"):
        return {**config, "config": {k: v for k, v in inner.items() if k != "dtype"}}
    return config


def regularizer(value: Any) -> Any:
    """Returns a regularizer, or `None` for `None`.

    Args:
        value: A Keras name, an object, a callable, a config dict, or `None`.

    Raises:
        ValueError: it is none of these, or the name is not known.
    """
    if inspect.isclass(value):
        return value()
    return value if callable(value) else _resolved("regularizer", keras.regularizers.get, value)


def constraint(value: Any) -> Any:
    """Returns a constraint, or `None` for `None`.

    Args:
        value: A Keras name, an object, a callable, a config dict, or `None`.

    Raises:
        ValueError: it is none of these, or the name is not known.
    """
    if inspect.isclass(value):
        return value()
    return value if callable(value) else _resolved("constraint", keras.constraints.get, value)


def _resolved(kind: str, get: Callable[[Any], Any], value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, (str, dict)):
        try:
            return get(value)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Unknown {kind}: {value!r}. Could not interpret {kind} identifier: {error}"
            ) from None
    raise ValueError(f"Could not interpret {kind} identifier: {value!r}")


def dtype_policy(value: Any) -> keras.DTypePolicy:
    """Returns a Keras dtype policy.

    Args:
        value: The name of a type or policy, a type, a policy, or a policy's config.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(value, dict):
        if value.get("class_name") == "Policy":  # As the original writes it.
            value = value["config"]["name"]
        else:
            value = keras.saving.deserialize_keras_object(value)
    if isinstance(value, keras.DTypePolicy):
        return value
    if isinstance(value, str) and value.startswith("mixed_"):
        try:
            return keras.DTypePolicy(value)
        except ValueError:
            raise TypeError(f"`dtype` must name a type or policy. Received: {value!r}") from None
    return keras.DTypePolicy(str(as_dtype(value)))


def serialized(value: Any) -> Any:
    """Returns what a config says for an initializer, regularizer, constraint or activation.

    Args:
        value: What the function of that name in this module returned.
    """
    if value is nn.hard_sigmoid:
        return nn.hard_sigmoid.__name__
    value = initializers.plain(nn.keras_function(value))
    if inspect.isfunction(value):
        named = keras.activations.serialize(value)
        return named if isinstance(named, str) else keras.saving.serialize_keras_object(value)
    return keras.saving.serialize_keras_object(value)
