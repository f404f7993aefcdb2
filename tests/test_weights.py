"""Layouts and names of weights, and the files of tensors of every format."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest

import sepconv
from sepconv.models.checkpoints import read_checkpoint
from sepconv.models.convert import convert
from sepconv.models.tensors import (
    read_tensors,
    write_tensors,
)
from sepconv.models.weights import (
    chosen_tensors,
    depthwise_from_torch,
    depthwise_to_torch,
    is_moving_average,
    is_optimizer_slot,
    pointwise_from_torch,
    pointwise_to_torch,
    separable_weights,
)
from sepconv.numpy import separable_conv2d

ORACLE = os.environ.get("SEPCONV_ORACLE_PYTHON", "")


def numbers(*shape, dtype="float32"):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


# ---------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("multiplier", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 4])
def test_layouts_are_those_of_torch_and_come_back(channels, multiplier):
    torch = pytest.importorskip("torch")
    kernel, pointwise = numbers(3, 2, channels, multiplier), numbers(1, 1, channels * multiplier, 5)
    weight, point = depthwise_to_torch(kernel), pointwise_to_torch(pointwise)
    assert weight.flags.c_contiguous
    assert point.flags.c_contiguous
    x = numbers(2, channels, 7, 6)
    u = torch.conv2d(torch.tensor(x), torch.tensor(weight), groups=channels)
    y = torch.conv2d(u, torch.tensor(point)).numpy()
    wanted = separable_conv2d(x, kernel, pointwise, data_format="channels_first")
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(depthwise_from_torch(weight, channels), kernel)
    np.testing.assert_array_equal(pointwise_from_torch(point), pointwise)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: depthwise_to_torch(np.ones((3, 3, 2))), "four positive sizes"),
        (lambda: depthwise_to_torch(np.ones((3, 3, 0, 2))), "four positive sizes"),
        (lambda: depthwise_from_torch(np.ones((6, 2, 3, 3)), 3), "must have the shape"),
        (lambda: depthwise_from_torch(np.ones((6, 1, 3, 3)), 4), "with 4 channels"),
        (lambda: depthwise_from_torch(np.ones((6, 1, 3, 3)), 0), "`channels`"),
        (lambda: pointwise_to_torch(np.ones((1, 2, 3, 4))), "must have the shape"),
        (lambda: pointwise_from_torch(np.ones((4, 3, 1, 2))), "must have the shape"),
    ],
)
def test_shapes_that_are_none_of_a_kernel_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name",
    [
        "sep/depthwise_kernel/Adam",
        "sep/depthwise_kernel/Adam_1",
        "sep/bias/Momentum",
        "sep/bias/RMSProp_1",
        "beta1_power",
        "train/beta2_power_1",
        "net/sep/bias/.OPTIMIZER_SLOT/optimizer/m",
        "optimizer/iter",
        "model/optimizer/_variables/3",
        "optimizer_weights/Adam/m/sep/bias:0",
        "Adam/m/sep/bias",
        "training/Adam/sep/bias/m",
        "optimizer.state.0.exp_avg",
        "state.0.momentum_buffer",
    ],
)
def test_slots_of_optimizers_are_recognised(name):
    assert is_optimizer_slot(name)
    assert not is_moving_average(name)


@pytest.mark.parametrize(
    "name", ["sep/bias", "Momentum", "net.0.weight", "adam.weight", "sep/kernel", "global_step"]
)
def test_weights_are_no_slots(name):
    assert not is_optimizer_slot(name)
    assert not is_moving_average(name)


def test_moving_averages_take_the_place_of_what_they_average():
    tensors = {"a": 1, "b": 2, "a/ExponentialMovingAverage": 3, "a/Adam": 4}
    assert chosen_tensors(tensors) == {"a": 1, "b": 2}
    assert chosen_tensors(tensors, moving_averages=True) == {"a": 3, "b": 2}
    tensors = {"state_dict.w": 1, "state_dict_ema.w": 2}
    assert chosen_tensors(tensors, moving_averages=True) == {"state_dict.w": 2}
    with pytest.raises(ValueError, match="none among 1 tensors"):
        chosen_tensors({"a": 1}, moving_averages=True)


def test_pairs_of_torch_are_found_by_name_or_order():
    tensors = {
        "stem.weight": numbers(4, 3, 3, 3),
        "a.depthwise.weight": numbers(8, 1, 3, 3),
        "a.depthwise.bias": numbers(8),
        "a.pointwise.weight": numbers(6, 8, 1, 1),
        "a.pointwise.bias": numbers(6),
        "b.0.weight": numbers(6, 1, 5, 5),
        "b.1.weight": numbers(7, 6, 1, 1),
        "c.0.weight": numbers(7, 1, 3, 3),
        "c.1.weight": numbers(7),
        "c.2.weight": numbers(9, 7, 1, 1),
    }
    found = separable_weights(tensors, depth_multiplier={"a": 2})
    assert list(found) == ["a", "b.0"], "c has a batch norm between"
    assert found["a"].depthwise_kernel.shape == (3, 3, 4, 2)
    assert found["b.0"].depthwise_kernel.shape == (5, 5, 6, 1)
    assert found["a"].bias is tensors["a.pointwise.bias"]
    assert found["a"].depthwise_bias is tensors["a.depthwise.bias"]
    with pytest.raises(ValueError, match="'d', which is none"):
        separable_weights(tensors, depth_multiplier={"d": 2})
    with pytest.raises(ValueError, match="depth_multiplier=3"):
        separable_weights(tensors, depth_multiplier=3)


def test_layers_of_keras_whose_shapes_do_not_fit_are_refused():
    tensors = {"s/depthwise_kernel": numbers(3, 3, 4, 1), "s/pointwise_kernel": numbers(1, 1, 5, 6)}
    with pytest.raises(ValueError, match="'s' must have weights of the shapes"):
        separable_weights(tensors)
    tensors["s/pointwise_kernel"] = numbers(1, 1, 4, 6)
    tensors["s/bias"] = numbers(5)
    with pytest.raises(ValueError, match=r"'s/bias' must have the shape \(6,\)"):
        separable_weights(tensors)


# ------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth"])
@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_what_is_written_is_read(tmp_path, ending, multiplier):
    tensors = {
        "a.depthwise.weight": numbers(4 * multiplier, 1, 3, 3).transpose(0, 1, 3, 2),
        "a.pointwise.weight": numbers(5, 4 * multiplier, 1, 1),
        "brain": numbers(3, dtype=ml_dtypes.bfloat16),
        "half": numbers(2, 2, dtype="float16"),
        "double": numbers(2, dtype=">f8"),
        "steps": np.array(7, "int64"),
        "flags": np.array([True, False]),
        "none": np.zeros((0, 3), "float32"),
    }
    path = tmp_path / f"net.{ending}"
    write_tensors(path, tensors)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    found = read_tensors(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found[name], tensor)
    kernel = separable_weights(found, depth_multiplier=multiplier)["a"].depthwise_kernel
    assert kernel.shape == (3, 3, 4, multiplier)


# Keras itself converts its variables for NumPy in the old way.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_weights_files_of_keras(tmp_path, multiplier):
    from sepconv.keras import SeparableConv2D, keras

    layers = [keras.Input((7, 6, 3)), SeparableConv2D(4, 3, depth_multiplier=multiplier, name="s")]
    net = keras.Sequential([*layers, keras.layers.Conv2D(2, 1)])
    for name in ("net.weights.h5", "net.h5"):
        path = tmp_path / name
        if name == "net.h5":
            with h5py.File(path, "w") as file:  # As Keras 2 lays it out.
                file.attrs["layer_names"] = [b"s"]
                group = file.create_group("s")
                words = ("depthwise_kernel", "pointwise_kernel", "bias")
                group.attrs["weight_names"] = [f"s/{word}:0".encode() for word in words]
                for word, array in zip(words, net.get_weights(), strict=False):
                    group[f"s/{word}:0"] = array
        else:
            net.save_weights(path)
        ((_, found),) = separable_weights(read_tensors(path)).items()
        for mine, theirs in zip(found[:3], net.get_weights(), strict=False):
            np.testing.assert_array_equal(mine, theirs)


# ------------------------------------------------------------------ checkpoints of TensorFlow


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    if not ORACLE:
        pytest.skip("SEPCONV_ORACLE_PYTHON does not name a Python with TensorFlow and tf-keras")
    folder = tmp_path_factory.mktemp("checkpoints")
    script = Path(__file__).parent / "checkpoints" / "write.py"
    finished = subprocess.run(
        [ORACLE, str(script), str(folder)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder


@pytest.mark.parametrize("moving_averages", [False, True])
def test_a_checkpoint_of_tf_layers(checkpoints, moving_averages):
    tensors = read_tensors(checkpoints / "layers" / "model.ckpt-2")
    found = separable_weights(tensors, moving_averages=moving_averages)
    assert list(found) == ["first", "scope/second"]
    x = np.load(checkpoints / "x.npy")
    y = separable_conv2d(x, *found["first"][:3], strides=2, padding="same", activation="relu")
    y = separable_conv2d(y, *found["scope/second"][:3])
    wanted = np.load(checkpoints / "layers" / ("averaged.npy" if moving_averages else "y.npy"))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    slots = {name for name in tensors if is_optimizer_slot(name)}
    assert {"first/bias/Adam", "first/bias/Adam_1", "beta1_power"} <= slots
    assert len(slots) == 2 * 5 + 2
    assert sum(map(is_moving_average, tensors)) == 5
    assert tensors["table/half"].dtype == np.float16
    np.testing.assert_array_equal(tensors["table/brain"].astype("float32"), [0.5, -2])
    assert tensors["table/brain"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensors["table/flags"], [True, False])
    assert tensors["table/steps"] == -7
    assert "table/words" not in tensors


@pytest.mark.parametrize("moving_averages", [False, True])
def test_a_checkpoint_of_slim(checkpoints, moving_averages):
    tensors = read_tensors(checkpoints / "slim" / "model.ckpt-2.index")
    ((name, found),) = separable_weights(tensors, moving_averages=moving_averages).items()
    assert name == "Net/SeparableConv2d"
    x = np.load(checkpoints / "x.npy")
    y = separable_conv2d(x, *found[:3], strides=2, padding="same", activation="relu")
    wanted = np.load(checkpoints / "slim" / ("averaged.npy" if moving_averages else "y.npy"))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


# Keras itself converts its variables for NumPy in the old way.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("moving_averages", [False, True])
@pytest.mark.parametrize("kind", ["layers", "slim"])
def test_a_checkpoint_becomes_a_model_of_keras(checkpoints, kind, moving_averages, tmp_path):
    from sepconv.keras import keras

    layers = keras.layers
    common = {"strides": 2, "padding": "same", "activation": "relu"}
    chain = {
        "layers": [
            layers.SeparableConv2D(5, 3, depth_multiplier=2, name="first", **common),
            layers.SeparableConv2D(4, (2, 3), use_bias=False, name="second"),
        ],
        "slim": [
            layers.SeparableConv2D(5, 3, depth_multiplier=3, name="SeparableConv2d", **common)
        ],
    }[kind]
    empty, full = tmp_path / "empty.keras", tmp_path / "full.keras"
    keras.Sequential([keras.Input((9, 8, 3)), *chain]).save(empty)
    prefix = checkpoints / kind / "model.ckpt-2"
    convert(prefix, full, model=empty, moving_averages=moving_averages)
    y = keras.ops.convert_to_numpy(sepconv.load(full)(np.load(checkpoints / "x.npy")))
    wanted = np.load(checkpoints / kind / ("averaged.npy" if moving_averages else "y.npy"))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


KERNELS = {"s/depthwise_kernel:0": (1, 1, 1, 1), "x/s/pointwise_weights": (1, 1, 1, 5)}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"a/s/bias": 5}, "one for the weight 's/depthwise_kernel'. Received: none"),
        ({**KERNELS, "a/s/bias": 5, "b/s/biases": 5}, r"Received: \['a/s/bias', 'b/s/biases'\]"),
        ({**KERNELS, "s/bias": 4}, r"\(5,\) for 's/bias'. Received: 's/bias' of \(4,\)"),
    ],
)
def test_tensors_that_do_not_fit_a_model_are_told(shapes, reason):
    from sepconv.keras import keras
    from sepconv.models.keras_assign import assign

    net = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.SeparableConv2D(5, 1, name="s")])
    before = net.get_weights()
    with pytest.raises(ValueError, match=reason):
        assign(net, {name: np.ones(shape, "float32") for name, shape in shapes.items()})
    np.testing.assert_equal(net.get_weights(), before)
    # What fits in full comes before what fits from its end.
    whole = {**KERNELS, "s/bias": 5, "b/s/biases": 5}
    found = assign(net, {name: np.ones(shape, "float32") for name, shape in whole.items()})
    assert found["s/bias"] == "s/bias"


def test_a_checkpoint_of_objects(checkpoints):
    tensors = read_tensors(checkpoints / "objects")
    ((name, found),) = separable_weights(tensors).items()
    assert name.startswith("net/")
    assert any(is_optimizer_slot(each) for each in tensors)
    np.testing.assert_array_equal(tensors["table/dotted.name"], [1, 2])
    x = np.load(checkpoints / "x.npy")
    y = separable_conv2d(x, *found[:3], strides=2, padding="same", activation="relu")
    np.testing.assert_allclose(y, np.load(checkpoints / "objects" / "y.npy"), rtol=1e-5, atol=1e-5)


def test_checkpoints_are_read_without_tensorflow():
    code = "import sys, sepconv.models.tensors; print(*sys.modules)"
    names = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {"tensorflow", "torch", "h5py", "safetensors", "keras", "google"} & set(names)


# ------------------------------------------------------------------------------ hostile files


def test_damaged_checkpoints_are_refused(checkpoints, tmp_path):
    index = (checkpoints / "slim" / "model.ckpt-2.index").read_bytes()
    (data,) = (checkpoints / "slim").glob("*.data-*")
    beside = tmp_path / "c.data-00000-of-00001"
    for size in (0, 1, data.stat().st_size // 2, data.stat().st_size - 1):
        (tmp_path / "c.index").write_bytes(index)
        beside.write_bytes(data.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"c\.data-00000-of-00001: truncated"):
            read_checkpoint(tmp_path / "c")
    beside.write_bytes(data.read_bytes())
    whole = read_checkpoint(checkpoints / "slim" / "model.ckpt-2")
    refused = 0
    for at in range(0, len(index), 7):
        (tmp_path / "c.index").write_bytes(index[:at])
        with pytest.raises(ValueError, match=r"c\.index"):
            read_checkpoint(tmp_path / "c")
        changed = bytearray(index)
        changed[at] ^= 1 << at % 8
        (tmp_path / "c.index").write_bytes(changed)
        try:
            found = read_checkpoint(tmp_path / "c")
        except ValueError as error:
            refused += "c.index" in str(error)
        else:  # It was in a part that nobody reads, between the tensors and the end.
            np.testing.assert_equal(found, whole)
    assert refused > 0.7 * len(index) / 7
    beside.unlink()
    (tmp_path / "c.index").write_bytes(index)
    with pytest.raises(ValueError, match="a part of the checkpoint cannot be read"):
        read_checkpoint(tmp_path / "c")


def test_a_list_of_checkpoints_does_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "inner").mkdir()
    for text in ('"../model"', '"/etc/passwd"', '"a\\\\b"', '".."', "", '"unclosed'):
        (tmp_path / "inner" / "checkpoint").write_text(f"model_checkpoint_path: {text}\n")
        (tmp_path / "model.index").write_bytes(b"")
        with pytest.raises(ValueError, match="checkpoint"):
            read_tensors(tmp_path / "inner")


def test_nested_dicts_of_torch_are_flattened_and_their_numbers_left_out(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pth"
    torch.save({"epoch": 3, "model": {"w": torch.ones(2)}, "list": [torch.zeros(1)]}, path)
    assert list(read_tensors(path)) == ["model.w", "list.0"]
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="no tensor"):
        read_tensors(path)


@pytest.mark.parametrize("ending", ["safetensors", "pt", "h5"])
def test_truncated_and_foreign_files_are_refused(tmp_path, ending):
    path = tmp_path / f"net.{ending}"
    if ending == "h5":
        with h5py.File(path, "w") as file:
            file["w"] = numbers(50)
    else:
        write_tensors(path, {"w": numbers(50)})
    content = path.read_bytes()
    for size in (0, 1, 9, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"net\.{ending}"):
            read_tensors(path)
    path.write_bytes(b"\x89PNG" + bytes(100))
    with pytest.raises(ValueError, match=rf"net\.{ending}"):
        read_tensors(path)


def test_what_is_no_file_of_tensors_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_tensors(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not a file of tensors that is known"):
        read_tensors(tmp_path)
    with pytest.raises(ValueError, match="must end in"):
        write_tensors(tmp_path / "w.bin", {})
    with pytest.raises(TypeError, match="arrays of numbers by name"):
        write_tensors(tmp_path / "w.pt", {"a": np.array(["text"])})
    assert not list(tmp_path.iterdir())
