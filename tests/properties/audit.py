"""Many cases: what each one found, a journal that a later run continues, and docs/audit.md.

PYTHONPATH=tests python -m properties.audit --cases 20000 --journal j.jsonl --page audit.md
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import goldens
import numpy as np
from strategies import Problem

import sepconv
from properties import cases, laws, page
from properties.doors import DOORS, SAVING, by_pair_of_torch
from sepconv import _native, machine, reference

ARRAYS = ("y", *reference.Gradients._fields)
# Their slopes have no jump. Beside a jump either side is right, and errors say nothing.
SMOOTH = {"linear", "sigmoid", "tanh", "silu", "gelu", "elu"}
Errors = dict[str, float]


def scales(problem: Problem, arrays: Any) -> list[Any]:
    """Per result, its largest element when all arrays are positive and activations left out.

    That is what the rounding errors of a result are proportional to, whatever cancels in it.
    """
    plain = laws.without_activations(problem).geometry
    positive = type(arrays)(*(None if a is None else np.abs(a) for a in arrays))
    results = [
        reference.forward(plain, *positive.forward),
        *reference.backward(plain, *positive.backward),
    ]
    return [None if a is None else max(1.0, float(a.max(initial=0.0))) for a in results]


def units(results: list[Any], true: list[Any], scale: list[Any], dtype: str) -> Errors:
    """The largest error per result, in unit roundoffs of its scale."""
    return {
        name: float(np.abs(np.asarray(one, np.float64) - other).max(initial=0.0))
        / (cases.UNIT_ROUNDOFF[dtype] * size)
        for name, one, other, size in zip(ARRAYS, results, true, scale, strict=True)
        if other is not None
    }


def corrupts_the_heap(problem: Problem) -> bool:
    """Whether torch 2.13 writes outside of its buffers for the depthwise half of its pair.

    Its convolution of one channel with a 1x1 kernel and strides does, in the backward pass and with
    oneDNN; some calls later the process aborts.
    """
    return (
        problem.channels == 1 and problem.kernel_size == (1, 1) and problem.spec.strides != (1, 1)
    )


def measure(case: cases.Case) -> dict[str, Any]:
    """Makes the calls of a case; "fault" is `None` or says what is wrong."""
    problem, dtype = case.problem, cases.DTYPES[case.dtype]
    g, arrays = problem.geometry, problem.arrays(dtype)
    record: dict[str, Any] = {"fault": None}
    before = _native.cpu_target()
    _native.set_target(case.target)
    try:
        y, gradients = DOORS[case.door](problem, arrays)
        y_bound, bounds = reference.error_bounds(
            g, case.dtype, *arrays.backward, from_output=case.door in SAVING
        )
        true = [reference.forward(g, *arrays.forward), *reference.backward(g, *arrays.backward)]
        rows = list(zip(ARRAYS, [y, *gradients], true, [y_bound, *bounds], strict=True))
        for name, actual, exact, bound in rows:
            if (actual is None) != (exact is None):
                raise AssertionError(f"{name} is missing, or there without its argument")
            if exact is not None:
                goldens.assert_within(actual, exact, bound, name)
        record["share"] = {
            name: laws.excess(actual.astype(np.float64) - exact, bound)
            for name, actual, exact, bound in rows
            if exact is not None
        }
        scale = scales(problem, arrays)
        record["units"] = units([y, *gradients], true, scale, case.dtype)
        if case.door == "torch" and not corrupts_the_heap(problem):
            theirs, their_gradients = by_pair_of_torch(problem, arrays)
            record["pair"] = units([theirs, *their_gradients], true, scale, case.dtype)
        # A law makes calls of several shapes, each of which JAX would compile.
        door = case.door if case.door.startswith("torch") else "numpy"
        record["law_share"] = laws.LAWS[case.law](laws.Setting(problem, dtype, door))
        if record["law_share"] > 1.0:
            raise AssertionError(f"the law {case.law} is broken: {record['law_share']:.3g}")
    except Exception as error:  # Whatever it is, the case is on record and the next one runs.
        record["fault"] = f"{type(error).__name__}: {error}"
    finally:
        _native.set_target(before)
    return record


def row_of(number: int, case: cases.Case) -> dict[str, Any]:
    """One line of the journal."""
    spec = case.problem.spec
    activations = (spec.input_activation, spec.depthwise_activation, spec.activation)
    options = {
        "no options": spec == type(spec)(data_format=spec.data_format),
        "strides": spec.strides != (1, 1),
        "dilation": spec.dilation_rate != (1, 1),
        "padding of zeros": spec.padding != "valid",
        "explicit padding": not isinstance(spec.padding, str),
        "depth multiplier": case.problem.depth_multiplier > 1,
        "input activation": spec.input_activation != "linear",
        "depthwise activation": spec.depthwise_activation != "linear",
        "bias": case.problem.use_bias,
        "depthwise bias": case.problem.use_depthwise_bias,
        f"activation {spec.activation}": True,
    }
    return {
        "number": number,
        "door": case.door,
        "target": case.target,
        "dtype": case.dtype,
        "law": case.law,
        "layout": spec.data_format,
        "options": [name for name, holds in options.items() if holds],
        "smooth": SMOOTH.issuperset(activations),
        **measure(case),
    }


def run(seed: int, numbers: Iterator[int] | range) -> Iterator[dict[str, Any]]:
    targets = _native.available_targets()
    for number in numbers:
        yield row_of(number, cases.draw(seed, number, targets))


def compared(rows: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float, int]]:
    """Worst error of ours and of torch's pair, and the cases, per (dtype, result)."""
    found: dict[tuple[str, str], tuple[float, float, int]] = {}
    for row in rows:
        for name, theirs in row.get("pair", {}).items():
            if name == "y" or row["smooth"]:
                ours, pair, count = found.get((row["dtype"], name), (0.0, 0.0, 0))
                worst = max(ours, row["units"][name]), max(pair, theirs)
                found[row["dtype"], name] = (*worst, count + 1)
    return found


