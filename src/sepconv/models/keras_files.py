"""Whole models in files of Keras 2 and Keras 3, read without running code of the file.

A file is never given to Keras as it is. Its config is checked and made valid for Keras 3, its
weights are copied dataset by dataset, and Keras reads the copy.
"""

from __future__ import annotations

import json
import math
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# First: it chooses a backend of Keras where nobody did. Both register layers of files.
import sepconv.keras
import sepconv.models.keras_fused  # noqa: F401

# isort: split
import h5py
import keras

from sepconv.models.keras_values import values_given
from sepconv.models.tensors import MOST_COMPRESSION, check_dataset, read_tensors
from sepconv.models.weights import is_optimizer_slot
from sepconv.progress import tracked

__all__ = [
    "hard_sigmoid_of_keras_2",
    "has_model",
    "load_model",
    "load_weights",
    "read_config",
    "stored_weights",
]

_MOST_CONFIG_BYTES = 64 * 2**20
_MOST_DEPTH = 200
# Python that a file brings along, and operations of TensorFlow that Keras 3 does not have.
_CODE = ("Lambda", "__lambda__")
_TENSORFLOW_OPERATIONS = ("TFOpLambda", "SlicingOpLambda", "ClassMethod", "TensorFlowOpLayer")
# Keras 2 wrote what its base class had, with or without a use for it.
_INERT = {
    "SeparableConv1D": ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"),
    "SeparableConv2D": ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"),
    "DepthwiseConv1D": ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"),
    "DepthwiseConv2D": ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"),
    "Conv1DTranspose": ("groups",),
    "Conv2DTranspose": ("groups",),
    "Conv3DTranspose": ("groups",),
}
_ACTIVATIONS = ("activation", "recurrent_activation")
_SIZES = ("filters", "units", "depth_multiplier", "input_dim", "output_dim")
_SHAPES = ("batch_input_shape", "batch_shape", "input_shape", "shape", "target_shape")
# Of one input. Keras may try a layer on an array of that size, to learn the shape of its output.
_MOST_NUMBERS = 2**28


def has_model(path: Path) -> bool:
    """Returns whether a file holds a model, not weights alone.

    Raises:
        ValueError: the file is damaged.
    """
    if path.suffix.lower() == ".keras":
        return True
    with _hdf5(path, path) as file:
        return _has_attribute(path, file, "model_config")


def read_config(path: Path) -> dict[str, Any]:
    """Returns the config of the model in a file, checked, and as Keras 3 understands it.

    Raises:
        ValueError: the file is damaged or holds no model, or the model runs code of the file.
    """
    if path.suffix.lower() == ".keras":
        with _archive(path) as archive:
            text: Any = _member(path, archive, "config.json", _MOST_CONFIG_BYTES)
            version: Any = _archive_version(path, archive)
    else:
        with _hdf5(path, path) as file:
            text = _text_attribute(path, file, "model_config")
            has_version = _has_attribute(path, file, "keras_version")
            version = _attribute(path, file, "keras_version") if has_version else ""
    version = version.decode(errors="replace") if isinstance(version, bytes) else str(version)
    config = _parsed(path, text)
    is_old = version.split(".")[0] in ("", "1", "2")
    for layer in _objects(path, config):
        _check_object(path, layer)
        _modernize(layer, is_old)
    return config


def load_model(path: Path, *, fused: bool, custom_objects: Mapping[str, Any] | None) -> Any:
    """Returns the model of a file, not compiled; arguments and errors as for `sepconv.load`."""
    config = read_config(path)
    if fused:
        for layer in _objects(path, config):
            if layer.get("class_name") == "SeparableConv2D" and _is_of_keras(layer):
                layer["registered_name"] = "sepconv>SeparableConv2D"
                layer["module"] = "sepconv.keras"
                if path.suffix.lower() != ".keras":
                    layer["class_name"] = "sepconv>SeparableConv2D"
    with tempfile.TemporaryDirectory(prefix="sepconv-") as folder:
        write = _write_archive if path.suffix.lower() == ".keras" else _write_hdf5
        copy, elements = write(path, Path(folder), config)

        try:
            # Whatever the config makes of its sizes, nothing is allocated before it is known that
            # the weights are those of the file.
            with values_given():
                model = keras.saving.load_model(
                    copy, custom_objects=custom_objects, compile=False, safe_mode=True
                )
                needed = sum(math.prod(weight.shape) for weight in model.weights)
                if needed > elements:
                    raise ValueError(f"it needs {needed} weights, and the file has {elements}")
            return model
        except RecursionError as error:
            raise ValueError(f"{path}: the config is nested too deeply") from error
        except Exception as error:  # What a config can be wrong in has no end.
            raise ValueError(f"{path}: Keras cannot make the model: {_reason(error)}") from error


