"""PyTorch: our module, and a pair of `Conv2d`, eager and compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sepconv import set_num_threads
from sepconv.bench.engines import Ready, UnableError
from sepconv.bench.problems import MODES, Problem
from sepconv.torch import SeparableConv2d

PACKAGES = ("torch",)
_FORMATS = {
    "sepconv.torch": torch.channels_last,
    "sepconv.torch contiguous": torch.contiguous_format,
    "torch": torch.contiguous_format,
    "torch channels_last": torch.channels_last,
    "torch.compile": torch.channels_last,
}


def limit_threads(threads: int) -> None:
    """Limits torch and our kernels."""
    torch.set_num_threads(threads)
    set_num_threads(threads)


def forget() -> None:
    """Drops what was compiled."""
    torch.compiler.reset()


def prepare(name: str, problem: Problem, mode: str, copies: int, threads: int) -> Ready:
    """Makes a candidate ready; see `sepconv.bench.engines`."""
    dtype, image_format = getattr(torch, problem.dtype), _FORMATS[name]

    def image(array: Any) -> Any:
        tensor = torch.from_numpy(problem.to_nchw(array)).to(dtype)
        # `clone` gives memory of torch's own allocator, aligned as its tensors are.
        return tensor.clone(memory_format=image_format)

    layer: Any = fused_layer(problem).to(dtype)
    if name.startswith("sepconv"):
        reason = layer.why_not(image(problem.x))
        if reason is not None:
            raise UnableError(reason)
    else:
        pair: Any = pair_of(layer, problem)
        layer = pair.to(memory_format=image_format)
    parameters = list(layer.parameters())
    if name == "torch.compile":
        options: Any = {"freezing": True} if mode == MODES[0] else None
        layer = torch.compile(layer.eval(), fullgraph=True, dynamic=False, options=options)
    inputs = [(image(problem.x), image(problem.dy)) for _ in range(copies)]

    def arrays(values: Sequence[Any]) -> list[Any]:
        y, *gradients = (value.detach().float() for value in values)
        out = [problem.from_nchw(y.numpy())]
        if gradients:
            g = problem.geometry
            dx, d_depthwise, d_pointwise, d_bias = (gradient.numpy() for gradient in gradients)
            shape = (g.in_channels, g.depth_multiplier, g.kernel_height, g.kernel_width)
            out += [
                problem.from_nchw(dx),
                d_depthwise.reshape(shape).transpose(2, 3, 0, 1),
                d_pointwise.transpose(2, 3, 1, 0),
                d_bias,
            ]
        return out

    return ready_of(layer, parameters, inputs, mode, arrays)


def ready_of(
    layer: Callable[[Any], Any],
    parameters: Sequence[Any],
    inputs: Sequence[tuple[Any, Any]],
    mode: str,
    arrays: Callable[[Sequence[Any]], Sequence[Any]],
) -> Ready:
    """Makes a layer ready.

    Args:
        layer: x -> y.
        parameters: Its weights, in the order of their gradients.
        inputs: (x, dy), which take turns.
        mode: One of `MODES`.
        arrays: (y, gradients of x and of the weights) -> as in `Ready`.
    """
    turns = itertools.cycle(inputs)

    def forward() -> Any:
        with torch.inference_mode():
            return [layer(next(turns)[0])]

    def training() -> Any:
        x, dy = next(turns)
        operands = [x.detach().requires_grad_(), *parameters]
        y = layer(operands[0])
        return [y, *torch.autograd.grad(y, operands, dy)]

    return Ready(forward if mode == MODES[0] else training, arrays)


def fused_layer(problem: Problem) -> SeparableConv2d:
    """Returns the layer as our module, in float32."""
    g = problem.geometry
    layer = SeparableConv2d(
        g.in_channels,
        g.out_channels,
        (g.kernel_height, g.kernel_width),
        problem.spec.strides,
        problem.spec.padding,
        problem.spec.dilation_rate,
        g.depth_multiplier,
    )
    with torch.no_grad():
        kernel = torch.from_numpy(problem.depthwise_kernel).permute(2, 3, 0, 1)
        layer.depthwise.weight.copy_(kernel.reshape(layer.depthwise.weight.shape))
        layer.pointwise.weight.copy_(torch.from_numpy(problem.pointwise_kernel).permute(3, 2, 0, 1))
        assert layer.pointwise.bias is not None
        layer.pointwise.bias.copy_(torch.from_numpy(problem.bias))
    return layer


def pair_of(layer: SeparableConv2d, problem: Problem) -> nn.Sequential:
    """Returns the layer as two convolutions with copies of its weights.

    Args:
        layer: The layer.
        problem: Whose padding tells whether zeros must be put around the image beforehand: a
            `Conv2d` can only have as many on one side as on the other.
    """
    g = problem.geometry
    (top, bottom), (left, right) = problem.padding
    even = top == bottom and left == right
    depthwise = nn.Conv2d(
        g.in_channels,
        g.depthwise_channels,
        (g.kernel_height, g.kernel_width),
        problem.spec.strides,
        (top, left) if even else 0,
        problem.spec.dilation_rate,
        groups=g.in_channels,
        bias=False,
        dtype=layer.depthwise.weight.dtype,
    )
    pointwise = nn.Conv2d(
        g.depthwise_channels, g.out_channels, 1, dtype=layer.depthwise.weight.dtype
    )
    both = nn.ModuleDict({"depthwise": depthwise, "pointwise": pointwise})
    both.load_state_dict(layer.state_dict())
    stages: list[nn.Module] = [depthwise, pointwise]
    return nn.Sequential(*([] if even else [nn.ZeroPad2d((left, right, top, bottom))]), *stages)
