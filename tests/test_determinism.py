"""The same bits: for every number of threads, run, process, and split of the batch.

tests/test_native.py has the numbers of threads on large problems of the core. Here: all that varies
at once, through the door, per target.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from properties.cases import DTYPES
from properties.doors import by_numpy
from strategies import Arrays, Problem

import sepconv
from sepconv import ConvSpec, reference

PROBLEMS = [
    Problem(
        ConvSpec(padding="same", strides=(2, 1), activation="relu"),
        batch=4,
        height=23,
        width=21,
        channels=19,
        depth_multiplier=2,
        kernel_size=(3, 3),
        filters=37,
    ),
    Problem(
        ConvSpec(
            padding=((1, 2), (0, 3)),
            dilation_rate=(2, 1),
            data_format="channels_first",
            activation="silu",
            input_activation="relu",
            depthwise_activation="tanh",
        ),
        batch=3,
        height=17,
        width=26,
        channels=11,
        depth_multiplier=1,
        kernel_size=(2, 5),
        filters=24,
        use_depthwise_bias=True,
    ),
    # More weights than pixels: threads share filters and channels, not images.
    Problem(
        ConvSpec(padding="same", input_activation="gelu"),
        batch=3,
        height=4,
        width=5,
        channels=130,
        depth_multiplier=1,
        kernel_size=(3, 3),
        filters=90,
    ),
]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES)
all_problems = pytest.mark.parametrize("problem", PROBLEMS, ids=["pixels", "stages", "weights"])


def bits(problem: Problem, arrays: Arrays) -> list[bytes]:
    y, gradients = by_numpy(problem, arrays)
    return [array.tobytes() for array in (y, *gradients) if array is not None]


def digest(target: str, dtype: str) -> str:
    """Of the results of all problems, for another process to compare with."""
    from sepconv import _native

    _native.set_target(target)
    found = hashlib.sha256()
    for problem in PROBLEMS:
        for part in bits(problem, problem.arrays(DTYPES[dtype])):
            found.update(part)
    return found.hexdigest()


@all_dtypes
@all_problems
@pytest.mark.usefixtures("restore_threads")
def test_threads_and_runs_give_the_same_bits(target, dtype, problem):
    arrays = problem.arrays(DTYPES[dtype])
    results = []
    for threads in (1, 2, 3, 2, 1):
        sepconv.set_num_threads(threads)
        results.append(bits(problem, arrays))
    assert all(result == results[0] for result in results)


@all_dtypes
@all_problems
def test_an_image_alone_is_its_part_of_the_batch(target, dtype, problem):
    """To the bit: y and dx, which no other image enters. Weight gradients: within their bounds."""
    arrays = problem.arrays(DTYPES[dtype])
    y, gradients = by_numpy(problem, arrays)
    single = replace(problem, batch=1)
    sums = [None if gradient is None else 0.0 for gradient in gradients[1:]]
    allowed = [None if gradient is None else 0.0 for gradient in gradients[1:]]
    for i in range(problem.batch):
        one = arrays._replace(x=arrays.x[i : i + 1], dy=arrays.dy[i : i + 1])
        y_alone, alone = by_numpy(single, one)
        assert y_alone.tobytes() == y[i : i + 1].tobytes()
        assert alone.dx.tobytes() == gradients.dx[i : i + 1].tobytes()
        _, bounds = reference.error_bounds(single.geometry, dtype, *one.backward)
        for place, (gradient, bound) in enumerate(zip(alone[1:], bounds[1:], strict=True)):
            if gradient is not None:
                sums[place] = sums[place] + gradient.astype(np.float64)
                allowed[place] = allowed[place] + bound
    _, bounds = reference.error_bounds(problem.geometry, dtype, *arrays.backward)
    for total, error, whole, bound in zip(sums, allowed, gradients[1:], bounds[1:], strict=True):
        if whole is not None:
            assert (np.abs(total - whole.astype(np.float64)) <= error + bound).all()


@all_dtypes
def test_another_process_with_other_threads_gives_the_same_bits(target, dtype):
    code = (
        "import sepconv; sepconv.set_num_threads(3); import test_determinism; "
        f"print(test_determinism.digest({target!r}, {dtype!r}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == digest(target, dtype)
