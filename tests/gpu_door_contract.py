"""The torch door over the GPU kernels, which Triton's interpreter runs on the CPU.

TRITON_INTERPRET=1 must be set; `test_triton.py` runs this file in a process of its own.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sepconv import backends
from sepconv.torch import SeparableConv2d, operators, plans, use_gpu_kernels, why_not
from sepconv.triton import launch, tuning

CACHES = (
    plans.torch_plan_cached,
    plans.keras_plan_cached,
    operators.kernels_for,
    launch._fused,
)


def clear() -> None:
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def interpreted(monkeypatch):
    """Calls on the CPU go to the GPU kernels."""
    gpu = next(backend for backend in backends.BACKENDS if backend.name == "triton")
    here = backends.Backend("triton", "cpu", gpu.refusal, gpu.load)
    monkeypatch.setattr(backends, "BACKENDS", (here,))
    use_gpu_kernels()
    clear()
    yield
    use_gpu_kernels(False)
    clear()


def results(layer: SeparableConv2d, x: torch.Tensor) -> list[torch.Tensor]:
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stored", [False, True], ids=["fused", "stages-stored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensors_as_torch_sees_them_are_taken_as_they_lie(
    request, monkeypatch, layout, stored, dtype
):
    """The kernels got shapes of torch once, and gave the gradient of the weights transposed."""
    torch.manual_seed(0)
    layer = SeparableConv2d(
        5, 6, 3, padding="same", activation="silu", depthwise_bias=True, dtype=dtype
    )
    x = torch.randn(2, 5, 4, 3).to(dtype).contiguous(memory_format=layout)
    expected = results(layer, x)
    if stored:
        monkeypatch.setattr(tuning, "is_narrow", lambda g: False)
        monkeypatch.setattr(tuning, "forward_blocks", lambda *arguments: None)
    request.getfixturevalue("interpreted")
    found = results(layer, x)
    assert found[0].is_contiguous(memory_format=layout)
    # The other kernels are right; theirs and these round apart by a few units.
    share = 1e-5 if dtype == torch.float32 else 1e-2
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= share * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize(("shared", "fits"), [(99, False), (163, True), (227, True)])
def test_a_gpu_with_too_little_shared_memory_is_refused(shared, fits, monkeypatch):
    gpu = SimpleNamespace(name="the GPU", shared_memory_per_block_optin=shared * 1024)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    try:
        if fits:
            use_gpu_kernels()
        else:
            with pytest.raises(RuntimeError, match=r"Received: 101376 bytes on the GPU"):
                use_gpu_kernels()
        assert backends._gpu_kernels_in_use == fits
    finally:
        use_gpu_kernels(False)


def test_the_kernels_are_off_until_they_are_asked_for(interpreted):
    x, weights = torch.ones(1, 2, 4, 4), (torch.ones(2, 1, 3, 3), torch.ones(3, 2, 1, 1))
    assert why_not(x, *weights) is None
    use_gpu_kernels(False)
    assert "use_gpu_kernels()" in why_not(x, *weights)
