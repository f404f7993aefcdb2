"""Models of Keras whose weights have no values before those that they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import keras
from keras.src.backend.common import global_state

__all__ = ["made_with_values", "values_given"]

Made = TypeVar("Made")


@contextmanager
def values_given() -> Iterator[None]:
    """Variables that are made in this context get memory at its end, for what was assigned to them.

    No random numbers are drawn that something else then replaces, which with JAX take a compilation
    for each shape. After an error nothing has been allocated.
    """
    scope = keras.StatelessScope(initialize_variables=False)
    # Keras keeps variables that have no value yet until the end of a scope that gives them one.
    waiting = global_state.get_global_attribute("uninitialized_variables", [], set_to_default=True)
    before = len(waiting)
    try:
        with scope:
            yield
        for variable in waiting[before:]:
            value = scope.get_current_value(variable)
            if value is not None:
                variable._initializer = _Stored(value)
            variable._deferred_initialize()
    finally:
        del waiting[before:]


def made_with_values(make: Callable[[], Made]) -> Made:
    """Returns what a function makes in `values_given`.

    Args:
        make: May be called again without it: it does not suit what makes variables of numbers, not
            of initializers, as the optimizer of a compiled model does.
    """
    try:
        with values_given():
            return make()
    except ValueError as error:
        if "in a stateless scope" not in str(error):
            raise
    return make()


class _Stored:
    """An initializer that gives what was stored."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        return self._value
