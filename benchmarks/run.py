"""Measures a dozen layers of published networks: every door against its framework's own computation.

    python benchmarks/run.py [--quick] [--threads N] [--batch N] [--out FILE.csv]

Rounds are interleaved: each candidate in turn, again and again, so that a drift of the machine hits
all of them alike. Reported are medians, and ratios of medians within one run. A training step is the
forward pass and all four gradients. Results are compared with one another before they are timed.
"""  # noqa: E501

import argparse
import csv
import datetime
import json
import os
import statistics
import time
from pathlib import Path

ROWS = [
    ("xception-299", "block2_sepconv1"),
    ("xception-299", (37, 256, 728)),
    ("xception-299", (19, 728, 728)),
    ("xception-299", (10, 1024, 1536)),
    (None, (112, 32, 64)),
    (None, (56, 128, 128)),
    (None, (14, 512, 512)),
    (None, (7, 1024, 1024)),
    (None, (64, 64, 64)),
    (None, (33, 256, 256)),
    (None, (28, 240, 80)),
    (None, (56, 144, 24)),
]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per row and pass")
    parser.add_argument("--quick", action="store_true", help="two rows, few rounds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layers.csv"))
    return parser.parse_args()


def find_row(layers, network, key):
    """Returns the first layer of the network with this name, or this (size, channels, filters)."""
    for layer in layers:
        if network is not None and layer["network"] != network:
            continue
        same_kernel = layer["strides"] == [1, 1] and layer["H"] == layer["W"]
        if key == layer["name"] or (
            same_kernel and key == (layer["H"], layer["Cin"], layer["Cout"])
        ):
            return layer
    raise LookupError(f"workloads.json has no layer {network} {key}")


def candidates(layer, batch, np):
    """Returns {name: (forward, training step)}; each call returns when its work is done."""
    import jax
    import keras
    import torch

    import sepconv.jax
    import sepconv.keras
    import sepconv.numpy

    rng = np.random.default_rng(0)
    c, f, m = layer["Cin"], layer["Cout"], layer["depth_multiplier"]
    kh, kw = layer["kernel"]
    x, dk, pk, b = (
        rng.standard_normal(shape, dtype=np.float32) / np.float32(scale)
        for shape, scale in (
            ((batch, layer["H"], layer["W"], c), 1),
            ((kh, kw, c, m), (kh * kw) ** 0.5),
            ((1, 1, c * m, f), (c * m) ** 0.5),
            ((f,), 1),
        )
    )
    keywords = {
        "strides": tuple(layer["strides"]),
        "padding": layer["padding"],
        "dilation_rate": tuple(layer["dilation"]),
    }
    dy = rng.standard_normal(
        sepconv.numpy.separable_conv2d(x, dk, pk, b, **keywords).shape, dtype=np.float32
    )
    found = {
        "sepconv.numpy": (
            lambda: sepconv.numpy.separable_conv2d(x, dk, pk, b, **keywords),
            lambda: (
                sepconv.numpy.separable_conv2d(x, dk, pk, b, **keywords),
                sepconv.numpy.separable_conv2d_grad(dy, x, dk, pk, b, **keywords),
            )[1],
        )
    }

    def add_jax(name, function):
        arrays = [jax.numpy.asarray(each) for each in (x, dk, pk, b)]
        upstream = jax.numpy.asarray(dy)
        forward = jax.jit(function)

        @jax.jit
        def step(upstream, *arrays):
            y, pull = jax.vjp(function, *arrays)
            return y, pull(upstream)

        found[name] = (
            lambda: jax.block_until_ready(forward(*arrays)),
            lambda: jax.block_until_ready(step(upstream, *arrays))[1],
        )

    def lax_pair(x, dk, pk, b):
        numbers = ("NHWC", "HWIO", "NHWC")
        u = jax.lax.conv_general_dilated(
            x,
            dk.reshape(kh, kw, 1, c * m),
            keywords["strides"],
            keywords["padding"].upper(),
            rhs_dilation=keywords["dilation_rate"],
            dimension_numbers=numbers,
            feature_group_count=c,
        )
        return jax.lax.conv_general_dilated(u, pk, (1, 1), "VALID", dimension_numbers=numbers) + b

    def through(layer_class):
        keras_layer = layer_class(f, (kh, kw), depth_multiplier=m, **keywords)
        keras_layer.build(x.shape)
        # The order of a stateless call is that of the layer's weights.
        return lambda x, dk, pk, b: keras_layer.stateless_call([dk, pk, b], [], x)[0]

    add_jax("sepconv.jax", lambda *a: sepconv.jax.separable_conv2d(*a, **keywords))
    add_jax("sepconv.keras", through(sepconv.keras.SeparableConv2D))
    add_jax("keras on jax", through(keras.layers.SeparableConv2D))
    add_jax("jax.lax", lax_pair)

    # torch pads both sides alike: the same numbers only where 'same' does so too.
    reach = [(k - 1) * d for k, d in zip((kh, kw), keywords["dilation_rate"], strict=True)]
    if keywords["strides"] == (1, 1) and all(r % 2 == 0 for r in reach):
        padding = [r // 2 for r in reach] if keywords["padding"] == "same" else [0, 0]
        for name, memory in (
            ("torch", torch.contiguous_format),
            ("torch channels_last", torch.channels_last),
        ):
            tensors = [
                torch.from_numpy(each).contiguous(memory_format=memory).requires_grad_()
                for each in (
                    np.ascontiguousarray(x.transpose(0, 3, 1, 2)),
                    np.ascontiguousarray(dk.transpose(2, 3, 0, 1).reshape(c * m, 1, kh, kw)),
                    np.ascontiguousarray(pk[0, 0].T.reshape(f, c * m, 1, 1)),
                )
            ]
            tensors.append(torch.from_numpy(b).requires_grad_())
            upstream = torch.from_numpy(np.ascontiguousarray(dy.transpose(0, 3, 1, 2)))
            upstream = upstream.contiguous(memory_format=memory)

            def pair(tensors=tensors, padding=padding):
                u = torch.nn.functional.conv2d(
                    tensors[0],
                    tensors[1],
                    padding=padding,
                    dilation=keywords["dilation_rate"],
                    groups=c,
                )
                return torch.nn.functional.conv2d(u, tensors[2], tensors[3])

            def forward(pair=pair):
                with torch.no_grad():
                    return pair().permute(0, 2, 3, 1)

            def step(pair=pair, tensors=tensors, upstream=upstream):
                return torch.autograd.grad(pair(), tensors, upstream)

            found[name] = (forward, step)
    reference = np.asarray(found["keras on jax"][0]())
    for name, (forward, _) in found.items():
        np.testing.assert_allclose(
            np.asarray(forward()), reference, rtol=1e-3, atol=1e-3, err_msg=name
        )
    return found


def interleaved_medians(calls, seconds, least_rounds):
    """Returns {name: seconds per call}."""
    for call in calls.values():
        call()
    samples = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least_rounds or time.perf_counter() < end:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - begin)
        rounds += 1
    return {name: statistics.median(times) for name, times in samples.items()}


