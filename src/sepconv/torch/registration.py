"""The operators as torch knows them: schemas, kernels, shapes, derivatives.

sepconv::forward, sepconv::backward     in the layouts of Keras, see `operators`
sepconv::separable_conv2d, separable_conv2d_keras    the doors, as torch.compile sees them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sepconv.spec import Padding
from sepconv.torch.derivatives import autograd_backward, autograd_forward
from sepconv.torch.layers import keras_layer, torch_layer
from sepconv.torch.operators import fake_backward, fake_forward, run_backward, run_forward


def as_schema(padding: Padding) -> tuple[str, list[int]]:
    """A padding as two arguments of an operator: a word, empty where the amounts stand for it."""
    if isinstance(padding, str):
        return padding, []
    return "", [amount for pair in padding for amount in pair]


def from_schema(word: str, amounts: Sequence[int]) -> Padding:
    """The reverse of `as_schema`."""
    return word or ((amounts[0], amounts[1]), (amounts[2], amounts[3]))


# Of the devices on which `sepconv.backends` has a kernel.
_DISPATCH_KEYS = ("CPU", "CUDA")


def _composite(*arguments: Any) -> Tensor:
    *tensors, stride, word, amounts, dilation = arguments[:9]
    padding = from_schema(word, amounts)
    rest: Any = (tuple(stride), padding, tuple(dilation), arguments[9:])
    return torch_layer(*tensors, *rest)


def _composite_keras(*arguments: Any) -> Tensor:
    *tensors, strides, word, amounts, dilation_rate, data_format = arguments[:10]
    padding = from_schema(word, amounts)
    rest: Any = (tuple(strides), padding, tuple(dilation_rate), data_format, arguments[10:])
    return keras_layer(*tensors, *rest)


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
    for key in _DISPATCH_KEYS:
        library.impl("forward", run_forward, key)
        library.impl("backward", run_backward, key)
    library.impl("forward", autograd_forward, "Autograd")
    library.impl("backward", autograd_backward, "Autograd")
    library.impl("separable_conv2d", _composite, "CompositeImplicitAutograd")
    library.impl("separable_conv2d_keras", _composite_keras, "CompositeImplicitAutograd")
    torch.library.register_fake("sepconv::forward", fake_forward, lib=library)
    torch.library.register_fake("sepconv::backward", fake_backward, lib=library)
    return library


_LIBRARY = _register()
compiled = torch.ops.sepconv.separable_conv2d.default
compiled_keras = torch.ops.sepconv.separable_conv2d_keras.default
