"""Calls of the GPU kernels on tensors of torch: which ones run, on what, in which blocks.

`forward` and `backward` take what the entry points of `sepconv._native` take, tensors in place of
arrays: dense ones of the layouts of Keras, and outputs that the caller allocated.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sepconv.spec import ACTIVATIONS, Geometry
from sepconv.triton import kernels, tuning

__all__ = ["backward", "forward"]

_FROM_OUTPUT = frozenset({"relu", "relu6", "leaky_relu", "sigmoid", "tanh", "hard_sigmoid", "elu"})
"""Activations whose slope follows from their output."""


def forward(
    geometry: npt.NDArray[np.int64],
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """Fills y."""
    g = Geometry(*geometry.tolist())
    with _device(x):
        _forward(g, x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias, y)


def backward(
    geometry: npt.NDArray[np.int64],
    dy: Tensor,
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    dx: Tensor | None,
    d_depthwise_kernel: Tensor | None,
    d_pointwise_kernel: Tensor | None,
    d_depthwise_bias: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Fills the gradients that are not None; `y` is the output, or None."""
    g = Geometry(*geometry.tolist())
    gradients = (dx, d_depthwise_kernel, d_pointwise_kernel, d_depthwise_bias, d_bias)
    wanted = [gradient for gradient in gradients if gradient is not None]
    if dy.numel() == 0:
        for gradient in wanted:
            gradient.zero_()
        return
    if not wanted:
        return
    operands = (x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias)
    with _device(x):
        reference, from_output = dy, False
        if g.activation and (y is None or ACTIVATIONS[g.activation] not in _FROM_OUTPUT):
            reference = torch.empty(g.y_shape, dtype=torch.float32, device=x.device)
            _fused(g._replace(activation=0), *operands, reference)
        elif g.activation and y is not None:
            reference, from_output = y, True
        compute = _narrow_gradients if tuning.is_narrow(g) else _wide_gradients
        du = compute(g, dy, reference, from_output, *operands[:4], *gradients)
        if du is not None:
            _depthwise_gradients(g, du, x, depthwise_kernel, dx, d_depthwise_kernel)


def _device(x: Tensor) -> AbstractContextManager[Any]:
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _precision(x: Tensor) -> str:
    """How float32 is multiplied: torch's switch for convolutions, since this is one."""
    if x.dtype != torch.float32 or not x.is_cuda:
        return "ieee"
    switch: Any = torch.backends.cudnn
    return "tf32" if switch.conv.fp32_precision == "tf32" else "ieee"


_SIZES = ("batch", "in_height", "in_width", "out_height", "out_width", "pad_top", "pad_left")
# What a program adds to the last address before it masks it is well below this.
_NARROW_ADDRESSES = 2**31 - 2**24


@functools.lru_cache(maxsize=4096)
def _sizes(g: Geometry) -> tuple[int, ...]:
    return tuple(getattr(g, name) for name in _SIZES)


@functools.lru_cache(maxsize=4096)
def _constants(g: Geometry) -> dict[str, Any]:
    """What the compiler knows of a call."""
    return {
        "CHANNELS": g.in_channels,
        "MULTIPLIER": g.depth_multiplier,
        "KERNEL_HEIGHT": g.kernel_height,
        "KERNEL_WIDTH": g.kernel_width,
        "STRIDE_HEIGHT": g.stride_height,
        "STRIDE_WIDTH": g.stride_width,
        "DILATION_HEIGHT": g.dilation_height,
        "DILATION_WIDTH": g.dilation_width,
        "LAYOUT": g.layout,
        "INPUT_ACTIVATION": ACTIVATIONS[g.input_activation],
        "WIDE": _is_wide(g),
    }


def _is_wide(g: Geometry) -> bool:
    """Whether addresses need 64 bits."""
    pixels = g.batch * g.out_height * g.out_width
    x = g.batch * g.in_height * g.in_width * g.in_channels
    # A window may begin before the image, and end behind it.
    reach = (g.kernel_height * g.dilation_height + g.pad_top) * g.in_width * g.in_channels
    widest = max(g.depthwise_channels, g.out_channels)
    weights = g.depthwise_channels * max(g.out_channels, g.kernel_height * g.kernel_width)
    return max(x + 2 * reach, pixels * widest, weights) >= _NARROW_ADDRESSES


