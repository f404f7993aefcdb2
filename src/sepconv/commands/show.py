"""Tables for people, of what the library returns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from sepconv.doctor import Health
from sepconv.models.inspect import Contents

__all__ = ["contents_tables", "health_tables"]


def contents_tables(contents: Contents) -> list[Table]:
    """Layers and variables of a file."""
    tables = []
    if contents.layers:
        heads = ("layer", "class", "output", "MACs", "parameters", "bytes")
        layers = [
            (
                layer.name,
                layer.kind,
                _shape(layer.output_shape),
                _count(layer.macs),
                _count(layer.parameters),
                _count(layer.bytes),
            )
            for layer in contents.layers
        ]
        tables.append(_table("Layers", heads, layers, numbers=3))
    variables = [
        (each.name, each.role, each.dtype, _shape(each.shape), _count(each.bytes))
        for each in contents.variables
    ]
    titles = ("variable", "role", "dtype", "shape", "bytes")
    return [*tables, _table("Variables", titles, variables, numbers=1)]


def health_tables(health: Health) -> list[Table]:
    """The machine and the doors."""
    facts = [
        ("sepconv", health.version),
        ("CPU", health.cpu),
        ("native kernel", health.native_fault or "loaded"),
        ("instruction set", f"{health.target} of {', '.join(health.targets)}"),
        ("threads", f"{health.threads} of {health.usable_cpus} CPUs"),
        *health.packages.items(),
    ]
    backends = [(each.name, each.device, each.reason or "yes") for each in health.backends]
    doors = [(door.name, door.reason or "our kernel") for door in health.doors]
    return [
        _table("Machine", ("", ""), facts),
        _table("Kernels", ("backend", "device", "runs"), backends),
        _table("Doors", ("door", "runs"), doors),
    ]


def _table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0
) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=any(heads))
    for position, head in enumerate(heads):
        table.add_column(head, justify="right" if position >= len(heads) - numbers else "left")
    for row in rows:
        # Names come from files: no markup in them counts, and no control character reaches the
        # terminal.
        cells = ("".join(c if c.isprintable() else "?" for c in cell) for cell in row)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _shape(shape: Sequence[int | None] | None) -> str:
    return "" if shape is None else "x".join("?" if size is None else str(size) for size in shape)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