def header(seed: int) -> dict[str, Any]:
    """What must be the same for a journal to be continued."""
    packages = ("numpy", "torch", "jax", "keras")
    return {
        "seed": seed,
        "targets": list(_native.available_targets()),
        "versions": {
            "sepconv": sepconv.__version__,
            "Python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "machine": machine.cpu_name(),
    }


def read(journal: Path, expected: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of an earlier run, without a last one that was cut off, and without faults.

    Cases with a fault are thus tried again, after its cause was mended.
    """
    if not journal.exists():
        return []
    lines = journal.read_text().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith("\n")]
    if not complete:
        journal.write_text("")
        return []
    first, *rest = map(json.loads, complete)
    if first != expected:
        raise SystemExit(f"{journal} is of another run: {first}, not {expected}. Delete it.")
    good = [row for row in rest if row["fault"] is None]
    journal.write_text("".join(json.dumps(line) + "\n" for line in (first, *good)))
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    arguments = parser.parse_args()
    first = header(arguments.seed)
    arguments.journal.parent.mkdir(parents=True, exist_ok=True)
    rows = read(arguments.journal, first)
    done = {row["number"] for row in rows}
    with arguments.journal.open("a") as journal:
        if journal.tell() == 0:
            journal.write(json.dumps(first) + "\n")
        missing = (number for number in range(arguments.cases) if number not in done)
        for row in run(arguments.seed, missing):
            journal.write(json.dumps(row) + "\n")
            journal.flush()
            rows.append(row)
            if row["fault"] is not None:
                print(f"case {row['number']}: {row['fault']}", file=sys.stderr)
            if len(rows) % 1000 == 0:
                print(f"{len(rows)} of {arguments.cases} cases", flush=True)
    arguments.page.write_text(page.text(first, rows, compared(rows)))
    print(f"wrote {arguments.page}")
    return int(any(row["fault"] is not None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
