"""Checklist 64 to 81: trainable, collections, losses, constraints."""

from __future__ import annotations

import gc

import keras
import numpy as np
import pytest
from support_tf1 import (
    SepConv,
    array,
    dtype_of,
    images,
    names,
    needs_gradients,
    parts,
    sep,
    sum_of,
    total,
    values,
)

import sepconv.tf1 as tf

KEYS = tf.GraphKeys


def called(*args, **kwargs):
    layer = SepConv(4, 3, *args, **kwargs)
    layer(images())
    return layer


def counts(layer):
    return len(layer.trainable_weights), len(layer.non_trainable_weights)


def test_c064_collections_after_the_first_call(graph):
    with tf.variable_scope("net"):
        called(name="a")
        called(name="b", use_bias=False)
    expected = [*parts("net/a"), *parts("net/b", 2)]
    assert names(tf.global_variables()) == expected
    assert names(tf.trainable_variables()) == expected
    assert names(tf.get_collection("variables")) == expected
    assert names(tf.trainable_variables("net/b")) == parts("net/b", 2)
    assert tf.get_collection(KEYS.UPDATE_OPS) == []
    assert KEYS.UPDATE_OPS in graph.get_all_collection_keys()
    assert tf.get_collection(KEYS.REGULARIZATION_LOSSES) == []
    assert tf.get_collection(KEYS.MODEL_VARIABLES) == tf.local_variables() == []
    assert tf.global_variables() is not tf.global_variables()


def test_c064_a_scope_matches_as_a_regular_expression(graph):
    for scope in ("net", "net2"):
        with tf.variable_scope(scope):
            called(name="sep")
    assert len(tf.trainable_variables("net")) == 6
    assert len(tf.trainable_variables("net/")) == 3
    assert len(tf.trainable_variables(".*/bias")) == 2


def test_c064_without_a_graph_no_collection_gets_anything():
    called(depthwise_regularizer=sum_of, activity_regularizer=sum_of)
    assert tf.global_variables() == tf.trainable_variables() == []
    assert tf.losses.get_regularization_losses() == []


def test_c065_a_layer_that_is_not_trainable(graph):
    layer = called(trainable=False)
    assert counts(layer) == (0, 3)
    assert names(tf.global_variables()) == parts("separable_conv2d")
    assert tf.trainable_variables() == []
    assert [variable.trainable for variable in layer.weights] == [False] * 3


def test_c066_toggling_after_the_call_leaves_the_collection_alone(graph):
    layer = called()
    assert counts(layer) == (3, 0)
    layer.trainable = False
    assert counts(layer) == (0, 3)
    assert names(layer.weights) == parts("separable_conv2d")
    assert len(tf.trainable_variables()) == 3
    assert [variable.trainable for variable in layer.weights] == [True] * 3
    layer.trainable = True
    assert counts(layer) == (3, 0)
    assert layer.trainable_variables is not layer.trainable_variables
    for names_of in ("variables", "trainable_variables", "non_trainable_variables"):
        ours, theirs = (
            getattr(layer, names_of),
            getattr(layer, names_of.replace("variables", "weights")),
        )
        if names_of == "variables":
            theirs = layer.weights
        assert [a is b for a, b in zip(ours, theirs, strict=True)] == [True] * len(ours)


def test_c067_not_trainable_at_the_first_call_stays_so(mode):
    layer = called(trainable=False)
    layer.trainable = True
    assert counts(layer) == (0, 3)


def test_c068_toggled_before_the_first_call(graph):
    layer = SepConv(4, 3)
    layer.trainable = False
    layer(images())
    assert counts(layer) == (0, 3)
    assert tf.trainable_variables() == []
    other = SepConv(4, 3, trainable=False)
    other.trainable = True
    other(images())
    assert counts(other) == (3, 0)
    assert SepConv(4, 3, trainable="yes").trainable == "yes"


def test_c069_sharing_does_not_change_trainability(graph):
    trainable = called(_scope="a")
    frozen = called(_scope="a", _reuse=True, trainable=False)
    assert counts(frozen) == (0, 3)
    assert [variable.trainable for variable in frozen.weights] == [True] * 3
    assert counts(trainable) == (3, 0)
    assert len(tf.trainable_variables()) == 3
    frozen.trainable = True
    assert counts(frozen) == (0, 3)
    called(_scope="b", trainable=False)
    late = called(_scope="b", _reuse=True)
    assert counts(late) == (0, 3)
    assert len(tf.trainable_variables()) == 3


def regularized(**kwargs):
    return called(
        depthwise_regularizer=total(1.0),
        pointwise_regularizer=total(10.0),
        bias_regularizer=total(100.0),
        depthwise_initializer="ones",
        pointwise_initializer="ones",
        bias_initializer="ones",
        **kwargs,
    )


WEIGHT_LOSSES = [27.0, 120.0, 400.0]


