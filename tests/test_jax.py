"""The JAX door: values, derivatives of every order, transformations, and what it compiles to."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.test_util import check_grads
from strategies import KINDS, Problem, odd_problem, problems, small_problem

import sepconv.jax
from sepconv import ConvSpec, _native, reference
from sepconv.jax import separable_conv2d, why_not
from sepconv.spec import ACTIVATIONS

CALLS = ("sepconv_forward", "sepconv_backward")
OUTSIDE_ACTIVATIONS = {
    "softplus": jax.nn.softplus,
    "softmax": jax.nn.softmax,
    "hard_sigmoid": lambda z: jnp.clip(0.2 * z + 0.5, 0.0, 1.0),
}


@pytest.fixture(autouse=True, scope="module")
def settings_of_jax() -> Iterator[None]:
    # Most of the time here goes into compiling.
    for name in ("jax_enable_x64", "jax_disable_most_optimizations"):
        jax.config.update(name, True)
    yield
    for name in ("jax_enable_x64", "jax_disable_most_optimizations"):
        jax.config.update(name, False)


@pytest.fixture
def with_optimizations() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def prepared(problem: Problem, dtype: Any = np.float64) -> tuple[Any, list[Any], Any]:
    """A function of the arrays that the problem has, these arrays, and an upstream gradient.

    The order is x, depthwise_kernel, pointwise_kernel, bias, depthwise_bias.
    """
    *arrays, dy = problem.arrays(dtype)
    present = [array for array in arrays if array is not None]

    def function(x: Any, kernel: Any, pointwise: Any, *biases: Any) -> Any:
        rest = list(biases)
        bias = rest.pop(0) if problem.use_bias else None
        between = rest.pop(0) if problem.use_depthwise_bias else None
        return separable_conv2d(
            x, kernel, pointwise, bias, depthwise_bias=between, **problem.spec_kwargs
        )

    return function, [jnp.asarray(array) for array in present], jnp.asarray(dy)


def by_jax(problem: Problem) -> Any:
    """The same function by JAX's own convolutions."""

    def function(x: Any, kernel: Any, pointwise: Any, *biases: Any) -> Any:
        # The door has the bias first, the operands have it last.
        return sepconv.jax._composition(problem.geometry, x, kernel, pointwise, *biases[::-1])

    return function


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    ours, theirs = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        scale = max(1.0, float(jnp.abs(other).max(initial=0.0)))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def compiled(function: Any, *args: Any) -> tuple[int, int, int]:
    """How many custom calls forward, backward, and convolutions of XLA a function compiles to."""
    text = jax.jit(function).lower(*args).compile().as_text()
    counts = [text.count(f'custom_call_target="{name}"') for name in CALLS]
    return (*counts, text.count(" convolution("))


def weighed(function: Any, dy: Any) -> Any:
    """A scalar of the output that is not linear in it."""
    return lambda *args: jnp.sum(dy * jnp.sin(function(*args)))


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("case", goldens.load_cases(), ids=goldens.case_ids)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_goldens(dtype, case):
    arguments = dict(case.spec_kwargs)
    if case.outside_activation is not None:
        arguments["activation"] = OUTSIDE_ACTIVATIONS[case.outside_activation]
    inputs = [array for array in case.inputs(dtype) if array is not None]

    @jax.jit
    def value_and_gradients(dy: Any, *args: Any) -> tuple[Any, Any]:
        y, pullback = jax.vjp(partial(separable_conv2d, **arguments), *args)
        return y, pullback(dy)

    y, gradients = value_and_gradients(case.upstream(dtype), *inputs)
    assert y.dtype == dtype
    goldens.check(case, dtype, y, gradients)


