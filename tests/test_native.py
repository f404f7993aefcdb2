"""The native core against the reference: every target and dtype, guard bands, threads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import goldens
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Problem, problems

import sepconv
from sepconv import ConvSpec, _native, reference
from sepconv.spec import ACTIVATIONS, Geometry

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
CODES = {name: code for code, name in enumerate(DTYPES)}
GUARD = 67  # Elements of NaN on both sides; odd, so that no array is aligned to a vector.

# The `target` fixture sets the same state for all examples of a test.
per_target = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


class Guarded:
    """Arrays cut out of larger ones that are NaN all around them."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.bits = np.dtype(f"u{dtype.itemsize}")
        self.nan = np.full(1, np.nan, dtype).view(self.bits)[0]
        self.buffers: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of NaN: what the kernel does not write shows."""
        size = math.prod(shape)
        buffer = np.full(size + 2 * GUARD, self.nan, self.bits)
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + size].view(self.dtype).reshape(shape)

    def copy(self, array: np.ndarray | None) -> np.ndarray | None:
        if array is None:
            return None
        copied = self.empty(array.shape)
        copied[...] = array
        return copied

    def check(self) -> None:
        for buffer in self.buffers:
            assert np.all(buffer[:GUARD] == self.nan), "written before the array"
            assert np.all(buffer[-GUARD:] == self.nan), "written behind the array"


def native(array: np.ndarray | None) -> np.ndarray | None:
    """bfloat16 has no buffer protocol and travels as integers."""
    return (
        array.view(np.uint16) if array is not None and array.dtype == DTYPES["bfloat16"] else array
    )


def run(
    g: Geometry, dtype: str, arrays: Any, pass_output: bool = False
) -> tuple[np.ndarray, reference.Gradients]:
    """Forward and backward on guarded arrays: (y, gradients)."""
    guarded = Guarded(DTYPES[dtype])
    x, kernel, pointwise, bias, between, dy = (guarded.copy(array) for array in arrays)
    weights = [native(array) for array in (kernel, pointwise, between, bias)]
    y = guarded.empty(g.y_shape)
    flat = np.array(g, np.int64)
    _native.forward(flat, native(x), *weights, native(y), CODES[dtype])
    gradients = reference.Gradients(
        dx=guarded.empty(g.x_shape),
        d_depthwise_kernel=guarded.empty(kernel.shape),
        d_pointwise_kernel=guarded.empty(pointwise.shape),
        d_bias=None if bias is None else guarded.empty(bias.shape),
        d_depthwise_bias=None if between is None else guarded.empty(between.shape),
    )
    dx, d_kernel, d_pointwise, d_bias, d_between = (native(gradient) for gradient in gradients)
    _native.backward(
        flat,
        native(dy),
        native(x),
        *weights,
        native(y) if pass_output else None,
        dx,
        d_kernel,
        d_pointwise,
        d_between,
        d_bias,
        CODES[dtype],
    )
    guarded.check()
    for before, after in zip(arrays, (x, kernel, pointwise, bias, between, dy), strict=True):
        assert before is None or before.tobytes() == after.tobytes(), "an input was written"
    return y, gradients


def check(problem: Problem, dtype: str, pass_output: bool = False) -> None:
    g, arrays = problem.geometry, problem.arrays(DTYPES[dtype])
    y_bound, bounds = reference.error_bounds(g, dtype, *arrays.backward, from_output=pass_output)
    y, gradients = run(g, dtype, arrays, pass_output)
    goldens.assert_within(y, reference.forward(g, *arrays.forward), y_bound, "y")
    true = reference.backward(g, *arrays.backward)
    for name, gradient, expected, bound in zip(true._fields, gradients, true, bounds, strict=True):
        if expected is not None:
            goldens.assert_within(gradient, expected, bound, name)


def test_both_sides_list_the_same_fields_and_activations():
    assert _native.geometry_fields() == Geometry._fields
    assert _native.activations() == ACTIVATIONS


# -------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("dtype", DTYPES)
def test_core_agrees_with_the_reference(target, dtype):
    constants = _native.tile_constants(dtype)

    @per_target
    @given(problem=problems(constants), pass_output=st.booleans())
    def agrees(problem, pass_output):
        check(problem, dtype, pass_output)

    agrees()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_core_agrees_where_tiles_end(target, dtype, data_format):
    # All three directions at once, which the random problems cannot afford.
    t = _native.tile_constants(dtype)
    straddled = [
        (t["rows"] + 1, t["backward_channels"] - 1, t["columns"] + 1),
        (t["backward_pixels"] + 1, t["lanes"] + 1, 2 * t["columns"] + 1),
        (t["forward_pixels"] - 1, t["lanes"] - 1, t["columns"] - 1),
        (t["forward_pixels"] + 1, 2 * t["lanes"] + 1, t["columns"]),
        (2 * t["forward_pixels"] + 1, t["rows"], t["lanes"] + 1),
        (2 * t["backward_pixels"] + 1, t["backward_channels"] + 1, 3),
    ]
    for seed, (pixels, channels, filters) in enumerate(straddled):
        spec = ConvSpec(
            padding="same", data_format=data_format, activation="gelu", input_activation="relu"
        )
        height = next(h for h in (3, 2, 1) if pixels % h == 0)
        problem = Problem(
            spec=spec,
            batch=1,
            height=height,
            width=pixels // height,
            channels=channels,
            depth_multiplier=1,
            kernel_size=(3, 3),
            filters=filters,
            seed=seed,
        )
        check(problem, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_integers_are_exact_and_kinks_have_their_slopes(target, dtype):
    @per_target
    @given(problem=problems(activations=("linear", "relu", "relu6")))
    def exact(problem):
        g, arrays = problem.geometry, problem.arrays(DTYPES[dtype], integers=True)
        y, gradients = run(g, dtype, arrays)
        true = reference.backward(g, *arrays.backward)
        assert max(np.abs(t).max(initial=0) for t in true if t is not None) < 2**24
        assert np.array_equal(y, reference.forward(g, *arrays.forward))
        for name, gradient, expected in zip(true._fields, gradients, true, strict=True):
            if expected is not None:
                assert np.array_equal(gradient, expected), name

    exact()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_over_the_whole_range(target, dtype, activation):
    """One channel, one filter, weights 1: y = activation(x), dx = slope(x), stage by stage."""
    x = np.concatenate(
        [
            np.linspace(-12, 12, 1001),
            [-100.0, -3.0, -1e-20, -0.0, 0.0, 1e-20, 3.0, 6.0, 100.0, -80.0, 88.7, -87.5],
        ]
    )
    x = x.astype(DTYPES[dtype]).reshape(1, 1, -1, 1)
    one = np.ones((1, 1, 1, 1), DTYPES[dtype])
    for stage in ("input_activation", "depthwise_activation", "activation"):
        g = ConvSpec(**{stage: activation}).resolve(x.shape, one.shape, one.shape)
        arrays = (x, one, one, None, None, np.ones_like(x))
        y, gradients = run(g, dtype, arrays)
        y_bound, bounds = reference.error_bounds(g, dtype, np.ones_like(x), x, one, one)
        goldens.assert_within(y, reference.forward(g, x, one, one), y_bound, stage)
        # Products with 1 are exact, and so is x: here kinks give no allowance.
        g = ConvSpec(input_activation=activation).resolve(x.shape, one.shape, one.shape)
        _, bounds = reference.error_bounds(g, dtype, np.ones_like(x), x, one, one)
        true = reference.backward(g, np.ones_like(x), x, one, one)
        goldens.assert_within(gradients.dx, true.dx, bounds.dx, f"slope, {stage}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stage", ["bias", "depthwise_bias"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_ties_round_to_even(target, dtype, stage, data_format):
    """x + half a unit in its last place, at either stage: one sum, half of the time a tie."""
    stored, bits = DTYPES[dtype], 7 if dtype == "bfloat16" else 10
    x = 1 + np.arange(2**bits) * 2.0**-bits  # All numbers from 1 to 2, either sign.
    x = np.stack([x, -x]).astype(stored)
    channels = 2 * len(x[0]) // 16
    shape = (1, 2, 8, channels) if data_format == "channels_last" else (1, channels, 2, 8)
    x = x.reshape(shape)
    kernel = np.ones((1, 1, channels, 1), stored)
    pointwise = np.eye(channels).reshape(1, 1, channels, channels).astype(stored)
    half = np.full(channels, 2.0 ** -(bits + 1), stored)
    biases = {"bias": None, "depthwise_bias": None, stage: half}
    g = ConvSpec(data_format=data_format).resolve(
        x.shape,
        kernel.shape,
        pointwise.shape,
        *(None if b is None else b.shape for b in biases.values()),
    )
    y, gradients = run(g, dtype, (x, kernel, pointwise, *biases.values(), x))
    np.testing.assert_array_equal(y, (x.astype(np.float32) + np.float32(half[0])).astype(stored))
    np.testing.assert_array_equal(gradients.dx, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_slope_may_follow_from_the_output(target, dtype, activation):
    problem = Problem(
        spec=ConvSpec(padding="same", activation=activation),
        batch=2,
        height=7,
        width=9,
        channels=11,
        depth_multiplier=2,
        kernel_size=(3, 3),
        filters=19,
    )
    check(problem, dtype, pass_output=True)
    # Where it does not follow, the core must not look at the output.
    g, arrays = problem.geometry, problem.arrays(DTYPES[dtype])
    x, kernel, pointwise, bias, _, dy = map(native, arrays)
    follows = _native.slope_follows_from_output(ACTIVATIONS.index(activation))
    results = []
    for y in (None, native(np.full(g.y_shape, np.nan, DTYPES[dtype]))):
        d_bias = native(np.empty(bias.shape, DTYPES[dtype]))
        _native.backward(
            np.array(g, np.int64),
            *(dy, x, kernel, pointwise, None, bias, y, None, None, None, None, d_bias),
            CODES[dtype],
        )
        results.append(d_bias.tobytes())
    assert (results[0] != results[1]) == follows


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_that_are_not_wanted_change_nothing(target, dtype):
    problem = Problem(
        spec=ConvSpec(padding="same", activation="silu", depthwise_activation="relu"),
        batch=2,
        height=9,
        width=8,
        channels=21,
        depth_multiplier=1,
        kernel_size=(3, 3),
        filters=35,
        use_depthwise_bias=True,
    )
    g, arrays = problem.geometry, problem.arrays(DTYPES[dtype])
    _, gradients = run(g, dtype, arrays)
    # In the order of the native call.
    all_of_them = [gradients[i] for i in (0, 1, 2, 4, 3)]
    weights = [arrays[i] for i in (1, 2, 4, 3)]
    for wanted in range(2**5):
        outputs = [
            np.full_like(gradient, np.nan) if wanted >> i & 1 else None
            for i, gradient in enumerate(all_of_them)
        ]
        _native.backward(np.array(g, np.int64), arrays.dy, arrays.x, *weights, None, *outputs)
        for output, gradient in zip(outputs, all_of_them, strict=True):
            assert output is None or output.tobytes() == gradient.tobytes(), wanted


def test_long_sums_are_cut_issue7(target):
    """The errors of sums over 6144 channels or filters are those of chains of 768 additions.

    A rounding of a partial sum of j terms of size s is a random number of variance (j s^2) u^2 / 3
    at most, so that a chain of n has u s n / sqrt(6), and n / B chains of B have u s sqrt(n B / 6).
    One chain of 6144 had 2.8 times as much.
    """
    long, block, sides = 6144, 768, (7, 8)
    rng = np.random.default_rng(7)
    errors = []
    for channels, filters in ((long, 24), (24, long)):
        x = rng.standard_normal((1, *sides, channels), np.float32)
        kernel = np.ones((1, 1, channels, 1), np.float32)
        pointwise = rng.standard_normal((1, 1, channels, filters), np.float32)
        dy = rng.standard_normal((1, *sides, filters), np.float32)
        g = ConvSpec().resolve(x.shape, kernel.shape, pointwise.shape)
        y, gradients = run(g, "float32", (x, kernel, pointwise, None, None, dy))
        wide = pointwise[0, 0].astype(np.float64)
        error = y - x @ wide if channels == long else gradients.dx - dy @ wide.T
        errors.append(np.sqrt(np.square(error).mean()))
    expected = 2.0**-24 * np.sqrt(long * block / 6)
    assert max(errors) <= expected, (errors, expected)


@pytest.mark.parametrize("case", goldens.load_cases(), ids=goldens.case_ids)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_goldens(target, dtype, case):
    x, kernel, pointwise, bias = case.inputs(DTYPES[dtype])
    dy, g = case.upstream(DTYPES[dtype]), case.geometry
    if case.outside_activation is None:
        y, gradients = run(g, dtype, (x, kernel, pointwise, bias, None, dy))
    else:
        outside = goldens.OUTSIDE_ACTIVATIONS[case.outside_activation]
        z, _ = run(g, dtype, (x, kernel, pointwise, bias, None, dy))
        y, dz = outside.value(z), outside.vjp(z, dy).astype(DTYPES[dtype])
        _, gradients = run(g, dtype, (x, kernel, pointwise, bias, None, dz))
    goldens.check(case, dtype, y, gradients[:4])


# ---------------------------------------------------------------------------------------- threads

# Large enough to be cut into several tasks in pixels and in channels, and worth a second thread.
THREADED = [
    Problem(ConvSpec(padding="same", activation="relu"), 1, 90, 80, 33, 1, (3, 3), 47),
    Problem(ConvSpec(padding="same", strides=(2, 1)), 5, 30, 31, 25, 3, (3, 5), 64),
    Problem(
        ConvSpec(
            padding="same",
            data_format="channels_first",
            dilation_rate=2,
            activation="silu",
            input_activation="relu",
            depthwise_activation="tanh",
        ),
        3,
        40,
        41,
        40,
        2,
        (3, 3),
        33,
        use_depthwise_bias=True,
    ),
    Problem(ConvSpec(padding="same", input_activation="gelu"), 1, 7, 7, 500, 1, (3, 3), 300),
    Problem(ConvSpec(data_format="channels_first"), 2, 12, 70, 200, 1, (5, 1), 9),
    # Few pixels, many weights: threads share the filters, and pack each panel before its only use.
    Problem(ConvSpec(padding="same", activation="silu"), 1, 5, 5, 600, 1, (3, 3), 450),
    # More pixels than partial sums: these are cut by the shape alone, not by the threads.
    Problem(ConvSpec(padding="same"), 3, 90, 80, 5, 1, (3, 3), 7),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", THREADED, ids=range(len(THREADED)))
@pytest.mark.usefixtures("restore_threads")
def test_any_number_of_threads_gives_the_same_bits(problem, dtype):
    g, arrays = problem.geometry, problem.arrays(DTYPES[dtype])
    results = []
    for threads in (1, 2, 5):
        sepconv.set_num_threads(threads)
        assert sepconv.get_num_threads() == threads
        y, gradients = run(g, dtype, arrays)
        results.append([array.tobytes() for array in (y, *gradients) if array is not None])
    assert results[0] == results[1] == results[2]
    if dtype == "float32":
        check(problem, dtype)


FLUSHING_CALLER = """
import numpy as np
import torch
import sepconv
from test_native import THREADED, flatten, run

