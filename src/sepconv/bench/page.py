"""The report: one page with the tables and plots of a run, as HTML or Markdown."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from sepconv.bench.candidates import CANDIDATES
from sepconv.bench.pictures import draw_ratios, draw_roofline, svg_of
from sepconv.bench.results import Run
from sepconv.bench.tables import (
    Table,
    case_tables,
    cases_by_setting,
    fact_table,
    memory_table,
    note_table,
    summary_tables,
)

__all__ = ["FORMATS", "write_page"]

FORMATS = (".html", ".md")
"""What a page can be: HTML that stands alone, or Markdown with its plots in a folder beside it."""

_TITLE, _GPU_TITLE = "Benchmarks", "Benchmarks on a GPU"
_INTRODUCTION = (
    "Everyone computes the same layer with the same arrays: a depthwise convolution, a pointwise "
    "one, and a bias. Inference is the forward pass; a training step adds the gradients of the "
    "input, of both kernels and of the bias. Every engine runs in a process of its own on as many "
    "CPUs as the table says, and its result is compared with ours in float64 before it is timed. "
    "All take turns, round after round.",
    "Times are medians in microseconds, ± half the distance of the quartiles. A ratio is the time "
    "of the other over ours: above 1, ours is faster. The limit of a layer is the larger of its "
    "arithmetic at the measured peak of the FMA units (products of bfloat16: of the instruction "
    "for pairs of them) and of the bytes that it must read and write at the measured speed of "
    "memory; for training that of both passes. Data that stay in the caches can beat the limit of "
    "memory.",
)
_GPU_INTRODUCTION = (
    "Everyone computes the same layer with the same arrays: a depthwise convolution, a pointwise "
    "one, and a bias. Inference is the forward pass; a training step adds the gradients of the "
    "input, of both kernels and of the bias. Every result is compared with the formula in float64 "
    "before it is timed. All take turns, round after round.",
    "Graph replayed: a CUDA graph of many calls whose inputs and outputs take turns, in all more "
    "than twice the L2 cache where 64 calls reach that; the time of the kernels alone. Called from "
    "Python: the same calls one by one, until the last is done; for small layers, the time of "
    "Python. Times are medians in microseconds, ± half the distance of the quartiles. A ratio is "
    "the time of the other over ours: above 1, ours is faster. The limit of a layer is the larger "
    "of its arithmetic at the measured rate of matrix products in its dtype and of the bytes that "
    "it must read and write at the measured speed of a copy; for training that of both passes.",
)
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em}"
    "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}"
    "th,td{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}tr.total{font-weight:bold}"
    "table.words th,table.words td{text-align:left}img{max-width:100%}"
)


def write_page(path: Path, run: Run, door: str | None = None, *, command: str = "") -> None:
    """Writes the page of a run.

    Args:
        path: Ends in one of `FORMATS`; folders are made. The plots of a Markdown page go to a
            folder beside it that has its name.
        run: The run.
        door: Our door that ratios refer to; by default the first one with a time.
        command: How to make the page, to be told on it.

    Raises:
        ValueError: the ending is none of `FORMATS`, or no door of ours has a time.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"`page` must end in {' or '.join(FORMATS)}. Received: page={str(path)!r}")
    groups = cases_by_setting(run, door)
    if not groups:
        raise ValueError("`run` must have times of a door of this library. Received: none")
    plots = {}
    for index, cases in enumerate(groups, 1):
        plots[f"ratios-{index}"] = (f"Ratios, {cases[0].setting}", svg_of(draw_ratios(cases)))
        plots[f"roofline-{index}"] = (f"Roofline, {cases[0].setting}", svg_of(draw_roofline(cases)))
    notes = note_table(run)
    measured = {result.candidate for result in run.results}
    who = [[c.name, c.settings] for c in CANDIDATES if c.name in measured]
    # Tables of words, not numbers.
    words = [Table("Who is measured, and how", ["candidate", "settings"], who), fact_table(run)]
    words = [*([notes] if notes else []), *words]
    memory = memory_table(run)
    numbers = [*summary_tables(run, door), *case_tables(run, door), *([memory] if memory else [])]
    on_gpu = any(result.device != "cpu" for result in run.results)
    title = _GPU_TITLE if on_gpu else _TITLE
    introduction = _GPU_INTRODUCTION if on_gpu else _INTRODUCTION
    made_by = f"Made by `{command}`." if command else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == FORMATS[0]:
        text = _html(title, introduction, numbers, words, plots, made_by)
    else:
        folder = path.with_suffix("")
        folder.mkdir(exist_ok=True)
        for name, (_, svg) in plots.items():
            (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
        text = _markdown(title, introduction, numbers, words, plots, made_by, folder.name)
    path.write_text(text, encoding="utf-8")


def _markdown(
    title: str,
    introduction: Sequence[str],
    numbers: Sequence[Table],
    words: Sequence[Table],
    plots: dict[str, tuple[str, str]],
    made_by: str,
    folder: str,
) -> str:
    lines = [f"# {title}", *introduction, *([made_by] if made_by else [])]
    for tables, right in ((numbers, "--:"), (words, "---")):
        for table in tables:
            rule = ["---"] + [right] * (len(table.header) - 1)
            rows = [_emphasised(table, row) for row in table.rows]
            body = [table.header, rule, *rows]
            lines += [f"## {table.title}", "\n".join(f"| {' | '.join(row)} |" for row in body)]
        if tables is numbers:
            lines += ["## Plots", *(f"![{t}]({folder}/{n}.svg)" for n, (t, _) in plots.items())]
    return "\n\n".join(lines) + "\n"


def _emphasised(table: Table, row: Sequence[str]) -> list[str]:
    cells = [cell.replace("|", "\\|") for cell in row]
    if table.last_is_total and row is table.rows[-1]:
        return [f"**{cell}**" if cell else "" for cell in cells]
    return cells


def _html(
    title: str,
    introduction: Sequence[str],
    numbers: Sequence[Table],
    words: Sequence[Table],
    plots: dict[str, tuple[str, str]],
    made_by: str,
) -> str:
    paragraphs = [*introduction, *([made_by.replace("`", "")] if made_by else [])]
    parts = [f"<h1>{title}</h1>", *(f"<p>{html.escape(text)}</p>" for text in paragraphs)]
    parts += [_html_table(table, "numbers") for table in numbers]
    parts.append("<h2>Plots</h2>")
    for title, svg in plots.values():
        data = base64.b64encode(svg.encode()).decode()
        parts.append(
            f'<p><img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}"></p>'
        )
    parts += [_html_table(table, "words") for table in words]
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _html_table(table: Table, kind: str) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

    rows = [
        f"<tr{total}>{line(row, 'td')}</tr>"
        for row in table.rows
        for total in [' class="total"' if table.last_is_total and row is table.rows[-1] else ""]
    ]
    head = f"<tr>{line(table.header, 'th')}</tr>"
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<table class="{kind}">\n{head}\n'
        + "\n".join(rows)
        + "\n</table>"
    )
