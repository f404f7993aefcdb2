"""Models and weights from files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from sepconv.models.tensors import read_tensors
from sepconv.models.weights import is_optimizer_slot

__all__ = ["holds_model", "load", "optimizer_tensors"]

Array = npt.NDArray[Any]


def load(
    path: str | os.PathLike[str],
    *,
    fused: bool = True,
    custom_objects: Mapping[str, Any] | None = None,
) -> Any:
    """Loads a model of Keras 2 or 3, or the named tensors of a file of weights.

    No code of the file is run. Configs of Keras 2 are made valid for Keras 3.

    Args:
        path: A model in a `.keras`, `.h5` or `.hdf5` file; or weights, as in
            `sepconv.models.tensors.read_tensors`.
        fused: Whether the `SeparableConv2D` layers of a model are ours, else those of Keras.
        custom_objects: Classes and functions of the model that Keras does not have, by name.

    Returns:
        A `keras.Model`, not compiled; or a dict of NumPy arrays by name.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package that reads the format is missing; the text tells its name.
        ValueError: the file is damaged or of no known format, or its model needs code that is only
            in the file; the text names the file and the reason.

    Example:
        >>> import tempfile
        >>> import keras
        >>> path = f"{tempfile.mkdtemp()}/net.keras"
        >>> net = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.SeparableConv2D(4, 3)])
        >>> net.save(path)
        >>> type(load(path).layers[0]).__module__
        'sepconv.keras'
    """
    path = Path(path)
    if not holds_model(path):
        return read_tensors(path)
    from sepconv.models import keras_files

    return keras_files.load_model(path, fused=fused, custom_objects=custom_objects)


def holds_model(path: Path) -> bool:
    """Returns whether a file holds a Keras model, not named tensors alone.

    Raises:
        FileNotFoundError: there is no such file, and its ending is that of a model.
        ImportError: the package that reads the format is missing; the text tells its name.
        ValueError: the file is damaged.
    """
    if path.suffix.lower() not in (".keras", ".h5", ".hdf5"):
        return False
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a file")
    try:
        from sepconv.models import keras_files
    except ModuleNotFoundError as error:
        raise ImportError(
            f"This file needs the package {error.name}. Run: pip install 'sepconv[keras]'"
        ) from error
    return keras_files.has_model(path)


def optimizer_tensors(path: Path) -> dict[str, Array]:
    """Returns what the optimizer of a model stored in its file, by name.

    Args:
        path: Of a model that could be loaded.
    """
    from sepconv.models import keras_files

    with keras_files.stored_weights(path) as stored:
        tensors = read_tensors(stored)
    return {name: array for name, array in tensors.items() if is_optimizer_slot(name)}
