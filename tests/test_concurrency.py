"""Many threads of Python at once: everybody gets the bits that one thread alone gets."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from test_native import THREADED, flatten, run, run_python

import sepconv
import sepconv.numpy as door
from sepconv import _native

CALLERS = 8
ROUNDS = 10

pytestmark = pytest.mark.usefixtures("restore_threads")


def bits(arrays: Any) -> list[bytes]:
    return [array.tobytes() for array in arrays]


def together(call: Callable[[int], None]) -> None:
    """Runs `call(0)`, ..., on threads that start at the same moment; raises what one raises."""
    barrier = threading.Barrier(CALLERS)
    errors: list[BaseException] = []

    def run_one(caller: int) -> None:
        try:
            barrier.wait()
            call(caller)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run_one, args=(caller,)) for caller in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def changing_number_of_threads() -> Iterator[None]:
    """Somebody else sets the number of threads all the time."""
    stop = threading.Event()

    def change() -> None:
        numbers = random.Random(0)
        while not stop.wait(1e-4):
            sepconv.set_num_threads(numbers.choice((0, 1, 2, 3, 5, 16)))

    changer = threading.Thread(target=change)
    changer.start()
    try:
        yield
    finally:
        stop.set()
        changer.join()


def alone(index: int, dtype: str) -> list[bytes]:
    problem = THREADED[index]
    sepconv.set_num_threads(1)
    return bits(flatten(run(problem.geometry, dtype, problem.arrays(np.dtype(dtype)))))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_different_geometries_at_once_while_the_number_of_threads_changes(dtype):
    inputs = [(p.geometry, p.arrays(np.dtype(dtype))) for p in THREADED]
    expected = [alone(index, dtype) for index in range(len(THREADED))]

    def call(caller: int) -> None:
        order = random.Random(caller).sample(range(len(THREADED)), len(THREADED))
        for index in order:
            g, arrays = inputs[index]
            assert bits(flatten(run(g, dtype, arrays))) == expected[index]

    with changing_number_of_threads():
        together(call)


@pytest.mark.parametrize("index", range(len(THREADED)))
def test_the_same_geometry_and_the_same_inputs_at_once(index):
    problem, expected = THREADED[index], alone(index, "float32")
    g, arrays = problem.geometry, problem.arrays(np.float32)
    weights = [arrays[i] for i in (1, 2, 4, 3)]
    flat = np.array(g, np.int64)

    def call(caller: int) -> None:
        for _ in range(ROUNDS):
            y = np.empty(g.y_shape, np.float32)
            _native.forward(flat, arrays.x, *weights, y)
            assert y.tobytes() == expected[0]

    with changing_number_of_threads():
        together(call)


def test_callers_with_errors_do_not_disturb_the_others():
    problem, expected = THREADED[1], alone(1, "float32")
    g, arrays = problem.geometry, problem.arrays(np.float32)
    wrong, one = np.array(g._replace(in_height=2**62), np.int64), np.ones(1, np.float32)

    def call(caller: int) -> None:
        for _ in range(ROUNDS):
            if caller % 2:
                assert bits(flatten(run(g, "float32", arrays))) == expected
            else:
                with pytest.raises(ValueError, match="`in_height` must be at most"):
                    _native.forward(wrong, one, one, one, None, None, one.copy())

    together(call)


def test_the_numpy_door_serves_many_threads():
    """Plans are cached; threads that fill the cache at once do not get each other's."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 5, 2)).astype(np.float32)
    pointwise = rng.standard_normal((1, 1, 10, 7)).astype(np.float32)
    images = [rng.standard_normal((1, 9 + i, 8, 5)).astype(np.float32) for i in range(40)]

    def compute(image: np.ndarray) -> bytes:
        return door.separable_conv2d(image, kernel, pointwise, padding="same").tobytes()

    sepconv.set_num_threads(1)
    expected = [compute(image) for image in images]
    sepconv.set_num_threads(3)

    def call(caller: int) -> None:
        for index in random.Random(caller).sample(range(len(images)), len(images)):
            assert compute(images[index]) == expected[index]

    together(call)


def test_the_first_import_may_come_from_many_threads():
    run_python(
        """
import threading
import numpy as np

def call(results):
    barrier.wait()
    import sepconv.numpy as door
    one = np.ones((1, 4, 4, 3), np.float32)
    results.append(door.separable_conv2d(one, np.ones((3, 3, 3, 1), np.float32),
                                         np.ones((1, 1, 3, 2), np.float32)))

barrier, results = threading.Barrier(8), []
threads = [threading.Thread(target=call, args=(results,)) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(results) == 8
assert all(y.shape == (1, 2, 2, 2) and (y == 27).all() for y in results)
"""
    )


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two CPUs to choose from",
)
def test_a_worker_leaves_the_cpu_of_the_caller():
    run_python(
        """
import os
import numpy as np
import sepconv
import sepconv.numpy as door

def call():
    one = np.ones((1, 64, 64, 32), np.float32)
    door.separable_conv2d(one, np.ones((3, 3, 32, 1), np.float32),
                          np.ones((1, 1, 32, 32), np.float32))

sepconv.set_num_threads(2)
first, second = sorted(os.sched_getaffinity(0))[:2]
before = set(os.listdir("/proc/self/task"))
os.sched_setaffinity(0, {first})
call()  # The worker inherits the only CPU of the caller, who cannot send it anywhere.
call()
(worker,) = (int(task) for task in set(os.listdir("/proc/self/task")) - before)
assert os.sched_getaffinity(worker) == {first}

for _ in range(100):
    os.sched_setaffinity(0, {first})
    os.sched_setaffinity(0, {first, second})  # The caller stays where it is, as a rule.
    call()
    if os.sched_getaffinity(worker) == {second}:
        break
assert os.sched_getaffinity(worker) == {second}
"""
    )
