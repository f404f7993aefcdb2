"""The torch door on a GPU, which must be there; `test_triton.py` runs this file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from sepconv.torch import SeparableConv2d, separable_conv2d, use_gpu_kernels

# float32 is then summed and multiplied in float32: results can be compared with those of the CPU.
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.backends.cuda.matmul.fp32_precision = "ieee"

use_gpu_kernels()

LAYOUTS = (torch.contiguous_format, torch.channels_last)
pytestmark = pytest.mark.filterwarnings("ignore:.*TensorFloat32.*")


def layer(filters: int = 20, **arguments) -> SeparableConv2d:
    torch.manual_seed(0)
    return SeparableConv2d(
        12, filters, 3, padding="same", activation="silu", depthwise_bias=True, **arguments
    )


def image(layout=torch.channels_last, batch: int = 2, **arguments) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(batch, 12, 9, 10, **arguments)
    return x.contiguous(memory_format=layout)


def close(one: torch.Tensor, other: torch.Tensor, share: float = 1e-4) -> None:
    """Of the largest number: sums of 1e3 products at most, of numbers around 1."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= share * max(1.0, float(other.abs().max()))


def grads(call, x: torch.Tensor) -> list[torch.Tensor]:
    leaf = x.detach().requires_grad_()
    y = call(leaf)
    parameters = [p for p in call.parameters() if p.requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    return [y, *torch.autograd.grad(y, [leaf, *parameters], dy)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("filters", [20, 300])
def test_results_and_gradients_are_those_of_the_cpu(layout, filters):
    own, x = layer(filters), image(layout)
    on_gpu = layer(filters).cuda()
    assert on_gpu.why_not(x.cuda()) is None
    for one, other in zip(grads(on_gpu, x.cuda()), grads(own, x), strict=True):
        assert one.is_cuda
        close(one, other)
    y = on_gpu(x.cuda())
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_it_is_compiled_as_one_graph(layout, mode):
    own, x = layer().cuda(), image(layout, device="cuda")
    compiled = torch.compile(own, fullgraph=True, mode=mode)
    for one, other in zip(grads(compiled, x), grads(own, x), strict=True):
        close(one.clone(), other)
    with torch.inference_mode():
        close(compiled(x).clone(), own(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_16_bits(dtype):
    own, x = layer().cuda(), image(device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        found = grads(own, x)
    assert found[0].dtype == dtype
    assert [g.dtype for g in found[1:]] == [torch.float32] * 5
    for one, other in zip(found, grads(own, x), strict=True):
        close(one, other, 0.05)


def test_a_training_step_is_captured_by_a_graph():
    own, x = layer().cuda(), image(device="cuda")
    leaf = x.clone().requires_grad_()
    operands = [leaf, *own.parameters()]

    def step():
        y = own(leaf)
        return [y, *torch.autograd.grad(y, operands, torch.ones_like(y))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = torch.randn_like(x)
    with torch.no_grad():
        leaf.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    found = [tensor.clone() for tensor in captured]
    for one, again in zip(found, step(), strict=True):
        assert torch.equal(one, again)


def test_it_runs_on_the_stream_of_the_caller():
    own = layer(300).cuda()
    x = image(device="cuda", batch=256)
    expected = own(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)  # The input arrives on this stream only after that.
        late.copy_(x)
        y = own(late)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_second_derivatives_are_those_of_the_cpu():
    found = []
    for device in ("cuda", "cpu"):
        own, x = layer().to(device), image().to(device).requires_grad_()
        y = own(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, *own.parameters()]))
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-3)


def test_what_a_call_saves_is_its_operands_and_no_more():
    own, x = layer().cuda(), image(device="cuda", batch=64).requires_grad_()
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = own(x)
    known = {t.untyped_storage().data_ptr() for t in (x, y, *own.parameters())}
    assert set(saved) <= known


def test_gradients_are_the_same_to_the_bit():
    own, x = layer().cuda(), image(device="cuda", batch=64)
    first = grads(own, x)
    for _ in range(3):
        for one, other in zip(first, grads(own, x), strict=True):
            assert torch.equal(one, other)


def test_a_module_learns():
    torch.manual_seed(0)
    own = layer(8).cuda()
    model = nn.Sequential(own, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).cuda()
    x = image(device="cuda", batch=32)
    labels = (x.mean((1, 2, 3)) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_float64_runs_on_torch_itself_and_says_so():
    own, x = layer().cuda().double(), image(device="cuda", dtype=torch.float64)
    assert "float64" in own.why_not(x)
    close(own(x), layer().double()(x.cpu()), 1e-12)


def test_tensors_of_two_devices_are_refused():
    own = layer().cuda()
    with pytest.raises(ValueError, match="device"):
        own(image())


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    own, x = layer().to("cuda:1"), image(device="cuda:1")
    assert torch.cuda.current_device() == 0
    for one, other in zip(grads(own, x), grads(layer(), x.cpu()), strict=True):
        close(one, other)


def test_an_empty_batch_and_no_tensor_of_numbers():
    own = layer().cuda()
    assert own(image(device="cuda")[:0]).shape == (0, 20, 9, 10)
    x = image(device="cuda")
    x[0, 0, 4, 5] = math.nan
    found = own(x).isnan().any(1)[0].cpu().numpy()
    expected = np.zeros((9, 10), bool)
    expected[3:6, 4:7] = True
    np.testing.assert_array_equal(found, expected)


def test_the_keyword_names_of_torch_are_those_of_the_function():
    x, w, p = (
        image(device="cuda"),
        torch.randn(12, 1, 3, 3, device="cuda"),
        torch.randn(7, 12, 1, 1, device="cuda"),
    )
    pair = nn.functional.conv2d(x, w, stride=2, padding=2, dilation=2, groups=12)
    close(
        separable_conv2d(x, w, p, stride=2, padding=2, dilation=2),
        nn.functional.conv2d(pair, p),
    )
