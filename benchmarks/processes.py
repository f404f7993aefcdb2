"""Images per second of training on one process and on two, with ours and with stock layers.

    python benchmarks/processes.py                  torch DDP, then JAX; a minute and a half
    python benchmarks/processes.py --engine torch --layers 4 --size 37 --channels 256

The network is a row of separable convolutions with relu, 19x19 with 728 channels as in the middle
of Xception, and every process has its batch. A process has one thread, on a CPU of its own. Torch
exchanges gradients by DistributedDataParallel, JAX by jit over a mesh of the processes; both
through gloo. Runs of one and of two processes alternate. Efficiency: images per second and process,
of two to one; what is missing is the price of the exchange and of the shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("ours", "stock")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["torch", "jax"], action="append")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--size", type=int, default=19, help="height and width of the images")
    parser.add_argument("--channels", type=int, default=728)
    parser.add_argument("--batch", type=int, default=4, help="of a process")
    parser.add_argument("--steps", type=int, default=8, help="of a run, after two that warm up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def torch_step(options: argparse.Namespace, task: dict[str, Any]) -> Callable[[], None]:
    import torch
    import torch.distributed
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from sepconv.torch import SeparableConv2d

    torch.set_num_threads(1)
    torch.manual_seed(0)
    channels = options.channels
    layers: list[nn.Module] = []
    for _ in range(options.layers):
        if task["kind"] == "ours":
            layers.append(SeparableConv2d(channels, channels, 3, padding=1, activation="relu"))
        else:
            layers += [
                nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(),
            ]
    model: nn.Module = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    if task["processes"] > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{task['file']}",
            rank=task["rank"],
            world_size=task["processes"],
        )
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(options.batch, channels, options.size, options.size)
    x = x.to(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def jax_step(options: argparse.Namespace, task: dict[str, Any]) -> Callable[[], None]:
    import jax

    if task["processes"] > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{task['port']}", num_processes=task["processes"], process_id=task["rank"]
        )
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from sepconv.jax import separable_conv2d

    channels, size = options.channels, options.size
    rng = np.random.default_rng(0)

    def ours(x: jax.Array, depthwise: jax.Array, pointwise: jax.Array) -> jax.Array:
        return separable_conv2d(x, depthwise, pointwise, padding="same", activation="relu")

    def stock(x: jax.Array, depthwise: jax.Array, pointwise: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        u = lax.conv_general_dilated(
            x,
            depthwise.reshape(3, 3, 1, channels),
            (1, 1),
            "SAME",
            dimension_numbers=numbers,
            feature_group_count=channels,
        )
        y = lax.conv_general_dilated(u, pointwise, (1, 1), "VALID", dimension_numbers=numbers)
        return jax.nn.relu(y)

    layer = ours if task["kind"] == "ours" else stock

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        for pair in weights:
            x = layer(x, *pair)
        return jnp.mean(x**2)

    mesh = Mesh(np.array(jax.devices()), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    parts = NamedSharding(mesh, PartitionSpec("data"))

    def put(sharding: Any, *shape: int) -> jax.Array:
        values = rng.standard_normal(shape).astype(np.float32) / 30
        return jax.make_array_from_process_local_data(sharding, values)

    weights = [
        (put(whole, 3, 3, channels, 1), put(whole, 1, 1, channels, channels))
        for _ in range(options.layers)
    ]
    x = put(parts, options.batch, size, size, channels)

    @jax.jit
    def update(weights: Any, x: jax.Array) -> Any:
        gradients = jax.grad(loss)(weights, x)
        return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, gradients)

    state = [weights]

    def step() -> None:
        state[0] = jax.block_until_ready(update(state[0], x))

    return step


def work(options: argparse.Namespace) -> None:
    """A process of a run: prints the seconds of its steps."""
    task = json.loads(options.worker)
    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {available[task["rank"] % len(available)]})
    os.environ |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    step = {"torch": torch_step, "jax": jax_step}[task["engine"]](options, task)
    seconds = []
    for _ in range(2 + options.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds[2:]), flush=True)
    if task["engine"] == "torch" and task["processes"] > 1:
        import torch.distributed

        # A thread of torch may let go of a tensor while Python ends, which aborts the process.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        os._exit(0)


def run(options: argparse.Namespace, engine: str, kind: str, processes: int) -> list[float]:
    """The seconds of the steps, each that of the slowest process."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        task = {
            "engine": engine,
            "kind": kind,
            "processes": processes,
            "port": free.getsockname()[1],
            "file": str(Path(folder, "rendezvous")),
        }
        free.close()
        running = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--worker", json.dumps(task)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for task["rank"] in range(processes)
        ]
        outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"a process of {task} failed")
    times = [json.loads(output.splitlines()[-1]) for output in outputs]
    return [max(step) for step in zip(*times, strict=True)]


def main() -> None:
    options = parse()
    if options.worker:
        work(options)
        return
    from sepconv import machine

    print(f"{machine.cpu_name()}; one thread per process")
    print(
        f"{options.layers} layers {options.size}x{options.size} {options.channels}, "
        f"batch {options.batch} per process, forward, backward and update\n"
    )
    print("| engine | convolutions | 1 process, images/s | 2 processes, images/s | efficiency |")
    print("|---|---|---:|---:|---:|")
    for engine in options.engine or ["torch", "jax"]:
        seconds: dict[tuple[str, int], list[float]] = {}
        for _ in range(options.rounds):
            for kind in KINDS:
                for processes in (1, 2):
                    steps = run(options, engine, kind, processes)
                    seconds.setdefault((kind, processes), []).extend(steps)
        for kind in KINDS:
            one, two = (
                processes * options.batch / statistics.median(seconds[kind, processes])
                for processes in (1, 2)
            )
            print(f"| {engine} | {kind} | {one:.1f} | {two:.1f} | {two / one / 2:.0%} |")


if __name__ == "__main__":
    main()
