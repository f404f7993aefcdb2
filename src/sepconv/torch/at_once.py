"""The short way of a call, when nobody is listening."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sepconv.torch.derivatives import applied, operand_gradients, saves_output
from sepconv.torch.operators import Operands
from sepconv.torch.plans import Plan
from sepconv.torch.quiet import are_plain, is_quiet


def run_at_once(plan: Plan, operands: Operands) -> Tensor:
    """Fills the output, from the caller's own tensors where they lie as the kernel reads them."""
    x = operands[0]
    assert x is not None
    assert plan.kernels is not None
    y = x.new_empty_strided(plan.y_shape, plan.y_stride)
    plan.kernels.forward(plan.flat, *plan.laid_out(operands), y)
    return y


def run_backward_at_once(
    plan: Plan, needed: Sequence[bool], dy: Tensor, operands: Operands, y: Tensor | None
) -> list[Tensor | None]:
    """Fills gradients that lie like the operands, or as the kernel writes them."""
    assert plan.kernels is not None
    operands = plan.laid_out(operands)
    if dy.stride() != plan.y_stride:
        dy = dy.new_empty_strided(plan.y_shape, plan.y_stride).copy_(dy)
    gradients = [
        operand.new_empty_strided(operand.shape, operand.stride())
        if wanted and operand is not None
        else None
        for operand, wanted in zip(operands, needed, strict=True)
    ]
    plan.kernels.backward(plan.flat, dy, *operands, y, *gradients)
    return gradients


def run_and_record(plan: Plan, operands: Operands) -> Tensor:
    """The same, as one node of autograd."""
    y: Tensor = applied(_AtOnce, plan, *operands)
    return y


class _AtOnce(torch.autograd.Function):
    """(plan, five operands) -> y, without views between the caller's tensors and the kernel's."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *operands: Any) -> Tensor:
        y = run_at_once(plan, operands)
        ctx.plan = plan
        ctx.save_for_backward(*operands, y if saves_output(plan.geometry) else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        plan: Plan = ctx.plan
        *operands, y = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled() and is_quiet() and are_plain((dy, *operands, y)):
            return None, *run_backward_at_once(plan, needed, dy, operands, y)
        gradients = operand_gradients(
            plan.geometry,
            needed,
            plan.image_from_caller(dy),
            plan.as_kernel_reads(operands),
            None if y is None else plan.image_from_caller(y),
        )
        return None, *plan.as_caller_sees(gradients)
