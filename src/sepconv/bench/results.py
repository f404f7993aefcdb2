"""What a run measured: its rows, their ratios, and their file."""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from sepconv.spec import ConvSpec

__all__ = [
    "Case",
    "Result",
    "Run",
    "Setting",
    "below",
    "cases_of",
    "geometric_mean",
    "read_csv",
    "write_csv",
]


class Setting(NamedTuple):
    """What tables are about: everything but the layer and who computes it."""

    mode: str
    batch: int
    dtype: str
    data_format: str
    threads: int
    buffers: str
    device: str

    def __str__(self) -> str:
        """Returns it in words; what is usual is left out."""
        cpus = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        if self.device != "cpu":
            how = "graph replayed" if self.buffers == "graph" else "called from Python"
            return f"{self.mode}, batch {self.batch}, {self.dtype}, {self.device}, {how}"
        parts = [self.mode, f"batch {self.batch}", cpus, self.dtype]
        parts += [self.data_format] * (ConvSpec(data_format=self.data_format).channels_axis == 1)
        parts += [f"{self.buffers} buffers"] * (self.buffers != "warm")
        return ", ".join(parts)


@dataclass(frozen=True)
class Result:
    """One candidate on one row.

    Attributes:
        network: Of the row.
        layer: Of the row.
        label: Sizes of the row.
        mode: `"inference"` or `"training"`.
        batch: Number of images.
        dtype: Of the arrays.
        data_format: Of the images.
        threads: CPUs that everyone may use.
        buffers: `"warm"` (one input) or `"fresh"` (inputs that take turns); on a GPU, where inputs
            always take turns, `"graph"` or `"eager"`.
        candidate: Who.
        ours: Whether it is a door of this library.
        note: Why there is no time; empty if there is one.
        median_us: Microseconds; NaN without a time, as are the three that follow.
        quartile1_us: First quartile.
        quartile3_us: Third quartile.
        best_us: Shortest sample.
        samples: How many.
        error_of_allowed: Largest error in units of what rounding allows.
        gflop: Arithmetic of the mode, 1e9.
        megabytes: What the mode must read and write, 1e6.
        limit_us: Least time that the machine allows.
        bound: What takes that time: `"arithmetic"` or `"memory"`.
        fma_peak_gflops: Highest peak of the FMA units that the run saw with these threads.
        memory_gigabytes_per_second: Highest speed of memory that the run saw with these threads.
        device: `"cpu"` or `"cuda"`, where the peak is that of matrix products in the dtype.
        peak_megabytes: Most memory of a call beyond its operands, 1e6; NaN where nobody looked.
    """

    network: str
    layer: str
    label: str
    mode: str
    batch: int
    dtype: str
    data_format: str
    threads: int
    buffers: str
    candidate: str
    ours: bool
    note: str = ""
    median_us: float = math.nan
    quartile1_us: float = math.nan
    quartile3_us: float = math.nan
    best_us: float = math.nan
    samples: int = 0
    error_of_allowed: float = math.nan
    gflop: float = math.nan
    megabytes: float = math.nan
    limit_us: float = math.nan
    bound: str = ""
    fma_peak_gflops: float = math.nan
    memory_gigabytes_per_second: float = math.nan
    device: str = "cpu"
    peak_megabytes: float = math.nan

    @property
    def setting(self) -> Setting:
        """The table that it belongs to."""
        return Setting(*(getattr(self, name) for name in Setting._fields))

    @property
    def is_timed(self) -> bool:
        """Whether there is a time; if not, the note tells why."""
        return self.samples > 0

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.quartile3_us - self.quartile1_us) / self.median_us / 2

    @property
    def percent_of_limit(self) -> float:
        """100 where the least possible time is met; warm buffers in the cache can beat it."""
        return 100 * self.limit_us / self.median_us


@dataclass(frozen=True)
class Run:
    """Results that belong together.

    Attributes:
        results: The rows.
        facts: Date, hardware, versions; the same for all rows.
    """

    results: Sequence[Result]
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """One layer in one setting.

    Attributes:
        label: Sizes of the layer.
        setting: All else.
        ours: Our door that the ratios refer to.
        others: Everyone else with a time, in the order of the run; other doors of ours too.
        notes: Candidate -> why it has no time.
    """

    label: str
    setting: Setting
    ours: Result
    others: Mapping[str, Result]
    notes: Mapping[str, str]

    def ratio(self, name: str) -> float:
        """Returns the time of a candidate over that of our door: above 1, ours is faster."""
        return self.others[name].median_us / self.ours.median_us

    @property
    def best_peer(self) -> str | None:
        """The fastest that is not ours; `None` if no peer has a time."""
        peers = [name for name, result in self.others.items() if not result.ours]
        return min(peers, key=self.ratio, default=None)


