"""Published networks with our layers in them; `networks*_contract.py` have those of Keras."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from keras_backends import run_tests
from test_fuse_torch import warmed

import sepconv
from sepconv.demo.data import astronaut_face
from sepconv.torch import SeparableConv2d

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "examples"), str(HERE.parent / "benchmarks")]

import blazeface  # noqa: E402
import timm_networks  # noqa: E402
from published import open_picture, overlap  # noqa: E402


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_networks_of_keras(backend, tmp_path):
    run_tests(backend, tmp_path, HERE / "networks_contract.py")


def test_fusion_of_networks_of_keras(tmp_path):
    # What is found depends on no backend, and torch has nothing to compile.
    run_tests("torch", tmp_path, HERE / "networks_fuse_contract.py")


# ------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize(("name", "pairs"), [("front", 16), ("back", 32)])
def test_blazeface_in_torch_gives_what_onnxruntime_gives(name, pairs):
    content = blazeface.read_model(name)
    graph = blazeface.read_graph(content)
    net = blazeface.TorchNetwork(graph).eval()
    assert sum(isinstance(module, SeparableConv2d) for module in net.modules()) == pairs
    picture = open_picture(None)
    x = blazeface.picture_input(picture, graph)
    with torch.no_grad():
        ours = [each.numpy() for each in net(torch.from_numpy(x))]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Not that it removes what nothing reads.
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    for mine, theirs in zip(ours, session.run(None, {graph.input: x}), strict=True):
        # Each layer rounds in its own way.
        bound = 4 * (pairs + 2) * np.finfo(np.float32).eps * np.abs(theirs).max()
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=bound)
    boxes, _, scores = blazeface.decode(ours, graph, picture)
    assert len(boxes) == 1
    assert scores[0] > 0.8
    (top, bottom), (left, right) = astronaut_face().rows, astronaut_face().columns
    assert overlap(boxes[0], np.array([left, top, right, bottom])) > 0.5


@pytest.mark.parametrize("name", timm_networks.NETWORKS)
def test_networks_of_timm(name):
    torch.manual_seed(1)
    net = warmed(timm_networks.network(name, num_classes=10)).eval()
    pairs = timm_networks.NETWORKS[name][2]
    x = torch.randn(1, 3, 71, 71)
    model, report = sepconv.fuse(net, inference=True, inputs=x)
    assert len(report.swapped) == len(report.candidates) == pairs
    assert sum(isinstance(each, SeparableConv2d) for each in model.modules()) == pairs
    assert all(each.absorbed for each in report.swapped)
    with torch.no_grad():
        ours, stock = model(x), net(x)
    assert stock.abs().max() > 0.01
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4 * stock.abs().max().item())
