"""The command `sepconv`: each verb is a thin call into the library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import sepconv

try:
    import typer
    from rich.console import Console
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
    add_completion=False,
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


def main() -> None:
    """Runs the command with the arguments of the process."""
    app()


if __name__ == "__main__":
    main()