@settings(max_examples=10)
@given(problem=problems())
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_door_agrees_with_the_reference(dtype, problem):
    g, arrays = problem.geometry, problem.arrays(dtype)
    function, args, dy = prepared(problem, dtype)
    y, pullback = jax.vjp(function, *args)
    y_bound, bounds = reference.error_bounds(g, dtype, *arrays.backward, from_output=True)
    assert y.dtype == dtype
    goldens.assert_within(y, reference.forward(g, *arrays.forward), y_bound, "y")
    true = reference.backward(g, *arrays.backward)
    present = [(name, *pair) for name, *pair in zip(true._fields, true, bounds, strict=True)]
    present = [row for row in present if row[1] is not None]
    for gradient, (name, expected, bound) in zip(pullback(dy), present, strict=True):
        assert gradient.dtype == dtype
        goldens.assert_within(gradient, expected, bound, name)


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "same", "data_format": "channels_first"},
        {"padding": ((0, 3), (4, 1)), "dilation_rate": (2, 1), "strides": (2, 3)},
        {"strides": (4, 4), "activation": "hard_silu"},  # Ends before the input does.
        {"input_activation": "relu6", "depthwise_activation": "elu", "activation": "hard_sigmoid"},
    ],
)
def test_composition_of_jax_agrees_with_the_reference(arguments):
    problem = odd_problem(**arguments)
    g, arrays = problem.geometry, problem.arrays(np.float64)
    _, args, dy = prepared(problem)
    y, pullback = jax.vjp(by_jax(problem), *args)
    assert_close(y, reference.forward(g, *arrays.forward), 1e-12)
    assert_close(pullback(dy), tuple(reference.backward(g, *arrays.backward)), 1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_at_kinks_are_those_of_the_reference(activation):
    # The derivative of order two passes through JAX's form of the activation.
    kinks = jnp.array([-3.0, 0.0, 3.0, 6.0]).reshape(1, 1, 4, 1)
    one = jnp.ones((1, 1, 1, 1))
    tangent = jax.jvp(
        lambda x: separable_conv2d(x, one, one, activation=activation), [kinks], [one * kinks**0]
    )[1]
    expected = reference.ACTIVATION_TABLE[activation].slope(np.asarray(kinks))
    assert_close(tangent, expected, 1e-14)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("channels", "filters", "side"), [(48, 40, 12), (2048, 16, 5), (16, 2048, 5)]
)
def test_error_in_float32_is_at_most_twice_that_of_jax(
    channels, filters, side, data_format, with_optimizations
):
    # Root mean squares: the largest error of thousands is a matter of one rounding. Where JAX cuts
    # a sum into two chains and the kernel does not, they are 1.4 times its own, and the largest
    # errors of a few images up to 3 times.
    squares, largest = np.zeros((2, 5)), np.zeros((2, 5))
    for seed in range(4):
        problem = Problem(
            spec=ConvSpec(padding="same", data_format=data_format, activation="silu"),
            batch=2,
            height=side,
            width=side - 1,
            channels=channels,
            depth_multiplier=1,
            kernel_size=(3, 3),
            filters=filters,
            seed=seed,
        )
        g, arrays = problem.geometry, problem.arrays(np.float32)
        ours, args, dy = prepared(problem, np.float32)
        true = [reference.forward(g, *arrays.forward), *reference.backward(g, *arrays.backward)[:4]]
        for row, function in enumerate((ours, by_jax(problem))):
            y, pullback = jax.vjp(function, *args)
            for column, (value, exact) in enumerate(zip((y, *pullback(dy)), true, strict=True)):
                errors = np.abs(np.asarray(value, np.float64) - exact)
                squares[row, column] += np.square(errors).mean()
                largest[row, column] = max(largest[row, column], errors.max())
    assert (squares[0] <= 4 * squares[1]).all(), np.sqrt(squares)
    assert (largest[0] <= 4 * largest[1]).all(), largest


@pytest.mark.parametrize("shape", [(0, 4, 4, 2), (2, 1, 4, 2), (0, 1, 1, 2)])
def test_empty_outputs_have_a_shape_and_zero_gradients(shape):
    kernels = jnp.ones((2, 2, 2, 1)), jnp.ones((1, 1, 2, 3)), jnp.ones(3)
    function = partial(separable_conv2d, activation="relu")
    y, pullback = jax.vjp(function, jnp.ones(shape), *kernels)
    assert y.shape == (shape[0], shape[1] - 1, shape[2] - 1, 3)
    for gradient, array in zip(pullback(y), (jnp.ones(shape), *kernels), strict=True):
        assert_close(gradient, jnp.zeros_like(array), 0.0)


