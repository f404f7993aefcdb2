"""Which kernel runs a call, and if one does not, why not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from sepconv.spec import Geometry

__all__ = ["BACKENDS", "Backend", "Kernels", "choose", "use_gpu_kernels", "why_not"]


def _no_packing(*_: Any) -> NoReturn:
    raise NotImplementedError("these kernels do not pack weights")


class Kernels(NamedTuple):
    """The entry points of a backend; arguments as in `sepconv._native`."""

    forward: Callable[..., None]
    """Fills the output."""
    backward: Callable[..., None]
    """Fills the gradients."""
    pack: Callable[..., Any] = _no_packing
    """Copies and packs the weights of many forward calls."""
    forward_packed: Callable[..., None] = _no_packing
    """Fills the output, with packed weights."""


@dataclass(frozen=True)
class Backend:
    """A set of kernels and the calls it can serve.

    Attributes:
        name: What users call it.
        device: Kind of device whose memory it reads and writes.
        refusal: (geometry, dtype name) -> `None`, or the reason why it cannot run the call.
        load: Returns the kernels. They are loaded here, not before: asking `why_not` costs nothing.
    """

    name: str
    device: str
    refusal: Callable[[Geometry, str], str | None]
    load: Callable[[], Kernels]

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(f"`name` must not be empty. Received: name={self.name!r}")


_NATIVE_DTYPES = ("float32", "float64", "bfloat16", "float16")
_TRITON_DTYPES = ("float32", "bfloat16", "float16")
_TRITON_MOST_TAPS = 121


def _native_refusal(geometry: Geometry, dtype: str) -> str | None:
    if dtype not in _NATIVE_DTYPES:
        return f"the native kernel computes {', '.join(_NATIVE_DTYPES)}, and the data is {dtype}"
    return None


def _load_native() -> Kernels:
    from sepconv import _native

    return Kernels(_native.forward, _native.backward, _native.pack, _native.forward_packed)


_gpu_kernels_in_use = False


def use_gpu_kernels(enabled: bool) -> None:
    """Says whether the GPU kernels, which are experimental, are a choice.

    Plans that were made before keep theirs: doors have functions of their own for that.

    Args:
        enabled: Whether they are; at first they are not.
    """
    global _gpu_kernels_in_use
    _gpu_kernels_in_use = bool(enabled)


def _triton_refusal(geometry: Geometry, dtype: str) -> str | None:
    if not _gpu_kernels_in_use:
        return (
            "the GPU kernels are experimental, and run where `sepconv.torch.use_gpu_kernels()` "
            "asked for them"
        )
    if dtype not in _TRITON_DTYPES:
        return f"the GPU kernel computes {', '.join(_TRITON_DTYPES)}, and the data is {dtype}"
    taps = geometry.kernel_height * geometry.kernel_width
    if taps > _TRITON_MOST_TAPS:
        return f"the GPU kernel has at most {_TRITON_MOST_TAPS} taps, and this one {taps}"
    if importlib.util.find_spec("triton") is None:
        return "the GPU kernel needs the package triton, which is not installed"
    return None


def _load_triton() -> Kernels:
    from sepconv.triton import launch

    return Kernels(launch.forward, launch.backward)


BACKENDS: tuple[Backend, ...] = (
    Backend("native", "cpu", _native_refusal, _load_native),
    Backend("triton", "cuda", _triton_refusal, _load_triton),
)
"""In order of preference. Those of other devices than that of a call are not asked."""


def _refusals(geometry: Geometry, dtype: str, device: str) -> dict[str, str | None]:
    """What each backend of a device says, by name."""
    return {
        backend.name: backend.refusal(geometry, dtype)
        for backend in BACKENDS
        if backend.device == device
    }


def why_not(geometry: Geometry, dtype: str, device: str = "cpu") -> str | None:
    """Tells why no kernel of this library can run a call.

    Args:
        geometry: The call, from `ConvSpec.resolve`.
        dtype: Name of the element type, such as `"float32"`.
        device: Kind of device that holds the data, such as `"cpu"`.

    Returns:
        `None` if a kernel runs it, else the reasons.

    Example:
        >>> from sepconv import ConvSpec
        >>> geometry = ConvSpec().resolve((1, 5, 5, 2), (3, 3, 2, 1), (1, 1, 2, 4))
        >>> why_not(geometry, "float32") is None
        True
        >>> why_not(geometry, "int32")
        'the native kernel computes float32, float64, bfloat16, float16, and the data is int32'
    """
    refusals = _refusals(geometry, dtype, device)
    if None in refusals.values():
        return None
    if not refusals:
        devices = ", ".join(backend.device for backend in BACKENDS)
        return f"the kernels of this library run on {devices}, and the data is on {device!r}"
    return "; ".join(reason for reason in refusals.values() if reason is not None)


def choose(geometry: Geometry, dtype: str, device: str = "cpu") -> Backend:
    """Returns the backend that runs a call.

    Args:
        geometry: The call, from `ConvSpec.resolve`.
        dtype: Name of the element type.
        device: Kind of device that holds the data.

    Returns:
        The first backend that does not refuse it.

    Raises:
        ValueError: every backend refuses; the message is that of `why_not`.
    """
    refusals = _refusals(geometry, dtype, device)
    for backend in BACKENDS:
        if refusals.get(backend.name, "") is None:
            return backend
    raise ValueError(f"No backend runs this call: {why_not(geometry, dtype, device)}")
