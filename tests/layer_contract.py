"""What the Keras layer must do on whichever backend KERAS_BACKEND names.

`test_layers.py` runs this file once per backend, each time in a process of its own.
"""

from __future__ import annotations

import copy
import doctest
import itertools
from typing import Any

import goldens
import keras
import numpy as np
import pytest
from keras import ops
from strategies import Problem

import sepconv.keras
from sepconv import ConvSpec, reference
from sepconv.keras import SeparableConv2D

Stock = keras.layers.SeparableConv2D
BACKEND = keras.config.backend()
FUSED = BACKEND in ("jax", "numpy", "torch")

fused_only = pytest.mark.skipif(not FUSED, reason="a fact about our kernel")
torch_only = pytest.mark.skipif(BACKEND != "torch", reason="a fact about torch")
jax_only = pytest.mark.skipif(BACKEND != "jax", reason="a fact about compiled JAX")
trains = pytest.mark.skipif(BACKEND == "numpy", reason="Keras does not train on NumPy")
# Keras with NumPy 2: one of its own calls that all of get_weights pass through.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

OUTSIDE_ACTIVATIONS = {
    "softplus": "softplus",
    "softmax": "softmax",
    "hard_sigmoid": lambda z: ops.clip(0.2 * z + 0.5, 0.0, 1.0),
}


@pytest.fixture(autouse=True)
def fresh_session() -> None:
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)


def to_numpy(tensor: Any) -> np.ndarray:
    array = np.asarray(ops.convert_to_numpy(tensor))
    return array if array.dtype == np.float64 else array.astype(np.float32)


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def twins(*args: Any, shape: tuple[int, ...] = (2, 7, 6, 3), **kwargs: Any) -> tuple[Any, Any]:
    """The stock layer and ours, built, with equal weights, none of them zero."""
    stock, ours = Stock(*args, **kwargs), SeparableConv2D(*args, **kwargs)
    for layer in (stock, ours):
        layer.build(shape)
        layer.set_weights([normal(*w.shape, seed=i) for i, w in enumerate(layer.weights)])
    return stock, ours


def model_of(layer_class: Any, **kwargs: Any) -> Any:
    inputs = keras.Input((None, None, 3))
    x = layer_class(5, 3, padding="same", activation="relu", name="first", **kwargs)(inputs)
    x = keras.layers.BatchNormalization(name="middle")(x)
    outputs = layer_class(2, 3, strides=2, depth_multiplier=2, name="last", **kwargs)(x)
    return keras.Model(inputs, outputs)


def classes_in(model: Any) -> set[type]:
    return {type(layer) for layer in model.layers if isinstance(layer, Stock)}


