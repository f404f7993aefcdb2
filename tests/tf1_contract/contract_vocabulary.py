"""What legacy code writes around the layer: scopes, graphs, functions, initializers, optimizers."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from support_tf1 import SepConv, array, dtype_of, images, names, needs_gradients, parts, sep, values

import sepconv.tf1 as tf
from sepconv.tf1.provided import NOT_PROVIDED

X = np.random.default_rng(5).standard_normal((2, 4, 4, 3)).astype("float32")
POSITIVE = np.abs(X) + 0.5
MATRIX = X.reshape(8, 12)
LABELS = np.array([3, 0, 11, 5, 5, 1, 2, 7])
ONE_HOT = np.eye(12, dtype="float32")[LABELS]


def softmax(x):
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def windows(x, size, combine):
    """Non-overlapping windows of a channels-last array."""
    n, h, w, c = x.shape
    return combine(x.reshape(n, h // size, size, w // size, size, c), axis=(2, 4))


CROSS_ENTROPY = -np.log(softmax(MATRIX))[np.arange(8), LABELS]
WEIGHTS = np.array([1, 0, 2, 1, 0, 1, 1, 3], "float32")
SMOOTH = 0.9 * ONE_HOT + 0.1 / 12

FUNCTIONS = {
    "abs": (lambda: tf.abs(X), np.abs(X)),
    "add": (lambda: tf.add(X, 1.0), X + 1),
    "add_n": (lambda: tf.add_n([X, X, POSITIVE]), 2 * X + POSITIVE),
    "argmax": (lambda: tf.argmax(MATRIX, 1), MATRIX.argmax(1)),
    "cast": (lambda: tf.cast(X, tf.int32), X.astype("int32")),
    "concat": (lambda: tf.concat([X, POSITIVE], 3), np.concatenate([X, POSITIVE], 3)),
    "constant": (lambda: tf.constant([1, 2], shape=[2, 2]), [[1, 2], [2, 2]]),
    "divide": (lambda: tf.divide(X, POSITIVE), X / POSITIVE),
    "equal": (lambda: tf.equal(LABELS, 5), LABELS == 5),
    "exp": (lambda: tf.exp(X), np.exp(X)),
    "expand_dims": (lambda: tf.expand_dims(MATRIX, 1), MATRIX[:, None]),
    "identity": (lambda: tf.identity(X), X),
    "log": (lambda: tf.log(POSITIVE), np.log(POSITIVE)),
    "losses.mean_squared_error": (
        lambda: tf.losses.mean_squared_error(X, POSITIVE),
        np.mean((X - POSITIVE) ** 2),
    ),
    "losses.softmax_cross_entropy": (
        lambda: tf.losses.softmax_cross_entropy(ONE_HOT, tf.constant(MATRIX), label_smoothing=0.1),
        np.mean(-(SMOOTH * np.log(softmax(MATRIX))).sum(1)),
    ),
    "losses.sparse_softmax_cross_entropy": (
        lambda: tf.losses.sparse_softmax_cross_entropy(LABELS, tf.constant(MATRIX), WEIGHTS),
        (CROSS_ENTROPY * WEIGHTS).sum() / 6,
    ),
    "matmul": (lambda: tf.matmul(MATRIX, MATRIX.T), MATRIX @ MATRIX.T),
    "maximum": (lambda: tf.maximum(X, POSITIVE), np.maximum(X, POSITIVE)),
    "minimum": (lambda: tf.minimum(X, 0.1), np.minimum(X, 0.1)),
    "multiply": (lambda: tf.multiply(X, POSITIVE), X * POSITIVE),
    "nn.avg_pool": (lambda: tf.nn.avg_pool(X, [1, 2, 2, 1], 2, "VALID"), windows(X, 2, np.mean)),
    "nn.bias_add": (lambda: tf.nn.bias_add(X, [1.0, 2.0, 3.0]), X + np.arange(1, 4)),
    "nn.bias_add NCHW": (
        lambda: tf.nn.bias_add(X, [1.0, 2.0, 3.0, 4.0], data_format="NCHW"),
        X + np.arange(1, 5).reshape(4, 1, 1),
    ),
    "nn.conv2d": (
        lambda: tf.nn.conv2d(X, MATRIX[:3, :5].reshape(1, 1, 3, 5), 1, "SAME"),
        X @ MATRIX[:3, :5],
    ),
    "nn.l2_loss": (lambda: tf.nn.l2_loss(X), (X**2).sum() / 2),
    "nn.leaky_relu": (lambda: tf.nn.leaky_relu(X, 0.3), np.where(X > 0, X, 0.3 * X)),
    "nn.log_softmax": (lambda: tf.nn.log_softmax(MATRIX), np.log(softmax(MATRIX))),
    "nn.max_pool": (lambda: tf.nn.max_pool(X, 2, [1, 2, 2, 1], "VALID"), windows(X, 2, np.max)),
    "nn.moments": (lambda: tf.stack(tf.nn.moments(X, [1, 2])), [X.mean((1, 2)), X.var((1, 2))]),
    "nn.softmax": (lambda: tf.nn.softmax(MATRIX), softmax(MATRIX)),
    "nn.softmax_cross_entropy_with_logits": (
        lambda: tf.nn.softmax_cross_entropy_with_logits(labels=ONE_HOT, logits=MATRIX),
        CROSS_ENTROPY,
    ),
    "nn.sparse_softmax_cross_entropy_with_logits": (
        lambda: tf.nn.sparse_softmax_cross_entropy_with_logits(labels=LABELS, logits=MATRIX),
        CROSS_ENTROPY,
    ),
    "one_hot": (lambda: tf.one_hot(LABELS, 12), ONE_HOT),
    "ones": (lambda: tf.ones([2, 3]), np.ones((2, 3))),
    "ones_like": (lambda: tf.ones_like(X), np.ones_like(X)),
    "pow": (lambda: tf.pow(POSITIVE, 3.0), POSITIVE**3),
    "reduce_max": (lambda: tf.reduce_max(X, reduction_indices=[1]), X.max(1)),
    "reduce_mean": (
        lambda: tf.reduce_mean(X, axis=[1, 2], keep_dims=True),
        X.mean((1, 2), keepdims=True),
    ),
    "reduce_min": (lambda: tf.reduce_min(X, 3), X.min(3)),
    "reduce_sum": (lambda: tf.reduce_sum(X), X.sum()),
    "reshape": (lambda: tf.reshape(X, [8, -1]), MATRIX),
    "shape": (lambda: tf.stack([int(size) for size in tf.shape(X)]), X.shape),
    "sqrt": (lambda: tf.sqrt(POSITIVE), np.sqrt(POSITIVE)),
    "square": (lambda: tf.square(X), X**2),
    "squeeze": (lambda: tf.squeeze(X[:1], [0]), X[0]),
    "stack": (lambda: tf.stack([X, X], 1), np.stack([X, X], 1)),
    "stop_gradient": (lambda: tf.stop_gradient(X), X),
    "subtract": (lambda: tf.subtract(X, POSITIVE), X - POSITIVE),
    "to_float": (lambda: tf.to_float(LABELS), LABELS),
    "transpose": (lambda: tf.transpose(X, [0, 3, 1, 2]), X.transpose(0, 3, 1, 2)),
    "zeros": (lambda: tf.zeros(3, tf.int32), np.zeros(3)),
    "zeros_like": (lambda: tf.zeros_like(X), np.zeros_like(X)),
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_compute_what_their_names_say(name):
    function, expected = FUNCTIONS[name]
    ours = array(function())
    assert ours.shape == np.shape(expected)
    assert np.allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_functions_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match="inputs"):
        tf.add_n([])
    with pytest.raises(TypeError, match="takes 2 tensors"):
        tf.add(X)
    with pytest.raises(ValueError, match="at most the 1 elements"):
        tf.constant([1, 2], shape=[1])
    with pytest.raises(TypeError, match="dtype"):
        tf.as_dtype("nope")


def test_element_types_and_shapes():
    assert dtype_of(tf.constant(1.5)) == dtype_of(tf.convert_to_tensor([1.5])) == "float32"
    assert dtype_of(tf.constant(1)) == dtype_of(tf.convert_to_tensor(3)) == "int32"
    assert dtype_of(tf.constant(np.ones(1))) == dtype_of(tf.cast(X, np.float64)) == "float64"
    assert (tf.float16.base_dtype.name, tf.half, tf.as_dtype(np.int64)) == (
        "float16",
        "float16",
        tf.int64,
    )
    assert (tf.float64.as_numpy_dtype, tf.bfloat16.as_numpy_dtype.__name__) == (
        np.float64,
        "bfloat16",
    )
    kinds = [(t.is_floating, t.is_integer, t.is_complex) for t in (tf.bfloat16, tf.uint8, tf.bool)]
    assert kinds == [(True, False, False), (False, True, False), (False, False, False)]
    shape = tf.TensorShape([None, 8, 3])
    assert (shape.ndims, shape.rank, shape.dims, shape.num_elements()) == (3, 3, [None, 8, 3], None)
    assert (shape.is_fully_defined(), tf.TensorShape([8, 3]).num_elements()) == (False, 24)


LIMITED = {
    "random_uniform": ({"minval": -2.0, "maxval": 3.0}, 0.5, 5 / np.sqrt(12)),
    "random_normal": ({"mean": 1.0, "stddev": 2.0}, 1.0, 2.0),
    # Cutting at two standard deviations leaves 0.88 of one.
    "truncated_normal": ({"mean": 1.0, "stddev": 2.0}, 1.0, 0.88 * 2),
    "variance_scaling": ({"scale": 2.0, "distribution": "normal"}, 0.0, np.sqrt(2 / 120)),
    "uniform_unit_scaling": ({"factor": 2.0}, 0.0, 2 / np.sqrt(120)),
    "glorot_uniform": ({}, 0.0, np.sqrt(2 / 280)),
    "glorot_normal": ({}, 0.0, np.sqrt(2 / 280)),
}


@pytest.mark.parametrize("name", sorted(LIMITED))
def test_initializers_draw_from_their_distributions(name):
    arguments, mean, deviation = LIMITED[name]
    initializer = getattr(tf, f"{name}_initializer")(**arguments)
    assert getattr(tf.initializers, name) is type(initializer)
    sample = array(initializer([120, 160], dtype=tf.float32))
    # Of n samples, the mean has a standard deviation of s/sqrt(n); their spread's is no larger.
    assert abs(sample.mean() - mean) < 5 * deviation / np.sqrt(sample.size)
    assert abs(sample.std() - deviation) < 5 * deviation / np.sqrt(sample.size) + 1e-3 * deviation
    seeded = [type(initializer)(**arguments, seed=3)([4, 5]) for _ in range(2)]
    assert np.array_equal(array(seeded[0]), array(seeded[1]))
    assert dtype_of(type(initializer)(**arguments, dtype="float16")([2, 2])) == "float16"


def test_initializers_of_given_values():
    assert np.all(array(tf.ones_initializer()([2, 2], partition_info=None)) == 1)
    assert np.all(array(tf.zeros_initializer(dtype="int32")([2])) == 0)
    assert array(tf.constant_initializer([1, 2])([3])).tolist() == [1, 2, 2]
    with pytest.raises(ValueError, match="at most the 1 elements"):
        tf.constant_initializer([1, 2])([1])
    with pytest.raises(ValueError, match="shape of the variable"):
        tf.constant_initializer([1, 2], verify_shape=True)([3])
    assert np.allclose(array(tf.identity_initializer(2.0)([3, 3])), 2 * np.eye(3))
    square = array(tf.orthogonal_initializer(3.0)([8, 8]))
    assert np.allclose(square @ square.T, 9 * np.eye(8), atol=1e-4)
    tf.get_variable("by_class", [2], initializer=tf.ones_initializer)


def test_what_is_not_provided_says_what_to_write_instead():
    for module, listed in NOT_PROVIDED.items():
        for name, instead in listed.items():
            stand_in = getattr(getattr(tf, module) if module else tf, name)
            path = f"tf.{module}.{name}" if module else f"tf.{name}"
            for use in (stand_in, lambda stand_in=stand_in: stand_in.attribute):
                with pytest.raises(NotImplementedError) as error:
                    use()
                assert str(error.value) == f"{path} is not provided by sepconv.tf1: {instead}."
    for module in (tf, tf.layers, tf.losses, tf.train):
        with pytest.raises(AttributeError, match="migration-tf-layers"):
            module.no_such_name  # noqa: B018


# --------------------------------------------------------------------------- scopes and variables


def test_a_custom_getter_sees_every_variable_and_may_change_it(graph):
    seen = []

    def getter(getter, name, *args, **kwargs):
        seen.append((name, tuple(kwargs["shape"]), kwargs["reuse"]))
        assert {"dtype", "trainable", "initializer", "constraint", "use_resource"} <= set(kwargs)
        return getter(name, *args, **{**kwargs, "trainable": False})

    outer = []

    def outermost(getter, name, *args, **kwargs):
        outer.append(name)
        return getter(name, *args, **kwargs)

    with (
        tf.variable_scope("A", custom_getter=outermost),
        tf.variable_scope("B", custom_getter=getter),
    ):
        layer = SepConv(4, 3, name="n")
        layer(images())
    expected = zip(parts("A/B/n"), [(3, 3, 3, 1), (1, 1, 3, 4), (4,)], [None] * 3, strict=True)
    assert [(n, s, r or None) for n, s, r in seen] == list(expected)
    assert outer == parts("A/B/n")
    assert (len(layer.trainable_weights), len(layer.non_trainable_weights)) == (0, 3)
    assert tf.trainable_variables() == []
    with pytest.raises(ValueError, match="custom_getter"):
        tf.get_variable("v", [1], custom_getter=3)


def test_partitioners_are_refused(mode):
    for make in (
        lambda: tf.variable_scope("s", partitioner=len),
        lambda: tf.get_variable("v", [2], partitioner=len),
        lambda: tf.get_variable_scope().set_partitioner(len),
    ):
        with pytest.raises(NotImplementedError, match="`partitioner` is not supported"):
            make()


def test_defaults_of_a_scope_may_be_set_while_it_is_open(graph):
    with tf.variable_scope("A") as scope:
        scope.set_initializer(tf.ones_initializer())
        scope.set_regularizer(tf.reduce_sum)
        scope.set_dtype("float64")
        made = tf.get_variable("v", [2])
        scope.set_custom_getter(lambda getter, name, **kwargs: made)
        assert tf.get_variable("w", [3]) is made
    assert (array(made).tolist(), made.dtype) == ([1, 1], "float64")
    assert values(tf.losses.get_regularization_losses("A/")) == [2.0]
    assert names(scope.global_variables()) == names(scope.trainable_variables()) == ["A/v"]
    with tf.variable_scope("B", regularizer=tf.reduce_sum), tf.variable_scope("C") as inner:
        assert inner.regularizer is tf.reduce_sum
        tf.get_variable("v", [2], regularizer=lambda variable: None)
    assert tf.losses.get_regularization_losses("B/") == []


def test_get_variable_takes_values_and_refuses_what_does_not_fit(graph):
    given = tf.get_variable("given", initializer=np.arange(3.0))
    assert (array(given).tolist(), given.dtype) == ([0, 1, 2], "float64")
    with pytest.raises(ValueError, match="must not be given where `initializer` is a value"):
        tf.get_variable("other", [3], initializer=[1.0])
    with pytest.raises(ValueError, match="must be specified"):
        tf.get_variable("other")
    with pytest.raises(TypeError, match="unexpected keyword argument 'nope'"):
        tf.get_variable_scope().get_variable("other", [3], nope=1)
    assert array(tf.get_variable("count", [2], dtype=tf.int32)).tolist() == [0, 0]
    made = tf.Variable([1.5, 2.5], name="v"), tf.Variable([1, 2], name="v", trainable=False)
    assert names(made) == ["v", "v_1"]
    assert (made[0].dtype, made[1].dtype) == ("float32", "int32")
    assert made[0].get_shape().as_list() == [2]
    assert array(made[0].read_value()).tolist() == array(made[0].initialized_value()).tolist()
    assert names(tf.trainable_variables()) == ["given", "count", "v"]
    with pytest.raises(ValueError, match="initial_value"):
        tf.Variable()


def test_name_scopes_nest_and_number(graph):
    with tf.name_scope("a") as outer:
        with tf.name_scope("b") as inner, tf.name_scope(None, "c") as default:
            pass
        with tf.name_scope("b") as again, tf.name_scope("") as top, tf.name_scope(outer) as back:
            pass
    assert (outer, inner, default) == ("a/", "a/b/", "a/b/c/")
    assert (again, top, back) == ("a/b_1/", "", "a/")


# ---------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("switch", [tf.disable_eager_execution, tf.disable_v2_behavior])
def test_a_process_may_work_in_one_graph(switch):
    SepConv(4, 3)(images())
    assert tf.global_variables() == []
    tf.reset_default_graph()
    switch()
    assert not tf.executing_eagerly()
    SepConv(4, 3)(images())
    assert names(tf.global_variables()) == parts("separable_conv2d")
    with tf.Graph().as_default():
        assert tf.global_variables() == []
        with pytest.raises(AssertionError, match="must not be called inside a graph"):
            tf.reset_default_graph()
    tf.reset_default_graph()
    assert tf.global_variables() == []
    tf.enable_v2_behavior()
    assert tf.executing_eagerly()


def test_collections_of_a_graph(graph):
    tf.add_to_collection("mine", 1)
    tf.add_to_collections(["mine", "other", "mine"], 2)
    assert (tf.get_collection("mine"), tf.get_collection("other")) == ([1, 2], [2])
    tf.get_collection_ref("other").append(3)
    assert tf.get_collection("other") == [2, 3]
    assert graph.collections == graph.get_all_collection_keys() == ["mine", "other"]
    graph.clear_collection("mine")
    assert tf.get_collection("mine") == tf.model_variables() == tf.local_variables() == []
    tf.set_random_seed(3)
    assert graph.seed == 3


def test_losses_of_a_graph_add_up(graph):
    tf.losses.mean_squared_error(np.zeros(2), np.ones(2))
    tf.losses.add_loss(tf.constant(2.0))
    tf.get_variable("v", [2], initializer=tf.ones_initializer(), regularizer=tf.reduce_sum)
    assert values(tf.losses.get_losses()) == [1.0, 2.0]
    assert values([tf.losses.get_total_loss()]) == [5.0]
    assert values([tf.losses.get_total_loss(add_regularization_losses=False)]) == [3.0]


def test_updates_are_collected_at_the_next_call(graph):
    layer = SepConv(4, 3)
    layer.add_update("first")
    layer.add_update(["second"])
    assert tf.get_collection(tf.GraphKeys.UPDATE_OPS) == []
    for _ in range(2):
        layer(images())
    assert layer.updates == tf.get_collection(tf.GraphKeys.UPDATE_OPS) == ["first", "second"]


def test_a_layer_of_ones_own(mode):
    class Scale(tf.layers.Layer):
        def build(self, input_shape):
            self.factor = self.add_weight("factor", initializer="ones")
            self.unnamed = self.add_weight(shape=[2], trainable=False)

        def call(self, inputs, scope):
            return inputs * self.factor, scope.name

    layer = Scale(input_dim=3)
    with tf.variable_scope("A"):
        y, scope = layer(images((2, 3)))
    assert np.array_equal(array(y), array(images((2, 3))))
    assert scope == layer.scope_name == "A/scale"
    assert names(layer.weights) == ["A/scale/factor", "A/scale/variable_1"]
    assert layer.get_config() == {
        "name": "scale_1",
        "trainable": True,
        "dtype": "float32",
        "batch_input_shape": (None, 3),
    }
    with pytest.raises(TypeError, match="Unknown keyword argument"):
        SepConv(4, 3).add_weight("extra", [2], nope=1)


def test_a_weight_after_the_first_call_must_be_there(graph):
    layer = SepConv(4, 3)
    layer(images())
    with pytest.raises(ValueError, match="does not exist"):
        layer.add_weight("extra", [2])


# ------------------------------------------------------------------------------------- optimizers


@needs_gradients
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (lambda: tf.train.GradientDescentOptimizer(0.1), [2.4, 1.92]),
        (lambda: tf.train.MomentumOptimizer(0.1, 0.9), [2.4, 1.38]),
        # By hand: the first step of Adam is the learning rate, the second nearly so.
        (lambda: tf.train.AdamOptimizer(0.1), [2.9, 2.8]),
    ],
)
def test_optimizers_step_as_their_formulas_say(graph, optimizer, expected):
    v = tf.get_variable("v", [], initializer=tf.constant_initializer(3.0))
    step = tf.Variable(0, trainable=False, name="global_step")
    stepped, seen = optimizer(), []
    for _ in range(2):
        stepped.minimize(lambda: tf.square(v), global_step=step)
        seen.append(float(array(v)))
    assert seen == pytest.approx(expected, abs=2e-3)
    assert array(step).item() == 2


@needs_gradients
def test_optimizers_refuse_what_they_cannot_use(graph):
    optimizer = tf.train.GradientDescentOptimizer(0.1)
    with pytest.raises(ValueError, match="No variables to optimize"):
        optimizer.minimize(lambda: tf.constant(1.0))
    v = tf.get_variable("v", [])
    with pytest.raises(TypeError, match="must be a function of no arguments"):
        optimizer.minimize(tf.square(v))
    with pytest.raises(ValueError, match="at least one gradient"):
        optimizer.apply_gradients([(None, v)])


def test_the_numpy_backend_says_that_it_has_no_gradients(graph):
    v = tf.get_variable("v", [], initializer=tf.ones_initializer())
    if keras.backend.backend() == "numpy":
        with pytest.raises(NotImplementedError, match="train with jax, torch or tensorflow"):
            tf.train.value_and_gradients(lambda: tf.square(v), [v])
    else:
        assert values(tf.train.value_and_gradients(lambda: tf.square(v), [v])[1]) == [2.0]


@needs_gradients
def test_a_step_keeps_what_the_loss_assigns_to_other_variables(graph):
    v = tf.get_variable("v", [], initializer=tf.ones_initializer())
    mean = tf.get_variable("mean", [], initializer=tf.zeros_initializer(), trainable=False)

    def loss():
        mean.assign(0.5 * tf.stop_gradient(tf.identity(v)))
        return tf.square(v) + tf.stop_gradient(tf.identity(mean))

    value, (gradient,) = tf.train.value_and_gradients(loss, [v])
    assert values([value, gradient, mean]) == [1.5, 2.0, 0.5]


@needs_gradients
def test_steps_do_not_pile_up_names(graph):
    v = tf.get_variable("v", [], initializer=tf.ones_initializer())

    def loss():
        with tf.variable_scope("net") as scope:
            seen.append(scope.original_name_scope)
        return tf.square(v)

    seen = []
    for _ in range(3):
        tf.train.value_and_gradients(loss, [v])
    assert seen == ["net/"] * 3


def test_functions_reuse_in_a_scope_made_by_hand(mode):
    with tf.variable_scope("s", initializer=tf.ones_initializer()):
        sep(images(), 4, 3, name="f")
    with tf.variable_scope("s") as scope:
        scope.reuse_variables()
        assert tf.get_variable("f/bias").op.name == "s/f/bias"
