"""Plots of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sepconv.bench.results import Case, Result

__all__ = ["draw_ratios", "draw_roofline", "svg_of"]

_MARKS = "osD^v<>PX*hp"
_OURS = "#c8102e"


def draw_ratios(cases: Sequence[Case]) -> Figure:
    """Draws the time of everyone over ours, a line of marks for each layer.

    Args:
        cases: Of one setting, at least one.
    """
    figure = Figure(figsize=(9, 1.8 + 0.3 * len(cases)), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(n for c in cases for n, r in c.others.items() if not r.ours))
    for index, name in enumerate(names):
        here = [(case.ratio(name), y) for y, case in enumerate(cases) if name in case.others]
        ratios, heights = zip(*here, strict=True)
        axes.plot(
            ratios,
            heights,
            _MARKS[index % len(_MARKS)],
            color=f"C{index % 10}",
            markersize=6,
            alpha=0.8,
            label=name,
        )
    axes.axvline(1, color=_OURS, linewidth=1.5, label=cases[0].ours.candidate)
    axes.set_xscale("log")
    axes.set_xlabel(f"time over that of {cases[0].ours.candidate}: right of the line is slower")
    axes.set_yticks(range(len(cases)), [case.label for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_formatter("")
    axes.grid(axis="both", color="#dddddd", linewidth=0.6)
    axes.set_title(str(cases[0].setting), fontsize=10, loc="left")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def draw_roofline(cases: Sequence[Case]) -> Figure:
    """Draws arithmetic speed over arithmetic per byte, below what the machine allows.

    Ours and the fastest peer of each layer are joined by a line.

    Args:
        cases: Of one setting, at least one.
    """
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    first = cases[0].ours
    ours = np.array([_point(case.ours) for case in cases])
    ridge = first.fma_peak_gflops / first.memory_gigabytes_per_second
    intensities = np.geomspace(min(ours[:, 0].min(), ridge) / 2, max(ours[:, 0].max(), ridge) * 2)
    roof = np.minimum(first.fma_peak_gflops, intensities * first.memory_gigabytes_per_second)
    # Products of bfloat16 may have an instruction of their own, and no roof is known for the mix.
    in_float32 = first.device == "cpu" and first.dtype == "bfloat16"
    limit = "limit of the machine in float32" if in_float32 else "limit of the machine"
    axes.plot(intensities, roof, color="#444444", linewidth=1.5, label=limit)
    peers = [(case.ours, case.others[case.best_peer]) for case in cases if case.best_peer]
    if peers:
        best = np.array([_point(peer) for _, peer in peers])
        axes.plot(best[:, 0], best[:, 1], "o", color="#1f77b4", alpha=0.7, label="best peer")
        for door, peer in peers:
            (x, low), (_, high) = _point(door), _point(peer)
            axes.plot([x, x], [low, high], color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.plot(ours[:, 0], ours[:, 1], "s", color=_OURS, alpha=0.8, label=first.candidate)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic per byte that must be moved, FLOP/byte")
    axes.set_ylabel("GFLOP/s")
    axes.grid(which="both", color="#eeeeee", linewidth=0.6)
    axes.set_title(str(cases[0].setting), fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    return figure


def _point(result: Result) -> tuple[float, float]:
    return 1e3 * result.gflop / result.megabytes, 1e6 * result.gflop / result.median_us


def svg_of(figure: Figure) -> str:
    """Returns a plot as SVG text, which depends on nothing but the plot.

    Args:
        figure: The plot.
    """
    memory = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "sepconv"}):
        figure.savefig(memory, format="svg", metadata={"Date": None}, facecolor="white")
    return memory.getvalue()
