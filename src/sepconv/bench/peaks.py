"""The machine at its best: measured peaks that limits refer to."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from sepconv.machine import last_level_cache_bytes

__all__ = ["Peaks", "measure_peaks"]

_REPEATS = 3


class Peaks(NamedTuple):
    """What the threads of a run can do together.

    Attributes:
        gflops: Of their FMA units, in 10^9 operations a second.
        gigabytes_per_second: To and from memory.
        pair_gflops: As `gflops`, of their instructions for products of pairs of bfloat16; 0 where
            nobody looked.
    """

    gflops: float
    gigabytes_per_second: float
    pair_gflops: float = 0.0

    def or_higher(self, other: Peaks) -> Peaks:
        """Returns the higher of each: a virtual machine is not equally fast all the time."""
        return Peaks(*map(max, self, other))

    def of(self, dtype: str) -> tuple[float, float, float | None]:
        """Returns the arguments of `Work.limit` for arrays of a dtype."""
        pairs = self.pair_gflops if dtype == "bfloat16" and self.pair_gflops > 0 else None
        return self.gflops, self.gigabytes_per_second, pairs


def measure_peaks(threads: int) -> Peaks:
    """Measures both peaks with so many threads at once.

    `sepconv.machine` tells the same of one thread, once a process. The speed of memory is the
    better of reading and of copying arrays that together are four times as large as the last-level
    cache; a copy counts what it reads and what it writes. Sums run in float32 whatever the dtype of
    the arrays is, and so do the peaks.

    Args:
        threads: How many CPUs take part.

    Example:
        >>> min(measure_peaks(1)) > 0
        True
    """
    from sepconv import _native  # Measurements on a GPU take only the class from here.

    elements = 4 * last_level_cache_bytes() // threads // 8
    sources = [np.ones(elements, np.float32) for _ in range(threads)]
    targets = [np.ones(elements, np.float32) for _ in range(threads)]

    def read(index: int) -> None:
        sources[index].max()
        targets[index].max()

    def copy(index: int) -> None:
        np.copyto(targets[index], sources[index])

    with ThreadPoolExecutor(threads) as pool:

        def seconds(work: Callable[[int], None]) -> float:
            times = []
            for _ in range(_REPEATS):
                start = time.perf_counter()
                list(pool.map(work, range(threads)))
                times.append(time.perf_counter() - start)
            return min(times)

        moved = sum(array.nbytes for array in sources + targets)
        bandwidth = moved / min(seconds(read), seconds(copy)) / 1e9

        def peak(dtype: str) -> float:
            return max(
                sum(pool.map(lambda _: _native.fma_peak_gflops(dtype), range(threads)))
                for _ in range(_REPEATS)
            )

        return Peaks(peak("float32"), bandwidth, peak("bfloat16"))
