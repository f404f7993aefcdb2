"""Files that are damaged or lie, and the error that each one is: docs/hostile-files.md.

python tests/hostile.py docs/hostile-files.md
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from sepconv.models.checkpoints import _masked_crc32c
from sepconv.models.tensors import write_tensors


class Case(NamedTuple):
    """A file to load, and words of the error."""

    kind: str
    what: str
    name: str
    """Of the file; of a checkpoint, its prefix."""
    write: Callable[[Path], Any]
    """Writes it at a path."""
    reason: str


# ----------------------------------------------------------------------------- models of Keras


def layer(kind: str, **config: Any) -> dict[str, Any]:
    return {
        "class_name": kind,
        "module": "keras.layers",
        "registered_name": None,
        "config": {"name": "bad"} | config,
    }


def model(*layers: Any) -> dict[str, Any]:
    return {
        "class_name": "Sequential",
        "module": "keras",
        "registered_name": None,
        "config": {"name": "net", "layers": list(layers)},
    }


def weights(path: Path, shape: tuple[int, ...] = (3,)) -> bytes:
    """An HDF5 file with one dataset; where its shape is another one, without numbers in it."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("model_weights/w", shape, "float32", chunks=(1,) * len(shape))
        if shape == (3,):
            dataset[...] = np.ones(3)
    return path.read_bytes()


def archive(config: Any, *members: tuple[Any, Any], shape: tuple[int, ...] = (3,)) -> Any:
    """What writes a `.keras` file of this config and these further members."""
    text = config if isinstance(config, str) else json.dumps(config)

    def write(path: Path) -> None:
        part = path.with_suffix(".part")
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("config.json", text)
            file.writestr("model.weights.h5", weights(part, shape))
            for member, content in members:
                file.writestr(member, content)
        part.unlink()

    return write


def link() -> zipfile.ZipInfo:
    member = zipfile.ZipInfo("link")
    member.external_attr = 0o120777 << 16
    return member


