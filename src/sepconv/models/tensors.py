"""Files of named tensors: TensorFlow checkpoints, torch state dicts, safetensors, Keras HDF5.

No code of a file is run: pickles are read by torch's reader of weights alone. What a file says of
its sizes is compared with the size of the file before memory is allocated.
"""

from __future__ import annotations

import importlib
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sepconv.models.atomic import replacing
from sepconv.models.checkpoints import checkpoint_prefix, read_checkpoint
from sepconv.progress import tracked

__all__ = ["MOST_COMPRESSION", "check_dataset", "read_tensors", "write_tensors"]

Array = npt.NDArray[Any]

MOST_COMPRESSION = 1032
"""What deflate can shrink data by, at most."""


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Reads the named tensors of a file.

    Read are checkpoints of TensorFlow 1 and 2 (the prefix, its `.index`, or their folder), state
    dicts of torch (`.pt`, `.pth`, `.bin`), `.safetensors`, and the HDF5 files of Keras (`.h5`,
    `.hdf5`). Names are those of the file; nested dicts of torch and groups of HDF5 are joined by
    `.` and `/`. Text and single Python numbers are left out.

    Args:
        path: Of the file.

    Returns:
        New arrays by name, in the order of the file. bfloat16 stays as it is, in the dtype of
        `ml_dtypes`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package that reads the format is missing; the text tells its name.
        ValueError: the file is damaged, or of no known format; the text names it.

    Example:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/net.safetensors"
        >>> write_tensors(path, {"bias": np.ones(3, "float32")})
        >>> read_tensors(path)
        {'bias': array([1., 1., 1.], dtype=float32)}
    """
    path = Path(path)
    if checkpoint_prefix(path) is not None:
        return read_checkpoint(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file, and no checkpoint of this prefix")
    reader = _READERS.get(path.suffix.lower())
    if reader is None or path.is_dir():
        raise ValueError(
            f"{path}: not a file of tensors that is known: a checkpoint of TensorFlow, "
            f"{', '.join(_READERS)}; nor one of a model: .keras, .h5, .hdf5"
        )
    if not path.is_file():  # A pipe or a device may have no end.
        raise ValueError(f"{path}: not a file")
    return reader(path)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Array]) -> None:
    """Writes named tensors to a `.safetensors` file or, as a state dict of torch, a `.pt`, `.pth`.

    The file is written beside and renamed, so that it is never there in half.

    Args:
        path: Of the file.
        tensors: By name; numbers of any shape.

    Raises:
        ImportError: the package that writes the format is missing; the text tells its name.
        TypeError: a name is not text, or a tensor is not made of numbers.
        ValueError: the ending of `path` is none of these.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise ValueError(f"`path` must end in {', '.join(_WRITERS)}. Received: path={path}")
    arrays = {}
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        if not isinstance(name, str) or array.dtype.kind in "OSUMmT":
            raise TypeError(
                "`tensors` must be arrays of numbers by name. "
                f"Received: {name!r} of the dtype {array.dtype}"
            )
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        arrays[name] = np.require(native, requirements="C")
    with replacing(path) as beside:
        writer(beside, arrays)


def _package(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"This file needs the package {package}. Run: pip install {install}"
        ) from error


def _bfloat16() -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(_package("ml_dtypes", "'sepconv[models]'").bfloat16)
    return dtype


# -------------------------------------------------------------------------------------- safetensors

_SAFETENSORS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
    "C64": "<c8",
}


def _read_safetensors(path: Path) -> dict[str, Array]:
    safetensors = _package("safetensors", "'sepconv[models]'")
    try:
        # It compares header and offsets with the length of what it gets.
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged: {error}") from error
    tensors = {}
    for name, entry in entries:
        kind = entry["dtype"]
        if kind != "BF16" and kind not in _SAFETENSORS:
            raise ValueError(f"{path}: {name!r} has the dtype {kind}, which is not supported")
        dtype = _bfloat16() if kind == "BF16" else np.dtype(_SAFETENSORS[kind])
        array = np.frombuffer(bytearray(entry["data"]), dtype).reshape(entry["shape"])
        tensors[name] = array.astype(dtype.newbyteorder("="), copy=False)
    return tensors


def _write_safetensors(path: Path, arrays: dict[str, Array]) -> None:
    writer = _package("safetensors.numpy", "'sepconv[models]'")
    writer.save_file(arrays, path, metadata={"format": "np"})


# -------------------------------------------------------------------------------------------- torch


