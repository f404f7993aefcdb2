"""The NumPy door."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from sepconv import backends, set_num_threads
from sepconv.bench.engines import Ready, UnableError
from sepconv.bench.problems import DTYPES, MODES, Problem, aligned_copy

PACKAGES = ("sepconv", "numpy")


def limit_threads(threads: int) -> None:
    """Limits the kernels."""
    set_num_threads(threads)


def forget() -> None:
    """Nothing is kept."""


def prepare(name: str, problem: Problem, mode: str, copies: int, threads: int) -> Ready:
    """Makes the door ready; see `sepconv.bench.engines`."""
    from sepconv import numpy as door

    reason = backends.why_not(problem.geometry, problem.dtype)
    if reason is not None:
        raise UnableError(reason)
    dtype: Any = np.float32
    if DTYPES[problem.dtype] == 2:
        try:
            from ml_dtypes import bfloat16 as dtype
        except ModuleNotFoundError:
            raise UnableError(
                "needs ml_dtypes, which has this dtype. Run: pip install ml_dtypes"
            ) from None

    def cast(array: Any) -> Any:
        return aligned_copy(array, dtype)

    keywords = problem.keywords
    weights = [cast(weight) for weight in problem.weights]
    inputs = itertools.cycle([(cast(problem.x), cast(problem.dy)) for _ in range(copies)])

    def forward() -> list[Any]:
        return [door.separable_conv2d(next(inputs)[0], *weights, **keywords)]

    def training() -> list[Any]:
        x, dy = next(inputs)
        y = door.separable_conv2d(x, *weights, **keywords)
        return [y, *door.separable_conv2d_grad(dy, x, *weights, **keywords)]

    if mode != MODES[0]:
        return Ready(training, list)
    if not name.endswith("prepared"):
        return Ready(forward, list)
    layer = door.prepare(*weights, **keywords)
    out = cast(np.empty(problem.geometry.y_shape))
    return Ready(lambda: [layer(next(inputs)[0], out=out)], list)
