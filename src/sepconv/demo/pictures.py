"""The pictures of the report, drawn without a display."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sepconv.demo.data import Face
from sepconv.demo.pretrained import EMOTIONS, Comparison
from sepconv.demo.training import TrainingResult
from sepconv.timing import Timing

__all__ = ["draw_curves", "draw_digits", "draw_photo", "draw_timings"]

_INK, _PALE, _STOCK, _OURS, _WRONG = "#1f2933", "#7b8794", "#9fb3c8", "#d9480f", "#c92a2a"


def draw_photo(face: Face, comparison: Comparison) -> Figure:
    """Draws the photo with the face and its label, what the network saw, and what it answered.

    Args:
        face: The input.
        comparison: The answers.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    grid = figure.add_gridspec(1, 3, width_ratios=(4.3, 1.7, 3.2))
    photo = figure.add_subplot(grid[0])
    photo.imshow(face.photo)
    (top, bottom), (left, right) = face.rows, face.columns
    photo.add_patch(
        Rectangle(
            (left, top), right - left, bottom - top, fill=False, edgecolor=_OURS, linewidth=2.5
        )
    )
    photo.text(
        left,
        top - 9,
        f"{comparison.label} {comparison.probability:.1%}",
        color="white",
        weight="bold",
        bbox={"facecolor": _OURS, "edgecolor": "none", "pad": 3},
    )
    photo.set_axis_off()

    seen = figure.add_subplot(grid[1])
    seen.imshow(face.pixels[0, :, :, 0], cmap="gray", vmin=-1, vmax=1)
    seen.set_title("what the network sees\n64 x 64 grey", fontsize=9, color=_PALE)
    seen.set_axis_off()

    bars = figure.add_subplot(grid[2])
    rows = np.arange(len(EMOTIONS))
    stock, ours = comparison.stock_probabilities, comparison.our_probabilities
    bars.barh(rows - 0.19, stock, 0.36, color=_STOCK, label="stock layers")
    bars.barh(rows + 0.19, ours, 0.36, color=_OURS, label="sepconv layers")
    for row, (one, other) in enumerate(zip(stock, ours, strict=True)):
        # Beside a long bar there is no room.
        inside = max(one, other) > 0.6
        x, side = (0.97, "right") if inside else (max(one, other) + 0.02, "left")
        for value, offset, colour in ((one, -0.19, _INK), (other, 0.19, "white")):
            bars.text(
                x,
                row + offset,
                f"{value:.5f}",
                color=colour if inside else _PALE,
                ha=side,
                va="center",
                fontsize=7.5,
            )
    bars.set_yticks(rows, EMOTIONS)
    bars.invert_yaxis()
    bars.set_xlim(0, 1)
    bars.set_xlabel("probability")
    bars.legend(frameon=False, loc="lower right", fontsize=9)
    _tidy(bars)
    return figure


