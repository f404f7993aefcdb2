"""Hypothesis strategies: whole problems, with sizes that straddle the tile constants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from sepconv import ConvSpec
from sepconv.spec import ACTIVATIONS, Geometry

MAX_MACS = 2_000_000  # Keeps the reference at a few milliseconds.


class Arrays(NamedTuple):
    """What a problem computes on."""

    x: np.ndarray
    depthwise_kernel: np.ndarray
    pointwise_kernel: np.ndarray
    bias: np.ndarray | None
    depthwise_bias: np.ndarray | None
    dy: np.ndarray

    @property
    def forward(self) -> tuple[Any, ...]:
        """In the order of `reference.forward`."""
        return self[:5]

    @property
    def backward(self) -> tuple[Any, ...]:
        """In the order of `reference.backward` and `reference.error_bounds`."""
        return (self.dy, *self[:5])


@dataclass(frozen=True)
class Problem:
    """A complete call. Its repr is enough to run it again."""

    spec: ConvSpec
    batch: int
    height: int
    width: int
    channels: int
    depth_multiplier: int
    kernel_size: tuple[int, int]
    filters: int
    use_bias: bool = True
    use_depthwise_bias: bool = False
    seed: int = 0

    @property
    def spec_kwargs(self) -> dict[str, Any]:
        """The keywords of every door."""
        return {name: getattr(self.spec, name) for name in self.spec.__dataclass_fields__}

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        if self.spec.data_format == "channels_last":
            return (self.batch, self.height, self.width, self.channels)
        return (self.batch, self.channels, self.height, self.width)

    @property
    def geometry(self) -> Geometry:
        between = self.channels * self.depth_multiplier
        return self.spec.resolve(
            self.x_shape,
            (*self.kernel_size, self.channels, self.depth_multiplier),
            (1, 1, between, self.filters),
            (self.filters,) if self.use_bias else None,
            (between,) if self.use_depthwise_bias else None,
        )

    def arrays(self, dtype: Any = np.float64, integers: bool = False) -> Arrays:
        """Random arrays, rounded to `dtype`.

        Scaled so that every activation is met on all its branches; with `integers`, small integers,
        which put many pre-activations exactly on kinks and keep all sums exact.
        """
        g, rng = self.geometry, np.random.default_rng(self.seed)

        def draw(shape: tuple[int, ...], scale: float) -> np.ndarray:
            if integers:
                return rng.integers(-2, 3, shape).astype(dtype)
            return (rng.standard_normal(shape) * scale).astype(dtype)

        taps = g.kernel_height * g.kernel_width
        return Arrays(
            x=draw(g.x_shape, 2.0),
            depthwise_kernel=draw(g.depthwise_kernel_shape, taps**-0.5),
            pointwise_kernel=draw(g.pointwise_kernel_shape, 1.5 * g.depthwise_channels**-0.5),
            bias=draw(g.bias_shape, 1.0) if self.use_bias else None,
            depthwise_bias=draw(g.depthwise_bias_shape, 1.0) if self.use_depthwise_bias else None,
            dy=draw(g.y_shape, 1.0),
        )


def straddling(*constants: int) -> st.SearchStrategy[int]:
    """t - 1, t, t + 1 and 2t + 1 of every constant."""
    return st.sampled_from(
        sorted({size for t in constants for size in (t - 1, t, t + 1, 2 * t + 1) if size >= 1})
    )


@st.composite
def specs(draw: st.DrawFn, activations: tuple[str, ...] = ACTIVATIONS) -> ConvSpec:
    """Every legal combination of hyper-parameters."""
    amounts = st.tuples(st.integers(0, 4), st.integers(0, 4))
    maybe = st.one_of(st.just("linear"), st.sampled_from(activations))
    return ConvSpec(
        strides=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        padding=draw(st.one_of(st.sampled_from(["valid", "same"]), st.tuples(amounts, amounts))),
        dilation_rate=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        data_format=draw(st.sampled_from(["channels_last", "channels_first"])),
        activation=draw(st.sampled_from(activations)),
        input_activation=draw(maybe),
        depthwise_activation=draw(maybe),
    )


@st.composite
def problems(
    draw: st.DrawFn,
    constants: dict[str, int] | None = None,
    activations: tuple[str, ...] = ACTIVATIONS,
) -> Problem:
    """Problems of moderate size.

    Args:
        draw: Supplied by Hypothesis.
        constants: `_native.tile_constants(...)`. One direction of most problems (pixels of a row,
            pixels of an image, channels or filters) then straddles one of them.
        activations: Those that may occur.
    """
    spec = draw(specs(activations))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    batch = draw(st.sampled_from([1, 1, 1, 2, 2, 3, 3, 3, 3, 0]))
    multiplier = draw(st.sampled_from([1, 1, 2, 3]))
    sizes = [draw(_extent(spec, axis, kernel[axis], 9)) for axis in (0, 1)]
    channels, filters = (draw(st.sampled_from(range(1, 14))) for _ in range(2))
    if constants is not None:
        c = constants
        straddled = draw(st.sampled_from(["pixels", "image", "channels", "filters", "nothing"]))
        if straddled == "pixels":
            # A row of about as many outputs as the constant says, in an image of few rows.
            outputs = draw(straddling(c["rows"], c["forward_pixels"], c["backward_pixels"]))
            sizes = [draw(_extent(spec, 0, kernel[0], 1)), 0]
            sizes[1] = _extent_for(spec, 1, kernel[1], outputs)
        elif straddled == "image":  # Several chunks of several rows each.
            sizes = [
                _extent_for(spec, axis, kernel[axis], draw(st.sampled_from(range(8, 26))))
                for axis in (0, 1)
            ]
            channels, filters = (draw(st.sampled_from(range(1, 6))) for _ in range(2))
        elif straddled == "channels":
            channels = draw(straddling(c["lanes"], c["rows"], c["columns"], c["backward_channels"]))
        elif straddled == "filters":
            filters = draw(straddling(c["lanes"], c["columns"]))
    problem = Problem(
        spec=spec,
        batch=batch,
        height=sizes[0],
        width=sizes[1],
        channels=channels,
        depth_multiplier=multiplier,
        kernel_size=kernel,
        filters=filters,
        use_bias=draw(st.booleans()),
        use_depthwise_bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
    return _trimmed(problem)


def _padding_total(spec: ConvSpec, axis: int) -> int:
    return 0 if isinstance(spec.padding, str) else sum(spec.padding[axis])


def _reach(spec: ConvSpec, axis: int, kernel: int) -> int:
    return (kernel - 1) * spec.dilation_rate[axis] + 1


def _extent(spec: ConvSpec, axis: int, kernel: int, most: int) -> st.SearchStrategy[int]:
    """Input sizes that give some output, and rarely the least legal one, which may give none."""
    if spec.padding == "same":
        return st.sampled_from(range(1, most + 2))
    fits = _reach(spec, axis, kernel) - _padding_total(spec, axis)
    least = max(1, fits - spec.strides[axis])
    sizes = list(range(max(1, fits), max(1, fits) + most + 1))
    return st.sampled_from(sizes if least in sizes else [*sizes, *sizes, least])


def _extent_for(spec: ConvSpec, axis: int, kernel: int, outputs: int) -> int:
    """An input size with this many outputs, or as near as it goes."""
    if spec.padding == "same":
        return outputs * spec.strides[axis]
    reach = _reach(spec, axis, kernel)
    return max(1, (outputs - 1) * spec.strides[axis] + reach - _padding_total(spec, axis))


def _trimmed(problem: Problem) -> Problem:
    """The problem, with a batch and filters that it can afford."""
    for change in ({"batch": 1}, {"filters": 3}, {"depth_multiplier": 1}, {"channels": 5}):
        if problem.geometry.macs <= MAX_MACS:
            break
        problem = replace(problem, **change)
    return problem


# One of each way to differentiate: multilinear, with what surrounds it, with a stage between.
KINDS: dict[str, dict[str, Any]] = {
    "multilinear": {},
    "biases": {"use_bias": True, "use_depthwise_bias": True},
    "saves-output": {"activation": "tanh", "use_bias": True},
    "saves-nothing": {"activation": "silu", "input_activation": "gelu", "use_bias": True},
    "between": {
        "activation": "sigmoid",
        "depthwise_activation": "tanh",
        "use_depthwise_bias": True,
    },
}


def small_problem(
    use_bias: bool = False, use_depthwise_bias: bool = False, **arguments: Any
) -> Problem:
    return Problem(
        spec=ConvSpec(strides=(1, 2), padding="same", dilation_rate=(2, 1), **arguments),
        batch=2,
        height=3,
        width=4,
        channels=2,
        depth_multiplier=2,
        kernel_size=(2, 3),
        filters=3,
        use_bias=use_bias,
        use_depthwise_bias=use_depthwise_bias,
    )


def odd_problem(**arguments: Any) -> Problem:
    """With a kernel that is not square, several multiples, and all biases."""
    return Problem(
        spec=ConvSpec(**arguments),
        batch=2,
        height=8,
        width=7,
        channels=3,
        depth_multiplier=2,
        kernel_size=(3, 2),
        filters=4,
        use_bias=True,
        use_depthwise_bias=True,
    )