def bomb(path: Path) -> None:
    """As much as 5 GB of zeros, deflated."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("config.json", json.dumps(model()))
        file.writestr("model.weights.h5", bytes(2**20))
    content = path.read_bytes()
    # In the directory at the end, where the reader looks.
    at = content.rindex(struct.pack("<I", 2**20))
    path.write_bytes(content[:at] + struct.pack("<I", 2**32 - 2) + content[at + 4 :])


def legacy(config: Any) -> Any:
    """What writes a model of Keras 2 in an HDF5 file."""

    def write(path: Path) -> None:
        weights(path)
        with h5py.File(path, "a") as file:
            file.attrs["model_config"] = json.dumps(config)
            file["model_weights"].attrs["layer_names"] = []

    return write


def legacy_input(size: int) -> dict[str, Any]:
    return layer("InputLayer", name="x", batch_input_shape=[None, size])


def without_root(path: Path) -> None:
    """A model whose root group has a header of zeros, which HDF5 does not look at when it opens."""
    legacy(model())(path)
    data = bytearray(path.read_bytes())
    header = struct.unpack_from("<Q", data, 64)[0] + 9
    data[header : header + 8] = bytes(8)
    path.write_bytes(data)


def attribute_without_text(path: Path) -> None:
    """A model with an attribute whose name is no text."""
    legacy(model())(path)
    with h5py.File(path, "a") as file:
        h5py.h5a.create(
            file["model_weights"].id,
            b"\xff\xfe",
            h5py.h5t.NATIVE_INT8,
            h5py.h5s.create_simple((1,)),
        )


def truncated(write: Any, kept: int) -> Any:
    def cut(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[:kept])

    return cut


def raw(content: bytes) -> Any:
    return lambda path: path.write_bytes(content)


DEEP = '{"a":' * 300 + "{}" + "}" * 300
HUGE_INPUT = layer("InputLayer", name="x", batch_shape=[None, 2**34])
WIDE_INPUT = layer("InputLayer", name="x", batch_shape=[None, 2**28])

KERAS = [
    ("a Lambda layer", archive(model(layer("Lambda", function="x"))), "it holds Python code"),
    ("a lambda in place of a function", archive(model(layer("__lambda__"))), "Python code"),
    ("a class of a module of Python",
     archive(model({"module": "os", "class_name": "system", "config": {}})),
     "Keras cannot make the model"),
    ("a layer that nobody knows", archive(model(layer("NoSuchLayer"))), "Keras cannot make the"),
    ("an operation of TensorFlow", archive(model(layer("TFOpLambda"))), "operation of TensorFlow"),
    ("100,000 brackets", archive("[" * 100_000), "the config is nested too deeply"),
    ("a layer 300 levels deep", archive(model(json.loads(DEEP))), "nested too deeply"),
    ("half of a JSON text", archive("{"), "the config is not JSON"),
    ("a list for a model", archive([]), "the config describes no model"),
    ("levels that are no model", archive(DEEP), "the config describes no model"),
    ("a number for the class of the model", archive({"class_name": 3, "config": {}}),
     "does not name the class of the model"),
    ("a list for the class of a layer", archive(model({"class_name": [], "config": {}})),
     "a class name in the config is not text"),
    ("2^50 filters", archive(model(layer("SeparableConv2D", filters=2**50, kernel_size=[3, 3]))),
     "needs at least"),
    ("text for a number of filters",
     archive(model(layer("SeparableConv2D", filters="x", kernel_size=[1, 1]))),
     "Keras cannot make the model"),
    ("an input of 2^34 numbers", archive(model(HUGE_INPUT, layer("Dense", units=1))),
     "268435456 numbers are allowed"),
    ("a dense layer that follows a wide input",
     archive(model(WIDE_INPUT, layer("Dense", units=3))), "expected 2 variables"),
    ("weights of 2^50 numbers that are not there", archive(model(), shape=(2**50,)),
     "the file does not have them"),
    ("a member that leads to the folder above", archive(model(), ("../x", "x")),
     "a member of the archive leads out of it"),
    ("a member with an absolute path", archive(model(), ("/tmp/x", "x")),
     "a member of the archive leads out of it"),
    ("a member that is a link", archive(model(), (link(), "/etc/passwd")), "is a link"),
    ("half of a JSON text beside the config", archive(model(), ("metadata.json", "{")),
     "metadata.json is damaged"),
    ("a member twice", archive(model(), ("x", "x"), ("x", "y")), "is there twice"),
    ("a member that says that it has 4 GiB", bomb, "bytes cannot hold"),
    ("an empty file", raw(b""), "not an archive of Keras, or truncated"),
    ("the first 200 bytes", truncated(archive(model()), 200),
     "not an archive of Keras, or truncated"),
]  # fmt: skip
KERAS_2 = [
    ("a Lambda layer", legacy(model(layer("Lambda", function=["x"]))), "it holds Python code"),
    ("an input of 2^34 numbers",
     legacy(model(legacy_input(2**34), layer("Dense", units=1))),
     "268435456 numbers are allowed"),
    ("a dense layer that follows a wide input",
     legacy(model(legacy_input(2**28), layer("Dense", units=1))),
     "Layer count mismatch"),
    ("an empty file", raw(b""), "not an HDF5 file, or truncated"),
    ("the first 200 bytes", truncated(legacy(model()), 200), "not an HDF5 file, or truncated"),
    ("a root group that cannot be read", without_root, "not an HDF5 file, or truncated"),
    ("an attribute whose name is no text", attribute_without_text, "the name of an attribute"),
]  # fmt: skip


# ------------------------------------------------------------------------------------- weights

ATTACKED = "attacked-by-a-pickle"


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (ATTACKED,))


def torch_file(content: Any) -> Any:
    def write(path: Path) -> None:
        import torch

        torch.save(content(torch), path)

    return write


def deflated(path: Path) -> None:
    """A file of torch whose parts are small, and say that they are large."""
    import torch

    stored = io.BytesIO()
    torch.save({"a": torch.zeros(2**16)}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for entry in source.infolist():
            z.writestr(entry.filename, source.read(entry))


def safetensors(header: bytes, length: int | None = None) -> Any:
    return raw(struct.pack("<Q", len(header) if length is None else length) + header + b"1234")


def dataset(**options: Any) -> Any:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.create_dataset("w", dtype="f4", **options)

    return write


TORCH = [
    ("a pickle that makes a folder", raw(pickle.dumps(Attack())), "pickled objects"),
    ("the same in an archive of torch", torch_file(lambda torch: {"a": Attack()}),
     "with pickled objects, which are not loaded"),
    ("one number, repeated 2^40 times",
     torch_file(lambda torch: {"a": torch.ones(1).expand(2**40)}), "has less data"),
    ("parts that are compressed", deflated, "torch does not compress them"),
    ("no tensor", torch_file(lambda torch: {"epoch": 3}), "there is no tensor"),
    ("a picture", raw(b"\x89PNG" + bytes(100)), "not a state dict of torch, damaged"),
]  # fmt: skip
SAFETENSORS = [
    ("a shape of 2^80 numbers",
     safetensors(b'{"w":{"dtype":"F32","shape":[1099511627776,1099511627776],'
                 b'"data_offsets":[0,4]}}'), "not a safetensors file, or damaged"),
    ("numbers beyond the end",
     safetensors(b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
     "not a safetensors file, or damaged"),
    ("a negative size", safetensors(b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'),
     "not a safetensors file, or damaged"),
    ("an unknown dtype", safetensors(b'{"w":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'),
     "not a safetensors file, or damaged"),
    ("a header of 2^62 bytes", safetensors(b"{}", 2**62), "not a safetensors file, or damaged"),
    ("10,000 brackets", safetensors(b"[" * 10_000), "not a safetensors file, or damaged"),
    ("the first 40 bytes", truncated(lambda p: write_tensors(p, {"w": np.ones(9, "f4")}), 40),
     "not a safetensors file, or damaged"),
]  # fmt: skip
HDF5 = [
    ("a dataset of 2^40 numbers that are not there", dataset(shape=(2**40,), chunks=(1024,)),
     "the file does not have them"),
    ("a dataset with its numbers in another file",
     dataset(shape=(4,), external=[("/etc/hostname", 0, 16)]), "has its numbers in another file"),
    ("a picture", raw(b"\x89PNG" + bytes(100)), "not an HDF5 file"),
]  # fmt: skip


# --------------------------------------------------------------------------------- checkpoints


def varint(value: int) -> bytes:
    content = b""
    while value > 127:
        content += bytes([value & 127 | 128])
        value >>= 7
    return content + bytes([value])


def message(**fields: int | bytes) -> bytes:
    """A protocol buffer of fields `_1`, `_2`, ... that are integers or bytes."""
    content = b""
    for name, value in fields.items():
        number = int(name[1:])
        if isinstance(value, bytes):
            content += varint(number << 3 | 2) + varint(len(value)) + value
        else:
            content += varint(number << 3) + varint(value)
    return content


def entry(*shape: int, dtype: int = 1, offset: int = 0, size: int = 4) -> bytes:
    dimensions = b"".join(message(_2=message(_1=each)) for each in shape)
    return message(_1=dtype, _2=dimensions, _4=offset, _5=size)


def checkpoint(
    tensor: bytes, *, shards: int = 1, compression: int = 0, damage: bool = False, data: bytes = b""
) -> Any:
    """What writes a checkpoint of one tensor `w`."""

    def block(*entries: tuple[bytes, bytes]) -> bytes:
        content = b""
        for key, value in entries:
            content += varint(0) + varint(len(key)) + varint(len(value)) + key + value
        content += struct.pack("<II", 0, 1) + bytes([compression])
        return content + struct.pack("<I", _masked_crc32c(content) ^ damage)

    def write(path: Path) -> None:
        first = block((b"", message(_1=shards)), (b"w", tensor))
        handle = varint(0) + varint(len(first) - 5)
        last = block((b"w", handle))
        footer = varint(0) + varint(0) + varint(len(first)) + varint(len(last) - 5)
        footer = footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
        path.with_name(f"{path.name}.index").write_bytes(first + last + footer)
        if data:
            path.with_name(f"{path.name}.data-00000-of-00001").write_bytes(data)

    return write


def beside(ending: str, content: bytes) -> Any:
    return lambda path: path.with_name(f"{path.name}{ending}").write_bytes(content)


def folder(text: str) -> Any:
    def write(path: Path) -> None:
        path.mkdir()
        (path / "checkpoint").write_text(f"model_checkpoint_path: {text}\n")

    return write


DATA = np.ones(1, "<f4").tobytes()
CHECKPOINTS = [
    ("an empty index", beside(".index", b""), "not the index of a checkpoint, or truncated"),
    ("bytes at random", beside(".index", bytes(range(200))), "not the index of a checkpoint"),
    ("blocks beyond the end",
     beside(".index", b"\xff" * 9 + bytes(31) + struct.pack("<Q", 0xDB4775248B80FB57)),
     "damaged"),
    ("a wrong checksum", checkpoint(entry(1), damage=True), "the checksum of a block does not fit"),
    ("a compressed index", checkpoint(entry(1), compression=1), "the index is compressed"),
    ("a million files", checkpoint(entry(1), shards=10**6), "it speaks of 1000000 files"),
    ("no numbers beside it", checkpoint(entry(1)), "a part of the checkpoint cannot be read"),
    ("numbers that are cut off", checkpoint(entry(3, size=12), data=DATA), "truncated"),
    ("a shape of 2^80 numbers", checkpoint(entry(2**40, 2**40), data=DATA), "has 4 bytes"),
    ("2^40 numbers, and as many bytes", checkpoint(entry(2**40, size=2**42), data=DATA),
     "truncated"),
    ("a negative size", checkpoint(entry(2**64 - 1), data=DATA), "a size that is not a count"),
    ("an entry that is no protocol buffer", checkpoint(b"\x07", data=DATA), "damaged"),
    ("a list that leads to the folder above", folder('"../../x"'), "is not there"),
    ("a list without a name", folder('".."'), "names no file"),
]  # fmt: skip

CASES = [
    *(Case("`.keras`", what, "net.keras", write, reason) for what, write, reason in KERAS),
    *(Case("`.h5`, a model", what, "net.h5", write, reason) for what, write, reason in KERAS_2),
    *(Case("`.h5`, weights", what, "w.h5", write, reason) for what, write, reason in HDF5),
    *(Case("state dict", what, "net.pt", write, reason) for what, write, reason in TORCH),
    *(Case("`.safetensors`", what, "w.safetensors", write, reason)
      for what, write, reason in SAFETENSORS),
    *(Case("checkpoint", what, "ckpt", write, reason) for what, write, reason in CHECKPOINTS),
]  # fmt: skip

INTRODUCTION = """\
# Hostile files

A file of a model comes from anywhere, so nothing that it says is believed. No code in it is run:
pickles are read by torch's reader of weights alone, layers with Python in them are refused, and
Keras reads a copy of the config and of the weights that was made here. Every size is compared with
the size of the file before memory is allocated. Nothing is unpacked to disk under a name that the
file chooses; what is written is written beside and renamed, so a failure leaves the target as it
was.

Each row is tried in every run of the tests: `sepconv.load` raises a `ValueError` that names the
file and says this, no code has run, and no file has appeared. The same holds for `sepconv convert`.

| kind | what is wrong | error |
|---|---|---|
"""


def page() -> str:
    """The text of docs/hostile-files.md."""
    rows = (f"| {case.kind} | {case.what} | ... {case.reason} ... |\n" for case in CASES)
    return INTRODUCTION + "".join(rows)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
