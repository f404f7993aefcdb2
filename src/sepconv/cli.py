"""The command `sepconv`: each verb is a thin call into the library."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import sepconv
from sepconv.progress import listening

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as _error:
    # The library does without them; whoever calls the command wants to know how to get them.
    raise SystemExit(
        f"error: The command needs the package {_error.name}. Run: pip install 'sepconv[cli]'"
    ) from None

__all__ = ["app", "main"]

app = typer.Typer(
    name="sepconv",
    help="Depthwise-separable 2-D convolution as one operation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sepconv {sepconv.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    context.obj = debug


@contextmanager
def _plain_errors(context: typer.Context) -> Iterator[None]:
    """Ends the command with one line in place of a trace, unless a trace was asked for."""
    try:
        yield
    except Exception as error:
        if context.obj:
            raise
        message = str(error) or type(error).__name__
        typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None


_Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@contextmanager
def _working(what: str, *, quiet: bool) -> Iterator[None]:
    """Shows on a terminal how far the work is; standard output is for the answer."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
    )
    is_silent = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=is_silent) as progress:
        # Until somebody says of how many, the bar moves, and the clock counts.
        task = progress.add_task(escape(what), total=None, count="")

        def show(kind: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, count=f"{done} of {total} {kind}")

        with listening(show):
            yield


def _answer(facts: Any, shown: str | Iterable[Any], as_json: bool) -> None:
    if as_json:
        print(facts if isinstance(facts, str) else dumps(facts, indent=2))
    elif isinstance(shown, str):
        print(shown)
    else:
        console = Console()
        # A file of names is not cut at the width of a terminal that is not there.
        console = console if console.is_terminal else Console(width=200)
        for table in shown:
            console.print(table)


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("reports/demo"),
) -> None:
    """Compare stock and sepconv layers on a published network and in training; write a report."""
    with _plain_errors(context):
        # Read when Keras and JAX are imported, so they come first. The kernel under show is the
        # CPU's.
        os.environ["KERAS_BACKEND"] = "jax"
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from sepconv.demo.data import check_installed

        check_installed()
        from sepconv.demo.run import run

        run(out, Console())


@app.command()
def bench(
    context: typer.Context,
    network: Annotated[
        list[str] | None,
        typer.Option(help="All layers of this network; 'all' for every network. Repeatable."),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            help="A layer in the free form 147x147x64-128k3s1d1 (m: depth multiplier, v at the "
            "end: valid padding), or text in the sizes or the name of published ones. Repeatable."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three layers, three rounds.")] = False,
    mode: Annotated[
        list[str] | None, typer.Option(help="inference or training; both if left out.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images; 1 if left out.")] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="CPUs that everyone may use; 1 if left out.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32 or bfloat16; float32 if left out.")
    ] = None,
    data_format: Annotated[
        str, typer.Option(help="channels_last or channels_first, where there is a choice.")
    ] = "channels_last",
    buffers: Annotated[
        str,
        typer.Option(help="warm: one input; fresh: inputs in turn, twice the last-level cache."),
    ] = "warm",
    door: Annotated[
        list[str] | None,
        typer.Option(help="Our doors; ratios refer to the first. All if left out."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Who else: a name, 'keras', 'all' or 'none'; the usual if left out."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often everyone has a turn.")] = 10,
    turn_seconds: Annotated[
        float, typer.Option(help="No further turns, after three, once so much time is used up.")
    ] = 10.0,
    tensorflow_python: Annotated[
        str | None,
        typer.Option(
            envvar="SEPCONV_ORACLE_PYTHON", help="Interpreter that has TensorFlow; else this one."
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the plan and the limit of each row and stop.")
    ] = False,
    report_from: Annotated[
        list[Path] | None,
        typer.Option(help="Measure nothing: tables and page of this CSV. Repeatable."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, or cuda for torch on a GPU: its rows by default in bfloat16 with 32, 256 "
            "and 1 images, and in float32 with 32."
        ),
    ] = "cpu",
    budget_seconds: Annotated[
        float, typer.Option(help="On a GPU, no case begins after this time.")
    ] = 420.0,
    csv: Annotated[Path, typer.Option(help="Where the results go.")] = Path(
        "reports/bench/bench.csv"
    ),
    page: Annotated[
        Path, typer.Option(help="Where the page with the plots goes: .html or .md.")
    ] = Path("reports/bench/index.html"),
) -> None:
    """Time every door against every peer on layers of published networks; write a report."""
    with _plain_errors(context):
        from sepconv.bench.candidates import DOORS, USUAL_PEERS, choose

        try:
            from sepconv.bench.command import (
                check_device,
                explain_cases,
                explain_rows,
                measure_and_report,
                report,
            )
        except ModuleNotFoundError as error:
            raise RuntimeError(
                f"The benchmark needs the package {error.name}. Run: pip install 'sepconv[bench]'"
            ) from None
        from sepconv.bench.gpu import GpuPlan, gpu_cases
        from sepconv.bench.problems import MODES
        from sepconv.bench.results import read_csv
        from sepconv.bench.rows import choose_rows
        from sepconv.bench.run import Plan

        console = Console()
        if not console.is_terminal:
            console = Console(width=200)
        if report_from:
            runs = [read_csv(path) for path in report_from]
            sources = "".join(f" --report-from {path}" for path in report_from)
            command = f"sepconv bench{sources} --page {page}"
            report(runs, console, page, door=door[0] if door else None, command=command)
            return
        check_device(device)
        if device != "cpu":
            cases = gpu_cases(
                choose_rows(network or (), row or (), quick=quick) if network or row else (),
                batch or (),
                dtype or (),
                mode or (),
                quick=quick,
                candidates=[*(door or ()), *(peer or ())],
            )
            gpu_plan = GpuPlan(
                cases,
                rounds=min(rounds, 3 if quick else 5),
                budget_seconds=min(budget_seconds, 90.0) if quick else budget_seconds,
            )
            if explain:
                explain_cases(gpu_plan, console)
            else:
                measure_and_report(gpu_plan, console, csv, page, door=door[0] if door else None)
            return
        peers = () if peer == ["none"] else peer or USUAL_PEERS
        plan = Plan(
            rows=choose_rows(network or (), row or (), quick=quick),
            candidates=choose(door or DOORS, peers),
            batches=batch or (1,),
            modes=mode or MODES,
            threads=threads or (1,),
            dtypes=dtype or ("float32",),
            data_format=data_format,
            buffers=buffers,
            rounds=min(rounds, 3) if quick else rounds,
            turn_seconds=turn_seconds,
            tensorflow_python=tensorflow_python,
        )
        if explain:
            explain_rows(plan, console)
        else:
            measure_and_report(plan, console, csv, page, door=door[0] if door else None)


