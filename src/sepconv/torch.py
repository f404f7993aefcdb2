"""The PyTorch door: one differentiable operation on tensors, and a module of it.

On the CPU a call is one operator of torch forward, and one backward for all gradients. Elsewhere
torch's own two convolutions run instead; `why_not` tells. Tensors in the channels_last memory
format and contiguous ones are computed as they lie, and the output lies like the input.

Operators, in the layouts of Keras, with the integers of a call as the last but one argument:

    sepconv::forward    (x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias) -> y
    sepconv::backward   (dy, the same, y) -> gradients                            linear in dy
    sepconv::separable_conv2d, separable_conv2d_keras    the doors, as torch.compile sees them

How it differentiates. Reverse mode is one `backward`. Without activations and biases `forward` is
linear in each of x, depthwise_kernel and pointwise_kernel, and the derivatives of both operators
are again calls of them with one operand replaced. With activations, gradients that shall be
differentiated themselves, and forward mode, are computed in parts: such multilinear calls, and
activations, slopes and biases around them by torch. `operands` are the five tensors above, the
biases `None` where there are none; `wrt` holds positions among them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sepconv import _native, backends
from sepconv.spec import (
    ACTIVATIONS,
    ConvSpec,
    Geometry,
    IntOrPair,
    Padding,
    canonical_activation,
    canonical_padding,
    canonical_pair,
)

__all__ = ["SeparableConv2d", "separable_conv2d", "separable_conv2d_keras", "why_not"]

if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        "`torch` must be 2.10 or newer: its tensors reach the kernel through the C exchange "
        f"interface of DLPack. Received: torch.__version__={torch.__version__}"
    )

Operands: TypeAlias = "Sequence[Tensor | None]"
Positions: TypeAlias = "tuple[int, ...]"
TorchPadding: TypeAlias = "str | IntOrPair | Sequence[Sequence[SupportsIndex]]"


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: TorchPadding = 0,
    dilation: IntOrPair = 1,
    activation: str | None = None,
    input_activation: str | None = None,
    depthwise_bias: Tensor | None = None,
    depthwise_activation: str | None = None,
) -> Tensor:
    """Computes a depthwise-separable 2-D convolution.

        u = depthwise_activation(depthwise(input_activation(x), depthwise_weight) + depthwise_bias)
        y = activation(pointwise(u, pointwise_weight) + bias)

    It can be differentiated to any order, forward and backward, compiled, exported, and transformed
    by `torch.func`. Under `torch.autocast` it computes in the lower precision, as a convolution
    does.

    Args:
        x: Input, (batch, channels, height, width) or (channels, height, width), in the contiguous
            or the channels_last memory format; a tensor that is dense in neither is copied.
        depthwise_weight: (channels * depth_multiplier, 1, kernel_height, kernel_width), dtype of
            `x`, as in a `Conv2d` with `groups=channels`.
        pointwise_weight: (filters, channels * depth_multiplier, 1, 1), dtype of `x`. The kernel
            reads it with the filters next to each other in memory, which is how `SeparableConv2d`
            keeps it; otherwise every call copies it.
        bias: (filters,), dtype of `x`, or `None`.
        stride: An int, or one per direction.
        padding: An int or a pair of ints, the zeros on both sides; `((top, bottom), (left,
            right))`; `"valid"`; or `"same"`, also with a stride: the output has ceil(size / stride)
            rows and columns, and an odd zero goes to the bottom or the right, as in TensorFlow.
            For a stride of 1, that is what torch does.
        dilation: An int, or one per direction.
        activation: A name in `sepconv.spec.ACTIVATIONS`, or `None`.
        input_activation: A name, or `None`.
        depthwise_bias: (channels * depth_multiplier,), dtype of `x`, or `None`.
        depthwise_activation: A name, or `None`.

    Returns:
        (batch, filters, out_height, out_width), or without the batch, in the memory format and
        dtype of `x`.

    Raises:
        TypeError: dtypes differ, or an argument is not of a type that it can be.
        ValueError: an argument is out of range, or shapes do not fit together.

    Example:
        >>> import torch
        >>> from sepconv.torch import separable_conv2d
        >>> x = torch.ones(1, 2, 5, 5).to(memory_format=torch.channels_last)
        >>> weights = torch.ones(2, 1, 3, 3), torch.ones(4, 2, 1, 1)
        >>> y = separable_conv2d(x, *weights, padding="same", stride=2, activation="relu")
        >>> y.shape, y[0, 0, 1, 1].item()
        (torch.Size([1, 4, 3, 3]), 18.0)
        >>> y.is_contiguous(memory_format=torch.channels_last)
        True
    """
    tensors = (x, depthwise_weight, pointwise_weight, depthwise_bias, bias)
    names = (activation, input_activation, depthwise_activation)
    if torch.compiler.is_compiling():
        word, amounts = _as_schema(_padding(padding))
        words = [canonical_activation(name) for name in names]
        pairs = canonical_pair("stride", stride), canonical_pair("dilation", dilation)
        return _compiled(*tensors, pairs[0], word, amounts, pairs[1], *words)
    # The cache takes (1.0, 1) for (1, 1), so pairs are checked before they become a key.
    return _torch_layer(
        *tensors,
        stride if type(stride) is int else _pair("stride", stride),
        padding if type(padding) is int or type(padding) is str else _padding(padding),
        dilation if type(dilation) is int else _pair("dilation", dilation),
        names,
    )


def separable_conv2d_keras(
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    bias: Tensor | None = None,
    *,
    strides: IntOrPair = 1,
    padding: str | Sequence[Sequence[SupportsIndex]] = "valid",
    dilation_rate: IntOrPair = 1,
    data_format: str = "channels_last",
    activation: str | None = None,
    input_activation: str | None = None,
    depthwise_bias: Tensor | None = None,
    depthwise_activation: str | None = None,
) -> Tensor:
    """Computes `separable_conv2d` on the layouts of Keras, under the names of Keras.

    Args:
        x: Input, (batch, height, width, channels), or (batch, channels, height, width) with
            `data_format="channels_first"`. A tensor that is not contiguous is copied.
        depthwise_kernel: (kernel_height, kernel_width, channels, depth_multiplier), dtype of `x`.
        pointwise_kernel: (1, 1, channels * depth_multiplier, filters), dtype of `x`.
        bias: (filters,), dtype of `x`, or `None`.
        strides: An int, or one per direction.
        padding: `"valid"`, `"same"`, or `((top, bottom), (left, right))`.
        dilation_rate: An int, or one per direction.
        data_format: `"channels_last"` or `"channels_first"`.
        activation: A name in `sepconv.spec.ACTIVATIONS`, or `None`.
        input_activation: A name, or `None`.
        depthwise_bias: (channels * depth_multiplier,), dtype of `x`, or `None`.
        depthwise_activation: A name, or `None`.

    Returns:
        (batch, out_height, out_width, filters), or in the layout of `data_format`; dtype of `x`.

    Raises:
        TypeError: dtypes differ, or an argument is not of a type that it can be.
        ValueError: an argument is out of range, or shapes do not fit together.

    Example:
        >>> import torch
        >>> from sepconv.torch import separable_conv2d_keras
        >>> kernels = torch.ones(3, 3, 2, 1), torch.ones(1, 1, 2, 4)
        >>> separable_conv2d_keras(torch.ones(1, 5, 5, 2), *kernels, strides=2).shape
        torch.Size([1, 2, 2, 4])
    """
    tensors = (x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias)
    names = (activation, input_activation, depthwise_activation)
    if torch.compiler.is_compiling():
        word, amounts = _as_schema(canonical_padding(padding))
        words = [canonical_activation(name) for name in names]
        pairs = canonical_pair("strides", strides), canonical_pair("dilation_rate", dilation_rate)
        return _compiled_keras(*tensors, pairs[0], word, amounts, pairs[1], data_format, *words)
    return _keras_layer(
        *tensors,
        strides if type(strides) is int else _pair("strides", strides),
        padding if type(padding) is str else canonical_padding(padding),
        dilation_rate if type(dilation_rate) is int else _pair("dilation_rate", dilation_rate),
        data_format,
        names,
    )


def why_not(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: IntOrPair = 1,
    padding: TorchPadding = 0,
    dilation: IntOrPair = 1,
    depthwise_bias: Tensor | None = None,
    activation: str | None = None,
    input_activation: str | None = None,
    depthwise_activation: str | None = None,
) -> str | None:
    """Tells why a call of `separable_conv2d` would run torch's own convolutions.

    Args:
        x: As in `separable_conv2d`, as are all other arguments.
        depthwise_weight: As there.
        pointwise_weight: As there.
        bias: As there.
        stride: As there.
        padding: As there.
        dilation: As there.
        depthwise_bias: As there.
        activation: As there.
        input_activation: As there.
        depthwise_activation: As there.

    Returns:
        `None` if the kernel of this library runs it, else the reason.

    Raises:
        TypeError: as `separable_conv2d`.
        ValueError: as `separable_conv2d`.

    Example:
        >>> import torch
        >>> weights = torch.ones(2, 1, 3, 3), torch.ones(4, 2, 1, 1)
        >>> why_not(torch.ones(1, 2, 5, 5), *weights) is None
        True
    """
    tensors = [x if x.dim() == 4 else x.unsqueeze(0), depthwise_weight, pointwise_weight]
    names = (activation, input_activation, depthwise_activation)
    return _planned(
        _torch_plan,
        _torch_plan,
        _autocast((*tensors, depthwise_bias, bias)),
        (stride, padding, dilation, names),
    ).refusal


def _pair(argument: str, value: Any) -> tuple[int, int]:
    if type(value) is tuple and (*map(type, value),) == (int, int):
        return value
    return canonical_pair(argument, value)


def _padding(padding: Any) -> Padding:
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


def _as_schema(padding: Padding) -> tuple[str, list[int]]:
    """A padding as two arguments of an operator: a word, empty where the amounts stand for it."""
    if isinstance(padding, str):
        return padding, []
    return "", [amount for pair in padding for amount in pair]


def _from_schema(word: str, amounts: Sequence[int]) -> Padding:
    return word or ((amounts[0], amounts[1]), (amounts[2], amounts[3]))


# --------------------------------------------------------------------------------------- the module


class SeparableConv2d(nn.Module):
    """A depthwise-separable 2-D convolution layer that computes in one pass over memory.

        y = activation(pointwise(depthwise(x)) + bias)

    The parameters are those of the usual pair, `Conv2d(in_channels, in_channels * depth_multiplier,
    kernel_size, groups=in_channels, bias=False)` and `Conv2d(in_channels * depth_multiplier,
    out_channels, 1)`, under the names `depthwise.weight`, `pointwise.weight` and `pointwise.bias`,
    with the same initial values. State dicts interchange.

    The weights lie in memory as the kernel reads them: `pointwise.weight` is dense, but not
    contiguous. Loading a state dict, training, copying and pickling keep that; a parameter that is
    replaced by one which lies otherwise works, and is copied in every call.

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
        self.padding = _padding(padding)
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
            word, amounts = _as_schema(self.padding)
            return _compiled(*tensors, self.stride, word, amounts, self.dilation, *names)
        return _torch_layer(*tensors, self.stride, self.padding, self.dilation, names)

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
        super()._apply(fn, recurse)
        self._lay_out()
        return self

    def _lay_out(self) -> None:
        """Puts the weights into memory in the order in which the kernel reads them."""
        for module, axes in ((self.depthwise, _DEPTHWISE_AXES), (self.pointwise, _POINTWISE_AXES)):
            weight = module._parameters.get("weight")  # None where it is parametrized.
            if weight is None or weight.stride() == (stride := _dense_stride(weight.shape, axes)):
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


