"""What a GPU can do at its best, measured: the rate of matrix products and the speed of copies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["ceilings"]

# Without types.
_CUDA: Any = torch.cuda
_MATRIX = 8192
_COPY_BYTES = 2**30


@functools.cache
def ceilings(dtype: str) -> tuple[float, float] | None:
    """Returns (10^9 operations a second, 10^9 bytes a second) of the current GPU.

    Matrix products of 8192 x 8192 numbers of random bits in the dtype, float32 in what torch's
    switch for convolutions says; a copy of a gibibyte, its reads and its writes counted. The best
    of ten each, taken once a process.

    Args:
        dtype: Name of the element type.

    Returns:
        Both, or `None` where there is no GPU.
    """
    if not torch.cuda.is_available():
        return None
    kind = getattr(torch, dtype)
    a, b = (torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=kind) for _ in range(2))
    c = torch.empty_like(a)
    switches: Any = torch.backends
    before = switches.cuda.matmul.fp32_precision
    try:
        tf32 = switches.cudnn.conv.fp32_precision == "tf32"
        switches.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        operations = 2 * _MATRIX**3 / _best_seconds(lambda: torch.mm(a, b, out=c))
    finally:
        switches.cuda.matmul.fp32_precision = before
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    speed = 2 * _COPY_BYTES / _best_seconds(lambda: target.copy_(source))
    return operations / 1e9, speed / 1e9


def _best_seconds(call: Callable[[], object]) -> float:
    found: list[float] = []
    for _ in range(13):
        start, end = (_CUDA.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e-3)
    return min(found[3:])