def test_c070_one_loss_per_regularized_variable_once(graph):
    layer = regularized()
    layer(images())
    layer(images())
    assert values(layer.losses) == WEIGHT_LOSSES
    assert values(tf.get_collection(KEYS.REGULARIZATION_LOSSES)) == WEIGHT_LOSSES
    assert values(tf.losses.get_regularization_losses()) == WEIGHT_LOSSES
    assert float(array(tf.losses.get_regularization_loss())) == sum(WEIGHT_LOSSES)
    assert values(tf.losses.get_regularization_losses("separable_conv2d/bias")) == [400.0]
    layer.trainable = False
    assert values(layer.losses) == WEIGHT_LOSSES
    with tf.Graph().as_default():
        assert float(array(tf.losses.get_regularization_loss())) == 0
        called(pointwise_regularizer="l2")
        assert len(tf.losses.get_regularization_losses()) == 1


def test_c070_losses_follow_the_values_of_the_variables(mode):
    layer = regularized()
    layer.bias.assign(np.zeros(4))
    assert values(layer.losses) == [27.0, 120.0, 0.0]
    if mode == "graph":
        assert values(tf.losses.get_regularization_losses()) == [27.0, 120.0, 0.0]


def test_c071_order_of_losses(graph):
    layer = regularized(activity_regularizer=lambda y: tf.reduce_sum(tf.ones_like(y)))
    activity = 2 * 6 * 6 * 4 / 2
    assert values(layer.losses) == [activity, *WEIGHT_LOSSES]
    assert values(tf.get_collection(KEYS.REGULARIZATION_LOSSES)) == [*WEIGHT_LOSSES, activity]


def test_c072_none_is_no_loss_and_zero_is_one(graph):
    layer = called(
        depthwise_regularizer=lambda v: None, pointwise_regularizer=keras.regularizers.L2(0.0)
    )
    assert values(layer.losses) == [0.0]
    assert values(tf.get_collection(KEYS.REGULARIZATION_LOSSES)) == [0.0]


def test_c073_layers_that_are_not_trainable_have_losses(mode):
    layer = regularized(trainable=False)
    assert values(layer.losses) == WEIGHT_LOSSES
    if mode == "graph":
        assert len(tf.losses.get_regularization_losses()) == 3


def test_c074_a_layer_that_shares_adds_no_losses(graph):
    regularized(_scope="a")
    shared = regularized(_scope="a", _reuse=True)
    assert shared.losses == []
    assert values(tf.losses.get_regularization_losses()) == WEIGHT_LOSSES
    called(_scope="b")
    assert regularized(_scope="b", _reuse=True).losses == []
    assert len(tf.losses.get_regularization_losses()) == 3


def test_c075_a_scopes_regularizer_fills_the_collection_only(graph):
    with tf.variable_scope("A", regularizer=total(2.0), initializer=tf.ones_initializer()):
        layer = called()
        assert layer.losses == []
        assert values(tf.losses.get_regularization_losses()) == [54.0, 24.0, 0.0]
        both = called(depthwise_regularizer=total(1.0))
    assert values(both.losses) == [27.0]
    assert values(tf.losses.get_regularization_losses())[3:] == [54.0, 27.0, 24.0, 0.0]


def test_c076_activity_loss(mode):
    layer = SepConv(4, 3, activation="relu", activity_regularizer=sum_of)
    first, second = images(), images((5, 8, 8, 3))
    expected = [float(array(layer(x)).sum()) / x.shape[0] for x in (first, second)]
    if mode == "graph":
        assert values(layer.losses) == pytest.approx(expected, rel=1e-5)
        collected = values(tf.get_collection(KEYS.REGULARIZATION_LOSSES))
        assert collected == pytest.approx(expected, rel=1e-5)
    else:
        assert values(layer.losses) == pytest.approx(expected[1:], rel=1e-5)


def test_c076_activity_regularizers_of_every_kind(mode):
    assert values(called(activity_regularizer=lambda y: 3.0).losses) == [1.5]
    with pytest.raises(ValueError, match="activity_regularizer"):
        called(activity_regularizer=lambda y: None)
    vector = called(activity_regularizer=lambda y: tf.reduce_sum(tf.ones_like(y), axis=[1, 2, 3]))
    assert array(vector.losses[0]).tolist() == [72.0, 72.0]
    layer = called()
    assert layer.losses == []
    layer.activity_regularizer = lambda y: 4.0
    layer(images())
    assert values(layer.losses) == [2.0]
    half = SepConv(4, 3, activity_regularizer=sum_of, depthwise_regularizer=sum_of)
    half(images(dtype="float16"))
    assert {dtype_of(loss) for loss in half.losses} == {"float16"}


def test_c077_get_losses_for(graph):
    layer = regularized(activity_regularizer=lambda y: 3.0)
    x, other = images(), images((3, 8, 8, 3))
    layer(x)
    layer(x)
    layer(other)
    assert values(layer.get_losses_for(x)) == [1.5, 1.5]
    assert values(layer.get_losses_for(other)) == [1.0]
    assert values(layer.get_losses_for(None)) == WEIGHT_LOSSES
    layer.add_loss(5.0, inputs=x)
    layer.add_loss(6.0)
    assert values(layer.get_losses_for(x)) == [1.5, 1.5, 5.0]
    assert values(layer.get_losses_for(None)) == [6.0, *WEIGHT_LOSSES]


