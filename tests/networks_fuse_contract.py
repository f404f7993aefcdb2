"""What `sepconv.fuse` finds in published networks; run under a backend of Keras."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras_fuse_contract import with_random_weights

import sepconv
from sepconv.demo.data import astronaut_face

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import ssd_mobilenet
from published import open_picture, overlap

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def classes(model, kind):
    return [layer.name for layer in model.layers if type(layer) is kind]


def test_a_mobilenet_finds_the_same_face_when_it_is_fused():
    picture = open_picture(None)
    stock = ssd_mobilenet.ssd_mobilenet()
    inputs = ssd_mobilenet.network_input(picture)
    model, report = sepconv.fuse(stock, inference=True, inputs=inputs)
    assert len(report.swapped) == len(report.candidates) == 13
    # Both relus and the batch norm between them, with its own numbers.
    assert all(len(each.absorbed) >= 3 for each in report.swapped)
    assert classes(model, keras.layers.BatchNormalization) == []
    assert report.output_difference < 1e-5 * report.output_largest
    (box,), (score,) = ssd_mobilenet.detect(model, picture)
    assert score > 0.9
    (top, bottom), (left, right) = astronaut_face().rows, astronaut_face().columns
    assert overlap(box, np.array([left, top, right, bottom])) > 0.5


def test_xception_of_keras():
    net = application(keras.applications.Xception, 71)
    for inference in (False, True):
        model, report = sepconv.fuse(net, inference=inference)
        assert len(report.swapped) == len(report.candidates) == 34
        assert classes(model, keras.layers.SeparableConv2D) == []
        assert all(bool(each.absorbed) == inference for each in report.swapped)
        assert report.output_largest > 0.1
        assert report.output_difference < 1e-4 * report.output_largest


def test_mobilenet_of_keras():
    net = application(keras.applications.MobileNet, 64)
    model, report = sepconv.fuse(net, inference=True)
    assert len(report.swapped) == len(report.candidates) == 13
    assert classes(model, keras.layers.DepthwiseConv2D) == []
    # What is left is that of the first convolution, which is not separable.
    assert classes(model, keras.layers.BatchNormalization) == ["conv1_bn"]
    assert report.output_largest > 0.1
    assert report.output_difference < 1e-4 * report.output_largest


def application(kind, size):
    """A network of Keras, with weights that make every layer matter to the output."""
    net = kind(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation="linear"
    )
    return with_random_weights(net)
