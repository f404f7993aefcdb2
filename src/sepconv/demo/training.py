"""A small separable network trained on digits twice at once: with stock layers and with ours."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from sepconv.demo.data import Digits
from sepconv.demo.pretrained import swap_separable_layers
from sepconv.timing import Timing

__all__ = ["SEPARABLE_LAYERS", "Run", "TrainingResult", "build_network", "train"]

SEPARABLE_LAYERS = 3
"""How many separable convolutions `build_network` puts into its network."""

# The first steps compile.
_UNTIMED_STEPS = 3


@dataclass
class Run:
    """What one network did while it was trained.

    Attributes:
        losses: Of every step, before its update.
        validation_losses: After every epoch.
        accuracies: On the validation digits, after every epoch.
        seconds: Of every step, the first ones, which compile, left out.
        predictions: (validation digits,) class of each after the last epoch.
    """

    losses: list[float]
    validation_losses: list[float]
    accuracies: list[float]
    seconds: list[float]
    predictions: npt.NDArray[np.int64]

    @property
    def timing(self) -> Timing:
        """The time of one training step."""
        return Timing.of(self.seconds)


@dataclass(frozen=True)
class TrainingResult:
    """Both runs on the same digits in the same order.

    Attributes:
        stock: The run with stock layers.
        ours: The run with our layers.
        control_losses: Of the steps of the first epoch, with stock layers whose first weights
            differ in the last bit: how far rounding alone drives two equal networks apart.
        validation: The digits that neither was trained on.
        training_count: How many digits both were trained on.
        batch_size: Digits in one step.
    """

    stock: Run
    ours: Run
    control_losses: list[float]
    validation: Digits
    training_count: int
    batch_size: int

    @property
    def loss_differences(self) -> npt.NDArray[np.float64]:
        """Distance of our loss from the stock one at every step."""
        return np.abs(np.subtract(self.stock.losses, self.ours.losses))

    @property
    def control_differences(self) -> npt.NDArray[np.float64]:
        """Distance of the control's loss from the stock one at every step of the first epoch."""
        count = len(self.control_losses)
        return np.abs(np.subtract(self.stock.losses[:count], self.control_losses))

    @property
    def agreement(self) -> float:
        """Share of the validation digits that both give the same class."""
        return float(np.mean(self.stock.predictions == self.ours.predictions))


def build_network(seed: int) -> keras.Model:
    """Returns a network of stock separable convolutions for 28x28 digits, not compiled yet.

    Args:
        seed: Of the initial weights.

    Example:
        >>> build_network(seed=0).output_shape
        (None, 10)
    """
    keras.utils.set_random_seed(seed)
    layers = keras.layers

    def normalised(x: Any) -> Any:
        # With the default momentum of 0.99 the averages would still be settling when the run ends.
        return layers.Activation("relu")(layers.BatchNormalization(momentum=0.9)(x))

    def separable(filters: int, x: Any) -> Any:
        # No bias: the normalisation after it subtracts whatever it adds.
        return normalised(layers.SeparableConv2D(filters, 3, padding="same", use_bias=False)(x))

    inputs = keras.Input((28, 28, 1))
    x = normalised(layers.Conv2D(24, 3, strides=2, padding="same", use_bias=False)(inputs))
    x = separable(48, x)
    x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    x = separable(96, x)
    x = separable(128, x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def train(
    digits: Digits,
    console: Console,
    *,
    epochs: int = 3,
    batch_size: int = 50,
    seed: int = 0,
) -> TrainingResult:
    """Trains both networks step by step in turn and returns what they did.

    For the first epoch a control runs along: the stock network, every first weight moved to the
    next float. A fifth of the digits is kept for validation.

    Args:
        digits: All digits, in random order.
        console: Where the progress bars appear.
        epochs: How often every training digit is seen.
        batch_size: Digits in one step.
        seed: Of the initial weights and of the order of the digits.
    """
    count = len(digits.labels) * 4 // 5 // batch_size * batch_size
    validation = Digits(digits.images[count:], digits.labels[count:])
    stock = build_network(seed)
    networks = {"stock": stock, "ours": swap_separable_layers(stock, SEPARABLE_LAYERS)}
    control = keras.models.clone_model(stock)
    control.set_weights([np.nextafter(w, np.inf, dtype=w.dtype) for w in stock.get_weights()])
    steps = count // batch_size
    runs = {name: Run([], [], [], [], np.zeros(0, np.int64)) for name in (*networks, "control")}
    for network in (*networks.values(), control):
        network.compile(
            optimizer=keras.optimizers.SGD(
                keras.optimizers.schedules.CosineDecay(0.1, epochs * steps), momentum=0.9
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )

    rng = np.random.default_rng(seed)
    with _progress(console) as progress:
        bars = {
            name: progress.add_task(name, total=epochs * steps, loss="", speed="", accuracy="")
            for name in networks
        }
        bars["control"] = progress.add_task(
            "control", total=steps, loss="", speed="", accuracy="not measured"
        )
        for epoch in range(epochs):
            for step, chosen in enumerate(rng.permutation(count).reshape(steps, batch_size)):
                # In turn, and the other one first next time: a slow moment of the machine hits
                # both.
                for name in list(networks)[:: 1 if step % 2 else -1]:
                    seconds = _step(networks[name], digits, chosen, runs[name])
                    _show_step(progress, bars[name], runs[name], seconds)
                if epoch == 0:
                    seconds = _step(control, digits, chosen, runs["control"])
                    _show_step(progress, bars["control"], runs["control"], seconds)
            for name, network in networks.items():
                _validate(network, validation, runs[name])
                progress.update(bars[name], accuracy=f"{runs[name].accuracies[-1]:.1%}")
    return TrainingResult(
        runs["stock"], runs["ours"], runs["control"].losses, validation, count, batch_size
    )


def _step(
    network: keras.Model, digits: Digits, chosen: Sequence[int] | npt.NDArray[Any], run: Run
) -> float:
    """Takes one step, notes it, and returns its seconds."""
    images, labels = digits.images[chosen], digits.labels[chosen]
    start = time.perf_counter()
    # Keras reports means since the last reset.
    network.reset_metrics()
    loss = float(network.train_on_batch(images, labels, return_dict=True)["loss"])
    seconds = time.perf_counter() - start
    run.losses.append(loss)
    if len(run.losses) > _UNTIMED_STEPS:
        run.seconds.append(seconds)
    return seconds


def _validate(network: keras.Model, validation: Digits, run: Run) -> None:
    logits = network.predict(validation.images, batch_size=200, verbose=0)
    run.predictions = np.argmax(logits, axis=-1)
    run.accuracies.append(float(np.mean(run.predictions == validation.labels)))
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    log_sums = np.log(np.sum(np.exp(shifted), axis=-1))
    of_label = np.take_along_axis(shifted, validation.labels[:, None], axis=-1)[:, 0]
    run.validation_losses.append(float(np.mean(log_sums - of_label)))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description:<7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:>6}"),
        TextColumn("{task.fields[speed]:>7} a step"),
        TextColumn("validation {task.fields[accuracy]}"),
        console=console,
    )


def _show_step(progress: Progress, bar: TaskID, run: Run, seconds: float) -> None:
    loss, speed = f"{run.losses[-1]:.4f}", f"{seconds * 1e3:.1f} ms"
    progress.update(bar, advance=1, loss=loss, speed=speed)
