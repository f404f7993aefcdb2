"""Times the fused layer against what frameworks do, on layers of published networks.

    python benchmarks/run.py                     about a dozen layers, one thread, batch 1
    python benchmarks/run.py --quick             three layers, fewer rounds
    python benchmarks/run.py --layers "19x19" --threads 2 --batch 32 --buffers fresh

Forward pass, and training step: forward pass with all four gradients. Every result is compared
with JAX's own convolutions before anything is timed. Candidates take turns; medians and quartiles
go to a table and, with hardware and versions, to a CSV file.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPUs that everything may use")
    parser.add_argument(
        "--layers", help='only rows whose label holds this text, as "19x19 728>728"'
    )
    parser.add_argument("--only", action="append", help="only this candidate; may be repeated")
    parser.add_argument("--jobs", choices=("forward", "training", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--buffers",
        choices=("warm", "fresh"),
        default="warm",
        help="warm: one input; fresh: inputs take turns, twice the last-level cache in all",
    )
    parser.add_argument(
        "--oracle-python",
        default=os.environ.get("SEPCONV_ORACLE_PYTHON"),
        help="interpreter that has TensorFlow; left out if there is none",
    )
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/bench.csv"))
    parser.add_argument("--quick", action="store_true", help="three layers, three rounds")
    return parser.parse_args(arguments)


def limit_threads(threads: int) -> None:
    """Limits this process and its children, before any library has looked at the machine."""
    if hasattr(os, "sched_setaffinity"):
        usable = sorted(os.sched_getaffinity(0))
        if not 1 <= threads <= len(usable):
            sys.exit(
                f"error: `--threads` must be between 1 and {len(usable)}, the CPUs that this "
                f"process may use. Received: {threads}"
            )
        # XLA makes its pool as large as the affinity allows, and has no other switch.
        os.sched_setaffinity(0, usable[-threads:])
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


class Peaks(NamedTuple):
    """GFLOP/s: what the FMA units can do, and what a large matrix product reaches."""

    fma: float
    sgemm: float


def measure_peaks(threads: int) -> Peaks:
    import time

    import numpy as np

    from sepconv import _native

    size = 1024
    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    products: list[Callable[[], Any]] = [lambda: a @ a]
    try:
        import torch

        b = torch.from_numpy(a)
        products.append(lambda: b @ b)
    except ImportError:
        pass
    best = math.inf
    for product in products:
        for _ in range(6):
            start = time.perf_counter()
            product()
            best = min(best, time.perf_counter() - start)
    # It runs on one CPU.
    fma = max(_native.fma_peak_gflops("float32") for _ in range(3)) * threads
    return Peaks(fma, 2 * size**3 / best / 1e9)


def highest(one: Peaks, other: Peaks) -> Peaks:
    return Peaks(*map(max, one, other))


def installed(name: str) -> bool:
    import importlib.util

    return "torch" not in name or importlib.util.find_spec("torch") is not None


def measure_layer(problem: Any, makers: dict[str, Any], options: argparse.Namespace) -> list[dict]:
    """Checks and times all candidates on one layer."""
    import functools

    import candidates
    import jax
    import numpy as np
    from problems import worst_error

    from sepconv import machine, timing

    copies = 1
    if options.buffers == "fresh":
        pair = problem.x.nbytes + problem.dy.nbytes
        copies = max(2, math.ceil(2 * machine.last_level_cache_bytes() / pair))
    step = jax.jit(candidates.jax_step(functools.partial(candidates.lax_layer, problem)))
    reference, absolute = (
        [np.asarray(value) for value in step(p.dy, p.x, *p.weights)]
        for p in (problem, problem.absolute())
    )
    made = {name: maker(problem, copies) for name, maker in makers.items()}
    rows = []
    for job in candidates.JOBS if options.jobs == "both" else (options.jobs,):
        errors = {}
        for name, candidate in made.items():
            results = candidate.results[job]()
            errors[name] = worst_error(results, reference, absolute, problem.terms())
            if not errors[name] < 1:
                raise RuntimeError(
                    f"{name}, {job} of {problem.label}: the result differs from that of JAX's own "
                    f"convolutions by {errors[name]:.3g} times what rounding allows."
                )
        blocks = {name: candidate.blocks[job] for name, candidate in made.items()}
        for name, result in timing.interleaved(blocks, rounds=options.rounds).items():
            rows.append(
                {
                    "network": problem.network,
                    "layer": problem.layer,
                    "label": problem.label,
                    "job": job,
                    "candidate": name,
                    "median_us": result.median * 1e6,
                    "quartile1_us": result.low * 1e6,
                    "quartile3_us": result.high * 1e6,
                    "best_us": result.best * 1e6,
                    "samples": result.samples,
                    "gflops": problem.flops(job) / result.median / 1e9,
                    "error_of_allowed": errors[name],
                }
            )
    return rows


def add_ratios(rows: list[dict], peaks: Peaks, baseline: str) -> None:
    stock = {(r["label"], r["job"]): r["median_us"] for r in rows if r["candidate"] == baseline}
    for row in rows:
        reference = stock.get((row["label"], row["job"]))
        row["speedup_over_stock"] = reference / row["median_us"] if reference else ""
        row["percent_of_fma_peak"] = 100 * row["gflops"] / peaks.fma
        row["percent_of_sgemm"] = 100 * row["gflops"] / peaks.sgemm


def facts_of_run(threads: int, *packages: str) -> dict[str, Any]:
    import sepconv
    from sepconv import machine

    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "cpu": machine.cpu_name(),
        "target": sepconv.cpu_target(),
        "threads": threads,
        # Of the last minute: times taken beside other work say so.
        "load": f"{os.getloadavg()[0]:.1f}",
        **machine.versions(*packages),
    }


def write_csv(path: Path, rows: list[dict], facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        for row in rows:
            rounded = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**rounded, **facts})


def show(console: Any, rows: list[dict], peaks: Peaks, names: list[str], title: str) -> None:
    from rich.table import Table

    doors = [name for name in names if name.startswith("sepconv")]
    ours = "sepconv keras" if "sepconv keras" in doors else next(iter(doors), None)
    for job in dict.fromkeys(row["job"] for row in rows):
        table = Table(title=f"{job}: {title}", title_justify="left", title_style="bold")
        table.add_column("us", no_wrap=True)
        if ours:
            table.add_column("% of\npeak", justify="right", no_wrap=True)
        for name in names:
            table.add_column(name.replace(" ", "\n", 1), justify="right", no_wrap=True)
        ratios: dict[str, list[float]] = {name: [] for name in names}
        for label in dict.fromkeys(row["label"] for row in rows):
            here = {r["candidate"]: r for r in rows if r["label"] == label and r["job"] == job}
            cells = [label]
            if ours:
                cells.append(f"{here[ours]['percent_of_fma_peak']:.0f}")
            for name in names:
                row = here[name]
                spread = (row["quartile3_us"] - row["quartile1_us"]) / row["median_us"] / 2
                text = f"{row['median_us']:.0f} ±{100 * spread:.0f}%"
                if ours and name != ours:
                    ratio = row["median_us"] / here[ours]["median_us"]
                    ratios[name].append(ratio)
                    text += f" {ratio:.1f}x"
                cells.append(text)
            table.add_row(*cells)
        if ours:
            means = [
                f"{statistics.geometric_mean(ratios[name]):.2f}x" if ratios[name] else ""
                for name in names
            ]
            table.add_section()
            table.add_row("geometric mean", "", *means)
        console.print(table)
    console.print(
        f"FMA peak {peaks.fma:.0f} GFLOP/s, matrix product {peaks.sgemm:.0f} GFLOP/s, both the "
        f"best of this run. ±: half the distance of the quartiles. % of peak, ratios: of {ours}.",
        highlight=False,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.quick:
        options.rounds = min(options.rounds, 3)
    limit_threads(options.threads)

    import candidates
    import problems
    from rich.console import Console
    from rich.progress import track

    import sepconv
    from sepconv import machine

    sepconv.set_num_threads(options.threads)
    chosen = problems.chosen(options.batch, options.layers, options.quick)
    if not chosen:
        sys.exit(f"error: `--layers` fits no row. Received: {options.layers!r}")
    makers = {name: maker for name, maker in candidates.MAKERS.items() if installed(name)}
    if installed("torch"):
        import torch

        torch.set_num_threads(options.threads)
    tensorflow = None
    if options.oracle_python and Path(options.oracle_python).exists():
        tensorflow = candidates.TensorFlow(options.oracle_python, options.threads)
        makers["tensorflow"] = tensorflow
    if options.only:
        unknown = set(options.only) - set(makers)
        if unknown:
            sys.exit(f"error: `--only` must be one of {', '.join(makers)}. Received: {unknown}")
        makers = {name: maker for name, maker in makers.items() if name in options.only}

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    facts = {
        "batch": options.batch,
        "buffers": options.buffers,
        **facts_of_run(options.threads, "sepconv", "numpy", "jax", "jaxlib", "keras", "torch"),
    }
    if tensorflow:
        facts["tensorflow"] = tensorflow.version
    rows: list[dict] = []
    peaks = measure_peaks(options.threads)
    try:
        for problem in track(chosen, "measuring", console=console, transient=True):
            rows += measure_layer(problem, makers, options)
            # A virtual machine is not equally fast all the time: the peak is that of the whole run.
            peaks = highest(peaks, measure_peaks(options.threads))
    finally:
        if tensorflow:
            tensorflow.close()
    add_ratios(rows, peaks, candidates.BASELINE)
    facts |= {"fma_peak_gflops": f"{peaks.fma:.1f}", "sgemm_gflops": f"{peaks.sgemm:.1f}"}
    write_csv(options.csv, rows, facts)
    title = (
        f"batch {options.batch}, {options.threads} thread(s), {options.buffers} buffers, "
        f"{machine.cpu_name()}"
    )
    show(console, rows, peaks, list(makers), title)
    console.print(f"CSV: {options.csv}", soft_wrap=True)


if __name__ == "__main__":
    main()
