"""The compiled kernels. Callers outside the library use a door instead."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def forward(
    geometry: npt.NDArray[np.int64],
    x: Any,
    depthwise_kernel: Any,
    pointwise_kernel: Any,
    depthwise_bias: Any | None,
    bias: Any | None,
    y: Any,
    dtype: int = -1,
) -> None: ...
def backward(
    geometry: npt.NDArray[np.int64],
    dy: Any,
    x: Any,
    depthwise_kernel: Any,
    pointwise_kernel: Any,
    depthwise_bias: Any | None,
    bias: Any | None,
    y: Any | None,
    dx: Any | None,
    d_depthwise_kernel: Any | None,
    d_pointwise_kernel: Any | None,
    d_depthwise_bias: Any | None,
    d_bias: Any | None,
    dtype: int = -1,
) -> None: ...

class PackedWeights: ...

def pack(
    geometry: npt.NDArray[np.int64],
    depthwise_kernel: Any,
    pointwise_kernel: Any,
    depthwise_bias: Any | None,
    bias: Any | None,
    dtype: int = -1,
) -> PackedWeights: ...
def forward_packed(
    geometry: npt.NDArray[np.int64], x: Any, weights: PackedWeights, y: Any
) -> None: ...
def geometry_fields() -> tuple[str, ...]: ...
def activations() -> tuple[str, ...]: ...
def slope_follows_from_output(code: int) -> bool: ...
def set_num_threads(num_threads: int) -> None: ...
def get_num_threads() -> int: ...
def cpu_target() -> str: ...
def available_targets() -> tuple[str, ...]: ...
def set_target(name: str) -> None: ...
def tile_constants(dtype_name: str) -> dict[str, int]: ...
def plan(geometry: Sequence[int], dtype_name: str, backward: bool) -> dict[str, int]: ...
def fma_peak_gflops(dtype_name: str = "float32") -> float: ...
def xla_handlers() -> dict[str, Any]: ...
