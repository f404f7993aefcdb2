"""Depthwise-separable 2-D convolution as one operation.

    y = activation(pointwise(depthwise(x)) + bias)

The operation itself lives behind one door per framework, imported by name: `sepconv.numpy`,
`sepconv.jax`, `sepconv.torch`, `sepconv.keras`. This module imports none of them.
`sepconv.fuse` puts it into a model that exists.
"""

import operator
from typing import TYPE_CHECKING, Any

from sepconv.plans import explain
from sepconv.spec import ConvSpec

if TYPE_CHECKING:
    from sepconv.models.fuse import fuse, to_stock
    from sepconv.models.load import load

__all__ = [
    "ConvSpec",
    "__version__",
    "cpu_target",
    "explain",
    "fuse",
    "get_num_threads",
    "load",
    "set_num_threads",
    "to_stock",
]


def set_num_threads(num_threads: int) -> None:
    """Sets how many CPU threads a call may use, for the whole process.

    Args:
        num_threads: A positive number, or 0 for the default: `OMP_NUM_THREADS` if it is set, else
            the CPUs that this process may run on.

    Raises:
        TypeError: `num_threads` is not an integer.
        ValueError: `num_threads` is negative.

    Example:
        >>> set_num_threads(2)
        >>> get_num_threads()
        2
        >>> set_num_threads(0)
    """
    from sepconv import _native

    if isinstance(num_threads, bool) or not hasattr(num_threads, "__index__"):
        raise TypeError(f"`num_threads` must be an integer. Received: num_threads={num_threads!r}")
    count = operator.index(num_threads)
    if not 0 <= count < 2**31:
        raise ValueError(
            "`num_threads` must be 0 (the default) or a positive number below 2**31. "
            f"Received: num_threads={num_threads!r}"
        )
    _native.set_num_threads(count)


def get_num_threads() -> int:
    """Returns how many CPU threads a call may use.

    Example:
        >>> get_num_threads() >= 1
        True
    """
    from sepconv import _native

    return _native.get_num_threads()


def cpu_target() -> str:
    """Returns the name of the instruction set that the CPU kernels use now.

    It is the best one that this CPU runs, unless the environment variable `SEPCONV_TARGET` named
    another one.

    Example:
        >>> cpu_target() in ("amx_bf16", "avx512_bf16", "avx512", "avx2", "neon", "portable")
        True
    """
    from sepconv import _native

    return _native.cpu_target()


def __getattr__(name: str) -> Any:
    # Who only computes needs nothing of what works on whole models.
    if name in ("fuse", "to_stock"):
        from sepconv.models import fuse as models_fuse

        return getattr(models_fuse, name)
    if name == "load":
        from sepconv.models.load import load

        return load
    # The one place that states the version is pyproject.toml; reading the installed metadata takes
    # longer than the rest of this import, so it waits until somebody asks.
    if name == "__version__":
        from importlib.metadata import version

        return version("sepconv")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
