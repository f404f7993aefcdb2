"""Rows of a benchmark: sizes of layers, from workloads.json or written as `19x19x728-728k3`."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from sepconv.spec import ConvSpec

__all__ = ["Row", "choose_rows", "network_names", "parse_row"]

# Networks and sizes chosen so that every kind occurs: early layers bound by memory, late layers
# bound by arithmetic, few pixels with many weights, dilation, larger kernels, odd channel counts.
_SELECTED = (
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
_VARIED: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("deeplabv3plus_generic-512-os16", "aspp_rate6_256", {"H": 33, "W": 33}),
    ("efficientnet_b0-224", "3b", {"Cout": 80}),
)
_QUICK = ("19x19 728>728", "56x56 128>128", "7x7 1024>1024")

_FORM = re.compile(r"(\d+)x(\d+)x(\d+)-(\d+)((?:[ksdm]\d+)*)(v?)")


@dataclass(frozen=True)
class Row:
    """The sizes of one layer. It has a bias.

    Attributes:
        network: Where the layer comes from.
        layer: Its name there.
        height: Of the input.
        width: Of the input.
        channels: Of the input.
        filters: Output channels.
        kernel: (height, width).
        strides: (vertical, horizontal).
        dilation: (vertical, horizontal).
        depth_multiplier: Depthwise outputs per channel.
        padding: `"same"` or `"valid"`.
    """

    network: str
    layer: str
    height: int
    width: int
    channels: int
    filters: int
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    depth_multiplier: int = 1
    padding: str = "same"

    @property
    def label(self) -> str:
        """The sizes in short; what is usual (k3, s1, d1, m1, same padding) is left out."""
        parts = [f"{self.height}x{self.width} {self.channels}>{self.filters}"]
        for letter, (down, across), usual in (
            ("k", self.kernel, 3),
            ("s", self.strides, 1),
            ("d", self.dilation, 1),
            ("m", (self.depth_multiplier,) * 2, 1),
        ):
            if (down, across) != (usual, usual):
                parts.append(f"{letter}{down}" if down == across else f"{letter}{down}x{across}")
        return " ".join(parts + [self.padding] * (self.padding != Row.padding))

    def spec(self, data_format: str) -> ConvSpec:
        """Returns the hyper-parameters.

        Args:
            data_format: `"channels_last"` or `"channels_first"`.

        Raises:
            ValueError: the layout, or a size of this row, is out of range.
        """
        return ConvSpec(
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation,
            data_format=data_format,
        )


def parse_row(text: str) -> Row:
    """Reads the free form of a row.

        HEIGHTxWIDTHxCHANNELS-FILTERS, then in any order k(ernel), s(tride), d(ilation),
        m(ultiplier), each with a number, and at the end `v` for valid padding instead of same

    Args:
        text: As `"147x147x64-128k3s1d1"`.

    Raises:
        ValueError: the text has another form, a letter occurs twice, a number is zero, or the
            kernel does not fit into the image.

    Example:
        >>> parse_row("33x33x256-256d6").label
        '33x33 256>256 d6'
    """
    match = _FORM.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ValueError(
            "`row` must look like 147x147x64-128k3s1d1: height, width, channels, filters, then "
            "any of k, s, d, m (kernel, stride, dilation, depth multiplier), and v for valid "
            f"padding. Received: row={text!r}"
        )
    height, width, channels, filters = map(int, match.groups()[:4])
    pairs = re.findall(r"([ksdm])(\d+)", match[5])
    numbers = {letter: int(digits) for letter, digits in pairs}
    if len(numbers) < len(pairs):
        raise ValueError(f"`row` must name each of k, s, d, m once. Received: row={text!r}")
    if 0 in (height, width, channels, filters, *numbers.values()):
        raise ValueError(f"`row` must have positive numbers. Received: row={text!r}")
    kernel, stride, dilation = (
        numbers.get(letter, usual) for letter, usual in zip("ksd", (3, 1, 1), strict=True)
    )
    row = Row(
        "free",
        text,
        height,
        width,
        channels,
        filters,
        (kernel, kernel),
        (stride, stride),
        (dilation, dilation),
        numbers.get("m", 1),
        "valid" if match[6] else Row.padding,
    )
    shape = row.spec("channels_last").output_shape((1, height, width, channels), kernel, filters)
    if 0 in shape:
        raise ValueError(f"`row` must have output pixels. Received: row={text!r}")
    return row


@functools.cache
def _workloads() -> dict[tuple[str, str], dict[str, Any]]:
    text = resources.files("sepconv.bench").joinpath("workloads.json").read_text(encoding="utf-8")
    return {(entry["network"], entry["name"]): entry for entry in json.loads(text)["layers"]}


def network_names() -> list[str]:
    """Returns the names of the networks whose layers workloads.json lists.

    Example:
        >>> "xception-299" in network_names()
        True
    """
    return list(dict.fromkeys(network for network, _ in _workloads()))


def _row_of(entry: dict[str, Any]) -> Row:
    return Row(
        entry["network"],
        entry["name"],
        entry["H"],
        entry["W"],
        entry["Cin"],
        entry["Cout"],
        tuple(entry["kernel"]),
        tuple(entry["strides"]),
        tuple(entry["dilation"]),
        entry["depth_multiplier"],
        entry["padding"],
    )


def choose_rows(
    networks: Sequence[str] = (), texts: Sequence[str] = (), *, quick: bool = False
) -> list[Row]:
    """Returns the rows to measure, each size once; without arguments the usual dozen.

    Args:
        networks: All layers of these networks; `"all"` stands for every network.
        texts: Rows in the free form of `parse_row`; any other text chooses those rows of the
            networks (without networks: of all) that have it in their sizes or layer.
        quick: Three of the usual dozen.

    Raises:
        ValueError: a network is unknown, or a text is neither a free form nor in a row.

    Example:
        >>> [row.label for row in choose_rows(quick=True)]
        ['19x19 728>728', '56x56 128>128', '7x7 1024>1024']
        >>> [row.label for row in choose_rows(["xception-299"], ["block14", "8x8x16-32s2"])]
        ['10x10 1024>1536', '10x10 1536>2048', '8x8 16>32 s2']
    """
    known = network_names()
    for network in networks:
        if network not in (*known, "all"):
            raise ValueError(
                f"`network` must be all or one of {', '.join(known)}. Received: network={network!r}"
            )
    workloads = _workloads()
    wanted = known if "all" in networks or not networks else networks
    published = [_row_of(entry) for entry in workloads.values() if entry["network"] in wanted]
    if not networks and not texts:
        published = [_row_of(workloads[key]) for key in _SELECTED]
        published += [
            _row_of({**workloads[name, layer], **sizes}) for name, layer, sizes in _VARIED
        ]
        published = [row for row in published if not quick or row.label in _QUICK]
    rows = [] if texts else published
    for text in texts:
        if _FORM.match(text.replace(" ", "")):
            rows.append(parse_row(text))
            continue
        found = [row for row in published if text in row.label or text in row.layer]
        if not found:
            raise ValueError(
                "`row` must be sizes such as 147x147x64-128k3s1d1, or occur in the sizes or the "
                f"name of a layer of the networks. Received: row={text!r}"
            )
        rows += found
    return list({row.label: row for row in reversed(rows)}.values())[::-1]
