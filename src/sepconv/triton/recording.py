"""The launches of a call without a GPU: on tensors without memory, recorded instead of made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sepconv.spec import Geometry
from sepconv.triton import kernels, launch

__all__ = ["Launch", "record", "record_passes", "recorded"]

# Matrix products that the library of torch computes.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Launch(NamedTuple):
    """One launch of a kernel, or one matrix product of torch."""

    kernel: str
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def is_ours(self) -> bool:
        """Whether it is a kernel of this library."""
        return not self.kernel.startswith("torch.")


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes matrix products of torch."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._launches = launches

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in _PRODUCTS:
            self._launches.append(Launch(f"torch.{name}", args, {}, ()))
        return function(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches made inside, in a list."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def record(*arguments: Any, **constants: Any) -> None:
                launches.append(Launch(self.name, arguments, constants, grid))

            return record

    originals = {name: getattr(kernels, name) for name in kernels.__all__}
    try:
        for name in originals:
            setattr(kernels, name, Recorder(name))
        with _Products(launches):
            yield launches
    finally:
        for name, original in originals.items():
            setattr(kernels, name, original)


def record_passes(g: Geometry, dtype: torch.dtype) -> tuple[list[Launch], list[Launch]]:
    """The launches of a forward pass, and of a backward pass with all gradients.

    Args:
        g: The call.
        dtype: Of its tensors.
    """

    def empty(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    operands = [
        empty(g.x_shape),
        empty(g.depthwise_kernel_shape),
        empty(g.pointwise_kernel_shape),
        empty(g.depthwise_bias_shape) if g.has_depthwise_bias else None,
        empty(g.bias_shape) if g.has_bias else None,
    ]
    gradients = [None if operand is None else empty(operand.shape) for operand in operands]
    flat, y = np.array(g, np.int64), empty(g.y_shape)
    x, kernel, pointwise, depthwise_bias, bias = operands
    assert x is not None
    assert kernel is not None
    assert pointwise is not None
    tensors = (x, kernel, pointwise, depthwise_bias, bias)
    with recorded() as forward:
        launch.forward(flat, *tensors, y)
    with recorded() as backward:
        launch.backward(flat, empty(g.y_shape), *tensors, y, *gradients)
    return forward, backward


def record(g: Geometry, dtype: torch.dtype) -> list[Launch]:
    """All launches of our kernels, forward and backward."""
    return [made for launches in record_passes(g, dtype) for made in launches if made.is_ours]
