"""A call outside of a compiler: its plan, and the way that it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sepconv.torch import plans
from sepconv.torch.at_once import run_and_record, run_at_once
from sepconv.torch.composition import composition
from sepconv.torch.derivatives import call_forward
from sepconv.torch.operators import check_devices
from sepconv.torch.plans import Plan, kind_of_device, planned
from sepconv.torch.quiet import (
    any_requires_grad,
    are_plain,
    is_autocast_enabled,
    is_quiet,
    saved_tensors_hooks,
)


def torch_layer(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    names: tuple[Any, ...],
) -> Tensor:
    """`separable_conv2d`, its arguments checked; `names` are those of the activations."""
    operands = (x, depthwise_weight, pointwise_weight, depthwise_bias, bias)
    if x.dim() == 3:
        whole = (x.unsqueeze(0), *operands[1:])
        return torch_layer(*whole, stride, padding, dilation, names).squeeze(0)
    operands = autocast(operands)
    arguments = (stride, padding, dilation, names)
    plan = planned(plans.torch_plan, plans.torch_plan_cached, operands, arguments)
    return _called(plan, operands)


def keras_layer(
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    strides: Any,
    padding: Any,
    dilation_rate: Any,
    data_format: str,
    names: tuple[Any, ...],
) -> Tensor:
    """`separable_conv2d_keras`, its arguments checked."""
    operands = autocast((x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias))
    arguments = (strides, padding, dilation_rate, data_format, names)
    plan = planned(plans.keras_plan, plans.keras_plan_cached, operands, arguments)
    return _called(plan, operands)


def _called(plan: Plan, operands: tuple[Any, ...]) -> Tensor:
    if plan.at_once and is_quiet() and are_plain(operands):
        if not torch.is_grad_enabled() or not any_requires_grad(operands):
            return run_at_once(plan, operands)
        # Whoever looks at what is saved shall see the same with a profiler and without one.
        if saved_tensors_hooks(False) is None:
            return run_and_record(plan, operands)
    check_devices(operands, operands[0].device)
    function = call_forward if plan.refusal is None else composition
    return plan.image_to_caller(function(plan.geometry, *plan.as_kernel_reads(operands)))


def autocast(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Casts the operands of a call as `torch.autocast` casts those of a convolution."""
    device = kind_of_device(operands[0])
    if device == "meta" or not is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        operand.to(dtype)
        if operand is not None and operand.is_floating_point() and operand.dtype != torch.float64
        else operand
        for operand in operands
    )
