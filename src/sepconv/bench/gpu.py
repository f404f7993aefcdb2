"""The benchmark on a GPU: which cases, in which order, and what comes of them.

A case has two times. "graph" is that of a CUDA graph with many calls, whose inputs and outputs take
turns so that none is in the cache: the kernels alone. "eager" is that of the same calls made one by
one from Python, as long as all that takes. What runs them is a `Device`, of which
`sepconv.bench.engines.cuda` has the real one.
"""

from __future__ import annotations

import datetime
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from sepconv import machine
from sepconv.bench.peaks import Peaks
from sepconv.bench.problems import DTYPES, MODES
from sepconv.bench.results import Result, Run
from sepconv.bench.rows import Row, choose_rows
from sepconv.bench.run import Step, one_line
from sepconv.bench.workers import RefusedError
from sepconv.plans import backward_work, forward_work
from sepconv.spec import Geometry
from sepconv.timing import Block, interleaved

__all__ = [
    "CANDIDATES",
    "TIMINGS",
    "Device",
    "GpuCase",
    "GpuPlan",
    "Ready",
    "gpu_cases",
    "measure_gpu",
]

TIMINGS = ("graph", "eager")
"""How a case is timed; the CSV has them as `buffers`."""

_LAST = ("sepconv.torch", "torch channels_last", "torch.compile")
_CONTIGUOUS = ("sepconv.torch contiguous", "torch")
CANDIDATES = (*_LAST, *_CONTIGUOUS, "torch.compile max-autotune")
"""Who can be measured, ours first: those that take channels_last tensors, then the others."""

_KERNELBENCH = "kernelbench_l1_86"
_KERNELBENCH_BATCH = 16


@dataclass(frozen=True)
class GpuCase:
    """One layer in one setting, and who computes it."""

    row: Row
    batch: int
    dtype: str
    mode: str
    candidates: tuple[str, ...]

    @property
    def geometry(self) -> Geometry:
        """The call in integers; its traffic does not depend on the layout."""
        row = self.row
        between = row.channels * row.depth_multiplier
        spec = row.spec("channels_last")
        return spec.resolve(
            (self.batch, row.height, row.width, row.channels),
            (*row.kernel, row.channels, row.depth_multiplier),
            (1, 1, between, row.filters),
            (row.filters,),
        )

    def __str__(self) -> str:
        """Returns it in words."""
        return f"{self.row.label}, batch {self.batch}, {self.dtype}, {self.mode}"


def gpu_cases(
    rows: Sequence[Row] = (),
    batches: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    modes: Sequence[str] = (),
    *,
    quick: bool = False,
    candidates: Sequence[str] = (),
) -> list[GpuCase]:
    """Returns the cases, the telling ones first: what is measured last may find no time left.

    Whatever is given is measured in all combinations. By themselves, the usual rows are measured in
    bfloat16 with 32, 256 and 1 images and in float32 with 32; contiguous tensors with 32 alone; and
    the layer of KernelBench (level 1, problem 86) in float32 with its 16 images.

    Args:
        rows: The layers.
        batches: Numbers of images.
        dtypes: Some of `DTYPES`.
        modes: Some of `MODES`.
        quick: Three rows, and the layer of KernelBench.
        candidates: Some of `CANDIDATES`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> for case in gpu_cases(quick=True)[:2]:
        ...     print(case)
        19x19 728>728, batch 32, bfloat16, inference
        56x56 128>128, batch 32, bfloat16, inference
    """
    for argument, given, known in (
        ("mode", modes, MODES),
        ("dtype", dtypes, tuple(DTYPES)),
        ("peer", candidates, CANDIDATES),
    ):
        for word in given:
            if word not in known:
                raise ValueError(
                    f"`{argument}` must be one of {', '.join(known)}. Received: {argument}={word!r}"
                )
    for batch in batches:
        if batch < 1:
            raise ValueError(f"`batch` must be positive. Received: batch={batch}")
    every = tuple(candidates)
    usual = list(rows) or choose_rows(quick=quick)
    if rows or batches or dtypes or modes:
        return [
            GpuCase(row, batch, dtype, mode, every or (*_LAST, *_CONTIGUOUS))
            for dtype, batch, mode, row in itertools.product(
                dtypes or ("bfloat16",), batches or (32,), modes or MODES, usual
            )
        ]
    kernelbench = choose_rows([_KERNELBENCH])[0]
    both, last = every or (*_LAST, *_CONTIGUOUS), every or _LAST
    plan = [("bfloat16", 32, mode, both) for mode in MODES]
    if not quick:
        plan += [("bfloat16", 256, mode, last) for mode in MODES]
        plan += [("bfloat16", 1, mode, last) for mode in MODES]
        plan += [("float32", 32, mode, both) for mode in MODES]
    found = [GpuCase(row, n, dtype, mode, who) for dtype, n, mode, who in plan for row in usual]
    special = [GpuCase(kernelbench, _KERNELBENCH_BATCH, "float32", mode, both) for mode in MODES]
    first = len(usual) * len(MODES)
    return [*found[:first], *(special[:1] if quick else special), *found[first:]]


@dataclass(frozen=True)
class GpuPlan:
    """What to measure.

    Attributes:
        cases: What `gpu_cases` returns.
        rounds: How often everyone has a turn.
        budget_seconds: No case begins after this time; those left out are noted.
    """

    cases: Sequence[GpuCase]
    rounds: int = 5
    budget_seconds: float = 420.0

    def __post_init__(self) -> None:
        for argument, number in (("rounds", self.rounds), ("budget_seconds", self.budget_seconds)):
            if number <= 0:
                raise ValueError(f"`{argument}` must be positive. Received: {argument}={number}")


