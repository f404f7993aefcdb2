"""Export to ONNX: the checker accepts it, and onnxruntime computes what sepconv computes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from keras_backends import run_tests

from sepconv import ConvSpec
from sepconv.models.onnx import export_onnx, to_onnx
from sepconv.models.weights import SeparableWeights
from sepconv.numpy import separable_conv2d
from sepconv.spec import ACTIVATIONS

CHANNELS, FILTERS = 3, 4


def weights(kernel=(3, 2), multiplier=1, bias=True, depthwise_bias=False, dtype="float32"):
    rng = np.random.default_rng(0)
    between = CHANNELS * multiplier

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    return SeparableWeights(
        draw(*kernel, CHANNELS, multiplier),
        draw(1, 1, between, FILTERS),
        draw(FILTERS) if bias else None,
        draw(between) if depthwise_bias else None,
    )


def image(spec, height, width):
    x = np.random.default_rng(1).standard_normal((2, height, width, CHANNELS)) * 2
    return np.ascontiguousarray(np.moveaxis(x, 3, spec.channels_axis).astype("float32"))


def run(model, x):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def expected(layer, spec, x):
    arguments = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    return separable_conv2d(x, *layer[:3], depthwise_bias=layer.depthwise_bias, **arguments)


def check(layer, spec, x, input_shape=None, most_nodes=5):
    model = to_onnx(layer, spec=spec, input_shape=input_shape)
    assert len(model.graph.node) <= most_nodes
    y, wanted = run(model, x), expected(layer, spec, x)
    assert y.shape == wanted.shape
    assert np.abs(y - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max())
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("padding", ["same", "valid", ((1, 2), (0, 3))])
@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_every_combination_of_the_options_computes_the_same(data_format, padding, multiplier):
    for strides, dilation, bias, size in itertools.product(
        [(1, 1), (2, 2), (3, 1), (4, 4)], [(1, 1), (2, 1), (3, 2)], [False, True], [(8, 9), (7, 7)]
    ):
        spec = ConvSpec(
            strides=strides, padding=padding, dilation_rate=dilation, data_format=data_format
        )
        x = image(spec, *size)
        check(weights(multiplier=multiplier, bias=bias), spec, x, x.shape)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_one_node_wherever_it_is(activation, data_format):
    spec = ConvSpec(padding="same", activation=activation, data_format=data_format)
    operators = check(weights(), spec, image(spec, 6, 5))
    edges = operators.count("Transpose")
    assert edges == (2 if data_format == "channels_last" else 0)
    assert len(operators) - edges == (2 if activation == "linear" else 3)
    spec = ConvSpec(
        padding="same",
        data_format=data_format,
        input_activation=activation,
        depthwise_activation=activation,
    )
    check(weights(depthwise_bias=True), spec, image(spec, 6, 5), most_nodes=6)


@pytest.mark.parametrize("size", [(7, 7), (8, 9), (1, 2)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
def test_same_padding_of_unknown_sizes_is_that_of_onnx(size, strides):
    spec = ConvSpec(padding="same", strides=strides)
    model = to_onnx(weights(), spec=spec)
    attributes = {each.name for each in model.graph.node[1].attribute}
    assert ("auto_pad" in attributes) == (max(strides) > 1)
    check(weights(), spec, image(spec, *size))


@pytest.mark.parametrize(
    "arguments",
    [{"strides": 2, "dilation_rate": 2}, {"strides": 4}],
    ids=["dilated", "stride-beyond-kernel"],
)
def test_padding_that_depends_on_an_unknown_size_is_refused(arguments):
    spec = ConvSpec(padding="same", **arguments)
    with pytest.raises(ValueError, match="`input_shape` must have a known height and width"):
        to_onnx(weights(), spec=spec)
    x = image(spec, 9, 7)
    check(weights(), spec, x, (None, *x.shape[1:]))


def test_silu_of_an_older_opset_is_two_nodes_and_gelu_is_refused():
    layer, spec = weights(), ConvSpec(activation="silu")
    model = to_onnx(layer, spec=spec, opset=17)
    assert [node.op_type for node in model.graph.node][3:5] == ["Sigmoid", "Mul"]
    x = image(spec, 6, 5)
    np.testing.assert_allclose(run(model, x), expected(layer, spec, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="at least 20 for the activation gelu"):
        to_onnx(layer, spec=ConvSpec(activation="gelu"), opset=17)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_stay_as_they_are(dtype):
    model = to_onnx(weights(dtype=dtype), spec=ConvSpec(activation="relu6"))
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert {each.data_type for each in model.graph.initializer} == {kind}
    assert model.graph.output[0].type.tensor_type.elem_type == kind


def test_a_layer_of_torch_and_its_file(tmp_path):
    torch = pytest.importorskip("torch")
    from sepconv.torch import SeparableConv2d

    for padding in (1, (0, 1), "same", "valid", ((0, 1), (1, 2))):
        layer = SeparableConv2d(
            CHANNELS, FILTERS, 3, 2, padding, depth_multiplier=2, activation="silu",
            depthwise_bias=True, depthwise_activation="relu",
        )  # fmt: skip
        path = tmp_path / "layer.onnx"
        export_onnx(layer, path, input_shape=(None, CHANNELS, 8, 7))
        x = np.random.default_rng(2).standard_normal((2, CHANNELS, 8, 7)).astype("float32")
        y = run(onnx.load(path), x)
        np.testing.assert_allclose(y, layer(torch.tensor(x)).detach(), rtol=1e-5, atol=1e-5)
    assert [each.name for each in tmp_path.iterdir()] == ["layer.onnx"]


# Keras itself converts its variables for NumPy in the old way.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_layers_of_keras_ours_and_stock(data_format):
    from sepconv.keras import SeparableConv2D, keras

    shape = (2, 8, 7, CHANNELS) if data_format == "channels_last" else (2, CHANNELS, 8, 7)
    x = np.random.default_rng(3).standard_normal(shape).astype("float32")
    for kind in (SeparableConv2D, keras.layers.SeparableConv2D):
        layer = kind(
            FILTERS, 3, strides=2, padding="same", depth_multiplier=2, activation="relu6",
            data_format=data_format, bias_initializer="random_normal",
        )  # fmt: skip
        with pytest.raises(ValueError, match="must be built"):
            to_onnx(layer)
        layer.build(shape)
        model = to_onnx(layer)
        assert len(model.graph.node) <= 5
        wanted = SeparableConv2D.from_config(layer.get_config())
        wanted.build(shape)
        wanted.set_weights(layer.get_weights())
        y = keras.ops.convert_to_numpy(wanted(x))
        np.testing.assert_allclose(run(model, x), y, rtol=1e-5, atol=1e-5)
    layer.activation = keras.activations.softmax
    with pytest.raises(ValueError, match="Received: activation='softmax'"):
        to_onnx(layer)


def test_models_of_keras(tmp_path):
    # Nothing depends on the backend but how weights become arrays; torch has nothing to compile.
    run_tests("torch", tmp_path, Path(__file__).parent / "onnx_models_contract.py")


def test_what_cannot_be_exported_is_told():
    with pytest.raises(TypeError, match="`layer` must be"):
        to_onnx("layer")
    with pytest.raises(ValueError, match="non-empty output"):
        to_onnx(weights(), input_shape=(1, 2, 2, CHANNELS))
    with pytest.raises(ValueError, match="four sizes"):
        to_onnx(weights(), input_shape=(2, 2, CHANNELS))
    with pytest.raises(ValueError, match="floating-point"):
        to_onnx(weights(dtype="int32"))
    with pytest.raises(ValueError, match="`pointwise_kernel` must have the shape"):
        to_onnx((np.ones((3, 3, 2, 1), "f"), np.ones((1, 1, 3, 4), "f")))
    with pytest.raises(ValueError, match="`opset` must be at least 14"):
        to_onnx(weights(), opset=9)


def test_a_failed_export_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "layer.onnx"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="`opset`"):
        export_onnx(weights(), path, opset=1)
    assert path.read_bytes() == b"before"
