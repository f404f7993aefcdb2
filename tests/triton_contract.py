"""The GPU kernels against the reference; `test_triton.py` runs this file in processes of its own.

With TRITON_INTERPRET=1 the kernels run on the CPU, in Triton's interpreter, otherwise on a GPU.
SEPCONV_SHARD=i/n makes it the i-th part of n, since a GPU spends its time waiting for the compiler.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from dataclasses import replace
from typing import Any

import goldens
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Arrays, Problem, problems

from sepconv import ConvSpec, reference
from sepconv.spec import ACTIVATIONS
from sepconv.triton import launch, tuning

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Elements of NaN on both sides. An odd number of them keeps the compiler from assuming that
# addresses are multiples of 16 bytes; with 64 it may.
GUARDS = (64, 67)
# What NumPy, of which the interpreter consists, says of infinities that a GPU computes silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SHARD, SHARDS = map(int, os.environ.get("SEPCONV_SHARD", "0/1").split("/"))


def shard(cases: Any) -> list[Any]:
    return list(cases)[SHARD::SHARDS]


# Sums run in float32, and float32 is not cut to fewer bits before it is multiplied.
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.backends.cuda.matmul.fp32_precision = "ieee"
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@pytest.fixture
def tuned(monkeypatch):
    """`tuned(name=value)` puts other numbers or rules into the tuning, until the test ends."""

    def put(**names: Any) -> None:
        for name, value in names.items():
            monkeypatch.setattr(tuning, name, value)
        forget_plans()

    yield put
    monkeypatch.undo()
    forget_plans()


def forget_plans() -> None:
    for function in (*vars(tuning).values(), *vars(launch).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


# Stages are stored between kernels, as for layers with many filters.
WIDE_PATH = {"is_narrow": lambda *_: False, "forward_blocks": lambda *_: None}


def rules_of(path: str) -> dict[str, Any]:
    return WIDE_PATH if path == "wide" else {}


# As on a device of one multiprocessor: blocks as large as they get, and few of them.
SMALL_DEVICE = {"FUSED_WARPS": 8, "DEPTHWISE_WARPS": 16, "GRADIENT_WARPS": 32, "MATRIX_PROGRAMS": 2}


class Guarded:
    """Tensors cut out of larger ones that are NaN all around them."""

    def __init__(self, dtype: torch.dtype, guard: int) -> None:
        self.dtype, self.guard = dtype, guard
        self.buffers: list[torch.Tensor] = []

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of NaN: what the kernel does not write shows."""
        size = math.prod(shape)
        buffer = torch.full((size + 2 * self.guard,), math.nan, dtype=self.dtype, device=DEVICE)
        self.buffers.append(buffer)
        return buffer[self.guard : self.guard + size].view(shape)

    def copy(self, array: np.ndarray | None) -> torch.Tensor | None:
        if array is None:
            return None
        copied = self.empty(array.shape)
        copied.copy_(torch.from_numpy(array))
        return copied

    def check(self) -> None:
        for buffer in self.buffers:
            assert buffer[: self.guard].isnan().all(), "written before the tensor"
            assert buffer[-self.guard :].isnan().all(), "written behind the tensor"


def float64(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double().cpu().numpy()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).clone()


@functools.lru_cache(maxsize=64)
def drawn(problem: Problem, dtype: str) -> Arrays:
    """The arrays of a problem, whose values the dtype has."""
    made = problem.arrays(np.float64)
    return Arrays(
        *(
            None if array is None else float64(torch.from_numpy(array).to(DTYPES[dtype]))
            for array in made
        )
    )


@functools.lru_cache(maxsize=64)
def expected(problem: Problem, dtype: str) -> tuple[Any, ...]:
    """(y, gradients) of the reference, and their bounds."""
    g, arrays = problem.geometry, drawn(problem, dtype)
    bounds = reference.error_bounds(
        g, dtype, *arrays.backward, from_output=True, stages_stored=True
    )
    return (
        reference.forward(g, *arrays.forward),
        reference.backward(g, *arrays.backward),
        *bounds,
    )


