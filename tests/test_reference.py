"""The reference itself: hand-worked cases, an independent loop, finite differences, goldens."""

from __future__ import annotations

import math
from dataclasses import replace

import goldens
import numpy as np
import pytest
from hypothesis import given
from strategies import Problem, problems

from sepconv import ConvSpec, reference
from sepconv.spec import ACTIVATIONS


def test_a_case_worked_by_hand():
    # 3x3 image, 2x2 kernel, stride 2 with "same": one row and column of zeros, at the end.
    x = np.arange(1.0, 10.0).reshape(1, 3, 3, 1)
    kernel = np.array([[1.0, 10.0], [100.0, 1000.0]]).reshape(2, 2, 1, 1)
    pointwise, bias = np.array([2.0, -1.0]).reshape(1, 1, 1, 2), np.array([1.0, 0.0])
    g = ConvSpec(strides=2, padding="same", activation="relu").resolve(
        x.shape, kernel.shape, pointwise.shape, bias.shape
    )
    assert (g.pad_top, g.pad_left) == (0, 0)
    u = np.array([[1 + 20 + 400 + 5000, 3 + 600], [7 + 80, 9]])
    y = reference.forward(g, x, kernel, pointwise, bias)
    assert np.array_equal(y[0, ..., 0], 2 * u + 1)
    assert np.array_equal(y[0, ..., 1], np.zeros((2, 2)))  # relu of -u

    dy = np.array([[1.0, 2.0], [3.0, 4.0]])[None, ..., None] * np.ones(2)
    gradients = reference.backward(g, dy, x, kernel, pointwise, bias)
    du = 2 * dy[0, ..., 0]  # The second filter is shut.
    assert np.array_equal(
        gradients.dx[0, ..., 0],
        [
            [du[0, 0], 10 * du[0, 0], du[0, 1]],
            [100 * du[0, 0], 1000 * du[0, 0], 100 * du[0, 1]],
            [du[1, 0], 10 * du[1, 0], du[1, 1]],
        ],
    )
    assert np.array_equal(
        gradients.d_depthwise_kernel[..., 0, 0],
        [
            [
                du[0, 0] * 1 + du[0, 1] * 3 + du[1, 0] * 7 + du[1, 1] * 9,
                du[0, 0] * 2 + du[1, 0] * 8,
            ],
            [du[0, 0] * 4 + du[0, 1] * 6, du[0, 0] * 5],
        ],
    )
    assert np.array_equal(gradients.d_pointwise_kernel[0, 0], [[(u * dy[0, ..., 0]).sum(), 0.0]])
    assert np.array_equal(gradients.d_bias, [10.0, 0.0])
    assert gradients.d_depthwise_bias is None


def test_the_input_is_padded_after_its_activation():
    x, kernel = np.zeros((1, 1, 1, 1)), np.ones((3, 3, 1, 1))
    spec = ConvSpec(padding="same", input_activation="sigmoid")
    g = spec.resolve(x.shape, kernel.shape, (1, 1, 1, 1))
    assert reference.forward(g, x, kernel, np.ones((1, 1, 1, 1))).item() == 0.5


def by_definition(problem: Problem) -> np.ndarray:
    """The forward formula, one output at a time."""
    g, spec, arrays = problem.geometry, problem.spec, problem.arrays()
    before, between, after = (
        reference.ACTIVATION_TABLE[name].value
        for name in (spec.input_activation, spec.depthwise_activation, spec.activation)
    )
    x = before(arrays.x if g.layout == 0 else np.moveaxis(arrays.x, 1, -1))
    y = np.zeros((g.batch, g.out_height, g.out_width, g.out_channels))
    for n, row, column in np.ndindex(y.shape[:3]):
        u = np.zeros(g.depthwise_channels)
        for i, j, c, m in np.ndindex(g.depthwise_kernel_shape):
            x_row = row * g.stride_height + i * g.dilation_height - g.pad_top
            x_column = column * g.stride_width + j * g.dilation_width - g.pad_left
            if 0 <= x_row < g.in_height and 0 <= x_column < g.in_width:
                tap = arrays.depthwise_kernel[i, j, c, m]
                u[c * g.depth_multiplier + m] += x[n, x_row, x_column, c] * tap
        if arrays.depthwise_bias is not None:
            u += arrays.depthwise_bias
        z = between(u) @ arrays.pointwise_kernel[0, 0]
        if arrays.bias is not None:
            z += arrays.bias
        y[n, row, column] = after(z)
    return y if g.layout == 0 else np.moveaxis(y, -1, 1)


