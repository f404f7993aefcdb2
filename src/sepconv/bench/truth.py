"""What a candidate must compute, and how far from it a correct result may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sepconv.bench.problems import DTYPES, MODES, Array, Problem
from sepconv.numpy import separable_conv2d, separable_conv2d_grad

__all__ = ["Truth"]

# Depthwise output, pointwise output, and the same two once more on the way back.
_STORES = 4


@dataclass(frozen=True)
class Truth:
    """What a mode must give, and how far rounding may lead away from it.

        allowed = 2 (number of roundings) (unit roundoff) (sum of the absolute terms)

    Sums run in float32; a 16-bit dtype adds the roundings of what is stored between the stages.

    Attributes:
        values: y, for training also its gradients, in float64.
        allowed: The largest correct difference of each element.
    """

    values: Sequence[Array]
    allowed: Sequence[Array]

    @classmethod
    def of(cls, problem: Problem, mode: str) -> Truth:
        """Computes it by the NumPy door in float64.

        The tests compare that door with `sepconv.reference`, which takes minutes for a large row.

        Args:
            problem: The layer.
            mode: One of `MODES`.
        """
        roundoff = float(np.finfo(np.float32).eps) / 2
        stored = _STORES * 2.0**-8 if DTYPES[problem.dtype] == 2 else 0.0
        sums = _computed(problem.absolute(), mode)
        allowed = [
            2 * (count * roundoff + stored) * total + float(np.finfo(np.float32).tiny)
            for total, count in zip(sums, problem.terms(), strict=False)
        ]
        return cls(_computed(problem, mode), allowed)

    def worst_error(self, results: Sequence[Array]) -> float:
        """Returns the largest error of any element in units of what is allowed.

        Args:
            results: y, for training also its gradients.

        Returns:
            Below 1 for a correct result; infinite if something is missing, has a wrong shape, or is
            not finite.
        """
        if [result.shape for result in results] != [value.shape for value in self.values]:
            return float("inf")
        worst = 0.0
        for result, value, allowed in zip(results, self.values, self.allowed, strict=True):
            if not np.all(np.isfinite(result)):
                return float("inf")
            worst = max(worst, float(np.max(np.abs(result - value) / allowed, initial=0.0)))
        return worst


def _computed(problem: Problem, mode: str) -> list[Array]:
    x, dy, *weights = (
        np.asarray(array, np.float64) for array in (problem.x, problem.dy, *problem.weights)
    )
    y = separable_conv2d(x, *weights, **problem.keywords)
    if mode == MODES[0]:
        return [y]
    return [y, *separable_conv2d_grad(dy, x, *weights, **problem.keywords)]
