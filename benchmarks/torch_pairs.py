"""Times `sepconv.torch` against a pair of `Conv2d` in the channels_last memory format.

    python benchmarks/torch_pairs.py                  one thread, batch 1 and 8
    python benchmarks/torch_pairs.py --quick          three layers, batch 1, fewer rounds
    python benchmarks/torch_pairs.py --layers "19x19" --batch 8
    python benchmarks/torch_pairs.py --memory         the middle flow of Xception, as well

Forward pass without gradients, and training step: forward pass with the gradients of the input, of
both weights and of the bias. The pair runs eagerly and compiled by `torch.compile`. Before anything
is timed, every result is compared with that of the eager pair. Candidates take turns; the table
shows medians, ratios over them, and their geometric mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run import facts_of_run, limit_threads, write_csv

JOBS = ("forward", "training")
NAMES = ("sepconv", "pair", "compiled pair")
OURS = NAMES[0]
MIDDLE_FLOW_LAYERS, MIDDLE_FLOW_BATCH = 24, 8


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", help='only rows whose label holds this text, as "19x19"')
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out")
    parser.add_argument("--memory", action="store_true", help="measure the middle flow as well")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/torch_pairs.csv"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--middle-flow", choices=NAMES[:2], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def layers_of(problem: Any) -> dict[str, Any]:
    """The layer as our module, and as two convolutions with the same weights."""
    import torch
    from torch import nn

    from sepconv.torch import SeparableConv2d

    g = problem.geometry
    ours = SeparableConv2d(
        g.in_channels,
        g.out_channels,
        (g.kernel_height, g.kernel_width),
        problem.spec.strides,
        problem.spec.padding,
        problem.spec.dilation_rate,
        g.depth_multiplier,
    )
    with torch.no_grad():
        kernel = torch.from_numpy(problem.depthwise_kernel).permute(2, 3, 0, 1)
        ours.depthwise.weight.copy_(kernel.reshape(ours.depthwise.weight.shape))
        ours.pointwise.weight.copy_(torch.from_numpy(problem.pointwise_kernel).permute(3, 2, 0, 1))
        ours.pointwise.bias.copy_(torch.from_numpy(problem.bias))
    (top, bottom), (left, right) = problem.padding
    even = top == bottom and left == right
    depthwise = nn.Conv2d(
        g.in_channels,
        g.depthwise_channels,
        (g.kernel_height, g.kernel_width),
        problem.spec.strides,
        (top, left) if even else 0,
        problem.spec.dilation_rate,
        groups=g.in_channels,
        bias=False,
    )
    pair = nn.Sequential(depthwise, nn.Conv2d(g.depthwise_channels, g.out_channels, 1))
    if not even:
        pair.insert(0, nn.ZeroPad2d((left, right, top, bottom)))
    both = nn.ModuleDict({"depthwise": depthwise, "pointwise": pair[-1]})
    both.load_state_dict(ours.state_dict())
    return {OURS: ours, NAMES[1]: pair.to(memory_format=torch.channels_last)}


def calls_of(layer: Any, problem: Any) -> dict[str, Callable[[], Any]]:
    import torch

    def image(array: Any) -> Any:
        return torch.from_numpy(array).permute(0, 3, 1, 2)  # In memory, that is channels_last.

    x, dy = image(problem.x), image(problem.dy)
    reason = layer.why_not(x) if hasattr(layer, "why_not") else None
    if reason is not None:
        raise RuntimeError(f"sepconv.torch would not run its kernel: {reason}")
    operands = [image(problem.x).requires_grad_(), *layer.parameters()]

    def forward() -> Any:
        with torch.inference_mode():
            return [layer(x)]

    def training() -> Any:
        y = layer(operands[0])
        return [y, *torch.autograd.grad(y, operands, dy)]

    return {"forward": forward, "training": training}


def check(ours: list[Any], theirs: list[Any], what: str) -> None:
    import torch

    for one, other in zip(ours, theirs, strict=True):
        scale = float(other.detach().abs().max())
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-4 * scale):
            difference = float((one - other).detach().abs().max())
            raise RuntimeError(f"{what}: results differ by {difference} of {scale}")


def measure(problem: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from sepconv import timing

    layers = layers_of(problem)
    if not options.eager:
        torch.compiler.reset()
        layers[NAMES[2]] = torch.compile(layers[NAMES[1]], fullgraph=True, dynamic=False)
    rows = []
    calls = {name: calls_of(layer, problem) for name, layer in layers.items()}
    for job in JOBS:
        expected = calls[NAMES[1]][job]()
        for name in layers:
            check(calls[name][job](), expected, f"{name}, {job} of {problem.label}")
        blocks = {name: timing.block_of(call[job]) for name, call in calls.items()}
        times = timing.interleaved(blocks, rounds=options.rounds)
        rows += [
            {
                "network": problem.network,
                "layer": problem.layer,
                "label": problem.label,
                "batch": problem.geometry.batch,
                "job": job,
                "candidate": name,
                "median_us": result.median * 1e6,
                "quartile1_us": result.low * 1e6,
                "quartile3_us": result.high * 1e6,
                "ratio_to_ours": result.median / times[OURS].median,
            }
            for name, result in times.items()
        ]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for batch, job in dict.fromkeys((row["batch"], row["job"]) for row in rows):
        here = [row for row in rows if (row["batch"], row["job"]) == (batch, job)]
        names = list(dict.fromkeys(row["candidate"] for row in here))
        print(f"\n{job}, batch {batch}" + " " * 12 + "".join(f"{name:>24}" for name in names))
        for label in dict.fromkeys(row["label"] for row in here):
            cells = [row for row in here if row["label"] == label]
            texts = [f"{row['median_us']:.0f} us {row['ratio_to_ours']:.2f}x" for row in cells]
            print(f"{label:28}" + "".join(f"{text:>24}" for text in texts))
        for name in names[1:]:
            ratios = [row["ratio_to_ours"] for row in here if row["candidate"] == name]
            mean, least = statistics.geometric_mean(ratios), min(ratios)
            print(f"{name} / sepconv: geometric mean {mean:.2f}x, least {least:.2f}x")


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
    limit_threads(options.threads)

    import problems
    import torch

    import sepconv

    sepconv.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(False)
    if options.middle_flow:
        print(json.dumps(middle_flow(options.middle_flow)))
        return
    if options.quick:
        options.rounds = min(options.rounds, 3)
    rows: list[dict[str, Any]] = []
    for batch in options.batch or ([1] if options.quick else [1, 8]):
        for problem in problems.chosen(batch, options.layers, options.quick):
            rows += measure(problem, options)
    if not rows:
        sys.exit(f"error: `--layers` fits no row. Received: {options.layers!r}")
    facts = facts_of_run(options.threads, "sepconv", "numpy", "torch")
    write_csv(options.csv, rows, facts)
    print(f"{facts['cpu']}, {facts['target']}, {options.threads} thread(s), torch {facts['torch']}")
    show(rows)
    print("\none call of a 1x8x8x8 > 8 layer:")
    for name, microseconds in overhead().items():
        print(f"{name:28}{microseconds:.1f} us")
    if options.memory:
        print(f"\n{MIDDLE_FLOW_LAYERS} layers 19x19 728>728, batch {MIDDLE_FLOW_BATCH}, training:")
        for name in NAMES[:2]:
            command = [sys.executable, __file__, "--middle-flow", name]
            command += ["--threads", str(options.threads)]
            # A fixed threshold: by itself, glibc soon stops to give freed images back.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
            out = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment
            ).stdout
            result = json.loads(out)
            print(f"{name:28}{result['seconds']:.2f} s, peak {result['peak_mib']:.0f} MiB")
    print(f"CSV: {options.csv}")


if __name__ == "__main__":
    main()