def _read_torch(path: Path) -> dict[str, Array]:
    torch = _package("torch", "torch")
    if zipfile.is_zipfile(path):
        _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # The readers of torch raise whatever their parts do.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path}: not a state dict of torch, damaged, or with pickled objects, which are not "
            f"loaded: {reason}"
        ) from error
    tensors = {}
    for name, tensor in _leaves("", content, torch.Tensor, set()):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{path}: {name!r} is not a dense tensor, which is not supported")
        # A tensor may say that it repeats a few numbers without end.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name!r} of the shape {tuple(tensor.shape)} has less data")
        tensors[name] = _from_torch(torch, tensor.detach())
    if not tensors:
        raise ValueError(f"{path}: there is no tensor in this file of torch")
    return tensors


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: damaged archive: {error}") from error
    if total > path.stat().st_size:
        raise ValueError(
            f"{path}: its parts say that they have {total} bytes, more than the file; "
            "torch does not compress them"
        )


def _leaves(name: str, value: Any, tensor: type, above: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple) and id(value) not in above:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            full = f"{name}.{key}" if name else str(key)
            yield from _leaves(full, item, tensor, above | {id(value)})


def _from_torch(torch: Any, tensor: Any) -> Array:
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy().copy()
        return bits.view(_bfloat16())
    array: Array = tensor.numpy().copy()
    return array


def _write_torch(path: Path, arrays: dict[str, Array]) -> None:
    torch = _package("torch", "torch")
    state = {}
    for name, array in arrays.items():
        if array.dtype.name == "bfloat16":
            state[name] = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        else:
            state[name] = torch.from_numpy(array.copy())
    torch.save(state, path)


# --------------------------------------------------------------------------------------------- HDF5


def _read_hdf5(path: Path) -> dict[str, Array]:
    h5py = _package("h5py", "'sepconv[models]'")
    try:
        with h5py.File(path, "r") as file:
            # Links to other files, and to elsewhere in this one, are not followed.
            datasets: dict[str, Any] = {}
            file.visititems(
                lambda name, node: (
                    datasets.update({name: node}) if isinstance(node, h5py.Dataset) else None
                )
            )
            names = _legacy_names(file, datasets) or {name: name for name in datasets}
            return {
                name: _read_dataset(path, datasets[place])
                for place, name in tracked(names.items(), "tensors read")
                if datasets[place].dtype.kind in "biufcV" and datasets[place].dtype.names is None
            }
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path}: not an HDF5 file, or damaged: {error}") from error


def _legacy_names(file: Any, datasets: Mapping[str, Any]) -> dict[str, str]:
    """Where the weights of a file of Keras 2 are, and how they are called, in order."""
    root = "model_weights" if "model_weights" in file else "/"
    if "layer_names" not in file[root].attrs:
        return {}
    names: dict[str, str] = {}
    for layer in _texts(file[root].attrs["layer_names"]):
        group = "/".join(part for part in (root.strip("/"), layer) if part)
        for weight in _texts(file[group].attrs["weight_names"]):
            place = f"{group}/{weight}"
            if place not in datasets:
                raise KeyError(f"the weight {place} is not there")
            name = weight.removesuffix(":0")
            names[place] = f"{layer}/{name}" if name in names.values() else name
    training = [place for place in datasets if place.startswith("optimizer_weights/")]
    return {**names, **{place: place for place in training}}


def _texts(values: Any) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def check_dataset(path: Path, dataset: Any, file_bytes: int) -> int:
    """Returns how many numbers a dataset of HDF5 has, which are as many as it says.

    Args:
        path: Named in errors.
        dataset: Of h5py.
        file_bytes: Size of the file that it is in.

    Raises:
        ValueError: they are in another file, or more than the file can hold.
    """
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{path}: {dataset.name!r:.80} has its numbers in another file")
    count = math.prod(int(size) for size in dataset.shape or (0,))
    nbytes = count * int(dataset.dtype.itemsize)
    stored = dataset.id.get_storage_size() * (MOST_COMPRESSION if dataset.chunks else 1)
    if nbytes > min(stored, file_bytes * MOST_COMPRESSION):
        raise ValueError(
            f"{path}: {dataset.name!r:.80} of the shape {dataset.shape} needs {nbytes} bytes, and "
            "the file does not have them"
        )
    return count


def _read_dataset(path: Path, dataset: Any) -> Array:
    check_dataset(path, dataset, path.stat().st_size)
    array: Array = dataset[()]
    if array.dtype.kind == "V":
        if array.dtype.itemsize != 2:
            raise ValueError(f"{path}: {dataset.name!r} has an unknown dtype, {array.dtype}")
        # Keras writes bfloat16 as two bytes without a meaning.
        return array.view(_bfloat16())
    return np.asarray(array).astype(array.dtype.newbyteorder("="), copy=False)


_READERS: dict[str, Callable[[Path], dict[str, Array]]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
}
_WRITERS: dict[str, Callable[[Path, dict[str, Array]], None]] = {
    ".safetensors": _write_safetensors,
    ".pt": _write_torch,
    ".pth": _write_torch,
}
