"""Every block size of the GPU kernels, with its reason, and which kernels run a call.

All of it follows from the shape of a call alone, never from the device: partial sums are cut here,
so the cuts are part of the numerical result.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from sepconv.spec import Geometry

__all__ = [
    "ELEMENTS",
    "GatherBlocks",
    "MatrixBlocks",
    "StripBlocks",
    "depthwise_blocks",
    "forward_blocks",
    "gather_blocks",
    "is_narrow",
    "kernel_gradient_blocks",
    "matrix_blocks",
    "narrow_blocks",
    "open_rows",
    "phases",
    "pointwise_blocks",
    "row_step",
]

# Warps that a device of 132 multiprocessors (H100, H200) runs at once, by the registers that a
# thread takes. The fused kernel: 160 to 180, 8 warps a multiprocessor. The depthwise stage: 64, of
# which 16 warps are enough. The gradient of the kernel: 64, 32 warps.
FUSED_WARPS = 132 * 8
DEPTHWISE_WARPS = 132 * 16
GRADIENT_WARPS = 132 * 32

# Programs of a matrix product: two a multiprocessor.
MATRIX_PROGRAMS = 132 * 2

# The fused kernel has all channels and filters of its pixels in one program: the pointwise kernel
# of 128 channels and 256 filters takes 64 KB of shared memory in 16 bits, a quarter of what there
# is.
MOST_DEPTH = 128
MOST_FILTERS = 256

# Backward, the sums of 128 channels x 128 filters stay in registers (64 of each of 256 threads)
# while the pixels pass by; with more filters, matrix products of the library are better.
NARROW_DEPTH = 128
NARROW_FILTERS = 128

# Elements of a thread of what walks down the rows. An open sum takes a register for each, and so do
# three shifts of a row of x (half, in 16 bits); weights of the 8 channels of a 16-byte load take 72
# registers for 9 taps. Up to 8 elements all weights are HELD: converting them for every row took
# half of the instructions. Measured on an H200 in bfloat16, microseconds with 4 / 8 / 16 elements:
# depthwise stage 19x19x728 at batch 32 18.6 / 19.5 / 21, fused 112x112 32>64 - / 35 / 42,
# 147x147 64>128 - / 148 / 125.
DEPTHWISE_ELEMENTS = 4
FUSED_ELEMENTS = {16: 8, 32: 8, 64: 16, 128: 16}
HELD_ELEMENTS = 8
HELD_TAPS = 9

# Elements of a thread of the kernel's gradient: 9 taps x 4 are 36 registers of sums, 25 x 2, and so
# on. With 8 elements and half of the warps 19x19x728 takes 31.4 us, with 4 30.4 us.
TAP_REGISTERS = 64

# Of the widest load of a thread; the compiler looks whether a pointer is a multiple of it.
VECTOR_BYTES = 16

# Element by element: 8 of each of 128 threads, 16 bytes of a 16-bit type.
ELEMENTS = 1024


@dataclass(frozen=True)
class StripBlocks:
    """Of what walks down the rows.

    Attributes:
        pixels: Columns of a strip.
        depth: Depthwise channels of a program.
        filters: Of a program; 0 where there are none.
        rows: Of a segment.
        segments: Of the rows of a phase.
        grid: (strips * segments, phases, blocks of channels).
        warps: Of a program.
        holds_taps: Whether the weights stay in registers from row to row.
    """

    pixels: int
    depth: int
    filters: int
    rows: int
    segments: int
    grid: tuple[int, int, int]
    warps: int
    holds_taps: bool

    @property
    def parts(self) -> int:
        """Partial sums of each gradient."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class MatrixBlocks:
    """Of the matrix products `pointwise_kernel` and `pointwise_gradient_kernel`."""

    pixels: int
    filters: int
    depth: int
    grid: tuple[int, ...]
    warps: int
    stages: int
    tiles: int = 0
    """Blocks of pixels of a part of the sums."""


