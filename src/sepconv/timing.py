"""Times of several candidates in one run, measured so that they can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Block", "Timing", "block_of", "interleaved"]

Block = Callable[[int], Sequence[float]]
"""Runs a number of calls and returns the seconds of each."""


class Timing(NamedTuple):
    """What one candidate took, in seconds per call.

    Attributes:
        median: Of all samples.
        low: First quartile.
        high: Third quartile.
        best: Shortest sample.
        samples: How many there were.
    """

    median: float
    low: float
    high: float
    best: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Returns the summary of at least one sample.

        Args:
            seconds: The samples.

        Example:
            >>> Timing.of([3.0, 1.0, 2.0])
            Timing(median=2.0, low=1.5, high=2.5, best=1.0, samples=3)
        """
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, min(seconds), len(seconds))


def block_of(call: Callable[[], object]) -> Block:
    """Returns the block that times a call which returns only when its work is done.

    Args:
        call: The call.

    Example:
        >>> len(block_of(lambda: None)(3))
        3
    """

    def block(calls: int) -> list[float]:
        # Another candidate ran before this one and filled the caches: not part of any sample.
        call()
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds

    return block


def interleaved(
    blocks: Mapping[str, Block],
    *,
    rounds: int = 10,
    block_seconds: float = 0.02,
    most_calls: int = 50,
) -> dict[str, Timing]:
    """Times candidates in turn, round after round, so that a slow moment of the machine hits all.

    A first round, which is not counted, compiles, warms up and decides how many calls fit a block.
    Every round starts with another candidate.

    Args:
        blocks: The candidates by name.
        rounds: How many blocks of each are counted.
        block_seconds: About how long one block should take.
        most_calls: Upper limit of the calls in one block.

    Returns:
        The summary of each candidate.

    Raises:
        ValueError: `rounds` is not positive.

    Example:
        >>> times = interleaved({"a": block_of(lambda: sum(range(100)))}, rounds=3)
        >>> times["a"].median > 0
        True
    """
    if rounds < 1:
        raise ValueError(f"`rounds` must be positive. Received: rounds={rounds}")
    calls: dict[str, int] = {}
    for name, block in blocks.items():
        estimate = min(block(2))
        calls[name] = max(1, min(most_calls, int(block_seconds / max(estimate, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in blocks}
    names = list(blocks)
    for index in range(rounds):
        first = index % len(names) if names else 0
        for name in names[first:] + names[:first]:
            samples[name].extend(blocks[name](calls[name]))
    return {name: Timing.of(seconds) for name, seconds in samples.items()}
