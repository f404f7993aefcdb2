"""`sepconv.torch` against pairs of `Conv2d`: layers, the cost of a call, memory in training.

    python benchmarks/torch_pairs.py                             everything, one thread: 12 minutes
    python benchmarks/torch_pairs.py --part calls --part memory  one minute
    python benchmarks/torch_pairs.py --network mobilenet_v1-224 --batch 1

layers: all rows of four networks, channels_last, against the pair, eager and under torch.compile
with its weights frozen for inference. All three run in this process and take turns. A ratio is the
time of the other over ours: above 1, ours is faster.

calls: next to nothing to compute, so the time is that of the way to the kernel.

memory: training steps of the middle flow of Xception, each kind in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PARTS = ("calls", "memory", "layers")
NETWORKS = (
    "xception-299",
    "mobilenet_v1-224",
    "efficientdet_d0-512",
    "deeplabv3plus_generic-512-os16",
)
OURS = "sepconv.torch"
PEERS = {"torch channels_last": "pair", "torch.compile": "compiled"}
MIDDLE_FLOW_LAYERS, MIDDLE_FLOW_BATCH = 24, 8
MIDDLE_FLOWS = ("sepconv", "pair")


class Result(NamedTuple):
    """Seconds of ours, and those of the others over them."""

    batch: int
    mode: str
    seconds: float
    ratios: dict[str, float]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--network", action="append", help=f"by default {', '.join(NETWORKS)}")
    parser.add_argument("--batch", type=int, action="append", help="by default 1 and 8")
    parser.add_argument("--rounds", type=int, default=7, help="of a layer")
    parser.add_argument("--middle-flow", choices=MIDDLE_FLOWS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------- calls


def show_calls() -> None:
    import torch

    from sepconv import timing
    from sepconv.torch import SeparableConv2d, separable_conv2d

    layer = SeparableConv2d(8, 8, 3, padding=1)
    x = torch.randn(1, 8, 8, 8)
    weights = [parameter.detach() for parameter in layer.parameters()]
    # As weights of a `Conv2d` lie, which the kernel reads in another order.
    plain = [weight.contiguous() for weight in weights]
    pair = torch.nn.Sequential(*layer.to_pair())
    dy = torch.ones_like(layer(x))
    tracked = x.clone().requires_grad_()
    operands = [tracked, *layer.parameters()]
    forward = {
        "SeparableConv2d": lambda: layer(x),
        "separable_conv2d": lambda: separable_conv2d(x, *weights, padding=1),
        "separable_conv2d, plain weights": lambda: separable_conv2d(x, *plain, padding=1),
        "pair of Conv2d": lambda: pair(x),
    }
    training = {
        "SeparableConv2d": lambda: torch.autograd.grad(layer(tracked), operands, dy),
        "pair of Conv2d": lambda: torch.autograd.grad(pair(tracked), operands, dy),
    }
    print("\none call of a 1x8x8x8 > 8 layer, microseconds: median (least)")
    for way, calls in (("inference", forward), ("a training step", training)):
        blocks = {name: timing.block_of(call) for name, call in calls.items()}
        with torch.inference_mode(way == "inference"):
            times = timing.interleaved(blocks, rounds=200, block_seconds=0.002)
        for name, result in times.items():
            print(f"  {way:17}{name:34}{result.median * 1e6:6.1f} ({result.best * 1e6:.1f})")


# ------------------------------------------------------------------------------------------ memory


def peak_mib() -> float:
    """Most memory that this process has had; getrusage would count that of its parent as well."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("This system does not tell the peak memory of a process.")


def middle_flow(name: str) -> dict[str, float]:
    """Training steps of the 24 layers, in a process of its own: its peak memory and a time."""
    import torch
    from torch import nn

    from sepconv.torch import SeparableConv2d

    torch.manual_seed(0)
    layers: list[Any] = []
    for _ in range(MIDDLE_FLOW_LAYERS):
        layer = SeparableConv2d(728, 728, 3, padding="same", bias=False)
        layers += [nn.ReLU(), *(layer.to_pair() if name == "pair" else [layer])]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(MIDDLE_FLOW_BATCH, 728, 19, 19).to(memory_format=torch.channels_last)
    before = peak_mib()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        model.zero_grad()
        model(x.requires_grad_()).square().mean().backward()
        seconds.append(time.perf_counter() - start)
    times = {"median": statistics.median(seconds[1:]), "least": min(seconds)}
    return {**times, "peak_mib": peak_mib() - before}


