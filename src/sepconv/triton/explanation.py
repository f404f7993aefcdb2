"""How a call would run on a GPU: which kernels, in which blocks, and its least time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from sepconv.spec import Geometry
from sepconv.triton.ceilings import ceilings
from sepconv.triton.recording import Launch, record_passes

__all__ = ["KernelPlan", "kernel_plans", "measured_ceilings"]

measured_ceilings = ceilings


class KernelPlan(NamedTuple):
    """One kernel of a pass.

    Attributes:
        name: Of the kernel; `torch.` in front of a matrix product by the library of torch.
        programs: How many run; 0 where torch decides.
        blocks: Sizes of the block of one program, and its warps, by name.
    """

    name: str
    programs: int
    blocks: Mapping[str, int]

    def __str__(self) -> str:
        """Returns it in words."""
        if not self.programs:
            return f"{self.name}, a matrix product of the library"
        sizes = ", ".join(f"{name} {size}" for name, size in self.blocks.items())
        return f"{self.name}: {self.programs} program{'s' * (self.programs != 1)}, {sizes}"


def kernel_plans(geometry: Geometry, dtype: str) -> tuple[list[KernelPlan], list[KernelPlan]]:
    """Returns the kernels of a forward pass, and those of all gradients. No GPU is needed.

    Args:
        geometry: The call.
        dtype: Name of the element type.
    """
    forward, backward = record_passes(geometry, getattr(torch, dtype))
    return [_plan(made) for made in forward], [_plan(made) for made in backward]


def _plan(made: Launch) -> KernelPlan:
    programs = 1 if made.is_ours else 0
    for size in made.grid:
        programs *= size
    return KernelPlan(made.kernel, programs, dict(_blocks(made.constants)))


def _blocks(constants: Mapping[str, Any]) -> Any:
    for name, size in constants.items():
        if name.startswith(("BLOCK", "TILE_", "SLAB_", "TAPS")) or name == "num_warps":
            words = name.removeprefix("BLOCK_").removeprefix("num_").lower().replace("_", " ")
            yield words, int(size)
