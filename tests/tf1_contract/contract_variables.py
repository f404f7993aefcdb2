"""Checklist 19 to 28: variables and initializers."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from support_tf1 import SepConv, array, images, names, parts, sep

import sepconv.tf1 as tf


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_c019_creation_order_and_shapes(graph, data_format):
    layer = SepConv(5, (3, 2), data_format=data_format, depth_multiplier=2)
    shape = (2, 8, 8, 3) if data_format == "channels_last" else (2, 3, 8, 8)
    layer(images(shape))
    assert names(tf.global_variables()) == names(layer.weights) == parts("separable_conv2d")
    shapes = [tuple(variable.shape) for variable in layer.weights]
    assert shapes == [(3, 2, 3, 2), (1, 1, 6, 5), (5,)]
    assert layer.weights[0] is layer.depthwise_kernel
    assert layer.weights[1] is layer.pointwise_kernel
    assert layer.weights[2] is layer.bias


def test_c020_variable_names(mode):
    with tf.variable_scope("net"):
        layer = SepConv(4, 3, name="sep")
        layer(images())
    assert layer.scope_name == "net/sep"
    assert [v.op.name for v in layer.weights] == parts("net/sep")
    assert [v.name for v in layer.weights] == [f"{name}:0" for name in parts("net/sep")]


def test_c021_build_by_hand(mode):
    layer = SepConv(4, 3, name="built")
    with tf.variable_scope("A"):
        layer.build((None, 8, 8, 3))
    assert layer.built
    assert layer.scope_name == "A/built"
    assert names(layer.weights) == parts("A/built")
    assert layer.dtype == "float32"
    before = layer.weights
    layer.build((None, 8, 8, 3))
    layer.build((None, 8, 8, 5))
    assert all(a is b for a, b in zip(before, layer.weights, strict=True))
    assert layer(images()).shape == (2, 6, 6, 4)
    with pytest.raises(ValueError, match="ndim"):
        SepConv(4, 3).build((8, 8, 3))


def test_c022_the_scopes_initializer_is_taken_by_the_kernels(mode):
    with tf.variable_scope("A", initializer=tf.constant_initializer(7.0)):
        layer = SepConv(4, 3)
        layer(images())
    assert np.all(array(layer.depthwise_kernel) == 7)
    assert np.all(array(layer.pointwise_kernel) == 7)
    assert np.all(array(layer.bias) == 0)


def glorot_limit(fan_in, fan_out):
    return np.sqrt(6 / (fan_in + fan_out))


def test_c023_glorot_uniform_with_the_fans_of_an_ordinary_convolution(mode):
    layer = SepConv(64, 5, depth_multiplier=16)
    layer(images((1, 6, 6, 40)))
    limits = [glorot_limit(25 * 40, 25 * 16), glorot_limit(640, 64)]
    for variable, limit in zip(layer.weights[:2], limits, strict=True):
        sample = array(variable)
        assert np.all(np.abs(sample) <= limit)
        assert np.abs(sample).max() > 0.99 * limit
        # Of n samples of variance v, the variance has a standard deviation of v*sqrt(0.8/n).
        spread = sample.var() / (limit**2 / 3) - 1
        assert abs(spread) < 5 * np.sqrt(0.8 / sample.size)
    assert np.all(array(layer.bias) == 0)


def test_c024_bias_initializer_none_is_not_zeros(mode):
    layer = SepConv(400, 3, bias_initializer=None)
    layer(images())
    bias, limit = array(layer.bias), glorot_limit(400, 400)
    assert np.all(np.abs(bias) <= limit)
    assert np.abs(bias).max() > 0.9 * limit
    with tf.variable_scope("A", initializer=tf.ones_initializer()):
        other = SepConv(4, 3, bias_initializer=None)
        other(images())
    assert np.all(array(other.bias) == 1)


def test_c025_the_scope_at_the_first_call_counts_for_the_class(mode):
    with tf.variable_scope("A", initializer=tf.ones_initializer()):
        by_class = SepConv(4, 3, name="late")
        by_scope = SepConv(4, 3, _scope="early")
    with tf.variable_scope("B", initializer=tf.constant_initializer(2.0)):
        by_class(images())
        by_scope(images())
    assert by_class.scope_name == "B/late"
    assert np.all(array(by_class.depthwise_kernel) == 2)
    assert by_scope.scope_name == "A/early"
    assert np.all(array(by_scope.depthwise_kernel) == 1)


def test_c025_the_function_with_a_name_takes_the_open_scopes_initializer(graph):
    with tf.variable_scope("A", initializer=tf.ones_initializer()):
        sep(images(), 4, 3, name="f")
    assert np.all(array(tf.global_variables()[0]) == 1)


def test_c026_an_explicit_initializer_wins(mode):
    with tf.variable_scope("A", initializer=tf.ones_initializer()):
        layer = SepConv(
            4, 3, depthwise_initializer="zeros", bias_initializer=lambda s, dtype: 3 * np.ones(s)
        )
        layer(images())
    assert np.all(array(layer.depthwise_kernel) == 0)
    assert np.all(array(layer.pointwise_kernel) == 1)
    assert np.all(array(layer.bias) == 3)


def test_c027_initializer_callables(mode):
    calls = []

    def initializer(shape, dtype=None, partition_info="not given"):
        calls.append((tuple(shape), dtype, partition_info))
        return np.full(shape, 2.0)

    layer = SepConv(4, 3, depthwise_initializer=initializer)
    layer(images())
    assert calls == [((3, 3, 3, 1), "float32", None)]
    assert np.all(array(layer.depthwise_kernel) == 2)
    with pytest.raises(ValueError, match="must return the shape"):
        SepConv(4, 3, depthwise_initializer=lambda shape, dtype: np.ones(3))(images())


def test_c027_two_variables_of_one_seedless_initializer_differ(mode):
    shared = tf.random_normal_initializer()
    with tf.variable_scope("A", initializer=shared):
        first, second = SepConv(4, 3), SepConv(4, 3)
        first(images())
        second(images())
    assert not np.array_equal(array(first.depthwise_kernel), array(second.depthwise_kernel))
    with tf.variable_scope("B", initializer=tf.random_normal_initializer(seed=5)):
        first, second = SepConv(4, 3), SepConv(4, 3)
        first(images())
        second(images())
    assert np.array_equal(array(first.depthwise_kernel), array(second.depthwise_kernel))


def drawn(**arguments):
    with tf.Graph().as_default():
        layer = SepConv(4, 3, **arguments)
        layer(images())
        return [array(variable) for variable in layer.weights]


@pytest.mark.parametrize("initializer", [None, "he_normal", tf.truncated_normal_initializer()])
def test_c028_both_seeds_make_values_repeatable(initializer):
    def of_process(seed):
        keras.utils.set_random_seed(seed)
        return drawn(pointwise_initializer=initializer)

    def of_graph(seed):
        with tf.Graph().as_default():
            tf.set_random_seed(seed)
            layer = SepConv(4, 3, pointwise_initializer=initializer)
            layer(images())
            return [array(variable) for variable in layer.weights]

    for draw in (of_process, of_graph):
        first, again, other = draw(4), draw(4), draw(5)
        for position in (0, 1):
            assert np.array_equal(first[position], again[position])
            assert not np.array_equal(first[position], other[position])
        assert not np.array_equal(first[0].ravel()[:9], first[1].ravel()[:9])
