"""What `sepconv.fuse` and `sepconv.to_stock` owe a Keras model; run under a backend of Keras."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops
from numpy.testing import assert_allclose, assert_array_equal

import sepconv
from sepconv.keras import SeparableConv2D
from sepconv.models.keras_fused import FusedSeparableConv2D

STOCK = layers.SeparableConv2D
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_names():
    keras.utils.clear_session(free_memory=False)


def with_random_weights(model):
    """The model, with weights that make every stage matter; variances are positive."""
    rng = np.random.default_rng(1)
    for variable in model.weights:
        if variable.path.endswith(("gamma", "variance")):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        else:
            fan = max(1, int(np.prod(variable.shape[:-1])))
            variable.assign(rng.standard_normal(variable.shape) / fan**0.5)
    return model


def functional(*chain, shape=(12, 10, 3)):
    """The model of one layer after the other, with random weights."""
    inputs = x = keras.Input(shape)
    for layer in chain:
        x = layer(x)
    return with_random_weights(keras.Model(inputs, x))


def batch(*shape, seed=5):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def outputs(model, x):
    return [ops.convert_to_numpy(each) for each in keras.tree.flatten(model(x, training=False))]


def assert_same(model, other, x, tolerance=1e-5):
    for a, b in zip(outputs(model, x), outputs(other, x), strict=True):
        assert_allclose(b, a, rtol=0, atol=tolerance * max(1.0, np.abs(a).max()))


def kinds(model):
    return [type(layer) for layer in model.layers]


def only(report):
    (candidate,) = report.candidates
    return candidate


# -------------------------------------------------------------------------------- where it swaps


def test_a_functional_model():
    net = functional(STOCK(4, 3, activation="relu"), STOCK(5, (3, 1), strides=1, padding="same"))
    model, report = sepconv.fuse(net)
    assert kinds(model)[1:] == [SeparableConv2D, SeparableConv2D]
    assert [each.name for each in report.swapped] == ["separable_conv2d", "separable_conv2d_1"]
    assert [each.name for each in model.layers[1:]] == [each.name for each in net.layers[1:]]
    for mine, theirs in zip(model.weights, net.weights, strict=True):
        assert mine is not theirs
        assert mine.path == theirs.path
        assert_array_equal(ops.convert_to_numpy(mine), ops.convert_to_numpy(theirs))
    assert report.renamed == {}
    assert_same(net, model, batch(2, 12, 10, 3))


def test_a_sequential_model():
    net = keras.Sequential(
        [keras.Input((12, 10, 3)), STOCK(4, 3), layers.Dropout(0.5), STOCK(2, 3)]
    )
    model, report = sepconv.fuse(with_random_weights(net))
    assert type(model) is keras.Sequential
    assert kinds(model) == [SeparableConv2D, layers.Dropout, SeparableConv2D]
    assert len(report.swapped) == 2
    assert_same(net, model, batch(2, 12, 10, 3))


def test_a_pair_becomes_one_layer():
    net = functional(
        layers.DepthwiseConv2D(3, depth_multiplier=2, activation="silu", padding="same", strides=2),
        layers.Conv2D(5, 1, activation="relu", kernel_regularizer="l2"),
    )
    model, report = sepconv.fuse(net)
    assert kinds(model)[1:] == [FusedSeparableConv2D]
    assert only(report).kind == "DepthwiseConv2D + Conv2D"
    layer = model.layers[-1]
    assert layer.name == "conv2d"
    assert layer.depthwise_activation == "silu"
    assert layer.pointwise_regularizer is not None
    assert layer.depthwise_regularizer is None
    assert report.renamed == {
        "depthwise_conv2d/kernel": "conv2d/depthwise_kernel",
        "depthwise_conv2d/bias": "conv2d/depthwise_bias",
        "conv2d/kernel": "conv2d/pointwise_kernel",
    }
    assert_same(net, model, batch(2, 12, 10, 3))


def test_nested_models_stay_nested():
    stage = keras.Sequential(
        [keras.Input((10, 8, 4)), STOCK(4, 3, padding="same"), layers.ReLU()], name="stage"
    )
    inner_input = keras.Input((10, 8, 4))
    inner = keras.Model(inner_input, layers.add([stage(inner_input), inner_input]), name="inner")
    inputs = keras.Input((12, 10, 3))
    x = STOCK(4, 3)(inputs)
    net = with_random_weights(keras.Model(inputs, inner(inner(x)), name="outer"))
    model, report = sepconv.fuse(net)
    assert [(each.name, each.calls) for each in report.swapped] == [
        ("separable_conv2d_1", 1),
        ("inner/stage/separable_conv2d", 2),
    ]
    assert type(model.get_layer("inner").get_layer("stage").layers[0]) is SeparableConv2D
    assert len(model.weights) == len(net.weights)
    assert_same(net, model, batch(2, 12, 10, 3))
    folded, report = sepconv.fuse(net, inference=True)
    assert report.swapped[1].absorbed == ("inner/stage/re_lu",)
    assert kinds(folded.get_layer("inner").get_layer("stage")) == [SeparableConv2D]
    assert_same(net, folded, batch(2, 12, 10, 3))


def pyramid_head(levels=5):
    """A head whose convolutions five levels share, each with a batch norm of its own."""
    shared = STOCK(4, 3, padding="same", name="shared")
    depthwise = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")
    pointwise = layers.Conv2D(6, 1, name="pointwise")
    inputs, results = [], []
    for level in range(levels):
        x = keras.Input((2 ** (levels - level), 2 ** (levels - level), 4))
        inputs.append(x)
        x = layers.Activation("silu")(layers.BatchNormalization()(shared(x)))
        results.append(pointwise(depthwise(x)))
    return with_random_weights(keras.Model(inputs, results))


@pytest.mark.parametrize("inference", [False, True])
def test_a_head_that_five_levels_share_stays_shared(inference):
    net = pyramid_head()
    model, report = sepconv.fuse(net, inference=inference)
    assert [(each.name, each.calls) for each in report.swapped] == [
        ("shared", 5),
        ("depthwise + pointwise", 5),
    ]
    ours = [layer for layer in model.layers if isinstance(layer, SeparableConv2D)]
    assert [layer.name for layer in ours] == ["shared", "pointwise"]
    assert len(model.weights) == len(net.weights)
    pixels = sum(4**level for level in range(1, 6))
    assert report.swapped[0].macs == pixels * 4 * (9 + 4)
    assert report.swapped[0].hidden_bytes == pixels * 4 * 4
    values = [batch(2, 2**k, 2**k, 4) for k in range(5, 0, -1)]
    assert_same(net, model, values)
    assert_same(net, sepconv.to_stock(model), values)


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    """Calls layers in code of its own."""

    def __init__(self, filters, **arguments):
        super().__init__(**arguments)
        self.filters = filters
        self.first = STOCK(filters, 3, padding="same", name="first")
        self.rest = [STOCK(filters, 3, padding="same", name=f"rest{k}") for k in range(2)]
        self.depthwise = layers.DepthwiseConv2D(3, padding="same", name="depthwise")

    def build(self, shape):
        self.first.build(shape)
        for layer in (*self.rest, self.depthwise):
            layer.build((*shape[:-1], self.filters))

    def call(self, x):
        x = self.first(x)
        for layer in self.rest:
            x = layer(ops.relu(x))
        return self.depthwise(x)

    def get_config(self):
        return super().get_config() | {"filters": self.filters}


@keras.saving.register_keras_serializable(package="tests")
class Net(keras.Model):
    """A model without a graph."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.block = Block(4, name="block")
        self.last = STOCK(2, 3, name="last")

    def call(self, x):
        return self.last(self.block(x))

    def get_config(self):
        return super().get_config()


