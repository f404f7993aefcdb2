"""What `sepconv bench` does with its options: measures, shows progress and tables, writes files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

import sepconv
from sepconv import backends
from sepconv.bench.gpu import GpuPlan, measure_gpu
from sepconv.bench.page import FORMATS, write_page
from sepconv.bench.results import Result, Run, write_csv
from sepconv.bench.rows import Row
from sepconv.bench.run import Plan, Step, machine_load, measure
from sepconv.bench.tables import (
    Table,
    case_tables,
    fact_table,
    memory_table,
    note_table,
    summary_tables,
)
from sepconv.bench.workers import pinned

__all__ = [
    "check_device",
    "explain_cases",
    "explain_rows",
    "measure_and_report",
    "merge",
    "report",
]

# Below it a machine counts as idle.
_QUIET_LOAD = 0.7
# Blanks between the columns of a table, and around it.
_GAP, _MARGIN = 3, 2


def explain_rows(plan: Plan, console: Console) -> None:
    """Prints how our kernels would run every row, and its limit; measures no time.

    Args:
        plan: Its rows, batches, dtypes, threads and layout count.
        console: Where to.
    """
    for threads in plan.threads:
        with pinned(threads):
            before = sepconv.get_num_threads()
            sepconv.set_num_threads(threads)
            try:
                for row in plan.rows:
                    for batch in plan.batches:
                        for dtype in plan.dtypes:
                            text = str(_explanation(row, batch, dtype, plan.data_format))
                            console.print(text, "", sep="\n", highlight=False, markup=False)
            finally:
                sepconv.set_num_threads(before)


def check_device(device: str) -> None:
    """Raises `ValueError` unless rows can be measured on this kind of device.

    Args:
        device: `"cpu"` or `"cuda"`.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be cpu or cuda. Received: device={device!r}")


def explain_cases(plan: GpuPlan, console: Console) -> None:
    """Prints which GPU kernels would run every case; needs no GPU.

    Args:
        plan: Its cases count.
        console: Where to.
    """
    backends.use_gpu_kernels(True)  # Or there would be nothing to explain.
    seen = dict.fromkeys((case.row, case.batch, case.dtype) for case in plan.cases)
    for row, batch, dtype in seen:
        text = str(_explanation(row, batch, dtype, "channels_last", "cuda"))
        console.print(text, "", sep="\n", highlight=False, markup=False)


def _explanation(row: Row, batch: int, dtype: str, data_format: str, device: str = "cpu") -> Any:
    spec = row.spec(data_format)
    shape = [batch, row.height, row.width]
    shape.insert(spec.channels_axis, row.channels)
    return sepconv.explain(
        spec,
        shape,
        row.kernel,
        row.filters,
        dtype,
        depth_multiplier=row.depth_multiplier,
        device=device,
    )


def measure_and_report(
    plan: Plan | GpuPlan, console: Console, csv: Path, page: Path | None, *, door: str | None = None
) -> Run:
    """Measures a plan, shows its tables, and writes its files.

    The CSV is written anew after every case, so that an interrupted run keeps what it has.

    Args:
        plan: What to measure.
        console: Where progress and tables go.
        csv: Where the results go.
        page: Where the page goes; `None` for none.
        door: Our door that ratios refer to; by default the first one with a time.

    Raises:
        RuntimeError: a door of ours fails or is wrong.
        ValueError: the ending of `page` is none of `FORMATS`, or there is no GPU for a `GpuPlan`.
    """
    _check_page(page)
    steps = _steps(plan)  # Whether there is a GPU shows before anything is measured.
    count = plan.steps if isinstance(plan, Plan) else len(plan.cases)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    load = machine_load()
    if load and float(load) > _QUIET_LOAD:
        console.print(
            f"Others use this machine (load {load}): expect noise, and far too long times of those "
            "whose threads wait for each other.",
            style="yellow",
        )
    run = Run([], {})
    written = 0
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=count)
        for step in steps:
            progress.update(task, completed=step.done, description=step.now or "done")
            run = step.run
            if step.done > written or not step.now:
                write_csv(csv, run)
                written = step.done
    report([run], console, page, door=door)
    console.print(f"CSV: {csv}", soft_wrap=True, highlight=False)
    return run


