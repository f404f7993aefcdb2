"""Whole models of Keras as ONNX; run under a backend of Keras."""

from __future__ import annotations

import keras
import numpy as np
import onnxruntime
import pytest
from keras import layers, ops
from keras_fuse_contract import with_random_weights

import sepconv
from sepconv.demo.data import astronaut_face, emotion_model_path
from sepconv.keras import SeparableConv2D
from sepconv.models.onnx import to_onnx

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_names():
    keras.utils.clear_session(free_memory=False)


def check(model, *images, layers_deep=10):
    """Exports a model, runs it beside Keras, and returns the names of its operators."""
    exported = to_onnx(model)
    session = onnxruntime.InferenceSession(
        exported.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_inputs()]
    found = session.run(None, dict(zip(names, images, strict=True)))
    given = list(images) if isinstance(getattr(model, "input", None), list) else images[0]
    wanted = keras.tree.flatten(model(given))
    for mine, theirs in zip(found, map(ops.convert_to_numpy, wanted), strict=True):
        assert mine.shape == theirs.shape
        # Each layer rounds in its own way.
        bound = 4 * layers_deep * np.finfo(np.float32).eps * max(np.abs(theirs).max(), 1e-3)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=bound)
    return [node.op_type for node in exported.graph.node]


def image(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def chain(*steps, shape=(9, 8, 4)):
    """A model of layers one after the other, with weights that matter, and an image for it."""
    return with_random_weights(keras.Sequential([keras.Input(shape), *steps])), image(2, *shape)


CHAINS = {
    "convolutions": [
        layers.Conv2D(6, 3, strides=2, padding="same", activation="relu"),
        layers.Conv2D(4, (1, 3), groups=2, dilation_rate=2, padding="same", use_bias=False),
        layers.DepthwiseConv2D(3, depth_multiplier=2, activation="tanh"),
        SeparableConv2D(5, 2, padding="same", activation="silu"),
        layers.SeparableConv2D(3, 2, activation="softmax"),
    ],
    "poolings": [
        layers.MaxPooling2D(3, strides=2, padding="same"),
        layers.AveragePooling2D(2, strides=1, padding="same"),
        layers.AveragePooling2D((2, 1)),
        layers.GlobalMaxPooling2D(keepdims=True),
    ],
    "slopes": [
        layers.PReLU(shared_axes=[1, 2]),
        layers.Conv2D(4, 1),
        layers.PReLU(shared_axes=[1]),
        layers.Flatten(),
        layers.Dense(3),
        layers.PReLU(),
    ],
    "sizes": [
        layers.ZeroPadding2D(((1, 2), (3, 0))),
        layers.Cropping2D(((0, 1), (2, 1))),
        layers.UpSampling2D((2, 3)),
        layers.UpSampling2D(2, interpolation="bilinear"),
    ],
    "activations": [
        layers.Conv2D(4, 1, activation="softplus"),
        layers.ReLU(max_value=0.5),
        layers.Activation("softsign"),
        layers.LeakyReLU(negative_slope=0.1),
        layers.ReLU(6.0),
        layers.Activation("gelu"),
        layers.Conv2D(5, 1),
        layers.Softmax(),
    ],
    "numbers": [
        layers.Rescaling(1 / 3, offset=[1.0, 2.0, 3.0, 4.0]),
        layers.Normalization(mean=[0.5, 1.0, 1.5, 2.0], variance=[1.0, 2.0, 0.5, 3.0]),
        layers.Conv2D(3, 1),
        layers.BatchNormalization(scale=False),
        layers.Dropout(0.5),
        layers.SpatialDropout2D(0.5),
        layers.GaussianNoise(1.0),
        layers.Flatten(),
        layers.Dense(7, activation="hard_sigmoid"),
        layers.BatchNormalization(),
        layers.Dense(3, use_bias=False, activation="softmax"),
    ],
    "shapes": [
        layers.Conv2D(4, 3),
        layers.Reshape((-1, 4)),
        layers.Dense(6),
        layers.Reshape((7, 6, 6)),
        layers.Conv2D(3, 1),
        layers.GlobalAveragePooling2D(),
        layers.Reshape((1, 1, 3)),
        layers.Conv2D(2, 1),
        layers.Reshape((2,)),
        layers.Activation("log_softmax"),
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_layers_of_keras(name):
    # Layers are made once, and belong to one model.
    model, x = chain(*(type(each).from_config(each.get_config()) for each in CHAINS[name]))
    check(model, x)


def test_transposes_are_at_the_edges_alone():
    model, x = chain(
        layers.Conv2D(4, 3, padding="same"),
        layers.BatchNormalization(),
        layers.ReLU(),
        SeparableConv2D(6, 3, strides=2, padding="same", activation="relu"),
        layers.MaxPooling2D(2),
    )
    operators = check(model, x)
    assert operators == [
        "Transpose", "Conv", "BatchNormalization", "Relu", "Conv", "Conv", "Relu", "MaxPool",
        "Transpose", "Identity",
    ]  # fmt: skip


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [2, 3, (1, 4), 5])
def test_transposed_convolutions(kernel, padding):
    for strides, dilation, added in [
        (1, 1, None), (1, (2, 1), None), (2, 1, None), (2, 1, 0), (2, 1, 1), ((3, 2), 1, None),
        ((3, 4), 1, (2, 1)),
    ]:  # fmt: skip
        model, x = chain(
            layers.Conv2DTranspose(
                3, kernel, strides, padding, output_padding=added, dilation_rate=dilation,
                use_bias=added is None, activation="tanh",
            ),
            shape=(5, 4, 2),
        )  # fmt: skip
        operators = check(model, x)
        assert operators == ["Transpose", "ConvTranspose", "Tanh", "Transpose", "Identity"]


def test_channels_first_of_what_has_numbers_along_them():
    options = {"padding": "same", "data_format": "channels_first"}
    model, x = chain(
        layers.Conv2DTranspose(3, 2, strides=2, **options),
        layers.PReLU(shared_axes=[2, 3]),
        shape=(4, 6, 5),
    )
    check(model, x)


def test_branches_several_inputs_and_numbers():
    one, other = keras.Input((8, 6, 4)), keras.Input((8, 6, 4))
    x = layers.Conv2D(4, 3, padding="same")(one)
    y = layers.SeparableConv2D(4, 3, padding="same")(other)
    both = [layers.Add()([x, y, one]), layers.Multiply()([x, y]), layers.Subtract()([x, y])]
    both += [layers.Maximum()([x, y]), layers.Minimum()([y, x]), layers.Average()([x, y])]
    z = layers.Concatenate()(both)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(z)
    gate = layers.ReLU(6.0)(layers.Conv2D(24, 1)(gate) + 3.0) * (1 / 6)
    z = ops.multiply(z, gate)
    z = layers.Concatenate(axis=1)([z, ops.relu6(1.0 - z) / 2.0])
    model = keras.Model([one, other], [z, layers.GlobalAveragePooling2D()(x)])
    check(with_random_weights(model), image(2, 8, 6, 4), image(2, 8, 6, 4)[::-1])


def test_nested_models_and_shared_layers():
    block = keras.Sequential(
        [keras.Input((None, None, 4)), SeparableConv2D(4, 3, padding="same"), layers.ReLU()],
        name="block",
    )
    shared = layers.Conv2D(4, 1, name="shared")
    inputs = keras.Input((8, 8, 4))
    levels = [shared(block(inputs)), shared(block(layers.MaxPooling2D(2)(inputs)))]
    model = with_random_weights(keras.Model(inputs, levels))
    check(model, image(1, 8, 8, 4))
    exported = to_onnx(model)
    weights = {each.name for each in exported.graph.initializer}
    assert weights == {
        "block/separable_conv2d/depthwise/weight", "block/separable_conv2d/pointwise/weight",
        "block/separable_conv2d/pointwise/bias", "shared/weight", "shared/bias",
    }  # fmt: skip


def test_channels_first():
    inputs = keras.Input((4, 9, 8))
    options = {"padding": "same", "data_format": "channels_first"}
    x = SeparableConv2D(6, 3, strides=2, activation="softmax", **options)(inputs)
    x = layers.BatchNormalization(axis=1)(x)
    outputs = layers.Flatten(data_format="channels_first")(x)
    model = with_random_weights(keras.Model(inputs, outputs))
    exported = to_onnx(model)
    assert [node.op_type for node in exported.graph.node].count("Transpose") == 1
    if keras.backend.backend() != "tensorflow":
        check(model, image(2, 4, 9, 8))


def test_sizes_that_are_not_known():
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(inputs)
    x = SeparableConv2D(5, 3, strides=2, padding="same")(x)
    model = with_random_weights(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))
    for size in (7, 8, 9, 10):
        check(model, image(2, size, size + 1, 3))


@pytest.mark.parametrize("inference", [False, True])
def test_fused_models(inference):
    model, x = chain(
        layers.ZeroPadding2D(((0, 1), (0, 1))),
        layers.DepthwiseConv2D(3, strides=2, use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(6.0),
        layers.Conv2D(5, 1, use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(6.0),
    )
    fused, report = sepconv.fuse(model, inference=inference, inputs=x)
    assert len(report.swapped) == inference
    operators = check(fused, x)
    if inference:
        expected = ["Transpose", "Conv", "Clip", "Conv", "Clip", "Transpose", "Identity"]
        assert operators == expected


def test_a_published_network():
    net = sepconv.load(emotion_model_path())
    operators = check(net, astronaut_face().pixels, layers_deep=45)
    # Its input has one channel; the transpose is of no cost.
    assert operators.count("Transpose") == 1


def application(kind, size):
    options = {"weights": None, "input_shape": (size, size, 3), "classes": 10}
    return with_random_weights(kind(classifier_activation="linear", **options))


@pytest.mark.parametrize(
    ("kind", "size", "deep", "transposes"),
    [
        (keras.applications.MobileNet, 32, 90, 2),
        (keras.applications.MobileNetV3Small, 32, 200, 2),
        (keras.applications.EfficientNetB0, 32, 240, 1),
        (keras.applications.Xception, 71, 130, 1),
    ],
)
def test_networks_of_keras(kind, size, deep, transposes):
    model = application(kind, size)
    operators = check(model, image(1, size, size, 3), layers_deep=deep)
    assert operators.count("Transpose") <= transposes


class Own(layers.Layer):
    def call(self, x):
        return 2 * x


REFUSALS = {
    "a layer of one's own": (lambda: [Own()], "a form in ONNX here. Received: own"),
    "an activation of one's own": (
        lambda: [layers.Conv2D(2, 1, activation=lambda x: 2 * x)], "activations that have a form"
    ),
    "a threshold": (lambda: [layers.ReLU(threshold=0.5)], "no relu with a threshold"),
    "a cubic interpolation": (
        lambda: [layers.UpSampling2D(2, interpolation="bicubic")], "must interpolate by one of"
    ),
    "two dtypes": (lambda: [layers.Conv2D(2, 1, dtype="mixed_float16")], "compute in one dtype"),
    "unknown sizes": (
        lambda: [layers.GlobalMaxPooling2D(), layers.BatchNormalization(),
                 layers.Reshape((2, 2)), layers.BatchNormalization(axis=-1)], "along the channels"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_has_no_form_says_why(case):
    make, reason = REFUSALS[case]
    with pytest.raises(ValueError, match=reason):
        to_onnx(keras.Sequential([keras.Input((4, 4, 4)), *make()]))


def test_models_without_a_graph_are_refused():
    class Coded(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = layers.Conv2D(2, 1)

        def call(self, x):
            return self.conv(x)

    model = Coded()
    model(image(1, 4, 4, 4))
    with pytest.raises(ValueError, match="functional or a sequential model"):
        to_onnx(model)
    inputs = keras.Input((4, 4, 4))
    trained = keras.Model(inputs, layers.BatchNormalization()(inputs, training=True))
    with pytest.raises(ValueError, match="with training=True"):
        to_onnx(trained)
    with pytest.raises(TypeError, match="`spec` and `input_shape` are for single layers"):
        to_onnx(trained, input_shape=(1, 4, 4, 4))
