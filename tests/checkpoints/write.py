"""Writes checkpoints with TensorFlow, and what its layers compute: `write.py FOLDER`."""

import os
import sys
from pathlib import Path

os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3")

import numpy as np
import tensorflow as tf
import tf_keras

FOLDER = Path(sys.argv[1])
v1 = tf.compat.v1
X = np.random.default_rng(0).standard_normal((2, 9, 8, 3)).astype("float32")


def layers_net(x):
    """By `tf.layers`, with a variable of each of some further dtypes beside it."""
    v1.get_variable("table/half", [2, 3], tf.float16)
    v1.get_variable("table/brain", initializer=tf.constant([0.5, -2.0], tf.bfloat16))
    v1.get_variable("table/flags", initializer=tf.constant([True, False]), trainable=False)
    v1.get_variable("table/words", initializer=tf.constant(["a", "b"]), trainable=False)
    v1.get_variable("table/steps", initializer=tf.constant(-7, tf.int64), trainable=False)
    y = v1.layers.separable_conv2d(
        x, 5, 3, strides=2, padding="same", depth_multiplier=2, activation=tf.nn.relu, name="first",
        bias_initializer=v1.random_normal_initializer(),
    )  # fmt: skip
    return v1.layers.separable_conv2d(y, 4, (2, 3), use_bias=False, name="scope/second")


def slim_net(x):
    """By the names and the operations of slim, which TensorFlow 2 no longer has."""
    with v1.variable_scope("Net/SeparableConv2d"):
        depthwise = v1.get_variable("depthwise_weights", [3, 3, 3, 3])
        pointwise = v1.get_variable("pointwise_weights", [1, 1, 9, 5])
        biases = v1.get_variable("biases", [5], initializer=v1.random_normal_initializer())
    y = tf.nn.separable_conv2d(x, depthwise, pointwise, strides=[1, 2, 2, 1], padding="SAME")
    return tf.nn.relu(y + biases)


def train_and_save(name, net):
    with v1.Graph().as_default(), v1.Session() as session:
        v1.set_random_seed(1)
        x = v1.constant(X)
        y = net(x)
        averages = v1.train.ExponentialMovingAverage(0.5)
        trained = [v for v in v1.trainable_variables() if not v.name.startswith("table/")]
        step = v1.train.AdamOptimizer(0.1).minimize(v1.reduce_sum(y**2), var_list=trained)
        with v1.control_dependencies([step]):
            train = averages.apply(trained)
        session.run(v1.global_variables_initializer())
        for _ in range(2):
            session.run(train)
        saver = v1.train.Saver()
        saver.save(session, str(FOLDER / name / "model.ckpt"), global_step=2)
        np.save(FOLDER / name / "y.npy", session.run(y))
        # The same net of the averages.
        v1.train.Saver(averages.variables_to_restore(trained)).restore(
            session, str(FOLDER / name / "model.ckpt-2")
        )
        np.save(FOLDER / name / "averaged.npy", session.run(y))


def save_objects():
    net = tf_keras.Sequential(
        [
            tf_keras.layers.SeparableConv2D(
                5, 3, strides=2, padding="same", depth_multiplier=2, activation="relu",
                bias_initializer="random_normal",
            )
        ]
    )  # fmt: skip
    net.compile("adam", "mse")
    net.fit(X, np.zeros((2, 5, 4, 5)), verbose=0)
    names = tf.train.Checkpoint(net=net, optimizer=net.optimizer)
    names.table = tf.Module()
    setattr(names.table, "dotted.name", tf.Variable([1.0, 2.0]))
    names.save(str(FOLDER / "objects" / "model"))
    np.save(FOLDER / "objects" / "y.npy", net(X))


for each in ("layers", "slim", "objects"):
    (FOLDER / each).mkdir()
np.save(FOLDER / "x.npy", X)
train_and_save("layers", layers_net)
train_and_save("slim", slim_net)
save_objects()
