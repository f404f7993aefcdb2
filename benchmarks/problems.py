"""Rows of workloads.json as arrays, and how far two correct results may be apart."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sepconv import ConvSpec
from sepconv.spec import Geometry

# Networks and sizes chosen so that every kind occurs: early layers bound by memory, late layers
# bound by arithmetic, few pixels with many weights, dilation, larger kernels, odd channel counts.
SELECTED = (
    ("xception-299", "block2_sepconv1"),
    ("xception-299", "block4_sepconv1"),
    ("xception-299", "middle_flow(block5-12)+block13_sepconv1"),
    ("xception-299", "block14_sepconv1"),
    ("mobilenet_v1-224", "dw1"),
    ("mobilenet_v1-224", "dw3"),
    ("mobilenet_v1-224", "dw7-11"),
    ("mobilenet_v1-224", "dw13"),
    ("efficientdet_d0-512", "bifpn_P3"),
    ("nasnet_mobile-224", "stem1_k5"),
)
# Two more, between the rows of the table: the arguments of a published layer with other sizes.
VARIED = (
    ("deeplabv3plus_generic-512-os16", "aspp_rate6_256", {"H": 33, "W": 33}),
    ("efficientnet_b0-224", "3b", {"Cout": 80}),
)
QUICK = ("19x19 728>728", "56x56 128>128", "7x7 1024>1024")


@dataclass(frozen=True)
class Problem:
    """One layer with its arrays, in the layouts of Keras. All layers have a bias."""

    network: str
    layer: str
    spec: ConvSpec
    geometry: Geometry
    x: np.ndarray
    depthwise_kernel: np.ndarray
    pointwise_kernel: np.ndarray
    bias: np.ndarray
    dy: np.ndarray

    @property
    def label(self) -> str:
        g = self.geometry
        text = f"{g.in_height}x{g.in_width} {g.in_channels}>{g.out_channels}"
        if g.kernel_height != 3:
            text += f" k{g.kernel_height}"
        if g.stride_height != 1:
            text += f" s{g.stride_height}"
        if g.dilation_height != 1:
            text += f" d{g.dilation_height}"
        return text

    @property
    def weights(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.depthwise_kernel, self.pointwise_kernel, self.bias

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)) for libraries that want numbers."""
        g = self.geometry
        return self.spec.padding_amounts(g.in_height, g.in_width, (g.kernel_height, g.kernel_width))

    def flops(self, job: str) -> int:
        """Of the forward pass; a training step counts as three of it, as is usual."""
        return 2 * self.geometry.macs * (3 if job == "training" else 1)

    def absolute(self) -> Problem:
        """The same layer on absolute values: each result is then the sum of its absolute terms."""
        names = ("x", "depthwise_kernel", "pointwise_kernel", "bias", "dy")
        return replace(self, **{name: np.abs(getattr(self, name)) for name in names})

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


def load(batch: int, path: Path | None = None) -> list[Problem]:
    """Returns the chosen rows with random arrays, each a function of the sizes only."""
    path = path or Path(__file__).with_name("workloads.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["layers"]
    by_name = {(row["network"], row["name"]): row for row in rows}
    chosen = [by_name[key] for key in SELECTED]
    chosen += [{**by_name[network, name], **changes} for network, name, changes in VARIED]
    return [problem_of(row, batch) for row in chosen]


def chosen(batch: int, text: str | None, quick: bool) -> list[Problem]:
    """Returns the rows whose label holds a text; without one, all, or the quick ones."""
    return [
        problem
        for problem in load(batch)
        if (text or "") in problem.label and (text or not quick or problem.label in QUICK)
    ]


def problem_of(row: dict[str, Any], batch: int) -> Problem:
    spec = ConvSpec(strides=row["strides"], padding=row["padding"], dilation_rate=row["dilation"])
    channels, multiplier, filters = row["Cin"], row["depth_multiplier"], row["Cout"]
    x_shape = (batch, row["H"], row["W"], channels)
    depthwise_shape = (*row["kernel"], channels, multiplier)
    pointwise_shape = (1, 1, channels * multiplier, filters)
    geometry = spec.resolve(x_shape, depthwise_shape, pointwise_shape, (filters,))
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    return Problem(
        row["network"],
        row["name"],
        spec,
        geometry,
        random(*x_shape),
        random(*depthwise_shape) / 3,
        random(*pointwise_shape) / np.float32(channels * multiplier) ** np.float32(0.5),
        random(filters),
        random(*geometry.y_shape),
    )


def worst_error(
    results: list[np.ndarray],
    reference: list[np.ndarray],
    absolute: list[np.ndarray],
    terms: tuple[int, ...],
) -> float:
    """Largest difference of any element in units of what rounding allows; correct is below 1.

    Each side may be off by (number of roundings) x (unit roundoff) x (sum of the absolute terms).
    """
    roundoff = np.finfo(np.float32).eps / 2
    worst = 0.0
    for result, expected, sums, count in zip(results, reference, absolute, terms, strict=False):
        if result.shape != expected.shape or not np.all(np.isfinite(result)):
            return float("inf")
        allowed = 2 * count * roundoff * sums.astype(np.float64) + np.finfo(np.float32).tiny
        worst = max(worst, float(np.max(np.abs(result.astype(np.float64) - expected) / allowed)))
    return worst