def main():
    arguments = parse_arguments()
    # Before any framework starts its threads.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.threads :])
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ["KERAS_BACKEND"] = "jax"
    import numpy as np
    import torch

    import sepconv
    from sepconv import _native, machine

    torch.set_num_threads(arguments.threads)
    sepconv.set_num_threads(arguments.threads)
    layers = json.loads(Path(__file__).with_name("workloads.json").read_text())["layers"]
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": machine.cpu_name(),
        "target": sepconv.cpu_target(),
        "threads": arguments.threads,
        "batch": arguments.batch,
        **machine.versions("sepconv", "jax", "keras", "torch", "numpy"),
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows = []
    for network, key in ROWS[2:4] if arguments.quick else ROWS:
        layer = find_row(layers, network, key)
        found = candidates(layer, arguments.batch, np)
        seconds = 0.0 if arguments.quick else arguments.seconds
        label = f"{layer['H']}x{layer['W']} {layer['Cin']}>{layer['Cout']} k{layer['kernel'][0]}"
        for position, measured in enumerate(("forward", "training")):
            peaks = [_native.fma_peak_gflops() for _ in range(5)]
            calls = {name: pair[position] for name, pair in found.items()}
            medians = interleaved_medians(calls, seconds, 3 if arguments.quick else 5)
            peaks += [_native.fma_peak_gflops() for _ in range(5)]
            peak = statistics.median(peaks) * arguments.threads
            flops = layer["gflop_fwd_per_image"] * arguments.batch * (3 if position else 1)
            ours = medians["sepconv.keras"]
            for name, median in medians.items():
                rows.append(
                    {
                        **facts,
                        "network": layer["network"],
                        "layer": layer["name"],
                        "shape": label,
                        "pass": measured,
                        "candidate": name,
                        "median_us": round(median * 1e6, 1),
                        "ratio_to_sepconv_keras": round(median / ours, 3),
                        "gflops": round(flops / median, 1),
                        "fma_peak_gflops": round(peak, 1),
                        "fraction_of_peak": round(flops / median / peak, 3),
                    }
                )
            stated = "  ".join(
                f"{n} {t * 1e6:.0f} us ({t / ours:.2f}x)" for n, t in medians.items()
            )
            print(f"{label} {measured}: {flops / ours / peak:.0%} of peak | {stated}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