# ---------------------------------------------------------------------------------- plans of calls


# The order of the axes of a weight in memory, as the kernel reads them. Gradients get the same
# strides to the last number, also of axes of size 1, which DistributedDataParallel insists on.
_DEPTHWISE_AXES = (1, 2, 3, 0)
_POINTWISE_AXES = (2, 3, 1, 0)


class _Plan(NamedTuple):
    """What a call needs to know that does not depend on the data."""

    geometry: Geometry
    refusal: str | None
    y_shape: tuple[int, ...]
    y_stride: tuple[int, ...]
    """As the caller sees the output."""
    lies_ready: bool
    """Every tensor lies in memory as the kernel reads it."""
    from_torch: bool
    """The caller sees the layouts of torch, not those of Keras."""
    flat: npt.NDArray[np.int64] | None
    kernels: backends.Kernels | None


def _torch_layer(
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
    """The door outside of a compiler."""
    operands = (x, depthwise_weight, pointwise_weight, depthwise_bias, bias)
    if x.dim() == 3:
        whole = (x.unsqueeze(0), *operands[1:])
        return _torch_layer(*whole, stride, padding, dilation, names).squeeze(0)
    operands = _autocast(operands)
    arguments = (stride, padding, dilation, names)
    plan = _planned(_torch_plan, _torch_plan_cached, operands, arguments)
    return _called(plan, operands)


def _keras_layer(
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
    operands = _autocast((x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias))
    arguments = (strides, padding, dilation_rate, data_format, names)
    return _called(_planned(_keras_plan, _keras_plan_cached, operands, arguments), operands)


def _called(plan: _Plan, operands: tuple[Any, ...]) -> Tensor:
    if plan.lies_ready and _is_quiet() and _are_plain(operands):
        if not torch.is_grad_enabled() or not _any_requires_grad(operands):
            return _run_at_once(plan, operands)
        # Whoever looks at what is saved shall see the same with a profiler and without one.
        if _saved_tensors_hooks(False) is None:
            return _applied(_AtOnce, plan, *operands)
    function = _forward if plan.refusal is None else _composition
    return _image_to_caller(plan, function(plan.geometry, *_as_kernel_reads(plan, operands)))


def _as_kernel_reads(plan: _Plan, operands: Sequence[Any]) -> list[Any]:
    """Views of the caller's operands in the layouts of Keras."""
    if not plan.from_torch:
        return list(operands)
    x, depthwise, pointwise, *biases = operands
    g = plan.geometry
    shape = (g.in_channels, g.depth_multiplier, g.kernel_height, g.kernel_width)
    return [
        _image_from_caller(plan, x),
        depthwise.reshape(shape).permute(2, 3, 0, 1),
        pointwise.permute(2, 3, 1, 0),
        *biases,
    ]


def _as_caller_sees(plan: _Plan, gradients: Sequence[Any]) -> list[Any]:
    """The reverse, of gradients; those that nobody asked for are None."""
    if not plan.from_torch:
        return list(gradients)
    x, depthwise, pointwise, *biases = gradients
    g = plan.geometry
    shape = (g.depthwise_channels, 1, g.kernel_height, g.kernel_width)
    return [
        None if x is None else _image_to_caller(plan, x),
        None if depthwise is None else depthwise.permute(2, 3, 0, 1).reshape(shape),
        None if pointwise is None else pointwise.permute(3, 2, 0, 1),
        *biases,
    ]


def _image_from_caller(plan: _Plan, image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1) if plan.from_torch and plan.geometry.layout == 0 else image


def _image_to_caller(plan: _Plan, image: Tensor) -> Tensor:
    return image.permute(0, 3, 1, 2) if plan.from_torch and plan.geometry.layout == 0 else image


def _autocast(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Casts the operands of a call as `torch.autocast` casts those of a convolution."""
    device = _kind_of_device(operands[0])
    if device == "meta" or not _is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        operand.to(dtype)
        if operand is not None and operand.is_floating_point() and operand.dtype != torch.float64
        else operand
        for operand in operands
    )


def _kind_of_device(x: Tensor) -> str:
    return "cpu" if x.is_cpu else x.device.type


def _planned(
    build: Callable[..., _Plan],
    cached: Callable[..., _Plan],
    operands: tuple[Any, ...],
    arguments: tuple[Any, ...],
) -> _Plan:
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


def _torch_plan(device: str, *arguments: Any) -> _Plan:
    """(kind of device, facts of the operands, stride, padding, dilation, names) -> plan."""
    *tensors, stride, padding, dilation, names = arguments
    dtype = _one_dtype(
        ("x", "depthwise_weight", "pointwise_weight", "depthwise_bias", "bias"), tensors
    )
    (_, x, x_stride), (_, depthwise, depthwise_stride), (_, pointwise, pointwise_stride) = tensors[
        :3
    ]
    if len(x) != 4:
        raise ValueError(
            "`x` must have 4 dimensions, (batch, channels, height, width), or 3 without the batch. "
            f"Received: x.shape={tuple(x)}"
        )
    channels = x[1]
    last = _lies_channels_last(x, x_stride)
    spec = ConvSpec(
        strides=canonical_pair("stride", stride),
        padding=_padding(padding),
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
    return _finished(
        geometry,
        device,
        dtype,
        y_shape,
        image_axes,
        _is_dense(x, x_stride, image_axes)
        and _is_dense(depthwise, depthwise_stride, _DEPTHWISE_AXES)
        and _is_dense(pointwise, pointwise_stride, _POINTWISE_AXES),
        tensors,
        from_torch=True,
    )


def _keras_plan(
    device: str,
    *arguments: Any,
) -> _Plan:
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
    axes = (0, 1, 2, 3)
    dense = all(_is_dense(shape, stride, axes) for _, shape, stride in tensors[:3])
    return _finished(
        geometry, device, dtype, geometry.y_shape, axes, dense, tensors, from_torch=False
    )


_torch_plan_cached = functools.lru_cache(maxsize=4096)(_torch_plan)
_keras_plan_cached = functools.lru_cache(maxsize=4096)(_keras_plan)


def _finished(
    geometry: Geometry,
    device: str,
    dtype: torch.dtype,
    y_shape: tuple[int, ...],
    y_axes: Positions,
    dense: bool,
    tensors: Sequence[Any],
    *,
    from_torch: bool,
) -> _Plan:
    # On the meta device, tensors have shapes and no data: those that the CPU would give.
    refusal = backends.why_not(geometry, _name(dtype), "cpu" if device == "meta" else device)
    ready = refusal is None and device == "cpu" and all(type(size) is int for size in geometry)
    ready = ready and dense and all(t is None or _is_dense(t[1], t[2], (0,)) for t in tensors[3:])
    return _Plan(
        geometry=geometry,
        refusal=refusal,
        y_shape=y_shape,
        y_stride=_dense_stride(y_shape, y_axes),
        lies_ready=ready,
        from_torch=from_torch,
        flat=_flat(geometry) if ready else None,
        kernels=_kernels(geometry, _name(dtype)) if ready else None,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


def _dense_stride(shape: Sequence[int], axes: Positions) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose axes lie in memory in the order of `axes`."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(axes):
        strides[axis] = step
        step = step * max(shape[axis], 1)
    return tuple(strides)


def _is_dense(shape: Sequence[int], stride: Sequence[int], axes: Positions) -> bool:
    dense = _dense_stride(shape, axes)
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


# ---------------------------------------------------------- the short way, when nobody is listening


def _quiet_threads() -> frozenset[int]:
    """Dispatch keys, as numbers, of a thread that asks for nothing special."""
    try:
        keys, key_set = torch._C.DispatchKey, torch._C.DispatchKeySet
        inference = key_set(keys.BackendSelect)
        both = inference.raw_repr(), (inference | key_set(keys.ADInplaceOrView)).raw_repr()
        torch._C._dispatch_tls_local_include_set().raw_repr()
        return frozenset(both)
    except AttributeError:  # Not public, so a later torch may lack them; then no call is short.
        return frozenset()


_QUIET_THREADS = _quiet_threads()
# Looked up once: a call of a small layer takes about as long as a dozen of such chains.
_thread_keys: Any = getattr(torch._C, "_dispatch_tls_local_include_set", None)
_profiler_runs: Any = torch._C._autograd._profiler_enabled
_forward_ad: Any = torch.autograd.forward_ad
_is_autocast_enabled = torch.is_autocast_enabled


def _is_quiet() -> bool:
    """Whether no mode, tracer, transform or profiler wants to see the operators of this thread."""
    return (
        len(_QUIET_THREADS) > 0
        and _thread_keys().raw_repr() in _QUIET_THREADS
        and _forward_ad._current_level < 0
        and not _profiler_runs()
    )


_PLAIN_TYPES = frozenset({Tensor, nn.Parameter})
# By a transform of torch.func that has ended.
_is_wrapped: Any = torch._C._functorch.is_functorch_wrapped_tensor


def _are_plain(operands: Operands) -> bool:
    """Whether the tensors are memory with a shape and nothing else.

    That they are on the CPU and that the kernel takes their dtype is known from the plan.
    """
    for tensor in operands:
        if tensor is not None and (
            type(tensor) not in _PLAIN_TYPES or tensor.is_neg() or tensor._is_zerotensor()
        ):
            return False
    return not _is_wrapped(operands[0])


def _any_requires_grad(operands: Operands) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in operands)


_saved_tensors_hooks: Any = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: ()
)


def _run_at_once(plan: _Plan, operands: Operands) -> Tensor:
    x = operands[0]
    assert x is not None
    assert plan.kernels is not None
    y = torch.empty_strided(plan.y_shape, plan.y_stride, dtype=x.dtype)
    plan.kernels.forward(plan.flat, *operands, y)
    return y


def _run_backward_at_once(
    plan: _Plan, needed: Sequence[bool], dy: Tensor, operands: Operands, y: Tensor | None
) -> list[Tensor | None]:
    assert plan.kernels is not None
    if dy.stride() != plan.y_stride:
        dy = torch.empty_strided(plan.y_shape, plan.y_stride, dtype=dy.dtype).copy_(dy)
    gradients = [
        torch.empty_strided(operand.shape, operand.stride(), dtype=operand.dtype)
        if wanted and operand is not None
        else None
        for operand, wanted in zip(operands, needed, strict=True)
    ]
    plan.kernels.backward(plan.flat, dy, *operands, y, *gradients)
    return gradients


class _AtOnce(torch.autograd.Function):
    """(plan, five operands) -> y, without views between the caller's tensors and the kernel's."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *operands: Any) -> Tensor:
        y = _run_at_once(plan, operands)
        ctx.plan = plan
        ctx.save_for_backward(*operands, y if _saves_output(plan.geometry) else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        plan: _Plan = ctx.plan
        *operands, y = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled() and _is_quiet() and _are_plain((dy, *operands, y)):
            return None, *_run_backward_at_once(plan, needed, dy, operands, y)
        gradients = _gradients(
            plan.geometry,
            needed,
            _image_from_caller(plan, dy),
            _as_kernel_reads(plan, operands),
            None if y is None else _image_from_caller(plan, y),
        )
        return None, *_as_caller_sees(plan, gradients)


# ------------------------------------------------------------------------------------ the operators


@functools.lru_cache(maxsize=4096)
def _flat(geometry: Geometry) -> npt.NDArray[np.int64]:
    flat = np.array(geometry, np.int64)
    flat.flags.writeable = False
    return flat


@functools.lru_cache(maxsize=4096)
def _kernels(geometry: Geometry, dtype: str) -> backends.Kernels:
    return backends.choose(geometry, dtype, "cpu").load()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _run_forward(
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    geometry: Sequence[int],
) -> Tensor:
    geometry = Geometry(*geometry)
    operands = (x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias)
    y = torch.empty(geometry.y_shape, dtype=x.dtype)
    kernels = _kernels(geometry, _name(x.dtype))
    kernels.forward(_flat(geometry), *map(_dense, operands), y)
    return y


def _run_backward(
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
    geometry = Geometry(*geometry)
    operands = (x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias)
    gradients = _empty_gradients(operands, wrt)
    named = [None] * 5
    for position, gradient in zip(wrt, gradients, strict=True):
        named[position] = gradient
    kernels = _kernels(geometry, _name(x.dtype))
    kernels.backward(_flat(geometry), *map(_dense, (dy, *operands, y)), *named)
    return gradients


def _empty_gradients(operands: Operands, wrt: Sequence[int]) -> list[Any]:
    chosen = [operands[position] for position in wrt]
    return [t.new_empty(t.shape) for t in chosen if t is not None]


def _fake_forward(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(Geometry(*others[-1]).y_shape)


def _fake_backward(dy: Tensor, *others: Any) -> list[Tensor]:
    return _empty_gradients(others[:5], others[-1])


def _forward_below_autograd(geometry: Geometry, operands: Sequence[Any]) -> Tensor:
    if _is_quiet() and _are_plain(operands) and operands[0].is_cpu:
        arguments: Any = (*operands, geometry)
        return _run_forward(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sepconv.forward.default(*operands, geometry)


def _backward_below_autograd(
    geometry: Geometry, wrt: Positions, dy: Tensor, operands: Sequence[Any], y: Tensor | None
) -> list[Tensor]:
    if _is_quiet() and _are_plain((dy, *operands, y)) and dy.is_cpu:
        arguments: Any = (*operands, y, geometry, wrt)
        return _run_backward(dy, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sepconv.backward.default(dy, *operands, y, geometry, wrt)


def _forward(geometry: Geometry, *operands: Any) -> Tensor:
    if _is_quiet():
        return _applied(_Forward, geometry, *operands)
    if torch._C._are_functorch_transforms_active():
        return _Forward.apply(geometry, *operands)
    return torch.ops.sepconv.forward.default(*operands, geometry)


def _backward(
    geometry: Geometry, wrt: Positions, dy: Tensor, operands: Operands, y: Tensor | None
) -> Sequence[Tensor]:
    """`y` is the output or None; with it, the kernel need not compute it again."""
    if _is_quiet():
        return _applied(_Backward, geometry, wrt, dy, *operands, y)
    if torch._C._are_functorch_transforms_active():
        return _Backward.apply(geometry, wrt, dy, *operands, y)
    return torch.ops.sepconv.backward.default(dy, *operands, y, geometry, wrt)


def _applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """What `function.apply` does outside of transforms, without binding arguments to names."""
    if any(isinstance(argument, Tensor) and _is_wrapped(argument) for argument in arguments):
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


# -------------------------------------------------------------------------------------- derivatives


def _saves_output(geometry: Geometry) -> bool:
    return geometry.activation != 0 and _native.slope_follows_from_output(geometry.activation)


def _is_multilinear(geometry: Geometry) -> bool:
    g = geometry
    activations = g.input_activation, g.depthwise_activation, g.activation
    return not any((*activations, g.has_depthwise_bias, g.has_bias))


def _replaced(values: Sequence[Any], positions: Sequence[int], others: Sequence[Any]) -> list[Any]:
    result = list(values)
    for position, other in zip(positions, others, strict=True):
        result[position] = other
    return result


def _sum(terms: Sequence[Tensor]) -> Tensor | None:
    return functools.reduce(torch.add, terms) if terms else None


def _primals(tensors: Sequence[Any]) -> list[Any]:
    """What a context saved for forward mode, without the tangents that it carries."""
    unpack = torch.autograd.forward_ad.unpack_dual
    return [None if tensor is None else unpack(tensor).primal for tensor in tensors]


def _gradients(
    geometry: Geometry,
    needed: Sequence[bool],
    dy: Tensor,
    operands: Sequence[Any],
    y: Tensor | None,
) -> list[Any]:
    """Gradients by the operands, None for those not needed; they can be differentiated again."""
    wrt = tuple(position for position, wanted in enumerate(needed) if wanted)
    differentiated = torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0
    gradients: Sequence[Tensor]
    if differentiated and not _is_multilinear(geometry):
        gradients = _backward_in_parts(geometry, wrt, dy, operands)
    else:
        gradients = _backward(geometry, wrt, dy, operands, y)
    return _replaced([None] * 5, wrt, gradients)


class _Forward(torch.autograd.Function):
    """(geometry, five operands) -> y."""

    @staticmethod
    def forward(geometry: Geometry, *operands: Any) -> Tensor:
        return _forward_below_autograd(geometry, operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        geometry, *operands = inputs
        ctx.geometry = geometry
        saved = (*operands, output if _saves_output(geometry) else None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        *operands, y = ctx.saved_tensors
        return None, *_gradients(ctx.geometry, ctx.needs_input_grad[-5:], dy, operands, y)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Tensor:
        *operands, _ = _primals(ctx.saved_tensors)
        return _tangent_in_parts(ctx.geometry, operands, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, geometry: Geometry, *operands: Any) -> tuple[Any, Any]:
        def call(geometry: Geometry, *operands: Any) -> Tensor:
            return _forward(geometry, *operands)

        return _mapped(call, {0}, True, info.batch_size, in_dims[-5:], geometry, operands)


class _Backward(torch.autograd.Function):
    """(geometry, wrt, dy, five operands, y or None) -> gradients by the operands in `wrt`."""

    @staticmethod
    def forward(geometry: Geometry, wrt: Positions, dy: Tensor, *others: Any) -> tuple[Any, ...]:
        *operands, y = others
        return tuple(_backward_below_autograd(geometry, wrt, dy, operands, y))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.geometry, ctx.wrt, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        dy, *operands, _ = ctx.saved_tensors
        g, wrt = ctx.geometry, ctx.wrt
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[-7:-1]) if needs]
        live = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        positions = tuple(wrt[i] for i in live)
        values = [cotangents[i] for i in live]
        gradients: list[Any] = [None] * 6  # Of dy and the operands.
        if not live or not needed:
            pass
        elif _is_multilinear(g):
            replaced = [
                _replaced(operands, [p], [v]) for p, v in zip(positions, values, strict=True)
            ]
            if 0 in needed:
                gradients[0] = _sum([_forward(g, *operands) for operands in replaced])
            # <v, gradient by p> = <dy, forward with p replaced by v>, which operand p is not in.
            for i in (position - 1 for position in needed if position > 0):
                terms = zip(positions, replaced, strict=True)
                gradients[1 + i] = _sum(
                    [_backward(g, (i,), dy, other, None)[0] for p, other in terms if p != i]
                )
        else:
            # Only for who calls the operator itself. `y` is a function of the operands, and what
            # follows accounts for every use of those.
            point: list[Any] = [
                None if t is None else t.detach().requires_grad_() for t in (dy, *operands)
            ]
            with torch.enable_grad():
                parts = _backward_in_parts(g, positions, point[0], point[1:])
            chosen = [point[i] for i in needed]
            pulled = torch.autograd.grad(parts, chosen, values, allow_unused=True)
            gradients = _replaced(gradients, needed, pulled)
        return None, None, *gradients, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        g, wrt = ctx.geometry, ctx.wrt
        if not _is_multilinear(g):
            raise NotImplementedError(
                "`sepconv::backward` with an activation or a bias has no forward derivative; "
                "`separable_conv2d` differentiates it in parts"
            )
        dy, *operands = _primals(ctx.saved_tensors[:6])
        dy_tangent, *operand_tangents = tangents[-7:-1]
        terms: dict[int, list[Tensor]] = {position: [] for position in wrt}

        def collect(positions: Positions, dy: Tensor, operands: Operands) -> None:
            gradients = _backward(g, positions, dy, operands, None)
            for position, gradient in zip(positions, gradients, strict=True):
                terms[position].append(gradient)

        if dy_tangent is not None:
            collect(wrt, dy_tangent, operands)
        for i, tangent in enumerate(operand_tangents):
            others = tuple(position for position in wrt if position != i)
            if tangent is not None and others:
                collect(others, dy, _replaced(operands, [i], [tangent]))
        sums = [_sum(terms[position]) for position in wrt]
        return tuple(
            torch.zeros_like(operands[position]) if total is None else total
            for position, total in zip(wrt, sums, strict=True)
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, geometry: Geometry, wrt: Positions, *tensors: Any
    ) -> tuple[Any, Any]:
        def call(geometry: Geometry, dy: Tensor, *others: Any) -> tuple[Tensor, ...]:
            *operands, y = others
            return tuple(_backward(geometry, wrt, dy, operands, y))

        foldable = wrt == (0,)
        return _mapped(call, {0, 1, 6}, foldable, info.batch_size, in_dims[-7:], geometry, tensors)


def _mapped(
    call: Callable[..., Any],
    images: set[int],
    foldable: bool,
    size: int,
    dims: Sequence[Any],
    geometry: Geometry,
    tensors: Sequence[Any],
) -> tuple[Any, Any]:
    """Folds a mapped axis into the batch; where a kernel or its gradient is mapped, loops.

    `images` are the positions of tensors that have a batch, where there is such a tensor.
    """
    mapped = [i for i, dim in enumerate(dims) if dim is not None]
    tensors = _replaced(tensors, mapped, [tensors[i].movedim(dims[i], 0) for i in mapped])
    if foldable and images.issuperset(mapped):
        images = {i for i in images if tensors[i] is not None}
        whole = {
            i: tensors[i] if i in mapped else tensors[i].expand(size, *tensors[i].shape)
            for i in images
        }
        folded = _replaced(tensors, list(whole), [t.flatten(0, 1) for t in whole.values()])
        out = call(geometry._replace(batch=size * geometry.batch), *folded)
        sizes = (size, geometry.batch)
        if isinstance(out, Tensor):
            return out.unflatten(0, sizes), 0
        return tuple(t.unflatten(0, sizes) for t in out), (0,) * len(out)
    outs = [
        call(geometry, *_replaced(tensors, mapped, [tensors[i][k] for i in mapped]))
        for k in range(size)
    ]
    if isinstance(outs[0], Tensor):
        return torch.stack(outs), 0
    stacked = tuple(torch.stack(each) for each in zip(*outs, strict=True))
    return stacked, (0,) * len(stacked)


# --------------------------------------------------------------- the operation in torch's own terms


def _hard_sigmoid(x: Tensor) -> Tensor:
    # That of torch has a sixth in single precision.
    return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, x / 6 + 0.5))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
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


def _activate(code: int, x: Tensor) -> Tensor:
    return _ACTIVATIONS[ACTIVATIONS[code]](x)


def _times_slope(code: int, x: Tensor, tensor: Tensor) -> Tensor:
    return tensor * _SLOPES[ACTIVATIONS[code]](x) if code else tensor


def _along_channels(geometry: Geometry, vector: Tensor) -> Tensor:
    return vector if geometry.layout == 0 else vector[:, None, None]


def _over_pixels(geometry: Geometry, image: Tensor) -> Tensor:
    return image.sum((0, 1, 2) if geometry.layout == 0 else (0, 2, 3))


class _Part(NamedTuple):
    """A multilinear call: some operands of the whole one, and constants for the others."""

    geometry: Geometry
    constants: dict[int, Tensor]

    def forward(self, *given: Tensor) -> Tensor:
        return _forward(self.geometry, *self._operands(given))

    def backward(self, dy: Tensor, *given: Tensor) -> Sequence[Tensor]:
        """The gradients by what was given."""
        wrt = tuple(i for i in range(3) if i not in self.constants)
        return _backward(self.geometry, wrt, dy, self._operands(given), None)

    def tangent(self, given: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor | None:
        return _sum(
            [
                self.forward(*_replaced(given, [i], [tangent]))
                for i, tangent in enumerate(tangents)
                if tangent is not None
            ]
        )

    def _operands(self, given: Sequence[Tensor]) -> list[Any]:
        rest = iter(given)
        first = [self.constants[i] if i in self.constants else next(rest) for i in range(3)]
        return [*first, None, None]


def _parts(geometry: Geometry, like: Tensor) -> tuple[_Part, _Part]:
    """Both stages, each as a call of its own.

    The depthwise one has an identity for the pointwise kernel, the other one ones for the depthwise
    kernel.
    """
    g = _linear(geometry)
    between = g.depthwise_channels
    identity = torch.eye(between, dtype=like.dtype, device=like.device)[None, None]
    ones = torch.ones((1, 1, between, 1), dtype=like.dtype, device=like.device)
    pointwise = g._replace(
        in_height=g.out_height,
        in_width=g.out_width,
        in_channels=between,
        depth_multiplier=1,
        kernel_height=1,
        kernel_width=1,
        stride_height=1,
        stride_width=1,
        dilation_height=1,
        dilation_width=1,
        pad_top=0,
        pad_left=0,
    )
    return _Part(g._replace(out_channels=between), {2: identity}), _Part(pointwise, {1: ones})


def _linear(geometry: Geometry) -> Geometry:
    """The call without activations and biases."""
    return geometry._replace(
        input_activation=0, depthwise_activation=0, activation=0, has_depthwise_bias=0, has_bias=0
    )


def _plus(geometry: Geometry, image: Tensor | None, vector: Tensor | None) -> Any:
    if vector is None:
        return image
    along = _along_channels(geometry, vector)
    return along.expand(geometry.y_shape) if image is None else image + along


def _backward_in_parts(
    geometry: Geometry, wrt: Positions, dy: Tensor, operands: Sequence[Any]
) -> list[Tensor]:
    """What `backward` computes, of functions that torch can differentiate."""
    g = geometry
    x, kernel, pointwise, depthwise_bias, bias = operands
    a = _activate(g.input_activation, x)
    if g.depthwise_activation:
        first, second = _parts(g, x)
        u = _plus(g, first.forward(a, kernel), depthwise_bias)
        v = _activate(g.depthwise_activation, u)
        z = _plus(g, second.forward(v, pointwise), bias)
        dz = _times_slope(g.activation, z, dy)
        dv, d_pointwise = second.backward(dz, v, pointwise)
        du = _times_slope(g.depthwise_activation, u, dv)
        da, d_kernel = first.backward(du, a, kernel)
        d_depthwise_bias = _over_pixels(g, du)
    else:
        whole = _Part(_linear(g), {})
        z = whole.forward(a, kernel, pointwise)
        if depthwise_bias is not None:
            z = _plus(g, z, depthwise_bias @ pointwise[0, 0])
        dz = _times_slope(g.activation, _plus(g, z, bias), dy)
        da, d_kernel, d_pointwise = whole.backward(dz, a, kernel, pointwise)
        sums = _over_pixels(g, dz)
        d_depthwise_bias = pointwise[0, 0] @ sums
        if depthwise_bias is not None:
            d_pointwise = d_pointwise + depthwise_bias[:, None] * sums
    dx = _times_slope(g.input_activation, x, da)
    gradients = (dx, d_kernel, d_pointwise, d_depthwise_bias, _over_pixels(g, dz))
    return [gradients[position] for position in wrt]


def _tangent_in_parts(geometry: Geometry, operands: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """The tangent of the output; a tangent of `None` is zero."""
    g = geometry
    x, kernel, pointwise, depthwise_bias, bias = operands
    x_, kernel_, pointwise_, depthwise_bias_, bias_ = tangents
    a = _activate(g.input_activation, x)
    a_ = None if x_ is None else _times_slope(g.input_activation, x, x_)
    if g.depthwise_activation:
        first, second = _parts(g, x)
        u = _plus(g, first.forward(a, kernel), depthwise_bias)
        between = first.geometry
        u_ = _plus(between, first.tangent((a, kernel), (a_, kernel_)), depthwise_bias_)
        v = _activate(g.depthwise_activation, u)
        v_ = None if u_ is None else _times_slope(g.depthwise_activation, u, u_)
        z = second.forward(v, pointwise)
        z_ = second.tangent((v, pointwise), (v_, pointwise_))
    else:
        whole = _Part(_linear(g), {})
        z = whole.forward(a, kernel, pointwise)
        z_ = whole.tangent((a, kernel, pointwise), (a_, kernel_, pointwise_))
        if depthwise_bias is not None:
            z = _plus(g, z, depthwise_bias @ pointwise[0, 0])
            if depthwise_bias_ is not None:
                z_ = _plus(g, z_, depthwise_bias_ @ pointwise[0, 0])
            if pointwise_ is not None:
                z_ = _plus(g, z_, depthwise_bias @ pointwise_[0, 0])
    z_ = _plus(g, z_, bias_)
    return _times_slope(g.activation, _plus(g, z, bias), z_)


def _composition(
    geometry: Geometry,
    x: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The operation by torch's convolutions."""
    g = geometry
    u = _activate(g.input_activation, x if g.layout else x.permute(0, 3, 1, 2))
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
    v = _activate(g.depthwise_activation, u)
    z = nn.functional.conv2d(v, pointwise_kernel.permute(3, 2, 0, 1), bias)
    y = _activate(g.activation, z)
    return y if g.layout else y.permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------- registration


def _composite(
    *arguments: Any,
) -> Tensor:
    *tensors, stride, word, amounts, dilation = arguments[:9]
    padding = _from_schema(word, amounts)
    rest: Any = (tuple(stride), padding, tuple(dilation), arguments[9:])
    return _torch_layer(*tensors, *rest)


def _composite_keras(*arguments: Any) -> Tensor:
    *tensors, strides, word, amounts, dilation_rate, data_format = arguments[:10]
    padding = _from_schema(word, amounts)
    rest: Any = (tuple(strides), padding, tuple(dilation_rate), data_format, arguments[10:])
    return _keras_layer(*tensors, *rest)


def _register() -> torch.library.Library:
    library = torch.library.Library("sepconv", "DEF")
    kernels = "Tensor depthwise_kernel, Tensor pointwise_kernel"
    weights = "Tensor depthwise_weight, Tensor pointwise_weight"
    biases = "Tensor? depthwise_bias, Tensor? bias"
    names = "str activation, str input_activation, str depthwise_activation"
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(
        f"forward(Tensor x, {kernels}, {biases}, SymInt[] geometry) -> Tensor", tags=tags
    )
    library.define(
        f"backward(Tensor dy, Tensor x, {kernels}, {biases}, Tensor? y, SymInt[] geometry, "
        "int[] wrt) -> Tensor[]",
        tags=tags,
    )
    # A padding is a word, or four amounts.
    library.define(
        f"separable_conv2d(Tensor x, {weights}, {biases}, int[2] stride, str padding, "
        f"int[] amounts, int[2] dilation, {names}) -> Tensor",
        tags=tags,
    )
    library.define(
        f"separable_conv2d_keras(Tensor x, {kernels}, {biases}, int[2] strides, str padding, "
        f"int[] amounts, int[2] dilation_rate, str data_format, {names}) -> Tensor",
        tags=tags,
    )
    library.impl("forward", _run_forward, "CPU")
    library.impl("backward", _run_backward, "CPU")
    library.impl(
        "forward",
        lambda *arguments: _Forward.apply(Geometry(*arguments[-1]), *arguments[:-1]),
        "Autograd",
    )
    library.impl(
        "backward",
        lambda *arguments: list(
            _Backward.apply(Geometry(*arguments[-2]), tuple(arguments[-1]), *arguments[:-2])
        ),
        "Autograd",
    )
    library.impl("separable_conv2d", _composite, "CompositeImplicitAutograd")
    library.impl("separable_conv2d_keras", _composite_keras, "CompositeImplicitAutograd")
    torch.library.register_fake("sepconv::forward", _fake_forward, lib=library)
    torch.library.register_fake("sepconv::backward", _fake_backward, lib=library)
    return library


_LIBRARY = _register()
_compiled = torch.ops.sepconv.separable_conv2d.default
_compiled_keras = torch.ops.sepconv.separable_conv2d_keras.default
