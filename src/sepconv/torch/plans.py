"""Plans of calls: all that a call needs to know and that does not depend on the data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sepconv import backends
from sepconv.spec import (
    ConvSpec,
    Geometry,
    IntOrPair,
    Padding,
    canonical_padding,
    canonical_pair,
)
from sepconv.torch.operators import Positions, dtype_name, flat_geometry, kernels_for

TorchPadding: TypeAlias = "str | IntOrPair | Sequence[Sequence[SupportsIndex]]"

# The order of the axes of a weight in memory, as the kernel reads them. Gradients get the same
# strides to the last number, also of axes of size 1, which DistributedDataParallel insists on.
DEPTHWISE_AXES = (1, 2, 3, 0)
POINTWISE_AXES = (2, 3, 1, 0)


class Plan(NamedTuple):
    """A call but for its data."""

    geometry: Geometry
    refusal: str | None
    y_shape: tuple[int, ...]
    y_stride: tuple[int, ...]
    """As the caller sees the output."""
    at_once: bool
    """The kernels can run it without the dispatcher of torch."""
    moved: tuple[tuple[int, tuple[int, ...]], ...]
    """Operands that lie in memory as no kernel reads them, with the strides that one reads."""
    from_torch: bool
    """The caller sees the layouts of torch, not those of Keras."""
    flat: npt.NDArray[np.int64] | None
    kernels: backends.Kernels | None

    def laid_out(self, operands: Sequence[Any]) -> Sequence[Any]:
        """The operands as the caller sees them, in memory as the kernel reads it."""
        if not self.moved:
            return operands
        ready = list(operands)
        for position, stride in self.moved:
            own = operands[position]
            ready[position] = own.new_empty_strided(own.shape, stride).copy_(own)
        return ready

    def as_kernel_reads(self, operands: Sequence[Any]) -> list[Any]:
        """Views of the caller's operands in the layouts of Keras."""
        if not self.from_torch:
            return list(operands)
        x, depthwise, pointwise, *biases = operands
        g = self.geometry
        shape = (g.in_channels, g.depth_multiplier, g.kernel_height, g.kernel_width)
        return [
            self.image_from_caller(x),
            depthwise.reshape(shape).permute(2, 3, 0, 1),
            pointwise.permute(2, 3, 1, 0),
            *biases,
        ]

    def as_caller_sees(self, gradients: Sequence[Any]) -> list[Any]:
        """The reverse, of gradients; those that nobody asked for are None."""
        if not self.from_torch:
            return list(gradients)
        x, depthwise, pointwise, *biases = gradients
        g = self.geometry
        shape = (g.depthwise_channels, 1, g.kernel_height, g.kernel_width)
        return [
            None if x is None else self.image_to_caller(x),
            None if depthwise is None else depthwise.permute(2, 3, 0, 1).reshape(shape),
            None if pointwise is None else pointwise.permute(3, 2, 0, 1),
            *biases,
        ]

    def image_from_caller(self, image: Tensor) -> Tensor:
        """An input, output or gradient of those in the layout of the kernel."""
        return image.permute(0, 2, 3, 1) if self.from_torch and self.geometry.layout == 0 else image

    def image_to_caller(self, image: Tensor) -> Tensor:
        """The reverse."""
        return image.permute(0, 3, 1, 2) if self.from_torch and self.geometry.layout == 0 else image


def torch_padding(padding: Any) -> Padding:
    """The padding of torch, or that of Keras, as the latter."""
    if isinstance(padding, str):
        return canonical_padding(padding)
    try:
        height, width = canonical_pair("padding", padding, minimum=0)
    except (TypeError, ValueError):
        if not hasattr(padding, "__len__") or not any(hasattr(row, "__len__") for row in padding):
            raise
        return canonical_padding(padding)
    return (height, height), (width, width)


def kind_of_device(x: Tensor) -> str:
    """The word for a device in `sepconv.backends`."""
    return "cpu" if x.is_cpu else x.device.type


