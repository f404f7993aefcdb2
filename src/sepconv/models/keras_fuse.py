"""Fusion of Keras models, and its undoing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
from keras import layers

from sepconv.keras import SeparableConv2D
from sepconv.models.exclusion import Exclusion
from sepconv.models.keras_chains import Chain, find_chains, why_not_stock
from sepconv.models.keras_fused import FusedSeparableConv2D
from sepconv.models.keras_graph import Reading, inner_layers
from sepconv.models.keras_measure import (
    Observation,
    compared,
    epsilon_of,
    input_values,
    observed,
    outputs_of,
    unchanged,
)
from sepconv.models.keras_rebuild import Rebuilding
from sepconv.models.keras_values import made_with_values
from sepconv.models.report import Candidate, Report
from sepconv.progress import tracked

__all__ = ["fuse", "to_stock"]


def fuse(
    model: keras.Model,
    *,
    inference: bool,
    inputs: Any,
    excluded: Exclusion,
    tolerance: float | None,
) -> tuple[keras.Model, Report]:
    """Does what `sepconv.fuse` does, for a Keras model.

    Args:
        model: A built model.
        inference: Whether to fold batch norms and activations.
        inputs: What to call both models on; `None` for random numbers.
        excluded: Which layers have to stay as they are.
        tolerance: Of `Report.check`, which the caller calls.

    Returns:
        The new model and the report.

    Raises:
        TypeError: it is no model.
        ValueError: the model is not built, or cannot be built again from its config.
    """
    reading = Reading(model)
    excluded.check(reading.names.values())
    values = input_values(model, inputs)
    chains = find_chains(reading, inference, excluded)
    swaps = [chain for chain in chains if chain.reason is None]
    absorbed = {id(operation) for chain in swaps for operation in chain.operations}

    def accepts(layer: Any) -> bool:
        return type(layer) is layers.SeparableConv2D and not excluded(reading.name(layer), layer)

    def rebuilt() -> tuple[keras.Model, Rebuilding, dict[int, Any]]:
        fused = {id(chain.carrier): chain.make() for chain in swaps}

        def replacement(operation: Any) -> list[Any] | None:
            if id(operation) in fused:
                return [fused[id(operation)]]
            return [] if id(operation) in absorbed else None

        rebuilding = Rebuilding(replacement, SeparableConv2D, accepts)
        new = rebuilding.model(model, values)
        for chain in tracked(swaps, "layers given their weights"):
            chain.load_weights(fused[id(chain.carrier)])
        return new, rebuilding, fused

    with unchanged(model):
        new, rebuilding, fused = made_with_values(rebuilt)
        renamed: dict[str, str] = {}
        for chain in swaps:
            renamed |= chain.renamed(fused[id(chain.carrier)])
        with unchanged(model, new):
            observations = observed(reading, chains, fused, values)
        with unchanged(model, new):
            theirs = outputs_of(model, values)
            ours = outputs_of(new, values)
    difference, largest = compared(theirs, ours)
    held = _held_candidates(reading, rebuilding.changed, excluded)
    notes = [*rebuilding.notes, *_refusals(reading, swaps, observations)]
    if inference and any(chain.is_folded for chain in swaps):
        notes.append("for inference: folded batch norms do not follow the data any more")
    return new, Report(
        candidates=(
            *(_candidate(reading, chain, fused, observations[id(chain)]) for chain in chains),
            *held,
        ),
        inference=inference,
        found_by="graph of Keras" if reading.graphs else "layers of the model, one by one",
        output_difference=difference,
        output_largest=largest,
        tolerance=tolerance,
        renamed=renamed,
        notes=tuple(notes),
    )


def to_stock(model: keras.Model) -> keras.Model:
    """Does what `sepconv.to_stock` does, for a Keras model.

    Args:
        model: A built model.

    Returns:
        The new model.

    Raises:
        TypeError: it is no model.
        ValueError: the model is not built, or cannot be built again from its config.
    """
    Reading(model)  # For its checks.

    def accepts(layer: Any) -> bool:
        return type(layer) is SeparableConv2D

    def rebuilt() -> keras.Model:
        made: list[tuple[Any, list[Any]]] = []

        def replacement(operation: Any) -> list[Any] | None:
            if type(operation) is SeparableConv2D:
                stock = [layers.SeparableConv2D.from_config(operation.get_config())]
            elif type(operation) is FusedSeparableConv2D:
                stock = operation.stock_layers()
            else:
                return None
            made.append((operation, stock))
            return stock

        new = Rebuilding(replacement, layers.SeparableConv2D, accepts).model(model, None)
        for old, stock in made:
            if isinstance(old, FusedSeparableConv2D):
                old.load_stock_weights(stock)
            else:
                stock[0].set_weights(old.get_weights())
        return new

    return made_with_values(rebuilt)


def _candidate(
    reading: Reading, chain: Chain, fused: dict[int, Any], observation: Observation
) -> Candidate:
    pair = chain.convolutions
    layer = fused.get(id(chain.carrier))
    return Candidate(
        name=" + ".join(reading.name(each) for each in pair),
        kind=" + ".join(type(each).__name__ for each in pair),
        reason=chain.reason,
        absorbed=tuple(
            reading.name(each)
            for each in chain.operations
            if not any(each is convolution for convolution in pair)
        ),
        calls=observation.calls,
        macs=observation.macs,
        parameters=sum(each.count_params() for each in (pair if layer is None else [layer])),
        hidden_bytes=observation.hidden_bytes if layer and observation.refusal is None else 0,
        difference=observation.difference if layer else None,
        largest=observation.largest if layer else None,
        epsilon=epsilon_of(chain.convolution.compute_dtype),
    )


def _refusals(
    reading: Reading, swaps: list[Chain], observations: dict[int, Observation]
) -> Iterable[str]:
    """Why a layer of ours runs the operations of Keras, said once a reason."""
    names: dict[str, list[str]] = {}
    for chain in swaps:
        refusal = observations[id(chain)].refusal
        if refusal is not None:
            names.setdefault(refusal, []).append(reading.name(chain.carrier))
    for refusal, refused in names.items():
        yield f"computed by the operations of Keras, since {refusal}: {', '.join(refused)}"


def _held_candidates(
    reading: Reading, changed: list[Any], excluded: Exclusion
) -> Iterable[Candidate]:
    """The candidates inside of layers whose code calls them, which no graph shows."""
    swapped = set(map(id, changed))
    listed = set()
    for owner in reading.opaque:
        for layer in inner_layers(owner):
            is_candidate = isinstance(layer, layers.SeparableConv2D | layers.DepthwiseConv2D)
            if not is_candidate or isinstance(layer, SeparableConv2D) or id(layer) in listed:
                continue
            listed.add(id(layer))
            name = reading.name(layer)
            reason = None
            if id(layer) not in swapped:
                reason = why_not_stock(layer)
                if excluded(name, layer):
                    reason = "excluded"
                elif reason is None:
                    reason = f"what follows it is in the code of {type(owner).__name__}.call"
            yield Candidate(
                name=name,
                kind=type(layer).__name__,
                reason=reason,
                parameters=layer.count_params(),
                hidden_bytes=None if reason is None else 0,
                epsilon=epsilon_of(layer.compute_dtype),
            )
