"""What a measurement was taken on: the processor, and the versions of what took part."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

__all__ = ["cpu_name", "last_level_cache_bytes", "usable_cpus", "versions"]


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
