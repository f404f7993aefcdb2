"""What a call takes at least, and how the CPU kernels cut it into work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

from sepconv import backends
from sepconv.spec import ConvSpec, Geometry

if TYPE_CHECKING:
    from sepconv.triton.explanation import KernelPlan

__all__ = ["Explanation", "GpuExplanation", "Work", "backward_work", "explain", "forward_work"]

_ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Work:
    """Least arithmetic and memory traffic of a pass.

    Attributes:
        flops: Floating-point operations; a multiply-add counts as two.
        bytes: Every input read once and every output written once. The depthwise output is neither.
        product_flops: Those of `flops` in products of matrices, the pointwise stage.
    """

    flops: int
    bytes: int
    product_flops: int = 0

    def __add__(self, other: Work) -> Work:
        """Returns the work of one pass after the other."""
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.product_flops + other.product_flops,
        )

    def limit(
        self, gflops: float, gigabytes_per_second: float, product_gflops: float | None = None
    ) -> float:
        """Returns the least time in seconds on a machine with these peaks.

            max(arithmetic, bytes / peak of memory)

        where arithmetic takes `flops / peak`, or, with units of their own for products of matrices,
        which may work beside the others, as long as the slower of both.

        Args:
            gflops: What the arithmetic units can do, in 10^9 operations a second.
            gigabytes_per_second: What memory can do, in 10^9 bytes a second.
            product_gflops: What the units for products of matrices can do; `None`: there are none.

        Example:
            >>> work = Work(flops=2_000_000, bytes=1_000_000, product_flops=1_800_000)
            >>> work.limit(10.0, 10.0), work.limit(10.0, 10.0, 100.0)
            (0.0002, 0.0001)
        """
        arithmetic = self.arithmetic(gflops, product_gflops)
        return max(arithmetic, self.bytes / gigabytes_per_second * 1e-9)

    def arithmetic(self, gflops: float, product_gflops: float | None = None) -> float:
        """Returns the least time of the arithmetic alone, in seconds; see `limit`."""
        if product_gflops is None:
            return self.flops / gflops * 1e-9
        others = self.flops - self.product_flops
        return max(others / gflops, self.product_flops / product_gflops) * 1e-9


def forward_work(geometry: Geometry, dtype: str = "float32") -> Work:
    """Returns the work of a forward pass: one product for each tap and one for each filter.

    Args:
        geometry: The call, from `ConvSpec.resolve`.
        dtype: Name of the element type, which decides the bytes.

    Example:
        >>> geometry = ConvSpec().resolve((1, 3, 3, 2), (3, 3, 2, 1), (1, 1, 2, 4))
        >>> forward_work(geometry)
        Work(flops=52, bytes=192, product_flops=16)
    """
    g = geometry
    x, y, weights, biases = _elements(g)
    products = 2 * g.batch * g.out_height * g.out_width * g.depthwise_channels * g.out_channels
    return Work(2 * g.macs, (x + y + weights + biases) * _bytes_of(dtype), products)


def backward_work(geometry: Geometry, dtype: str = "float32") -> Work:
    """Returns the work of all gradients, the depthwise output computed again.

    The pointwise stage takes two matrix products, the gradients of its input and of its kernel;
    the depthwise stage three passes over its taps. An activation reads the output as well.

    Args:
        geometry: The call, from `ConvSpec.resolve`.
        dtype: Name of the element type, which decides the bytes.

    Example:
        >>> geometry = ConvSpec().resolve((1, 3, 3, 2), (3, 3, 2, 1), (1, 1, 2, 4))
        >>> backward_work(geometry)
        Work(flops=140, bytes=368, product_flops=32)
    """
    g = geometry
    x, y, weights, biases = _elements(g)
    elements_of_depth = g.batch * g.out_height * g.out_width * g.depthwise_channels
    products = 2 * 2 * elements_of_depth * g.out_channels
    passes = 2 * 3 * elements_of_depth * g.kernel_height * g.kernel_width
    outputs = 2 * y if g.activation else y
    elements = 2 * x + outputs + 2 * weights + 2 * biases
    return Work(products + passes, elements * _bytes_of(dtype), products)


def _elements(g: Geometry) -> tuple[int, int, int, int]:
    """Elements of the input, of the output, of both kernels and of the biases."""
    depth = g.depthwise_channels
    x = g.batch * g.in_height * g.in_width * g.in_channels
    y = g.batch * g.out_height * g.out_width * g.out_channels
    weights = depth * (g.kernel_height * g.kernel_width + g.out_channels)
    return x, y, weights, depth * g.has_depthwise_bias + g.out_channels * g.has_bias


def _bytes_of(dtype: str) -> int:
    if dtype not in _ELEMENT_BYTES:
        known = ", ".join(_ELEMENT_BYTES)
        raise ValueError(f"`dtype` must be one of {known}. Received: dtype={dtype!r}")
    return _ELEMENT_BYTES[dtype]


@dataclass(frozen=True)
class Explanation:
    """How a call would run; `print` shows it as text.

    Attributes:
        geometry: The call in integers.
        dtype: Name of the element type.
        why_not: `None` if a kernel of this library runs the call, else the reason.
        target: Instruction set of the CPU kernels.
        forward: What the forward loop decides, by name: threads, tiles, panels, what is packed or
            staged. Empty if no kernel runs.
        backward: The same for the gradients.
        forward_work: Least arithmetic and bytes of the forward pass.
        backward_work: Least arithmetic and bytes of the gradients.
        gflops: Measured peak of the arithmetic units that the threads of the forward pass have.
        gigabytes_per_second: Measured speed of memory.
        pair_gflops: As `gflops`, of their instructions for products of pairs of bfloat16.
    """

    geometry: Geometry
    dtype: str
    why_not: str | None
    target: str
    forward: Mapping[str, int]
    backward: Mapping[str, int]
    forward_work: Work
    backward_work: Work
    gflops: float
    gigabytes_per_second: float
    pair_gflops: float

    @property
    def forward_limit(self) -> float:
        """Least time of the forward pass on this machine, in seconds."""
        return self.forward_work.limit(*self._ceilings(self.forward))

    @property
    def training_limit(self) -> float:
        """Least time of a forward pass and all gradients on this machine, in seconds."""
        return self.forward_limit + self.backward_work.limit(*self._ceilings(self.backward))

    def _ceilings(self, plan: Mapping[str, int]) -> _Ceilings:
        pairs = self.pair_gflops if plan.get("dot_of_pairs") else None
        return self.gflops, self.gigabytes_per_second, pairs

    def __str__(self) -> str:
        """Returns the explanation as lines of text."""
        g = self.geometry
        lines = [
            f"{g.batch} x {g.in_height}x{g.in_width}x{g.in_channels} -> "
            f"{g.out_height}x{g.out_width}x{g.out_channels}, kernel "
            f"{g.kernel_height}x{g.kernel_width}, {self.dtype}",
            _limit_line("forward", self.forward_work, self._ceilings(self.forward)),
            _limit_line("gradients", self.backward_work, self._ceilings(self.backward)),
        ]
        if self.why_not is not None:
            return "\n".join([*lines, f"no kernel of this library: {self.why_not}"])
        if not self.forward:
            return "\n".join([*lines, "nothing to compute: the output is empty"])
        return "\n".join([*lines, *self._forward_lines(), *self._backward_lines()])

    def _forward_lines(self) -> list[str]:
        plan = self.forward
        if plan["panels_packed_in_time"]:
            weights = "each packed just before its only use: the depthwise output fits the cache"
        elif plan["panels_packed_before"] == plan["panels"]:
            weights = "packed once before the tiles"
        else:
            weights = "read in place: packing would cost as much as the few pixels use them"
        return [
            f"target {self.target}, {_count(plan['threads'], 'thread')}",
            f"forward: {_count(plan['tiles'], 'tile')} of up to {plan['tile_pixels']} pixels, "
            f"filters in {_count(plan['filter_parts'], 'part')}",
            *_product_lines(plan),
            f"  pointwise weights: {_count(plan['panels'], 'panel')} of up to "
            f"{plan['panel_filters']} filters, {weights}",
            f"  input: {self._input_line(plan['input_in_place'])}",
            "  output: "
            + ("written in place" if plan["output_in_place"] else "through a panel in the cache")
            + (", past the caches" if plan["output_past_caches"] else ""),
        ]

    def _backward_lines(self) -> list[str]:
        plan = self.backward
        gradient = "read in place" if plan["output_gradient_in_place"] else "through a copy"
        if plan["output_recomputed"]:
            gradient = "multiplied with the slope beforehand: it needs the forward pass again"
        return [
            f"gradients: {_count(plan['threads'], 'thread')}, "
            f"{_count(plan['channel_slices'], 'slice')} of up to {plan['slice_channels']} "
            f"channels, {_count(plan['slabs'], 'slab')} of images or rows with sums of their own",
            f"  chunks of {plan['chunk_pixels']} pixels; gradient of the output: {gradient}",
            *_product_lines(plan),
        ]

    def _input_line(self, in_place: int) -> str:
        if in_place:
            return "read in place"
        g = self.geometry
        causes = {
            "channels_first": g.layout == 1,
            f"stored as {self.dtype}": _ELEMENT_BYTES[self.dtype] == 2,
            "an activation before the depthwise stage": g.input_activation != 0,
            "a depth multiplier": g.depth_multiplier != 1,
        }
        return "rows staged in the cache: " + ", ".join(
            why for why, holds in causes.items() if holds
        )


@dataclass(frozen=True)
class GpuExplanation:
    """How a call would run on a GPU; `print` shows it as text.

    Attributes:
        geometry: The call in integers.
        dtype: Name of the element type.
        why_not: `None` if kernels of this library run the call, else the reason.
        forward: The kernels of the forward pass, in order; each has `name`, `programs`, `blocks`.
            Empty if no kernel runs.
        backward: The same for all gradients.
        forward_work: Least arithmetic and bytes of the forward pass.
        backward_work: Least arithmetic and bytes of the gradients.
        ceilings: 10^9 operations and 10^9 bytes a second, `None` where nobody measured a GPU.
    """

    geometry: Geometry
    dtype: str
    why_not: str | None
    forward: Sequence[KernelPlan]
    backward: Sequence[KernelPlan]
    forward_work: Work
    backward_work: Work
    ceilings: tuple[float, float] | None

    @property
    def forward_limit(self) -> float:
        """Least time of the forward pass in seconds; NaN without ceilings."""
        return self.forward_work.limit(*self.ceilings) if self.ceilings else math.nan

    @property
    def training_limit(self) -> float:
        """Least time of a forward pass and all gradients in seconds; NaN without ceilings."""
        if not self.ceilings:
            return math.nan
        return self.forward_limit + self.backward_work.limit(*self.ceilings)

    def __str__(self) -> str:
        """Returns the explanation as lines of text."""
        g = self.geometry
        lines = [
            f"{g.batch} x {g.in_height}x{g.in_width}x{g.in_channels} -> "
            f"{g.out_height}x{g.out_width}x{g.out_channels}, kernel "
            f"{g.kernel_height}x{g.kernel_width}, {self.dtype}, on a GPU",
            *(
                _limit_line(name, work, self.ceilings)
                for name, work in (
                    ("forward", self.forward_work),
                    ("gradients", self.backward_work),
                )
            ),
        ]
        if self.why_not is not None:
            return "\n".join([*lines, f"no kernel of this library: {self.why_not}"])
        if not self.forward:
            return "\n".join([*lines, "nothing to compute: the output is empty"])
        for name, plans, reason in (
            ("forward", self.forward, self._forward_reason()),
            ("gradients", self.backward, self._backward_reason()),
        ):
            lines += [f"{name}: {_count(len(plans), 'kernel')}; {reason}"]
            lines += [f"  {plan}" for plan in plans]
        return "\n".join(lines)

    def _forward_reason(self) -> str:
        if len(self.forward) == 1:
            return "the depthwise output stays on the multiprocessor"
        return (
            f"the depthwise output is stored between them: with {self.geometry.out_channels} "
            "filters, computing it once for each block of filters would take longer"
        )

    def _backward_reason(self) -> str:
        if any(plan.name == "narrow_gradients_kernel" for plan in self.backward):
            return (
                "the depthwise output is computed again, and one kernel has all sums of the "
                "pointwise stage"
            )
        return (
            f"the depthwise output is computed again; with {self.geometry.out_channels} filters, "
            "matrix products of their own are faster than sums that stay on the multiprocessors"
        )


def _product_lines(plan: Mapping[str, int]) -> list[str]:
    return ["  products of matrices: of pairs of bfloat16"] if plan["dot_of_pairs"] else []


# Of arithmetic, of memory, and, where they have units of their own, of products of matrices.
_Ceilings: TypeAlias = tuple[float, float, float | None]


def _limit_line(name: str, work: Work, ceilings: _Ceilings | tuple[float, float] | None) -> str:
    amounts = f"{name}: {work.flops / 1e6:.1f} MFLOP, {work.bytes / 1e6:.2f} MB"
    if ceilings is None:
        return f"{amounts}; the ceilings of a GPU are not measured here"
    limit = work.limit(*ceilings)
    bound = "memory" if limit > work.arithmetic(ceilings[0], *ceilings[2:]) else "arithmetic"
    return f"{amounts}, at least {limit * 1e6:.1f} us, bound by {bound}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


@overload
def explain(  # type: ignore[overload-overlap]  # "cuda" is a str as well
    spec: ConvSpec,
    x_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    filters: int,
    dtype: str = ...,
    *,
    depth_multiplier: int = ...,
    use_bias: bool = ...,
    device: Literal["cuda"],
    ceilings: tuple[float, float] | None = ...,
) -> GpuExplanation: ...


@overload
def explain(
    spec: ConvSpec,
    x_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    filters: int,
    dtype: str = ...,
    *,
    depth_multiplier: int = ...,
    use_bias: bool = ...,
    device: str = ...,
    ceilings: tuple[float, float] | None = ...,
) -> Explanation: ...


def explain(
    spec: ConvSpec,
    x_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    filters: int,
    dtype: str = "float32",
    *,
    depth_multiplier: int = 1,
    use_bias: bool = True,
    device: str = "cpu",
    ceilings: tuple[float, float] | None = None,
) -> Explanation | GpuExplanation:
    """Tells how a call would run here: which kernel, how it is cut into work, and its limit.

    The limit is the larger of arithmetic at the measured peak of the FMA units (products of pairs
    of bfloat16: of the instruction for those) and compulsory bytes at the measured speed of memory.
    Measuring takes a fraction of a second, once a process.

    Args:
        spec: The hyper-parameters.
        x_shape: Shape of the input, four integers in the layout of `spec`.
        kernel_size: Height and width of the depthwise kernel.
        filters: Number of output channels.
        dtype: Name of the element type: float32, float64, bfloat16 or float16.
        depth_multiplier: Depthwise channels of each input channel.
        use_bias: Whether a bias is added at the end.
        device: Kind of device that holds the data. `"cuda"` needs torch and triton, and no GPU:
            without one, there is no limit unless `ceilings` are given.
        ceilings: For a GPU, 10^9 operations of its matrix units and 10^9 bytes a second in place of
            measured ones.

    Returns:
        An `Explanation`; for `"cuda"`, a `GpuExplanation`.

    Raises:
        ValueError: sizes that do not fit together, or an unknown dtype.

    Example:
        >>> explanation = explain(ConvSpec(padding="same"), (1, 19, 19, 728), 3, 728)
        >>> explanation.why_not is None
        True
        >>> explanation.forward_work.flops
        387378992
    """
    _bytes_of(dtype)
    height, width = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    x_shape = tuple(x_shape)
    if len(x_shape) != 4:
        raise ValueError(f"`x_shape` must have 4 sizes. Received: x_shape={x_shape}")
    channels = x_shape[spec.channels_axis]
    geometry = spec.resolve(
        x_shape,
        (height, width, channels, depth_multiplier),
        (1, 1, channels * depth_multiplier, filters),
        (filters,) if use_bias else None,
    )
    reason = backends.why_not(geometry, dtype, device)
    if device == "cuda":
        return _explain_on_gpu(geometry, dtype, reason, ceilings)
    from sepconv import _native, machine

    forward, backward = (
        {} if reason else _native.plan(geometry, dtype, wanted) for wanted in (False, True)
    )
    peak = machine.fma_gflops("float64" if dtype == "float64" else "float32")
    return Explanation(
        geometry=geometry,
        dtype=dtype,
        why_not=reason,
        target=_native.cpu_target(),
        forward=forward,
        backward=backward,
        forward_work=forward_work(geometry, dtype),
        backward_work=backward_work(geometry, dtype),
        gflops=peak * forward.get("threads", 1),
        gigabytes_per_second=machine.memory_gigabytes_per_second(),
        pair_gflops=machine.fma_gflops("bfloat16") * forward.get("threads", 1),
    )


def _explain_on_gpu(
    geometry: Geometry, dtype: str, reason: str | None, ceilings: tuple[float, float] | None
) -> GpuExplanation:
    forward: Sequence[KernelPlan] = ()
    backward: Sequence[KernelPlan] = ()
    if reason is None:
        from sepconv.triton.explanation import kernel_plans, measured_ceilings

        forward, backward = kernel_plans(geometry, dtype)
        ceilings = ceilings or measured_ceilings(dtype)
    return GpuExplanation(
        geometry=geometry,
        dtype=dtype,
        why_not=reason,
        forward=forward,
        backward=backward,
        forward_work=forward_work(geometry, dtype),
        backward_work=backward_work(geometry, dtype),
        ceilings=ceilings,
    )
