"""What our kernel would cost and gain on the TensorFlow backend of Keras, through Python.

    python benchmarks/keras_tensorflow.py                      both parts, one thread: 2 minutes
    python benchmarks/keras_tensorflow.py --part layers

`bridged` is the layer with its computation in `tf.numpy_function` and a custom gradient, which
calls `sepconv.numpy`; `stock` that of Keras. `fit` is that of the mini-Xception of the package
`fer`, as in keras_fit.py. Neither is compiled by XLA: it cannot compile what runs in Python, and
Keras does not ask for it by itself; on a CPU, it made the stock layer ten times slower.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from keras_fit import make_trainable

# Images, kernel, filters.
LAYERS = {
    "nearly nothing": ((1, 8, 8, 8), 3, 8),
    "MobileNet 14x14 512>512": ((1, 14, 14, 512), 3, 512),
    "Xception 19x19 728>728": ((1, 19, 19, 728), 3, 728),
    "Xception, 8 images": ((8, 19, 19, 728), 3, 728),
    "Xception 147x147 64>128": ((1, 147, 147, 64), 3, 128),
}
PARTS = ("layers", "fit")
FACTS = ("median", "best")
BATCH, STEPS, EPOCHS = 32, 10, 5

# Written by a process of another backend: the interpreter with TensorFlow has no package `fer`.
WRITE = """
import sys
import numpy as np
from keras import ops
from sepconv.demo import data, pretrained

folder, count = sys.argv[1], int(sys.argv[2])
pretrained.load_legacy_model(data.emotion_model_path()).save(folder + "/model.keras")
digits = data.digits()
images = ops.convert_to_numpy(ops.image.resize(2 * digits.images[:count] - 1, (64, 64)))
np.savez(folder + "/digits.npz", images=images, labels=digits.labels[:count] % 7)
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--tensorflow-python",
        default=os.environ.get("SEPCONV_ORACLE_PYTHON", sys.executable),
        help="interpreter that has TensorFlow and Keras 3",
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def bridged_class() -> Any:
    """The layer of Keras with its computation replaced."""
    import keras
    import tensorflow as tf

    from sepconv.numpy import separable_conv2d, separable_conv2d_grad

    class Bridged(keras.layers.SeparableConv2D):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.supports_jit = False  # Keras then leaves XLA out.

        def call(self, inputs: Any) -> Any:
            keywords = {
                "strides": self.strides,
                "padding": self.padding,
                "dilation_rate": self.dilation_rate,
                "data_format": self.data_format,
            }
            weights = [self.depthwise_kernel, self.pointwise_kernel]
            weights += [self.bias] if self.use_bias else []
            operands = [inputs, *(tf.convert_to_tensor(weight) for weight in weights)]

            def run(function: Any, given: list[Any], dtypes: Any) -> Any:
                call = lambda *arrays: function(*arrays, **keywords)  # noqa: E731
                return tf.numpy_function(call, given, dtypes)

            def gradients(*arrays: Any, **keywords: Any) -> Any:
                return [g for g in separable_conv2d_grad(*arrays, **keywords) if g is not None]

            @tf.custom_gradient
            def operation(*operands: Any) -> Any:
                y = run(separable_conv2d, list(operands), inputs.dtype)
                y.set_shape(self.compute_output_shape(inputs.shape))

                def backward(dy: Any) -> Any:
                    found = run(gradients, [dy, *operands], [inputs.dtype] * len(operands))
                    for gradient, operand in zip(found, operands, strict=True):
                        gradient.set_shape(operand.shape)
                    return found

                return y, backward

            return self.activation(operation(*operands))

    return Bridged


