"""The PyTorch door: one differentiable operation on tensors, and a module of it.

On the CPU a call is one operator of torch forward, and one backward for all gradients; on an NVIDIA
GPU too, once `use_gpu_kernels` asked for it. Elsewhere torch's own two convolutions run instead;
`why_not` tells. Tensors in the channels_last memory
format and contiguous ones are computed as they lie, and the output lies like the input.

The rooms, from the caller to the kernel: `functions` and `module` are what users call; `layers` has
the way of a call, by its plan from `plans`, at once (`at_once`) when nobody listens (`quiet`) or
through autograd (`derivatives`), to the kernels of a backend (`operators`) or to torch's own
convolutions (`composition`). `registration` tells torch about the operators.
"""

from __future__ import annotations

import torch

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        "`torch` must be 2.10 or newer: its tensors reach the kernel through the C exchange "
        f"interface of DLPack. Received: torch.__version__={torch.__version__}"
    )

from sepconv.torch.functions import (
    separable_conv2d,
    separable_conv2d_keras,
    use_gpu_kernels,
    why_not,
)
from sepconv.torch.module import SeparableConv2d

__all__ = [
    "SeparableConv2d",
    "separable_conv2d",
    "separable_conv2d_keras",
    "use_gpu_kernels",
    "why_not",
]
