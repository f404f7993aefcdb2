"""A slice of the audit (`make properties` runs all of it), and numbers that are none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from properties import audit, cases, doors, laws, page
from strategies import Problem, odd_problem

import sepconv
from sepconv import ConvSpec, _native, reference
from sepconv.numpy import separable_conv2d, separable_conv2d_grad
from sepconv.spec import ACTIVATIONS

STAGES = ("activation", "input_activation", "depthwise_activation")
SLICE = 600


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """In a process of its own, for the backend of Keras is chosen once."""
    folder = tmp_path_factory.mktemp("audit")
    journal = folder / "journal.jsonl"
    outputs = ["--journal", str(journal), "--page", str(folder / "audit.md")]
    done = subprocess.run(
        [sys.executable, "-m", "properties.audit", "--cases", str(SLICE), *outputs],
        cwd=Path(__file__).parent,
        env={**os.environ, "KERAS_BACKEND": "torch", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in journal.read_text().splitlines()[1:]]


def test_calls_are_within_their_bounds_and_obey_the_laws(rows):
    assert [row["fault"] for row in rows if row["fault"] is not None] == []
    for key, values in (
        ("door", doors.DOORS),
        ("target", _native.available_targets()),
        ("dtype", cases.DTYPES),
        ("law", laws.LAWS),
        ("layout", ("channels_first", "channels_last")),
    ):
        assert {row[key] for row in rows} == set(values)


def test_errors_are_at_most_twice_those_of_torch(rows):
    found = audit.compared(rows)
    assert {dtype for dtype, _ in found} == set(cases.DTYPES)
    for key, (ours, theirs, _) in found.items():
        # The truth itself has rounded in float64, by a unit or so.
        allowance = 1.0 if key[0] == "float64" else 0.0
        assert ours <= 2 * theirs + allowance, key


def test_a_case_is_determined_by_seed_and_number():
    targets = _native.available_targets()
    for number in (0, 5, 19_999):
        assert cases.draw(7, number, targets) == cases.draw(7, number, targets)
    assert cases.draw(7, 5, targets) != cases.draw(8, 5, targets)


def test_a_fault_is_found(monkeypatch):
    """A gradient that is half a percent off: the comparison and the law both notice."""
    by_numpy = doors.by_numpy

    def wrong(problem, arrays):
        y, gradients = by_numpy(problem, arrays)
        wrong_x = gradients.dx * np.asarray(1.005, gradients.dx.dtype)
        return y, gradients._replace(dx=wrong_x)

    monkeypatch.setitem(doors.DOORS, "numpy", wrong)
    problem = odd_problem(activation="silu")
    case = cases.Case("numpy", _native.cpu_target(), "float32", "adjoint_x", problem)
    assert "dx: " in audit.measure(case)["fault"]
    setting = laws.Setting(problem, cases.DTYPES["float32"], "numpy")
    assert laws.adjoint_x(setting) > 1.0


def test_a_journal_is_continued(tmp_path, monkeypatch):
    journal, written = tmp_path / "journal.jsonl", tmp_path / "page.md"
    monkeypatch.setattr(cases, "DOORS", {"numpy": 100})
    arguments = ["audit", "--journal", str(journal), "--page", str(written), "--cases"]
    for count in (3, 6):
        monkeypatch.setattr("sys.argv", [*arguments, str(count)])
        assert audit.main() == 0
        with journal.open("a") as file:
            file.write('{"number": 6, "cut o')  # Where the process ended.
    first, *lines = journal.read_text().splitlines()[:-1]
    assert [json.loads(line)["number"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert page.text(json.loads(first), list(map(json.loads, lines)), {}) != ""
    assert "6 calls" in written.read_text()


# ---------------------------------------------------------------------- numbers that are none


def kinds(array: np.ndarray) -> np.ndarray:
    """0 finite, 1 and 2 the infinities, 3 NaN."""
    array = np.asarray(array, np.float64)
    return np.select([np.isnan(array), np.isposinf(array), np.isneginf(array)], [3, 2, 1], 0)


def spoiled(problem: Problem, dtype: str, argument: str, value: float):
    arrays = problem.arrays(cases.DTYPES[dtype])
    array = getattr(arrays, argument)
    array.reshape(-1)[array.size // 2] = value
    return arrays


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_reach_what_depends_on_them(target, dtype, value):
    """The same elements become NaN and infinite as in the reference, and no others."""
    for argument in ("x", "pointwise_kernel", "bias", "depthwise_bias"):
        for stage in STAGES:
            for activation in ACTIVATIONS:
                problem = odd_problem(padding="same", **{stage: activation})
                arrays = spoiled(problem, dtype, argument, value)
                with np.errstate(invalid="ignore"):
                    true = reference.forward(problem.geometry, *arrays.forward)
                y, *_ = doors.by_numpy(problem, arrays)
                np.testing.assert_array_equal(
                    kinds(y), kinds(true), err_msg=f"{argument} {stage} {activation}"
                )


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_reach_the_gradients_that_depend_on_them(target, dtype, value):
    """Without padding: the reference multiplies its zeros, the kernels leave them out."""
    problem = odd_problem()
    for argument in ("dy", "x", "pointwise_kernel"):
        arrays = spoiled(problem, dtype, argument, value)
        with np.errstate(invalid="ignore"):
            true = reference.backward(problem.geometry, *arrays.backward)
        _, gradients = doors.by_numpy(problem, arrays)
        for name, ours, exact in zip(true._fields, gradients, true, strict=True):
            np.testing.assert_array_equal(kinds(ours), kinds(exact), err_msg=f"{argument} {name}")


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_subnormal_numbers_are_kept(target, dtype):
    stored = cases.DTYPES[dtype]
    bits = np.dtype(f"u{stored.itemsize}")
    x = np.arange(1, 41, dtype=bits).view(stored).reshape(1, 5, 8, 1)  # The 40 smallest.
    one = np.ones((1, 1, 1, 1), stored)
    assert separable_conv2d(x, one, one).tobytes() == x.tobytes()
    dx, *_ = separable_conv2d_grad(x, x, one, one)
    assert dx.tobytes() == x.tobytes()
    bias = x.reshape(-1)
    y = separable_conv2d(np.zeros_like(one), one, np.ones((1, 1, 1, bias.size), stored), bias)
    assert y.tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_subnormal_sums_of_normal_numbers_are_kept(target, dtype):
    """Also where one element among many makes them possible, and whatever the threads."""
    stored = cases.DTYPES[dtype]
    tiny, eps = (float(getattr(ml_dtypes.finfo(stored), name)) for name in ("tiny", "eps"))
    one = np.ones((1, 1, 1, 1), stored)
    x = np.full((1, 1, 1, 1), 2 * tiny, stored)
    assert float(separable_conv2d(x, one, one / 4).item()) == tiny / 2
    pair = np.array([tiny * (1 + eps), -tiny], stored).reshape(1, 1, 1, 2)
    ones = np.ones((1, 1, 2, 1), stored)
    assert float(separable_conv2d(pair, ones, ones).item()) == tiny * eps
    # The same pair among the filters and among the pixels of each factor of a gradient.
    twice = ones.reshape(1, 1, 1, 2)
    for dy, kernel in ((pair, twice), (twice, pair)):
        dx, *_ = separable_conv2d_grad(dy, one, one, kernel)
        assert float(dx.item()) == tiny * eps
    pixels, of_ones = pair.reshape(1, 1, 2, 1), np.ones((1, 1, 2, 2), stored)
    for dy, x in ((np.repeat(pixels, 2, axis=-1), ones), (of_ones, pixels)):
        _, _, d_pointwise, *_ = separable_conv2d_grad(dy, x.reshape(1, 1, 2, 1), one, twice)
        assert [float(value) for value in d_pointwise.ravel()] == [tiny * eps] * 2

    problem = replace(odd_problem(), batch=1, height=61, width=70, channels=33, filters=18)
    arrays = problem.arrays(stored)
    arrays.x[0, 50, 60, 3] = tiny * eps
    before = sepconv.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            sepconv.set_num_threads(threads)
            y, gradients = doors.by_numpy(problem, arrays)
            results.append([array.tobytes() for array in (y, *gradients)])
    finally:
        sepconv.set_num_threads(before)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_sign_of_a_zero_does_not_matter(target, dtype, activation):
    """-0 in the input counts as 0, to the bit, and a sum of nothing but -0 is 0."""
    problem = odd_problem(padding="same", activation=activation, input_activation=activation)
    arrays = problem.arrays(cases.DTYPES[dtype])
    x = arrays.x
    x[:, ::2] = 0
    negative = np.where(x == 0, -np.zeros_like(x), x)
    assert negative.tobytes() != x.tobytes()
    plain, plain_gradients = doors.by_numpy(problem, arrays)
    y, gradients = doors.by_numpy(problem, arrays._replace(x=negative))
    assert y.tobytes() == plain.tobytes()
    for one, other in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_array_equal(one, other)
    one = np.ones((1, 1, 1, 1), x.dtype)
    if ConvSpec(activation=activation).activation in ("linear", "relu", "relu6"):
        zero = separable_conv2d(-np.zeros_like(one), one, one, activation=activation)
        assert not np.signbit(zero.astype(np.float64)).any()
