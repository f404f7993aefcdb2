"""JAX: our door, and two convolutions of `jax.lax`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from sepconv import set_num_threads
from sepconv.bench.engines import Ready, UnableError
from sepconv.bench.problems import MODES, Problem

PACKAGES = ("jax", "jaxlib")


def limit_threads(threads: int) -> None:
    """Limits our kernels; XLA makes its pool as large as the affinity of the process."""
    set_num_threads(threads)


def forget() -> None:
    """Drops what was compiled."""
    jax.clear_caches()


def prepare(name: str, problem: Problem, mode: str, copies: int, threads: int) -> Ready:
    """Makes a candidate ready; see `sepconv.bench.engines`."""
    if name == "jax.lax":
        return ready_of(functools.partial(_two_convolutions, problem), problem, mode, copies)

    from sepconv.jax import separable_conv2d, why_not

    keywords = problem.keywords
    shapes: list[Any] = [
        jax.ShapeDtypeStruct(a.shape, problem.dtype) for a in (problem.x, *problem.weights)
    ]
    reason = why_not(*shapes, **keywords)
    if reason is not None:
        raise UnableError(reason)
    return ready_of(functools.partial(separable_conv2d, **keywords), problem, mode, copies)


def ready_of(layer: Callable[..., Any], problem: Problem, mode: str, copies: int) -> Ready:
    """Makes a function of x and the weights ready.

    Args:
        layer: The function.
        problem: The layer that it computes.
        mode: One of `MODES`.
        copies: How many inputs take turns.
    """

    def cast(array: Any) -> Any:
        # Copied, or a copy of an input might be the same memory.
        return jax.block_until_ready(jax.device_put(np.array(array)).astype(problem.dtype))

    weights = [cast(weight) for weight in problem.weights]
    inputs = itertools.cycle([(cast(problem.x), cast(problem.dy)) for _ in range(copies)])

    def step(dy: Any, *operands: Any) -> Any:
        y, pull = jax.vjp(layer, *operands)
        # With y, or XLA would not compute it.
        return [y, *pull(dy)]

    run_forward, run_step = jax.jit(layer), jax.jit(step)

    def forward() -> Any:
        return jax.block_until_ready([run_forward(next(inputs)[0], *weights)])

    def training() -> Any:
        x, dy = next(inputs)
        return jax.block_until_ready(run_step(dy, x, *weights))

    return Ready(
        forward if mode == MODES[0] else training,
        lambda values: [np.asarray(value.astype("float32")) for value in values],
    )


def _two_convolutions(problem: Problem, x: Any, depthwise: Any, pointwise: Any, bias: Any) -> Any:
    g = problem.geometry
    last = problem.spec.channels_axis == 3
    image = "NHWC" if last else "NCHW"
    shape = (g.kernel_height, g.kernel_width, 1, g.depthwise_channels)
    u = lax.conv_general_dilated(
        x,
        depthwise.reshape(shape),
        problem.spec.strides,
        problem.padding,
        rhs_dilation=problem.spec.dilation_rate,
        dimension_numbers=(image, "HWIO", image),
        feature_group_count=g.in_channels,
    )
    numbers = (image, "HWIO", image)
    y = lax.conv_general_dilated(u, pointwise, (1, 1), "VALID", dimension_numbers=numbers)
    return y + (bias if last else bias.reshape(-1, 1, 1))