def _forward(
    g: Geometry,
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    if y.numel() == 0:
        return
    if tuning.forward_blocks(g, x.element_size()) is not None:
        _fused(g, x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias, y)
        return
    v = _depthwise(g, x, depthwise_kernel, depthwise_bias, g.depthwise_activation)
    if x.dtype == torch.float32:
        _pointwise(g, v, pointwise_kernel, bias, y, ACTIVATIONS[g.activation])
        return
    _library_pointwise(g, v, pointwise_kernel[0, 0], bias, y)
    if g.activation:
        _elementwise(kernels.activate_kernel, y, y, NAME=ACTIVATIONS[g.activation])


def _fused(
    g: Geometry,
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """The forward pass in one kernel."""
    blocks = tuning.forward_blocks(g, x.element_size())
    if blocks is None:  # z, to take slopes from: rounded nowhere.
        pixels = g.batch * g.out_height * g.out_width
        blocks = tuning.pointwise_blocks(pixels, g.depthwise_channels, g.out_channels)
    _launch_forward(
        g,
        blocks,
        x,
        depthwise_kernel,
        pointwise_kernel,
        depthwise_bias,
        bias,
        y,
        POINTWISE_ROW=g.out_channels,
        POINTWISE_COLUMN=1,
        DEPTHWISE_ACTIVATION=ACTIVATIONS[g.depthwise_activation],
        ACTIVATION=ACTIVATIONS[g.activation],
        **_constants(g),
    )


def _launch_forward(
    g: Geometry,
    blocks: tuning.PointwiseBlocks,
    x: Tensor,
    kernel: Tensor | None,
    pointwise: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    **constants: Any,
) -> None:
    tiles = _tiles(g, blocks.pixels, blocks.tile_width)
    grid = (tiles * -(-g.out_channels // blocks.filters),)
    kernels.forward_kernel[grid](
        x,
        kernel,
        pointwise,
        depthwise_bias,
        bias,
        y,
        *_sizes(g),
        FILTERS=g.out_channels,
        PRECISION=_precision(x),
        BLOCK_PIXELS=blocks.pixels,
        TILE_WIDTH=blocks.tile_width,
        BLOCK_FILTERS=blocks.filters,
        BLOCK_DEPTH=blocks.depth,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
        **constants,
    )


def _tiles(g: Geometry, pixels: int, width: int) -> int:
    if width == 0:
        return -(-g.batch * g.out_height * g.out_width // pixels)
    return -(-g.batch * g.out_height // (pixels // width)) * -(-g.out_width // width)


def _depthwise(
    g: Geometry, x: Tensor, kernel: Tensor, depthwise_bias: Tensor | None, activation: int
) -> Tensor:
    v = _between(g, x)
    blocks = tuning.depthwise_blocks(g, x.element_size())
    grid = (_tiles(g, blocks.pixels, blocks.tile_width) * -(-g.depthwise_channels // blocks.depth),)
    kernels.depthwise_kernel[grid](
        x,
        kernel,
        depthwise_bias,
        v,
        *_sizes(g),
        DEPTHWISE_ACTIVATION=ACTIVATIONS[activation],
        BLOCK_PIXELS=blocks.pixels,
        TILE_WIDTH=blocks.tile_width,
        BLOCK_DEPTH=blocks.depth,
        num_warps=blocks.warps,
        **_constants(g),
    )
    return v


def _between(g: Geometry, x: Tensor) -> Tensor:
    """Memory for u, v or a gradient of them."""
    return x.new_empty(g._replace(out_channels=g.depthwise_channels).y_shape)


def _pointwise(
    g: Geometry, v: Tensor, pointwise: Tensor, bias: Tensor | None, y: Tensor, activation: str
) -> None:
    """Y = activation(v @ pointwise + bias)."""
    blocks = tuning.pointwise_blocks(v.numel() // g.depthwise_channels, g.depthwise_channels,
                                     g.out_channels)  # fmt: skip
    strides = (g.out_channels, 1)
    _launch_pointwise(g, blocks, v, pointwise, bias, y, strides, activation)


def _launch_pointwise(
    g: Geometry,
    blocks: tuning.PointwiseBlocks,
    v: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    y: Tensor,
    strides: tuple[int, int],
    activation: str,
) -> None:
    plain = g._replace(
        in_channels=g.depthwise_channels,
        depth_multiplier=1,
        kernel_height=1,
        kernel_width=1,
        input_activation=0,
    )
    _launch_forward(
        plain,
        blocks,
        v,
        None,
        pointwise,
        None,
        bias,
        y,
        POINTWISE_ROW=strides[0],
        POINTWISE_COLUMN=strides[1],
        DEPTHWISE_ACTIVATION="linear",
        ACTIVATION=activation,
        **_constants(plain),
    )


def _library_pointwise(
    g: Geometry, v: Tensor, pointwise: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Y = v @ pointwise + bias, by the library of torch. `pointwise`: (channels, filters)."""
    if g.layout == 0:
        rows = v.view(-1, v.shape[-1])
        out = y.view(-1, y.shape[-1])
        if bias is None:
            torch.mm(rows, pointwise, out=out)
        else:
            torch.addmm(bias, rows, pointwise, out=out)
        return
    planes = v.flatten(2)
    weights = pointwise.t().expand(g.batch, -1, -1)
    if bias is None:
        torch.bmm(weights, planes, out=y.flatten(2))
    else:
        torch.baddbmm(bias[:, None], weights, planes, out=y.flatten(2))


def _elementwise(kernel: Any, *tensors: Tensor, **constants: Any) -> None:
    size = tensors[-1].numel()
    grid = (-(-size // tuning.ELEMENTS),)
    kernel[grid](*tensors, size, BLOCK=tuning.ELEMENTS, num_warps=4, **constants)


# --------------------------------------------------------------------------------------- backward


def _narrow_gradients(
    g: Geometry,
    dy: Tensor,
    reference: Tensor,
    from_output: bool,
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    dx: Tensor | None,
    d_depthwise_kernel: Tensor | None,
    d_pointwise_kernel: Tensor | None,
    d_depthwise_bias: Tensor | None,
    d_bias: Tensor | None,
) -> Tensor | None:
    """Fills the gradients of the pointwise stage and of the biases, and returns du."""
    blocks = tuning.narrow_blocks(g, x.element_size())
    wants_du = any(t is not None for t in (dx, d_depthwise_kernel, d_depthwise_bias))
    du = _between(g, x) if wants_du else None
    shapes = (
        (d_pointwise_kernel, (g.depthwise_channels, g.out_channels)),
        (d_depthwise_bias, (g.depthwise_channels,)),
        (d_bias, (g.out_channels,)),
    )
    sums = [
        None
        if gradient is None
        else torch.empty((blocks.slabs, *shape), dtype=torch.float32, device=x.device)
        for gradient, shape in shapes
    ]
    grid = (-(-g.depthwise_channels // blocks.depth) * blocks.slabs,)
    kernels.narrow_gradients_kernel[grid](
        dy,
        reference,
        x,
        depthwise_kernel,
        pointwise_kernel,
        depthwise_bias,
        du,
        *sums,
        *_sizes(g),
        blocks.tiles,
        FILTERS=g.out_channels,
        DEPTHWISE_ACTIVATION=ACTIVATIONS[g.depthwise_activation],
        ACTIVATION=ACTIVATIONS[g.activation],
        FROM_OUTPUT=from_output,
        PRECISION=_precision(x),
        BLOCK_PIXELS=blocks.pixels,
        TILE_WIDTH=blocks.tile_width,
        BLOCK_FILTERS=blocks.filters,
        BLOCK_DEPTH=blocks.depth,
        SLAB_TILES=blocks.slab_tiles,
        num_warps=blocks.warps,
        num_stages=1,
        **_constants(g),
    )
    for (gradient, _), partial in zip(shapes, sums, strict=True):
        if gradient is not None and partial is not None:
            _sum_slabs(partial, gradient)
    return du if dx is not None or d_depthwise_kernel is not None else None


def _sum_slabs(partial: Tensor, gradient: Tensor) -> None:
    """In one order, whatever the device."""
    gradient.copy_(partial.sum(0).view(gradient.shape))


def _wide_gradients(
    g: Geometry,
    dy: Tensor,
    reference: Tensor,
    from_output: bool,
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    dx: Tensor | None,
    d_depthwise_kernel: Tensor | None,
    d_pointwise_kernel: Tensor | None,
    d_depthwise_bias: Tensor | None,
    d_bias: Tensor | None,
) -> Tensor | None:
    """The same with stages stored between kernels, which a matrix product then takes."""
    dz = dy
    if g.activation:
        dz = torch.empty_like(dy)
        name = ACTIVATIONS[g.activation]
        _elementwise(kernels.slope_kernel, dy, reference, dz, NAME=name, FROM_OUTPUT=from_output)
    if d_bias is not None:
        d_bias.copy_(_over_pixels(g, dz))
    u = None
    wants_du = any(t is not None for t in (dx, d_depthwise_kernel, d_depthwise_bias))
    if d_pointwise_kernel is not None or (wants_du and g.depthwise_activation):
        u = _depthwise(g, x, depthwise_kernel, depthwise_bias, 0)
    if d_pointwise_kernel is not None:
        assert u is not None
        v = u
        if g.depthwise_activation:
            v = torch.empty_like(u)
            name = ACTIVATIONS[g.depthwise_activation]
            _elementwise(kernels.activate_kernel, u, v, NAME=name)
        _pointwise_gradient(g, v, dz, d_pointwise_kernel)
        del v
    if not wants_du:
        return None
    du = _between(g, x)
    if x.dtype == torch.float32:
        turned = g._replace(
            in_channels=g.out_channels, depth_multiplier=1, out_channels=g.depthwise_channels
        )
        blocks = tuning.pointwise_blocks(
            du.numel() // g.depthwise_channels, g.out_channels, g.depthwise_channels
        )
        _launch_pointwise(
            turned, blocks, dz, pointwise_kernel, None, du, (1, g.out_channels), "linear"
        )
    else:
        _library_pointwise(g, dz, pointwise_kernel[0, 0].t(), None, du)
    if g.depthwise_activation:
        assert u is not None
        name = ACTIVATIONS[g.depthwise_activation]
        _elementwise(kernels.slope_kernel, du, u, du, NAME=name, FROM_OUTPUT=False)
    if d_depthwise_bias is not None:
        d_depthwise_bias.copy_(_over_pixels(g, du))
    return du


def _over_pixels(g: Geometry, image: Tensor) -> Tensor:
    return image.sum((0, 1, 2) if g.layout == 0 else (0, 2, 3), dtype=torch.float32)


def _pointwise_gradient(g: Geometry, v: Tensor, dz: Tensor, d_pointwise: Tensor) -> None:
    depth, filters = g.depthwise_channels, g.out_channels
    if g.layout == 0 and v.dtype != torch.float32:
        torch.mm(v.view(-1, depth).t(), dz.view(-1, filters), out=d_pointwise[0, 0])
        return
    blocks = tuning.matrix_blocks(g)
    partial = torch.empty((blocks.slabs, depth, filters), dtype=torch.float32, device=v.device)
    grid = (-(-depth // blocks.depth) * -(-filters // blocks.filters), blocks.slabs)
    kernels.pointwise_gradient_kernel[grid](
        v,
        dz,
        partial,
        v.numel() // depth,
        g.out_height * g.out_width,
        DEPTH=depth,
        FILTERS=filters,
        LAYOUT=g.layout,
        WIDE=_is_wide(g),
        PRECISION=_precision(v),
        BLOCK_DEPTH=blocks.depth,
        BLOCK_FILTERS=blocks.filters,
        BLOCK_PIXELS=blocks.pixels,
        SLAB_TILES=blocks.slab_tiles,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
    )
    _sum_slabs(partial, d_pointwise)


def _depthwise_gradients(
    g: Geometry,
    du: Tensor,
    x: Tensor,
    kernel: Tensor,
    dx: Tensor | None,
    d_kernel: Tensor | None,
) -> None:
    """Both in one pass where one program can hold the sums of all taps."""
    together = g.depth_multiplier == 1 and g.kernel_height * g.kernel_width <= tuning.MOST_TAPS
    if dx is not None and d_kernel is not None and not together:
        _depthwise_gradients(g, du, x, kernel, dx, None)
        _depthwise_gradients(g, du, x, kernel, None, d_kernel)
        return
    blocks = tuning.image_gradient_blocks(
        g, x.element_size(), wants_kernel=d_kernel is not None, wants_input=dx is not None
    )
    partial = None
    if d_kernel is not None:
        partial = torch.empty(
            (blocks.slabs, *g.depthwise_kernel_shape), dtype=torch.float32, device=x.device
        )
    channels = g.depthwise_channels if dx is None else g.in_channels
    grid = (-(-channels // blocks.channels), blocks.slabs, blocks.tap_groups)
    kernels.depthwise_gradients_kernel[grid](
        du,
        x,
        kernel,
        dx,
        partial,
        *_sizes(g),
        blocks.tiles,
        BLOCK_PIXELS=blocks.pixels,
        BLOCK_CHANNELS=blocks.channels,
        TAPS=blocks.taps,
        SLAB_TILES=blocks.slab_tiles,
        num_warps=blocks.warps,
        num_stages=1,
        **_constants(g),
    )
    if partial is not None and d_kernel is not None:
        _sum_slabs(partial, d_kernel)