# ------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_agree_with_finite_differences(kind):
    function, args, _ = prepared(small_problem(**KINDS[kind]))
    check_grads(jax.jit(function), args, order=1, modes=("fwd", "rev"), atol=1e-7, rtol=1e-7)
    check_grads(jax.jit(function), args, order=2, modes=("rev",), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("order", ["reverse-reverse", "forward-reverse", "reverse-forward"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_agree_with_those_of_jax(kind, order):
    problem = small_problem(**KINDS[kind])
    ours, args, dy = prepared(problem)
    every = tuple(range(len(args)))
    directions = tuple(jnp.cos(3.0 * array) for array in args)

    def second(function: Any) -> Any:
        scalar = weighed(function, dy)
        gradient = jax.grad(scalar, every)
        along = lambda *args: sum(  # noqa: E731
            jnp.vdot(one, other) for one, other in zip(gradient(*args), directions, strict=True)
        )
        if order == "reverse-reverse":
            return jax.jit(jax.grad(along, every))(*args)
        if order == "forward-reverse":
            return jax.jit(lambda *args: jax.jvp(gradient, args, directions)[1])(*args)
        tangent = lambda *args: jax.jvp(scalar, args, directions)[1]  # noqa: E731
        return jax.jit(jax.grad(tangent, every))(*args)

    assert_close(second(ours), second(by_jax(problem)))


def test_third_derivatives_agree_with_those_of_jax():
    problem = small_problem(activation="tanh")
    ours, args, dy = prepared(problem)
    x, kernel, pointwise = args

    def third(function: Any) -> Any:
        scalar = lambda t: weighed(function, dy)(x * t, kernel * t, pointwise + t)  # noqa: E731
        return jax.jit(jax.grad(jax.grad(jax.grad(scalar))))(1.1)

    assert_close(third(ours), third(by_jax(problem)))


@pytest.mark.parametrize("transformation", [jax.jacfwd, jax.jacrev, jax.hessian])
def test_jacobians_and_hessians(transformation):
    problem = small_problem(activation="tanh", use_bias=True)
    ours, args, dy = prepared(problem)
    args[0] = args[0][:1, :2, :2]
    smaller = Problem(**{**vars(problem), "batch": 1, "height": 2, "width": 2})
    for position in range(len(args)):
        results = []
        for function in (ours, by_jax(smaller)):
            target = function
            if transformation is jax.hessian:
                target = weighed(function, dy[:1, :2, :1])
            results.append(jax.jit(transformation(target, position))(*args))
        assert_close(*results)


def test_linear_transpose_of_a_linear_call():
    problem = small_problem()
    function, (x, kernel, pointwise), dy = prepared(problem)
    (ours,) = jax.linear_transpose(lambda x: function(x, kernel, pointwise), x)(dy)
    assert_close(ours, jax.vjp(lambda x: function(x, kernel, pointwise), x)[1](dy)[0])
    relu = partial(separable_conv2d, activation="relu")
    with pytest.raises(NotImplementedError, match="is not linear"):
        jax.linear_transpose(lambda x: relu(x, kernel, pointwise), x)(jnp.ones((2, 2, 2, 3)))


# ---------------------------------------------------------------------------- other transformations


# Positions among x, depthwise_kernel, pointwise_kernel and bias.
@pytest.mark.parametrize("mapped", [{0}, {1}, {3}, {0, 2}, {0, 3}, {0, 1, 2, 3}])
def test_vmap_is_a_loop(mapped):
    function, args, dy = prepared(small_problem(activation="tanh", use_bias=True))
    axes = [(1 if i == 0 else 0) if i in mapped else None for i in range(4)]
    scales = (1.0, -0.5, 2.0)
    stacked = [
        array if axis is None else jnp.stack([array * scale for scale in scales], axis)
        for array, axis in zip(args, axes, strict=True)
    ]

    def sliced(args: Any, i: int) -> Any:
        pairs = zip(args, axes, strict=True)
        return [array if axis is None else jnp.take(array, i, axis) for array, axis in pairs]

    def values_and_gradients(*args: Any) -> Any:
        y, pullback = jax.vjp(function, *args)
        return y, pullback(dy * y)

    looped = [values_and_gradients(*sliced(stacked, i)) for i in range(len(scales))]
    looped = jax.tree.map(lambda *each: jnp.stack(each), *looped)
    assert_close(jax.jit(jax.vmap(values_and_gradients, axes))(*stacked), looped)

    def total(*args: Any) -> Any:
        return sum(jnp.sum(dy * function(*sliced(args, i)) ** 2) for i in range(len(scales)))

    mapped_total = lambda *args: jnp.sum(dy * jax.vmap(function, axes)(*args) ** 2)  # noqa: E731
    every = tuple(range(4))
    assert_close(jax.jit(jax.grad(mapped_total, every))(*stacked), jax.grad(total, every)(*stacked))


def test_vmap_of_the_input_is_one_call():
    function, (x, *weights), _ = prepared(small_problem(activation="relu", use_bias=True))
    many = jnp.stack([x, x, x])
    mapped = jax.vmap(lambda x: function(x, *weights))
    assert compiled(mapped, many) == (1, 0, 0)
    assert compiled(jax.grad(lambda x: mapped(x).sum()), many) == (1, 1, 0)


def test_scan_and_checkpoint():
    problem = Problem(
        spec=ConvSpec(padding="same", activation="tanh"),
        batch=2,
        height=4,
        width=4,
        channels=3,
        depth_multiplier=1,
        kernel_size=(3, 3),
        filters=3,
    )
    ours, args, dy = prepared(problem)

    def gradient(function: Any) -> Any:
        def loss(x: Any, *weights: Any) -> Any:
            step = jax.checkpoint(lambda carry, _: (function(carry, *weights), None))
            return jnp.sum(dy * jax.lax.scan(step, x, None, length=3)[0])

        return jax.jit(jax.grad(loss, tuple(range(4))))(*args)

    assert_close(gradient(ours), gradient(by_jax(problem)))


def test_without_jit_and_without_values():
    function, args, _ = prepared(small_problem(activation="silu", use_bias=True))
    gradient = jax.grad(lambda *args: function(*args).sum(), (0, 1, 2, 3))
    jitted = jax.jit(gradient)(*args)
    with jax.disable_jit():
        assert_close(gradient(*args), jitted)
    out = jax.eval_shape(function, *args)
    assert (out.shape, out.dtype) == ((2, 3, 2, 3), jnp.float64)


MULTIPLE_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sepconv.jax import separable_conv2d
rng = np.random.default_rng(0)
x, kernel, pointwise, bias = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in [(4, 5, 6, 3), (3, 3, 3, 1), (1, 1, 3, 4), (4,)]
)
def function(*args):
    return separable_conv2d(*args, padding="same", activation="tanh")
def gradients(function):
    return jax.jit(jax.grad(lambda *args: jnp.sum(function(*args) ** 2), (0, 1, 2, 3)))
def assert_close(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
args = x, kernel, pointwise, bias
y, expected = function(*args), gradients(function)(*args)
assert jax.device_count() == 2
mesh = Mesh(np.array(jax.devices()), ("data",))
for check_vma in (True, False):
    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=(P("data"), P(), P(), P()), out_specs=P("data"),
        check_vma=check_vma,
    )
    assert_close(sharded(*args), y)
    assert_close(gradients(sharded)(*args), expected)
    text = gradients(sharded).lower(*args).compile().as_text()
    assert text.count('custom_call_target="sepconv_backward"') == 1 and "convolution(" not in text
# Gradients of replicated weights inside the shards are summed over them.
inside = jax.shard_map(
    jax.grad(lambda *args: jnp.sum(function(*args) ** 2), (1, 2, 3)), mesh=mesh,
    in_specs=(P("data"), P(), P(), P()), out_specs=P(),
)
assert_close(jax.jit(inside)(*args), expected[1:])
# jit over sharded arrays.
spread = jax.device_put(x, NamedSharding(mesh, P("data")))
assert_close(gradients(function)(spread, *args[1:]), expected)
pairs = x.reshape(2, 2, *x.shape[1:])
mapped = jax.pmap(function, in_axes=(0, None, None, None))
assert_close(mapped(pairs, *args[1:]), y.reshape(2, 2, *y.shape[1:]))
"""


def test_several_devices():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run(
        [sys.executable, "-W", "error", "-c", MULTIPLE_DEVICES], env=environment, check=True
    )


# --------------------------------------------------------------------------------- what is compiled


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_training_step_is_one_call_forward_and_one_backward(
    activation, data_format, with_optimizations
):
    problem = small_problem(activation=activation, data_format=data_format, use_bias=True)
    function, args, dy = prepared(problem, np.float32)
    assert compiled(function, *args) == (1, 0, 0)
    loss = weighed(function, dy)
    every = tuple(range(len(args)))
    assert compiled(jax.value_and_grad(loss, every), *args) == (1, 1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_need_no_convolution_of_jax(kind, with_optimizations):
    function, args, dy = prepared(small_problem(**KINDS[kind]))
    every = tuple(range(len(args)))
    gradient = jax.grad(weighed(function, dy), every)
    second = jax.grad(lambda *args: sum(jnp.sum(g**2) for g in gradient(*args)), every)
    convolutions = compiled(second, *args)[2]
    assert (convolutions > 0) == (kind == "between")


def equations(jaxpr: Any, primitive: str) -> list[Any]:
    return [equation for equation in jaxpr.eqns if equation.primitive.name == primitive]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_is_saved_only_where_the_slope_follows_from_it(activation):
    function, args, dy = prepared(small_problem(activation=activation, use_bias=True))
    jaxpr = jax.make_jaxpr(jax.grad(weighed(function, dy), (0, 1, 2, 3)))(*args).jaxpr
    (forward,), (backward,) = (equations(jaxpr, name) for name in CALLS)
    saved = forward.outvars[0] in backward.invars
    follows = _native.slope_follows_from_output(ACTIVATIONS.index(activation))
    assert saved == (activation != "linear" and follows)
    # dy, x, both kernels, bias: nothing else is kept, least of all the depthwise output.
    assert len(backward.invars) == 5 + saved


def test_only_the_gradients_that_are_needed_are_computed():
    function, args, dy = prepared(small_problem(activation="relu", use_bias=True))
    jaxpr = jax.make_jaxpr(jax.grad(weighed(function, dy), (1, 3)))(*args).jaxpr
    (backward,) = equations(jaxpr, "sepconv_backward")
    assert [v.aval.shape for v in backward.outvars] == [args[1].shape, args[3].shape]


def test_other_platforms_get_the_convolutions_of_jax():
    function, args, dy = prepared(small_problem(activation="relu", use_bias=True), np.float32)
    traced = jax.jit(jax.value_and_grad(weighed(function, dy), (0, 1, 2, 3))).trace(*args)
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.convolution" in text
        assert "sepconv_" not in text.replace("@sepconv_", "")
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.convolution" not in text
    assert all(f"@{name}" in text for name in CALLS)


def test_a_symbolic_batch_gets_the_convolutions_of_jax():
    problem = small_problem(activation="relu", use_bias=True)
    function, (x, *weights), _ = prepared(problem)
    batch = jax.export.symbolic_shape("b, 3, 4, 2")
    spec = jax.ShapeDtypeStruct(batch, x.dtype)
    exported = jax.export.export(jax.jit(lambda x: function(x, *weights)))(spec)
    assert exported.out_avals[0].shape[1:] == (3, 2, 3)
    assert_close(exported.call(x), function(x, *weights))
    reasons = []
    jax.eval_shape(lambda x: reasons.append(why_not(x, *weights, padding="same")) or x, spec)
    assert "symbolic" in reasons[0]


# ----------------------------------------------------------------------------- arguments and errors


def test_why_not():
    _, args, _ = prepared(small_problem())
    arguments = {"padding": "same"}
    assert why_not(*args, **arguments) is None
    assert why_not(*args, activation=jnp.sin) is None
    float8 = [array.astype(jnp.float8_e4m3fn) for array in args]
    assert "float8_e4m3fn" in why_not(*float8, **arguments)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in args]
    assert why_not(*shapes, **arguments) is None
    with pytest.raises(ValueError, match="`strides` must be"):
        why_not(*args, strides=0)


def test_why_not_on_another_platform(monkeypatch):
    _, args, _ = prepared(small_problem())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "'gpu'" in why_not(*[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args])
    assert why_not(*args) is None  # These arrays are on the CPU.


def test_without_handlers_jax_computes_and_why_not_says_so(monkeypatch):
    problem = small_problem(activation="tanh", use_bias=True)
    function, args, dy = prepared(problem)
    expected = jax.grad(weighed(function, dy))(*args)
    monkeypatch.setattr(sepconv.jax, "_REGISTRATION_FAULT", "no handlers")
    fresh = jax.jit(lambda *args: jax.grad(weighed(function, dy))(*args))
    assert compiled(fresh, *args)[:2] == (0, 0)
    assert_close(fresh(*args), expected)
    assert why_not(*args, **problem.spec_kwargs) == "no handlers"


@pytest.mark.parametrize("missing", ["headers", "version"])
def test_handlers_that_xla_would_choke_on_are_not_registered(missing, monkeypatch, tmp_path):
    if missing == "headers":
        monkeypatch.setattr(_native, "xla_handlers", dict)
    else:
        header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
        header.parent.mkdir(parents=True)
        header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 0\n")
        monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    registered = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *args, **_: registered.append(args))
    assert "sepconv was built" in sepconv.jax._register_handlers()
    assert registered == []


def test_dtypes_must_agree_and_none_is_cast():
    _, (x, kernel, pointwise), _ = prepared(small_problem(), np.float32)
    with pytest.raises(TypeError, match=r"x of float32, depthwise_kernel of bfloat16"):
        separable_conv2d(x, kernel.astype(jnp.bfloat16), pointwise)
    with pytest.raises(TypeError, match=r"`bias` must be floating-point. Received: bias of int"):
        separable_conv2d(x, kernel, pointwise, jnp.ones(3, int))


def test_weakly_typed_arrays_take_the_dtype_of_the_others():
    _, (x, kernel, pointwise), _ = prepared(small_problem(), np.float32)
    weak = jnp.full((3,), 2.0)
    assert weak.weak_type
    for dtype in (jnp.bfloat16, jnp.float32):
        x, kernel, pointwise = (array.astype(dtype) for array in (x, kernel, pointwise))
        y = separable_conv2d(x, kernel, pointwise, weak)
        assert y.dtype == dtype
        assert not y.weak_type


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"strides": 0}, ValueError, "`strides` must be"),
        ({"padding": "full"}, ValueError, "`padding` must be"),
        ({"data_format": "channels_first"}, ValueError, "`depthwise_kernel` must have"),
        ({"activation": "softmax"}, ValueError, "`activation` must be one of"),
        ({"input_activation": jnp.sin}, TypeError, "`input_activation` must be"),
        ({"bias": np.ones(7)}, ValueError, "`bias` must"),
    ],
)
def test_errors_name_the_argument(arguments, error, words):
    _, args, _ = prepared(small_problem())
    with pytest.raises(error, match=words):
        jax.jit(partial(separable_conv2d, **arguments))(*args)


def border_call(target: str, *arrays: Any, out: Any, **attributes: Any) -> Any:
    results = [jax.ShapeDtypeStruct(shape, arrays[0].dtype) for shape in out]
    return jax.ffi.ffi_call(target, results)(*arrays, **attributes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"geometry": [1, 2, 3]}, "`geometry` must have 22 fields. Received: 3"),
        ({"stride_height": 0}, "`stride_height` must be at least 1"),
        ({"kernel_height": 3}, "`depthwise_kernel` must have 36 elements"),
        ({"dtype": "int32"}, "arrays must be float32, float64, bfloat16 or float16"),
        ({"arrays": 3}, "must bring 5 arrays. Received: 4"),
        ({"out": [(2, 3, 2, 3)]}, "must return 4 arrays. Received: 1"),
        (
            {"out": [(2, 3, 4, 2), (2, 3, 2, 2), (1, 1, 4, 3), (4,)]},
            "`d_bias` must have 3 elements",
        ),
        ({"wrt": [1, 1, 1, 1, 1]}, "`wrt` must have a flag"),
        ({"wrt": [1, 1]}, "`wrt` must have a flag"),
    ],
)
def test_the_border_refuses_calls_that_do_not_add_up(change, words):
    problem = small_problem(use_bias=True)
    _, args, dy = prepared(problem)
    geometry = problem.geometry
    fields = {key: value for key, value in change.items() if key in geometry._fields}
    integers = change.get("geometry", geometry._replace(**fields))
    arrays = [dy, *args][: 1 + change.get("arrays", len(args))]
    arrays = [array.astype(change.get("dtype", array.dtype)) for array in arrays]
    with pytest.raises(jax.errors.JaxRuntimeError, match=words.replace(".", r"\.")):
        border_call(
            "sepconv_backward",
            *arrays,
            out=change.get("out", [array.shape for array in args]),
            geometry=np.array(integers, np.int64),
            wrt=np.array(change.get("wrt", [1, 1, 1, 0, 1]), np.int64),
            has_y=False,
        )


def test_examples_run():
    results = doctest.testmod(sepconv.jax, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 5
    assert results.failed == 0
