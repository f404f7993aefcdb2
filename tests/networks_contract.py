"""What published networks give with our layers in them; run under a backend of Keras."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
import onnxruntime
import pytest
from numpy.testing import assert_allclose
from PIL import Image

import sepconv
from sepconv.demo.data import astronaut_face, emotion_model_path
from sepconv.keras import SeparableConv2D

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import blazeface
import face_landmarks
from published import open_picture, overlap

STOCK = keras.layers.SeparableConv2D
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_names():
    keras.utils.clear_session(free_memory=False)


@pytest.fixture(autouse=True)
def no_random_starts(monkeypatch):
    """All weights are set later. Random generators for their starts take JAX seconds to compile."""
    zeros = keras.initializers.Zeros()
    call = staticmethod(lambda shape, dtype=None, **options: zeros(shape, dtype))
    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", call)


def assert_rounding(ours, stock, layers):
    """Checks that outputs differ as they may when each of so many layers rounds in its own way."""
    bound = 4 * layers * np.finfo(np.float32).eps * np.abs(stock).max()
    assert np.abs(stock).max() > 0
    assert_allclose(ours, stock, rtol=0, atol=bound)


def classes(model, kind):
    return [layer.name for layer in model.layers if type(layer) is kind]


# ---------------------------------------------------------------------------- face-api, from npm


def test_the_face_of_the_astronaut_and_its_landmarks():
    picture, face = open_picture(None), astronaut_face()
    detector, network = face_landmarks.tiny_face_detector(), face_landmarks.face_landmark_68()
    assert len(classes(detector, SeparableConv2D)) == 5
    assert len(classes(network, SeparableConv2D)) == 15
    boxes, scores = face_landmarks.detect(detector, picture)
    assert len(boxes) == 1
    assert scores[0] > 0.9
    (top, bottom), (left, right) = face.rows, face.columns
    assert overlap(boxes[0], np.array([left, top, right, bottom])) > 0.6
    points = face_landmarks.find_landmarks(network, picture, boxes[0])
    # Another network, trained by others, sees the eyes and the mouth at the same places.
    graph = blazeface.read_graph(blazeface.read_model("back"))
    outputs = blazeface.keras_network(graph).predict_on_batch(
        blazeface.picture_input(picture, graph)
    )
    _, (other,), _ = blazeface.decode(outputs, graph, picture)
    parts = (face_landmarks.RIGHT_EYE, face_landmarks.LEFT_EYE, face_landmarks.MOUTH)
    for part, expected in zip(parts, other[[0, 1, 3]], strict=True):
        assert np.linalg.norm(points[part].mean(axis=0) - expected) < 6
    # As trained for stock layers.
    image = face_landmarks.detector_input(picture)
    stock = face_landmarks.tiny_face_detector(STOCK)
    assert_rounding(detector.predict_on_batch(image), stock.predict_on_batch(image), layers=7)
    crop, _ = face_landmarks.crop(picture, boxes[0])
    image = face_landmarks.landmarks_input(crop)
    stock = face_landmarks.face_landmark_68(STOCK)
    assert_rounding(network.predict_on_batch(image), stock.predict_on_batch(image), layers=17)


def test_the_example_draws_what_it_finds(tmp_path, capsys):
    result = tmp_path / "new" / "picture.png"
    face_landmarks.main(result=result)
    assert "face, score 0.9" in capsys.readouterr().out
    pixels = np.asarray(Image.open(result))
    assert pixels.shape == (1024, 1024, 3)
    assert (pixels == (0, 255, 255)).all(axis=-1).sum() > 68 * 9
    assert (pixels == (255, 255, 0)).all(axis=-1).sum() > 4 * 200


# --------------------------------------------------------------------------- BlazeFace, from ONNX


@pytest.mark.parametrize(("name", "pairs"), [("front", 16), ("back", 32)])
def test_blazeface_gives_what_onnxruntime_gives(name, pairs):
    content = blazeface.read_model(name)
    graph = blazeface.read_graph(content)
    assert len(graph.pairs) == pairs
    model = blazeface.keras_network(graph)
    assert len(classes(model, SeparableConv2D)) == pairs
    x = blazeface.picture_input(open_picture(None), graph)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Not that it removes what nothing reads.
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    expected = session.run(None, {graph.input: x})
    for ours, theirs in zip(model.predict_on_batch(x), expected, strict=True):
        assert_rounding(ours, theirs, layers=pairs + 2)


# ------------------------------------------------------------------------------------------ fusion


def test_fer_with_its_batch_norms_folded():
    net = sepconv.load(emotion_model_path(), fused=False)
    x = astronaut_face().pixels
    for inference in (False, True):
        model, report = sepconv.fuse(net, inference=inference, inputs=[x])
        assert len(report.swapped) == len(report.candidates) == 8
        folded = [any("batch_norm" in name for name in each.absorbed) for each in report.swapped]
        assert folded == [inference] * 8
        assert len(classes(model, keras.layers.BatchNormalization)) == (6 if inference else 14)
        assert np.abs(logits(net, x)).max() > 1
        assert_allclose(logits(model, x), logits(net, x), rtol=0, atol=1e-4)


def logits(model, x):
    """What the model computes ahead of its softmax."""
    before = keras.Model(model.inputs, model.layers[-2].output)
    return keras.ops.convert_to_numpy(before([x], training=False))
