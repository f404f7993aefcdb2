"""Checklist 94 to 102: arithmetic and shapes."""

from __future__ import annotations

import itertools

import goldens
import numpy as np
import pytest
from support_tf1 import BACKEND, HAS_GRADIENTS, SepConv, array, images, needs_gradients, rounding

import sepconv.tf1 as tf

CASES = goldens.load_cases()


def layer_of(case, dtype):
    weights = [weight for weight in case.inputs(dtype)[1:] if weight is not None]
    # Random values would be thrown away, and JAX compiles their drawing for every shape.
    zeros = {f"{stage}_initializer": "zeros" for stage in ("depthwise", "pointwise")}
    return SepConv(**case.config, **zeros, dtype=dtype, weights=weights)


def value_and_gradients(layer, x, upstream):
    """Output, and the gradients of sum(upstream * output) by input and weights."""
    layer.build(x.shape)
    if BACKEND == "jax":
        return compiled_value_and_gradients(layer, x, upstream)
    outputs, inputs = [], tf.Variable(x, name="x")

    def loss():
        outputs.append(layer(inputs))
        return tf.reduce_sum(outputs[0] * tf.constant(upstream))

    _, gradients = tf.train.value_and_gradients(loss, [inputs, *layer.weights])
    return array(outputs[0]), [array(gradient) for gradient in gradients]


def compiled_value_and_gradients(layer, x, upstream):
    """As users of JAX take them: of `stateless_call`, inside `jax.jit`."""
    import jax

    @jax.jit
    def compiled(x, weights, upstream):
        y, pullback = jax.vjp(
            lambda x, weights: layer.stateless_call(weights, [], x)[0], x, weights
        )
        return y, pullback(upstream)

    y, (d_x, d_weights) = compiled(x, [weight.value for weight in layer.weights], upstream)
    return array(y), [array(gradient) for gradient in (d_x, *d_weights)]


def check(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    if theirs.size:
        assert np.abs(ours - theirs).max() <= tolerance * max(1, np.abs(theirs).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=goldens.case_ids)
def test_c094_golden_vectors(case, dtype):
    layer, x = layer_of(case, dtype), case.inputs(dtype)[0]
    if HAS_GRADIENTS:
        y, gradients = value_and_gradients(layer, x, case.upstream(dtype))
    else:
        y, gradients = array(layer(x)), None
    if unit := rounding(case.config["activation"], dtype):
        # The input of the activation is at most 8, its slope little more than 1.
        goldens.assert_within(y, case.output, 16 * unit, "rounded output")
    else:
        goldens.check(case, dtype, y, gradients)


def brute_force(x, depthwise, pointwise, strides, dilation, same):
    """The formulas, one output at a time, in float64, channels last, no bias."""
    kernel = depthwise.shape[:2]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes, before = [], []
    for n, r, s in zip(x.shape[1:3], reach, strides, strict=True):
        out = -(-n // s) if same else (n - r) // s + 1
        sizes.append(out)
        before.append(max((out - 1) * s + r - n, 0) // 2 if same else 0)
    y = np.zeros((x.shape[0], *sizes, pointwise.shape[-1]))
    for row, column in itertools.product(*map(range, sizes)):
        depth = np.zeros((x.shape[0], x.shape[3] * depthwise.shape[3]))
        for i, j in itertools.product(*map(range, kernel)):
            h = row * strides[0] + i * dilation[0] - before[0]
            w = column * strides[1] + j * dilation[1] - before[1]
            if 0 <= h < x.shape[1] and 0 <= w < x.shape[2]:
                taps = x[:, h, w, :, None] * depthwise[i, j]
                depth += taps.reshape(x.shape[0], -1)  # Channel c*M + m.
        y[:, row, column] = depth @ pointwise[0, 0]
    return y


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3])
def test_c095_same_padding_puts_the_odd_one_last(kernel, dilation, stride):
    x = array(images((1, 6, 7, 2), "float64"))
    layer = SepConv(3, kernel, stride, "same", dilation_rate=dilation, use_bias=False)
    y = array(layer(x))
    weights = [array(weight) for weight in layer.weights]
    expected = brute_force(x, *weights, (stride, stride), (dilation, dilation), True)
    check(y, expected, 1e-12)


@pytest.mark.parametrize(("size", "padding"), [(6, (0, 1)), (7, (1, 1))])
def test_c096_same_padding_depends_on_the_stride(size, padding):
    x = array(images((1, size, size, 2)))
    layer = SepConv(3, 3, 2, "same")
    y = array(layer(x))
    padded = np.pad(x, [(0, 0), padding, padding, (0, 0)])
    valid = SepConv(3, 3, 2, weights=layer.get_weights())
    check(y, array(valid(padded)), 1e-6)


def test_c097_depthwise_channel_order():
    channels, multiplier = 3, 2
    layer = SepConv(
        6, 1, depth_multiplier=multiplier, use_bias=False,
        weights=[np.array([[[[1, 10], [2, 20], [3, 30]]]]), np.eye(6).reshape(1, 1, 6, 6)],
    )  # fmt: skip
    y = array(layer(np.ones((1, 1, 1, channels), "float32"))).ravel()
    assert y.tolist() == [1, 10, 2, 20, 3, 30]


@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_c098_channels_first_equals_transposing(width, dtype):
    x = array(images((2, 9, width, 3), dtype))
    last = SepConv(4, 3, padding="same", activation="tanh", bias_initializer="ones")
    y = array(last(x))
    first = SepConv(
        4, 3, padding="same", activation="tanh", data_format="channels_first",
        weights=last.get_weights(),
    )  # fmt: skip
    transposed = array(first(np.ascontiguousarray(x.transpose(0, 3, 1, 2))))
    tolerance = {"float16": 4e-3, "float32": 5e-6, "float64": 1e-12}[dtype]
    check(transposed.transpose(0, 2, 3, 1).astype("float64"), y.astype("float64"), tolerance)


EXACT = [case for case in CASES if case.exact_in_float32]


def test_c099_there_are_integer_vectors():
    assert len(CASES) == 72
    assert len(EXACT) == 2


@pytest.mark.parametrize("case", EXACT, ids=goldens.case_ids)
def test_c099_integer_vectors_match_bit_for_bit(case):
    layer, x = layer_of(case, "float32"), case.inputs("float32")[0]
    y, gradients = array(layer(x)), []
    if HAS_GRADIENTS:
        _, gradients = value_and_gradients(layer, x, case.upstream("float32"))
        assert len(gradients) == len(layer.weights) + 1
    assert np.array_equal(y, case.output)
    for ours, theirs in zip(gradients, case.gradients, strict=False):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_c100_empty_batch(padding, data_format, dtype):
    last = data_format == "channels_last"
    layer = SepConv(4, 3, padding=padding, data_format=data_format, activation="relu")
    x = np.zeros((0, 8, 8, 3) if last else (0, 3, 8, 8), dtype)
    size = 8 if padding == "same" else 6
    shape = (0, size, size, 4) if last else (0, 4, size, size)
    assert layer(x).shape == shape
    if HAS_GRADIENTS:
        _, gradients = value_and_gradients(layer, x, np.zeros(shape, dtype))
        assert gradients[0].shape == x.shape
        for gradient, weight in zip(gradients[1:], layer.weights, strict=True):
            assert gradient.shape == tuple(weight.shape)
            assert np.all(gradient == 0)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(2, 3, 1), (1, 3, 2), (3, 5, 2)])
