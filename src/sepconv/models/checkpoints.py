"""Checkpoints of TensorFlow 1 and 2, read without TensorFlow.

A checkpoint is an index, `prefix.index`, and files of numbers, `prefix.data-00000-of-00001`. The
index is a table of sorted keys in blocks (the format of LevelDB); its values are protocol buffers
that tell the dtype, the shape and the place of a tensor. The one package for it, `tensorflow-
checkpoint-reader`, needs a protobuf older than 3.19, with which no current framework works, hence
this reader.

Nothing that a file says is believed: every size is compared with the size of the file it is in
before memory is allocated, and the blocks of the index are compared with their checksums.
"""

from __future__ import annotations

import functools
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["checkpoint_prefix", "read_checkpoint"]

Array = npt.NDArray[Any]

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_BLOCK_TRAILER_BYTES = 5  # The kind of compression, and a checksum.

# Numbers of tensorflow.DataType. What is not here, text among it, is no weight.
_DTYPES = {
    1: "<f4",
    2: "<f8",
    3: "<i4",
    4: "|u1",
    5: "<i2",
    6: "|i1",
    8: "<c8",
    9: "<i8",
    10: "|b1",
    14: "bfloat16",
    17: "<u2",
    18: "<c16",
    19: "<f2",
    22: "<u4",
    23: "<u8",
}
_ATTRIBUTE = "/.ATTRIBUTES/"
_VALUE = f"{_ATTRIBUTE}VARIABLE_VALUE"