def load_weights(path: Path, model: Any) -> None:
    """Gives a model the weights of a `.weights.h5` file that Keras 3 wrote of one like it.

    Such a file numbers the weights of each layer, and names layers by their class and order, so
    that only Keras knows which are which.

    Args:
        path: Of the file.
        model: A built model, which is not to be used after an error.

    Raises:
        ValueError: the file is damaged, or is of another model.
    """
    with tempfile.TemporaryDirectory(prefix="sepconv-") as folder:
        copy = Path(folder) / "copy.weights.h5"
        _copy_hdf5(path, path, copy, {})
        try:
            model.load_weights(copy)
        except Exception as error:  # Keras raises what its layers do.
            raise ValueError(f"{path}: not the weights of this model: {_reason(error)}") from error
        # Keras takes a file that has more.
        again = Path(folder) / "again.weights.h5"
        model.save_weights(again)
        more = [each for each in _weights_of(copy) if each not in set(_weights_of(again))]
        if more:
            raise ValueError(f"{path}: not the weights of this model, which has no {more[0]}")


def _weights_of(path: Path) -> list[str]:
    """Names of the weights in a file that Keras wrote, without those of an optimizer."""
    return [name for name in read_tensors(path) if not is_optimizer_slot(name)]


@contextmanager
def stored_weights(path: Path) -> Iterator[Path]:
    """Gives the HDF5 file that the weights of a model are in: its own, or one out of its archive.

    Raises:
        ValueError: the file is damaged.
    """
    if path.suffix.lower() != ".keras":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="sepconv-") as folder:
        yield _extracted(path, Path(folder))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("Exception encountered:")]
    reason = (said or lines or [type(error).__name__])[-1 if said else 0]
    if reason.endswith(":"):  # A heading.
        reason = " ".join(lines[lines.index(reason) :][:2])
    return reason.removeprefix("Exception encountered: ")[:300]


# ------------------------------------------------------------------------------------------- config


def _parsed(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path}: the config is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: the config is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict | list):
        raise ValueError(f"{path}: the config describes no model")
    if not isinstance(config.get("class_name"), str):
        raise ValueError(f"{path}: the config does not name the class of the model")
    return config