def test_c101_an_output_of_size_zero(size, kernel, stride):
    layer = SepConv(4, kernel, stride, activation="relu")
    x = np.ones((2, size, 8, 3), "float32")
    width = (8 - kernel) // stride + 1
    assert layer(x).shape == layer.compute_output_shape(x.shape) == (2, 0, width, 4)
    if HAS_GRADIENTS:
        _, gradients = value_and_gradients(layer, x, np.zeros((2, 0, width, 4), "float32"))
        assert [np.all(gradient == 0) for gradient in gradients] == [True] * 4


@pytest.mark.parametrize(("size", "kernel", "stride"), [(2, 5, 2), (1, 7, 2), (1, 3, 1)])
def test_c101_a_negative_output(graph, size, kernel, stride):
    layer = SepConv(4, kernel, stride)
    message = "One of the dimensions in the output is <= 0"
    with pytest.raises(ValueError, match=message):
        layer.compute_output_shape((2, size, 8, 3))
    with pytest.raises(ValueError, match=message):
        layer(np.ones((2, size, 8, 3), "float32"))
    with pytest.raises(ValueError, match=message):
        layer.build((2, size, 8, 3))
    assert tf.global_variables() == layer.weights == []


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("strides", [1, (2, 1), 3])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_c102_compute_output_shape(padding, strides, data_format):
    last = data_format == "channels_last"
    layer = SepConv(5, (3, 2), strides, padding, data_format, dilation_rate=(1, 2))
    shape = (2, 9, 7, 3) if last else (2, 3, 9, 7)
    computed = layer.compute_output_shape(shape)
    assert layer.built is False
    assert isinstance(computed, tuple)
    assert computed == layer.compute_output_shape(list(shape))
    assert computed == layer.compute_output_shape(tf.TensorShape(shape))
    unknown = (None, None, None, 3) if last else (None, 3, None, None)
    expected = (None, None, None, 5) if last else (None, 5, None, None)
    assert layer.compute_output_shape(unknown) == expected
    assert layer.compute_output_shape((None,) * 4) == expected
    signature = layer.compute_output_signature(tf.TensorSpec(shape, tf.float16))
    assert (signature.shape, signature.dtype) == (computed, "float16")
    assert tuple(layer(images(shape)).shape) == computed
    for wrong in (None, (8, 8, 3), (1, 1, 8, 8, 3)):
        with pytest.raises(ValueError, match="4 sizes"):
            layer.compute_output_shape(wrong)


@needs_gradients
def test_c094_gradients_flow_into_losses_of_regularizers(graph):
    layer = SepConv(4, 3, depthwise_regularizer=lambda v: tf.reduce_sum(tf.square(v)))
    layer(images())
    loss, (gradient, other) = tf.train.value_and_gradients(
        tf.losses.get_regularization_loss, [layer.depthwise_kernel, layer.pointwise_kernel]
    )
    kernel = array(layer.depthwise_kernel)
    assert float(array(loss)) == pytest.approx(float((kernel**2).sum()), rel=1e-5)
    assert np.allclose(array(gradient), 2 * kernel, atol=1e-6)
    assert other is None or np.all(array(other) == 0)