class Call:
    """A problem on guarded tensors."""

    def __init__(self, problem: Problem, dtype: str, guard: int = GUARDS[1]) -> None:
        self.g = problem.geometry
        self.guarded = Guarded(DTYPES[dtype], guard)
        arrays = drawn(problem, dtype)
        self.inputs = [self.guarded.copy(array) for array in arrays]
        self.before = [None if t is None else bits(t) for t in self.inputs]
        x, kernel, pointwise, bias, between, self.dy = self.inputs
        self.operands = (x, kernel, pointwise, between, bias)  # In the order of the kernels.
        self.flat = np.array(self.g, np.int64)

    def forward(self) -> torch.Tensor:
        y = self.guarded.empty(self.g.y_shape)
        launch.forward(self.flat, *self.operands, y)
        self._check()
        return y

    def backward(
        self, y: torch.Tensor | None, wanted: tuple[int, ...] = (0, 1, 2, 3, 4)
    ) -> list[torch.Tensor | None]:
        """Gradients of the operands at these positions."""
        gradients = [
            self.guarded.empty(operand.shape) if operand is not None and i in wanted else None
            for i, operand in enumerate(self.operands)
        ]
        launch.backward(self.flat, self.dy, *self.operands, y, *gradients)
        self._check()
        return gradients

    def _check(self) -> None:
        self.guarded.check()
        for before, after in zip(self.before, self.inputs, strict=True):
            assert before is None or torch.equal(before, bits(after)), "an input was written"


def in_kernel_order(gradients: reference.Gradients) -> tuple[Any, ...]:
    dx, d_kernel, d_pointwise, d_bias, d_between = gradients
    return dx, d_kernel, d_pointwise, d_between, d_bias


NAMES = ("dx", "d_depthwise_kernel", "d_pointwise_kernel", "d_depthwise_bias", "d_bias")


def check_gradients(problem: Problem, dtype: str, gradients: Any) -> None:
    _, true, _, bounds = expected(problem, dtype)
    for name, gradient, value, bound in zip(
        NAMES, gradients, in_kernel_order(true), in_kernel_order(bounds), strict=True
    ):
        if gradient is not None:
            goldens.assert_within(float64(gradient), value, bound, name)


def check(problem: Problem, dtype: str, pass_output: bool = True) -> None:
    """Output and all gradients are within the bounds, and written completely."""
    call = Call(problem, dtype, GUARDS[problem.seed % 2])
    y = call.forward()
    true, _, bound, _ = expected(problem, dtype)
    goldens.assert_within(float64(y), true, bound, "y")
    check_gradients(problem, dtype, call.backward(y if pass_output else None))


def of(
    channels: int = 3,
    filters: int = 5,
    size: tuple[int, int] = (7, 6),
    kernel: tuple[int, int] = (3, 3),
    multiplier: int = 1,
    batch: int = 2,
    biases: tuple[bool, bool] = (False, True),
    seed: int = 0,
    **arguments: Any,
) -> Problem:
    return Problem(
        spec=ConvSpec(**{"padding": "same", **arguments}),
        batch=batch,
        height=size[0],
        width=size[1],
        channels=channels,
        depth_multiplier=multiplier,
        kernel_size=kernel,
        filters=filters,
        use_depthwise_bias=biases[0],
        use_bias=biases[1],
        seed=seed,
    )


# ----------------------------------------------------------------------------------------- options