def test_layers_inside_of_layers_with_code():
    net = functional(Block(4, name="block"), STOCK(2, 3))
    net.get_layer("block").rest[0].trainable = False
    model, report = sepconv.fuse(net)
    assert [each.name for each in report.swapped] == [
        "separable_conv2d",
        "block/first",
        "block/rest0",
        "block/rest1",
    ]
    (left,) = report.left
    assert left.name == "block/depthwise"
    assert left.reason == "what follows it is in the code of Block.call"
    block = model.get_layer("block")
    assert [type(each) for each in (block.first, *block.rest)] == [SeparableConv2D] * 3
    assert [each.trainable for each in (block, block.first, *block.rest)] == [
        True,
        True,
        False,
        True,
    ]
    assert type(net.get_layer("block").first) is STOCK
    assert any("block makes its layers itself" in note for note in report.notes)
    assert_same(net, model, batch(2, 12, 10, 3))
    stock = sepconv.to_stock(model)
    assert type(stock.get_layer("block").rest[1]) is STOCK
    assert_same(net, stock, batch(2, 12, 10, 3))


def test_a_model_with_code():
    net = Net()
    net(batch(2, 12, 10, 3))
    with_random_weights(net)
    model, report = sepconv.fuse(net, exclude="rest0")
    assert type(model) is Net
    assert type(model.last) is type(model.block.rest[1]) is SeparableConv2D
    assert type(model.block.rest[0]) is STOCK
    assert {each.name: each.reason for each in report.left}["rest0"] == "excluded"
    assert report.found_by == "layers of the model, one by one"
    assert all(each.difference is None for each in report.candidates)
    assert report.output_largest > 0
    assert_same(net, model, batch(2, 12, 10, 3))
    assert_same(net, sepconv.to_stock(model), batch(2, 12, 10, 3))