@app.command()
def convert(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="A model, weights, or a checkpoint.")],
    target: Annotated[
        Path,
        typer.Argument(help="Ends in .keras, .weights.h5, .onnx, .safetensors, .pt or .pth."),
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="File of a model that takes the tensors of SOURCE, by their names."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="keras or torch: names and axes of separable convolutions."),
    ] = None,
    moving_averages: Annotated[
        bool, typer.Option("--moving-averages", help="Take these in place of the weights.")
    ] = False,
    optimizer_slots: Annotated[
        bool, typer.Option("--optimizer-slots", help="Keep the state of training as well.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that exists.")
    ] = False,
    json: _Json = False,
) -> None:
    """Write a model or weights in another format."""
    with _plain_errors(context), _working(f"{source.name} to {target.name}", quiet=json):
        from sepconv.models.convert import convert as run

        names = run(
            source,
            target,
            model=model,
            layout=layout,
            moving_averages=moving_averages,
            optimizer_slots=optimizer_slots,
            overwrite=overwrite,
        )
    _answer({"target": str(target), "tensors": names}, f"{target}: {len(names)} tensors", json)


@app.command()
def inspect(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A model, weights, or a checkpoint.")],
    json: _Json = False,
) -> None:
    """Show the layers and variables of a file."""
    with _plain_errors(context):
        from sepconv.commands.show import contents_tables
        from sepconv.models.inspect import inspect as run

        with _working(file.name, quiet=json):
            contents = run(file)
        _answer(contents.facts(), contents_tables(contents), json)


@app.command()
def fuse(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="A model of Keras.")],
    target: Annotated[Path, typer.Argument(help="A .keras file.")],
    inference: Annotated[
        bool, typer.Option("--inference", help="Fold batch norms and activations.")
    ] = False,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Name of a layer that stays. Repeatable.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative difference of the outputs.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that exists.")
    ] = False,
    json: _Json = False,
) -> None:
    """Put fused layers into a model of Keras; report what was swapped and what was not."""
    with _plain_errors(context):
        from sepconv.models.convert import fuse_file

        with _working(f"{source.name} to {target.name}", quiet=json):
            report = fuse_file(
                source,
                target,
                inference=inference,
                exclude=exclude or (),
                tolerance=tolerance,
                overwrite=overwrite,
            )
        _answer(report.to_json(), [report.table()], json)


@app.command()
def doctor(context: typer.Context, json: _Json = False) -> None:
    """Tell what runs on this machine, and why something does not."""
    with _plain_errors(context):
        from sepconv.commands.show import health_tables
        from sepconv.doctor import examine

        with _working("doctor", quiet=json):
            health = examine()
        _answer(health.facts(), health_tables(health), json)
    if health.native_fault is not None:
        raise typer.Exit(1)


def main() -> None:
    """Runs the command with the arguments of the process."""
    # Also for the name of the variable that completion looks at, however it was called.
    app(prog_name="sepconv")


if __name__ == "__main__":
    main()