for problem in THREADED:
    # Subnormal inputs in 16 bits, subnormal products in 32.
    for dtype, scale in (("float16", 2.0**-16), ("float32", 2.0**-130)):
        arrays = [a if a is None else a * np.asarray(scale, a.dtype) for a in
                  problem.arrays(np.dtype(dtype))]
        results = []
        for flush in (True, False):  # The threads start while the caller flushes.
            assert torch.set_flush_denormal(flush)
            for threads in (3, 1):
                sepconv.set_num_threads(threads)
                outputs = flatten(run(problem.geometry, dtype, arrays))
                results.append([array.tobytes() for array in outputs])
        assert all(result == results[0] for result in results), (problem, dtype)
"""


# One of 8.8 MB goes past the caches where it starts at a cache line, and then has lanes of its own.
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["relu6", "silu"])
@pytest.mark.usefixtures("restore_threads")
def test_large_outputs_are_the_same_wherever_they_start(target, dtype, activation):
    filters = 16 if dtype == "float32" else 8
    spec = ConvSpec(padding="same", activation=activation)
    problem = Problem(spec, 1, 370, 371, 2, 1, (3, 3), filters, seed=3)
    g, (x, *weights, _, _) = problem.geometry, problem.arrays(DTYPES[dtype])
    flat, count = np.array(g, np.int64), math.prod(g.y_shape)
    assert count * DTYPES[dtype].itemsize > 8 << 20
    guard = 64 // DTYPES[dtype].itemsize
    results = []
    for threads in (1, 3):
        for start in (0, 1):
            sepconv.set_num_threads(threads)
            buffer = np.full(count + 4 * guard, np.nan, DTYPES[dtype])
            begin = guard + (-buffer.ctypes.data % 64) // buffer.itemsize + start
            y = buffer[begin : begin + count]
            _native.forward(flat, x, *weights[:2], None, weights[2], y)
            assert np.isnan(buffer[:begin]).all()
            assert np.isnan(buffer[begin + count :]).all()
            results.append(y.tobytes())
    assert len(set(results)) == 1
    # The first rows do not see that the image goes on.
    rows = 8
    small = replace(problem, height=rows + 1)
    y_bound, _ = reference.error_bounds(
        small.geometry, dtype, small.arrays(DTYPES[dtype]).dy, x[:, : rows + 1], *weights
    )
    truth = reference.forward(small.geometry, x[:, : rows + 1], *weights)
    goldens.assert_within(y.reshape(g.y_shape)[:, :rows], truth[:, :rows], y_bound[:, :rows], "y")
    plan = _native.plan([*g], dtype, False)
    assert plan["output_past_caches"] == (activation == "relu6")


def test_results_do_not_depend_on_the_float_mode_of_the_caller():
    run_python(FLUSHING_CALLER)


# Every call runs in a child that has no thread of ours yet.
COUNT_THREADS = """
import os, sys, warnings
import numpy as np
import sepconv
from sepconv import _native
from test_native import THREADED

