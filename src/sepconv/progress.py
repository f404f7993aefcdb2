"""How far long work is, told to whoever listens. The library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["Listener", "listening", "tracked"]

Listener = Callable[[str, int, int], None]
"""(what is done, how many are done, of how many)."""
Item = TypeVar("Item")
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tells a listener of the work that is done in the context.

    Args:
        listener: Called before the first item of each kind of work, and after each one.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tracked(items: Collection[Item], what: str) -> Iterator[Item]:
    """Gives items one by one, and tells how many are done.

    Args:
        items: To be worked on.
        what: Is done with them.

    Example:
        >>> with listening(lambda *facts: print(facts)):
        ...     doubled = [2 * number for number in tracked([3, 4], "numbers doubled")]
        ('numbers doubled', 0, 2)
        ('numbers doubled', 1, 2)
        ('numbers doubled', 2, 2)
    """
    listener = _listener.get()
    if listener is None:
        yield from items
        return
    listener(what, 0, len(items))
    for number, item in enumerate(items, start=1):
        yield item
        listener(what, number, len(items))
