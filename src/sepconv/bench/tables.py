"""What a run says, as tables of text: for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sepconv.bench.candidates import CANDIDATES
from sepconv.bench.problems import MODES
from sepconv.bench.results import Case, Run, below, cases_of, geometric_mean

__all__ = [
    "Table",
    "case_tables",
    "cases_by_setting",
    "fact_table",
    "memory_table",
    "note_table",
    "summary_tables",
]

_OWN_DOOR = {candidate.name: candidate.door for candidate in CANDIDATES}


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it is about.
        header: Names of the columns. The first column is text.
        rows: As many cells each.
        last_is_total: Whether the last row sums up the others.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    last_is_total: bool = False


def cases_by_setting(run: Run, door: str | None = None) -> list[list[Case]]:
    """Returns the cases of a run, those of each table together.

    Args:
        run: The run.
        door: Our door that ratios refer to; by default the first one with a time.
    """
    together: dict[object, list[Case]] = {}
    for case in cases_of(run.results, door):
        together.setdefault(case.setting, []).append(case)
    return list(together.values())


def case_tables(run: Run, door: str | None = None) -> list[Table]:
    """Returns a table of layers for each setting: our time, its limit, and everyone's ratio.

    Args:
        run: The run.
        door: Our door that ratios refer to; by default the first one with a time.
    """
    return [_case_table(cases) for cases in cases_by_setting(run, door)]


def _case_table(cases: Sequence[Case]) -> Table:
    names = list(dict.fromkeys(name for case in cases for name in case.others))
    rows = []
    for case in cases:
        best = case.best_peer
        rows.append(
            [
                case.label,
                f"{case.ours.median_us:.0f} ±{100 * case.ours.spread:.0f}%",
                f"{case.ours.percent_of_limit:.0f} {case.ours.bound}",
                f"{_times(case.ratio(best))} {best}" if best else "",
                *(_times(case.ratio(name)) if name in case.others else "-" for name in names),
            ]
        )
    best_ratios = [case.ratio(case.best_peer) for case in cases if case.best_peer]
    means = [
        geometric_mean(case.ratio(name) for case in cases if name in case.others) for name in names
    ]
    rows.append(["geometric mean", "", "", *map(_times, [geometric_mean(best_ratios), *means])])
    header = ["layer", "us", "% of limit", "best peer", *names]
    return Table(f"{cases[0].setting}: {cases[0].ours.candidate}", header, rows, True)


def summary_tables(run: Run, door: str | None = None) -> list[Table]:
    """Returns geometric means over the layers of each setting, and where a peer is ahead.

    Args:
        run: The run.
        door: Our door that ratios refer to; by default the first one with a time.
    """
    groups = cases_by_setting(run, door)
    if not groups:
        return []
    ours = " or ".join(dict.fromkeys(cases[0].ours.candidate for cases in groups))
    means, slower = [], []
    for cases in groups:
        setting = str(cases[0].setting)
        peers = dict.fromkeys(n for case in cases for n, r in case.others.items() if not r.ours)
        ratios = {"the best of each layer": [c.ratio(c.best_peer) for c in cases if c.best_peer]}
        for name in peers:
            ratios[name] = [case.ratio(name) for case in cases if name in case.others]
        for name, numbers in ratios.items():
            if numbers:
                means.append(
                    [
                        setting,
                        name,
                        _times(geometric_mean(numbers)),
                        _times(min(numbers)),
                        str(len(numbers)),
                        _own_door_cell(cases, name, _OWN_DOOR.get(name, "")),
                    ]
                )
        slower += [[setting, case.label, peer, _times(ratio)] for case, peer, ratio in below(cases)]
    header = ["setting", "peer", "geometric mean", "least", "layers", "over its own door"]
    tables = [Table(f"Time of each peer over that of {ours}", header, means)]
    if slower:
        header = ["setting", "layer", "peer", "ratio"]
        tables.append(Table(f"Layers in which a peer is faster than {ours}", header, slower))
    return tables


def _own_door_cell(cases: Sequence[Case], name: str, own: str) -> str:
    """The mean over the door of the same framework, which has the same cost for each call."""
    ratios = []
    for case in cases:
        timed = {case.ours.candidate: case.ours, **case.others}
        if name in timed and own in timed:
            ratios.append(timed[name].median_us / timed[own].median_us)
    return f"{_times(geometric_mean(ratios))} {own}" if ratios else ""


def memory_table(run: Run) -> Table | None:
    """Returns the most memory of a training step beyond its operands; `None` if nobody looked.

    Args:
        run: The run.
    """
    used: dict[tuple[str, str, int], dict[str, float]] = {}
    for result in run.results:
        if result.mode == MODES[-1] and not math.isnan(result.peak_megabytes):
            here = used.setdefault((result.label, result.dtype, result.batch), {})
            here[result.candidate] = result.peak_megabytes
    if not used:
        return None
    names = list(dict.fromkeys(name for here in used.values() for name in here))
    rows = [
        [
            label,
            dtype,
            str(batch),
            *(f"{here[name]:.1f}" if name in here else "-" for name in names),
        ]
        for (label, dtype, batch), here in used.items()
    ]
    title = "Memory of a training step beyond its operands, MB"
    return Table(title, ["layer", "dtype", "batch", *names], rows)


def note_table(run: Run) -> Table | None:
    """Returns who has no time, where, and why; `None` if everyone has all times.

    Args:
        run: The run.
    """
    layers: dict[tuple[str, str], dict[str, list[str]]] = {}
    for result in run.results:
        if result.note:
            settings = layers.setdefault((result.candidate, result.note), {})
            settings.setdefault(str(result.setting), []).append(result.label)
    rows = [
        [name, setting, f"{len(labels)} ({labels[0]}{', ...' if len(labels) > 1 else ''})", note]
        for (name, note), settings in layers.items()
        for setting, labels in settings.items()
    ]
    return Table("Not measured", ["candidate", "setting", "layers", "why"], rows) if rows else None


def fact_table(run: Run) -> Table:
    """Returns the hardware, the versions and the peaks that the limits refer to.

    Args:
        run: The run.
    """
    rows = [[name, value] for name, value in run.facts.items() if value]
    peaks = {
        (r.threads, r.device, r.dtype if r.device != "cpu" else ""): (
            r.fma_peak_gflops,
            r.memory_gigabytes_per_second,
        )
        for r in run.results
    }
    for (threads, device, dtype), (gflops, speed) in sorted(peaks.items()):
        who = "1 thread" if threads == 1 else f"{threads} threads"
        if device != "cpu":
            who = f"{device}, products of {dtype}"
        rows.append([f"peaks, {who}", f"{gflops:.1f} GFLOP/s, {speed:.1f} GB/s"])
    return Table("Measured on", ["fact", "value"], rows)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
