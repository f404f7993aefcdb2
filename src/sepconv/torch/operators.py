"""What the operators run: the kernels of a backend, on tensors in the layouts of Keras.

    sepconv::forward    (x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias, geometry) -> y
    sepconv::backward   (dy, the five tensors, y, geometry, wrt) -> gradients        linear in dy

`geometry` is a `Geometry` as integers. The five tensors are called the operands; biases are `None`
where there are none. `wrt` holds the positions among them of those whose gradients are wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sepconv import backends
from sepconv.spec import Geometry

Operands: TypeAlias = "Sequence[Tensor | None]"
Positions: TypeAlias = "tuple[int, ...]"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in `sepconv.backends`."""
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=4096)
def flat_geometry(geometry: Geometry) -> npt.NDArray[np.int64]:
    """The geometry as kernels take it."""
    flat = np.array(geometry, np.int64)
    flat.flags.writeable = False
    return flat


@functools.lru_cache(maxsize=4096)
def kernels_for(geometry: Geometry, dtype: str, device: str) -> backends.Kernels:
    """The kernels of the backend that runs a call."""
    return backends.choose(geometry, dtype, device).load()


def check_devices(tensors: Operands, device: torch.device) -> None:
    """Raises `ValueError` unless all tensors are on the device, which is that of `x`."""
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(
                "every tensor must be on the device of `x`. "
                f"Received: {tensor.device}, x.device={device}"
            )


def _dense(tensors: Operands, device: torch.device) -> list[Tensor | None]:
    """The tensors as kernels read them; their sizes are those that the geometry says."""
    check_devices(tensors, device)
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def run_forward(
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    geometry: Sequence[int],
) -> Tensor:
    """Runs `forward` on the device of the tensors."""
    geometry = Geometry(*geometry)
    operands = (x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias)
    y = torch.empty(geometry.y_shape, dtype=x.dtype, device=x.device)
    kernels = kernels_for(geometry, dtype_name(x.dtype), x.device.type)
    kernels.forward(flat_geometry(geometry), *_dense(operands, x.device), y)
    return y


def run_backward(
    dy: Tensor,
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    geometry: Sequence[int],
    wrt: Sequence[int],
) -> list[Tensor]:
    """Runs `backward` on the device of the tensors."""
    geometry = Geometry(*geometry)
    operands = (x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias)
    gradients = _empty_gradients(operands, wrt)
    named = [None] * 5
    for position, gradient in zip(wrt, gradients, strict=True):
        named[position] = gradient
    kernels = kernels_for(geometry, dtype_name(x.dtype), x.device.type)
    dense = _dense((dy, *operands, y), x.device)
    kernels.backward(flat_geometry(geometry), *dense, *named)
    return gradients


def _empty_gradients(operands: Operands, wrt: Sequence[int]) -> list[Any]:
    chosen = [operands[position] for position in wrt]
    return [t.new_empty(t.shape) for t in chosen if t is not None]


def fake_forward(x: Tensor, *others: Any) -> Tensor:
    """Shape, dtype and device of the output."""
    check_devices(others[:4], x.device)
    return x.new_empty(Geometry(*others[-1]).y_shape)


def fake_backward(dy: Tensor, *others: Any) -> list[Tensor]:
    """Shapes, dtypes and devices of the gradients."""
    return _empty_gradients(others[:5], others[-1])
