"""Faces in a picture and 68 landmarks of each, by published networks of separable convolutions.

The weights are those of the npm package @vladmandic/face-api, which `make networks` fetches. Run it
with `python examples/face_landmarks.py [PICTURE [RESULT]]`, for reports/face_landmarks.png.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import ImageDraw
from published import ROOT, most_certain, open_picture, read, squared

from sepconv.keras import SeparableConv2D  # chooses a backend of Keras, so it comes first

import keras  # isort: skip
from keras import layers, ops  # isort: skip

PACKAGE = "vladmandic-face-api-1.7.15"
DETECTOR_SIZE = 416
LANDMARKS_SIZE = 112
# Width and height of the five shapes that a face may have in a cell of the detector, in cells.
ANCHORS = np.array(
    [
        (1.603231, 2.094468),
        (6.041143, 7.080126),
        (2.882459, 3.518061),
        (4.266906, 5.178857),
        (9.041765, 10.66308),
    ]
)
DETECTOR_MEAN = (117.001, 114.697, 97.404)
LANDMARKS_MEAN = (122.782, 117.001, 104.298)
RIGHT_EYE, LEFT_EYE, MOUTH = slice(36, 42), slice(42, 48), slice(48, 68)


def read_weights(name):
    """Returns the weights of a network of the package, by name; those in 8 bits are widened."""
    (group,) = json.loads(read(PACKAGE, f"model/{name}_model-weights_manifest.json"))
    content = read(PACKAGE, f"model/{name}_model.bin")
    weights, start = {}, 0
    for entry in group["weights"]:
        steps = entry.get("quantization")
        stored = np.dtype(steps["dtype"] if steps else entry["dtype"]).newbyteorder("<")
        count = int(np.prod(entry["shape"], dtype=np.int64))
        values = np.frombuffer(content, stored, count, start).reshape(entry["shape"])
        if steps:
            values = values * float(steps["scale"]) + float(steps["min"])
        weights[entry["name"]] = values.astype(entry["dtype"])
        start += count * stored.itemsize
    if start != len(content):
        raise ValueError(f"{name}: {len(content)} bytes of weights, {start} in the manifest")
    return weights


def with_weights(model, weights):
    """Gives each layer the weights under its name, in the order in which Keras lists them."""
    words = ("filters", "depthwise_filter", "pointwise_filter", "weights", "bias")
    for layer in model.layers:
        scope = layer.name.replace("_", "/")
        arrays = [weights[f"{scope}/{word}"] for word in words if f"{scope}/{word}" in weights]
        if arrays or layer.weights:
            layer.set_weights(arrays)
    return model


def leaky(x):
    """The leaky relu of the detector."""
    return ops.leaky_relu(x, 0.1)


def tiny_face_detector(separable=SeparableConv2D):
    """Returns the detector: from pictures, five boxes with a score for each of 13x13 cells."""
    image = keras.Input((DETECTOR_SIZE, DETECTOR_SIZE, 3))
    net = layers.Conv2D(16, 3, activation=leaky, name="conv0")(image)
    for index, filters in enumerate((32, 64, 128, 256, 512), start=1):
        net = layers.MaxPooling2D(2, padding="same")(net)
        net = separable(filters, 3, padding="same", activation=leaky, name=f"conv{index}")(net)
    net = layers.MaxPooling2D(2, strides=1, padding="same")(net)
    net = layers.Conv2D(5 * len(ANCHORS), 1, name="conv8")(net)
    return with_weights(keras.Model(image, net), read_weights("tiny_face_detector"))


def face_landmark_68(separable=SeparableConv2D):
    """Returns the network that finds 68 points in the picture of a face, as 136 coordinates."""
    image = keras.Input((LANDMARKS_SIZE, LANDMARKS_SIZE, 3))
    net = image
    for block, filters in enumerate((32, 64, 128, 256)):
        scope = f"dense{block}_conv"
        first = layers.Conv2D if block == 0 else separable
        total = net = first(
            filters, 3, strides=2, padding="same", activation="relu", name=f"{scope}0"
        )(net)
        for index in (1, 2, 3):
            out = separable(filters, 3, padding="same", name=f"{scope}{index}")(net)
            total = layers.add([total, out])
            net = layers.ReLU()(total)
    net = layers.Flatten()(layers.AveragePooling2D(7)(net))
    net = layers.Dense(136, name="fc")(net)
    return with_weights(keras.Model(image, net), read_weights("face_landmark_68"))


def sigmoid(x):
    """Of arrays of NumPy."""
    return 1 / (1 + np.exp(-x))


def detector_input(picture):
    """Returns what `tiny_face_detector` takes: the picture on a black square, without the mean."""
    return (squared(picture, DETECTOR_SIZE, centred=False) - np.float32(DETECTOR_MEAN)) / 255


def detect(detector, picture):
    """Returns the faces that the tiny detector finds: boxes (left, top, right, bottom), scores."""
    cells = detector.predict_on_batch(detector_input(picture))[0].astype(np.float64)
    rows, columns, _ = cells.shape
    x, y, log_width, log_height, score = np.moveaxis(
        cells.reshape(rows, columns, len(ANCHORS), 5), -1, 0
    )
    centres = np.stack(
        [
            np.arange(columns)[None, :, None] + sigmoid(x),
            np.arange(rows)[:, None, None] + sigmoid(y),
        ],
        axis=-1,
    )
    halves = np.exp(np.stack([log_width, log_height], axis=-1)) * ANCHORS / 2
    # The picture lies in the upper left corner of its square.
    pixels = max(picture.size) / rows
    boxes = np.concatenate([centres - halves, centres + halves], axis=-1).reshape(-1, 4) * pixels
    scores = sigmoid(score).reshape(-1)
    kept = most_certain(boxes, scores, least=0.5, shared=0.4)
    return boxes[kept], scores[kept]


def crop(picture, box):
    """Returns the part of a picture in a box, and where its upper left corner is."""
    left, top = np.floor(np.maximum(box[:2], 0)).astype(int)
    right, bottom = np.ceil(np.minimum(box[2:], picture.size)).astype(int)
    return picture.crop((left, top, right, bottom)), np.array([left, top])


def landmarks_input(face):
    """Returns what `face_landmark_68` takes: a face on a black square, without the mean."""
    return (squared(face, LANDMARKS_SIZE, centred=True) - np.float32(LANDMARKS_MEAN)) / 255


def find_landmarks(network, picture, box):
    """Returns 68 points (x, y) of the face in a box, in pixels of the picture."""
    face, corner = crop(picture, box)
    points = network.predict_on_batch(landmarks_input(face)).reshape(68, 2)
    side = max(face.size)
    return points * side - [(side - extent) // 2 for extent in face.size] + corner


def draw(picture, faces):
    """Returns the picture, twice as large, with the boxes and the landmarks of (box, points)."""
    drawn = picture.resize([2 * extent for extent in picture.size])
    pen = ImageDraw.Draw(drawn)
    for box, points in faces:
        pen.rectangle([float(edge) for edge in 2 * box], outline="yellow", width=2)
        for x, y in 2 * points:
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill="cyan")
    return drawn


def main(path=None, result=None):
    """Finds the faces of a picture, says where, and draws them."""
    picture = open_picture(path)
    detector, network = tiny_face_detector(), face_landmark_68()
    boxes, scores = detect(detector, picture)
    faces = [(box, find_landmarks(network, picture, box)) for box in boxes]
    for (box, points), score in zip(faces, scores, strict=True):
        print(
            f"face, score {score:.2f}: box {box.round().astype(int).tolist()},",
            f"right eye {points[RIGHT_EYE].mean(axis=0).round(1).tolist()},",
            f"left eye {points[LEFT_EYE].mean(axis=0).round(1).tolist()},",
            f"mouth {points[MOUTH].mean(axis=0).round(1).tolist()}",
        )
    if not faces:
        print("no face found")
    result = Path(result or ROOT / "reports" / "face_landmarks.png")
    result.parent.mkdir(parents=True, exist_ok=True)
    draw(picture, faces).save(result)
    print(f"drawn into {result}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