def test_weights_are_not_drawn_at_random_before_they_get_their_values():
    drawn = []

    @keras.saving.register_keras_serializable(package="tests")
    class Recorded(keras.initializers.Initializer):
        def __call__(self, shape, dtype=None):
            drawn.append(shape)
            return keras.ops.ones(shape, dtype)

    model = functional(
        layers.DepthwiseConv2D(3, depthwise_initializer=Recorded()),
        layers.Conv2D(4, 1, kernel_initializer=Recorded()),
        layers.Dense(2, kernel_initializer=Recorded()),
    )
    drawn.clear()
    for each in (new := sepconv.fuse(model).model, sepconv.to_stock(new)):
        assert drawn == []
        assert_same(each, model, batch(1, 12, 10, 3))
    # The optimizer of a compiled model makes variables of numbers, which Keras has no such way for.
    model.compile("adam", "mse")
    new = sepconv.fuse(model).model
    assert new.compiled
    assert sepconv.to_stock(new).compiled


def test_training_the_copy_leaves_the_original_as_it_was():
    model = functional(
        layers.DepthwiseConv2D(3), layers.Conv2D(8, 1), layers.Conv2D(4, 3), STOCK(2, 3)
    )
    x = batch(1, 12, 10, 3)
    for make in (lambda each: sepconv.fuse(each).model, sepconv.to_stock):
        before = outputs(model, x)
        new = make(model)
        new.compile(keras.optimizers.SGD(0.1), "mse")
        new.fit(x, np.ones((1, 6, 4, 2), "float32"), verbose=0)
        assert_array_equal(outputs(model, x), before)
        assert not np.allclose(outputs(new, x), before)
        model = new


def test_layers_of_ours_stay_and_are_no_candidates():
    net = functional(SeparableConv2D(4, 3), STOCK(3, 3))
    model, report = sepconv.fuse(net)
    assert only(report).name == "separable_conv2d_1"
    assert kinds(model)[1:] == [SeparableConv2D, SeparableConv2D]
    model, report = sepconv.fuse(model)
    assert report.candidates == ()


# ------------------------------------------------------------------------------ what it folds in


ACTIVATION_LAYERS = {
    "relu": lambda: layers.ReLU(),
    "relu6": lambda: layers.ReLU(6.0),
    "leaky_relu": lambda: layers.LeakyReLU(0.2),
    "elu": lambda: layers.ELU(),
    "silu": lambda: layers.Activation("silu"),
    "tanh": lambda: layers.Activation(layers.Activation("tanh")),
    "sigmoid": lambda: ops.sigmoid,
    "hard_sigmoid": lambda: layers.Activation("hard_sigmoid"),
    "hard_silu": lambda: ops.hard_silu,
    "gelu": lambda: lambda x: ops.gelu(x, approximate=False),
}


