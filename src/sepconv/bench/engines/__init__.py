"""One module per engine, each loaded only in the process that runs it.

An engine has `PACKAGES` (names as pip knows them, for the versions), `limit_threads(threads)`,
`prepare(name, problem, mode, copies, threads) -> Ready`, and `forget()`, which drops what was
prepared. `copies` is how many copies of the input take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Ready", "UnableError"]


class UnableError(Exception):
    """The engine cannot do this; the message is the reason."""


@dataclass(frozen=True)
class Ready:
    """A layer made ready.

    Attributes:
        call: Runs the mode on the next copy of the input and returns when it is done.
        arrays: What `call` returned -> y, for training also the gradients of x, the depthwise
            kernel, the pointwise kernel and the bias, as NumPy arrays laid out as in the problem.
    """

    call: Callable[[], Any]
    arrays: Callable[[Any], Sequence[Any]]
