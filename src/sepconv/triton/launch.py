"""Calls of the GPU kernels on tensors of torch: which ones run, on what, in which blocks.

`forward` and `backward` take what the entry points of `sepconv._native` take, tensors in place of
arrays: dense memory in the order of the layouts of Keras, and outputs that the caller allocated.
Shapes and strides of the tensors are those that the caller sees, and say nothing here: where torch
computes on them, they are viewed as what the geometry says.
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
    operands = (x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias)
    if y.numel() == 0:
        return
    with _on_device_of(x):
        _forward(g, *operands, y)


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
    if all(gradient is None for gradient in gradients):
        return
    if dy.numel() == 0 or x.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        if dy.numel() == 0:
            return
    operands = (x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias)
    dy = _viewed(dy, g.y_shape)
    with _on_device_of(x):
        reference, from_output = dy, False
        if g.activation and (y is None or ACTIVATIONS[g.activation] not in _FROM_OUTPUT):
            reference = torch.empty(g.y_shape, dtype=torch.float32, device=x.device)
            _forward(g._replace(activation=0), *operands, reference)
        elif g.activation and y is not None:
            reference, from_output = y, True
        wants_du = any(t is not None for t in (dx, d_depthwise_kernel, d_depthwise_bias))
        du = _between(g, x) if wants_du else None
        u = None
        if d_pointwise_kernel is not None or (wants_du and g.depthwise_activation):
            u = _between(g, x)
            _depthwise(g, x.element_size(), 0)(x, depthwise_kernel, depthwise_bias, None, u)
        stages = _narrow_gradients if tuning.is_narrow(g) else _wide_gradients
        stages(
            g, dy, reference, from_output, u, pointwise_kernel,
            du, d_pointwise_kernel, d_depthwise_bias, d_bias,
        )  # fmt: skip
        del u
        if du is not None and x.numel() > 0:
            _depthwise_gradients(g, du, x, depthwise_kernel, dx, d_depthwise_kernel)


def _viewed(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The memory of a dense tensor in the order in which it lies."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tensor.as_strided(shape, strides)


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """The device to launch on; that all tensors are there is for the door to see."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _precision(x: Tensor) -> str:
    """How float32 is multiplied: torch's switch for convolutions, since this is one."""
    if x.dtype != torch.float32 or not x.is_cuda:
        return "ieee"
    switch: Any = torch.backends.cudnn
    return "tf32" if switch.conv.fp32_precision == "tf32" else "ieee"


# ---------------------------------------------------------------------------------------- launches