@pytest.mark.parametrize("name", ACTIVATION_LAYERS)
def test_activations_before_between_and_after(name):
    activation = ACTIVATION_LAYERS[name]
    net = functional(
        layers.Conv2D(4, 1),
        activation(),
        layers.DepthwiseConv2D(3, use_bias=False, padding="same"),
        layers.BatchNormalization(),
        activation(),
        layers.Conv2D(5, 1),
        layers.BatchNormalization(scale=False),
        layers.BatchNormalization(center=False),
        activation(),
    )
    model, report = sepconv.fuse(net, inference=True)
    layer = model.layers[-1]
    assert kinds(model)[2:] == [FusedSeparableConv2D]
    assert len(only(report).absorbed) == 6
    assert layer.input_activation == layer.depthwise_activation == name
    assert layer.activation is getattr(keras.activations, name)
    assert_same(net, model, batch(2, 12, 10, 3))
    stock = sepconv.to_stock(model)
    assert kinds(stock)[2:] == [layers.Activation, layers.DepthwiseConv2D, layers.Conv2D]
    assert_same(net, stock, batch(2, 12, 10, 3))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_a_padding_before_stride_two(data_format):
    if data_format == "channels_first" and keras.config.backend() == "tensorflow":
        pytest.skip("TensorFlow has no such depthwise convolution on CPUs")
    net = functional(
        layers.ReLU(6.0),
        layers.ZeroPadding2D(((0, 1), (2, 1)), data_format=data_format),
        layers.DepthwiseConv2D(
            3, strides=2, depth_multiplier=2, use_bias=True, data_format=data_format
        ),
        layers.BatchNormalization(axis=1 if data_format == "channels_first" else -1),
        layers.ReLU(6.0),
        layers.Conv2D(5, 1, use_bias=False, data_format=data_format),
        layers.BatchNormalization(axis=1 if data_format == "channels_first" else 3),
        layers.ReLU(6.0),
        shape=(12, 10, 6) if data_format == "channels_last" else (6, 12, 10),
    )
    x = batch(*((2, 12, 10, 6) if data_format == "channels_last" else (2, 6, 12, 10)))
    model, report = sepconv.fuse(net, inference=True)
    assert kinds(model)[1:] == [FusedSeparableConv2D]
    assert model.layers[-1].padding == ((0, 1), (2, 1))
    assert model.layers[-1].input_activation == "relu6"
    assert only(report).macs == 6 * 6 * 12 * (9 + 5)
    assert_same(net, model, x)
    stock = sepconv.to_stock(model)
    assert [kind.__name__ for kind in kinds(stock)[1:]] == [
        "Activation",
        "ZeroPadding2D",
        "DepthwiseConv2D",
        "Conv2D",
    ]
    assert_same(net, stock, x)


