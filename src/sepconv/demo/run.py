"""The whole demo, in order, with its words on the terminal."""

from __future__ import annotations

import time
from pathlib import Path

import keras
from rich.console import Console
from rich.table import Table

from sepconv.demo import data, pretrained, training
from sepconv.demo.report import machine_facts, write_report
from sepconv.timing import Timing

__all__ = ["run"]


def run(folder: Path, console: Console, *, epochs: int = 3, rounds: int = 7) -> Path:
    """Runs the demo and returns the path of its page.

    Args:
        folder: Where the report goes.
        console: Where the words go.
        epochs: Of the training.
        rounds: Of every timing.

    Raises:
        MissingPackageError: an input is not installed.
        RuntimeError: Keras runs on something other than JAX.
        SwapError: not every layer could be swapped.
    """
    if keras.backend.backend() != "jax":
        raise RuntimeError(
            "The demo needs Keras on JAX: set KERAS_BACKEND=jax before Keras is imported. "
            f"Received: backend={keras.backend.backend()!r}"
        )
    start = time.perf_counter()
    for name, fact in machine_facts().items():
        console.print(f"  {name:<10} {fact}", highlight=False)

    console.print("\n[bold]A mini-Xception trained with Keras 2.0.5, all layers swapped[/bold]")
    with console.status("  loading, swapping, comparing"):
        stock = pretrained.load_legacy_model(data.emotion_model_path())
        ours = pretrained.swap_separable_layers(stock, pretrained.SEPARABLE_LAYERS)
        pretrained.check_kernel(ours)
        face = data.astronaut_face()
        comparison = pretrained.compare(stock, ours, face, rounds=rounds)
    _show_comparison(console, comparison)

    console.print("\n[bold]A small network trained on MNIST digits, both at once[/bold]")
    result = training.train(data.digits(), console, epochs=epochs)
    _show_training(console, result)

    with console.status("  drawing the report"):
        page = write_report(folder, face, comparison, result)
    console.print(f"\nReport: {page}", soft_wrap=True)
    console.print(f"Done in {time.perf_counter() - start:.0f} s", highlight=False)
    return page


def _show_comparison(console: Console, comparison: pretrained.Comparison) -> None:
    table = Table("layer", box=None, pad_edge=False, header_style="dim")
    for heading in ("input", "filters", "difference", "stock", "sepconv", "ratio"):
        table.add_column(heading, justify="right")
    for row in comparison.layers:
        shape = "x".join(map(str, row.input_shape))
        ratio = row.stock.median / row.ours.median
        table.add_row(
            row.name,
            shape,
            str(row.filters),
            f"{row.difference:.1e}",
            f"{row.stock.median * 1e6:.0f} us",
            f"{row.ours.median * 1e6:.0f} us",
            f"{ratio:.1f}x",
        )
    console.print(table)
    label, probability = comparison.label, comparison.probability
    console.print(f"  astronaut: [bold]{label}[/bold], probability {probability:.4f}")
    console.print(f"  largest difference of the logits: {comparison.logits_difference:.1e}")
    for size, (stock, ours) in comparison.times.items():
        console.print(f"  whole network, batch {size}: {_versus(stock, ours)}")


def _show_training(console: Console, result: training.TrainingResult) -> None:
    stock, ours = result.stock, result.ours
    console.print(f"  step of {result.batch_size}: {_versus(stock.timing, ours.timing)}")
    ours_apart, control_apart = result.loss_differences, result.control_differences
    console.print(
        f"  distance from the stock loss: {ours_apart[0]:.0e} at the first step, at most "
        f"{ours_apart[: len(control_apart)].max():.0e} in the first epoch; rounding alone takes a "
        f"stock control {control_apart.max():.0e} away"
    )
    console.print(
        f"  accuracy on {len(ours.predictions)} unseen digits: stock {stock.accuracies[-1]:.1%}, "
        f"sepconv {ours.accuracies[-1]:.1%}; same class for {result.agreement:.1%}"
    )


def _versus(stock: Timing, ours: Timing) -> str:
    ratio = stock.median / ours.median
    return f"stock {stock.median * 1e3:.1f} ms, sepconv {ours.median * 1e3:.1f} ms, {ratio:.1f}x"