def _steps(plan: Plan | GpuPlan) -> Iterator[Step]:
    if isinstance(plan, Plan):
        return measure(plan)
    try:
        from sepconv.bench.engines.cuda import Gpu
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"The benchmark of a GPU needs the package {error.name}. Run: "
            "pip install 'sepconv[gpu,cli]'"
        ) from None
    return measure_gpu(plan, Gpu())


def report(
    runs: Sequence[Run],
    console: Console,
    page: Path | None,
    *,
    door: str | None = None,
    command: str = "",
) -> None:
    """Shows the tables of runs, and writes their page.

    Args:
        runs: Of one machine, at least one.
        console: Where the tables go.
        page: Where the page goes; `None` for none.
        door: Our door that ratios refer to; by default the first one with a time.
        command: How the page was made, to be told on it.

    Raises:
        ValueError: the runs are of several machines, or `page` has another ending than `FORMATS`.
    """
    _check_page(page)
    run = merge(runs)
    for table in case_tables(run, door):
        for part in _parts(table, console.width):
            console.print(_rich(part, numbers=True))
    for table in summary_tables(run, door):
        console.print(_rich(table, numbers=True))
    if (memory := memory_table(run)) is not None:
        console.print(_rich(memory, numbers=True))
    for words in (note_table(run), fact_table(run)):
        if words is not None:
            console.print(_rich(words, numbers=False))
    if page is not None:
        write_page(page, run, door, command=command)
        console.print(f"Report: {page}", soft_wrap=True, highlight=False)


def merge(runs: Sequence[Run]) -> Run:
    """Returns the results of several runs as one; of a case in several runs, the last counts.

    Args:
        runs: At least one, all with the same processor and versions.

    Raises:
        ValueError: they differ in what they were measured on.

    Example:
        >>> merge([Run([], {"cpu": "a"}), Run([], {"cpu": "a"})]).facts
        {'cpu': 'a'}
    """
    facts: dict[str, str] = {}
    results: dict[tuple[object, ...], Result] = {}
    for run in runs:
        for name, value in run.facts.items():
            # These two are of the hour, not of the machine.
            if name not in ("date", "load_before") and facts.get(name, value) != value:
                raise ValueError(
                    "`report-from` must be runs of one machine with the same versions. "
                    f"Received: {name}={facts[name]!r} and {value!r}"
                )
        facts = {**facts, **run.facts}
        for result in run.results:
            case = (result.setting, result.label, result.candidate)
            results[case] = result
    return Run(list(results.values()), facts)


def _check_page(page: Path | None) -> None:
    # Before anything is measured.
    if page is not None and page.suffix not in FORMATS:
        raise ValueError(f"`page` must end in {' or '.join(FORMATS)}. Received: page={str(page)!r}")


def _parts(table: Table, width: int) -> list[Table]:
    """Cuts a table so that each part fits into so many characters; each names the layers."""

    def room(index: int) -> int:
        lines = [*_heading(table, index).split("\n"), *(row[index] for row in table.rows)]
        return max(map(len, lines)) + _GAP

    kept = [[0]]
    for index in range(1, len(table.header)):
        if len(kept[-1]) > 1 and sum(map(room, [*kept[-1], index])) > width - _MARGIN:
            kept.append([0])
        kept[-1].append(index)
    return [
        replace(
            table,
            header=[table.header[index] for index in columns],
            rows=[[row[index] for index in columns] for row in table.rows],
        )
        for columns in kept
    ]


def _heading(table: Table, index: int) -> str:
    """Names of candidates take two or three lines."""
    name = table.header[index]
    return name.replace(" ", "\n") if table.last_is_total else name


def _rich(table: Table, *, numbers: bool) -> RichTable:
    made = RichTable(
        title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for index in range(len(table.header)):
        right = numbers and index > 0
        made.add_column(
            _heading(table, index),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=table.last_is_total,
        )
    for row in table.rows:
        if table.last_is_total and row is table.rows[-1]:
            made.add_section()
        made.add_row(*row)
    return made
