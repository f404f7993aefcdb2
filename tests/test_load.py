"""Files of models written by the Keras 2 of today load, and compute what they computed there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

ORACLE = os.environ.get("SEPCONV_ORACLE_PYTHON", "")
WRITE = """
import sys
import numpy as np
import tf_keras as keras
from tf_keras import layers
variants = [
    dict(strides=2, padding="same", depth_multiplier=2, activation="relu"),
    dict(dilation_rate=2, use_bias=False, activation="tanh"),
    dict(depthwise_initializer="he_normal", pointwise_initializer=keras.initializers.Constant(0.1),
         bias_initializer="ones"),
    dict(depthwise_regularizer="l2", pointwise_regularizer=keras.regularizers.L1(0.1),
         bias_regularizer="l1", activity_regularizer="l2"),
    dict(depthwise_constraint="non_neg", pointwise_constraint=keras.constraints.MaxNorm(3),
         bias_constraint="non_neg", padding="same"),
    dict(activation="hard_sigmoid", strides=(2, 2), name="named", trainable=False, dtype="float32"),
    dict(activation="swish", kernel_size=(1, 3), data_format="channels_last"),
]
x = np.random.default_rng(0).normal(size=(2, 9, 11, 4)).astype("float32")
for number, options in enumerate(variants):
    at = keras.Input((9, 11, 4))
    y = layers.SeparableConv2D(6, **{"kernel_size": 3, **options})(at)
    y = layers.BatchNormalization()(y)
    y = layers.DepthwiseConv2D(2, activation="hard_sigmoid")(y)
    y = layers.LeakyReLU()(y)
    y = layers.Conv2DTranspose(3, 3)(y)
    model = keras.Model(at, y)
    model.compile("adam", "mse")
    model.save(f"{sys.argv[1]}/{number}.h5")
    model.save(f"{sys.argv[1]}/{number}.keras")
    np.save(f"{sys.argv[1]}/{number}.npy", model(x, training=False).numpy())
np.save(f"{sys.argv[1]}/x.npy", x)
"""
READ = """
import json, sys
import numpy as np
import sepconv
x = np.load(f"{sys.argv[1]}/x.npy")
found = []
for number in range(7):
    for ending in ("h5", "keras"):
        for fused in (True, False):
            model = sepconv.load(f"{sys.argv[1]}/{number}.{ending}", fused=fused)
            y = np.load(f"{sys.argv[1]}/{number}.npy")
            difference = float(np.abs(np.asarray(model(x)) - y).max() / np.abs(y).max())
            ours = type(model.layers[1]).__module__ == "sepconv.keras"
            layer = model.layers[1]
            kept = [type(getattr(layer, f"{stage}_{kind}")).__name__ for stage in
                    ("depthwise", "pointwise", "bias") for kind in
                    ("initializer", "regularizer", "constraint")]
            kept.append(layer.trainable)
            found.append([number, ending, fused, ours, difference, kept])
print(json.dumps(found))
"""


# Of initializers, regularizers and constraints of both kernels and the bias, and whether it trains.
USUAL = ["GlorotUniform", "NoneType", "NoneType"] * 2 + ["Zeros", "NoneType", "NoneType"]
KEPT = {
    2: ["HeNormal", "NoneType", "NoneType", "Constant", "NoneType", "NoneType",
        "Ones", "NoneType", "NoneType", True],
    3: ["GlorotUniform", "L2", "NoneType", "GlorotUniform", "L1", "NoneType",
        "Zeros", "L1", "NoneType", True],
    4: ["GlorotUniform", "NoneType", "NonNeg", "GlorotUniform", "NoneType", "MaxNorm",
        "Zeros", "NoneType", "NonNeg", True],
    5: [*USUAL, False],
}  # fmt: skip


def run(python, text, folder, **variables):
    done = subprocess.run(
        [python, "-c", textwrap.dedent(text), str(folder)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(
    not ORACLE, reason="SEPCONV_ORACLE_PYTHON does not name a Python with TensorFlow and tf-keras"
)
def test_files_of_keras_2_load_and_give_the_same_outputs(tmp_path):
    run(ORACLE, WRITE, tmp_path, TF_CPP_MIN_LOG_LEVEL="3")
    output = run(sys.executable, READ, tmp_path, KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")
    found = json.loads(output.splitlines()[-1])
    assert len(found) == 28
    for number, ending, fused, ours, difference, kept in found:
        assert ours == fused, (number, ending)
        assert kept == KEPT.get(number, [*USUAL, True]), (number, ending)
        assert difference < 1e-5, (number, ending, fused)


def test_a_fused_model_comes_back(tmp_path):
    """In a process that has imported nothing of Keras before."""
    write = """
        import sys, keras, sepconv
        from keras import layers
        net = keras.Sequential(
            [keras.Input((8, 8, 2)), layers.DepthwiseConv2D(3), layers.Conv2D(3, 1)]
        )
        sepconv.fuse(net).model.save(sys.argv[1] + "/net.keras")
    """
    read = """
        import sys, sepconv
        print(type(sepconv.load(sys.argv[1] + "/net.keras").layers[0]).__name__)
    """
    run(sys.executable, write, tmp_path, KERAS_BACKEND="torch")
    assert run(sys.executable, read, tmp_path, KERAS_BACKEND="torch").endswith(
        "FusedSeparableConv2D\n"
    )
