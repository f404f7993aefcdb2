"""The layer inside Keras: training, saving, compiled calls, threads, Keras style; and examples."""

from __future__ import annotations

import concurrent.futures
import doctest
import importlib
import pkgutil
import threading

import keras
import numpy as np
import pytest
from support_tf1 import (
    BACKEND,
    HAS_GRADIENTS,
    SepConv,
    array,
    images,
    names,
    needs_gradients,
    parts,
    sep,
    values,
)

import sepconv.tf1 as tf


def model_of(**arguments):
    inputs = keras.Input((8, 8, 3))
    first = SepConv(4, 3, padding="same", activation="relu", name="net/first", **arguments)
    second = SepConv(1, 3, strides=2, activation="hard_sigmoid", name="second")
    return keras.Model(inputs, second(first(inputs)))


@needs_gradients
def test_fit_trains_the_layers_and_counts_their_losses(mode):
    model = model_of(
        depthwise_regularizer=keras.regularizers.L2(0.5),
        activity_regularizer=lambda y: tf.reduce_sum(tf.ones_like(y)),
    )
    x, y = array(images((8, 8, 8, 3))), np.full((8, 3, 3, 1), 0.25, "float32")
    kernel = array(model.layers[1].depthwise_kernel)
    mean_error = float(np.mean((array(model(x)) - y) ** 2))
    model.compile(optimizer=keras.optimizers.SGD(1e-3), loss="mse")
    history = model.fit(x, y, batch_size=8, epochs=3, verbose=0).history["loss"]
    # The activity loss is the number of elements, over the batch.
    expected = mean_error + 0.5 * float((kernel**2).sum()) + 8 * 8 * 4
    assert history[0] == pytest.approx(expected, rel=1e-4)
    assert history[-1] < history[0]
    assert not np.array_equal(array(model.layers[1].depthwise_kernel), kernel)


@needs_gradients
def test_fit_leaves_a_layer_alone_while_it_is_frozen(mode):
    model = model_of()
    frozen, trained = model.layers[1:]
    frozen.trainable = False
    assert names(model.trainable_variables) == parts("second")
    before = frozen.get_weights(), trained.get_weights()
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    model.fit(array(images()), np.ones((2, 3, 3, 1), "float32"), verbose=0)
    same = [
        [np.array_equal(a, b) for a, b in zip(old, layer.get_weights(), strict=True)]
        for old, layer in zip(before, (frozen, trained), strict=True)
    ]
    assert same == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_a_saved_model_comes_back_with_layers_and_values(mode, tmp_path, kind):
    if kind == "functional":
        model = model_of(depthwise_regularizer="l2", trainable=False)
    else:
        model = keras.Sequential([SepConv(4, 3, padding="same", name="sep"), SepConv(2, 1)])
    x = images()
    y = array(model(x))
    model.save(tmp_path / "model.keras")
    with tf.Graph().as_default():
        again = keras.models.load_model(tmp_path / "model.keras")
        assert np.array_equal(array(again(x)), y)
    for ours, theirs in zip(again.layers, model.layers, strict=True):
        assert type(ours) is type(theirs)
        assert ours.get_config() == theirs.get_config()
        if isinstance(ours, SepConv):
            # A config tells a name that was made up from a given one no more, as in the original.
            assert names(ours.weights) == parts(ours.name)


def test_weights_load_into_a_model_of_the_same_layers(mode, tmp_path):
    model, other = model_of(), model_of()
    model.save_weights(tmp_path / "one.weights.h5")
    other.load_weights(tmp_path / "one.weights.h5")
    assert np.array_equal(array(model(images())), array(other(images())))


def test_stateless_call_takes_the_values_it_is_given(mode):
    layer = SepConv(4, 3, activity_regularizer=tf.reduce_sum, bias_initializer="ones")
    x = images()
    y = array(layer(x))
    new = [tf.constant(2 * array(weight)) for weight in layer.weights]
    outputs, others = layer.stateless_call(new, [], x)
    twin = SepConv(4, 3, weights=[array(value) for value in new])
    assert np.array_equal(array(outputs), array(twin(x)))
    assert list(others) == []
    *_, losses = layer.stateless_call(new, [], x, return_losses=True)
    assert float(array(losses[0])) == pytest.approx(float(array(outputs).sum()) / 2, rel=1e-4)
    assert np.array_equal(array(layer(x)), y)


