"""Published networks with our layers in them; `networks*_contract.py` have those of Keras."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from keras_backends import run_tests
from test_fuse_torch import warmed
from torch import nn

import sepconv
from sepconv.demo.data import astronaut_face
from sepconv.torch import SeparableConv2d

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import blazeface  # noqa: E402
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


@pytest.fixture
def timm(monkeypatch):
    """Imports modules of timm's models by name, without the packages that timm needs for more.

    Its packages import torchvision, whose usual build does not load beside the torch of the tests.
    The models here take from it one class, to recognise modules that they do not have.
    """
    folder = Path(importlib.util.find_spec("timm").submodule_search_locations[0])
    own = {name for name in sys.modules if name.partition(".")[0] == "timm"}

    def package(name, path=None, **contents):
        module = types.ModuleType(name)
        module.__path__ = [] if path is None else [str(path)]
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    package("torchvision")
    package("torchvision.ops")
    package("torchvision.ops.misc", FrozenBatchNorm2d=type("FrozenBatchNorm2d", (nn.Module,), {}))
    package("timm", folder, __version__=importlib.metadata.version("timm"))
    package("timm.models", folder / "models")
    data = package("timm.data", folder / "data")
    constants = importlib.import_module("timm.data.constants")
    vars(data).update({name: value for name, value in vars(constants).items() if name.isupper()})
    yield lambda name: importlib.import_module(f"timm.models.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        if name not in own:
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("module", "name", "pairs"),
    [("xception", "legacy_xception", 34), ("efficientnet", "mobilenetv1_100", 13)],
)
def test_networks_of_timm(timm, module, name, pairs):
    torch.manual_seed(1)
    net = warmed(getattr(timm(module), name)(num_classes=10)).eval()
    x = torch.randn(1, 3, 71, 71)
    model, report = sepconv.fuse(net, inference=True, inputs=x)
    assert len(report.swapped) == len(report.candidates) == pairs
    assert sum(isinstance(each, SeparableConv2d) for each in model.modules()) == pairs
    assert all(each.absorbed for each in report.swapped)
    with torch.no_grad():
        ours, stock = model(x), net(x)
    assert stock.abs().max() > 0.01
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4 * stock.abs().max().item())
