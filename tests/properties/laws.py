"""Algebra that the operation must obey, in every dtype, within bounds that follow from those of it.

Each law makes two or more calls whose true results are tied by an equation, and returns how much of
what rounding may do to the equation it found: above 1 is a fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from strategies import Arrays, Problem

from properties.doors import DOORS, SAVING
from sepconv import reference

Array = np.ndarray


class Call:
    """Results of a call as float64, with the bounds of their errors."""

    def __init__(self, door: str, dtype: np.dtype, problem: Problem, arrays: Arrays) -> None:
        y, gradients = DOORS[door](problem, arrays)
        self.y = y.astype(np.float64)
        self.gradients = reference.Gradients(
            *(None if a is None else a.astype(np.float64) for a in gradients)
        )
        self.y_bound, self.bounds = reference.error_bounds(
            problem.geometry, dtype.name, *arrays.backward, from_output=door in SAVING
        )


class Setting(NamedTuple):
    """Where a law is tried."""

    problem: Problem
    dtype: np.dtype
    door: str

    def call(self, problem: Problem, arrays: Arrays) -> Call:
        return Call(self.door, self.dtype, problem, arrays)


def excess(difference: Any, bound: Any) -> float:
    """The largest share of its bound that an element uses up; NaN counts as infinite."""
    difference, bound = np.abs(np.asarray(difference)), np.asarray(bound)
    if difference.size == 0:
        return 0.0
    shares = np.where(difference == 0.0, 0.0, difference / np.maximum(bound, 1e-300))
    return float(np.nan_to_num(shares, nan=np.inf).max())


def without_activations(problem: Problem) -> Problem:
    names = ("activation", "input_activation", "depthwise_activation")
    return replace(problem, spec=replace(problem.spec, **dict.fromkeys(names, "linear")))


def without_biases(problem: Problem) -> Problem:
    return replace(problem, use_bias=False, use_depthwise_bias=False)


# ------------------------------------------------------------------------------------- linear maps


def _adjoint(setting: Setting, argument: str) -> float:
    """<f(a), dy> = <a, f*(dy)>, where f is linear in the argument a and f* is its gradient."""
    problem = without_biases(without_activations(setting.problem))
    if argument == "bias":
        problem = replace(problem, use_bias=True)
    if argument == "depthwise_bias":
        problem = replace(problem, use_depthwise_bias=True)
    arrays = problem.arrays(setting.dtype)
    if "bias" in argument:  # What the image gives is no part of the map of a bias.
        arrays = arrays._replace(x=np.zeros_like(arrays.x))
    call = setting.call(problem, arrays)
    place = Arrays._fields.index(argument)
    a, dy = arrays[place].astype(np.float64), arrays.dy.astype(np.float64)
    difference = (call.y * dy).sum() - (a * call.gradients[place]).sum()
    allowed = (call.y_bound * np.abs(dy)).sum() + (np.abs(a) * call.bounds[place]).sum()
    # The products of this check are rounded themselves.
    rounding = 2.0**-53 * (dy.size + a.size) * (np.abs(call.y * dy)).sum()
    return excess(difference, allowed + rounding)


def adjoint_x(setting: Setting) -> float:
    return _adjoint(setting, "x")


def adjoint_depthwise_kernel(setting: Setting) -> float:
    return _adjoint(setting, "depthwise_kernel")


def adjoint_pointwise_kernel(setting: Setting) -> float:
    return _adjoint(setting, "pointwise_kernel")


def adjoint_bias(setting: Setting) -> float:
    return _adjoint(setting, "bias")


def adjoint_depthwise_bias(setting: Setting) -> float:
    return _adjoint(setting, "depthwise_bias")


def linear(setting: Setting) -> float:
    """f(p + 2q) = f(p) + 2f(q) and the same for dx, in numbers whose sums no dtype rounds."""
    problem = without_biases(without_activations(setting.problem))
    arrays = problem.arrays(setting.dtype)
    rng = np.random.default_rng(problem.seed)

    def eighths(shape: tuple[int, ...]) -> Array:
        return rng.integers(-16, 17, shape) / 8.0

    x, dy = ((eighths(a.shape), eighths(a.shape)) for a in (arrays.x, arrays.dy))
    p, q, both = (
        setting.call(
            problem,
            arrays._replace(x=one_x.astype(setting.dtype), dy=one_dy.astype(setting.dtype)),
        )
        for one_x, one_dy in (*zip(x, dy, strict=True), (x[0] + 2 * x[1], dy[0] + 2 * dy[1]))
    )
    return max(
        excess(both.y - p.y - 2 * q.y, both.y_bound + p.y_bound + 2 * q.y_bound),
        excess(
            both.gradients.dx - p.gradients.dx - 2 * q.gradients.dx,
            both.bounds.dx + p.bounds.dx + 2 * q.bounds.dx,
        ),
    )


def scaled(setting: Setting) -> float:
    """f(4x) = 4f(x); in float32 and float64 to the bit, for no rounding depends on the scale."""
    problem = without_biases(without_activations(setting.problem))
    arrays = problem.arrays(setting.dtype)
    one = setting.call(problem, arrays)
    four = setting.call(problem, arrays._replace(x=arrays.x * np.asarray(4, setting.dtype)))
    exact = setting.dtype.itemsize >= 4
    return excess(four.y - 4 * one.y, 0.0 if exact else four.y_bound + 4 * one.y_bound)


# ----------------------------------------------------------------------------------------- images


def _part(problem: Problem, image: Array, rows: slice, columns: slice) -> Array:
    """These rows and columns of an image."""
    if problem.geometry.layout == 0:
        return image[:, rows, columns]
    return image[:, :, rows, columns]


def translated(setting: Setting) -> float:
    """Without padding, an image moved by the strides gives an output moved by a pixel."""
    problem = replace(setting.problem, spec=replace(setting.problem.spec, padding="valid"))
    spec = problem.spec
    sizes = [
        max(size, (taps - 1) * dilation + 1)
        for size, taps, dilation in zip(
            (problem.height, problem.width), problem.kernel_size, spec.dilation_rate, strict=True
        )
    ]
    problem = replace(problem, height=sizes[0], width=sizes[1])
    down, right = spec.strides
    larger = replace(problem, height=sizes[0] + down, width=sizes[1] + right)
    arrays = larger.arrays(setting.dtype)
    whole = setting.call(larger, arrays)
    part = setting.call(
        problem,
        arrays._replace(
            x=_part(larger, arrays.x, slice(down, None), slice(right, None)),
            dy=_part(larger, arrays.dy, slice(1, None), slice(1, None)),
        ),
    )
    moved = slice(1, None), slice(1, None)
    return excess(
        _part(larger, whole.y, *moved) - part.y, _part(larger, whole.y_bound, *moved) + part.y_bound
    )


def _same_gradients(one: Call, other: Call, tied: tuple[str, ...]) -> float:
    worst = 0.0
    for name in tied:
        mine, theirs = getattr(one.gradients, name), getattr(other.gradients, name)
        if mine is not None:
            bound = getattr(one.bounds, name) + getattr(other.bounds, name)
            worst = max(worst, excess(mine - theirs, bound))
    return worst


def subsampled(setting: Setting) -> float:
    """Strides keep some outputs of the call without strides; their dy stands between zeros."""
    problem = setting.problem
    g = problem.geometry
    ends = [
        max(0, (out - 1) * stride + (taps - 1) * dilation + 1 - size - start)
        for out, stride, taps, dilation, size, start in zip(
            (g.out_height, g.out_width),
            problem.spec.strides,
            problem.kernel_size,
            problem.spec.dilation_rate,
            (g.in_height, g.in_width),
            (g.pad_top, g.pad_left),
            strict=True,
        )
    ]
    spec = replace(
        problem.spec, strides=(1, 1), padding=((g.pad_top, ends[0]), (g.pad_left, ends[1]))
    )
    full = replace(problem, spec=spec)
    kept = slice(None, None, g.stride_height), slice(None, None, g.stride_width)
    count = slice(g.out_height), slice(g.out_width)

    def taken(image: Array) -> Array:
        return _part(problem, _part(problem, image, *kept), *count)

    arrays = problem.arrays(setting.dtype)
    dy = np.zeros(full.geometry.y_shape, setting.dtype)
    taken(dy)[...] = arrays.dy
    strided, every = setting.call(problem, arrays), setting.call(full, arrays._replace(dy=dy))
    return max(
        excess(strided.y - taken(every.y), strided.y_bound + taken(every.y_bound)),
        _same_gradients(strided, every, reference.Gradients._fields),
    )


def zero_stuffed(setting: Setting) -> float:
    """A dilated kernel is a larger one with zeros between its taps."""
    problem = setting.problem
    (height, width), (down, right) = problem.kernel_size, problem.spec.dilation_rate
    stuffed = replace(
        problem,
        spec=replace(problem.spec, dilation_rate=(1, 1)),
        kernel_size=((height - 1) * down + 1, (width - 1) * right + 1),
    )
    arrays = problem.arrays(setting.dtype)
    kernel = np.zeros(stuffed.geometry.depthwise_kernel_shape, setting.dtype)
    kernel[::down, ::right] = arrays.depthwise_kernel
    dilated = setting.call(problem, arrays)
    plain = setting.call(stuffed, arrays._replace(depthwise_kernel=kernel))
    difference = (
        dilated.gradients.d_depthwise_kernel - plain.gradients.d_depthwise_kernel[::down, ::right]
    )
    bound = dilated.bounds.d_depthwise_kernel + plain.bounds.d_depthwise_kernel[::down, ::right]
    tied = ("dx", "d_pointwise_kernel", "d_bias", "d_depthwise_bias")
    return max(
        excess(dilated.y - plain.y, dilated.y_bound + plain.y_bound),
        excess(difference, bound),
        _same_gradients(dilated, plain, tied),
    )


def repeated_channels(setting: Setting) -> float:
    """A depth multiplier M is M copies of each channel, with a kernel of one multiple each."""
    problem = setting.problem
    g, copies = problem.geometry, problem.depth_multiplier
    axis = 3 if g.layout == 0 else 1
    repeated = replace(problem, channels=g.depthwise_channels, depth_multiplier=1)
    arrays = problem.arrays(setting.dtype)
    kernel_shape = repeated.geometry.depthwise_kernel_shape
    multiple = setting.call(problem, arrays)
    single = setting.call(
        repeated,
        arrays._replace(
            x=np.repeat(arrays.x, copies, axis),
            depthwise_kernel=arrays.depthwise_kernel.reshape(kernel_shape),
        ),
    )

    def summed(image: Array) -> Array:
        shape = list(image.shape)
        shape[axis : axis + 1] = [g.in_channels, copies]
        return image.reshape(shape).sum(axis + 1)

    shape = g.depthwise_kernel_shape
    return max(
        excess(multiple.y - single.y, multiple.y_bound + single.y_bound),
        excess(
            multiple.gradients.dx - summed(single.gradients.dx),
            multiple.bounds.dx + summed(single.bounds.dx),
        ),
        excess(
            multiple.gradients.d_depthwise_kernel
            - single.gradients.d_depthwise_kernel.reshape(shape),
            multiple.bounds.d_depthwise_kernel + single.bounds.d_depthwise_kernel.reshape(shape),
        ),
        _same_gradients(multiple, single, ("d_pointwise_kernel", "d_bias", "d_depthwise_bias")),
    )


LAWS: dict[str, Callable[[Setting], float]] = {
    law.__name__: law
    for law in (
        adjoint_x,
        adjoint_depthwise_kernel,
        adjoint_pointwise_kernel,
        adjoint_bias,
        adjoint_depthwise_bias,
        linear,
        scaled,
        translated,
        subsampled,
        zero_stuffed,
        repeated_channels,
    )
}
