"""What a fusion did to a model, and what it did not do, layer by layer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Candidate", "Report"]


@dataclass(frozen=True)
class Candidate:
    """A separable convolution of a model, or what may have been one.

    Attributes:
        name: Of the layer, or of both layers of a pair, with the names of the models around it.
        kind: Class of the layer, or of both layers of a pair.
        reason: Why it is not swapped; `None` if it is.
        absorbed: Names of the other layers that became part of it: batch norms, activations,
            paddings.
        calls: How often one call of the model calls it.
        macs: Multiply-adds an image, over all calls; `None` where no shape is known.
        parameters: Numbers in its weights.
        hidden_bytes: Size of the depthwise output an image, over all calls, which is no longer
            written to memory; 0 if the layer is not swapped, `None` where no shape is known.
        difference: Largest absolute difference that the swap makes to the output of this layer, the
            input being what the original model gives it; `None` where it cannot be observed.
        largest: Largest absolute value of that output.
        epsilon: Spacing of the numbers that it computes with, relative to 1.
    """

    name: str
    kind: str
    reason: str | None = None
    absorbed: tuple[str, ...] = ()
    calls: int = 1
    macs: int | None = None
    parameters: int | None = None
    hidden_bytes: int | None = None
    difference: float | None = None
    largest: float | None = None
    epsilon: float = 0.0

    @property
    def swapped(self) -> bool:
        """Whether it is a layer of ours now."""
        return self.reason is None


@dataclass(frozen=True)
class Report:
    """What `sepconv.fuse` found, did and measured.

    Attributes:
        candidates: Every separable convolution of the model, swapped or not, in the order in which
            the model calls them.
        inference: Whether batch norms and activations were folded.
        found_by: How the data flow was found.
        output_difference: Largest absolute difference between the outputs of both models.
        output_largest: Largest absolute value of the outputs of the original.
        tolerance: Largest allowed ratio of a difference to the largest value, if one was given.
        renamed: Names of parameters in the original, and what they are called in the new model,
            where that differs. With `inference=True`, folded values have no original.
        notes: What else there is to know about the new model.
    """

    candidates: tuple[Candidate, ...]
    inference: bool
    found_by: str
    output_difference: float
    output_largest: float
    tolerance: float | None
    renamed: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def swapped(self) -> tuple[Candidate, ...]:
        """The candidates that are layers of ours now."""
        return tuple(candidate for candidate in self.candidates if candidate.swapped)

    @property
    def left(self) -> tuple[Candidate, ...]:
        """The candidates that stay as they were; each says why."""
        return tuple(candidate for candidate in self.candidates if not candidate.swapped)

    @property
    def hidden_bytes(self) -> int:
        """Bytes an image that are no longer written to memory, as far as shapes are known."""
        return sum(candidate.hidden_bytes or 0 for candidate in self.candidates)

    def check(self) -> None:
        """Checks that every difference is one of rounding.

        A difference may be up to `tolerance` times the largest value of the output in question. The
        default is the square root of the spacing of the numbers: half of the digits agree. Rounding
        stays far below that, and a wrong stage far above.

        Raises:
            ValueError: a difference is larger, or not a number.
        """
        for candidate in self.swapped:
            if candidate.difference is not None and candidate.largest is not None:
                self._check(
                    candidate.name, candidate.difference, candidate.largest, candidate.epsilon
                )
        epsilon = max((candidate.epsilon for candidate in self.swapped), default=0.0)
        self._check("the model", self.output_difference, self.output_largest, epsilon)

    def table(self) -> Table:
        """Returns the report as a table of `rich`, one row a candidate.

        Raises:
            ModuleNotFoundError: the package rich is not installed.
        """
        try:
            from rich.table import Table
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "The table needs the package rich. Run: pip install 'sepconv[cli]'"
            ) from None

        table = Table(title=self._summary(), title_justify="left")
        for heading, justify in zip(_HEADINGS, _JUSTIFY, strict=True):
            table.add_column(heading, justify=justify, overflow="fold")
        for candidate in self.candidates:
            # Names hold brackets, which rich would take for markup.
            table.add_row(*(cell.replace("[", r"\[") for cell in _cells(candidate)))
        table.caption = "\n".join(line.replace("[", r"\[") for line in self._closing())
        table.caption_justify = "left"
        return table

    def to_json(self) -> str:
        """Returns the report as text in JSON. Numbers that are not finite become text."""
        facts = asdict(self) | {
            "swapped": len(self.swapped),
            "hidden_bytes": self.hidden_bytes,
        }
        return json.dumps(_finite(facts), indent=2, allow_nan=False)

    def __str__(self) -> str:
        rows = [_HEADINGS, *map(_cells, self.candidates)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
        lines = [
            "  ".join(
                cell.rjust(width) if justify == "right" else cell.ljust(width)
                for cell, width, justify in zip(row, widths, _JUSTIFY, strict=True)
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self._summary(), *lines, *self._closing()])

    def _summary(self) -> str:
        return f"{len(self.swapped)} of {len(self.candidates)} separable convolutions swapped"

    def _closing(self) -> list[str]:
        return [
            f"largest difference at the output: {self.output_difference:.3g} "
            f"(values up to {self.output_largest:.3g})",
            f"no longer written to memory: {_bytes(self.hidden_bytes)} an image",
            f"data flow: {self.found_by}",
            *self.notes,
        ]

    def _check(self, name: str, difference: float, largest: float, epsilon: float) -> None:
        tolerance = epsilon**0.5 if self.tolerance is None else self.tolerance
        # Also false for what is not a number.
        if tolerance == float("inf") or difference <= tolerance * largest:
            return
        raise ValueError(
            f"`tolerance` must hold for the output of {name}: a difference of {difference:.3g} is "
            f"more than {tolerance:.3g} times the largest value, {largest:.3g}. "
            f'tolerance=float("inf") returns the model all the same. '
            f"Received: tolerance={self.tolerance}"
        )


_HEADINGS = ("layer", "class", "result", "MACs", "parameters", "saved", "difference")
_JUSTIFY: tuple[Any, ...] = ("left", "left", "left", "right", "right", "right", "right")


def _cells(candidate: Candidate) -> tuple[str, ...]:
    result = "swapped" if candidate.reason is None else candidate.reason
    if candidate.absorbed:
        result += f", with {', '.join(candidate.absorbed)}"
    if candidate.calls != 1:
        result += f", {candidate.calls} calls"
    return (
        candidate.name,
        candidate.kind,
        result,
        "-" if candidate.macs is None else f"{candidate.macs:,}",
        "-" if candidate.parameters is None else f"{candidate.parameters:,}",
        "-" if candidate.hidden_bytes is None else _bytes(candidate.hidden_bytes),
        "-" if candidate.difference is None else f"{candidate.difference:.2g}",
    )


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and value - value != 0:  # Infinite, or not a number.
        return str(value)
    return value