@given(problems())
def test_forward_is_the_definition(problem):
    if problem.geometry.macs > 30_000:
        problem = replace(problem, batch=min(problem.batch, 1), channels=2, filters=2)
    y = reference.forward(problem.geometry, *problem.arrays().forward)
    np.testing.assert_allclose(y, by_definition(problem), rtol=1e-12, atol=1e-12)


STAGES = ("input_activation", "depthwise_activation", "activation")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_agree_with_finite_differences(stage, activation):
    problem = Problem(
        spec=ConvSpec(
            **{stage: activation},
            strides=(2, 1),
            dilation_rate=(1, 2),
            padding="same",
            data_format="channels_first" if stage == "activation" else "channels_last",
        ),
        batch=2,
        height=5,
        width=4,
        channels=2,
        depth_multiplier=2,
        kernel_size=(3, 2),
        filters=3,
        use_depthwise_bias=True,
        seed=ACTIVATIONS.index(activation),
    )
    g, arrays = problem.geometry, problem.arrays()
    gradients = reference.backward(g, *arrays.backward)
    rng, step = np.random.default_rng(7), 1e-6
    for index, (array, gradient) in enumerate(zip(arrays.forward, gradients, strict=True)):
        direction = rng.standard_normal(array.shape)

        def loss(amount, index=index, array=array, direction=direction):
            moved = list(arrays.forward)
            moved[index] = array + amount * direction
            return float((arrays.dy * reference.forward(g, *moved)).sum())

        slope = (loss(step) - loss(-step)) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-7, abs=1e-7)