OPTIONS = {
    "plain": of(),
    "no biases": of(biases=(False, False)),
    "both biases": of(biases=(True, True), seed=1),
    "valid": of(padding="valid"),
    "padding of each side": of(padding=((2, 1), (0, 3)), seed=1),
    "strides": of(strides=2, size=(8, 7)),
    "unequal strides": of(strides=(1, 3), size=(6, 11), seed=1),
    "strides beyond the kernel": of(strides=(4, 3), kernel=(2, 2), size=(9, 8)),
    "dilation": of(dilation_rate=2, size=(9, 8), seed=1),
    "unequal dilation": of(dilation_rate=(1, 3), size=(6, 9)),
    "strides with dilation": of(strides=(2, 1), dilation_rate=(2, 3), size=(9, 11), seed=1),
    "1x1 kernel": of(kernel=(1, 1)),
    "unequal kernel": of(kernel=(2, 5), seed=1),
    "kernel beyond the image": of(kernel=(5, 4), size=(2, 3)),
    "multiplier": of(multiplier=3, biases=(True, True)),
    "multiplier with strides": of(multiplier=2, strides=2, seed=1),
    "1x1 image": of(size=(1, 1)),
    "one row": of(size=(1, 19), seed=1),
    "one channel, one filter": of(channels=1, filters=1, batch=1),
    "25 taps": of(kernel=(5, 5), size=(8, 9), seed=1),
}
LAYOUTS = ("channels_last", "channels_first")
PATHS = ("narrow", "wide")


def laid_out(problem: Problem, layout: str) -> Problem:
    return replace(problem, spec=replace(problem.spec, data_format=layout))


