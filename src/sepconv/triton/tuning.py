"""Every block size of the GPU kernels, with its reason, and which kernels run a call.

All of it follows from the shape of a call alone, never from the device: partial sums are cut here,
so the cuts are part of the numerical result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sepconv.spec import Geometry

__all__ = [
    "DepthwiseBlocks",
    "GradientBlocks",
    "ImageGradientBlocks",
    "MatrixBlocks",
    "PointwiseBlocks",
    "depthwise_blocks",
    "forward_blocks",
    "image_gradient_blocks",
    "is_narrow",
    "matrix_blocks",
    "narrow_blocks",
    "pointwise_blocks",
]

# Programs that fill a device: the 132 multiprocessors of an H100 or H200. Below it, smaller blocks
# keep more of them busy, at the price of less work for each byte read.
FILL = 132

# All filters of a layer in one block, so that the depthwise stage is computed once: 128 pixels x
# 256 filters in float32 are 128 of the 255 registers of each of 256 threads.
MOST_FILTERS = 256

# Backward, the sums of 64 channels x 128 filters stay in registers (64 of each of 128 threads)
# while the pixels stream by; with more filters three kernels and a matrix product are better.
NARROW_FILTERS = 128

# Unrolled taps: sums of their gradients stay in registers. More are done in groups.
MOST_TAPS = 49
TAP_GROUP = 25

# More taps than these are left to torch: the code of a kernel grows with them.
LIMIT_TAPS = 225

# Least pixels of a slab of the gradients of the pointwise kernel. Writing and reading its sums
# (64 x 128 x 4 bytes, twice) is then an eighth of reading its pixels (512 bytes each).
SLAB_PIXELS = 1024

# Element by element: 8 of each of 128 threads, 16 bytes of a 16-bit type.
ELEMENTS = 1024


@dataclass(frozen=True)
class PointwiseBlocks:
    """Of `forward_kernel`."""

    pixels: int
    tile_width: int
    filters: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DepthwiseBlocks:
    """Of `depthwise_kernel`."""

    pixels: int
    tile_width: int
    depth: int
    warps: int


@dataclass(frozen=True)
class GradientBlocks:
    """Of `narrow_gradients_kernel`."""

    pixels: int
    tile_width: int
    filters: int
    depth: int
    slab_tiles: int
    tiles: int
    slabs: int
    warps: int


@dataclass(frozen=True)
class MatrixBlocks:
    """Of `pointwise_gradient_kernel`."""

    pixels: int
    filters: int
    depth: int
    slab_tiles: int
    slabs: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ImageGradientBlocks:
    """Of `depthwise_gradients_kernel`."""

    pixels: int
    channels: int
    taps: int
    tap_groups: int
    slab_tiles: int
    tiles: int
    slabs: int
    warps: int


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power(size: int, least: int = 16) -> int:
    """The next power of two; a matrix product takes at least 16 in every direction."""
    return max(least, 1 << (size - 1).bit_length())


def _pixels(g: Geometry) -> int:
    return g.batch * g.out_height * g.out_width


def tile_width(g: Geometry, pixels: int) -> int:
    """Columns of a tile of so many pixels of the output; 0 for pixels one after the other.

    A rectangle reads fewer pixels of x around its own, and wastes those beyond the edge. What is
    chosen reads the fewest pixels of x for each pixel of the output.
    """
    reach_height = (g.kernel_height - 1) * g.dilation_height + 1
    reach_width = (g.kernel_width - 1) * g.dilation_width + 1

    def read(rows: int, columns: int) -> int:
        height = (rows - 1) * g.stride_height + min(reach_height, rows * g.kernel_height)
        width = (columns - 1) * g.stride_width + min(reach_width, columns * g.kernel_width)
        return height * width

    # One after the other: whole rows, and the two ends.
    best, least = 0, read(_cdiv(pixels, g.out_width) + 1, g.out_width) / pixels
    # With pixels next to each other in memory, a warp wants 32 of them.
    for columns in (8, 16, 32) if g.layout == 0 else (32, 64):
        rows = pixels // columns
        if rows < 2:
            continue
        area = _cdiv(g.batch * g.out_height, rows) * _cdiv(g.out_width, columns) * pixels
        cost = read(rows, columns) / pixels * area / _pixels(g)
        if cost < least:
            best, least = columns, cost
    return best


@functools.lru_cache(maxsize=4096)
def forward_blocks(g: Geometry, bytes_per_element: int) -> PointwiseBlocks | None:
    """Blocks of the one fused kernel; `None` where separate kernels are better.

    With more filters than one block has, the depthwise stage would be computed once for each block:
    25 instructions an element, which tensor cores outrun (kernels of 16 bits), unless the device is
    far from full anyway.
    """
    few = _pixels(g) * _cdiv(g.out_channels, 64) <= 64 * 2 * FILL
    if g.out_channels > MOST_FILTERS and not few:
        return None
    filters = min(_power(g.out_channels), MOST_FILTERS if bytes_per_element == 2 else 128)
    pixels = 128
    while pixels > 16 and _cdiv(_pixels(g), pixels) * _cdiv(g.out_channels, filters) < FILL:
        if pixels == 32 and filters > 64:
            filters //= 2
        else:
            pixels //= 2
    depth = min(_power(g.depthwise_channels), 64 if bytes_per_element == 2 else 32)
    # Of the loads of all taps, 9 x 8 elements of a thread are under way at once: registers for them
    # are left with at most 16 elements of u. They would not fit into shared memory: no stages.
    warps = 8 if pixels * depth >= 128 * 32 else 4
    return PointwiseBlocks(pixels, tile_width(g, pixels), filters, depth, warps, 1)


@functools.lru_cache(maxsize=4096)
def pointwise_blocks(pixels: int, depth: int, filters: int) -> PointwiseBlocks:
    """Blocks of a matrix product of images, without a depthwise stage."""
    block = min(_power(filters), 128)
    rows = 128
    while rows > 16 and _cdiv(pixels, rows) * _cdiv(filters, block) < FILL:
        rows //= 2
    return PointwiseBlocks(rows, 0, block, min(_power(depth), 32), 4 if rows < 128 else 8, 3)


@functools.lru_cache(maxsize=4096)
def depthwise_blocks(g: Geometry, bytes_per_element: int) -> DepthwiseBlocks:
    """Blocks of the depthwise stage alone: 16 elements of each of 128 threads."""
    depth = min(_power(g.depthwise_channels), 128 // bytes_per_element)
    pixels = 2048 // depth
    if g.layout == 1:
        depth, pixels = min(depth, 16), 128
    return DepthwiseBlocks(pixels, tile_width(g, pixels), depth, 4)


def is_narrow(g: Geometry) -> bool:
    """Whether one kernel computes du and the gradient of the pointwise kernel."""
    return g.out_channels <= NARROW_FILTERS


@functools.lru_cache(maxsize=4096)
def narrow_blocks(g: Geometry, bytes_per_element: int) -> GradientBlocks:
    """Blocks of the backward pass with few filters."""
    filters = _power(g.out_channels)
    depth = min(_power(g.depthwise_channels), 64 if bytes_per_element == 2 else 32)
    pixels = 64 if bytes_per_element == 2 else 32
    width = tile_width(g, pixels)
    tiles = _tiles(g, pixels, width)
    blocks = _cdiv(g.depthwise_channels, depth)
    # Four programs a multiprocessor, of enough pixels each.
    slab_tiles = max(_cdiv(tiles * blocks, 4 * FILL), min(_cdiv(SLAB_PIXELS, pixels), tiles))
    return GradientBlocks(
        pixels,
        width,
        filters,
        depth,
        slab_tiles,
        tiles,
        _cdiv(tiles, slab_tiles),
        8 if depth * filters >= 64 * 128 else 4,
    )


def _tiles(g: Geometry, pixels: int, width: int) -> int:
    if width == 0:
        return _cdiv(_pixels(g), pixels)
    return _cdiv(g.batch * g.out_height, pixels // width) * _cdiv(g.out_width, width)


@functools.lru_cache(maxsize=4096)
def matrix_blocks(g: Geometry) -> MatrixBlocks:
    """Blocks of the gradient of the pointwise kernel alone."""
    filters = min(_power(g.out_channels), 128)
    depth = min(_power(g.depthwise_channels), 64)
    pixels = 32
    tiles = _cdiv(_pixels(g), pixels)
    blocks = _cdiv(g.out_channels, filters) * _cdiv(g.depthwise_channels, depth)
    slabs = max(1, min(2 * FILL // blocks, _cdiv(_pixels(g), SLAB_PIXELS)))
    slab_tiles = _cdiv(tiles, slabs)
    return MatrixBlocks(pixels, filters, depth, slab_tiles, _cdiv(tiles, slab_tiles), 4, 3)


@functools.lru_cache(maxsize=4096)
def image_gradient_blocks(
    g: Geometry, bytes_per_element: int, *, wants_kernel: bool, wants_input: bool
) -> ImageGradientBlocks:
    """Blocks of the gradients of the depthwise stage.

    The sums of all taps stay in registers: 9 taps x 8 elements of a thread, 25 x 4, 49 x 2.
    """
    all_taps = g.kernel_height * g.kernel_width
    if wants_input and not wants_kernel:
        taps, elements, channels = all_taps, 8, g.in_channels
    else:
        taps = all_taps if all_taps <= MOST_TAPS else TAP_GROUP
        elements = 8 if taps <= 9 else 4 if taps <= 25 else 2
        channels = g.in_channels if wants_input else g.depthwise_channels
    block = min(_power(channels, 8), 16 * elements // (bytes_per_element // 2))
    pixels = 128 * elements // block
    if g.layout == 1:  # Pixels are neighbours in memory.
        block, pixels = 4 * elements, 32
    tiles = _cdiv(g.batch * g.in_height * g.in_width, pixels)
    blocks = _cdiv(channels, block)
    # Eight programs a multiprocessor; a slab of at least 16 tiles reads neighbouring rows from L1.
    slab_tiles = max(_cdiv(tiles * blocks, 8 * FILL), min(16, _cdiv(tiles * blocks, 2 * FILL)))
    return ImageGradientBlocks(
        pixels, block, taps, _cdiv(all_taps, taps), slab_tiles, tiles, _cdiv(tiles, slab_tiles), 4
    )