def test_a_separable_layer_takes_what_stands_around_it():
    net = functional(
        layers.Conv2D(4, 1),
        layers.ReLU(),
        STOCK(5, 3, use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
        STOCK(6, 3, use_bias=False),
        layers.BatchNormalization(),
    )
    model, report = sepconv.fuse(net, inference=True)
    assert kinds(model)[2:] == [FusedSeparableConv2D, SeparableConv2D]
    assert [len(each.absorbed) for each in report.swapped] == [3, 1]
    assert any("do not follow the data" in note for note in report.notes)
    assert_same(net, model, batch(2, 12, 10, 3))
    stock = sepconv.to_stock(model)
    assert kinds(stock)[2:] == [layers.Activation, STOCK, STOCK]
    assert_same(net, stock, batch(2, 12, 10, 3))


def test_layers_of_ours_take_what_stands_around_them():
    # What `sepconv.load` makes of a file of Keras 2.
    model = functional(
        SeparableConv2D(6, 3, padding="same", use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
    )
    fused, report = sepconv.fuse(model, inference=True)
    assert [type(layer) for layer in fused.layers[1:]] == [SeparableConv2D]
    assert len(report.swapped) == 1
    assert_same(model, fused, batch(2, 12, 10, 3))


def test_what_training_needs_is_not_folded():
    net = functional(STOCK(4, 3), layers.BatchNormalization(), layers.ReLU())
    model, report = sepconv.fuse(net)
    assert kinds(model)[1:] == [SeparableConv2D, layers.BatchNormalization, layers.ReLU]
    assert only(report).absorbed == ()


def test_a_batch_norm_that_trains_all_the_time_is_not_folded():
    inputs = keras.Input((12, 10, 3))
    x = layers.BatchNormalization(name="always")(STOCK(4, 3)(inputs), training=True)
    net = with_random_weights(keras.Model(inputs, x))
    before = net.get_weights()
    model, report = sepconv.fuse(net, inference=True)
    assert only(report).absorbed == ()
    assert kinds(model)[-1] is layers.BatchNormalization
    for old, now, mine in zip(before, net.get_weights(), model.get_weights(), strict=True):
        assert_array_equal(now, old)
        assert_array_equal(mine, old)


def test_a_nested_model_that_trains_all_the_time_is_not_folded():
    stage = keras.Sequential([keras.Input((12, 10, 3)), STOCK(4, 3), layers.BatchNormalization()])
    inputs = keras.Input((12, 10, 3))
    net = with_random_weights(keras.Model(inputs, stage(inputs, training=True)))
    _, report = sepconv.fuse(net, inference=True)
    assert only(report).absorbed == ()


# ------------------------------------------------------------------------- what it does not swap


class Own(STOCK):
    """May compute anything."""


def branches(x):
    x = layers.DepthwiseConv2D(3)(x)
    return [layers.Conv2D(4, 1, name="a")(x), layers.Conv2D(4, 1, name="b")(x)]


def squeeze_excite(x):
    x = layers.DepthwiseConv2D(3)(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    x = layers.Multiply()([x, layers.Conv2D(3, 1, activation="sigmoid")(gate)])
    return layers.Conv2D(4, 1)(x)


def shared_depthwise(x):
    layer = layers.DepthwiseConv2D(3)
    return [layers.Conv2D(4, 1, name="a")(layer(x)), layers.Conv2D(4, 1, name="b")(layer(x))]


def seen_from_outside(x):
    x = layers.DepthwiseConv2D(3)(x)
    return [x, layers.Conv2D(4, 1)(x)]


def pair(*, between=(), depthwise=None, pointwise=None, first=None):
    """Builds a pair with arguments for either layer, and layers between."""

    def build(x):
        x = (first or layers.DepthwiseConv2D(3, **(depthwise or {})))(x)
        for layer in between:
            x = layer()(x)
        arguments = {"kernel_size": 1} | (pointwise or {})
        return layers.Conv2D(4, **arguments)(x)

    return build


REFUSALS = [
    (False, pair(between=[layers.BatchNormalization]), "follows the data in training"),
    (True, branches, "its output goes to 2 places: a, b"),
    (True, squeeze_excite, "squeeze-and-excite between the stages"),
    (True, shared_depthwise, "its calls are followed by different layers: a, b"),
    (True, seen_from_outside, "its output is an output of a model"),
    (True, lambda x: Own(4, 3)(x), "Own is a class of its own"),
    (True, pair(between=[layers.ReLU, layers.BatchNormalization]), "comes after the activation"),
    (True, pair(between=[layers.ReLU, layers.ELU]), "is a second activation between the stages"),
    (True, pair(between=[lambda: layers.ReLU(3.0)]), "(ReLU), not by a convolution of 1x1"),
    (True, pair(between=[layers.MaxPooling2D]), "(MaxPooling2D), not by a convolution of 1x1"),
    (True, pair(between=[lambda: layers.BatchNormalization(axis=1)]), "not along the channels"),
    (True, pair(pointwise={"kernel_size": 3}), "has a kernel of (3, 3) pixels"),
    (True, pair(pointwise={"strides": 2}), "has strides: (2, 2)"),
    (True, pair(depthwise={"depth_multiplier": 4}, pointwise={"groups": 2}), "has 2 groups"),
    (True, pair(depthwise={"activation": "softplus"}), "none that the kernel has"),
    (True, pair(depthwise={"dtype": "float16"}), "has the dtype policy"),
    (False, pair(depthwise={"trainable": False}), "is frozen and the other is not"),
    (False, pair(depthwise={"activity_regularizer": "l2"}), "a penalty on what is between"),
    (True, lambda x: layers.DepthwiseConv2D(3)(x), "its output is an output of a model"),
]


@pytest.mark.parametrize(("inference", "build", "reason"), REFUSALS)
def test_a_refusal_says_why(inference, build, reason):
    inputs = keras.Input((12, 10, 3))
    net = with_random_weights(keras.Model(inputs, build(inputs)))
    model, report = sepconv.fuse(net, inference=inference)
    candidate = only(report)
    assert reason in candidate.reason
    assert candidate.hidden_bytes == 0
    assert candidate.difference is None
    assert kinds(model) == kinds(net)
    assert reason in str(report)
    assert_same(net, model, batch(2, 12, 10, 3), tolerance=0)


def test_exclude():
    net = functional(
        STOCK(4, 3, name="a"),
        layers.DepthwiseConv2D(3, name="b"),
        layers.Conv2D(4, 1, name="c"),
        STOCK(3, 3, name="d"),
        layers.ReLU(name="e"),
    )
    for exclude in ("c", ["c"], net.get_layer("c"), lambda layer: layer.name == "c"):
        _, report = sepconv.fuse(net, exclude=exclude)
        assert [(each.name, each.reason) for each in report.left] == [("b + c", "excluded")]
    _, report = sepconv.fuse(net, exclude=["a", "e"], inference=True)
    assert [each.name for each in report.left] == ["a"]
    assert report.swapped[-1].absorbed == ()
    with pytest.raises(ValueError, match=r"must name layers of the model\. Received: 'nobody'"):
        sepconv.fuse(net, exclude="nobody")
    with pytest.raises(TypeError, match="must be made of names, layers and functions"):
        sepconv.fuse(net, exclude=3)
