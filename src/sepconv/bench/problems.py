"""Rows as arrays, and the file in which a process hands them to another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sepconv.bench.rows import Row
from sepconv.spec import ConvSpec, Geometry

__all__ = ["DTYPES", "MODES", "Problem", "aligned_copy", "problem_of"]

Array = npt.NDArray[Any]

MODES = ("inference", "training")
"""Inference is the forward pass; a training step adds the gradients of x, kernels and bias."""

DTYPES = {"float32": 4, "bfloat16": 2}
"""Bytes of an element."""

_CACHE_LINE = 64

_ARRAYS = ("x", "depthwise_kernel", "pointwise_kernel", "bias", "dy")


@dataclass(frozen=True)
class Problem:
    """One layer with its arrays: images in the layout of `spec`, kernels as Keras has them.

    The arrays are float32 and hold values that `dtype` can represent, so every engine converts
    them without loss.
    """

    spec: ConvSpec
    geometry: Geometry
    dtype: str
    x: Array
    depthwise_kernel: Array
    pointwise_kernel: Array
    bias: Array
    dy: Array

    @property
    def weights(self) -> tuple[Array, Array, Array]:
        """Both kernels and the bias."""
        return self.depthwise_kernel, self.pointwise_kernel, self.bias

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)) for libraries that want numbers."""
        g = self.geometry
        return self.spec.padding_amounts(g.in_height, g.in_width, (g.kernel_height, g.kernel_width))

    @property
    def keywords(self) -> dict[str, Any]:
        """The hyper-parameters under the names of Keras."""
        return {
            "strides": self.spec.strides,
            "padding": self.spec.padding,
            "dilation_rate": self.spec.dilation_rate,
            "data_format": self.spec.data_format,
        }

    def to_nchw(self, image: Any) -> Any:
        """Returns an image in the layout as a (batch, channels, height, width) view."""
        return image.transpose(0, 3, 1, 2) if self.spec.channels_axis == 3 else image

    def from_nchw(self, image: Any) -> Any:
        """Returns a (batch, channels, height, width) image as a view in the layout."""
        return image.transpose(0, 2, 3, 1) if self.spec.channels_axis == 3 else image

    def absolute(self) -> Problem:
        """The same layer on absolute values: each result is then the sum of its absolute terms."""
        return replace(self, **{name: np.abs(getattr(self, name)) for name in _ARRAYS})

    def terms(self) -> tuple[int, ...]:
        """How many roundings one element of y, dx and the gradients of the weights can collect."""
        g = self.geometry
        taps = g.kernel_height * g.kernel_width
        pixels = g.batch * g.out_height * g.out_width
        channels, filters = g.depthwise_channels, g.out_channels
        return (
            taps + channels + 2,
            taps * g.depth_multiplier + filters + 2,
            pixels + filters + 2,
            pixels + taps + 2,
            pixels + 2,
        )

    def save(self, path: Path) -> None:
        """Writes the layer for `load`.

        Args:
            path: A file that ends in .npz.
        """
        words = {"spec": self.keywords, "geometry": self.geometry, "dtype": self.dtype}
        np.savez(path, words=np.array(json.dumps(words)), **{n: getattr(self, n) for n in _ARRAYS})

    @classmethod
    def load(cls, path: Path) -> Problem:
        """Reads what `save` wrote.

        Args:
            path: The file.
        """
        with np.load(path) as file:
            words = json.loads(str(file["words"]))
            arrays = {name: file[name] for name in _ARRAYS}
        spec, geometry = ConvSpec(**words["spec"]), Geometry(*words["geometry"])
        return cls(spec, geometry, words["dtype"], **arrays)


def problem_of(
    row: Row, batch: int = 1, *, data_format: str = "channels_last", dtype: str = "float32"
) -> Problem:
    """Returns a row with random arrays, a function of the arguments only.

    Args:
        row: The sizes.
        batch: Number of images.
        data_format: `"channels_last"` or `"channels_first"`.
        dtype: One of `DTYPES`.

    Raises:
        ValueError: an argument is out of range.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}. Received: dtype={dtype!r}")
    if batch < 1:
        raise ValueError(f"`batch` must be positive. Received: batch={batch}")
    spec = row.spec(data_format)
    between = row.channels * row.depth_multiplier
    depthwise_shape = (*row.kernel, row.channels, row.depth_multiplier)
    pointwise_shape = (1, 1, between, row.filters)
    x_shape = [batch, row.height, row.width]
    x_shape.insert(spec.channels_axis, row.channels)
    geometry = spec.resolve(x_shape, depthwise_shape, pointwise_shape, (row.filters,))
    rng = np.random.default_rng(0)

    def random(shape: Sequence[int], divisor: float = 1.0) -> Array:
        values = rng.standard_normal(shape, dtype=np.float32) / np.float32(divisor)
        return values if DTYPES[dtype] == 4 else _to_bfloat16(values)

    return Problem(
        spec,
        geometry,
        dtype,
        random(x_shape),
        random(depthwise_shape, 3),
        random(pointwise_shape, between**0.5),
        random((row.filters,)),
        random(geometry.y_shape),
    )


def aligned_copy(array: Array, dtype: npt.DTypeLike | None = None) -> Array:
    """Returns a dense copy that starts at a cache line, where frameworks put their own tensors.

    Arrays of NumPy start at any 16 bytes, which costs whoever reads them in place up to 7 %.

    Args:
        array: Any array.
        dtype: Of the copy; that of the array if left out.
    """
    kind = array.dtype if dtype is None else np.dtype(dtype)
    memory = np.empty(array.size * kind.itemsize + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    copy = np.ndarray(array.shape, kind, memory, start)
    copy[...] = array
    return copy


def _to_bfloat16(values: Array) -> Array:
    """The nearest values with eight significant bits, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
