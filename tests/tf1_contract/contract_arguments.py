"""Checklist 1 to 18: signature and arguments."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from support_tf1 import SepConv, array, defaults, images, names, parts, sep, sum_of

import sepconv.keras
import sepconv.tf1 as tf

ARGUMENTS = [
    ("kernel_size", ...),
    ("strides", (1, 1)),
    ("padding", "valid"),
    ("data_format", "channels_last"),
    ("dilation_rate", (1, 1)),
    ("depth_multiplier", 1),
    ("activation", None),
    ("use_bias", True),
    ("depthwise_initializer", None),
    ("pointwise_initializer", None),
    ("bias_initializer", ...),
    ("depthwise_regularizer", None),
    ("pointwise_regularizer", None),
    ("bias_regularizer", None),
    ("activity_regularizer", None),
    ("depthwise_constraint", None),
    ("pointwise_constraint", None),
    ("bias_constraint", None),
    ("trainable", True),
    ("name", None),
]
POSITIONAL = (
    4, (3, 2), (1, 2), "same", "channels_last", (1, 1), 2, "relu", True, "ones", "ones", "zeros",
    "l2", "l1", sum_of, sum_of, "non_neg", "non_neg", "non_neg", False, "positional",
)  # fmt: skip


def check_defaults(signature: list[tuple[str, object]]) -> None:
    assert [name for name, _ in signature] == [name for name, _ in ARGUMENTS]
    for (name, default), (_, expected) in zip(signature, ARGUMENTS, strict=True):
        if name == "bias_initializer":
            assert isinstance(default, tf.zeros_initializer)
        elif expected is not ...:
            assert default == expected, name


def test_c001_positional_order_and_defaults_of_the_class():
    signature = defaults(SepConv.__init__)
    assert signature[0][0] == "filters"
    check_defaults(signature[1:])
    layer = SepConv(*POSITIONAL)
    assert (layer.filters, layer.kernel_size, layer.strides) == (4, (3, 2), (1, 2))
    assert layer.activity_regularizer is sum_of
    assert (layer.trainable, layer.name) == (False, "positional")
    with pytest.raises(TypeError):
        SepConv(*POSITIONAL, "one more")
    with pytest.raises(TypeError):
        SepConv(4)
    with pytest.raises(TypeError):
        SepConv()


def test_c002_the_function_takes_inputs_first_and_reuse_last():
    signature = defaults(tf.layers.separable_conv2d)
    assert [signature[0][0], signature[1][0]] == ["inputs", "filters"]
    assert signature[-1] == ("reuse", None)
    check_defaults(signature[2:-1])
    assert sep(images(), *POSITIONAL, None).shape == (2, 8, 4, 4)
    with pytest.raises(TypeError):
        sep(images(), 4, 3, dtype="float32")


def test_c003_an_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError) as error:
        SepConv(4, 3, foo=1, bar=2)
    assert error.value.args == ("Keyword argument not understood:", "foo")
    with pytest.raises(TypeError):
        SepConv(4, 3, rank=2)
    SepConv(4, 3, dynamic=True, implementation=1, conv_op=None, kernel_initializer="zeros")
    SepConv(4, 3, kernel_regularizer=None, kernel_constraint=None, groups=2)
    with pytest.raises(ValueError, match="groups"):
        SepConv(4, 3, groups=3)


def test_c004_the_class_is_a_keras_layer_and_a_legacy_layer():
    assert issubclass(SepConv, sepconv.keras.SeparableConv2D)
    assert issubclass(SepConv, keras.layers.SeparableConv2D)
    assert issubclass(SepConv, tf.layers.Layer)
    assert SepConv.__bases__ == (sepconv.keras.SeparableConv2D, tf.layers.Layer)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (5, (5, 5)),
        ((3, 5), (3, 5)),
        ([3, 5], (3, 5)),
        (range(2, 4), (2, 3)),
        (np.array([3, 5]), (3, 5)),
    ],
)
def test_c005_kernel_size_becomes_a_tuple(given, expected):
    assert SepConv(4, given).kernel_size == expected
    assert SepConv(4, iter((3, 5))).kernel_size == (3, 5)


SIZE_ERRORS = [
    ((3,), ValueError, "must be a tuple of 2 integers"),
    ((1, 2, 3), ValueError, "must be a tuple of 2 integers"),
    (None, ValueError, "must be a tuple of 2 integers"),
    (3.0, ValueError, "must be a tuple of 2 integers"),
    ("3", ValueError, "must be a tuple of 2 integers"),
    ((None, 3), ValueError, "None of type .*NoneType"),
    (("a", 3), ValueError, "'a' of type"),
    (-1, ValueError, "does not satisfy the requirement"),
    ("33", TypeError, "2 integers"),
    (("3", "5"), TypeError, "2 integers"),
    ((3.5, 3), TypeError, "2 integers"),
    (True, TypeError, "2 integers"),
    ((True, False), TypeError, "2 integers"),
]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [*SIZE_ERRORS, (0, ValueError, "requirement `> 0`"), ((0, 3), ValueError, "requirement `> 0`")],
)
def test_c006_wrong_kernel_sizes(given, error, message):
    with pytest.raises(error, match=message) as raised:
        SepConv(4, given)
    assert "kernel_size" in str(raised.value)


@pytest.mark.parametrize("argument", ["strides", "dilation_rate"])
@pytest.mark.parametrize(("given", "error", "message"), SIZE_ERRORS)
def test_c007_wrong_strides_and_dilation_rates(argument, given, error, message):
    with pytest.raises(error, match=message) as raised:
        SepConv(4, 3, **{argument: given})
    assert argument in str(raised.value)


@pytest.mark.parametrize("given", [0, (0, 1)])
def test_c007_a_zero_in_strides_has_its_own_message(given):
    with pytest.raises(ValueError, match=r"cannot contains 0\(s\)"):
        SepConv(4, 3, given)
    with pytest.raises(ValueError, match="requirement `> 0`"):
        SepConv(4, 3, dilation_rate=given)
    with pytest.raises(ValueError, match="requirement `>= 0`"):
        SepConv(4, 3, -1)
    assert SepConv(4, 3, [2, 1], dilation_rate=1).strides == (2, 1)
    assert SepConv(4, 3, (2.0, 1.0)).strides == (2, 1)


def test_c008_padding_in_any_case():
    assert SepConv(4, 3, padding="SAME").padding == "same"
    assert SepConv(4, 3, padding="Valid").padding == "valid"
    for text in ("causal", "CAUSAL"):
        with pytest.raises(ValueError, match="Causal padding is only supported for"):
            SepConv(4, 3, padding=text)
    for other in ("full", "", "SAME ", b"same", ["same"], None, 1):
        with pytest.raises(ValueError, match="The `padding` argument must be"):
            SepConv(4, 3, padding=other)


def test_c009_data_format():
    assert SepConv(4, 3, data_format="CHANNELS_FIRST").data_format == "channels_first"
    for other in ("NHWC", "nchw", "", 1):
        with pytest.raises(ValueError, match="The `data_format` argument must be one of"):
            SepConv(4, 3, data_format=other)
    keras.config.set_image_data_format("channels_first")
    try:
        assert SepConv(4, 3, data_format=None).data_format == "channels_first"
        assert SepConv(4, 3).data_format == "channels_last"
    finally:
        keras.config.set_image_data_format("channels_last")


def test_c010_filters():
    for value in (0, -1, 0.5, False):
        with pytest.raises(ValueError, match="strictly positive"):
            SepConv(value, 3)
    assert SepConv(4.7, 3).filters == 4
    with pytest.raises(ValueError, match="filters"):
        SepConv(None, 3)
    with pytest.raises(ValueError, match="filters"):
        SepConv(np.float32(3.5), 3)
    for value in ("4", [4], (4,), True):
        with pytest.raises(TypeError, match="filters"):
            SepConv(value, 3)


def test_c011_activation():
    assert SepConv(4, 3).activation is keras.activations.linear
    assert SepConv(4, 3, activation="relu").activation is keras.activations.relu
    assert SepConv(4, 3, activation=tf.nn.relu).activation is tf.nn.relu
    with pytest.raises(ValueError, match="Unknown activation function"):
        SepConv(4, 3, activation="nope")
    with pytest.raises(TypeError, match="Could not interpret activation function identifier"):
        SepConv(4, 3, activation=3)
    with pytest.raises(ValueError, match="class_name"):
        SepConv(4, 3, activation={})


@pytest.mark.parametrize("kind", ["initializer", "regularizer", "constraint"])
@pytest.mark.parametrize("part", ["depthwise", "pointwise", "bias"])
def test_c012_unknown_names_are_refused_by_the_constructor(kind, part):
    argument = f"{part}_{kind}"
    with pytest.raises(ValueError, match=f"Unknown {kind}"):
        SepConv(4, 3, **{argument: "nope"})
    with pytest.raises(ValueError, match="Could not interpret"):
        SepConv(4, 3, **{argument: 3})
    given = object_of(kind)
    assert getattr(SepConv(4, 3, **{argument: given}), argument) is given
    assert getattr(SepConv(4, 3, **{argument: sum_of}), argument) is sum_of
    assert getattr(SepConv(4, 3, **{argument: type(given)}), argument).__class__ is type(given)


def object_of(kind):
    return {
        "initializer": keras.initializers.Ones(),
        "regularizer": keras.regularizers.L1(0.1),
        "constraint": keras.constraints.NonNeg(),
    }[kind]


def test_c012_an_unknown_activity_regularizer_is_refused_too():
    with pytest.raises(ValueError, match="Unknown regularizer"):
        SepConv(4, 3, activity_regularizer="nope")
    for value in (np.ones(3), images()):
        with pytest.raises(ValueError, match="Could not interpret initializer identifier"):
            SepConv(4, 3, depthwise_initializer=value)


def test_c013_depth_multiplier_below_one():
    for value in (0, -1):
        with pytest.raises(ValueError, match="depth_multiplier"):
            SepConv(4, 3, depth_multiplier=value)
    for value in ("2", 2.0, None, True):
        with pytest.raises(TypeError, match="depth_multiplier"):
            SepConv(4, 3, depth_multiplier=value)


def test_c014_numpy_integers_become_plain_ints():
    layer = SepConv(
        np.int64(4),
        np.int64(3),
        np.int32(1),
        dilation_rate=np.int8(2),
        depth_multiplier=np.int16(2),
    )
    assert (layer.filters, layer.kernel_size, layer.strides) == (4, (3, 3), (1, 1))
    assert (layer.dilation_rate, layer.depth_multiplier) == ((2, 2), 2)
    sizes = [layer.filters, layer.depth_multiplier]
    sizes += [*layer.kernel_size, *layer.strides, *layer.dilation_rate]
    sizes += SepConv(4, np.array([3, 5])).kernel_size
    assert {type(size) for size in sizes} == {int}


def test_c015_strides_with_dilation_are_accepted():
    layer = SepConv(4, 3, strides=2, dilation_rate=2)
    assert layer(images()).shape == (2, 2, 2, 4)
    assert SepConv(4, 3, strides=(1, 2), dilation_rate=(2, 1))(images()).shape == (2, 4, 3, 4)


def test_c016_weights_do_not_exist_before_building():
    layer = SepConv(4, 3)
    for attribute in ("depthwise_kernel", "pointwise_kernel", "bias"):
        with pytest.raises(AttributeError):
            getattr(layer, attribute)
    assert (layer.built, layer.dtype, layer.rank, layer.groups) == (False, None, 2, 1)
    assert layer.weights == layer.losses == layer.updates == layer.metrics == []
    assert (layer.supports_masking, layer.stateful, layer.dynamic) == (False, False, False)
    assert layer.input_spec.min_ndim == 4
    layer(images())
    assert (layer.input_spec.ndim, layer.input_spec.axes) == (4, {-1: 3})
    first = SepConv(4, 3, data_format="channels_first")
    first(images((2, 3, 8, 8)))
    assert (first.input_spec.ndim, first.input_spec.axes) == (4, {-3: 3})
    for attribute in ("name", "dtype", "scope_name"):
        with pytest.raises(AttributeError):
            setattr(layer, attribute, "other")


def test_c017_without_bias_there_are_two_variables(graph):
    layer = SepConv(4, 3, use_bias=False)
    y = layer(images())
    assert layer.bias is None
    assert names(layer.weights) == parts("separable_conv2d", 2)
    assert names(tf.global_variables()) == parts("separable_conv2d", 2)
    kernels = array(layer.depthwise_kernel), array(layer.pointwise_kernel)
    biased = SepConv(4, 3, weights=[*kernels, np.zeros(4)])
    assert np.array_equal(array(y), array(biased(images())))


def test_c018_changing_filters_before_the_first_call_changes_what_is_built():
    layer = SepConv(4, 3)
    layer.filters = 6
    layer.kernel_size = (5, 1)
    assert layer(images()).shape == (2, 4, 8, 6)
    assert layer.depthwise_kernel.shape == (5, 1, 3, 1)
