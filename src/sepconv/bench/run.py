"""One measurement: rows, modes and settings times candidates, checked, then timed in turn."""

from __future__ import annotations

import datetime
import math
import os
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import sepconv
from sepconv import machine
from sepconv.bench.candidates import Candidate
from sepconv.bench.peaks import Peaks, measure_peaks
from sepconv.bench.problems import DTYPES, MODES, Problem, problem_of
from sepconv.bench.results import Result, Run
from sepconv.bench.rows import Row
from sepconv.bench.truth import Truth
from sepconv.bench.workers import RefusedError, WorkerError, Workers, pinned
from sepconv.plans import Work, backward_work, forward_work
from sepconv.timing import Block, interleaved

__all__ = ["BUFFERS", "Plan", "Step", "machine_load", "measure", "one_line"]

BUFFERS = ("warm", "fresh")
"""One input; or inputs that take turns, in all twice the last-level cache."""

_MOST_COPIES = 1024
# Of samples, whatever they take: a median and two quartiles of fewer say little.
_LEAST_ROUNDS = 3
# Of frameworks' errors, the traces are left out.
_NOTE_LENGTH = 240


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        rows: The layers.
        candidates: Who computes them.
        batches: Numbers of images.
        modes: Some of `MODES`.
        threads: Numbers of CPUs that everyone may use.
        dtypes: Of the arrays.
        data_format: Of the images, where a candidate has the choice.
        buffers: One of `BUFFERS`.
        rounds: How often everyone has a turn.
        turn_seconds: Who has used up so much time on a row has no further turns, after the third.
        tensorflow_python: The interpreter that has TensorFlow.
        patience_seconds: How long a process may take to answer.
    """

    rows: Sequence[Row]
    candidates: Sequence[Candidate]
    batches: Sequence[int] = (1,)
    modes: Sequence[str] = MODES
    threads: Sequence[int] = (1,)
    dtypes: Sequence[str] = ("float32",)
    data_format: str = "channels_last"
    buffers: str = BUFFERS[0]
    rounds: int = 10
    turn_seconds: float = 10.0
    tensorflow_python: str | None = None
    patience_seconds: float = 600.0

    def __post_init__(self) -> None:
        for argument, given, known in (
            ("buffers", (self.buffers,), BUFFERS),
            ("mode", self.modes, MODES),
            ("dtype", self.dtypes, tuple(DTYPES)),
        ):
            for word in given:
                if word not in known:
                    raise ValueError(
                        f"`{argument}` must be one of {', '.join(known)}. "
                        f"Received: {argument}={word!r}"
                    )
        for argument, numbers in (("rounds", (self.rounds,)), ("batch", self.batches)):
            for number in numbers:
                if number < 1:
                    raise ValueError(
                        f"`{argument}` must be positive. Received: {argument}={number}"
                    )
        usable = machine.usable_cpus()
        for number in self.threads:
            if not 1 <= number <= usable:
                raise ValueError(
                    f"`threads` must be between 1 and {usable}, the CPUs that this process may "
                    f"use. Received: threads={number}"
                )
        for row in self.rows:  # Before anything is started.
            row.spec(self.data_format)

    @property
    def steps(self) -> int:
        """How many cases there are."""
        return math.prod(map(len, (self.threads, self.dtypes, self.batches, self.rows, self.modes)))


def machine_load() -> str:
    """Returns how many processes wanted a CPU in the last minute; empty where nobody counts."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""


@dataclass
class Step:
    """How far a measurement is.

    Attributes:
        run: Everything so far, its limits by the highest peaks so far.
        done: How many cases.
        now: What comes next; empty at the end.
    """

    run: Run
    done: int
    now: str


@dataclass
class _Record:
    """What is known while a measurement goes on."""

    # With the work: the limits follow the peaks, which are the highest of the whole run.
    measured: list[tuple[Sequence[Work], Result]] = field(default_factory=list)
    peaks: dict[int, Peaks] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    # Of the minute before: times taken beside other work say so.
    load: str = field(default_factory=machine_load)
    done: int = 0

    def see_peaks(self, threads: int) -> None:
        now = measure_peaks(threads)
        self.peaks[threads] = now.or_higher(self.peaks.get(threads, now))

    def step(self, now: str) -> Step:
        facts = {
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
            "cpu": machine.cpu_name(),
            "target": sepconv.cpu_target(),
            "load_before": self.load,
            **machine.versions("sepconv", "numpy"),
        }
        facts |= {name: version for name, version in self.versions.items() if name not in facts}
        results = [
            _limited(result, works, self.peaks[result.threads]) for works, result in self.measured
        ]
        return Step(Run(results, facts), self.done, now)


def _limited(result: Result, works: Sequence[Work], peaks: Peaks) -> Result:
    """The result with the least time of phases that run one after the other."""
    gflops, gigabytes_per_second, pair_gflops = ceilings = peaks.of(result.dtype)
    arithmetic = sum(work.arithmetic(gflops, pair_gflops) for work in works)
    memory = sum(work.bytes for work in works) / gigabytes_per_second * 1e-9
    return replace(
        result,
        limit_us=sum(work.limit(*ceilings) for work in works) * 1e6,
        bound="arithmetic" if arithmetic >= memory else "memory",
        fma_peak_gflops=peaks.gflops,
        memory_gigabytes_per_second=peaks.gigabytes_per_second,
    )