def _objects(path: Path, config: Any) -> Iterator[dict[str, Any]]:
    """Every dict of a config."""
    waiting = [(config, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > _MOST_DEPTH:
            raise ValueError(f"{path}: the config is nested too deeply")
        if isinstance(value, dict):
            yield value
            waiting.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, list):
            waiting.extend((item, depth + 1) for item in value)


def _check_object(path: Path, layer: dict[str, Any]) -> None:
    class_name = layer.get("class_name")
    if class_name is None:
        return
    if not isinstance(class_name, str):
        raise ValueError(f"{path}: a class name in the config is not text: {class_name!r:.80}")
    inner = layer.get("config")
    name = inner.get("name") if isinstance(inner, dict) else layer.get("name")
    kind = class_name.rpartition(">")[2]
    if kind in _CODE:
        raise ValueError(
            f"{path}: the layer {name!r:.80} is a {kind}: it holds Python code, which is not run"
        )
    if kind in _TENSORFLOW_OPERATIONS:
        raise ValueError(
            f"{path}: the layer {name!r:.80} is an operation of TensorFlow ({kind}), which Keras 3 "
            "does not have. Build the model with layers in its place, and load the weights"
        )


def _is_of_keras(layer: dict[str, Any]) -> bool:
    module = layer.get("module")
    return module is None or str(module).split(".")[0] in ("keras", "tf_keras", "tensorflow")


def _archive_version(path: Path, archive: zipfile.ZipFile) -> Any:
    """The version of the Keras that wrote an archive, or of this one if nobody says."""
    if "metadata.json" not in archive.namelist():
        return keras.__version__
    try:
        metadata = json.loads(_member(path, archive, "metadata.json", _MOST_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: metadata.json is damaged: {error}") from error
    return metadata.get("keras_version") if isinstance(metadata, dict) else None


def hard_sigmoid_of_keras_2(x: Any) -> Any:
    """Computes `clip(0.2*x + 0.5, 0, 1)`: `hard_sigmoid`, which has a slope of 1/6 in Keras 3.

    Args:
        x: A tensor.
    """
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)


keras.saving.register_keras_serializable(package="sepconv")(hard_sigmoid_of_keras_2)


def _modernize(layer: dict[str, Any], is_old: bool) -> None:
    module = layer.get("module")
    if isinstance(module, str) and module.split(".")[0] in ("tf_keras", "tensorflow"):
        layer["module"] = _public_module(module, layer["class_name"])
        if layer["module"] == "keras" or layer["module"].startswith("keras."):
            layer["registered_name"] = None
    inner = layer.get("config")
    kind = layer.get("class_name")
    if not isinstance(inner, dict) or not isinstance(kind, str) or not _is_of_keras(layer):
        return
    for key in _INERT.get(kind, ()):
        # More groups than one were never computed by these layers, and must not be lost.
        if key != "groups" or inner.get(key) in (None, 1):
            inner.pop(key, None)
    axis = inner.get("axis")
    if kind in ("BatchNormalization", "SyncBatchNormalization") and isinstance(axis, list):
        inner["axis"] = axis[0] if len(axis) == 1 else axis
    for key in _ACTIVATIONS:
        if is_old and inner.get(key) == "hard_sigmoid":
            inner[key] = keras.activations.serialize(hard_sigmoid_of_keras_2)
    policy = inner.get("dtype")
    if isinstance(policy, dict) and policy.get("class_name") in ("Policy", "PolicyV1"):
        inner["dtype"] = policy["config"]["name"] if isinstance(policy["config"], dict) else None


def _public_module(module: str, class_name: Any) -> str:
    parts = [part for part in module.split(".") if part not in ("tf_keras", "tensorflow", "python")]
    kinds = ("layers", "initializers", "regularizers", "constraints", "activations", "optimizers")
    if class_name == "Functional":
        return "keras.src.models.functional"
    if class_name in ("Model", "Sequential"):
        return "keras"
    return next((f"keras.{kind}" for kind in kinds if kind in parts), "keras.layers")


def _check_sizes(path: Path, config: Any, elements: int) -> None:
    """A layer has at least one weight for every unit, so what is larger than the file is a lie."""
    for layer in _objects(path, config):
        inner = layer.get("config")
        if not isinstance(inner, dict) or layer.get("class_name") is None:
            continue
        for key in _SHAPES:
            shape = inner.get(key)
            if isinstance(shape, list) and _product(shape) > _MOST_NUMBERS:
                raise ValueError(
                    f"{path}: the layer {inner.get('name')!r:.80} is for arrays of {key}={shape}; "
                    f"{_MOST_NUMBERS} numbers are allowed"
                )
        sizes = [_product([inner.get(key)]) for key in _SIZES]
        if "filters" in inner or "depth_multiplier" in inner:
            kernel = inner.get("kernel_size")
            sizes.append(_product(kernel if isinstance(kernel, list) else [kernel]))
        # Of a separable convolution the kernels have some of these sizes each, not all.
        if max(sizes) > max(elements, 1):
            raise ValueError(
                f"{path}: the layer {inner.get('name')!r:.80} needs at least {max(sizes)} weights, "
                f"and the file has {elements}"
            )


def _product(sizes: list[Any]) -> int:
    return math.prod(size for size in sizes if type(size) is int and size > 0)


# ---------------------------------------------------------------------------------------- archives


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(f"{path}: not an archive of Keras, or truncated: {error}") from error
    try:
        _check_members(path, archive.infolist())
    except ValueError:
        archive.close()
        raise
    return archive


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: a member of the archive is there twice")
    for member in members:
        name = member.filename
        if (
            name.startswith(("/", "\\"))
            or ".." in name.replace("\\", "/").split("/")
            or ":" in name
        ):
            raise ValueError(f"{path}: a member of the archive leads out of it: {name!r:.80}")
        if member.external_attr >> 16 & 0o170000 == 0o120000:
            raise ValueError(f"{path}: a member of the archive is a link: {name!r:.80}")
        if member.flag_bits & 1:
            raise ValueError(f"{path}: a member of the archive is encrypted: {name!r:.80}")
        if member.file_size > MOST_COMPRESSION * max(member.compress_size, 1):
            raise ValueError(
                f"{path}: {name!r:.80} says that it has {member.file_size} bytes, which "
                f"{member.compress_size} bytes cannot hold"
            )
    for name in ("config.json", "model.weights.h5"):
        if name not in names:
            raise ValueError(f"{path}: the archive has no {name}: not a model of Keras")


def _member(path: Path, archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    if archive.getinfo(name).file_size > most:
        raise ValueError(
            f"{path}: {name} says that it has {archive.getinfo(name).file_size} bytes; {most} are "
            "allowed"
        )
    try:
        with archive.open(name) as member:
            return member.read(most)
    except Exception as error:  # Of zlib, lzma and bz2 as well.
        raise ValueError(f"{path}: {name} is damaged: {error}") from error


def _extracted(path: Path, folder: Path) -> Path:
    """The weights of an archive, in a file of their own."""
    with _archive(path) as archive:
        size = archive.getinfo("model.weights.h5").file_size
        # Keras stores the weights as they are; what was deflated by others has to be plausible.
        if size > 100 * max(path.stat().st_size, 2**20):
            raise ValueError(f"{path}: model.weights.h5 says that it has {size} bytes")
        stored = folder / "stored.weights.h5"
        stored.write_bytes(_member(path, archive, "model.weights.h5", size))
    return stored


def _write_archive(path: Path, folder: Path, config: dict[str, Any]) -> tuple[Path, int]:
    """Writes a file for Keras; returns it, and how many numbers its weights are."""
    stored = _extracted(path, folder)
    weights = folder / "model.weights.h5"
    elements = _copy_hdf5(path, stored, weights, {})
    _check_sizes(path, config, elements)
    copy = folder / "model.keras"
    with zipfile.ZipFile(copy, "w") as target:
        metadata = {"keras_version": keras.__version__, "date_saved": ""}
        target.writestr("metadata.json", json.dumps(metadata))
        target.writestr("config.json", json.dumps(config))
        target.write(weights, "model.weights.h5")
    return copy, elements


# -------------------------------------------------------------------------------------------- HDF5


def _hdf5(path: Path, file: Path) -> Any:
    try:
        return h5py.File(file, "r")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: not an HDF5 file, or truncated: {error}") from error


def _write_hdf5(path: Path, folder: Path, config: dict[str, Any]) -> tuple[Path, int]:
    """As `_write_archive`, for a model in one HDF5 file."""
    copy = folder / "model.h5"
    attributes = {"model_config": json.dumps(config).encode()}
    elements = _copy_hdf5(path, path, copy, attributes)
    _check_sizes(path, config, elements)
    return copy, elements


def _text_attribute(path: Path, file: Any, name: str) -> str | bytes:
    if not _has_attribute(path, file, name):
        raise ValueError(f"{path}: the file holds no model: it has no {name}")
    value = _attribute(path, file, name)
    if not isinstance(value, str | bytes):
        raise ValueError(f"{path}: {name} is not text")
    return value


def _has_attribute(path: Path, node: Any, name: str) -> bool:
    try:
        return name in node.attrs
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: not an HDF5 file, or truncated: {error}") from error


def _attribute(path: Path, node: Any, name: str | bytes) -> Any:
    if isinstance(name, bytes):  # What h5py makes of a name that is not text.
        raise ValueError(f"{path}: the name of an attribute is not text: {name!r}")
    try:
        described = h5py.h5a.open(node.id, name.encode())
        # HDF5 reports the size 0 of an empty list as an error.
        size = described.get_storage_size() if math.prod(described.shape) else 0
        if size > _MOST_CONFIG_BYTES:
            raise ValueError(f"{path}: the attribute {name} says that it has {size} bytes")
        return node.attrs[name]
    except (OSError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: the attribute {name} is damaged: {error}") from error


def _copy_hdf5(path: Path, stored: Path, copy: Path, attributes: dict[str, bytes]) -> int:
    """Copies what weights are made of, no links, and returns the number of elements."""
    with _hdf5(path, stored) as source, h5py.File(copy, "w") as target:
        nodes: dict[str, Any] = {}
        try:
            source.visititems(lambda name, node: nodes.update({name: node}))
            elements = 0
            for name, node in tracked([("/", source), *nodes.items()], "parts read"):
                if isinstance(node, h5py.Dataset):
                    elements += _copy_dataset(path, stored, node, target, name)
                elif isinstance(node, h5py.Group):
                    group = target.require_group(name)
                    for key in node.attrs:
                        if key not in ("model_config", "training_config"):
                            group.attrs[key] = _attribute(path, node, key)
            if attributes and "model_weights" not in target:
                raise ValueError(f"{path}: the file has a model and no weights")
            for key, text in attributes.items():
                _write_text(target, key, text)
        except (OSError, RuntimeError, TypeError, KeyError, ValueError) as error:
            if isinstance(error, ValueError) and str(path) in str(error):
                raise
            raise ValueError(f"{path}: the weights are damaged: {error}") from error
    return elements


def _write_text(target: Any, key: str, text: bytes) -> None:
    # Text of a fixed length may have 64 KiB at most; of a variable one, as much as there is.
    target.attrs.create(key, text.decode(), dtype=h5py.string_dtype())


def _copy_dataset(path: Path, stored: Path, dataset: Any, target: Any, name: str) -> int:
    if dataset.dtype.kind not in "biufcV" or dataset.dtype.names is not None:
        return 0
    count = check_dataset(path, dataset, stored.stat().st_size)
    copied = target.create_dataset(name, data=dataset[()], dtype=dataset.dtype)
    for key in dataset.attrs:
        copied.attrs[key] = _attribute(path, dataset, key)
    return count
