"""What a measurement was taken on: the processor, and the versions of what took part."""

from __future__ import annotations

import functools
import os
import platform
import time
from importlib import metadata
from pathlib import Path

import numpy as np

__all__ = [
    "cpu_name",
    "fma_gflops",
    "last_level_cache_bytes",
    "memory_gigabytes_per_second",
    "usable_cpus",
    "versions",
]


def cpu_name() -> str:
    """Returns the name of the processor as its maker wrote it.

    Example:
        >>> bool(cpu_name())
        True
    """
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def usable_cpus() -> int:
    """Returns how many CPUs this process may run on.

    Example:
        >>> usable_cpus() >= 1
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache_bytes(default: int = 32 * 2**20) -> int:
    """Returns the size of the largest cache of the first CPU.

    Args:
        default: The answer where the system does not tell.

    Example:
        >>> last_level_cache_bytes() > 0
        True
    """
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:])
        number = text[:-1] if unit else text
        if number.isdigit():
            sizes.append(int(number) * (unit or 1))
    return max(sizes, default=default)


@functools.cache
def fma_gflops(dtype: str = "float32") -> float:
    """Returns the measured peak of one thread in 10^9 floating-point operations a second.

    Independent multiply-adds on registers, counted as two each; the best of a few runs of some
    milliseconds, taken once a process.

    Args:
        dtype: The type that the sums run in, `"float32"` or `"float64"`; `"bfloat16"` for its
            products of pairs, where the target has an instruction for them, else as `"float32"`.

    Example:
        >>> fma_gflops() > 0
        True
    """
    from sepconv import _native

    return max(_native.fma_peak_gflops(dtype) for _ in range(5))


@functools.cache
def memory_gigabytes_per_second() -> float:
    """Returns the measured speed of memory for one thread, in 10^9 bytes a second.

    A copy of an array twice as large as the last-level cache, its reads and its writes counted;
    the best of a few runs, taken once a process.

    Example:
        >>> memory_gigabytes_per_second() > 0
        True
    """
    source = np.ones(2 * last_level_cache_bytes(), np.uint8)
    target = np.empty_like(source)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds) / 1e9


def versions(*packages: str) -> dict[str, str]:
    """Returns the installed version of each package that is installed; `python` comes first.

    Args:
        packages: Names as pip knows them.

    Example:
        >>> list(versions("numpy", "no-such-package"))
        ['python', 'numpy']
    """
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