class Ready(Protocol):
    """A candidate with its tensors on the device.

    Attributes:
        error_of_allowed: Largest error against float64, in units of what rounding allows.
        peak_megabytes: Most memory that a call had beyond its operands, in 10^6 bytes.
    """

    error_of_allowed: float
    peak_megabytes: float

    def graph(self, calls: int, /) -> Sequence[float]:
        """Times replays of the graph; each sample is in seconds a call."""

    def eager(self, calls: int, /) -> Sequence[float]:
        """Times calls from Python."""


class Device(Protocol):
    """What computes; `sepconv.bench.engines.cuda.Gpu`, or a stand-in of the tests."""

    @property
    def facts(self) -> Mapping[str, str]:
        """Its name, and versions."""

    def warm_up(self, cases: Sequence[GpuCase], seconds: float) -> None:
        """Compiles in parallel what the cases need, for so many seconds at most."""

    def peaks(self, dtype: str) -> Peaks:
        """Measured rate of matrix products, and speed of copies."""

    def begin(self, case: GpuCase) -> None:
        """Makes the arrays of a case, and its truth."""

    def prepare(self, case: GpuCase, candidate: str) -> Ready:
        """Makes a candidate ready; raises `RefusedError` if it cannot be."""

    def end(self) -> None:
        """Drops all that belongs to the case."""


def measure_gpu(plan: GpuPlan, device: Device) -> Iterator[Step]:
    """Measures, and yields before and after every case what there is so far.

    Args:
        plan: What to measure.
        device: What on.

    Yields:
        At least one step; the last has the whole run.

    Raises:
        RuntimeError: a door of ours fails or is wrong.
    """
    start = time.monotonic()
    facts = {"date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", "cpu": machine.cpu_name()}
    run = Run([], {**facts, **device.facts})
    results: list[Result] = []
    yield Step(run, 0, "compiling")
    # Half of the time: what is not compiled by then, its own case compiles.
    device.warm_up(plan.cases, plan.budget_seconds / 2)
    peaks = {dtype: device.peaks(dtype) for dtype in {case.dtype: None for case in plan.cases}}
    for done, case in enumerate(plan.cases):
        run = Run(list(results), run.facts)
        yield Step(run, done, str(case))
        if time.monotonic() - start > plan.budget_seconds:
            results += _noted(case, peaks[case.dtype], "no time was left")
            continue
        results += _measure_case(plan, case, device, peaks[case.dtype])
    yield Step(Run(results, run.facts), len(plan.cases), "")


def _measure_case(plan: GpuPlan, case: GpuCase, device: Device, peaks: Peaks) -> list[Result]:
    found: dict[str, Ready] = {}
    results = {r.candidate: r for r in _noted(case, peaks, "")[: len(case.candidates)]}
    device.begin(case)
    try:
        for name in case.candidates:
            try:
                ready = device.prepare(case, name)
                if not ready.error_of_allowed < 1:
                    raise RefusedError(
                        f"wrong by {ready.error_of_allowed:.3g} times what rounding allows"
                    )
                found[name] = ready
                results[name] = replace(
                    results[name],
                    error_of_allowed=ready.error_of_allowed,
                    peak_megabytes=ready.peak_megabytes,
                )
            except RefusedError as reason:
                if results[name].ours and not reason.unable:
                    raise RuntimeError(f"{name}, {case}: {one_line(reason)}") from None
                results[name] = replace(results[name], note=one_line(reason))
        finished = []
        for timing in TIMINGS:
            blocks: dict[str, Block] = {
                name: getattr(ready, timing) for name, ready in found.items()
            }
            times = interleaved(blocks, rounds=plan.rounds, block_seconds=0.01)
            for name, result in results.items():
                result = replace(result, buffers=timing)
                if name in times:
                    result = replace(
                        result,
                        median_us=times[name].median * 1e6,
                        quartile1_us=times[name].low * 1e6,
                        quartile3_us=times[name].high * 1e6,
                        best_us=times[name].best * 1e6,
                        samples=times[name].samples,
                    )
                finished.append(result)
        return finished
    finally:
        device.end()


def _noted(case: GpuCase, peaks: Peaks, note: str) -> list[Result]:
    """Results without a time."""
    works = [forward_work(case.geometry, case.dtype)]
    if case.mode != MODES[0]:
        works.append(backward_work(case.geometry, case.dtype))
    arithmetic = sum(work.flops for work in works) / peaks.gflops
    memory = sum(work.bytes for work in works) / peaks.gigabytes_per_second
    return [
        Result(
            network=case.row.network,
            layer=case.row.layer,
            label=case.row.label,
            mode=case.mode,
            batch=case.batch,
            dtype=case.dtype,
            data_format=case.row.spec("channels_last").data_format,
            threads=1,
            buffers=timing,
            device="cuda",
            candidate=name,
            ours=name.startswith("sepconv"),
            note=note,
            error_of_allowed=math.nan,
            gflop=sum(work.flops for work in works) / 1e9,
            megabytes=sum(work.bytes for work in works) / 1e6,
            limit_us=sum(work.limit(*peaks[:2]) for work in works) * 1e6,
            bound="arithmetic" if arithmetic >= memory else "memory",
            fma_peak_gflops=peaks.gflops,
            memory_gigabytes_per_second=peaks.gigabytes_per_second,
        )
        for timing in TIMINGS
        for name in case.candidates
    ]