def draw_curves(result: TrainingResult) -> Figure:
    """Draws both loss curves, their distance and that of the control, and both accuracies.

    Args:
        result: Of the training.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss, difference, accuracy = figure.subplots(1, 3, width_ratios=(4, 3, 2.6))
    steps = np.arange(1, len(result.stock.losses) + 1)
    loss.plot(steps, result.stock.losses, color=_STOCK, linewidth=4, label="stock layers")
    loss.plot(steps, result.ours.losses, color=_OURS, linewidth=1, label="sepconv layers")
    loss.set_title("training loss of every step", fontsize=10)
    loss.set_xlabel("step")
    loss.set_yscale("log")
    loss.legend(frameon=False, fontsize=9)

    # Equal to the last bit has no place on a logarithmic axis.
    control = np.maximum(result.control_differences, 1e-9)
    difference.plot(
        steps[: len(control)],
        control,
        color=_STOCK,
        linewidth=4,
        label="stock, last bit of the\nfirst weights changed",
    )
    ours = np.maximum(result.loss_differences, 1e-9)
    difference.plot(steps, ours, color=_OURS, linewidth=1, label="sepconv")
    difference.legend(frameon=False, fontsize=9, loc="lower right")
    difference.set_yscale("log")
    difference.set_ylim(5e-10, 2)
    difference.set_title("distance from the stock loss", fontsize=10)
    difference.set_xlabel("step")

    epochs = np.arange(1, len(result.stock.accuracies) + 1)
    accuracy.plot(epochs, result.stock.accuracies, "o-", color=_STOCK, linewidth=4, markersize=9)
    accuracy.plot(epochs, result.ours.accuracies, "o-", color=_OURS, linewidth=1, markersize=4)
    accuracy.set_title("validation accuracy", fontsize=10)
    accuracy.set_xlabel("epoch")
    accuracy.set_xticks(epochs)
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in (loss, difference, accuracy):
        _tidy(axes)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.7)
    return figure


def draw_timings(comparison: Comparison, result: TrainingResult) -> Figure:
    """Draws the times of whole networks, of a training step, and of the layers one by one.

    Args:
        comparison: Of the pretrained network.
        result: Of the training.
    """
    whole = {
        f"mini-Xception, {size} face{'s' if size > 1 else ''}": pair
        for size, pair in comparison.times.items()
    }
    whole[f"training step, {result.batch_size} digits"] = (result.stock.timing, result.ours.timing)
    layers = {
        f"{row.input_shape[0]}x{row.input_shape[1]}  {row.input_shape[2]}>{row.filters}": (
            row.stock,
            row.ours,
        )
        for row in comparison.layers
    }
    heights = (len(whole) + 0.9, len(layers) + 0.9)
    figure = Figure(figsize=(10, 0.5 * sum(heights) + 0.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=heights, sharex=True)
    _bars(upper, whole, "whole networks")
    _bars(lower, layers, "the separable layers of the mini-Xception, one face")
    longest = max(ours.median / stock.median for stock, ours in (*whole.values(), *layers.values()))
    # Room for the labels right of the bars.
    upper.set_xlim(0, 1.16 * max(1.0, longest))
    upper.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    lower.set_xlabel("time as a share of the stock layers' time (shorter is better)", fontsize=9)
    figure.legend(
        *lower.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False
    )
    return figure


def draw_digits(result: TrainingResult, columns: int = 12) -> Figure:
    """Draws validation digits with the class they were given, mistakes in the second row.

    Args:
        result: Of the training.
        columns: Digits in a row.
    """
    validation, predictions = result.validation, result.ours.predictions
    wrong = np.flatnonzero(predictions != validation.labels)[:columns]
    right = np.flatnonzero(predictions == validation.labels)[:columns]
    figure = Figure(figsize=(10, 2.3), layout="constrained")
    grid = figure.subplots(2, columns)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, chosen in enumerate((right, wrong)):
        for axes, index in zip(grid[row], chosen, strict=False):
            label, given = int(validation.labels[index]), int(predictions[index])
            axes.imshow(1 - validation.images[index, :, :, 0], cmap="gray", vmin=0, vmax=1)
            title, colour = (
                (f"{given}", _INK) if label == given else (f"{given}, is {label}", _WRONG)
            )
            axes.set_title(title, fontsize=9, color=colour)
    return figure


def _bars(axes: Axes, pairs: dict[str, tuple[Timing, Timing]], title: str) -> None:
    """Draws pairs of bars, each pair relative to its stock time, labelled with the times."""
    rows = np.arange(len(pairs))
    stock = np.array([one.median for one, _ in pairs.values()])
    ours = np.array([other.median for _, other in pairs.values()])
    axes.barh(rows - 0.19, np.ones(len(rows)), 0.36, color=_STOCK, label="stock layers")
    axes.barh(rows + 0.19, ours / stock, 0.36, color=_OURS, label="sepconv layers")
    for row, (one, other) in enumerate(zip(stock, ours, strict=True)):
        axes.text(1.01, row - 0.19, _time(one), va="center", fontsize=8.5, color=_PALE)
        axes.text(
            other / one + 0.01,
            row + 0.19,
            f"{_time(other)}   {one / other:.1f}x",
            va="center",
            fontsize=8.5,
            color=_OURS,
            weight="bold",
        )
    axes.set_yticks(rows, list(pairs))
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10, loc="left")
    _tidy(axes)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _tidy(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)
