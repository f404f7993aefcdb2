"""The functions of the door: what users call, in the layouts of torch or of Keras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from sepconv import backends
from sepconv.spec import IntOrPair, canonical_activation, canonical_padding, canonical_pair
from sepconv.torch import operators, plans
from sepconv.torch.layers import autocast, keras_layer, torch_layer
from sepconv.torch.plans import TorchPadding, torch_padding
from sepconv.torch.registration import as_schema, compiled, compiled_keras

__all__ = ["separable_conv2d", "separable_conv2d_keras", "use_gpu_kernels", "why_not"]

# What a program has on the oldest GPU that the kernels are compiled for (compute capability 8.0).
_GPU_SHARED_BYTES = 163 * 1024


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
        word, amounts = as_schema(torch_padding(padding))
        words = [canonical_activation(name) for name in names]
        pairs = canonical_pair("stride", stride), canonical_pair("dilation", dilation)
        return compiled(*tensors, pairs[0], word, amounts, pairs[1], *words)
    # The cache takes (1.0, 1) for (1, 1), so pairs are checked before they become a key.
    return torch_layer(
        *tensors,
        stride if type(stride) is int else _pair("stride", stride),
        padding if type(padding) is int or type(padding) is str else torch_padding(padding),
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
        word, amounts = as_schema(canonical_padding(padding))
        words = [canonical_activation(name) for name in names]
        pairs = canonical_pair("strides", strides), canonical_pair("dilation_rate", dilation_rate)
        return compiled_keras(*tensors, pairs[0], word, amounts, pairs[1], data_format, *words)
    return keras_layer(
        *tensors,
        strides if type(strides) is int else _pair("strides", strides),
        padding if type(padding) is str else canonical_padding(padding),
        dilation_rate if type(dilation_rate) is int else _pair("dilation_rate", dilation_rate),
        data_format,
        names,
    )


def use_gpu_kernels(enabled: bool = True) -> None:
    """Lets calls on NVIDIA GPUs run the kernels of this library, which are experimental.

    They need the package triton. Without this call torch's own two convolutions run there, and
    `why_not` says so. The kernels compute float32, bfloat16 and float16, with deterministic
    gradients.

    Args:
        enabled: Whether calls from now on, of all threads, may run them.

    Raises:
        RuntimeError: a GPU that this process sees has less shared memory than the kernels take.

    Example:
        >>> import torch
        >>> use_gpu_kernels(torch.cuda.is_available())
        >>> use_gpu_kernels(False)
    """
    if enabled and torch.cuda.is_available():
        _check_shared_memory()
    backends.use_gpu_kernels(enabled)
    for cached in (plans.torch_plan_cached, plans.keras_plan_cached, operators.kernels_for):
        cached.cache_clear()


def _check_shared_memory() -> None:
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        has = getattr(gpu, "shared_memory_per_block_optin", _GPU_SHARED_BYTES)
        if has < _GPU_SHARED_BYTES:
            raise RuntimeError(
                f"the GPU kernels take up to {_GPU_SHARED_BYTES} bytes of shared memory, and GPU "
                f"{index} gives a program less. Received: {has} bytes on {gpu.name}; leave it out "
                "by CUDA_VISIBLE_DEVICES"
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
    return plans.planned(
        plans.torch_plan,
        plans.torch_plan,
        autocast((*tensors, depthwise_bias, bias)),
        (stride, padding, dilation, names),
    ).refusal


def _pair(argument: str, value: Any) -> tuple[int, int]:
    if type(value) is tuple and (*map(type, value),) == (int, int):
        return value
    return canonical_pair(argument, value)
