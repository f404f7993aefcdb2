"""Files that are damaged or lie: one ValueError that names file and reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hostile
import pytest
from hostile import CASES

import sepconv
from sepconv.models.convert import convert

ROOT = Path(__file__).parent.parent


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")  # Of zipfile, which writes it.
@pytest.mark.parametrize("case", CASES, ids=[f"{case.name}: {case.what}" for case in CASES])
def test_a_hostile_file_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Where a pickle would make its folder.
    folder = tmp_path / "files"
    folder.mkdir()
    case.write(folder / case.name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(case.reason)) as caught:
        sepconv.load(folder / case.name)
    said = str(caught.value)
    assert str(folder / case.name) in said
    assert len(said) < 700
    target = folder / "out.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r".") as again:
        convert(folder / case.name, target, overwrite=True)
    assert str(again.value) == said
    assert target.read_bytes() == b"mine"
    assert sorted(tmp_path.rglob("*")) == sorted([*before, target])


def test_links_of_hdf5_are_not_followed(tmp_path):
    import h5py

    path = tmp_path / "w.h5"
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["w"] = [1.0, 2.0]
    with h5py.File(path, "w") as file:
        file["link"] = h5py.ExternalLink("secret.h5", "w")
        file["text"] = "words"
    assert sepconv.load(path) == {}


SOUND = {
    "net.keras": hostile.archive(hostile.model()),
    "net.h5": hostile.legacy(hostile.model()),
    "w.h5": hostile.dataset(data=[1.0]),
    "net.pt": hostile.torch_file(lambda torch: {"w": torch.ones(1)}),
    "w.safetensors": hostile.safetensors(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    "ckpt": hostile.checkpoint(hostile.entry(1), data=hostile.DATA),
}


def test_every_kind_of_file_is_here_as_it_should_be():
    assert {case.name for case in CASES} == set(SOUND)


@pytest.mark.parametrize("name", SOUND)
def test_but_for_what_is_wrong_the_files_are_read(name, tmp_path):
    SOUND[name](tmp_path / name)
    loaded = sepconv.load(tmp_path / name)
    if isinstance(loaded, dict):
        assert list(loaded) == ["w"]
    else:
        assert loaded.name == "net"


def test_no_weight_is_made_before_its_size_is_known(tmp_path):
    import keras

    made = []

    class Recorded(keras.initializers.Initializer):
        def __call__(self, shape, dtype=None):
            made.append(shape)
            return keras.ops.zeros(shape, dtype)

    units = {"units": 3, "kernel_initializer": {"class_name": "Recorded", "config": {}}}
    config = hostile.model(hostile.WIDE_INPUT, hostile.layer("Dense", **units))
    hostile.archive(config)(tmp_path / "net.keras")
    with pytest.raises(ValueError, match="Layer 'bad' expected 2 variables"):
        sepconv.load(tmp_path / "net.keras", custom_objects={"Recorded": Recorded})
    assert made == []


def test_the_page_lists_them():
    """`python tests/hostile.py docs/hostile-files.md` writes it."""
    path = ROOT / "docs" / "hostile-files.md"
    assert path.read_text(encoding="utf-8") == hostile.page()


def test_a_number_format_that_numpy_lacks_is_refused_with_the_name_of_the_file_issue_7(tmp_path):
    import h5py

    path = tmp_path / "net.weights.h5"
    with h5py.File(path, "w") as file:
        kind = h5py.h5t.IEEE_F32LE.copy()
        kind.set_ebias(120_000)
        h5py.h5d.create(file.id, b"w", kind, h5py.h5s.create_simple((3,)))
    with pytest.raises(ValueError, match="damaged") as caught:
        sepconv.load(path)
    assert str(path) in str(caught.value)


def test_text_that_is_none_is_refused_with_the_name_of_the_file_issue_7(tmp_path):
    import h5py

    path = tmp_path / "net.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(hostile.model())
        group = file.create_group("model_weights")
        group.attrs.create("w", [b"\xff", b"a"], dtype=h5py.string_dtype("ascii"))
    with pytest.raises(ValueError, match="damaged") as caught:
        sepconv.load(path)
    assert str(path) in str(caught.value)