def threads_started_by(call):
    before = len(os.listdir("/proc/self/task"))
    sepconv.set_num_threads(5)
    call()
    return len(os.listdir("/proc/self/task")) - before

warnings.simplefilter("ignore", DeprecationWarning)  # That fork and threads are a bad mix.
for problem in THREADED:
    g, arrays = problem.geometry, problem.arrays(np.float32)
    flat, weights = np.array(g, np.int64), [arrays[i] for i in (1, 2, 4, 3)]
    y, dx = np.empty(g.y_shape, np.float32), np.empty(g.x_shape, np.float32)
    for call in (
        lambda: _native.forward(flat, arrays.x, *weights, y),
        lambda: _native.backward(
            flat, arrays.dy, arrays.x, *weights, None, dx, None, None, None, None
        ),
    ):
        child = os.fork()
        if child == 0:
            os._exit(threads_started_by(call))
        _, status = os.waitpid(child, 0)
        started = os.waitstatus_to_exitcode(status)
        assert 1 <= started <= 4, (started, problem)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads through /proc")
def test_the_problems_above_do_use_threads():
    run_python(COUNT_THREADS)


def run_python(code: str) -> None:
    """Runs code in a process of its own, beside the tests, and waits for a clean end.

    A child that waits for threads which it does not have would wait for ever.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", code]
    subprocess.run(command, env=environment, check=True, timeout=600)


@pytest.mark.usefixtures("restore_threads")
def test_concurrent_callers_get_their_own_results():
    sepconv.set_num_threads(3)
    inputs = [(problem.geometry, problem.arrays(np.float32)) for problem in THREADED[:4]]
    expected = [[array.tobytes() for array in flatten(run(g, "float32", a))] for g, a in inputs]
    received: dict[int, list[bytes]] = {}

    def call(caller: int) -> None:
        g, arrays = inputs[caller]
        for _ in range(5):
            received[caller] = [array.tobytes() for array in flatten(run(g, "float32", arrays))]
            if received[caller] != expected[caller]:
                return

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [received[caller] for caller in range(len(inputs))] == expected


def flatten(results: tuple[np.ndarray, reference.Gradients]) -> list[np.ndarray]:
    y, gradients = results
    return [array for array in (y, *gradients) if array is not None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_computes_with_threads_of_its_own():
    run_python(
        """