def show_memory(threads: int) -> None:
    print(
        f"\na training step of {MIDDLE_FLOW_LAYERS} layers 19x19 728>728 after a relu each, "
        f"batch {MIDDLE_FLOW_BATCH}: median (least)"
    )
    # The memory with a fixed threshold: by itself, glibc soon stops to give freed images back. The
    # time without: images that are given back are mapped anew in every step.
    settings = {"time": {}, "memory": {"MALLOC_MMAP_THRESHOLD_": str(2**18)}}
    for name in MIDDLE_FLOWS:
        command = [sys.executable, __file__, "--middle-flow", name, "--threads", str(threads)]
        results = {
            what: json.loads(
                subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | environment,
                ).stdout
            )
            for what, environment in settings.items()
        }
        seconds = results["time"]
        print(
            f"  {name:10}{seconds['median']:.2f} s ({seconds['least']:.2f}), "
            f"peak {results['memory']['peak_mib']:.0f} MiB"
        )


# ------------------------------------------------------------------------------------------ layers


def measured(row: Any, batch: int, mode: str, options: argparse.Namespace) -> Result:
    """Times a layer in one mode, after a look at what the others compute."""
    from sepconv import timing
    from sepconv.bench.engines import torch as engine
    from sepconv.bench.problems import problem_of

    problem = problem_of(row, batch)
    ready = {}
    for name in (OURS, *PEERS):
        ready[name] = engine.prepare(name, problem, mode, 1, options.threads)
    ours, *others = ([*each.arrays(each.call())] for each in ready.values())
    for arrays in others:
        for one, other in zip(ours, arrays, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-3 * np.abs(other).max())
    blocks = {name: timing.block_of(each.call) for name, each in ready.items()}
    times = timing.interleaved(blocks, rounds=options.rounds)
    engine.forget()
    seconds = times[OURS].median
    return Result(batch, mode, seconds, {name: times[name].median / seconds for name in PEERS})


def show_layers(options: argparse.Namespace) -> None:
    from sepconv.bench.problems import MODES
    from sepconv.bench.results import geometric_mean
    from sepconv.bench.rows import choose_rows

    batches = options.batch or [1, 8]
    columns = [(batch, mode) for batch in batches for mode in MODES]
    names = [
        name
        for batch, mode in columns
        for name in (f"{mode}, batch {batch}: us", *(f"over {peer}" for peer in PEERS.values()))
    ]
    results: list[Result] = []
    for network in options.network or NETWORKS:
        print()
        print_row([network, *names])
        print_row(["---", *["---:"] * len(names)])
        for row in choose_rows([network]):
            cells = [row.label]
            for batch, mode in columns:
                result = measured(row, batch, mode, options)
                results.append(result)
                cells.append(f"{result.seconds * 1e6:.0f}")
                cells += [f"{ratio:.2f}" for ratio in result.ratios.values()]
            print_row(cells)
    print()
    print_row(["ours against", "", "geometric mean", "least", "layers below 1"])
    print_row(["---", "---", "---:", "---:", "---:"])
    for name, peer in PEERS.items():
        for batch, mode in columns:
            ratios = [r.ratios[name] for r in results if (r.batch, r.mode) == (batch, mode)]
            below = f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"
            least, mean = f"{min(ratios):.2f}", f"{geometric_mean(ratios):.2f}"
            print_row([peer, f"{mode}, batch {batch}", mean, least, below])


def print_row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)

    from sepconv.bench.workers import pinned

    # Before torch looks at the machine. What a process that was cut short has left in the common
    # cache of compiled code may not load.
    with pinned(options.threads), tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        run(options)


def run(options: argparse.Namespace) -> None:
    import torch

    import sepconv
    from sepconv import machine

    sepconv.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    if options.middle_flow:
        print(json.dumps(middle_flow(options.middle_flow)))
        return
    print(
        f"{machine.cpu_name()}, {sepconv.cpu_target()}, {options.threads} thread(s), "
        f"torch {torch.__version__}"
    )
    for part in options.part or PARTS:
        if part == "calls":
            show_calls()
        elif part == "memory":
            show_memory(options.threads)
        else:
            show_layers(options)


if __name__ == "__main__":
    main()