def measure(plan: Plan) -> Iterator[Step]:
    """Measures, and yields before and after every case what there is so far.

    Everyone computes a case before it is timed. What lies beyond rounding is an error if it is ours
    and a note if it is a peer's, and so is a peer that cannot do the case.

    Args:
        plan: What to measure.

    Yields:
        At least one step; the last has the whole run.

    Raises:
        RuntimeError: a door of ours fails or is wrong.
    """
    record = _Record()
    for threads in plan.threads:
        with (
            pinned(threads),
            Workers(
                threads,
                tensorflow_python=plan.tensorflow_python,
                patience_seconds=plan.patience_seconds,
            ) as workers,
        ):
            record.see_peaks(threads)
            yield from _measure_with(plan, workers, threads, record)
    yield record.step("")


def _measure_with(plan: Plan, workers: Workers, threads: int, record: _Record) -> Iterator[Step]:
    absent: dict[str, str] = {}
    for candidate in plan.candidates:
        yield record.step(f"starting {candidate.name}")
        try:
            record.versions = {**workers.versions(candidate), **record.versions}
        except (RefusedError, WorkerError) as error:
            absent[candidate.name] = one_line(error)
    path = workers.folder / "problem.npz"
    for dtype in plan.dtypes:
        for batch in plan.batches:
            for row in plan.rows:
                problem = problem_of(row, batch, data_format=plan.data_format, dtype=dtype)
                problem.save(path)
                for mode in plan.modes:
                    yield record.step(f"{row.label}, batch {batch}, {dtype}, {mode}")
                    works = [forward_work(problem.geometry, dtype)]
                    if mode != MODES[0]:
                        works.append(backward_work(problem.geometry, dtype))
                    blank = _blank(plan, row, problem, mode, threads, works)
                    results = _measure_case(plan, workers, absent, blank, problem, path)
                    record.measured += [(works, result) for result in results]
                    workers.forget()
                    # A virtual machine is not equally fast all the time.
                    record.see_peaks(threads)
                    record.done += 1


def _blank(
    plan: Plan, row: Row, problem: Problem, mode: str, threads: int, works: Sequence[Work]
) -> Result:
    """What all results of a case have in common."""
    return Result(
        network=row.network,
        layer=row.layer,
        label=row.label,
        mode=mode,
        batch=problem.geometry.batch,
        dtype=problem.dtype,
        data_format=plan.data_format,
        threads=threads,
        buffers=plan.buffers,
        candidate="",
        ours=False,
        gflop=sum(work.flops for work in works) / 1e9,
        megabytes=sum(work.bytes for work in works) / 1e6,
    )


def _copies(plan: Plan, problem: Problem, mode: str) -> int:
    if plan.buffers == BUFFERS[0]:
        return 1
    elements = problem.x.size + (problem.dy.size if mode != MODES[0] else 0)
    needed = 2 * machine.last_level_cache_bytes() / (elements * DTYPES[problem.dtype])
    return max(2, min(math.ceil(needed), _MOST_COPIES))


class _Turns:
    """The block of a candidate that stops after enough time, and remembers a failure."""

    def __init__(self, block: Block, seconds: float) -> None:
        self._block = block
        self._left = seconds
        self._rounds = -1  # The first is not counted.
        self.failure = ""

    def __call__(self, calls: int) -> Sequence[float]:
        if self.failure:
            return (math.inf,)
        if self._left <= 0 and self._rounds >= _LEAST_ROUNDS:
            return ()
        start = time.perf_counter()
        try:
            return self._block(calls)
        except (RefusedError, WorkerError) as error:
            self.failure = one_line(error)
            return (math.inf,)
        finally:
            self._left -= time.perf_counter() - start
            self._rounds += 1


def _measure_case(
    plan: Plan,
    workers: Workers,
    absent: Mapping[str, str],
    blank: Result,
    problem: Problem,
    path: Path,
) -> list[Result]:
    copies = _copies(plan, problem, blank.mode)
    truth = Truth.of(problem, blank.mode)
    results: dict[str, Result] = {}
    turns: dict[str, _Turns] = {}
    for candidate in plan.candidates:
        error = math.nan
        try:
            if candidate.name in absent:
                raise RefusedError(absent[candidate.name], unable=True)
            if blank.mode not in candidate.modes:
                raise RefusedError(f"does not do {blank.mode}", unable=True)
            workers.prepare(candidate, path, blank.mode, copies)
            error = truth.worst_error(workers.results(candidate))
            if error >= 1:
                raise RefusedError(f"wrong by {error:.3g} times what rounding allows")
            turns[candidate.name] = _Turns(workers.block(candidate), plan.turn_seconds)
            note = ""
        except (RefusedError, WorkerError) as reason:
            note = one_line(reason)
            if candidate.ours and not getattr(reason, "unable", False):
                raise RuntimeError(
                    f"{candidate.name}, {blank.mode} of {blank.label}: {note}"
                ) from None
        results[candidate.name] = replace(
            blank,
            candidate=candidate.name,
            ours=candidate.ours,
            note=note,
            error_of_allowed=error,
        )
    for name, timing in interleaved(turns, rounds=plan.rounds).items():
        if failure := turns[name].failure:
            results[name] = replace(results[name], note=failure)
            continue
        results[name] = replace(
            results[name],
            median_us=timing.median * 1e6,
            quartile1_us=timing.low * 1e6,
            quartile3_us=timing.high * 1e6,
            best_us=timing.best * 1e6,
            samples=timing.samples,
        )
    return list(results.values())


def one_line(error: Exception) -> str:
    """Returns the message of an error, shortened to a note."""
    return textwrap.shorten(str(error), _NOTE_LENGTH, placeholder=" ...")