def cloned_with(layer_class: Any, model: Any) -> Any:
    def clone(layer: Any) -> Any:
        kind = layer_class if isinstance(layer, Stock) else type(layer)
        return kind.from_config(layer.get_config())

    twin = keras.models.clone_model(model, clone_function=clone)
    twin.set_weights(model.get_weights())
    return twin


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Notes the `activation` of each call of the door."""
    door, name = sepconv.keras._DOOR, sepconv.keras._OPERATION
    calls: list[str | None] = []
    inner = getattr(door, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["activation"])
        return inner(*args, **kwargs)

    monkeypatch.setattr(door, name, noting)
    return calls


# ------------------------------------------------------------------------------------------ values


def layer_of(case: goldens.Case, dtype: str) -> Any:
    arguments = dict(case.config)
    if case.outside_activation is not None:
        arguments["activation"] = OUTSIDE_ACTIVATIONS[case.outside_activation]
    zeros = {f"{stage}_initializer": "zeros" for stage in ("depthwise", "pointwise")}  # Fast.
    layer = SeparableConv2D(**arguments, **zeros, dtype=dtype)
    x, *weights = [array for array in case.inputs(dtype) if array is not None]
    layer.build(x.shape)
    layer.set_weights(weights)
    return layer


GELU_OF_TENSORFLOW = "gelu of Keras on TensorFlow has constants in float32"


def fault_of_keras(case: goldens.Case, dtype: str) -> str | None:
    if BACKEND == "numpy" and dtype == "float64" and case.outside_activation is not None:
        return "operations of Keras on NumPy compute float64 in float32"
    if BACKEND == "tensorflow" and case.meta["source"] == "torch":
        return "TensorFlow on a CPU cannot compute this"
    if BACKEND == "tensorflow" and dtype == "float64" and case.config["activation"] == "gelu":
        return GELU_OF_TENSORFLOW
    return None


@pytest.mark.parametrize("case", goldens.load_cases(), ids=goldens.case_ids)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_goldens(dtype, case):
    if (fault := fault_of_keras(case, dtype)) is not None:
        pytest.skip(fault)
    layer = layer_of(case, dtype)
    x, dy = case.inputs(dtype)[0], case.upstream(dtype)
    if BACKEND == "torch":
        import torch

        x, dy = torch.from_numpy(x).requires_grad_(), torch.from_numpy(dy)
        y = layer(x)
        gradients = torch.autograd.grad(y, [x, *(w.value for w in layer.weights)], dy)
        assert keras.backend.standardize_dtype(y.dtype) == dtype
        goldens.check(case, dtype, to_numpy(y), [to_numpy(gradient) for gradient in gradients])
        return
    if BACKEND != "jax":
        goldens.check(case, dtype, to_numpy(layer(ops.convert_to_tensor(x, dtype))))
        return
    import jax

    def function(x: Any, weights: list[Any]) -> Any:
        return layer.stateless_call(weights, [], x)[0]

    @jax.jit
    def value_and_gradients(dy: Any, *args: Any) -> tuple[Any, Any]:
        y, pullback = jax.vjp(function, *args)
        return y, pullback(dy)

    y, (dx, weight_gradients) = value_and_gradients(dy, x, [w.value for w in layer.weights])
    assert y.dtype == dtype
    goldens.check(case, dtype, y, [dx, *weight_gradients])


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy, data_format):
    x = normal(2, 7, 6, 3) if data_format == "channels_last" else normal(2, 3, 7, 6)
    arguments = {"padding": "same", "activation": "tanh", "data_format": data_format}
    stock, ours = twins(4, 3, shape=x.shape, dtype=policy, **arguments)
    y, expected = ours(x), stock(x)
    compute_dtype = policy.removeprefix("mixed_")
    for layer in (stock, ours):
        assert [w.dtype for w in layer.weights] == ["float32"] * 3
        assert layer.compute_dtype == compute_dtype
    assert keras.backend.standardize_dtype(y.dtype) == compute_dtype
    assert keras.backend.standardize_dtype(expected.dtype) == compute_dtype
    rounded = [
        to_numpy(ops.cast(array, compute_dtype)) for array in (x, *map(to_numpy, ours.weights))
    ]
    geometry = ConvSpec(**arguments).resolve(*(array.shape for array in rounded))
    true = reference.forward(geometry, *rounded)
    if FUSED:
        bound, _ = reference.error_bounds(geometry, compute_dtype, np.ones_like(true), *rounded)
        goldens.assert_within(to_numpy(y), true, bound, "y")
    else:
        np.testing.assert_allclose(to_numpy(y), to_numpy(expected), rtol=0, atol=0)


def test_float64_policy():
    activation = "silu" if BACKEND == "tensorflow" else "gelu"  # See GELU_OF_TENSORFLOW.
    x = normal(2, 7, 6, 3, dtype="float64")
    _, ours = twins(4, 3, dtype="float64", activation=activation)
    y = ours(x)
    assert keras.backend.standardize_dtype(y.dtype) == "float64"
    arrays = [x, *map(to_numpy, ours.weights)]
    geometry = ConvSpec(activation=activation).resolve(*(array.shape for array in arrays))
    true = reference.forward(geometry, *arrays)
    goldens.assert_within(to_numpy(y), true, 1e-13 * np.abs(true).max(), "y")


@fused_only
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_error_in_float32_is_at_most_twice_that_of_keras(data_format):
    problem = Problem(
        spec=ConvSpec(padding="same", data_format=data_format, activation="tanh"),
        batch=2,
        height=13,
        width=12,
        channels=40,
        depth_multiplier=1,
        kernel_size=(3, 3),
        filters=48,
    )
    x, *weights = (array for array in problem.arrays(np.float32).forward if array is not None)
    true = reference.forward(problem.geometry, x, *weights)
    errors = []
    for kind in (Stock, SeparableConv2D):
        layer = kind(48, 3, padding="same", activation="tanh", data_format=data_format)
        layer.build(x.shape)
        layer.set_weights(weights)
        errors.append(np.abs(to_numpy(layer(x)).astype(np.float64) - true).max())
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("shape", [(0, 6, 6, 3), (2, 2, 6, 3), (2, 6, 2, 3)])
def test_empty_batches_and_outputs_are_computed(shape):
    layer = SeparableConv2D(4, 3, activation="relu")
    y = layer(np.zeros(shape, "float32"))
    assert tuple(y.shape) == (shape[0], shape[1] - 2, shape[2] - 2, 4)
    assert len(layer.weights) == 3


@pytest.mark.parametrize("use_bias", [True, False])
def test_channels_first_bias_goes_along_the_channels(use_bias):
    # As many columns as filters, where Keras on TensorFlow adds the bias along the columns.
    layer = SeparableConv2D(4, 1, data_format="channels_first", use_bias=use_bias)
    layer.build((1, 2, 3, 4))
    biases = [np.arange(4.0)] if use_bias else []
    layer.set_weights([np.zeros((1, 1, 2, 1)), np.zeros((1, 1, 2, 4)), *biases])
    y = to_numpy(layer(np.ones((1, 2, 3, 4), "float32")))
    expected = np.arange(4.0) if use_bias else np.zeros(4)
    np.testing.assert_array_equal(y, np.broadcast_to(expected[:, None, None], (1, 4, 3, 4)))


# ----------------------------------------------------------------------- which kernel runs, and why


@pytest.mark.parametrize("activation", [None, "relu", "elu"])
def test_our_kernel_runs_exactly_where_why_not_says_so(activation, monkeypatch):
    stock, ours = twins(4, 3, activation=activation)
    x = normal(2, 7, 6, 3)
    if FUSED:
        calls = spy(monkeypatch)
        y = ours(x)
        assert calls == [activation or "linear"]
        assert ours.why_not() is None
        assert ours.why_not(x) is None
    else:
        y = ours(x)
        assert f"the {BACKEND} backend" in ours.why_not()
    np.testing.assert_allclose(to_numpy(y), to_numpy(stock(x)), rtol=1e-5, atol=1e-5)


@fused_only
def test_why_not_before_building_and_without_sizes():
    for data_format in ("channels_last", "channels_first"):
        layer = SeparableConv2D(4, (5, 2), dilation_rate=2, data_format=data_format)
        assert layer.why_not() is None
    assert layer.why_not(keras.KerasTensor((None, 3, None, None))) is None
    integers = keras.KerasTensor((None, 3, 9, 9), dtype="int32")
    assert layer.why_not(integers) == "the input is int32, and the layer computes in float32"


@fused_only
def test_a_dtype_that_does_not_fit_is_left_to_keras(monkeypatch):
    calls = spy(monkeypatch)
    layer = SeparableConv2D(4, 3, autocast=False, dtype="float32")
    layer.build((1, 5, 5, 2))
    fallbacks: list[Any] = []
    monkeypatch.setattr(Stock, "call", lambda self, inputs: fallbacks.append(inputs) or inputs)
    layer(ops.ones((1, 5, 5, 2), "float16"))
    assert "the input is float16" in layer.why_not(ops.ones((1, 5, 5, 2), "float16"))
    assert (calls, len(fallbacks)) == ([], 1)


@fused_only
def test_an_activation_is_fused_only_if_it_is_the_function_of_keras(monkeypatch):
    calls = spy(monkeypatch)
    x = normal(2, 7, 6, 3)
    lookalike = lambda z: keras.activations.relu(z, max_value=1.0)  # noqa: E731
    for activation, fused in [
        (keras.activations.relu, "relu"),
        ("swish", "silu"),
        ("hard_swish", "hard_silu"),
        ("leaky_relu", "leaky_relu"),
        (None, "linear"),
        ("softmax", None),
        ("mish", None),
        (lookalike, None),
        (keras.layers.LeakyReLU(negative_slope=0.4), None),
    ]:
        stock, ours = twins(4, 3, activation=activation)
        y = ours(x)
        assert calls.pop() == fused
        np.testing.assert_allclose(to_numpy(y), to_numpy(stock(x)), rtol=1e-5, atol=1e-5)


@fused_only
def test_attributes_that_change_later_count(monkeypatch):
    calls = spy(monkeypatch)
    x = normal(2, 7, 6, 3)
    stock, ours = twins(4, 3)
    for name, value in [
        ("activation", keras.activations.relu),
        ("activation", keras.activations.softmax),
        ("padding", "same"),
        ("strides", (2, 2)),
    ]:
        for layer in (stock, ours):
            setattr(layer, name, value)
        np.testing.assert_allclose(to_numpy(ours(x)), to_numpy(stock(x)), rtol=1e-5, atol=1e-5)
    assert calls == ["relu", None, None, None]


@jax_only
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "float64"])
def test_a_training_step_is_one_call_forward_and_one_backward(policy, data_format):
    import jax

    layer = SeparableConv2D(4, 3, activation="tanh", data_format=data_format, dtype=policy)
    model = keras.Sequential([keras.Input((6, 6, 6)), layer])
    x = jax.numpy.ones((2, 6, 6, 6), layer.compute_dtype)

    def loss(x: Any, weights: list[Any]) -> Any:
        y = model.stateless_call(weights, [], x)[0]
        assert y.dtype == layer.compute_dtype
        return y.sum()

    def counts(function: Any) -> tuple[int, int, int]:
        weights = [w.value for w in layer.weights]
        text = jax.jit(function).lower(x, weights).compile().as_text()
        calls = [
            text.count(f'custom_call_target="sepconv_{name}"') for name in ("forward", "backward")
        ]
        return (*calls, text.count(" convolution("))

    assert counts(loss) == (1, 0, 0)
    assert counts(jax.value_and_grad(loss, (0, 1))) == (1, 1, 0)


@torch_only
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16", "float64"])
def test_a_training_step_on_torch_moves_no_data(policy, data_format):
    import torch

    layer = SeparableConv2D(4, 3, activation="tanh", data_format=data_format, dtype=policy)
    x = torch.ones(2, 6, 6, 6, dtype=getattr(torch, layer.compute_dtype))
    dy = torch.ones_like(layer(x))
    with torch.profiler.profile() as profile:
        layer(x.requires_grad_()).backward(dy)
    counts = {event.key: event.count for event in profile.key_averages()}
    # One call each, seen above and below autograd.
    assert counts["sepconv::forward"] == 2
    assert counts["sepconv::backward"] == 2
    moves = {"permute", "transpose", "clone", "contiguous", "reshape", "convolution", "pad"}
    assert not {f"aten::{name}" for name in moves} & set(counts)
    # Casts of the three weights and of their gradients.
    casts = 6 if policy.startswith("mixed") else 0
    assert counts.get("aten::_to_copy", 0) == casts
    assert counts.get("aten::copy_", 0) == casts
    assert x.grad.dtype == x.dtype
    assert [w.value.grad.dtype for w in layer.weights] == [w.value.dtype for w in layer.weights]


@torch_only
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_on_torch_only_inputs_and_what_the_slope_needs_are_saved(activation):
    import torch

    layer = SeparableConv2D(4, 3, depth_multiplier=3, activation=activation)
    layer.build((2, 9, 8, 6))
    x = torch.ones(2, 9, 8, 6)
    saved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    expected = [x, *(w.value for w in layer.weights), *([y] if activation == "relu" else [])]
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in expected}


@torch_only
def test_the_legacy_network_on_torch():
    import torch

    from sepconv.demo import data, pretrained

    stock = pretrained.load_legacy_model(data.emotion_model_path())
    ours = pretrained.swap_separable_layers(stock, expected=pretrained.SEPARABLE_LAYERS)
    pretrained.check_kernel(ours)
    face = torch.from_numpy(data.astronaut_face().pixels)
    results = []
    for model in (stock, ours):
        # Without the softmax, which hides differences.
        logits = keras.Model(model.inputs, model.layers[-2].output)
        with torch.profiler.profile() as profile, torch.inference_mode():
            results.append(to_numpy(logits([face])))
        calls = [e for e in profile.events() if e.name == "sepconv::forward"]
        assert len(calls) == (pretrained.SEPARABLE_LAYERS if model is ours else 0)
    assert results[0].argmax() == pretrained.EMOTIONS.index("happy")
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-4)


@torch_only
def test_a_compiled_model_on_torch():
    import torch

    model = model_of(SeparableConv2D)
    x = ops.convert_to_tensor(normal(2, 8, 8, 3))
    compiled = torch.compile(model, backend="aot_eager")
    np.testing.assert_allclose(to_numpy(compiled(x)), to_numpy(model(x)), rtol=1e-5, atol=1e-6)


@jax_only
def test_a_symbolic_batch():
    import jax

    stock, ours = twins(4, 3, activation="relu")
    x = normal(5, 7, 6, 3)
    spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 7, 6, 3"), np.float32)
    exported = jax.export.export(jax.jit(lambda x: ours(x)))(spec)
    np.testing.assert_allclose(exported.call(x), to_numpy(stock(x)), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------ the contract of the layer

CONFIGS: list[dict[str, Any]] = [
    {},
    {"strides": (2, 1), "padding": "same", "data_format": "channels_first", "use_bias": False},
    {
        "dilation_rate": 2,
        "depth_multiplier": 3,
        "activation": "gelu",
        "depthwise_initializer": "he_normal",
        "pointwise_initializer": keras.initializers.RandomNormal(stddev=0.1, seed=1),
        "bias_initializer": "ones",
        "depthwise_regularizer": "l2",
        "pointwise_regularizer": keras.regularizers.L1(0.1),
        "bias_regularizer": "l1",
        "activity_regularizer": "l2",
        "depthwise_constraint": "non_neg",
        "pointwise_constraint": keras.constraints.MaxNorm(1.0),
        "bias_constraint": "unit_norm",
        "trainable": False,
        "dtype": "mixed_bfloat16",
    },
]


@pytest.mark.parametrize("kwargs", CONFIGS)
def test_config_weights_and_initial_values_are_those_of_the_stock_layer(kwargs):
    layers = []
    for kind in (Stock, SeparableConv2D):
        keras.utils.set_random_seed(3)
        layer = kind(4, (3, 2), name="layer", **kwargs)
        layer.build((2, 8, 8, 8))
        layers.append(layer)
    stock, ours = layers
    assert ours.get_config() == stock.get_config()
    assert ours.get_build_config() == stock.get_build_config()
    facts = ("name", "path", "shape", "dtype", "trainable")
    for one, other in zip(ours.weights, stock.weights, strict=True):
        assert [getattr(one, fact) for fact in facts] == [getattr(other, fact) for fact in facts]
        assert type(one.regularizer) is type(other.regularizer)
        assert type(one.constraint) is type(other.constraint)
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))
    assert ours.count_params() == stock.count_params()
    assert ours.dtype_policy == stock.dtype_policy
    # One can be made from the config of the other.
    assert SeparableConv2D.from_config(stock.get_config()).get_config() == stock.get_config()
    assert Stock.from_config(ours.get_config()).get_config() == ours.get_config()


def test_positional_arguments_are_those_of_the_stock_layer():
    values = (4, 3, 1, "same", "channels_last", 2, 2, "relu", False, *["ones"] * 3, *[None] * 7)
    ours, stock = SeparableConv2D(*values, name="x"), Stock(*values, name="x")
    assert len(values) == 19
    assert ours.get_config() == stock.get_config()


def test_saved_models_come_back(tmp_path):
    x = normal(2, 8, 8, 3)
    model = model_of(SeparableConv2D)
    expected = to_numpy(model(x))
    model.save(tmp_path / "ours.keras")
    loaded = keras.models.load_model(tmp_path / "ours.keras")
    assert classes_in(loaded) == {SeparableConv2D}
    np.testing.assert_array_equal(to_numpy(loaded(x)), expected)


def test_models_and_weights_go_both_ways(tmp_path):
    x = normal(2, 8, 8, 3)
    for source, target in [(Stock, SeparableConv2D), (SeparableConv2D, Stock)]:
        model = model_of(source)
        expected = to_numpy(model(x))
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        swapped = cloned_with(target, keras.models.load_model(tmp_path / "model.keras"))
        assert classes_in(swapped) == {target}
        np.testing.assert_allclose(to_numpy(swapped(x)), expected, rtol=1e-5, atol=1e-5)
        fresh = model_of(target)
        fresh.load_weights(tmp_path / "model.weights.h5")
        np.testing.assert_allclose(to_numpy(fresh(x)), expected, rtol=1e-5, atol=1e-5)


def test_copies():
    _, ours = twins(4, 3, activation="relu")
    twin = copy.deepcopy(ours)
    assert type(twin) is SeparableConv2D
    x = normal(2, 7, 6, 3)
    np.testing.assert_array_equal(to_numpy(twin(x)), to_numpy(ours(x)))


def test_regularization_and_activity_losses():
    kwargs = {
        "depthwise_regularizer": "l2",
        "pointwise_regularizer": "l1",
        "bias_regularizer": keras.regularizers.L1L2(0.1, 0.2),
        "activity_regularizer": keras.regularizers.L2(0.3),
        "activation": "tanh",
    }
    stock, ours = twins(4, 3, **kwargs)
    x = normal(2, 7, 6, 3)
    for layer in (stock, ours):
        layer(x)
    assert len(ours.losses) == len(stock.losses) == 4
    for one, other in zip(ours.losses, stock.losses, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-5)


@trains
def test_training_gives_equal_curves_and_respects_constraints():
    x, y = normal(32, 8, 8, 3), normal(32, 3, 3, 2, seed=1)
    histories, models = [], []
    source = model_of(
        Stock,
        depthwise_constraint=keras.constraints.MaxNorm(0.3),
        pointwise_constraint="non_neg",
        activity_regularizer="l2",
        pointwise_regularizer="l2",
    )
    for kind in (Stock, SeparableConv2D):
        model = cloned_with(kind, source)
        model.compile(keras.optimizers.SGD(0.05), "mse")
        history = model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
        histories.append(history.history["loss"])
        models.append(model)
    np.testing.assert_allclose(*histories, rtol=1e-4)
    for one, other in zip(*(model.weights for model in models), strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-3, atol=1e-4)
    ours = models[1].get_layer("first")
    norms = np.sqrt((to_numpy(ours.depthwise_kernel) ** 2).sum(0))
    assert norms.max() <= 0.3 + 1e-6
    assert to_numpy(ours.pointwise_kernel).min() == 0.0


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_output_shapes_are_those_of_the_stock_layer(data_format, padding):
    for kernel, strides, dilation in itertools.product([1, 3, (2, 5)], [1, (2, 3)], [1, 2]):
        arguments = (4, kernel, strides, padding, data_format, dilation)
        stock, ours = Stock(*arguments), SeparableConv2D(*arguments)
        for sizes in [(9, 11), (None, 11), (None, None), (12, None)]:
            shape = (None, *sizes, 3) if data_format == "channels_last" else (None, 3, *sizes)
            assert ours.compute_output_shape(shape) == stock.compute_output_shape(shape)
            assert ours(keras.Input(shape[1:])).shape == stock(keras.Input(shape[1:])).shape


def test_output_sizes_of_zero_are_legal_and_negative_ones_are_not():
    layer = SeparableConv2D(4, 3)
    assert layer.compute_output_shape((None, 2, 5, 3)) == (None, 0, 3, 4)
    assert layer(keras.Input((2, 5, 3))).shape == (None, 0, 3, 4)
    layer = SeparableConv2D(4, 3)
    with pytest.raises(ValueError, match="negative"):
        layer(np.zeros((1, 1, 5, 3), "float32"))
    assert layer.weights == []


def test_models_with_unknown_sizes_take_images_of_any_size():
    ours, stock = model_of(SeparableConv2D), model_of(Stock)
    stock.set_weights(ours.get_weights())
    assert ours.output_shape == stock.output_shape == (None, None, None, 2)
    for size in ((8, 8), (5, 11), (3, 3)):
        x = normal(2, *size, 3)
        np.testing.assert_allclose(to_numpy(ours(x)), to_numpy(stock(x)), rtol=1e-5, atol=1e-5)


def test_inputs_that_do_not_fit_are_refused():
    layer = SeparableConv2D(4, 3)
    with pytest.raises(ValueError, match="expected min_ndim=4, found ndim=3"):
        layer(np.zeros((5, 5, 3), "float32"))
    with pytest.raises(ValueError, match="`x_shape` must have"):
        layer(np.zeros((1, 5, 5, 5, 3), "float32"))
    layer(np.zeros((1, 5, 5, 3), "float32"))
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 3"):
        layer(np.zeros((1, 5, 5, 2), "float32"))


@fused_only
def test_examples_run():
    results = doctest.testmod(sepconv.keras)
    assert results.attempted > 5
    assert results.failed == 0
