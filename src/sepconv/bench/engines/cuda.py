"""PyTorch on a GPU: our module and a pair of `Conv2d`, timed by CUDA graphs and from Python.

    python -m sepconv.bench.engines.cuda FILE PART PARTS

compiles what a part of the cases in a file needs, into the caches on disk of Triton and torch.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepconv import machine
from sepconv.bench.gpu import GpuCase
from sepconv.bench.peaks import Peaks
from sepconv.bench.problems import MODES
from sepconv.bench.workers import RefusedError
from sepconv.torch import SeparableConv2d, use_gpu_kernels
from sepconv.triton.ceilings import ceilings

__all__ = ["Gpu"]

# Of inputs that take turns: enough to leave the L2 cache, few enough to be captured quickly.
_MOST_COPIES = 64
_MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
# As in `sepconv.bench.truth`: what is stored between stages forward and on the way back.
_STORES = 4
# Of one operand of a product in float32, where the switch of torch allows TF32.
_ROUNDOFF_TF32 = 2.0**-11

# Without types.
_CUDA: Any = torch.cuda
_CUDNN: Any = torch.backends.cudnn


class Gpu:
    """The current CUDA device.

    Args:
        device: `"cuda"`; tests of what needs no GPU give `"cpu"`.

    Raises:
        ValueError: there is no such device.
    """

    def __init__(self, device: str = "cuda") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "`device` must be one that this machine has: torch.cuda.is_available() is False. "
                f"Received: device={device!r}"
            )
        self.device = device
        torch.backends.cudnn.benchmark = True
        self.facts = machine.versions("sepconv", "torch", "triton", "numpy")
        if device == "cuda":
            use_gpu_kernels()
            found = torch.cuda.get_device_properties(0)
            self.facts |= {
                "gpu": found.name,
                "gpu_memory_gb": f"{found.total_memory / 1e9:.0f}",
                "multiprocessors": str(found.multi_processor_count),
                "l2_mb": f"{found.L2_cache_size / 2**20:.0f}",
                "cuda": str(torch.version.cuda),
                "cudnn": str(_CUDNN.version()),
                "float32_products": "TF32" if _uses_tf32() else "float32",
                "cudnn_benchmark": "on",
            }
        self._layer: SeparableConv2d | None = None
        self._x = self._dy = torch.empty(0)
        self._truth: Sequence[tuple[Tensor, Tensor]] = ()

    # ------------------------------------------------------------------------------------- compile

    def warm_up(self, cases: Sequence[GpuCase], seconds: float) -> None:
        """Compiles in processes, as many as there are CPUs but one; see `Device`."""
        parts = max(1, min(machine.usable_cpus() - 1, 16, len(cases)))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cases"
            path.write_bytes(pickle.dumps(list(cases)))
            environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            command = [sys.executable, "-m", __name__, str(path)]
            processes = [
                subprocess.Popen(
                    [*command, str(part), str(parts)],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                for part in range(parts)
            ]
            end = time.monotonic() + seconds
            try:
                for process in processes:
                    process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            finally:
                for process in processes:
                    process.kill()
                    process.wait()

    def compile_case(self, case: GpuCase) -> None:
        """Runs those candidates of a case once that have something to compile."""
        for name in case.candidates:
            if name.startswith(("sepconv", "torch.compile")):
                self._make(case)
                step, _ = self._step(case, name, 1)
                step()
                self.end()

    # --------------------------------------------------------------------------------------- peaks

    def peaks(self, dtype: str) -> Peaks:
        """Measures both; see `Device`."""
        found = ceilings(dtype)
        assert found is not None, "there is a GPU"
        return Peaks(*found)

    # --------------------------------------------------------------------------------------- cases

    def begin(self, case: GpuCase) -> None:
        """Makes arrays and truth; see `Device`."""
        self._make(case)
        self._truth = self._true(case)

    def end(self) -> None:
        """Frees memory; see `Device`."""
        self._layer, self._truth = None, ()
        self._x = self._dy = torch.empty(0)
        gc.collect()
        torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _make(self, case: GpuCase) -> None:
        row, dtype = case.row, getattr(torch, case.dtype)
        torch.manual_seed(0)
        self._layer = SeparableConv2d(
            row.channels,
            row.filters,
            row.kernel,
            row.strides,
            row.padding,
            row.dilation,
            row.depth_multiplier,
            device=self.device,
            dtype=dtype,
        )
        g = case.geometry
        self._x = torch.randn(
            g.batch, g.in_channels, g.in_height, g.in_width, device=self.device, dtype=dtype
        )
        self._dy = torch.randn(
            g.batch, g.out_channels, g.out_height, g.out_width, device=self.device, dtype=dtype
        )

    def _true(self, case: GpuCase) -> list[tuple[Tensor, Tensor]]:
        """(value, allowed difference) of y and, for training, of the gradients.

        The formula of `sepconv.bench.truth`, on the device: the reference would take minutes.
        """
        assert self._layer is not None
        parameters = list(self._layer.parameters())
        values = _computed(case, self._x, self._dy, parameters)
        sums = _computed(case, self._x.abs(), self._dy.abs(), [p.abs() for p in parameters])
        g = case.geometry
        taps, pixels = g.kernel_height * g.kernel_width, g.batch * g.out_height * g.out_width
        terms = (
            taps + g.depthwise_channels + 2,
            taps * g.depth_multiplier + g.out_channels + 2,
            pixels + g.out_channels + 2,
            pixels + taps + 2,
            pixels + 2,
        )
        stored = _STORES * 2.0**-8 if case.dtype == "bfloat16" else 0.0
        if case.dtype == "float32" and self.device == "cuda" and _uses_tf32():
            stored = _STORES * _ROUNDOFF_TF32
        return [
            (value, 2 * (count * 2.0**-24 + stored) * total + 2.0**-126)
            for value, total, count in zip(values, sums, terms, strict=False)
        ]

    def prepare(self, case: GpuCase, candidate: str) -> _Ready:
        """Makes a candidate ready; see `Device`."""
        try:
            return self._prepare(case, candidate)
        except torch.OutOfMemoryError:
            raise RefusedError("the GPU has too little memory", unable=True) from None
        except RefusedError:
            raise
        except Exception as error:  # A peer that fails is a note.
            raise RefusedError(f"{type(error).__name__}: {error}") from error

    def _prepare(self, case: GpuCase, candidate: str) -> _Ready:
        step, copies = self._step(case, candidate, None)
        results = [result.detach() for result in step()]
        worst = 0.0
        for result, (value, allowed) in zip(results, self._truth, strict=True):
            if result.shape != value.shape or not bool(result.isfinite().all()):
                worst = math.inf
                break
            worst = max(worst, float(((result.double() - value).abs() / allowed).max()))
        del results
        return _Ready(step, copies, worst, self.device)

    def _step(
        self, case: GpuCase, candidate: str, copies: int | None
    ) -> tuple[Callable[[], list[Tensor]], int]:
        """A call on inputs that take turns, and their number."""
        assert self._layer is not None
        layer = self._layer
        contiguous = candidate in ("sepconv.torch contiguous", "torch")
        layout = torch.contiguous_format if contiguous else torch.channels_last
        bytes_of_call = 2 * (self._x.nbytes + self._dy.nbytes)
        if case.mode == MODES[0]:
            bytes_of_call //= 2
        if copies is None:
            cache = 2 * self._cache_bytes()
            copies = max(2, min(_MOST_COPIES, math.ceil(cache / max(bytes_of_call, 1))))
        inputs = [
            (self._x.clone(memory_format=layout), self._dy.clone(memory_format=layout))
            for _ in range(copies)
        ]
        call: Any = layer
        if candidate.startswith("sepconv"):
            reason = layer.why_not(inputs[0][0])
            if reason is not None:
                raise RefusedError(reason, unable=True)
        else:
            pair: Any = _pair(layer, case)
            call = pair.to(memory_format=layout)
        parameters = list(call.parameters())
        if candidate.startswith("torch.compile"):
            mode = _MAX_AUTOTUNE if candidate.endswith("max-autotune") else None
            call = torch.compile(call, fullgraph=True, dynamic=False, mode=mode)
        turns = itertools.cycle(inputs)

        def inference() -> list[Tensor]:
            with torch.inference_mode():
                return [call(next(turns)[0])]

        def training() -> list[Tensor]:
            x, dy = next(turns)
            operands = [x.detach().requires_grad_(), *parameters]
            y = call(operands[0])
            return [y.detach(), *torch.autograd.grad(y, operands, dy)]

        return (inference if case.mode == MODES[0] else training), copies

    def _cache_bytes(self) -> int:
        if self.device != "cuda":
            return 0
        return int(torch.cuda.get_device_properties(0).L2_cache_size)


class _Ready:
    """See `sepconv.bench.gpu.Ready`."""

    def __init__(
        self, step: Callable[[], list[Tensor]], copies: int, error: float, device: str
    ) -> None:
        self._step, self._copies, self._device = step, copies, device
        self._graph: Any = None
        self._kept: list[Any] = []
        self.error_of_allowed = error
        self.peak_megabytes = math.nan
        if device != "cuda":
            return
        stream = _CUDA.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # Libraries set themselves up, outside of the capture.
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        self.peak_megabytes = (torch.cuda.max_memory_allocated() - before) / 1e6
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            # Outputs are kept, so that every call writes other memory.
            self._kept = [step()[:2] for _ in range(copies)]

    def graph(self, calls: int) -> list[float]:
        """Replays the graph; each replay, of many calls, is a sample."""
        if self._graph is None:
            return self.eager(calls)
        replays = max(1, min(20, math.ceil(calls / self._copies)))
        self._graph.replay()
        events = [_CUDA.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            self._graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [
            one.elapsed_time(other) * 1e-3 / self._copies
            for one, other in itertools.pairwise(events)
        ]

    def eager(self, calls: int) -> list[float]:
        """Calls one after the other, and waits for all: one sample."""
        self._step()
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            self._step()
        self._wait()
        return [(time.perf_counter() - start) / calls]

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def _uses_tf32() -> bool:
    return bool(_CUDNN.conv.fp32_precision == "tf32")


def _pads(case: GpuCase) -> tuple[tuple[int, int], tuple[int, int]]:
    spec, g = case.row.spec("channels_last"), case.geometry
    return spec.padding_amounts(g.in_height, g.in_width, (g.kernel_height, g.kernel_width))


def _pair(layer: SeparableConv2d, case: GpuCase) -> nn.Sequential:
    """The layer as two convolutions with copies of its weights."""
    g, row = case.geometry, case.row
    (top, bottom), (left, right) = _pads(case)
    even = top == bottom and left == right
    where: Any = {"device": layer.pointwise.weight.device, "dtype": layer.pointwise.weight.dtype}
    depthwise = nn.Conv2d(
        g.in_channels,
        g.depthwise_channels,
        row.kernel,
        row.strides,
        (top, left) if even else 0,
        row.dilation,
        groups=g.in_channels,
        bias=False,
        **where,
    )
    pointwise = nn.Conv2d(g.depthwise_channels, g.out_channels, 1, **where)
    nn.ModuleDict({"depthwise": depthwise, "pointwise": pointwise}).load_state_dict(
        layer.state_dict()
    )
    stages: list[nn.Module] = [depthwise, pointwise]
    return nn.Sequential(*([] if even else [nn.ZeroPad2d((left, right, top, bottom))]), *stages)


def _computed(case: GpuCase, x: Tensor, dy: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The formula in float64, tap by tap and without a convolution of anyone."""
    g = case.geometry
    (top, bottom), (left, right) = _pads(case)
    operands = [tensor.detach().double() for tensor in (x, *parameters)]
    training = case.mode != MODES[0]
    for operand in operands:
        operand.requires_grad_(training)
    image, kernel, pointwise, bias = operands
    padded = F.pad(image, (left, right, top, bottom))
    if g.depth_multiplier > 1:
        padded = padded.repeat_interleave(g.depth_multiplier, 1)
    u: Any = 0.0
    for i, j in itertools.product(range(g.kernel_height), range(g.kernel_width)):
        down, across = i * g.dilation_height, j * g.dilation_width
        rows = slice(down, down + (g.out_height - 1) * g.stride_height + 1, g.stride_height)
        columns = slice(across, across + (g.out_width - 1) * g.stride_width + 1, g.stride_width)
        u = u + padded[:, :, rows, columns] * kernel[:, 0, i, j][:, None, None]
    y = torch.einsum("nkhw,fk->nfhw", u, pointwise[:, :, 0, 0]) + bias[:, None, None]
    if not training:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, operands, dy.double())]


def _main() -> None:
    path, part, parts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    gpu = Gpu()
    torch.backends.cudnn.benchmark = False  # What it finds stays in this process.
    for case in pickle.loads(Path(path).read_bytes())[part::parts]:
        try:
            gpu.compile_case(case)
        except Exception:  # Whoever measures will see it.
            continue


if __name__ == "__main__":
    _main()
