"""What a fusion has to leave as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Exclusion"]


class Exclusion:
    """(name, layer) -> whether it has to stay as it is.

    Args:
        exclude: Names, layers or modules, and functions of a layer; one, or several in a list.

    Raises:
        TypeError: `exclude` is made of something else.

    Example:
        >>> excluded = Exclusion("backbone")
        >>> excluded("backbone/conv1", object()), excluded("backbone2/conv1", object())
        (True, False)
    """

    def __init__(self, exclude: Any) -> None:
        if isinstance(exclude, Iterable) and not isinstance(exclude, str):
            # Some containers of layers are layers.
            self._rules = [exclude] if _is_layer(exclude) else list(exclude)
        else:
            self._rules = [exclude]
        for rule in self._rules:
            if not isinstance(rule, str) and not callable(rule) and not _is_layer(rule):
                raise TypeError(
                    "`exclude` must be made of names, layers and functions. "
                    f"Received: exclude={exclude!r}"
                )

    def __call__(self, name: str, layer: Any) -> bool:
        """Returns whether a layer of that name has to stay as it is."""
        return any(self._holds(rule, name, layer) for rule in self._rules)

    def check(self, names: Iterable[str]) -> None:
        """Checks that every excluded name is one of a layer, or of a model around one.

        Args:
            names: Of all layers.

        Raises:
            ValueError: an excluded name is none of them.
        """
        known = list(names)
        for rule in self._rules:
            if isinstance(rule, str) and not any(self._holds(rule, name, None) for name in known):
                raise ValueError(
                    f"`exclude` must name layers of the model. Received: {rule!r}, which is none"
                )

    @staticmethod
    def _holds(rule: Any, name: str, layer: Any) -> bool:
        if isinstance(rule, str):
            # Keras puts slashes between the names of models and layers, torch dots.
            within = name.startswith((f"{rule}/", f"{rule}."))
            return within or name == rule or name.rpartition("/")[2] == rule
        if _is_layer(rule):
            return rule is layer
        function: Callable[[Any], bool] = rule
        return bool(function(layer))


def _is_layer(value: Any) -> bool:
    classes = [
        module.Layer if name == "keras" else module.nn.Module
        for name in ("keras", "torch")
        if (module := sys.modules.get(name)) is not None
    ]
    return isinstance(value, tuple(classes))
