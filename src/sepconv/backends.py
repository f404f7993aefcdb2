"""Which kernel runs a call, and if one does not, why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from sepconv.spec import Geometry

__all__ = ["BACKENDS", "Backend", "Kernels", "choose", "why_not"]


class Kernels(NamedTuple):
    """The two entry points of a backend; arguments as in `sepconv._native`."""

    forward: Callable[..., None]
    """Fills the output."""
    backward: Callable[..., None]
    """Fills the gradients."""


@dataclass(frozen=True)
class Backend:
    """A set of kernels and the calls it can serve.

    Attributes:
        name: What users call it.
        refusal: (geometry, dtype name, device) -> `None`, or the reason why it cannot run the call.
        load: Returns the kernels. They are loaded here, not before: asking `why_not` costs nothing.
    """

    name: str
    refusal: Callable[[Geometry, str, str], str | None]
    load: Callable[[], Kernels]

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(f"`name` must not be empty. Received: name={self.name!r}")


_NATIVE_DTYPES = ("float32", "float64", "bfloat16", "float16")


def _native_refusal(geometry: Geometry, dtype: str, device: str) -> str | None:
    if device != "cpu":
        return f"the native kernel runs on the CPU, and the data is on {device!r}"
    if dtype not in _NATIVE_DTYPES:
        return f"the native kernel computes {', '.join(_NATIVE_DTYPES)}, and the data is {dtype}"
    return None


def _load_native() -> Kernels:
    from sepconv import _native

    return Kernels(_native.forward, _native.backward)


BACKENDS: tuple[Backend, ...] = (Backend("native", _native_refusal, _load_native),)
"""In order of preference."""


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
    reasons = []
    for backend in BACKENDS:
        reason = backend.refusal(geometry, dtype, device)
        if reason is None:
            return None
        reasons.append(reason)
    return "; ".join(reasons)


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
    for backend in BACKENDS:
        if backend.refusal(geometry, dtype, device) is None:
            return backend
    raise ValueError(f"No backend runs this call: {why_not(geometry, dtype, device)}")
