"""What the networks here share: the packages with their weights, pictures, and boxes in them."""

import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# Beside the interpreter, where `make networks` puts them.
FOLDER = Path(sys.prefix) / "networks"


def read(package: str, name: str) -> bytes:
    """Returns a file of a package. Nothing is unpacked, and no code of the package runs."""
    archive = FOLDER / f"{package}.tgz"
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} is not there. Run: make networks")
    with tarfile.open(archive) as members:
        member = members.extractfile(f"package/{name}")
        if member is None:
            raise FileNotFoundError(f"{archive}: {name} is not a file")
        return member.read()


def open_picture(path: str | None) -> Image.Image:
    """Returns the picture, or the photograph of an astronaut (512x512) without a path."""
    if path is not None:
        return Image.open(path).convert("RGB")
    import skimage.data

    return Image.fromarray(skimage.data.astronaut())


def squared(picture: Image.Image, size: int, centred: bool) -> np.ndarray:
    """Returns the picture on a black square, as (1, size, size, 3) of float32, 0 to 255."""
    side = max(picture.size)
    corner = tuple((side - extent) // 2 if centred else 0 for extent in picture.size)
    square = Image.new("RGB", (side, side))
    square.paste(picture, corner)
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR), np.float32)[None]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Returns how much of the union two boxes (left, top, right, bottom) share."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    return shared / float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared)


def most_certain(boxes: np.ndarray, scores: np.ndarray, least: float, shared: float) -> list[int]:
    """Returns the detections above a score that overlap with none of a higher score."""
    chosen: list[int] = []
    for index in np.argsort(-scores):
        if scores[index] > least and all(
            overlap(boxes[index], boxes[other]) <= shared for other in chosen
        ):
            chosen.append(int(index))
    return chosen