class _Launch:
    """A kernel with its grid, sizes and constants.

    What the compiler made is kept and launched without asking it again, which takes it longer than
    the kernels of a small layer.
    """

    def __init__(
        self,
        kernel: str,
        grid: tuple[int, ...],
        sizes: tuple[int, ...],
        warps: int,
        **constants: Any,
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._sizes = sizes
        self._constants = constants
        self._options = {"num_warps": warps, "num_stages": 1}
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        signature = tuple(map(_specialised, tensors))
        known = self._compiled.get(signature)
        if known is not None:
            compiled, rest = known
            compiled[self._grid](*tensors, *rest)
            return
        kernel = getattr(kernels, self._kernel)
        given = (*tensors, *self._sizes)
        compiled = kernel[self._grid](*given, **self._constants, **self._options)
        if compiled is not None:  # The interpreter makes nothing.
            constants = (self._constants[name] for name in kernel.arg_names[len(given) :])
            self._compiled[signature] = compiled, (*self._sizes, *constants)


def _specialised(tensor: Tensor | None) -> Any:
    """What the compiler looks at."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.device.index, tensor.data_ptr() % tuning.VECTOR_BYTES == 0


# What a program adds to the last address before it masks it is well below the difference to 2^31.
_NARROW_ADDRESSES = 2**31 - 2**24


def _is_wide(g: Geometry) -> bool:
    """Whether addresses need 64 bits."""
    pixels = g.batch * g.out_height * g.out_width
    x = g.batch * g.in_height * g.in_width * g.in_channels
    # A window may begin before the image, and end behind it.
    reach = (g.kernel_height * g.dilation_height + g.pad_top) * g.in_width * g.in_channels
    widest = max(g.depthwise_channels, g.out_channels)
    weights = g.depthwise_channels * max(g.out_channels, g.kernel_height * g.kernel_width)
    return max(x + 2 * reach, pixels * widest, weights) >= _NARROW_ADDRESSES


def _sizes(g: Geometry) -> tuple[int, ...]:
    return (
        g.batch, g.in_height, g.in_width, g.out_height, g.out_width, g.pad_top, g.pad_left
    )  # fmt: skip


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


def _walk(kernel: str, g: Geometry, blocks: tuning.StripBlocks, **constants: Any) -> _Launch:
    if blocks.filters:
        constants |= {"BLOCK_FILTERS": blocks.filters, "FILTERS": g.out_channels}
    return _Launch(
        kernel,
        blocks.grid,
        (*_sizes(g), blocks.segments, blocks.rows),
        blocks.warps,
        ROW_STEP=tuning.row_step(g),
        PHASES=tuning.phases(g),
        BLOCK_PIXELS=blocks.pixels,
        BLOCK_DEPTH=blocks.depth,
        **_constants(g),
        **constants,
    )


# ----------------------------------------------------------------------------------------- forward


def _forward(
    g: Geometry,
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    precision = _precision(x)
    launch = _fused(g, x.element_size(), precision)
    if launch is not None:
        launch(x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias, y)
        return
    v = _between(g, x)
    _depthwise(g, x.element_size(), g.depthwise_activation)(
        x, depthwise_kernel, depthwise_bias, None, v
    )
    if y.dtype != x.dtype or x.dtype == torch.float32:
        launch = _pointwise(g, g.depthwise_channels, g.out_channels, False, g.activation, precision)
        launch(v, pointwise_kernel, bias, y)
        return
    _library_pointwise(g, v, _matrix(g, pointwise_kernel), bias, _viewed(y, g.y_shape))
    if g.activation:
        _elementwise(kernels.activate_kernel, y, y, NAME=ACTIVATIONS[g.activation])


@functools.lru_cache(maxsize=4096)
def _fused(g: Geometry, bytes_per_element: int, precision: str) -> _Launch | None:
    blocks = tuning.forward_blocks(g, bytes_per_element)
    if blocks is None:
        return None
    return _walk(
        "forward_kernel",
        g,
        blocks,
        DEPTHWISE_ACTIVATION=ACTIVATIONS[g.depthwise_activation],
        ACTIVATION=ACTIVATIONS[g.activation],
        PRECISION=precision,
        HELD=blocks.holds_taps,
    )


@functools.lru_cache(maxsize=4096)
def _depthwise(
    g: Geometry, bytes_per_element: int, activation: int, slope: int = 0, flipped: bool = False
) -> _Launch:
    blocks = tuning.depthwise_blocks(g, bytes_per_element)
    return _walk(
        "depthwise_kernel",
        g,
        blocks,
        DEPTHWISE_ACTIVATION=ACTIVATIONS[activation],
        SLOPE=ACTIVATIONS[slope],
        FLIPPED=flipped,
        HELD=blocks.holds_taps,
    )


def _between(g: Geometry, x: Tensor) -> Tensor:
    """Memory for u, v or a gradient of them."""
    return x.new_empty(g._replace(out_channels=g.depthwise_channels).y_shape)


@functools.lru_cache(maxsize=4096)
def _pointwise(
    g: Geometry, depth: int, filters: int, transposed: bool, activation: int, precision: str
) -> _Launch:
    """(v, pointwise, bias, y); `transposed`: the kernel lies as (filters, depth)."""
    area = g.out_height * g.out_width
    blocks = tuning.pointwise_blocks(g.batch * area, depth, filters)
    return _Launch(
        "pointwise_kernel",
        blocks.grid,
        (g.batch * area, area),
        blocks.warps,
        DEPTH=depth,
        FILTERS=filters,
        POINTWISE_ROW=1 if transposed else filters,
        POINTWISE_COLUMN=depth if transposed else 1,
        LAYOUT=g.layout,
        ACTIVATION=ACTIVATIONS[activation],
        WIDE=_is_wide(g),
        PRECISION=precision,
        BLOCK_PIXELS=blocks.pixels,
        BLOCK_FILTERS=blocks.filters,
        BLOCK_DEPTH=blocks.depth,
        STAGES=blocks.stages,
    )


def _matrix(g: Geometry, pointwise_kernel: Tensor) -> Tensor:
    """The pointwise kernel, or its gradient, as (channels, filters)."""
    return _viewed(pointwise_kernel, (g.depthwise_channels, g.out_channels))


def _library_pointwise(
    g: Geometry, v: Tensor, pointwise: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Fills y = v @ pointwise + bias, by the library of torch; `pointwise` is a matrix."""
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


# ---------------------------------------------------------------------------------------- backward


def _narrow_gradients(
    g: Geometry,
    dy: Tensor,
    reference: Tensor,
    from_output: bool,
    u: Tensor | None,
    pointwise_kernel: Tensor,
    du: Tensor | None,
    d_pointwise_kernel: Tensor | None,
    d_depthwise_bias: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Fills du and the gradients of the pointwise stage and of the biases, in one kernel."""
    launch, parts = _narrow(g, dy.element_size(), _precision(dy), from_output)
    gradients = (d_pointwise_kernel, d_depthwise_bias, d_bias)
    sums = [None if gradient is None else _partial(parts, gradient) for gradient in gradients]
    launch(dy, reference if g.activation else None, u, pointwise_kernel, du, *sums)
    for gradient, partial in zip(gradients, sums, strict=True):
        _sum_parts(partial, gradient)


@functools.lru_cache(maxsize=4096)
def _narrow(
    g: Geometry, bytes_per_element: int, precision: str, from_output: bool
) -> tuple[_Launch, int]:
    blocks = tuning.narrow_blocks(g, bytes_per_element)
    area = g.out_height * g.out_width
    launch = _Launch(
        "narrow_gradients_kernel",
        blocks.grid,
        (g.batch * area, area, blocks.tiles),
        blocks.warps,
        DEPTH=g.depthwise_channels,
        FILTERS=g.out_channels,
        LAYOUT=g.layout,
        DEPTHWISE_ACTIVATION=ACTIVATIONS[g.depthwise_activation],
        ACTIVATION=ACTIVATIONS[g.activation],
        FROM_OUTPUT=from_output,
        WIDE=_is_wide(g),
        PRECISION=precision,
        BLOCK_PIXELS=blocks.pixels,
        BLOCK_DEPTH=blocks.depth,
        BLOCK_FILTERS=blocks.filters,
        STAGES=blocks.stages,
    )
    return launch, blocks.grid[1]


def _partial(parts: int, gradient: Tensor) -> Tensor:
    return torch.empty((parts, gradient.numel()), dtype=torch.float32, device=gradient.device)


def _sum_parts(partial: Tensor | None, gradient: Tensor | None) -> None:
    """In one order, whatever the device."""
    if partial is None or gradient is None:
        return
    flat = _viewed(gradient, (gradient.numel(),))
    if gradient.dtype == torch.float32:
        torch.sum(partial, 0, out=flat)
    else:
        flat.copy_(partial.sum(0))


def _wide_gradients(
    g: Geometry,
    dy: Tensor,
    reference: Tensor,
    from_output: bool,
    u: Tensor | None,
    pointwise_kernel: Tensor,
    du: Tensor | None,
    d_pointwise_kernel: Tensor | None,
    d_depthwise_bias: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """The same with matrix products of their own."""
    dz = dy
    if g.activation:
        dz = torch.empty_like(dy)
        name = ACTIVATIONS[g.activation]
        _elementwise(kernels.slope_kernel, dy, reference, dz, NAME=name, FROM_OUTPUT=from_output)
    if d_bias is not None:
        d_bias.copy_(_over_pixels(g, dz))
    between = ACTIVATIONS[g.depthwise_activation]
    if d_pointwise_kernel is not None:
        assert u is not None
        v = u
        if g.depthwise_activation:
            v = torch.empty_like(u)
            _elementwise(kernels.activate_kernel, u, v, NAME=between)
        _pointwise_gradient(g, v, dz, d_pointwise_kernel)
        del v
    if du is None:
        return
    if du.dtype == torch.float32:
        product = _pointwise(g, g.out_channels, g.depthwise_channels, True, 0, _precision(du))
        product(dz, pointwise_kernel, None, du)
    else:
        _library_pointwise(g, dz, _matrix(g, pointwise_kernel).t(), None, du)
    if g.depthwise_activation:
        assert u is not None
        _elementwise(kernels.slope_kernel, du, u, du, NAME=between, FROM_OUTPUT=False)
    if d_depthwise_bias is not None:
        d_depthwise_bias.copy_(_over_pixels(g, du))


def _over_pixels(g: Geometry, image: Tensor) -> Tensor:
    return image.sum((0, 1, 2) if g.layout == 0 else (0, 2, 3), dtype=torch.float32)


def _pointwise_gradient(g: Geometry, v: Tensor, dz: Tensor, d_pointwise: Tensor) -> None:
    depth, filters = g.depthwise_channels, g.out_channels
    if g.layout == 0 and v.dtype != torch.float32:
        torch.mm(v.view(-1, depth).t(), dz.view(-1, filters), out=_matrix(g, d_pointwise))
        return
    launch, parts = _pointwise_sums(g, _precision(v))
    partial = _partial(parts, d_pointwise)
    launch(v, dz, partial)
    _sum_parts(partial, d_pointwise)


@functools.lru_cache(maxsize=4096)
def _pointwise_sums(g: Geometry, precision: str) -> tuple[_Launch, int]:
    blocks = tuning.matrix_blocks(g)
    area = g.out_height * g.out_width
    launch = _Launch(
        "pointwise_gradient_kernel",
        blocks.grid,
        (g.batch * area, area),
        blocks.warps,
        DEPTH=g.depthwise_channels,
        FILTERS=g.out_channels,
        LAYOUT=g.layout,
        WIDE=_is_wide(g),
        PRECISION=precision,
        BLOCK_DEPTH=blocks.depth,
        BLOCK_FILTERS=blocks.filters,
        BLOCK_PIXELS=blocks.pixels,
        TILES=blocks.tiles,
        STAGES=blocks.stages,
    )
    return launch, blocks.grid[1]


def _depthwise_gradients(
    g: Geometry,
    du: Tensor,
    x: Tensor,
    kernel: Tensor,
    dx: Tensor | None,
    d_kernel: Tensor | None,
) -> None:
    size = x.element_size()
    if dx is not None:
        turned = _turned(g)
        if turned is not None:
            launch = _depthwise(turned, size, 0, g.input_activation, flipped=True)
            launch(du, kernel, None, x if g.input_activation else None, dx)
        else:
            _gather(g, size)(du, x, kernel, dx)
    if d_kernel is not None:
        launch, parts = _kernel_sums(g, size)
        partial = _partial(parts, d_kernel)
        launch(x, du, partial)
        _sum_parts(partial, d_kernel)


def _turned(g: Geometry) -> Geometry | None:
    """The depthwise stage that takes du to dx, where it is one: without strides and multiplier."""
    pad_top = (g.kernel_height - 1) * g.dilation_height - g.pad_top
    pad_left = (g.kernel_width - 1) * g.dilation_width - g.pad_left
    if (g.stride_height, g.stride_width, g.depth_multiplier) != (1, 1, 1):
        return None
    return g._replace(
        in_height=g.out_height,
        in_width=g.out_width,
        out_height=g.in_height,
        out_width=g.in_width,
        out_channels=g.in_channels,
        pad_top=pad_top,
        pad_left=pad_left,
        input_activation=0,
    )


@functools.lru_cache(maxsize=4096)
def _gather(g: Geometry, bytes_per_element: int) -> _Launch:
    blocks = tuning.gather_blocks(g, bytes_per_element)
    return _Launch(
        "input_gradient_kernel",
        blocks.grid,
        _sizes(g),
        blocks.warps,
        BLOCK_PIXELS=blocks.pixels,
        BLOCK_CHANNELS=blocks.channels,
        **_constants(g),
    )


@functools.lru_cache(maxsize=4096)
def _kernel_sums(g: Geometry, bytes_per_element: int) -> tuple[_Launch, int]:
    blocks = tuning.kernel_gradient_blocks(g, bytes_per_element)
    return _walk("kernel_gradient_kernel", g, blocks), blocks.parts
