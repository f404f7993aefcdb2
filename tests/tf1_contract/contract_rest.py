"""Checklist 103 to 111: weights in and out, config, copies, warnings, containers."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import keras
import numpy as np
import pytest
from support_tf1 import SepConv, array, images, names, parts, sum_of, values

import sepconv.tf1 as tf


def called(*args, **kwargs):
    layer = SepConv(4, 3, *args, **kwargs)
    layer(images())
    return layer


def test_c103_get_and_set_weights(mode):
    layer = SepConv(4, 3)
    assert layer.get_weights() == []
    with pytest.raises(ValueError, match="length 1, but the layer was expecting 0 weights"):
        layer.set_weights([np.ones(3)])
    layer(images())
    new = [np.full(w.shape, i, "float32") for i, w in enumerate(layer.weights)]
    layer.set_weights(new)
    assert [w.tolist() for w in layer.get_weights()] == [w.tolist() for w in new]
    assert np.all(array(layer.bias) == 2)
    with pytest.raises(ValueError, match="length 2, but the layer was expecting 3 weights"):
        layer.set_weights(new[:2])
    wrong = [np.zeros_like(new[0]), np.zeros((1, 1, 4, 3)), new[2]]
    with pytest.raises(ValueError, match="not compatible with provided weight shape"):
        layer.set_weights(wrong)
    assert np.array_equal(layer.get_weights()[1], new[1])
    assert np.array_equal(layer.get_weights()[0], new[0])


def test_c104_count_params(mode):
    layer = SepConv(5, (3, 2), depth_multiplier=2)
    with pytest.raises(ValueError, match="but the layer isn't built"):
        layer.count_params()
    layer(images())
    assert layer.count_params() == 3 * 2 * 3 * 2 + 3 * 2 * 5 + 5
    assert called(use_bias=False).count_params() == 27 + 12


def test_c105_weights_in_the_constructor(mode):
    weights = [np.ones((3, 3, 3, 1)), np.ones((1, 1, 3, 4)), np.arange(4.0)]
    layer = SepConv(4, 3, weights=weights)
    y = layer(images((1, 3, 3, 3)))
    assert np.array_equal(array(layer.bias), weights[2])
    expected = array(images((1, 3, 3, 3))).sum() + weights[2]
    assert np.allclose(array(y).ravel(), expected, atol=1e-5)
    assert "weights" not in layer.get_config()
    with pytest.raises(ValueError, match="expecting 3 weights"):
        called(weights=weights[:2])


CONFIG_KEYS = {
    "name", "trainable", "dtype", "filters", "kernel_size", "strides", "padding", "data_format",
    "dilation_rate", "activation", "use_bias", "bias_initializer", "bias_regularizer",
    "activity_regularizer", "bias_constraint", "depth_multiplier", "depthwise_initializer",
    "pointwise_initializer", "depthwise_regularizer", "pointwise_regularizer",
    "depthwise_constraint", "pointwise_constraint",
}  # fmt: skip

ORIGINAL_CONFIG = {
    "name": "separable_conv2d_2", "trainable": True,
    "dtype": {"module": "keras.mixed_precision", "class_name": "Policy",
              "config": {"name": "mixed_float16"}, "registered_name": None},
    "filters": 4, "kernel_size": [3, 3], "strides": [1, 1], "padding": "valid",
    "data_format": "channels_last", "dilation_rate": [1, 1], "groups": 1, "activation": "relu",
    "use_bias": True,
    "kernel_initializer": {"module": "keras.initializers", "class_name": "GlorotUniform",
                           "config": {"seed": None}, "registered_name": None},
    "bias_initializer": {"module": "keras.initializers", "class_name": "Constant",
                         "config": {"value": 2.0, "dtype": "float32"}, "registered_name": None},
    "kernel_regularizer": None, "bias_regularizer": None, "activity_regularizer": None,
    "kernel_constraint": None,
    "bias_constraint": {"module": "keras.constraints", "class_name": "NonNeg", "config": {},
                        "registered_name": None},
    "depth_multiplier": 1,
    "depthwise_initializer": {"module": "keras.initializers", "class_name": "glorot_uniform",
                              "config": {"seed": None, "dtype": "float32"},
                              "registered_name": None},
    "pointwise_initializer": {"module": "keras.initializers", "class_name": "HeNormal",
                              "config": {"seed": None}, "registered_name": None},
    "depthwise_regularizer": {"module": "keras.regularizers", "class_name": "L2",
                              "config": {"l2": 0.125}, "registered_name": None},
    "pointwise_regularizer": None, "depthwise_constraint": None, "pointwise_constraint": None,
}  # fmt: skip
"""What the original wrote for a layer with something in every kind of argument."""


def test_c106_get_config_is_ready_for_json(mode):
    layer = SepConv(
        4, [3, 5], padding="SAME", activation=tf.nn.relu, name="n", trainable=False,
        depthwise_initializer=tf.truncated_normal_initializer(stddev=0.5, seed=3),
        pointwise_regularizer="l1", activity_regularizer=keras.regularizers.L2(0.5),
        bias_constraint="non_neg",
    )  # fmt: skip
    config = layer.get_config()
    assert set(config) == CONFIG_KEYS
    assert (config["kernel_size"], config["padding"]) == ((3, 5), "same")
    assert (config["dtype"], config["activation"]) == (None, "relu")
    assert config["pointwise_initializer"] is None
    again = SepConv.from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    assert again.name == "n"
    layer(images())
    assert layer.get_config() == {**config, "dtype": "float32"}
    with pytest.raises(TypeError, match="understood"):
        SepConv.from_config({**config, "unknown": 1})
    shaped = SepConv(4, 3, input_shape=(8, 8, 3)).get_config()
    assert shaped["batch_input_shape"] == (None, 8, 8, 3)
    mixed = SepConv(4, 3, dtype="mixed_float16").get_config()
    assert SepConv.from_config(mixed).get_config() == mixed
    assert mixed["dtype"]["config"] == {"name": "mixed_float16"}


def test_c106_the_originals_config_is_accepted(mode):
    assert len(ORIGINAL_CONFIG) == 26
    layer = SepConv.from_config(ORIGINAL_CONFIG)
    assert (layer.dtype, layer.compute_dtype) == ("float32", "float16")
    assert layer.depthwise_regularizer.l2 == 0.125
    config = layer.get_config()
    assert set(ORIGINAL_CONFIG) - set(config) == {
        "groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint",
    }  # fmt: skip
    layer(images(dtype="float16"))
    assert np.all(array(layer.bias) == 2)


def test_c106_the_function_given_as_activation_may_be_a_lambda():
    layer = SepConv(4, 3, activation=lambda y: 2 * y)
    with pytest.warns(UserWarning, match="lambda"):
        assert layer.get_config()["activation"]["class_name"] == "__lambda__"


def test_c107_deepcopy(mode):
    unbuilt = SepConv(4, 3, name="foo", activation=sum_of)
    unbuilt.filters = 7
    twin = copy.deepcopy(unbuilt)
    assert (twin.name, twin.filters, twin.activation) == ("foo", 7, sum_of)
    assert SepConv(4, 3).name == "separable_conv2d_1"
    layer = called(name="foo")
    second = copy.deepcopy(SepConv(4, 3, name="foo"))
    second(images())
    assert (layer.scope_name, second.scope_name) == ("foo", "foo_1")
    made = len(tf.global_variables())
    twin = copy.deepcopy(layer)
    assert twin.scope_name == "foo"
    assert names(twin.weights) == parts("foo")
    assert np.array_equal(array(twin(images())), array(layer(images())))
    twin.bias.assign(np.ones(4))
    assert np.all(array(layer.bias) == 0)
    assert len(tf.global_variables()) == made
    assert copy.copy(layer).bias is layer.bias


def test_c107_deepcopy_keeps_losses_flags_and_extras(mode):
    layer = SepConv(4, 3, depthwise_regularizer=sum_of, trainable=False, name="foo")
    layer.add_weight("extra", [2], initializer="ones")
    layer(images())
    layer.note = ["kept"]
    twin = copy.deepcopy(layer)
    assert names(twin.weights) == ["foo/extra", *parts("foo")]
    assert values(twin.losses) == pytest.approx(values(layer.losses))
    assert twin.trainable_weights == []
    assert twin.note == ["kept"]
    assert twin.note is not layer.note


@pytest.mark.parametrize("built", [False, True])
def test_c108_pickle(mode, built):
    layer = SepConv(4, 3, name="foo", padding="same", depthwise_regularizer="l2")
    if built:
        layer(images())
    again = pickle.loads(pickle.dumps(layer))
    assert again.get_config() == layer.get_config()
    assert again.built is built
    if built:
        assert again.scope_name == "foo"
        for ours, theirs in zip(again.get_weights(), layer.get_weights(), strict=True):
            assert np.array_equal(ours, theirs)
        assert np.array_equal(array(again(images())), array(layer(images())))
    else:
        again(images())


def test_c109_the_function_warns_once_at_the_callers_line(mode):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tf.layers.separable_conv2d(images(), 4, 3)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert issubclass(caught[0].category, UserWarning)
    assert issubclass(caught[0].category, DeprecationWarning)
    assert "separable_conv2d` is deprecated" in str(caught[0].message)


def test_c109_nothing_else_warns(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = called()
        layer.apply(images())
        layer.get_config()
    with pytest.warns(UserWarning, match="add_weight") as caught:
        SepConv(4, 3).add_variable("extra", [2])
    assert caught[0].filename == __file__


def test_c110_sequential(mode):
    layer = SepConv(4, 3, name="sep")
    model = keras.Sequential([layer])
    y = model(images())
    assert np.array_equal(array(y), array(layer(images())))
    assert names(layer.weights) == parts("sep")
    with_input = keras.Sequential([keras.Input((8, 8, 3)), SepConv(4, 3)])
    assert with_input.output_shape == (None, 6, 6, 4)


def test_c110_functional(mode):
    first, second = SepConv(4, 3, name="net/a", activation="relu"), SepConv(2, 3)
    inputs = keras.Input((8, 8, 3))
    middle = first(inputs)
    model = keras.Model(inputs, second(middle))
    assert array(model(images())).shape == (2, 4, 4, 2)
    assert (first.input_shape, first.output_shape) == ((None, 8, 8, 3), (None, 6, 6, 4))
    assert first.input is inputs
    assert first.get_output_at(0) is middle
    assert len(model.trainable_variables) == 6
    assert names(first.weights) == parts("net/a")


def test_c110_without_a_keras_tensor_there_is_no_record(mode):
    layer = called()
    for attribute in ("input", "output", "input_shape", "output_shape", "input_mask"):
        with pytest.raises(AttributeError):
            getattr(layer, attribute)
    for method in (layer.get_input_at, layer.get_output_at):
        with pytest.raises(RuntimeError):
            method(0)
    assert layer.inbound_nodes == layer.outbound_nodes == []


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("stride", "dilation"), [(2, 2), (3, 2), (2, 3)])
def test_c111_strides_with_dilation(padding, stride, dilation):
    x = array(images((2, 11, 12, 3), "float64"))
    layer = SepConv(4, 3, stride, padding, dilation_rate=dilation)
    y = array(layer(x))
    reach = 2 * dilation + 1
    if padding == "same":
        pads = []
        for size in x.shape[1:3]:
            amount = max((-(-size // stride) - 1) * stride + reach - size, 0)
            pads.append((amount // 2, amount - amount // 2))
        x = np.pad(x, [(0, 0), *pads, (0, 0)])
    plain = SepConv(4, 3, dilation_rate=dilation, weights=layer.get_weights())
    expected = array(plain(x))[:, ::stride, ::stride]
    assert y.shape == expected.shape
    assert np.abs(y - expected).max() < 1e-12