def option_cases():
    """Every option twice; dtypes take turns."""
    for i, (option, j) in enumerate(itertools.product(OPTIONS, range(2))):
        # An option meets both layouts and both paths; the next one meets them the other way round.
        layout, path = LAYOUTS[j], PATHS[(j + i // 2) % 2]
        dtype = list(DTYPES)[(i + i // 6) % 3]
        yield pytest.param(option, layout, path, dtype, id=f"{option}-{layout}-{path}-{dtype}")


@pytest.mark.parametrize(("option", "layout", "path", "dtype"), shard(option_cases()))
def test_options(option, layout, path, dtype, tuned):
    tuned(**rules_of(path))
    check(laid_out(OPTIONS[option], layout), dtype)


def activation_cases():
    for i, name in enumerate(ACTIVATIONS[1:]):
        for j, stage in enumerate(("input_activation", "depthwise_activation", "activation")):
            yield stage, name, list(DTYPES)[(i + j) % 3], PATHS[(i + j) % 2], (i + j) % 4 != 3


@pytest.mark.parametrize(
    ("stage", "name", "dtype", "path", "pass_output"), shard(activation_cases())
)
def test_activations(stage, name, dtype, path, pass_output, tuned):
    tuned(**rules_of(path))
    check(of(biases=(True, True), **{stage: name}), dtype, pass_output)


@pytest.mark.parametrize("path", shard(PATHS))
def test_all_activations_at_once(path, tuned):
    tuned(**rules_of(path))
    names = {"input_activation": "gelu", "depthwise_activation": "elu", "activation": "hard_silu"}
    for dtype, layout in zip(DTYPES, (*LAYOUTS, LAYOUTS[0]), strict=True):
        check(laid_out(of(biases=(True, True), strides=(2, 1), **names), layout), dtype)


@pytest.mark.parametrize("name", shard(ACTIVATIONS))
def test_activations_of_what_is_not_small(name):
    # Also: no number, infinities, and what exp makes infinity or nothing of.
    x = torch.tensor(
        [math.nan, math.inf, -math.inf, 1e30, -1e30, 200.0, -200.0, 88.9, -88.9, -103.0, 0.0, -0.0]
    )
    x = x.to(DEVICE).view(-1, 1, 1, 1)
    one, y = torch.ones(1, 1, 1, 1, device=DEVICE), torch.full_like(x, 7.0)
    g = ConvSpec(activation=name).resolve(x.shape, one.shape, one.shape)
    with np.errstate(all="ignore"):
        launch.forward(np.array(g, np.int64), x, one, one, None, None, y)
        value = reference.ACTIVATION_TABLE[name].value(float64(x))
    # -inf * 0 is what the formula says, and 0 what is meant.
    limits = {"silu": 0.0, "gelu": 0.0, "hard_silu": 0.0}
    value[2] = limits.get(name, value[2])
    infinite = ~np.isfinite(value)
    found = float64(y)
    np.testing.assert_array_equal(found[infinite & np.isnan(value)], np.nan)
    if name in limits:  # A kernel may follow the formula.
        infinite[2], found[2] = False, np.nan_to_num(found[2])
    np.testing.assert_array_equal(found[infinite], value[infinite])
    # An exp that is too small for a normal number may be multiplied by x.
    allowed = 1e-5 * np.abs(value) + 2.0**-126 * (1.0 + np.abs(float64(x)))
    goldens.assert_within(found[~infinite], value[~infinite], allowed[~infinite], name)


# ------------------------------------------------------------------------------------------- sizes

SIZES = {
    # One more and one less than the blocks have.
    "pixels": of(channels=2, filters=3, size=(5, 13), batch=2),
    "rows longer than a tile": of(channels=2, filters=3, size=(3, 70), batch=1),
    "rectangles": of(channels=2, filters=2, size=(34, 35), batch=1),
    "channels 33": of(channels=33, filters=3, size=(3, 4), batch=1),
    "channels 65": of(channels=65, filters=17, size=(2, 3), batch=1, seed=1),
    "filters 129": of(channels=3, filters=129, size=(2, 3), batch=1),
    "filters 257": of(channels=17, filters=257, size=(2, 3), batch=1, seed=1),
    "multiplier over blocks": of(channels=11, multiplier=3, filters=2, size=(2, 3), batch=1),
    "49 taps": of(channels=2, filters=2, kernel=(7, 7), size=(4, 5), batch=1),
    "taps in groups": of(channels=2, filters=2, kernel=(8, 8), size=(3, 4), batch=1, seed=1),
    "slabs": of(channels=1, filters=2, size=(23, 24), batch=4),
}


def size_cases():
    for i, (size, path) in enumerate(itertools.product(SIZES, PATHS)):
        yield size, LAYOUTS[i // 2 % 2], path, list(DTYPES)[(i + i // 2) % 3]


@pytest.mark.parametrize(("size", "layout", "path", "dtype"), shard(size_cases()))
def test_sizes_around_those_of_blocks(size, layout, path, dtype, tuned):
    tuned(**rules_of(path), **SMALL_DEVICE)
    check(laid_out(SIZES[size], layout), dtype)


@pytest.mark.parametrize(("layout", "path"), shard(itertools.product(LAYOUTS, PATHS)))
def test_addresses_of_64_bits(layout, path, tuned, monkeypatch):
    monkeypatch.setattr(launch, "_is_wide", lambda *_: True)
    tuned(**rules_of(path))
    check(laid_out(of(strides=(2, 1), multiplier=2, activation="relu"), layout), "float32")


def test_addresses_are_wide_where_sizes_are():
    narrow = of().geometry
    assert not launch._is_wide(narrow)
    for change in (
        {"batch": 2**25},
        {"in_height": 2**14, "in_width": 2**16},
        {"out_channels": 2**27},
        {"in_channels": 2**15, "out_channels": 2**16},
    ):
        assert launch._is_wide(narrow._replace(**change)), change


# -------------------------------------------------------------------------------- what is asked for

SUBSETS = of(
    channels=2, filters=3, size=(3, 4), batch=1, biases=(True, True), depthwise_activation="tanh",
    activation="relu6",
)  # fmt: skip


@pytest.mark.parametrize("path", shard(PATHS))
def test_any_subset_of_gradients(path, tuned):
    tuned(**rules_of(path))
    call = Call(SUBSETS, "float32")
    y = call.forward()
    # None, each alone, pairs, and each left out.
    for size in (0, 1, 2, 4):
        for wanted in itertools.combinations(range(5), size):
            gradients = call.backward(y, wanted)
            assert [i for i, gradient in enumerate(gradients) if gradient is not None] == [*wanted]
            check_gradients(SUBSETS, "float32", gradients)


@pytest.mark.parametrize("path", shard(PATHS))
def test_nothing_to_compute(path, tuned):
    tuned(**rules_of(path))
    for problem in (
        of(batch=0, biases=(True, True)),
        of(size=(2, 2), padding="valid", biases=(True, True)),  # No output pixels.
    ):
        call = Call(problem, "bfloat16")
        assert call.forward().numel() == 0
        for gradient in call.backward(None):
            assert not gradient.any()


@pytest.mark.parametrize(("path", "dtype"), shard(itertools.product(PATHS, DTYPES)))
def test_results_are_the_same_to_the_bit(path, dtype, tuned):
    tuned(**rules_of(path), **SMALL_DEVICE)
    problem = replace(SIZES["slabs"], use_depthwise_bias=True)
    first, second = (Call(problem, dtype, guard) for guard in GUARDS)
    y, again = first.forward(), second.forward()
    assert torch.equal(bits(y), bits(again))
    for one, other in zip(first.backward(y), second.backward(again), strict=True):
        assert torch.equal(bits(one), bits(other))


# ------------------------------------------------------------------------------- problems at random

# A kernel in the interpreter takes milliseconds, one for a GPU seconds to be compiled.
RANDOM_EXAMPLES = 8 if INTERPRETED else 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_problem(dtype):
    @settings(
        max_examples=RANDOM_EXAMPLES,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize=SHARDS == 1,
    )
    @given(problem=problems(), pass_output=st.booleans(), path=st.sampled_from(PATHS))
    def agrees(problem, pass_output, path):
        with pytest.MonkeyPatch.context() as here:
            for name, rule in rules_of(path).items():
                here.setattr(tuning, name, rule)
            forget_plans()
            check(problem, dtype, pass_output)

    try:
        agrees()
    finally:
        forget_plans()


# --------------------------------------------------------------------------------------- large ones

LARGE = {
    # More pixels, channels and filters than any block has; the paths are those that tuning takes.
    "112x112x32-64": of(32, 64, (112, 112), batch=8),
    "56x56x128-128 s2": of(128, 128, (56, 56), batch=8, strides=2),
    "19x19x728-728": of(728, 728, (19, 19), batch=2),
    "7x7x1024-1024": of(1024, 1024, (7, 7), batch=3, activation="relu"),
    "33x33x256-80 d6": of(256, 80, (33, 33), batch=2, dilation_rate=6, biases=(True, True)),
    "14x14x480-112 k5": of(480, 112, (14, 14), (5, 5), batch=3, depthwise_activation="silu"),
}


def large_cases():
    for i, (name, layout) in enumerate(itertools.product(LARGE, LAYOUTS)):
        yield name, layout, list(DTYPES)[(i + i // 2) % 3]


@pytest.mark.skipif(INTERPRETED, reason="takes minutes in the interpreter")
@pytest.mark.parametrize(("name", "layout", "dtype"), shard(large_cases()))
def test_large_sizes(name, layout, dtype):
    check(laid_out(LARGE[name], layout), dtype)


@pytest.mark.skipif(INTERPRETED, reason="takes gigabytes")
@pytest.mark.parametrize("layout", shard(LAYOUTS))
def test_more_elements_than_32_bits_count(layout):
    # The last image against the same image alone.
    channels, size = 32, 1024
    batch = 2**31 // (channels * size * size) + 1
    if torch.cuda.mem_get_info()[0] < 3 * 2 * batch * channels * size * size:
        pytest.skip("the GPU has too little memory")
    problem = laid_out(of(channels, channels, (size, size), batch=1, biases=(True, True)), layout)
    alone = Call(problem, "bfloat16", GUARDS[0])
    y = alone.forward()
    x, *weights = alone.operands
    many = torch.zeros((batch, *x.shape[1:]), dtype=x.dtype, device=DEVICE)
    many[-1] = x[0]
    g = alone.g._replace(batch=batch)
    ys = torch.empty(g.y_shape, dtype=x.dtype, device=DEVICE)
    launch.forward(np.array(g, np.int64), many, *weights, ys)
    assert torch.equal(ys[-1], y[0])
    dys = torch.zeros_like(ys)
    dys[-1] = alone.dy[0]
    dxs, dx = torch.empty_like(many), torch.empty_like(x)
    nothing = (None,) * 4
    launch.backward(np.array(g, np.int64), dys, many, *weights, ys, dxs, *nothing)
    launch.backward(alone.flat, alone.dy, x, *weights, y, dx, *nothing)
    assert torch.equal(dxs[-1], dx[0])
