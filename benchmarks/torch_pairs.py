"""The cost of a call of `sepconv.torch`, and its memory in training, against pairs of `Conv2d`.

    python benchmarks/torch_pairs.py                  both, one thread
    python benchmarks/torch_pairs.py --threads 2

The call computes next to nothing: its time is that of the way to the kernel. Memory is the peak of
a training step of the middle flow of Xception, each side in a process of its own. Times of layers
are what `sepconv bench --peer torch` measures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

NAMES = ("sepconv", "pair")
OURS = NAMES[0]
MIDDLE_FLOW_LAYERS, MIDDLE_FLOW_BATCH = 24, 8


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--middle-flow", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def overhead() -> dict[str, float]:
    """Microseconds of a call that computes next to nothing."""
    import torch

    from sepconv import timing
    from sepconv.torch import SeparableConv2d, separable_conv2d

    layer = SeparableConv2d(8, 8, 3, padding=1)
    x = torch.randn(1, 8, 8, 8)
    weights = [parameter.detach() for parameter in layer.parameters()]
    pair = torch.nn.Sequential(*layer.to_pair())
    calls = {
        "separable_conv2d": lambda: separable_conv2d(x, *weights, padding=1),
        "SeparableConv2d": lambda: layer(x),
        "pair of Conv2d": lambda: pair(x),
    }
    with torch.inference_mode():
        blocks = {name: timing.block_of(call) for name, call in calls.items()}
        times = timing.interleaved(blocks, rounds=200, block_seconds=0.002)
    return {name: result.median * 1e6 for name, result in times.items()}


def peak_mib() -> float:
    """Most memory that this process has had; getrusage would count that of its parent as well."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("This system does not tell the peak memory of a process.")


def middle_flow(name: str) -> dict[str, float]:
    """Training steps of the 24 layers, in a process of its own: its peak memory and a time."""
    import time

    import torch
    from torch import nn

    from sepconv.torch import SeparableConv2d

    torch.manual_seed(0)
    layers: list[Any] = []
    for _ in range(MIDDLE_FLOW_LAYERS):
        layer = SeparableConv2d(728, 728, 3, padding="same", bias=False)
        layers += [nn.ReLU(), *([layer] if name == OURS else layer.to_pair())]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(MIDDLE_FLOW_BATCH, 728, 19, 19).to(memory_format=torch.channels_last)
    before = peak_mib()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model.zero_grad()
        model(x.requires_grad_()).square().mean().backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_mib": peak_mib() - before}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)

    from sepconv.bench.workers import pinned

    # Before torch looks at the machine.
    with pinned(options.threads):
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
    print("\none call of a 1x8x8x8 > 8 layer:")
    for name, microseconds in overhead().items():
        print(f"{name:28}{microseconds:.1f} us")
    print(f"\n{MIDDLE_FLOW_LAYERS} layers 19x19 728>728, batch {MIDDLE_FLOW_BATCH}, training:")
    for name in NAMES:
        command = [sys.executable, __file__, "--middle-flow", name]
        command += ["--threads", str(options.threads)]
        # A fixed threshold: by itself, glibc soon stops to give freed images back.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        result = json.loads(done.stdout)
        print(f"{name:28}{result['seconds']:.2f} s, peak {result['peak_mib']:.0f} MiB")


if __name__ == "__main__":
    main()