def test_c077_get_losses_for_does_not_exist_without_a_graph():
    assert not hasattr(called(), "get_losses_for")


@pytest.mark.parametrize("regularizer", [sum_of, lambda y: 3.0])
def test_c078_activity_loss_of_an_empty_batch(mode, regularizer):
    layer = SepConv(4, 3, activity_regularizer=regularizer)
    layer(images((0, 8, 8, 3)))
    assert values(layer.losses) == [0.0]


def test_c079_add_loss_in_a_graph(graph):
    layer = SepConv(4, 3, depthwise_regularizer=total(1.0), depthwise_initializer="ones")
    layer.add_loss(1.0)
    layer.add_loss([tf.constant(2.0), None, lambda: tf.constant(3.0)])
    layer.add_loss(None)
    layer(images())
    layer.add_loss(lambda: tf.constant(4.0))
    assert values(layer.losses) == [1.0, 2.0, 3.0, 27.0, 4.0]
    assert values(tf.losses.get_regularization_losses()) == [1.0, 2.0, 3.0, 27.0, 4.0]


def test_c079_add_loss_without_a_graph():
    layer = called()
    for value in (1.0, tf.constant(1.0)):
        with pytest.raises(ValueError, match="function of no arguments"):
            layer.add_loss(value)
    layer.add_loss(lambda: tf.constant(3.0))
    layer(images())
    assert values(layer.losses) == [3.0]


def test_c080_constraints_are_attached_and_not_applied_at_initialization(mode):
    given = keras.constraints.NonNeg()

    def function(value):
        return value

    layer = called(
        depthwise_constraint=given,
        pointwise_constraint=function,
        bias_constraint="max_norm",
        depthwise_initializer=tf.constant_initializer(-1.0),
    )
    assert layer.depthwise_kernel.constraint is given
    assert layer.pointwise_kernel.constraint is function
    assert isinstance(layer.bias.constraint, keras.constraints.MaxNorm)
    assert np.all(array(layer.depthwise_kernel) == -1)
    layer.set_weights([-2 * np.ones(w.shape, "float32") for w in layer.weights])
    assert np.all(array(layer.depthwise_kernel) == -2)
    with tf.variable_scope("scope", constraint=given):
        assert called().depthwise_kernel.constraint is None


@needs_gradients
@pytest.mark.parametrize("optimizer", ["legacy", "keras"])
def test_c080_optimizers_apply_constraints_after_a_step(graph, optimizer):
    layer = called(
        depthwise_constraint=lambda value: tf.ones_like(value),
        bias_constraint="non_neg",
    )
    layer.bias.assign([-1.0, 1.0, -1.0, 1.0])
    loss = lambda: tf.reduce_sum(tf.square(layer(images())))  # noqa: E731
    if optimizer == "legacy":
        tf.train.GradientDescentOptimizer(1e-6).minimize(loss)
    else:
        _, gradients = tf.train.value_and_gradients(loss, layer.trainable_weights)
        keras.optimizers.SGD(1e-6).apply(gradients, layer.trainable_weights)
    assert np.all(array(layer.depthwise_kernel) == 1)
    assert np.all(array(layer.bias) >= 0)
    assert np.any(array(layer.bias) == 0)


def test_c081_a_constraint_or_initializer_given_when_sharing_is_ignored(mode):
    first = called(_scope="a", depthwise_initializer="ones")
    constraint = keras.constraints.NonNeg()
    second = called(
        _scope="a", _reuse=True, depthwise_initializer="zeros", depthwise_constraint=constraint
    )
    assert second.depthwise_kernel is first.depthwise_kernel
    assert np.all(array(first.depthwise_kernel) == 1)
    assert first.depthwise_kernel.constraint is None


@needs_gradients
def test_c076_a_training_step_leaves_no_activity_losses(graph):
    layer = SepConv(4, 3, activity_regularizer=sum_of, depthwise_regularizer=sum_of)
    seen = []

    def loss():
        y = layer(images())
        seen.append(len(tf.losses.get_regularization_losses()))
        return tf.reduce_sum(y) + tf.losses.get_regularization_loss()

    layer(images())
    optimizer = tf.train.AdamOptimizer(1e-3)
    for _ in range(3):
        optimizer.minimize(loss)
    gc.collect()
    assert seen == [2, 2, 2]  # The weight loss and that of the step.
    assert len(tf.losses.get_regularization_losses()) == len(layer.losses) == 2


def test_c074_functions_share_losses_too(graph):
    for reuse in (None, True):
        sep(images(), 4, 3, name="f", reuse=reuse, depthwise_regularizer=sum_of)
    assert len(tf.losses.get_regularization_losses()) == 1
