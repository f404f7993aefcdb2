"""The operation in torch's own terms: activations, their slopes, the two convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sepconv.spec import ACTIVATIONS, Geometry


def _hard_sigmoid(x: Tensor) -> Tensor:
    # That of torch has a sixth in single precision.
    return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, x / 6 + 0.5))


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "relu6": nn.functional.relu6,
    "leaky_relu": lambda x: torch.where(x >= 0, x, 0.2 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "hard_sigmoid": _hard_sigmoid,
    "hard_silu": lambda x: x * _hard_sigmoid(x),
    "elu": nn.functional.elu,
}


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * density


# Functions that torch can differentiate; at the kinks they have the slopes of the kernels.
SLOPE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": torch.ones_like,
    "relu": lambda x: (x > 0).to(x.dtype),
    "relu6": lambda x: ((x > 0) & (x < 6)).to(x.dtype),
    "leaky_relu": lambda x: torch.where(x >= 0, 1.0, 0.2).to(x.dtype),
    "sigmoid": _sigmoid_slope,
    "tanh": lambda x: 4 * _sigmoid_slope(2 * x),
    "silu": lambda x: torch.sigmoid(x) * (1 + x * torch.sigmoid(-x)),
    "gelu": _gelu_slope,
    "hard_sigmoid": lambda x: ((x > -3) & (x < 3)).to(x.dtype) / 6,
    "hard_silu": lambda x: torch.where(x >= 3, 1.0, torch.where(x > -3, x / 3 + 0.5, 0.0)),
    "elu": lambda x: torch.exp(torch.where(x >= 0, 0.0, x)),
}


def activate(code: int, x: Tensor) -> Tensor:
    """The activation of a geometry's code."""
    return ACTIVATION_FUNCTIONS[ACTIVATIONS[code]](x)


def times_slope(code: int, x: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` times the slope of the activation at `x`."""
    return tensor * SLOPE_FUNCTIONS[ACTIVATIONS[code]](x) if code else tensor


def composition(
    geometry: Geometry,
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The operation by torch's convolutions."""
    g = geometry
    u = activate(g.input_activation, x if g.layout else x.permute(0, 3, 1, 2))
    weight_shape = (g.depthwise_channels, 1, g.kernel_height, g.kernel_width)
    # What the last window needs beyond the input; negative where it ends before the input does.
    reach_height = (g.kernel_height - 1) * g.dilation_height + 1
    reach_width = (g.kernel_width - 1) * g.dilation_width + 1
    bottom = (g.out_height - 1) * g.stride_height + reach_height - g.in_height - g.pad_top
    right = (g.out_width - 1) * g.stride_width + reach_width - g.in_width - g.pad_left
    padding = (g.pad_top, g.pad_left)
    if g.pad_top - bottom not in range(g.stride_height) or (
        g.pad_left - right not in range(g.stride_width)
    ):  # Not what the convolution can do itself.
        # No more can be cut off than there is, not even of what the other side then adds.
        bottom_cut, right_cut = max(0, -bottom - g.in_height), max(0, -right - g.in_width)
        rows = (g.pad_top - bottom_cut, bottom + bottom_cut)
        columns = (g.pad_left - right_cut, right + right_cut)
        u = nn.functional.pad(u, (*columns, *rows))
        padding = (0, 0)
    u = nn.functional.conv2d(
        u,
        depthwise_kernel.permute(2, 3, 0, 1).reshape(weight_shape),
        depthwise_bias,
        stride=(g.stride_height, g.stride_width),
        padding=padding,
        dilation=(g.dilation_height, g.dilation_width),
        groups=g.in_channels,
    )
    v = activate(g.depthwise_activation, u)
    z = nn.functional.conv2d(v, pointwise_kernel.permute(3, 2, 0, 1), bias)
    y = activate(g.activation, z)
    return y if g.layout else y.permute(0, 2, 3, 1)