def checkpoint_prefix(path: str | os.PathLike[str]) -> Path | None:
    """Returns the prefix of the files of a checkpoint.

    Args:
        path: The prefix; its `.index`; or a folder with a file `checkpoint`, which names the
            latest one. Of that name, the last part counts: the folder may have been moved.

    Returns:
        The prefix, or `None` if there is no checkpoint.

    Raises:
        ValueError: the file `checkpoint` of the folder names none that is there.
    """
    path = Path(path)
    if path.is_dir():
        state = path / "checkpoint"
        if not state.is_file():
            return None
        prefix = path / _latest(state)
        if not _with_ending(prefix, ".index").is_file():
            raise ValueError(f"{state}: the checkpoint that it names is not there: {prefix}")
        return prefix
    if path.suffix == ".index" and path.is_file():
        return path.with_suffix("")
    return path if _with_ending(path, ".index").is_file() else None


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Reads the numeric tensors of a TensorFlow checkpoint.

    The names of object-based checkpoints (TensorFlow 2) lose their
    `/.ATTRIBUTES/VARIABLE_VALUE`: `net/layer/kernel`.

    Args:
        path: As for `checkpoint_prefix`.

    Returns:
        New arrays by name, in the order of the index, which is that of the alphabet.

    Raises:
        ValueError: there is no checkpoint, or its files are damaged; the text names the file.
    """
    prefix = checkpoint_prefix(path)
    if prefix is None:
        raise ValueError(
            f"{path}: not a checkpoint of TensorFlow: there is no {path}.index. Those of before "
            "2016, which are one file, are not supported"
        )
    index = _with_ending(prefix, ".index")
    entries = _Index(index).entries()
    header = next(entries, None)
    if header is None or header[0] != b"":
        raise ValueError(f"{index}: damaged: the index does not begin with its header")
    fields = _fields(index, header[1])
    if fields.get(2, 0) != 0:
        raise ValueError(f"{index}: the checkpoint was written by a big-endian machine")
    shards = _shards(prefix, int(fields.get(1, 0)))
    tensors = {}
    for key, value in entries:
        name = key.decode("utf-8", errors="replace")
        entry = _entry(index, name, value)
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None or (_ATTRIBUTE in name and not name.endswith(_VALUE)):
            continue
        readable = _unescaped(name.removesuffix(_VALUE)) if name.endswith(_VALUE) else name
        tensors[readable] = _read_tensor(index, shards, name, entry, dtype)
    return tensors


def _with_ending(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)


def _latest(state: Path) -> str:
    text = state.read_bytes()[:65536].decode("utf-8", errors="replace")
    found = re.search(r'^model_checkpoint_path:\s*"((?:[^"\\\n]|\\.)*)"', text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{state}: not a list of checkpoints: no line `model_checkpoint_path`")
    # Bytes that are not ASCII are written as octal numbers.
    path = re.sub(
        rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8) & 255]), found[1].encode()
    )
    name = re.split(r"[/\\]", path.decode("utf-8", errors="replace"))[-1]
    if not name.strip("."):
        raise ValueError(f"{state}: `model_checkpoint_path` names no file: {found[1]!r}")
    return name


def _unescaped(name: str) -> str:
    return re.sub(r"\.([.S])", lambda found: "." if found[1] == "." else "/", name)


# -------------------------------------------------------------------------------------- the tensors


class _Entry(NamedTuple):
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


def _entry(index: Path, name: str, value: bytes) -> _Entry:
    fields = _fields(index, value)
    if 7 in fields:
        raise ValueError(f"{index}: {name!r} is stored in slices, which is not supported")
    numbers = [fields.get(number, 0) for number in (1, 3, 4, 5)]
    shape = fields.get(2, b"")
    if not isinstance(shape, bytes) or not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"{index}: damaged: the entry of {name!r} has fields of other types")
    sizes = []
    for number, dimension in _messages(index, shape):
        if number == 2:
            if not isinstance(dimension, bytes):
                raise ValueError(f"{index}: damaged: the shape of {name!r} is not a list of sizes")
            size = _fields(index, dimension).get(1, 0)
            # Negative numbers have their highest bit set.
            if not isinstance(size, int) or size >= 2**63:
                raise ValueError(f"{index}: damaged: {name!r} has a size that is not a count")
            sizes.append(size)
    dtype, shard, offset, nbytes = numbers
    return _Entry(dtype, tuple(sizes), shard, offset, nbytes)


def _shards(prefix: Path, count: int) -> list[Path]:
    if not 1 <= count <= 99999:
        raise ValueError(f"{prefix}.index: damaged: it speaks of {count} files of numbers")
    return [_with_ending(prefix, f".data-{number:05d}-of-{count:05d}") for number in range(count)]


def _read_tensor(index: Path, shards: list[Path], name: str, entry: _Entry, dtype: str) -> Array:
    if entry.shard >= len(shards):
        raise ValueError(f"{index}: damaged: {name!r} is in file {entry.shard} of {len(shards)}")
    numpy_dtype = _numpy_dtype(dtype)
    count = math.prod(entry.shape)
    if count * numpy_dtype.itemsize != entry.size or len(entry.shape) > 32:
        raise ValueError(
            f"{index}: damaged: {name!r} of the shape {entry.shape} and the dtype {numpy_dtype} "
            f"has {entry.size} bytes"
        )
    shard = shards[entry.shard]
    try:
        length = shard.stat().st_size
    except OSError as error:
        raise ValueError(f"{shard}: a part of the checkpoint cannot be read: {error}") from error
    if entry.offset + entry.size > length:
        raise ValueError(
            f"{shard}: truncated: {name!r} ends at byte {entry.offset + entry.size}, and the file "
            f"has {length}"
        )
    with shard.open("rb") as file:
        file.seek(entry.offset)
        content = file.read(entry.size)
    array = np.frombuffer(bytearray(content), numpy_dtype).reshape(entry.shape)
    return array.astype(numpy_dtype.newbyteorder("="), copy=False)


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


# ---------------------------------------------------------------------------------------- the index


class _Index:
    """The table of an index: blocks of sorted keys, and a block that lists them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = path.read_bytes()

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        footer = self._content[-_FOOTER_BYTES:]
        if len(footer) < _FOOTER_BYTES or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
            raise ValueError(f"{self._path}: not the index of a checkpoint, or truncated")
        _, after = self._handle(footer, 0)
        blocks, _ = self._handle(footer, after)
        for _, handle in self._block(*blocks):
            place, _ = self._handle(handle, 0)
            yield from self._block(*place)

    def _handle(self, content: bytes, at: int) -> tuple[tuple[int, int], int]:
        offset, at = _varint(self._path, content, at)
        size, at = _varint(self._path, content, at)
        return (offset, size), at

    def _block(self, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
        end = offset + size
        if size < 4 or end + _BLOCK_TRAILER_BYTES > len(self._content):
            raise ValueError(f"{self._path}: damaged: a block lies outside of the file")
        if self._content[end]:
            raise ValueError(f"{self._path}: the index is compressed, which is not supported")
        (checksum,) = struct.unpack_from("<I", self._content, end + 1)
        if checksum != _masked_crc32c(self._content[offset : end + 1]):
            raise ValueError(f"{self._path}: damaged: the checksum of a block does not fit")
        block = self._content[offset:end]
        (restarts,) = struct.unpack_from("<I", block, size - 4)
        at, stop = 0, size - 4 - 4 * restarts
        key = b""
        while at < stop:
            # A key is written without what it shares with the one before.
            shared, at = _varint(self._path, block, at)
            unshared, at = _varint(self._path, block, at)
            length, at = _varint(self._path, block, at)
            if shared > len(key) or at + unshared + length > stop:
                raise ValueError(f"{self._path}: damaged: an entry lies outside of its block")
            key = key[:shared] + block[at : at + unshared]
            at += unshared
            yield key, block[at : at + length]
            at += length


@functools.cache
def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


def _masked_crc32c(content: bytes) -> int:
    table = _crc32c_table()
    crc = 0xFFFFFFFF
    for byte in content:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    # Of data that contain checksums themselves, so they are rotated and shifted.
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# --------------------------------------------------------------------------------- protocol buffers


def _varint(path: Path, content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            break
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError(f"{path}: damaged: a number has no end")


def _messages(path: Path, content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: number, and an integer or bytes."""
    at = 0
    while at < len(content):
        tag, at = _varint(path, content, at)
        number, kind = tag >> 3, tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(path, content, at)
        elif kind in (1, 2, 5):
            size, at = _varint(path, content, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if at + size > len(content):
                raise ValueError(f"{path}: damaged: a field lies outside of its entry")
            value = content[at : at + size]
            at += size
        else:
            raise ValueError(f"{path}: damaged: a field of an unknown kind, {kind}")
        yield number, value


def _fields(path: Path, content: bytes) -> dict[int, Any]:
    return dict(_messages(path, content))
