"""Checklist 50 to 63: reuse."""

from __future__ import annotations

import numpy as np
import pytest
from support_tf1 import SepConv, array, images, names, parts, sep

import sepconv.tf1 as tf


def called(*args, **kwargs):
    layer = SepConv(4, 3, *args, **kwargs)
    layer(images())
    return layer


def same(first, second):
    return [a is b for a, b in zip(first.weights, second.weights, strict=True)]


def test_c050_reuse_true_shares_the_same_objects(graph):
    first = called(name="n")
    y = sep(images(), 4, 3, name="n", reuse=True)
    second = called(name="n", _reuse=True)
    assert same(first, second) == [True] * 3
    assert names(tf.global_variables()) == parts("n")
    assert np.array_equal(array(y), array(first(images())))


def test_c051_missing_and_existing_variables(mode):
    with pytest.raises(ValueError, match="does not exist, or was not created with"):
        called(name="n", _reuse=True)
    with pytest.raises(ValueError, match="does not exist"):
        sep(images(), 4, 3, name="n", reuse=True)
    called(_scope="n")
    with pytest.raises(ValueError, match=r"already exists, disallowed\. Did you mean to set reuse"):
        called(_scope="n")
    for reuse in (None, False):
        with pytest.raises(ValueError, match="already exists"):
            sep(images(), 4, 3, name="n", reuse=reuse)


def test_c052_auto_reuse_makes_then_shares_per_variable(graph):
    first = called(use_bias=False, _scope="n", _reuse=tf.AUTO_REUSE)
    second = called(_scope="n", _reuse=tf.AUTO_REUSE)
    assert [a is b for a, b in zip(first.weights, second.weights[:2], strict=True)] == [True] * 2
    assert names(tf.global_variables()) == parts("n")
    third = called(_scope="n", _reuse=tf.AUTO_REUSE)
    assert same(second, third) == [True] * 3


def test_c053_shape_and_dtype_mismatch(mode):
    called(_scope="n")
    with pytest.raises(ValueError, match="specified shape") as error:
        SepConv(4, 5, _scope="n", _reuse=True)(images())
    assert "(5, 5, 3, 1)" in str(error.value)
    assert "found shape (3, 3, 3, 1)" in str(error.value)
    with pytest.raises(ValueError, match="specified dtype float64 and found dtype float32"):
        called(_scope="n", _reuse=True, dtype="float64", autocast=True)


@pytest.mark.parametrize("reuse", [True, tf.AUTO_REUSE])
def test_c054_the_unnamed_function_finds_the_plain_name(graph, reuse):
    sep(images(), 4, 3)
    sep(images(), 4, 3, reuse=reuse)
    sep(images(), 4, 3, reuse=reuse)
    assert names(tf.global_variables()) == parts("separable_conv2d")


def test_c055_unnamed_calls_pair_up_in_a_scope_opened_anew(graph):
    def network():
        return [array(sep(images(), filters, 3)) for filters in (4, 5)]

    with tf.variable_scope("net"):
        first = network()
    with tf.variable_scope("net", reuse=True):
        second = network()
    assert [np.array_equal(a, b) for a, b in zip(first, second, strict=True)] == [True, True]
    scopes = ["net/separable_conv2d", "net/separable_conv2d_1"]
    assert names(tf.global_variables()) == [*parts(scopes[0]), *parts(scopes[1])]


def test_c056_reuse_variables_in_an_open_scope(mode):
    with tf.variable_scope("net") as scope:
        sep(images(), 4, 3)
        scope.reuse_variables()
        with pytest.raises(ValueError, match="separable_conv2d_1/depthwise_kernel does not exist"):
            sep(images(), 4, 3)


def test_c057_two_unnamed_calls_in_one_auto_reuse_scope(graph):
    with tf.variable_scope("net", reuse=tf.AUTO_REUSE):
        sep(images(), 4, 3)
        sep(images(), 4, 3)
    assert len(tf.global_variables()) == 6


def test_c058_sharing_with_another_name(mode):
    first = called(name="foo")
    second = called(name="bar", _scope="foo", _reuse=True)
    assert (second.name, second.scope_name) == ("bar", "foo")
    assert same(first, second) == [True] * 3


def test_c059_get_variable_shares_too(mode):
    with tf.variable_scope("n"):
        made = tf.get_variable("depthwise_kernel", [3, 3, 3, 1])
    layer = called(_scope="n", _reuse=tf.AUTO_REUSE)
    assert layer.depthwise_kernel is made
    with tf.variable_scope("n", reuse=True):
        assert tf.get_variable("bias", [4]) is layer.bias
        assert tf.get_variable("bias") is layer.bias


def test_c060_a_bias_may_be_dropped_but_not_added(mode):
    with_bias = called(_scope="n")
    without = called(_scope="n", _reuse=True, use_bias=False)
    assert without.bias is None
    assert [v is w for v, w in zip(with_bias.weights[:2], without.weights, strict=True)] == [
        True
    ] * 2
    called(_scope="m", use_bias=False)
    with pytest.raises(ValueError, match="m/bias does not exist"):
        called(_scope="m", _reuse=True)
    assert len(called(_scope="m", _reuse=tf.AUTO_REUSE).weights) == 3


def test_c061_a_second_call_reuses_in_any_scope(mode):
    layer = called(name="n")
    before = layer.weights
    with tf.variable_scope("B", reuse=False):
        layer(images())
    with tf.variable_scope("C", reuse=True):
        layer(images())
    assert [a is b for a, b in zip(before, layer.weights, strict=True)] == [True] * 3


def test_c062_reuse_of_every_kind_works_with_no_graph_current():
    assert tf.executing_eagerly()
    first = array(sep(images(), 4, 3, name="f"))
    assert np.array_equal(first, array(sep(images(), 4, 3, name="f", reuse=True)))
    assert np.array_equal(first, array(sep(images(), 4, 3, name="f", reuse=tf.AUTO_REUSE)))
    with tf.variable_scope("", reuse=tf.AUTO_REUSE):
        assert np.array_equal(first, array(sep(images(), 4, 3, name="f")))
    first, second = called(name="n"), called(name="n", _reuse=True)
    assert same(first, second) == [True] * 3
    with pytest.raises(ValueError, match="does not exist"):
        sep(images(), 4, 3, name="missing", reuse=True)


@pytest.mark.parametrize("reuse", ["yes", 1, 0, []])
def test_c063_a_wrong_reuse_value(mode, reuse):
    with pytest.raises(ValueError, match="reuse"):
        called(_reuse=reuse)
    with pytest.raises(ValueError, match="reuse"):
        tf.variable_scope("s", reuse=reuse)