def time_layers() -> None:
    import keras
    import tensorflow as tf

    from sepconv import timing

    bridged = bridged_class()
    print("\nmicroseconds of a call: median (least)")
    for name, (shape, kernel, filters) in LAYERS.items():
        rng = np.random.default_rng(0)
        x = tf.constant(rng.standard_normal(shape, np.float32))
        layers = {"stock": keras.layers.SeparableConv2D(filters, kernel, padding="same")}
        layers["bridged"] = bridged(filters, kernel, padding="same")
        for layer in layers.values():
            layer.build(shape)
        layers["bridged"].set_weights(layers["stock"].get_weights())
        np.testing.assert_allclose(layers["bridged"](x), layers["stock"](x), rtol=1e-3, atol=1e-3)

        ways: dict[str, dict[str, Callable[[], Any]]] = {"eager": {}, "graph": {}}
        ways |= {"eager training": {}, "graph training": {}}
        for who, layer in layers.items():
            step, forward = functools.partial(train, layer, x), functools.partial(layer, x)
            ways["eager"][who] = forward
            ways["eager training"][who] = step
            ways["graph"][who] = tf.function(forward)
            ways["graph training"][who] = tf.function(step)
        print(f"\n{name}")
        for way, calls in ways.items():
            blocks = {who: timing.block_of(lambda c=call: wait(c())) for who, call in calls.items()}
            times = timing.interleaved(blocks, rounds=10, block_seconds=0.05)
            row = "  ".join(
                f"{who} {t.median * 1e6:9.1f} ({t.best * 1e6:.1f})" for who, t in times.items()
            )
            ratios = (getattr(times["stock"], x) / getattr(times["bridged"], x) for x in FACTS)
            print(f"  {way:16}{row}  stock / bridged {next(ratios):.2f} ({next(ratios):.2f})")


def train(layer: Any, x: Any) -> Any:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer(x))
    return tape.gradient(loss, [x, *(w.value for w in layer.trainable_variables)])


def wait(result: Any) -> None:
    import tensorflow as tf

    for tensor in tf.nest.flatten(result):
        tensor.numpy()


def time_fit(folder: Path) -> None:
    import keras

    from sepconv.timing import Timing

    class Steps(keras.callbacks.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.seconds: list[float] = []

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            float(logs["loss"])
            self.seconds.append(time.perf_counter() - self.start)

    with np.load(folder / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    bridged = bridged_class()

    def replaced(layer: Any) -> Any:
        kind = bridged if type(layer) is keras.layers.SeparableConv2D else type(layer)
        return kind.from_config(layer.get_config())

    models, steps = {}, {}
    for who in ("stock", "bridged"):
        model = keras.saving.load_model(folder / "model.keras", compile=False)
        if who == "bridged":
            weights = model.get_weights()
            model = keras.models.clone_model(model, clone_function=replaced)
            model.set_weights(weights)
        make_trainable(model)
        model.compile(optimizer=keras.optimizers.SGD(1e-3), loss="sparse_categorical_crossentropy")
        models[who], steps[who] = model, Steps()
    losses = {}
    for epoch in range(EPOCHS):
        for who, model in models.items():
            history = model.fit(
                images, labels, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[steps[who]]
            )
            losses[who] = history.history["loss"][-1]
            if epoch == 0:
                steps[who].seconds.clear()
    print(f"\nfit of a mini-Xception, batch {BATCH}, milliseconds of a step")
    for who, taken in steps.items():
        timing = Timing.of(taken.seconds)
        print(
            f"  {who:12}{timing.median * 1e3:8.1f} ({timing.low * 1e3:.1f} to "
            f"{timing.high * 1e3:.1f}, {timing.samples} steps), loss {losses[who]:.6f}"
        )


def work(options: argparse.Namespace) -> None:
    """In the interpreter that has TensorFlow."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    import keras

    import sepconv
    from sepconv import machine

    sepconv.set_num_threads(options.threads)
    print(
        f"{machine.cpu_name()}, {sepconv.cpu_target()}, {options.threads} thread(s), "
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}"
    )
    for part in options.part:
        if part == PARTS[0]:
            time_layers()
        else:
            time_fit(options.folder)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.part = options.part or list(PARTS)
    if options.folder:
        work(options)
        return

    import sepconv
    from sepconv.bench.workers import pinned

    with tempfile.TemporaryDirectory() as name, pinned(options.threads):
        folder = Path(name)
        # A path that holds nothing else: the other interpreter has packages of its own.
        (folder / "packages").mkdir()
        package = Path(sepconv.__file__).parent
        (folder / "packages" / "sepconv").symlink_to(package, target_is_directory=True)
        command = [sys.executable, "-c", WRITE, name, str(BATCH * STEPS)]
        subprocess.run(command, check=True, env=os.environ | {"KERAS_BACKEND": "jax"})
        environment = os.environ | {
            "KERAS_BACKEND": "tensorflow",
            "TF_USE_LEGACY_KERAS": "0",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": str(folder / "packages"),
        }
        for part in options.part:
            command = [options.tensorflow_python, __file__, "--folder", name, "--part", part]
            command += ["--threads", str(options.threads)]
            subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
