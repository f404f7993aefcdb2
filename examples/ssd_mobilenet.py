"""Faces in a picture by a published MobileNet, before and after `sepconv.fuse`.

The weights are those of the npm package @vladmandic/face-api, which `make networks` fetches. Run it
with `python examples/ssd_mobilenet.py [PICTURE]`.
"""

import sys

import numpy as np
from face_landmarks import read_weights, sigmoid
from published import most_certain, open_picture, squared

import sepconv

import keras  # isort: skip
from keras import layers  # isort: skip

SIZE = 512
PAIRS = 13
# Pairs that step over every second pixel, and the last one of a size, whose output is looked at.
HALVED = (2, 4, 6, 12)
SEEN = (11, 13)


def ssd_mobilenet():
    """Returns the detector, of stock layers: from pictures, boxes and scores in six grids."""
    weights = read_weights("ssd_mobilenetv1")
    given = {}

    def used(layer, x, *names):
        given[layer.name] = [weights[name] for name in names]
        return layer(x)

    def convolution(x, scope, strides=1):
        names = (f"{scope}/weights", f"{scope}/convolution_bn_offset")
        height, width, _, filters = weights[names[0]].shape
        name = scope.replace("/", "_").lower()
        layer = layers.Conv2D(filters, (height, width), strides, padding="same", name=name)
        return layers.ReLU(6.0)(used(layer, x, *names))

    image = keras.Input((SIZE, SIZE, 3))
    x = convolution(image, "MobilenetV1/Conv2d_0_pointwise", strides=2)
    seen = []
    for index in range(1, PAIRS + 1):
        scope = f"MobilenetV1/Conv2d_{index}_depthwise"
        depthwise = layers.DepthwiseConv2D(
            3,
            strides=2 if index in HALVED else 1,
            padding="same",
            use_bias=False,
            name=f"depthwise_{index}",
        )
        x = used(depthwise, x, f"{scope}/depthwise_weights")
        norm = layers.BatchNormalization(epsilon=1e-3, name=f"norm_{index}")
        values = ("gamma", "beta", "moving_mean", "moving_variance")
        x = layers.ReLU(6.0)(used(norm, x, *(f"{scope}/BatchNorm/{each}" for each in values)))
        x = convolution(x, f"MobilenetV1/Conv2d_{index}_pointwise")
        if index in SEEN:
            seen.append(x)
    for index in (0, 2, 4, 6):  # Ever larger parts of the picture.
        x = convolution(x, f"Prediction/Conv2d_{index}_pointwise")
        x = convolution(x, f"Prediction/Conv2d_{index + 1}_pointwise", strides=2)
        seen.append(x)
    outputs = []
    for index, x in enumerate(seen):
        for kind, width in (("BoxEncoding", 4), ("Class", 3)):
            scope = f"Prediction/BoxPredictor_{index}/{kind}Predictor"
            names = (f"{scope}/weights", f"{scope}/biases")
            count = weights[names[1]].size
            predictor = layers.Conv2D(count, 1, name=f"{kind.lower()}_{index}")
            outputs.append(layers.Reshape((-1, width))(used(predictor, x, *names)))
    boxes, classes = (layers.Concatenate(axis=1)(outputs[first::2]) for first in (0, 1))
    model = keras.Model(image, [boxes, classes])
    for name, arrays in given.items():
        model.get_layer(name).set_weights(arrays)
    return model


def network_input(picture):
    """Returns what the detector takes: the picture on a black square, from -1 to 1."""
    return squared(picture, SIZE, centred=False) / np.float32(127.5) - 1


def detect(detector, picture):
    """Returns the faces that the detector finds: boxes (left, top, right, bottom), scores."""
    shifts, classes = (
        each[0].astype(np.float64) for each in detector.predict_on_batch(network_input(picture))
    )
    # Each box is a shift and a change of size of another, which is in the file. Rows come first.
    first = read_weights("ssd_mobilenetv1")["Output/extra_dim"][0].astype(np.float64)
    sizes = first[:, 2:] - first[:, :2]
    centres = (first[:, :2] + first[:, 2:]) / 2 + shifts[:, :2] / 10 * sizes
    halves = np.exp(shifts[:, 2:] / 5) * sizes / 2
    boxes = np.concatenate([centres - halves, centres + halves], axis=1)[:, [1, 0, 3, 2]]
    scores = sigmoid(classes[:, 1])
    kept = most_certain(boxes, scores, least=0.5, shared=0.5)
    return boxes[kept] * max(picture.size), scores[kept]


def main(path=None):
    """Finds the faces of a picture with the network of stock layers, and with the fused one."""
    picture = open_picture(path)
    stock = ssd_mobilenet()
    fused, report = sepconv.fuse(stock, inference=True, inputs=network_input(picture))
    print(report)
    for name, model in (("stock", stock), ("fused", fused)):
        boxes, scores = detect(model, picture)
        for box, score in zip(boxes, scores, strict=True):
            print(f"{name}: score {score:.3f}, box {box.round(1).tolist()}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
