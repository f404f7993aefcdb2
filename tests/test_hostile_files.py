"""Model files that are damaged or lie: one ValueError that names the file and the reason."""

from __future__ import annotations

import json
import zipfile

import h5py
import numpy as np
import pytest

import sepconv


def layer(class_name, **config):
    return {"class_name": class_name, "config": {"name": "bad", **config}}


def model(*layers):
    return {"class_name": "Sequential", "config": {"name": "net", "layers": list(layers)}}


def weights(path, shape=(3,)):
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("model_weights/w", shape, "float32", chunks=(1,))
        if shape == (3,):
            dataset[...] = np.ones(3)
    return path.read_bytes()


def archive(path, config, *, members=(), shape=(3,)):
    text = config if isinstance(config, str) else json.dumps(config)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", text)
        file.writestr("model.weights.h5", weights(path.with_suffix(".part"), shape))
        for member, content in members:
            file.writestr(member, content)


def link():
    member = zipfile.ZipInfo("link")
    member.external_attr = 0o120777 << 16
    return member


ARCHIVES = {
    "lambda layer": (model(layer("Lambda", function="aaaa")), {}, "'bad' is a Lambda"),
    "lambda function": (model(layer("__lambda__", value="aaaa")), {}, "Python code"),
    "tensorflow operation": (model(layer("TFOpLambda")), {}, "operation of TensorFlow"),
    "deep config": ("[" * 100_000 + "]" * 100_000, {}, "nested too deeply"),
    "deep legal config": ('{"a":' * 300 + "{}" + "}" * 300, {}, "describes no model"),
    "deep model": (model(json.loads('{"a":' * 300 + "{}" + "}" * 300)), {}, "nested too deeply"),
    "no json": ("{", {}, "not JSON"),
    "a list": ([], {}, "describes no model"),
    "class name a number": ({"class_name": 3, "config": {}}, {}, "name the class"),
    "inner class name a list": (model({"class_name": [], "config": {}}), {}, "not text"),
    "absurd filters": (
        model(layer("SeparableConv2D", filters=2**50, kernel_size=[3, 3])), {}, "needs at least"
    ),
    "wrong type in a layer": (
        model(layer("SeparableConv2D", filters="x", kernel_size=[1, 1])), {}, "cannot make"
    ),
    "unknown class": (model(layer("NoSuchLayer")), {}, "cannot make"),
    "class of os": (
        model({"module": "os", "class_name": "system", "config": {}}), {}, "cannot make"
    ),
    "parent folder": (model(), {"members": [("../x", "x")]}, "leads out of it"),
    "absolute path": (model(), {"members": [("/tmp/x", "x")]}, "leads out of it"),
    "link": (model(), {"members": [(link(), "/etc/passwd")]}, "is a link"),
    "absurd dataset": (model(), {"shape": (2**50,)}, "the file does not have them"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_hostile_archive_is_refused(case, tmp_path):
    config, options, reason = ARCHIVES[case]
    path = tmp_path / "net.keras"
    archive(path, config, **options)
    with pytest.raises(ValueError, match=reason) as caught:
        sepconv.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("kept", [0, 7, 200])
def test_a_truncated_file_is_refused(ending, kept, tmp_path):
    whole = tmp_path / "whole.keras"
    archive(whole, model())
    content = whole.read_bytes() if ending == "keras" else weights(tmp_path / "whole.h5")
    path = tmp_path / f"net.{ending}"
    path.write_bytes(content[:kept])
    with pytest.raises(ValueError, match="truncated") as caught:
        sepconv.load(path)
    assert str(path) in str(caught.value)


def test_a_number_format_that_numpy_lacks_is_refused_with_the_name_of_the_file_issue_7(tmp_path):
    path = tmp_path / "net.weights.h5"
    with h5py.File(path, "w") as file:
        kind = h5py.h5t.IEEE_F32LE.copy()
        kind.set_ebias(120_000)
        h5py.h5d.create(file.id, b"w", kind, h5py.h5s.create_simple((3,)))
    with pytest.raises(ValueError, match="damaged") as caught:
        sepconv.load(path)
    assert str(path) in str(caught.value)


def test_text_that_is_none_is_refused_with_the_name_of_the_file_issue_7(tmp_path):
    path = tmp_path / "net.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(model())
        group = file.create_group("model_weights")
        group.attrs.create("w", [b"\xff", b"a"], dtype=h5py.string_dtype("ascii"))
    with pytest.raises(ValueError, match="damaged") as caught:
        sepconv.load(path)
    assert str(path) in str(caught.value)