if BACKEND == "jax":

    def test_stateless_call_compiles(mode):
        import jax

        layer = SepConv(4, 3, activity_regularizer=tf.reduce_sum, depthwise_regularizer="l2")
        x = images()
        y = array(layer(x))

        @jax.jit
        def compiled(weights, x):
            return layer.stateless_call(weights, [], x, return_losses=True)

        outputs, _, losses = compiled([weight.value for weight in layer.weights], x)
        assert np.allclose(array(outputs), y, atol=1e-6)
        penalty = 0.01 * float((array(layer.depthwise_kernel) ** 2).sum())
        expected = [float(y.sum()) / 2, penalty]
        assert [float(loss) for loss in losses] == pytest.approx(expected, rel=1e-4)
        # No loss of the trace stays behind; without a graph, each call drops those before it.
        kept = expected if mode == "graph" else [penalty]
        assert values(layer.losses) == pytest.approx(kept, rel=1e-4)
        collected = expected[::-1] if mode == "graph" else []
        assert values(tf.losses.get_regularization_losses()) == pytest.approx(collected, rel=1e-4)
        assert np.array_equal(array(layer(x)), y)


def test_every_thread_has_scopes_of_its_own_in_one_graph(graph):
    together = threading.Barrier(4)

    def network(number):
        with graph.as_default(), tf.variable_scope(f"tower{number}"):
            together.wait(60)
            output = sep(sep(images(), 4, 3), 4, 3)
            together.wait(60)
            assert tf.get_variable_scope().name == f"tower{number}"
            return array(output)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(network, range(4)))
    assert tf.get_variable_scope().name == ""
    made = [*parts("separable_conv2d"), *parts("separable_conv2d_1")]
    for number, output in enumerate(outputs):
        assert names(tf.global_variables(f"tower{number}/")) == [f"tower{number}/{n}" for n in made]
        with tf.variable_scope(f"tower{number}", reuse=True):
            again = sep(sep(images(), 4, 3), 4, 3)
        assert np.array_equal(array(again), output)


def test_a_graph_is_current_in_its_own_thread_only(graph):
    def elsewhere():
        return tf.executing_eagerly(), tf.get_default_graph() is graph

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        assert threads.submit(elsewhere).result() == (True, False)
    assert elsewhere() == (False, True)


def test_keras_style_layers_leave_scopes_alone(mode):
    refusal = "not allowed when keras style layers are enabled"
    with tf.layers.experimental.keras_style_scope():
        layers = [SepConv(4, 3, name="h") for _ in range(2)]
        for arguments in ({"_scope": "s"}, {"_reuse": True}):
            with pytest.raises(ValueError, match=refusal):
                SepConv(4, 3, **arguments)
        with pytest.raises(ValueError, match=refusal):
            sep(images(), 4, 3, name="f")
        assert sep(images(), 4, 3).shape == (2, 6, 6, 4)
    with tf.variable_scope("outer"):
        for layer in layers:
            layer(images())
            with pytest.raises(ValueError, match="No name available"):
                layer.scope_name  # noqa: B018
    with pytest.raises(ValueError, match=refusal):
        layers[0](images(), scope="z")
    assert [names(layer.weights) for layer in layers] == [parts("h"), parts("h_1")]
    assert layers[0].weights[0] is not layers[1].weights[0]
    outside = SepConv(4, 3, name="h")
    outside(images())
    assert outside.scope_name == "h"


MODULES = [module.name for module in pkgutil.iter_modules(tf.__path__, "sepconv.tf1.")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_run(name):
    if name == "sepconv.tf1.train" and not HAS_GRADIENTS:
        pytest.skip("the NumPy backend of Keras has no gradients")
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(importlib.import_module(name)):
        report = []
        runner.run(test, out=report.append)
        assert report == [], "".join(report)
