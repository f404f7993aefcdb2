"""What would run on this machine, and what would not, and why."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

from sepconv.progress import tracked

__all__ = ["Backend", "Door", "Health", "examine"]

_FRAMEWORKS = ("numpy", "jax", "torch", "keras")
_PACKAGES = (
    "numpy",
    "jax",
    "jaxlib",
    "torch",
    "triton",
    "keras",
    "tensorflow",
    "h5py",
    "safetensors",
    "onnx",
)


class Door(NamedTuple):
    """One way to call the operation."""

    name: str
    runs: bool
    """Whether a call of it runs the kernel of this library."""
    reason: str
    """Why not; empty if it does."""


class Backend(NamedTuple):
    """Kernels of this library for one kind of device."""

    name: str
    device: str
    """What was found of that kind, or the kind."""
    runs: bool
    reason: str
    """Why not; empty if it does."""


class Health(NamedTuple):
    """What `examine` found."""

    version: str
    cpu: str
    native_fault: str | None
    """Why the native kernel cannot be loaded."""
    target: str | None
    """The instruction set in use."""
    targets: tuple[str, ...]
    """Those that this CPU can run, the best first."""
    threads: int | None
    """CPUs that a call may use."""
    usable_cpus: int
    packages: dict[str, str]
    """Versions of those that are installed."""
    backends: tuple[Backend, ...]
    """Those of `sepconv.backends`."""
    doors: tuple[Door, ...]

    def facts(self) -> dict[str, Any]:
        """Returns it as what JSON can hold."""
        return self._asdict() | {
            "backends": [backend._asdict() for backend in self.backends],
            "doors": [door._asdict() for door in self.doors],
        }


def examine() -> Health:
    """Looks at the CPU, the native kernel, the packages and the doors; imports the frameworks.

    Example:
        >>> health = examine()
        >>> health.native_fault is None
        True
        >>> health.doors[0].name
        'numpy'
    """
    import sepconv
    from sepconv import machine

    fault, target, threads = None, None, None
    targets: tuple[str, ...] = ()
    try:
        from sepconv import _native
    except ImportError as error:
        fault = str(error)
    else:
        target, targets = _native.cpu_target(), tuple(_native.available_targets())
        threads = _native.get_num_threads()
    return Health(
        version=sepconv.__version__,
        cpu=machine.cpu_name(),
        native_fault=fault,
        target=target,
        targets=targets,
        threads=threads,
        usable_cpus=machine.usable_cpus(),
        packages=machine.versions(*_PACKAGES),
        backends=tuple(_backends(fault)),
        doors=tuple(
            Door(name, not (why := _why_not(name, fault)), why)
            for name in tracked(_FRAMEWORKS, "frameworks asked")
        ),
    )


def _backends(fault: str | None) -> Iterator[Backend]:
    from sepconv import backends, machine
    from sepconv.spec import ConvSpec

    geometry = ConvSpec().resolve((1, 4, 4, 2), (3, 3, 2, 1), (1, 1, 2, 3))
    for backend in backends.BACKENDS:
        reason = backend.refusal(geometry, "float32")
        device = backend.device
        if device == "cpu":
            device, reason = machine.cpu_name(), fault or reason
        elif reason is None:
            # The other kind there is. Only torch calls its kernels.
            device, reason = _gpu()
        yield Backend(backend.name, device, reason is None, reason or "")


def _gpu() -> tuple[str, str | None]:
    """What the GPU is called, and why there is none."""
    if importlib.util.find_spec("torch") is None:
        return "cuda", "the package torch is not installed"
    try:
        import torch

        if not torch.cuda.is_available():
            return "cuda", f"torch {torch.__version__} finds no GPU"
        return str(torch.cuda.get_device_name()), None
    except Exception as error:  # Whatever keeps torch from working is the answer.
        return "cuda", f"{type(error).__name__}: {error}"


def _why_not(door: str, fault: str | None) -> str:
    if fault is not None:
        return f"the native kernel cannot be loaded: {fault}"
    if importlib.util.find_spec(door) is None:
        return f"the package {door} is not installed"
    try:
        module = importlib.import_module(f"sepconv.{door}")
        return _asked(door, module) or ""
    except Exception as error:  # Whatever keeps a framework from working is the answer.
        return f"{type(error).__name__}: {error}"


def _asked(door: str, module: Any) -> str | None:
    """What the door says of a small call, or a small call itself."""
    import numpy as np

    x, kernel = np.zeros((1, 4, 4, 2), np.float32), np.zeros((3, 3, 2, 1), np.float32)
    pointwise = np.zeros((1, 1, 2, 3), np.float32)
    if door == "keras":
        return str(reason) if (reason := module.SeparableConv2D(3, 3).why_not()) else None
    if door == "torch":
        import torch

        layer = module.SeparableConv2d(2, 3, 3)
        return str(reason) if (reason := layer.why_not(torch.zeros(1, 2, 4, 4))) else None
    if door == "jax":
        return str(reason) if (reason := module.why_not(x, kernel, pointwise)) else None
    module.separable_conv2d(x, kernel, pointwise)
    return None