def planned(
    build: Callable[..., Plan],
    cached: Callable[..., Plan],
    operands: tuple[Any, ...],
    arguments: tuple[Any, ...],
) -> Plan:
    """The plan of a call: it depends on device, dtypes, shapes, strides and the arguments."""
    x, depthwise, pointwise, depthwise_bias, bias = operands
    key = (
        "cpu" if x.is_cpu else x.device.type,
        (x.dtype, x.shape, x.stride()),
        (depthwise.dtype, depthwise.shape, depthwise.stride()),
        (pointwise.dtype, pointwise.shape, pointwise.stride()),
        None
        if depthwise_bias is None
        else (depthwise_bias.dtype, depthwise_bias.shape, depthwise_bias.stride()),
        None if bias is None else (bias.dtype, bias.shape, bias.stride()),
        *arguments,
    )
    try:
        return cached(*key)
    except TypeError:  # Not hashable: symbolic, or wrong, for which the plan finds the words.
        return build(*key)


def torch_plan(device: str, *arguments: Any) -> Plan:
    """(kind of device, facts of the operands, stride, padding, dilation, names) -> plan."""
    *tensors, stride, padding, dilation, names = arguments
    dtype = _one_dtype(
        ("x", "depthwise_weight", "pointwise_weight", "depthwise_bias", "bias"), tensors
    )
    (_, x, x_stride), (_, depthwise, _), (_, pointwise, _) = tensors[:3]
    if len(x) != 4:
        raise ValueError(
            "`x` must have 4 dimensions, (batch, channels, height, width), or 3 without the batch. "
            f"Received: x.shape={tuple(x)}"
        )
    channels = x[1]
    last = _lies_channels_last(x, x_stride)
    spec = ConvSpec(
        strides=canonical_pair("stride", stride),
        padding=torch_padding(padding),
        dilation_rate=canonical_pair("dilation", dilation),
        data_format="channels_last" if last else "channels_first",
        activation=names[0],
        input_activation=names[1],
        depthwise_activation=names[2],
    )
    if len(depthwise) != 4 or depthwise[1] != 1:
        raise ValueError(
            "`depthwise_weight` must have the shape (channels * depth_multiplier, 1, "
            f"kernel_height, kernel_width). Received: depthwise_weight.shape={tuple(depthwise)}"
        )
    if channels < 1 or depthwise[0] % channels != 0:
        raise ValueError(
            f"`depthwise_weight` must have a multiple of the {channels} channels of `x` along axis "
            f"0. Received: x.shape={tuple(x)}, depthwise_weight.shape={tuple(depthwise)}"
        )
    if len(pointwise) != 4 or tuple(pointwise[1:]) != (depthwise[0], 1, 1):
        raise ValueError(
            f"`pointwise_weight` must have the shape (filters, {depthwise[0]}, 1, 1), where "
            f"{depthwise[0]} is channels * depth_multiplier. Received: "
            f"pointwise_weight.shape={tuple(pointwise)}, depthwise_weight.shape={tuple(depthwise)}"
        )
    filters, between, height, width = pointwise[0], *(depthwise[i] for i in (0, 2, 3))
    geometry = spec.resolve(
        (x[0], x[2], x[3], channels) if last else x,
        (height, width, channels, between // channels),
        (1, 1, between, filters),
        *_bias_shapes(tensors),
    )
    # The order of the axes in memory, as the kernel reads them.
    image_axes = (0, 2, 3, 1) if last else (0, 1, 2, 3)
    y_shape = _dealt(geometry.y_shape, image_axes)
    axes = (image_axes, DEPTHWISE_AXES, POINTWISE_AXES)
    return _finished(geometry, device, dtype, y_shape, axes, tensors, from_torch=True)


def keras_plan(
    device: str,
    *arguments: Any,
) -> Plan:
    """(kind of device, facts of the operands, arguments of a `ConvSpec`, names) -> plan."""
    *tensors, strides, padding, dilation_rate, data_format, names = arguments
    dtype = _one_dtype(
        ("x", "depthwise_kernel", "pointwise_kernel", "depthwise_bias", "bias"), tensors
    )
    spec = ConvSpec(
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
        data_format=data_format,
        activation=names[0],
        input_activation=names[1],
        depthwise_activation=names[2],
    )
    x, kernel, pointwise = (shape for _, shape, _ in tensors[:3])
    geometry = spec.resolve(x, kernel, pointwise, *_bias_shapes(tensors))
    axes = ((0, 1, 2, 3),) * 3
    return _finished(geometry, device, dtype, geometry.y_shape, axes, tensors, from_torch=False)


torch_plan_cached = functools.lru_cache(maxsize=4096)(torch_plan)
keras_plan_cached = functools.lru_cache(maxsize=4096)(keras_plan)


def _finished(
    geometry: Geometry,
    device: str,
    dtype: torch.dtype,
    y_shape: tuple[int, ...],
    axes: tuple[Positions, ...],
    tensors: Sequence[Any],
    *,
    from_torch: bool,
) -> Plan:
    # On the meta device, tensors have shapes and no data: those that the CPU would give.
    refusal = backends.why_not(geometry, dtype_name(dtype), "cpu" if device == "meta" else device)
    at_once = refusal is None and device != "meta" and all(type(size) is int for size in geometry)
    moved = [
        (position, dense_stride(tensor[1], order))
        for position, (tensor, order) in enumerate(zip(tensors, (*axes, (0,), (0,)), strict=True))
        if at_once and tensor is not None and not _is_dense(tensor[1], tensor[2], order)
    ]
    return Plan(
        geometry=geometry,
        refusal=refusal,
        y_shape=y_shape,
        y_stride=dense_stride(y_shape, axes[0]),
        at_once=at_once,
        moved=tuple(moved),
        from_torch=from_torch,
        flat=flat_geometry(geometry) if at_once else None,
        kernels=kernels_for(geometry, dtype_name(dtype), device) if at_once else None,
    )


def _one_dtype(names: tuple[str, ...], tensors: Sequence[Any]) -> torch.dtype:
    dtype: torch.dtype = tensors[0][0]
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor[0] != dtype:
            raise TypeError(
                f"`{name}` must have the dtype of `x`. "
                f"Received: {name}.dtype={tensor[0]}, x.dtype={dtype}"
            )
    return dtype


def _bias_shapes(tensors: Sequence[Any]) -> tuple[Any, Any]:
    """Those of bias and depthwise_bias, in the order of `ConvSpec.resolve`."""
    depthwise_bias, bias = tensors[3:]
    return None if bias is None else bias[1], None if depthwise_bias is None else depthwise_bias[1]


def _dealt(sizes: Sequence[int], axes: Positions) -> tuple[int, ...]:
    """Sizes in the order of memory, in that of the axes."""
    dealt = dict(zip(axes, sizes, strict=True))
    return tuple(dealt[axis] for axis in range(len(sizes)))


def dense_stride(shape: Sequence[int], axes: Positions) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose axes lie in memory in the order of `axes`."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(axes):
        strides[axis] = step
        step = step * max(shape[axis], 1)
    return tuple(strides)


def _is_dense(shape: Sequence[int], stride: Sequence[int], axes: Positions) -> bool:
    dense = dense_stride(shape, axes)
    return all(
        size <= 1 or own == wanted for size, own, wanted in zip(shape, stride, dense, strict=True)
    )


def _lies_channels_last(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether torch, too, would take the output of a convolution to be channels_last."""
    least = 0
    for axis in (1, 3, 2, 0):
        if shape[axis] == 0 or stride[axis] < least:
            return False
        if axis == 0 and least == stride[1]:  # One channel and one pixel say nothing.
            return False
        least = stride[axis] * shape[axis] if shape[axis] > 1 else stride[axis]
    return stride[1] != 0
