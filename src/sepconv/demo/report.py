"""The report folder: one page that stands alone, and its pictures as files."""

from __future__ import annotations

import base64
import datetime
import html
import io
import string
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

from matplotlib.figure import Figure

import sepconv
from sepconv import machine
from sepconv.demo.data import Face
from sepconv.demo.pictures import draw_curves, draw_digits, draw_photo, draw_timings
from sepconv.demo.pretrained import Comparison
from sepconv.demo.training import TrainingResult
from sepconv.timing import Timing

__all__ = ["machine_facts", "write_report"]


def machine_facts() -> dict[str, str]:
    """Returns what the times were measured on, in words.

    Example:
        >>> "processor" in machine_facts()
        True
    """
    packages = machine.versions("sepconv", "keras", "jax", "jaxlib", "numpy")
    return {
        "processor": machine.cpu_name(),
        "CPUs": f"{machine.usable_cpus()} usable, {sepconv.get_num_threads()} threads",
        "kernel": f"native, {sepconv.cpu_target()}",
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }


def write_report(folder: Path, face: Face, comparison: Comparison, result: TrainingResult) -> Path:
    """Writes the page and its pictures and returns the path of the page.

    Args:
        folder: Where to; made if it is not there.
        face: The input of the pretrained network.
        comparison: Of the pretrained network.
        result: Of the training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "photo": draw_photo(face, comparison),
        "curves": draw_curves(result),
        "digits": draw_digits(result),
        "timings": draw_timings(comparison, result),
    }
    embedded = {name: _save(figure, folder / f"{name}.png") for name, figure in pictures.items()}
    template = resources.files("sepconv.demo").joinpath("report.html").read_text(encoding="utf-8")
    page = string.Template(template).substitute(
        embedded,
        headline=f"The astronaut looks {comparison.label}: {comparison.probability:.1%}",
        label=comparison.label,
        date=f"{datetime.date.today():%d %B %Y}",
        swapped=len(comparison.layers),
        figures=_figures(comparison, result),
        layers=_layer_rows(comparison),
        training=_training_text(result),
        facts=_table_rows(machine_facts().items()),
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _save(figure: Figure, path: Path) -> str:
    """Saves a picture, and returns it as an address that holds all of it."""
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=160, facecolor="white")
    path.write_bytes(memory.getvalue())
    return "data:image/png;base64," + base64.b64encode(memory.getvalue()).decode("ascii")


def _figures(comparison: Comparison, result: TrainingResult) -> str:
    figures: Mapping[str, str] = {
        **{
            f"mini-Xception, {size} face{'s' if size > 1 else ''} at a time": _faster(*pair)
            for size, pair in comparison.times.items()
        },
        "training step": _faster(result.stock.timing, result.ours.timing),
        "largest difference of the logits": f"{comparison.logits_difference:.1e}",
        "accuracy on unseen digits": f"{result.ours.accuracies[-1]:.1%}",
    }
    return "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in figures.items()
    )


def _layer_rows(comparison: Comparison) -> str:
    return _table_rows(
        (
            row.name,
            " x ".join(map(str, row.input_shape)),
            str(row.filters),
            f"{row.largest:.2f}",
            f"{row.difference:.1e}",
            f"{row.stock.median * 1e6:.0f} us",
            f"{row.ours.median * 1e6:.0f} us",
            f"{row.stock.median / row.ours.median:.1f}x",
        )
        for row in comparison.layers
    )


def _training_text(result: TrainingResult) -> str:
    stock, ours = result.stock, result.ours
    ours_apart, control_apart = result.loss_differences, result.control_differences
    furthest = ours_apart[: len(control_apart)].max()
    steps, digits = len(stock.losses), len(ours.predictions)
    accuracies = f"{stock.accuracies[-1]:.1%} and {ours.accuracies[-1]:.1%}"
    times = f"{stock.timing.median * 1e3:.1f} ms and {ours.timing.median * 1e3:.1f} ms"
    return (
        f"A small network with separable convolutions was trained on {result.training_count} of "
        "the 5,000 MNIST digits, twice: with stock layers and with ours, from the same weights, on "
        f"the same batches of {result.batch_size}, {steps} steps. Before the first update the "
        f"losses differ by {ours_apart[0]:.0e}; afterwards training amplifies every rounding, to "
        f"{furthest:.0e} at most in the first epoch. That is no property of our layers: the stock "
        "network itself, its first weights changed in the last bit, went as far as "
        f"{control_apart.max():.0e}. Accuracy on {digits} other digits: {accuracies}; both agree "
        f"on {result.agreement:.1%} of them. One step takes {times}."
    )


def _table_rows(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )


def _faster(stock: Timing, ours: Timing) -> str:
    ratio = stock.median / ours.median
    return f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"
