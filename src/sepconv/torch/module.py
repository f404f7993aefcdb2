"""The module: parameters that lie in memory as the kernel reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.spec import ACTIVATIONS, IntOrPair, canonical_activation, canonical_pair
from sepconv.torch.functions import why_not
from sepconv.torch.layers import torch_layer
from sepconv.torch.plans import (
    DEPTHWISE_AXES,
    POINTWISE_AXES,
    TorchPadding,
    dense_stride,
    torch_padding,
)
from sepconv.torch.registration import as_schema, compiled

__all__ = ["SeparableConv2d"]


class SeparableConv2d(nn.Module):
    """A depthwise-separable 2-D convolution layer that computes in one pass over memory.

        y = activation(pointwise(depthwise(x)) + bias)

    The parameters are those of the usual pair, `Conv2d(in_channels, in_channels * depth_multiplier,
    kernel_size, groups=in_channels, bias=False)` and `Conv2d(in_channels * depth_multiplier,
    out_channels, 1)`, under the names `depthwise.weight`, `pointwise.weight` and `pointwise.bias`,
    with the same initial values. State dicts interchange.

    The weights lie in memory as the kernel reads them: `pointwise.weight` is dense, but not
    contiguous. Loading a state dict, training, copying and pickling keep that; a parameter that is
    replaced by one which lies otherwise works, and is copied in every call. So do
    contiguous ones, which FSDP2 asks for; `to` and the like leave them contiguous.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Of the depthwise stage: an int, or (height, width).
        stride: An int, or one per direction.
        padding: As in `separable_conv2d`.
        dilation: An int, or one per direction.
        depth_multiplier: Depthwise outputs per channel.
        bias: Whether the output has a bias.
        activation: A name in `sepconv.spec.ACTIVATIONS`, or `None`.
        device: Of the parameters.
        dtype: Of the parameters.
        input_activation: Name of the activation of the input, or `None`.
        depthwise_bias: Whether there is a bias between the stages, `depthwise.bias`.
        depthwise_activation: Name of the activation between the stages, or `None`.

    Raises:
        TypeError: an argument is not of a type that it can be.
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from sepconv.torch import SeparableConv2d
        >>> layer = SeparableConv2d(3, 8, 3, stride=2, padding="same", activation="relu")
        >>> layer(torch.ones(2, 3, 9, 9)).shape
        torch.Size([2, 8, 5, 5])
        >>> list(layer.state_dict())
        ['depthwise.weight', 'pointwise.weight', 'pointwise.bias']
    """

    # Where users import it from, so that pickles do not depend on the files of this package.
    __module__ = "sepconv.torch"

    depthwise: nn.Conv2d
    pointwise: nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: TorchPadding = 0,
        dilation: IntOrPair = 1,
        depth_multiplier: int = 1,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_activation: str | None = None,
        depthwise_bias: bool = False,
        depthwise_activation: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "depth_multiplier": depth_multiplier,
        }
        for name, size in sizes.items():
            sizes[name], _ = canonical_pair(name, [size, size])
        self.in_channels = sizes["in_channels"]
        self.out_channels = sizes["out_channels"]
        self.depth_multiplier = sizes["depth_multiplier"]
        self.kernel_size = canonical_pair("kernel_size", kernel_size)
        self.stride = canonical_pair("stride", stride)
        self.padding = torch_padding(padding)
        self.dilation = canonical_pair("dilation", dilation)
        self.activation = canonical_activation(activation)
        self.input_activation = canonical_activation(input_activation, "input_activation")
        self.depthwise_activation = canonical_activation(
            depthwise_activation, "depthwise_activation"
        )
        between = self.in_channels * self.depth_multiplier
        # Convolutions of torch hold the parameters, so that what looks for such modules, to
        # initialise or to prune them, finds them. They are never called.
        self.depthwise = nn.Conv2d(
            self.in_channels,
            between,
            self.kernel_size,
            groups=self.in_channels,
            bias=depthwise_bias,
            device=device,
            dtype=dtype,
        )
        self.pointwise = nn.Conv2d(
            between, self.out_channels, 1, bias=bias, device=device, dtype=dtype
        )
        self._lay_out()

    def forward(self, x: Tensor) -> Tensor:
        """Computes the layer.

        Args:
            x: (batch, in_channels, height, width) or (in_channels, height, width).

        Returns:
            (batch, out_channels, out_height, out_width), or without the batch, in the memory format
            of `x`.
        """
        depthwise_weight, depthwise_bias = _parameters_of(self, "depthwise")
        pointwise_weight, bias = _parameters_of(self, "pointwise")
        tensors = (x, depthwise_weight, pointwise_weight, depthwise_bias, bias)
        names = (self.activation, self.input_activation, self.depthwise_activation)
        if torch.compiler.is_compiling():
            word, amounts = as_schema(self.padding)
            return compiled(*tensors, self.stride, word, amounts, self.dilation, *names)
        return torch_layer(*tensors, self.stride, self.padding, self.dilation, names)

    def why_not(self, x: Tensor) -> str | None:
        """Tells why a call would run torch's own convolutions instead of our kernel.

        Args:
            x: What the layer would be called on.

        Returns:
            `None` if our kernel runs it, else the reason.
        """
        return why_not(
            x,
            self.depthwise.weight,
            self.pointwise.weight,
            self.pointwise.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            depthwise_bias=self.depthwise.bias,
            activation=self.activation,
            input_activation=self.input_activation,
            depthwise_activation=self.depthwise_activation,
        )

    @classmethod
    def from_pair(
        cls,
        conv_dw: nn.Conv2d,
        conv_pw: nn.Conv2d,
        *,
        activation: str | None = None,
        input_activation: str | None = None,
        depthwise_activation: str | None = None,
    ) -> SeparableConv2d:
        """Makes the layer that computes `activation(conv_pw(conv_dw(x)))`.

        It takes over the parameters themselves, not copies, so optimizers that have them go on; the
        pair stays usable.

        Args:
            conv_dw: Convolution with as many groups as input channels.
            conv_pw: Convolution of 1x1 pixels that takes what `conv_dw` gives.
            activation: Name of the activation after the pair, or `None`.
            input_activation: Name of an activation before it.
            depthwise_activation: Name of an activation between the two.

        Raises:
            ValueError: the two are no such pair.

        Example:
            >>> pair = torch.nn.Conv2d(3, 6, 3, groups=3), torch.nn.Conv2d(6, 8, 1)
            >>> SeparableConv2d.from_pair(*pair).depth_multiplier
            2
        """
        rules = {
            "`conv_dw` must have as many groups as input channels": (
                conv_dw.groups == conv_dw.in_channels
            ),
            "`conv_dw` must pad with zeros": conv_dw.padding_mode == "zeros",
            "`conv_pw` must be a convolution of 1x1 pixels, without stride, padding and groups": (
                conv_pw.kernel_size == (1, 1)
                and conv_pw.stride == (1, 1)
                and conv_pw.groups == 1
                and (isinstance(conv_pw.padding, str) or not any(conv_pw.padding))
            ),
            "`conv_pw` must take the channels that `conv_dw` gives": (
                conv_pw.in_channels == conv_dw.out_channels
            ),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"{rule}. Received: conv_dw={conv_dw}, conv_pw={conv_pw}")
        layer = cls(
            conv_dw.in_channels,
            conv_pw.out_channels,
            conv_dw.kernel_size,
            conv_dw.stride,
            conv_dw.padding,
            conv_dw.dilation,
            conv_dw.out_channels // conv_dw.in_channels,
            bias=conv_pw.bias is not None,
            activation=activation,
            device="meta",
            input_activation=input_activation,
            depthwise_bias=conv_dw.bias is not None,
            depthwise_activation=depthwise_activation,
        )
        for mine, theirs in ((layer.depthwise, conv_dw), (layer.pointwise, conv_pw)):
            mine.weight, mine.bias = theirs.weight, theirs.bias
        layer._lay_out()
        return layer.train(conv_dw.training)

    def to_pair(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """Returns the two convolutions that compute the same, but for the activations.

        They have the parameters themselves, not copies.

        Raises:
            ValueError: the padding is none that torch's convolution has.

        Example:
            >>> conv_dw, conv_pw = SeparableConv2d(3, 8, 3, padding=1).to_pair()
            >>> conv_dw.groups, conv_pw.kernel_size
            (3, (1, 1))
        """
        padding: Any = self.padding
        if not isinstance(padding, str):
            if any(before != after for before, after in padding):
                raise ValueError(
                    "`padding` must be the same on both sides for a pair of convolutions. "
                    f"Received: padding={padding}"
                )
            padding = tuple(before for before, _ in padding)
        depthwise, pointwise = self.depthwise, self.pointwise
        conv_dw = nn.Conv2d(
            self.in_channels,
            depthwise.out_channels,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.in_channels,
            bias=depthwise.bias is not None,
            device="meta",
        )
        conv_pw = nn.Conv2d(
            depthwise.out_channels, self.out_channels, 1, bias=pointwise.bias is not None,
            device="meta",
        )  # fmt: skip
        for mine, theirs in ((depthwise, conv_dw), (pointwise, conv_pw)):
            theirs.weight, theirs.bias = mine.weight, mine.bias
            theirs.train(self.training)
        return conv_dw, conv_pw

    def extra_repr(self) -> str:
        """Returns the arguments, for `repr`."""
        words = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        words.append(f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}")
        if self.depth_multiplier != 1:
            words.append(f"depth_multiplier={self.depth_multiplier}")
        for name in ("input_activation", "depthwise_activation", "activation"):
            if getattr(self, name) != ACTIVATIONS[0]:
                words.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(words)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SeparableConv2d:
        # Every way to move or convert a module passes here; to(memory_format=...) lays it out anew.
        # Weights that somebody made contiguous stay so, for engines that take no others.
        kept = [
            module
            for module in (self.depthwise, self.pointwise)
            if (weight := module._parameters.get("weight")) is not None and weight.is_contiguous()
        ]
        super()._apply(fn, recurse)
        self._lay_out(kept)
        return self

    def _lay_out(self, kept: Sequence[nn.Module] = ()) -> None:
        """Puts the weights into memory in the order in which the kernel reads them.

        Those of the modules in `kept` stay as they are.
        """
        for module, axes in ((self.depthwise, DEPTHWISE_AXES), (self.pointwise, POINTWISE_AXES)):
            weight = module._parameters.get("weight")  # None where it is parametrized.
            if weight is None or weight.stride() == (stride := dense_stride(weight.shape, axes)):
                continue
            if module in kept:
                continue
            with torch.no_grad():
                weight.data = torch.empty_strided(
                    weight.shape, stride, dtype=weight.dtype, device=weight.device
                ).copy_(weight.data)


def _parameters_of(layer: nn.Module, name: str) -> tuple[Any, Any]:
    """Weight and bias of a module in the layer."""
    module: Any = layer._modules[name]
    try:  # What the attributes would find, in a tenth of the time.
        return module._parameters["weight"], module._parameters["bias"]
    except KeyError:  # Pruned or parametrized.
        return module.weight, module.bias