import os, sys, warnings
import numpy as np
import sepconv
from test_native import THREADED, flatten, run

sepconv.set_num_threads(3)
g, arrays = THREADED[0].geometry, THREADED[0].arrays(np.float32)
expected = [array.tobytes() for array in flatten(run(g, "float32", arrays))]
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # That fork and threads are a bad mix.
    child = os.fork()
received = [array.tobytes() for array in flatten(run(g, "float32", arrays))]
if child == 0:
    os._exit(0 if received == expected else 1)
_, status = os.waitpid(child, 0)
sys.exit(0 if received == expected and status == 0 else 1)
"""
    )


# ------------------------------------------------------------------------------------- the border


def test_the_border_refuses_what_would_corrupt_memory():
    problem = THREADED[0]
    g, arrays = problem.geometry, problem.arrays(np.float32)
    flat, y = np.array(g, np.int64), np.empty(g.y_shape, np.float32)
    x, kernel, pointwise, bias = arrays[:4]

    def forward(**changes: Any) -> None:
        call = {
            "geometry": flat,
            "x": x,
            "depthwise_kernel": kernel,
            "pointwise_kernel": pointwise,
            "depthwise_bias": None,
            "bias": bias,
            "y": y,
        }
        _native.forward(**(call | changes))

    forward()
    read_only = y.copy()
    read_only.flags.writeable = False
    unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    negative, huge = flat.copy(), flat.copy()
    negative[0], huge[1] = -1, 2**62
    refused = [
        ({"x": x[1:]}, ValueError, "`x` must have"),
        ({"y": y[:, :-1]}, ValueError, "`y` must have"),
        ({"y": read_only}, ValueError, "`y` must be writable"),
        ({"x": np.asfortranarray(x)}, ValueError, "`x` must be C-contiguous"),
        ({"x": unaligned}, ValueError, "`x` must be aligned"),
        ({"y": y.astype(np.float64)}, TypeError, "`y` must have the dtype of `x`"),
        ({"x": x.astype(np.int32)}, TypeError, "`x` must hold"),
        ({"x": object()}, TypeError, "`x` must be an array"),
        ({"bias": None}, ValueError, "`bias` must be an array exactly when"),
        ({"depthwise_bias": bias}, ValueError, "`depthwise_bias` must be an array exactly when"),
        ({"geometry": flat[:-1]}, ValueError, "`geometry` must have"),
        ({"geometry": flat.astype(np.int32)}, TypeError, "`geometry` must be int64"),
        ({"geometry": negative}, ValueError, "`batch` must be at least 0. Received: batch=-1"),
        ({"geometry": huge}, ValueError, "`in_height` must be at most"),
    ]
    for changes, exception, message in refused:
        y.fill(7.0)
        with pytest.raises(exception, match=message):
            forward(**changes)
        assert np.all(y == 7.0)


def test_a_target_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match=r"`name` must be .* Received: name=.sse9"):
        _native.set_target("sse9")
    with pytest.raises(ValueError, match="float8"):
        _native.tile_constants("float8")


@pytest.mark.parametrize("name", _native.available_targets())
def test_the_environment_forces_a_target(name, monkeypatch):
    monkeypatch.setenv("SEPCONV_TARGET", name)
    run_python(f"import sepconv; assert sepconv.cpu_target() == {name!r}")


def test_the_environment_cannot_force_a_target_that_does_not_run(monkeypatch):
    monkeypatch.setenv("SEPCONV_TARGET", "sse9")
    run_python(
        """
try:
    import sepconv._native
except ImportError as error:
    assert "`SEPCONV_TARGET` must name a target" in str(error)
    assert "Received: SEPCONV_TARGET=sse9" in str(error)
else:
    raise AssertionError("imported")
"""
    )


@pytest.mark.usefixtures("restore_threads")
def test_numbers_of_threads_are_checked(monkeypatch):
    for value, exception in (
        (-1, ValueError),
        (2**31, ValueError),
        (1.0, TypeError),
        (True, TypeError),
    ):
        with pytest.raises(exception, match=r"`num_threads` must be .* Received: num_threads="):
            sepconv.set_num_threads(value)
    sepconv.set_num_threads(np.int64(3))
    assert sepconv.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_python("import sepconv; assert sepconv.get_num_threads() == 7")
    monkeypatch.delenv("OMP_NUM_THREADS")
    run_python(
        """
import os, sepconv
sepconv.set_num_threads(9)
sepconv.set_num_threads(0)
limited = hasattr(os, "sched_getaffinity")
assert sepconv.get_num_threads() == (len(os.sched_getaffinity(0)) if limited else os.cpu_count())
"""
    )