# At a kink the slope is a choice; these are those of Keras 3.
KINKS = {
    "relu": {0.0: 0.0},
    "relu6": {0.0: 0.0, 6.0: 0.0},
    "leaky_relu": {0.0: 1.0},
    "hard_sigmoid": {-3.0: 0.0, 3.0: 0.0},
    "hard_silu": {-3.0: 0.0, 3.0: 1.0},
    "elu": {0.0: 1.0},
}
# Values that tell forms apart: leaky_relu 0.2, gelu by erf, hard_sigmoid x/6 + 1/2, elu alpha 1.
VALUES = {
    "linear": (-2.0, -2.0),
    "relu": (-2.0, 0.0),
    "relu6": (7.0, 6.0),
    "leaky_relu": (-2.0, -0.4),
    "sigmoid": (2.0, 1 / (1 + math.exp(-2.0))),
    "tanh": (0.5, math.tanh(0.5)),
    "silu": (2.0, 2 / (1 + math.exp(-2.0))),
    "gelu": (1.0, 0.5 * (1 + math.erf(math.sqrt(0.5)))),
    "hard_sigmoid": (1.0, 2 / 3),
    "hard_silu": (2.0, 5 / 3),
    "elu": (-1.0, math.expm1(-1.0)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_have_the_forms_of_keras_3(name):
    activation = reference.ACTIVATION_TABLE[name]
    z, value = VALUES[name]
    assert activation.value(np.array([z]))[0] == pytest.approx(value, rel=1e-15)
    for kink, slope in KINKS.get(name, {}).items():
        assert activation.slope(np.array([kink]))[0] == slope


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_constants_bound_what_they_say(name):
    activation = reference.ACTIVATION_TABLE[name]
    z = np.linspace(-9.0, 9.0, 180_001)
    value, slope = activation.value(z), activation.slope(z)
    step = z[1] - z[0]
    assert np.abs(np.diff(value)).max() <= activation.steepest * step * (1 + 1e-6)
    assert np.abs(slope).max() <= activation.steepest
    near_kink = np.zeros(z.size - 1, bool)
    for position, jump in activation.kinks:
        near_kink |= (z[:-1] <= position + step) & (z[1:] >= position - step)
        below, above = activation.slope(np.array([position - 1e-9, position + 1e-9]))
        assert abs(above - below) == pytest.approx(jump, abs=1e-8)
    smooth = np.abs(np.diff(slope))[~near_kink]
    assert smooth.max() <= activation.most_curved * step * (1 + 1e-6) + 1e-13
    if activation.most_curved:  # Neither constant may be idle: the bounds rest on them.
        assert smooth.max() >= 0.99 * activation.most_curved * step
    assert np.abs(slope).max() >= 0.9 * activation.steepest


@pytest.mark.parametrize("case", goldens.load_cases(), ids=goldens.case_ids)
def test_goldens(case):
    inputs, dy = case.inputs(np.float64), case.upstream(np.float64)
    g, z = case.geometry, reference.forward(case.geometry, *case.inputs(np.float64))
    if case.outside_activation is None:
        y = z
    else:
        outside = goldens.OUTSIDE_ACTIVATIONS[case.outside_activation]
        y, dy = outside.value(z), outside.vjp(z, dy)
    goldens.check(case, "float64", y, reference.backward(g, dy, *inputs)[:4])


def rounded_model(problem: Problem, order: np.random.Generator) -> tuple[np.ndarray, list]:
    """A float32 implementation that rounds after every operation and sums in a random order.

    One pixel, so that it stays a few lines: forward, and the gradients that need no scatter.
    """
    f32 = np.float32
    g, spec = problem.geometry, problem.spec
    arrays = problem.arrays(f32)
    table = reference.ACTIVATION_TABLE

    def total(terms: np.ndarray) -> np.ndarray:
        result = np.zeros(terms.shape[1:], f32)
        for term in order.permutation(terms):
            result = (result + term).astype(f32)
        return result

    def rounded(function, z):
        return function(z.astype(np.float64)).astype(f32)

    a = rounded(table[spec.input_activation].value, arrays.x.reshape(-1, g.in_channels))
    kernel = arrays.depthwise_kernel.reshape(-1, g.in_channels)
    u = total(np.concatenate([a * kernel, arrays.depthwise_bias[None]]))
    v = rounded(table[spec.depthwise_activation].value, u)
    pointwise = arrays.pointwise_kernel[0, 0]
    z = total(np.concatenate([v[:, None] * pointwise, arrays.bias[None]]))
    y = rounded(table[spec.activation].value, z)
    dz = arrays.dy.reshape(-1) * rounded(table[spec.activation].slope, z)
    dv = total((dz * pointwise).T)
    du = dv * rounded(table[spec.depthwise_activation].slope, u)
    slope = rounded(table[spec.input_activation].slope, arrays.x.reshape(-1, g.in_channels))
    return y, [kernel * du * slope, a * du, np.outer(v, dz), dz, du]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bounds_hold_for_any_order_and_notice_a_fault(activation):
    problem = Problem(
        spec=ConvSpec(
            activation=activation, input_activation=activation, depthwise_activation=activation
        ),
        batch=1,
        height=4,
        width=3,
        channels=30,
        depth_multiplier=1,
        kernel_size=(4, 3),
        filters=20,
        use_depthwise_bias=True,
    )
    order = np.random.default_rng(1)
    for seed in range(5):
        problem = replace(problem, seed=seed)
        g, arrays = problem.geometry, problem.arrays(np.float32)
        y_bound, bounds = reference.error_bounds(g, "float32", *arrays.backward)
        y, gradients = rounded_model(problem, order)
        true_y = reference.forward(g, *arrays.forward)
        goldens.assert_within(y.reshape(true_y.shape), true_y, y_bound, "y")
        true_gradients = reference.backward(g, *arrays.backward)
        for name, gradient, true, bound in zip(
            true_gradients._fields, gradients, true_gradients, bounds, strict=True
        ):
            goldens.assert_within(gradient.reshape(true.shape), true, bound, name)
        # A bound that a dropped term or a float16 sum would pass is worth nothing.
        assert np.median(y_bound) < 3e-4
        with pytest.raises(AssertionError, match="out of bounds"):
            goldens.assert_within(y.reshape(true_y.shape) + 1e-2, true_y, y_bound, "y")


def test_bounds_allow_the_other_slope_only_next_to_a_kink():
    x, kernel, pointwise = np.array([3.0]), np.ones((1, 1, 1, 1)), np.ones((1, 1, 1, 1))
    x, dy = x.reshape(1, 1, 1, 1), np.ones((1, 1, 1, 1))
    g = ConvSpec(activation="relu").resolve(x.shape, kernel.shape, pointwise.shape, (1,))
    for bias, uncertain in ((-3.0, True), (-3.0 + 1e-8, True), (-2.9, False), (-3.1, False)):
        _, bounds = reference.error_bounds(g, "float32", dy, x, kernel, pointwise, np.array([bias]))
        assert (bounds.dx.item() >= 1.0) == uncertain
        assert bounds.dx.item() <= (1.0001 if uncertain else 1e-5)
    # An input is exact, so that its slope is, too.
    g = ConvSpec(input_activation="relu").resolve(x.shape, kernel.shape, pointwise.shape)
    _, bounds = reference.error_bounds(g, "float32", dy, 0.0 * x, kernel, pointwise)
    assert bounds.dx.item() <= 1e-5
