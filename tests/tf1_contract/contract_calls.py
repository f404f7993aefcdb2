"""Checklist 82 to 93: activation, dtypes, calls."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from support_tf1 import SepConv, array, dtype_of, images, names, parts, rounding

import sepconv.tf1 as tf


def erf(x):
    return np.vectorize(__import__("math").erf)(x)


def softmax(x):
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


SELU = 1.0507009873554805, 1.6732632423543772
ACTIVATIONS = {
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "exponential": np.exp,
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.2 * x),
    "linear": lambda x: x,
    "log_softmax": lambda x: np.log(softmax(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "selu": lambda x: SELU[0] * np.where(x > 0, x, SELU[1] * np.expm1(x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "softmax": softmax,
    "softplus": lambda x: np.log1p(np.exp(x)),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_c082_every_activation(name, dtype):
    x = images((2, 5, 5, 3), dtype) * 3
    plain = SepConv(6, 3, bias_initializer="ones")
    before = array(plain(x)).astype("float64")
    layer = SepConv(6, 3, activation=name, weights=plain.get_weights())
    after = array(layer(x))
    tolerance = {"float32": 5e-6, "float64": 1e-11}[dtype]
    if unit := rounding(name, dtype):
        tolerance = 16 * unit
    expected = ACTIVATIONS[name](before)
    assert np.abs(after - expected).max() <= tolerance * max(1, np.abs(expected).max())
    assert layer.get_config()["activation"] == ("silu" if name == "swish" else name)


def test_c082_hard_sigmoid_has_the_originals_slope():
    layer = SepConv(1, 1, activation="hard_sigmoid", depthwise_initializer="ones",
                    pointwise_initializer="ones")  # fmt: skip
    assert array(layer(np.full((1, 1, 1, 1), 1.0, "float32"))).item() == pytest.approx(0.7)
    given = SepConv(4, 3, activation=keras.activations.hard_sigmoid)
    assert given.activation is keras.activations.hard_sigmoid


@pytest.mark.parametrize("name", ["relu", "relu6", "elu", "sigmoid", "tanh", "selu", "swish"])
def test_c082_functions_of_nn_are_those_activations(name):
    function = getattr(tf.nn, name)
    layer = SepConv(4, 3, activation=function)
    y = layer(images())
    other = SepConv(4, 3, activation=name, weights=layer.get_weights())
    assert np.array_equal(array(y), array(other(images())))
    assert layer.activation is function
    assert layer.get_config()["activation"] == ("silu" if name == "swish" else name)
    assert layer.why_not(images()) == other.why_not(images())


def test_c083_softmax_in_channels_first_works_along_the_last_axis():
    x = images((2, 3, 7, 8))
    plain = SepConv(4, 3, data_format="channels_first")
    expected = softmax(array(plain(x)))
    layer = SepConv(
        4, 3, data_format="channels_first", activation="softmax", weights=plain.get_weights()
    )
    assert np.allclose(array(layer(x)), expected, atol=1e-6)
    assert np.allclose(array(layer(x)).sum(-1), 1, atol=1e-6)


def test_c083_layers_and_other_callables_as_activation(mode):
    prelu = keras.layers.PReLU()
    layer = SepConv(4, 3, activation=prelu)
    x = images()
    y = array(layer(x))
    assert names(layer.weights) == parts("separable_conv2d")
    assert prelu.built
    plain = array(SepConv(4, 3, weights=layer.get_weights())(x))
    assert np.allclose(y, np.maximum(plain, 0), atol=1e-6)  # Its slopes start at 0.
    doubled = SepConv(4, 3, activation=lambda y: 2 * y, weights=layer.get_weights())
    assert np.allclose(array(doubled(x)), 2 * plain, atol=1e-6)
    failing = SepConv(4, 3, activation=lambda y: None)
    with pytest.raises(ValueError, match="None"):
        failing(x)
    assert (failing.built, failing.weights) == (False, [])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_c084_weights_take_the_dtype_of_the_first_input(mode, dtype):
    layer = SepConv(4, 3)
    assert layer.dtype is None
    assert layer.compute_dtype is None
    y = layer(images(dtype=dtype))
    assert layer.dtype == dtype
    assert dtype_of(y) == dtype
    assert [variable.dtype for variable in layer.weights] == [dtype] * 3
    assert [dtype_of(variable.value) for variable in layer.weights] == [dtype] * 3
    assert layer.get_config()["dtype"] == dtype


def test_c084_a_numpy_array_makes_a_float64_layer(mode):
    layer = SepConv(4, 3)
    y = layer(np.random.default_rng(0).random((2, 8, 8, 3)))
    assert layer.dtype == dtype_of(y) == "float64"
    assert layer.depthwise_kernel.dtype == tf.float64


def test_c085_dtype_fixes_it(mode):
    layer = SepConv(4, 3, dtype="float64")
    assert layer.dtype == "float64"
    with pytest.raises(TypeError, match="float64") as error:
        layer(images())
    assert "float32" in str(error.value)
    assert layer.weights == []
    assert dtype_of(layer(images(dtype="float64"))) == "float64"
    casting = SepConv(4, 3, dtype="float64", autocast=True)
    assert dtype_of(casting(images())) == casting.dtype == "float64"
    for given in (np.float64, np.dtype("float64"), tf.float64, keras.DTypePolicy("float64")):
        assert SepConv(4, 3, dtype=given).dtype == "float64"
    with pytest.raises(TypeError, match="nope"):
        SepConv(4, 3, dtype="nope")
    integer = SepConv(4, 3, dtype="int32")
    with pytest.raises(TypeError, match="int32"):
        integer(images())


def test_c086_mixed_precision(mode):
    layer = SepConv(4, 3, dtype="mixed_float16", autocast=True)
    y = layer(images())
    assert (layer.dtype, layer.compute_dtype) == ("float32", "float16")
    assert [variable.dtype for variable in layer.weights] == ["float32"] * 3
    assert dtype_of(y) == "float16"
    strict = SepConv(4, 3, dtype="mixed_float16")
    with pytest.raises(TypeError, match="float16"):
        strict(images())
    assert dtype_of(strict(images(dtype="float16"))) == "float16"
    assert strict.depthwise_kernel.dtype == "float32"
    brain = SepConv(4, 3, dtype="mixed_bfloat16", autocast=True)
    assert dtype_of(brain(images())) == "bfloat16"


def test_c087_the_global_policy_is_not_used(mode):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        layer = SepConv(4, 3)
        y = layer(images())
    finally:
        keras.config.set_dtype_policy(before)
    assert (layer.dtype, dtype_of(y)) == ("float32", "float32")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (np.ones((2, 8, 8, 3), "int32"), TypeError),
        (np.ones((2, 8, 8, 3), "bool"), TypeError),
        (np.full((2, 8, 8, 3), "text"), TypeError),
        (np.ones((2, 8, 8, 3), "complex64"), ValueError),
    ],
)
@pytest.mark.parametrize("arguments", [{}, {"dtype": "float32", "autocast": True}])
def test_c088_other_inputs_are_refused_before_variables_are_made(graph, value, error, arguments):
    layer = SepConv(4, 3, **arguments)
    with pytest.raises(error, match="dtype"):
        layer(value)
    assert tf.global_variables() == layer.weights == []
    assert layer.built is False


def test_c089_a_second_call_with_another_dtype(mode):
    layer = SepConv(4, 3)
    layer(images())
    for dtype in ("float16", "float64"):
        with pytest.raises(TypeError, match=f"float32.*{dtype}"):
            layer(images(dtype=dtype))
    assert layer.dtype == "float32"


@pytest.mark.parametrize("shape", [(8, 8, 3), (3,), (), (1, 2, 8, 8, 3)])
def test_c090_wrong_rank(graph, shape):
    layer = SepConv(4, 3, depthwise_regularizer="l2")
    message = "expected min_ndim=4, found ndim=" if len(shape) < 4 else "expected ndim=4"
    with pytest.raises(ValueError, match=message):
        layer(images(shape))
    assert tf.global_variables() == tf.trainable_variables() == layer.weights == []
    assert tf.losses.get_regularization_losses() == layer.losses == []
    assert (layer.built, layer.dtype) == (False, None)
    layer(images())
    with pytest.raises(ValueError, match=f"expected ndim=4, found ndim={len(shape)}"):
        layer(images(shape))
    assert len(tf.global_variables()) == 3


def test_c090_a_failure_after_the_variables_leaves_nothing_behind(graph):
    def failing(_):
        raise ValueError("not today")

    layer = SepConv(4, 3, activation=failing, depthwise_regularizer="l2")
    layer.add_weight("extra", [2])
    with pytest.raises(ValueError, match="not today"):
        layer(images())
    assert names(tf.global_variables()) == names(layer.weights) == ["separable_conv2d/extra"]
    assert layer.losses == tf.losses.get_regularization_losses() == []
    assert not hasattr(layer, "depthwise_kernel")
    layer.activation = keras.activations.linear
    layer(images())
    assert names(layer.weights) == ["separable_conv2d/extra", *parts("separable_conv2d")]


def test_c090_a_variable_that_may_not_be_made_takes_the_others_back(graph):
    with tf.variable_scope("n"):
        tf.get_variable("pointwise_kernel", [1, 1, 3, 4])
    layer = SepConv(4, 3, _scope="n")
    with pytest.raises(ValueError, match="n/pointwise_kernel already exists"):
        layer(images())
    assert names(tf.global_variables()) == ["n/pointwise_kernel"]
    assert layer.built is False


@pytest.mark.parametrize(
    ("data_format", "shape", "axis"),
    [("channels_last", (None, 8, 8, None), -1), ("channels_first", (None, None, 8, 8), -3)],
)
def test_c091_unknown_channels(mode, data_format, shape, axis):
    layer = SepConv(4, 3, data_format=data_format)
    message = rf"The channel dimension of the inputs should be defined \(axis {axis}\)"
    with pytest.raises(ValueError, match=message):
        layer(keras.Input(batch_shape=shape))
    with pytest.raises(ValueError, match=message):
        layer.build(shape)
    empty = [2, 8, 8, 8]
    empty[axis] = 0
    with pytest.raises(ValueError, match="at least one channel"):
        layer(images(tuple(empty)))
    assert layer.weights == []


def test_c091_unknown_sizes_are_fine(mode):
    layer = SepConv(4, 3)
    y = layer(keras.Input(batch_shape=(None, None, None, 3)))
    assert y.shape == (None, None, None, 4)
    assert layer(keras.Input(batch_shape=(None, None, None, None))).shape == (None, None, None, 4)
    assert layer(keras.Input((8, 8, 3), batch_size=2)).shape == (2, 6, 6, 4)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_c092_changed_sizes(mode, data_format):
    last = data_format == "channels_last"
    axis = -1 if last else -3
    layer = SepConv(4, 3, data_format=data_format)
    layer(images((2, 8, 8, 3) if last else (2, 3, 8, 8)))
    with pytest.raises(ValueError, match=f"expected axis {axis} of input shape to have value 3"):
        layer(images((2, 8, 8, 5) if last else (2, 5, 8, 8)))
    y = layer(images((5, 9, 7, 3) if last else (5, 3, 9, 7)))
    assert y.shape == ((5, 7, 5, 4) if last else (5, 4, 7, 5))


def test_c093_ways_to_call(mode):
    layer, x = SepConv(4, 3), images()
    y = array(layer(inputs=x))
    for other in (layer(x), layer.apply(x), layer(x, training=True), layer.apply(inputs=x)):
        assert np.array_equal(array(other), y)
    for arguments in ({"mask": None}, {"mask": x}, {"foo": 1}):
        with pytest.raises(TypeError):
            layer(x, **arguments)
        with pytest.raises(TypeError):
            SepConv(4, 3)(x, **arguments)
    with pytest.raises(TypeError):
        layer()
    with pytest.raises(TypeError, match="should be tensors"):
        layer(None)
    with pytest.raises(TypeError, match="should be tensors"):
        layer("text")
    for nested in ([x], [[1.0]], (x, x)):
        with pytest.raises(ValueError, match=r"expects 1 input\(s\)"):
            layer(nested)
    with pytest.raises(AttributeError):
        SepConv(4, 3).call(x)