def cases_of(results: Iterable[Result], door: str | None = None) -> list[Case]:
    """Returns the layers that our door has a time for.

    Args:
        results: Of one or more runs.
        door: Our door that ratios refer to; by default the first one with a time.
    """
    together: dict[tuple[Setting, str], list[Result]] = {}
    for result in results:
        together.setdefault((result.setting, result.label), []).append(result)
    cases = []
    for (setting, label), here in together.items():
        timed = {result.candidate: result for result in here if result.is_timed}
        first = door or next((name for name, result in timed.items() if result.ours), "")
        ours = timed.pop(first, None)
        notes = {result.candidate: result.note for result in here if result.note}
        if ours is not None:
            cases.append(Case(label, setting, ours, timed, notes))
    return cases


def geometric_mean(ratios: Iterable[float]) -> float | None:
    """Returns the geometric mean, or `None` of nothing.

    Args:
        ratios: Positive numbers.

    Example:
        >>> geometric_mean([2.0, 8.0])
        4.0
    """
    numbers = list(ratios)
    return round(statistics.geometric_mean(numbers), 12) if numbers else None


def below(cases: Iterable[Case], least: float = 1.0) -> list[tuple[Case, str, float]]:
    """Returns the cases in which the best peer is ahead, as (case, peer, ratio), worst first.

    Args:
        cases: What `cases_of` returns.
        least: The ratio that a case must reach not to be listed.
    """
    found = []
    for case in cases:
        peer = case.best_peer
        if peer is not None and case.ratio(peer) < least:
            found.append((case, peer, case.ratio(peer)))
    return sorted(found, key=lambda entry: entry[2])


_DERIVED = ("ratio_to_ours", "percent_of_limit", "gflops")


def write_csv(path: Path, run: Run) -> None:
    """Writes a run, all or nothing: a line for each result, each with the facts of the run.

    Beside the fields of `Result`, a line has its time over that of our first door, its share of the
    limit, and GFLOP/s.

    Args:
        path: The file; folders are made.
        run: At least one result.
    """
    ratios: dict[Result, float] = {}
    for case in cases_of(run.results):
        ratios[case.ours] = 1.0
        ratios.update({result: case.ratio(name) for name, result in case.others.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(Result)]
    # Renamed when it is complete: whoever reads meanwhile, or after an interruption, sees all of
    # the run as it was after a case.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*names, *_DERIVED, *run.facts])
            writer.writeheader()
            for result in run.results:
                line: dict[str, Any] = asdict(result)
                if result.is_timed:
                    line["ratio_to_ours"] = ratios.get(result, math.nan)
                    line["percent_of_limit"] = result.percent_of_limit
                    line["gflops"] = result.gflop / result.median_us * 1e6
                writer.writerow({**{k: _text(v) for k, v in line.items()}, **run.facts})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def read_csv(path: Path) -> Run:
    """Reads what `write_csv` wrote.

    Args:
        path: The file.

    Raises:
        ValueError: it is not such a file.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    kinds = {field.name: str(field.type) for field in fields(Result)}
    refusal = f"`path` must be a CSV of `sepconv bench`. Received: path={str(path)!r}"
    # What is not measured everywhere, an older file may lack.
    needed = set(kinds) - {"device", "peak_megabytes"}
    if not lines or not needed <= set(lines[0]):
        raise ValueError(refusal)

    def parsed(kind: str, text: str) -> Any:
        if kind == "bool":
            return text == str(True)
        if kind == "float":
            return float(text) if text else math.nan
        return int(text) if kind == "int" else text

    try:
        results = [
            Result(
                **{name: parsed(kind, line[name]) for name, kind in kinds.items() if name in line}
            )
            for line in lines
        ]
    except (TypeError, ValueError):
        raise ValueError(refusal) from None
    facts = {k: v for k, v in lines[0].items() if k not in kinds and k not in _DERIVED}
    return Run(results, facts)
