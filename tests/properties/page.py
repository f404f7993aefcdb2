"""The page docs/audit.md, from the journal alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

Rows = list[dict[str, Any]]
INTRODUCTION = """\
# Audit of the numbers

Written by `make properties`; the journal of the run lies in `reports/audit/`. Case n of a seed is a
random call: door, instruction set, dtype, layout, sizes, strides, dilation, padding, multiplier,
activations at the three stages, biases. Its output and all its gradients are compared with the
reference in float64, within the bound that `sepconv.reference.error_bounds` derives for each
element (roundings of sums in any order, carried through the stages), and one algebraic law is tried
on it.

*share of bound*: largest error of an element divided by its bound; above 1 would be a fault.
*roundoffs*: largest error of an array in unit roundoffs (2⁻²⁴ float32, 2⁻⁵³ float64, 2⁻⁸ bfloat16,
2⁻¹¹ float16) of the largest element, at least 1, that the same sums have on absolute values.
Rounding a result once to its dtype gives up to 1. In float64 the reference rounds as much as the
kernel. Beside the kink of an activation a kernel may see the other side, and its slope be off by
the jump; the bound allows that there, so the columns of gradients are large in calls with kinks and
few bits.
"""


def _table(head: list[str], body: list[list[Any]]) -> str:
    def line(cells: list[Any]) -> str:
        return "| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells)

    rule = "|---" + "|---:" * (len(head) - 1)
    return "\n".join(f"{text} |" for text in [line(head), rule[:-1] + ":", *map(line, body)]) + "\n"


def _worst(rows: Rows, key: str, gradients: bool) -> float:
    return max(
        (
            value
            for row in rows
            for name, value in row.get(key, {}).items()
            if (name != "y") == gradients
        ),
        default=0.0,
    )


def _errors(title: str, groups: dict[str, Rows]) -> str:
    head = [title, "calls", "y: share of bound", "gradients", "y: roundoffs", "gradients"]
    body: list[list[Any]] = [
        [
            name,
            f"{len(rows):,}",
            *(
                _worst(rows, key, gradients)
                for key in ("share", "units")
                for gradients in (False, True)
            ),
        ]
        for name, rows in sorted(groups.items())
    ]
    return _table(head, body)


def _grouped(rows: Rows, key: str) -> dict[str, Rows]:
    groups: dict[str, Rows] = defaultdict(list)
    for row in rows:
        for name in row[key] if isinstance(row[key], list) else [row[key]]:
            groups[name].append(row)
    return groups


def text(
    first: dict[str, Any],
    rows: Rows,
    compared: dict[tuple[str, str], tuple[float, float, int]],
) -> str:
    """The page.

    Args:
        first: The first line of the journal: seed, targets, versions, machine.
        rows: The other lines.
        compared: (our worst error, that of torch's pair, cases) per (dtype, result).
    """
    faults = [row for row in rows if row["fault"] is not None]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    parts = [
        INTRODUCTION,
        f"**{len(rows):,} calls, seed {first['seed']}, {len(faults)} faults.** {versions}; "
        f"{first['machine']}, targets {', '.join(first['targets'])}.\n",
    ]
    if faults:
        parts.append("".join(f"- case {row['number']}: {row['fault']}\n" for row in faults))
    for title, key in (
        ("dtype", "dtype"),
        ("target", "target"),
        ("door", "door"),
        ("layout", "layout"),
        ("option", "options"),
    ):
        parts += [f"## By {title}\n", _errors(title, _grouped(rows, key))]
    both: dict[str, Rows] = defaultdict(list)
    for row in rows:
        both[f"{row['dtype']}, {row['target']}"].append(row)
    parts += ["## By dtype and target\n", _errors("dtype, target", both)]
    laws = [
        [name.replace("_", " "), f"{len(group):,}", max(row.get("law_share", 0.0) for row in group)]
        for name, group in sorted(_grouped(rows, "law").items())
    ]
    parts += [
        "## Laws\n",
        "Share of what the bounds of the calls allow the two sides of the equation to differ by. "
        "Adjoint: ⟨f(a), dy⟩ = ⟨a, f*(dy)⟩ for the argument named. Scaling by 4 is exact to the "
        "bit in float32 and float64.\n",
        _table(["law", "calls", "largest share"], laws),
        "## Beside torch's own two convolutions\n",
        "Worst error of the calls through the door `torch`, in roundoffs as above, ours and that "
        "of depthwise and pointwise `conv2d` in the same dtype. Gradients: calls whose activations "
        "have no kink. The tests allow a ratio of 2. Left out are calls of one channel with a 1x1 "
        "kernel and strides, for which the convolution of torch 2.13 corrupts the heap.\n",
        _table(
            ["dtype, result", "calls", "ours", "torch", "ratio"],
            [
                [f"{dtype}, {name}", f"{count:,}", ours, theirs, ours / theirs if theirs else 0.0]
                for (dtype, name), (ours, theirs, count) in sorted(compared.items())
            ],
        ),
    ]
    return "\n".join(parts)
