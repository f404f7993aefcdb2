"""Whether anybody wants to see what a call does: modes, tracers, transforms, profilers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


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
is_autocast_enabled = torch.is_autocast_enabled


def is_quiet() -> bool:
    """Whether no mode, tracer, transform or profiler wants to see the operators of this thread."""
    return (
        len(_QUIET_THREADS) > 0
        and _thread_keys().raw_repr() in _QUIET_THREADS
        and _forward_ad._current_level < 0
        and not _profiler_runs()
    )


_PLAIN_TYPES = frozenset({Tensor, nn.Parameter})
# By a transform of torch.func that has ended.
is_wrapped: Any = torch._C._functorch.is_functorch_wrapped_tensor


def are_plain(operands: Sequence[Tensor | None]) -> bool:
    """Whether the tensors are memory of one device with a shape and nothing else.

    That there is a kernel for the device of the first and for their dtype is known from the plan.
    """
    first = operands[0]
    assert first is not None
    device = first.device
    for tensor in operands:
        if tensor is not None and (
            type(tensor) not in _PLAIN_TYPES
            or tensor.device != device
            or tensor.is_neg()
            or tensor._is_zerotensor()
        ):
            return False
    return not is_wrapped(first)


def any_requires_grad(operands: Sequence[Tensor | None]) -> bool:
    """Whether a call of these would be recorded, where gradients are enabled."""
    return any(tensor is not None and tensor.requires_grad for tensor in operands)


saved_tensors_hooks: Any = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: ()
)