@dataclass(frozen=True)
class GatherBlocks:
    """Of `input_gradient_kernel`."""

    pixels: int
    channels: int
    grid: tuple[int, int]
    warps: int


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power(size: int, least: int = 16) -> int:
    """The next power of two; a matrix product takes at least 16 in every direction."""
    return max(least, 1 << (size - 1).bit_length())


def phases(g: Geometry) -> int:
    """Into how many sets rows of the output fall that share no row of x.

    Rows t and s share one where their first rows, t and s times the stride, differ by a multiple of
    the dilation.
    """
    return g.dilation_height // math.gcd(g.dilation_height, g.stride_height)


def row_step(g: Geometry) -> int:
    """Rows of x from one output of a phase to the next, counted in dilations."""
    return g.stride_height // math.gcd(g.dilation_height, g.stride_height)


def open_rows(g: Geometry) -> int:
    """Outputs of a phase that are begun and not complete after a step."""
    return _cdiv(g.kernel_height, row_step(g)) - 1


def _strip_blocks(
    g: Geometry,
    depth: int,
    elements: int,
    warps: int,
    warps_at_once: int,
    filters: int = 0,
    extra_rows: int = 0,
) -> StripBlocks:
    """Cuts rows into segments.

    A segment begins with rows that the one before has read as well, `open_rows` of them, and ends
    with the writing of sums, which takes about as long as `extra_rows`. More segments fill the
    device, fewer waste less: the cut is the one whose rounds of programs take the fewest steps.
    """
    pixels = max(1, 32 * warps * elements // depth)
    strips = _cdiv(g.batch * g.out_width, pixels)
    blocks = _cdiv(g.depthwise_channels, depth)
    apart = phases(g)
    rows_of_phase = _cdiv(g.out_height, apart)

    def steps(segments: int) -> int:
        rounds = _cdiv(strips * segments * apart * blocks * warps, warps_at_once)
        return rounds * (_cdiv(rows_of_phase, segments) + open_rows(g) + extra_rows)

    segments = min(range(1, rows_of_phase + 1), key=steps)
    rows = _cdiv(rows_of_phase, segments)
    segments = _cdiv(rows_of_phase, rows)
    holds_taps = elements <= HELD_ELEMENTS and g.kernel_height * g.kernel_width <= HELD_TAPS
    grid = (strips * segments, apart, blocks)
    return StripBlocks(pixels, depth, filters, rows, segments, grid, warps, holds_taps)


@functools.lru_cache(maxsize=4096)
def forward_blocks(g: Geometry, bytes_per_element: int) -> StripBlocks | None:
    """Blocks of the fused kernel; `None` where separate kernels are better.

    With more channels or filters than one program has, the depthwise stage would be computed once
    for each block of filters, which the tensor cores outrun.
    """
    if g.depthwise_channels > MOST_DEPTH or g.out_channels > MOST_FILTERS:
        return None
    depth, filters = _power(g.depthwise_channels), _power(g.out_channels)
    if depth * filters * bytes_per_element > MOST_DEPTH * MOST_FILTERS * 2:
        return None
    elements = FUSED_ELEMENTS[depth]
    if open_rows(g) > 2:
        elements //= 2
    warps = 32 * depth // (32 * elements)  # 32 pixels.
    return _strip_blocks(g, depth, elements, warps, FUSED_WARPS, filters)


@functools.lru_cache(maxsize=4096)
def depthwise_blocks(g: Geometry, bytes_per_element: int) -> StripBlocks:
    """Blocks of the depthwise stage alone, on four warps.

    With channels next to each other in memory, a cache line of them; half of that with more than
    nine taps, whose weights are loaded again for every row.
    """
    if g.layout == 1:
        depth = min(_power(g.depthwise_channels, 4), DEPTHWISE_ELEMENTS)
    else:
        line = 128 // bytes_per_element
        if g.kernel_height * g.kernel_width > HELD_TAPS:
            line //= 2
        depth = min(_power(g.depthwise_channels, 8), line)
    return _strip_blocks(g, depth, DEPTHWISE_ELEMENTS, 4, DEPTHWISE_WARPS)


def is_narrow(g: Geometry) -> bool:
    """Whether one kernel computes du and the gradient of the pointwise kernel."""
    return g.out_channels <= NARROW_FILTERS


@functools.lru_cache(maxsize=4096)
def narrow_blocks(g: Geometry, bytes_per_element: int) -> MatrixBlocks:
    """Blocks of the backward products with few filters.

    A part has at least 1024 pixels: writing and reading its sums (64 x 128 x 4 bytes, twice) is
    then a sixth of reading and writing its pixels (384 bytes each).
    """
    depth = min(_power(g.depthwise_channels), NARROW_DEPTH if bytes_per_element == 2 else 32)
    pixels = 64 if bytes_per_element == 2 else 32
    area = g.batch * g.out_height * g.out_width
    blocks = _cdiv(g.depthwise_channels, depth)
    tiles = max(_cdiv(area * blocks, MATRIX_PROGRAMS * pixels), min(1024, area) // pixels, 1)
    grid = (blocks, _cdiv(area, tiles * pixels))
    return MatrixBlocks(
        pixels, _power(g.out_channels), depth, grid, 8 if depth > 64 else 4, 3, tiles
    )


@functools.lru_cache(maxsize=4096)
def kernel_gradient_blocks(g: Geometry, bytes_per_element: int) -> StripBlocks:
    """Blocks of the gradient of the depthwise kernel. Writing the sums takes about two rows."""
    taps = g.kernel_height * g.kernel_width
    elements = min(4, max(1, 1 << (TAP_REGISTERS // taps).bit_length() - 1))
    depth = min(_power(g.depthwise_channels, 8), 32 if g.layout == 0 else 8)
    return _strip_blocks(g, depth, elements, 4, GRADIENT_WARPS, extra_rows=2)


@functools.lru_cache(maxsize=4096)
def gather_blocks(g: Geometry, bytes_per_element: int) -> GatherBlocks:
    """Blocks of the gradient of x with strides: 16 elements of each of 128 threads."""
    channels = min(_power(g.in_channels, 8), 128 // bytes_per_element if g.layout == 0 else 16)
    pixels = 2048 // channels
    area = g.batch * g.in_height * g.in_width
    return GatherBlocks(pixels, channels, (_cdiv(area, pixels), _cdiv(g.in_channels, channels)), 4)


@functools.lru_cache(maxsize=4096)
def pointwise_blocks(pixels: int, depth: int, filters: int) -> MatrixBlocks:
    """Blocks of v @ pointwise: the usual 128 x 128, less where that leaves the device empty."""
    block = min(_power(filters), 128)
    rows = 128
    while rows > 16 and _cdiv(pixels, rows) * _cdiv(filters, block) < MATRIX_PROGRAMS // 2:
        rows //= 2
    grid = (_cdiv(pixels, rows) * _cdiv(filters, block),)
    return MatrixBlocks(rows, block, min(_power(depth), 32), grid, 4 if rows < 128 else 8, 3)


@functools.lru_cache(maxsize=4096)
def matrix_blocks(g: Geometry) -> MatrixBlocks:
    """Blocks of v^T @ dz: a sum over pixels, cut into parts of at least 1024 of them."""
    filters = min(_power(g.out_channels), 128)
    depth = min(_power(g.depthwise_channels), 64)
    pixels = g.batch * g.out_height * g.out_width
    tiles = _cdiv(pixels, 32)
    blocks = _cdiv(g.out_channels, filters) * _cdiv(g.depthwise_channels, depth)
    tiles_of_part = _cdiv(tiles, max(1, min(MATRIX_PROGRAMS // blocks, _cdiv(pixels, 1024))))
    return MatrixBlocks(
        32, filters, depth, (blocks, _cdiv(tiles, tiles_of_part)), 4, 3, tiles_of_part
    )
