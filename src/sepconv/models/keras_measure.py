"""What a fusion changes in the numbers of a Keras model, layer by layer and at the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from sepconv.models.keras_chains import Chain
from sepconv.models.keras_graph import Graph, Reading
from sepconv.progress import tracked
from sepconv.spec import ConvSpec

__all__ = [
    "Observation",
    "compared",
    "epsilon_of",
    "input_values",
    "observed",
    "outputs_of",
    "unchanged",
]

Array = npt.NDArray[Any]

_UNKNOWN_SIZE = 128
"""Stands for rows and columns that a model leaves open, in random inputs."""


def input_values(model: keras.Model, inputs: Any) -> Any:
    """Returns what to call a model on.

    Args:
        model: A built model.
        inputs: Given values, or `None` for seeded random ones.

    Returns:
        `inputs`, or values of the shapes and dtypes that the model takes.

    Raises:
        ValueError: `inputs` is `None` and the shapes are not known, or it has another structure
            than the inputs of the model.
    """
    tensors = getattr(model, "inputs", None)
    structure = _input_structure(model) if tensors else None
    if inputs is not None:
        if tensors and len(tensors) > 1:
            try:
                keras.tree.assert_same_structure(structure, inputs)
            except ValueError as error:
                raise ValueError(
                    f"`inputs` must have the structure of the inputs of the model. {error}"
                ) from None
        return inputs
    rng = np.random.default_rng(0)
    if not tensors:
        return _random(rng, _built_shape(model), "float32")
    values = [_random(rng, tensor.shape, tensor.dtype) for tensor in tensors]
    return keras.tree.pack_sequence_as(structure, values)


def outputs_of(model: keras.Model, values: Any) -> list[Array]:
    """Returns the outputs of a model in inference, one after the other."""
    return [_as_array(each) for each in keras.tree.flatten(model(values, training=False))]


def compared(theirs: Sequence[Array], ours: Sequence[Array]) -> tuple[float, float]:
    """Returns the largest difference, and the largest absolute value of the first.

    Both are NaN where a value is, unless both arrays have it in the same place.
    """
    differences, values = [0.0], [0.0]
    for a, b in zip(theirs, ours, strict=True):
        if a.size:
            with np.errstate(invalid="ignore"):
                equal = (a == b) | (np.isnan(a) & np.isnan(b))
                differences.append(float(np.max(np.where(equal, 0.0, np.abs(a - b)))))
            values.append(float(np.max(np.abs(a))))
    # `max` would lose a value that is not a number.
    return float(np.max(differences)), float(np.max(values))


def epsilon_of(dtype: str) -> float:
    """Returns the spacing of the numbers of a dtype, relative to 1."""
    return {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10}.get(dtype, 2.0**-7)


@contextmanager
def unchanged(*models: keras.Model) -> Iterator[None]:
    """Puts the variables of models back at the end: calls draw random numbers and count."""
    variables = [variable for model in models for variable in model.variables]
    before = [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            if not np.array_equal(keras.ops.convert_to_numpy(variable), value, equal_nan=True):
                variable.assign(value)


@dataclass
class Observation:
    """What the calls of one candidate came to, while the original model ran.

    Attributes:
        calls: How many there were.
        macs: Multiply-adds an image.
        hidden_bytes: Size of the depthwise output an image.
        difference: Largest absolute difference that the fused layer makes.
        largest: Largest absolute value of the original.
        refusal: Why a call of the fused layer does not run our kernel, or `None`.
    """

    calls: int = 0
    macs: int = 0
    hidden_bytes: int = 0
    difference: float = 0.0
    largest: float = 0.0
    refusal: str | None = None

    def add(self, chain: Chain, layer: Any, x: Any, y: Any) -> None:
        """Adds one call.

        Args:
            chain: The candidate.
            layer: What it became, or `None`.
            x: Its input.
            y: What the original gives.
        """
        self.calls += 1
        macs, hidden_bytes = _work(chain, tuple(x.shape))
        self.macs += macs
        self.hidden_bytes += hidden_bytes
        if layer is not None:
            difference, largest = compared([_as_array(y)], [_as_array(layer(x))])
            # Unlike `max`, NumPy's keeps what is not a number.
            self.difference = float(np.maximum(self.difference, difference))
            self.largest = float(np.maximum(self.largest, largest))
            self.refusal = self.refusal or layer.why_not(x)


def observed(
    reading: Reading, chains: Sequence[Chain], fused: dict[int, Any], values: Any
) -> dict[int, Observation]:
    """Runs the graphs of a model, call by call, and the fused layers beside them.

    Args:
        reading: Of the model.
        chains: The candidates in its graphs.
        fused: `{id(chain.carrier): the layer in its place}`.
        values: What to call the model on.

    Returns:
        `{id(chain): what its calls came to}`.
    """
    found = {id(chain): Observation() for chain in chains}
    by_end = {id(chain.operations[-1]): chain for chain in chains}
    nested = {id(graph.model): graph for graph in reading.graphs}
    whole = reading.graphs[0] if reading.graphs else None

    def run(graph: Graph, given: Sequence[Any]) -> list[Any]:
        tensors = {
            id(tensor): keras.ops.convert_to_tensor(value, dtype=tensor.dtype)
            for tensor, value in zip(graph.model.inputs, given, strict=True)
        }
        # A model in the model is one of the calls of the model around it.
        calls = tracked(graph.calls, "layers compared") if graph is whole else graph.calls
        for call in calls:
            key = id(call.operation)
            if key in nested:
                outputs = run(nested[key], [tensors[id(tensor)] for tensor in call.inputs])
            else:
                arguments, keywords = call.arguments.fill_in(tensors)
                outputs = keras.tree.flatten(call.operation(*arguments, **keywords))
            tensors.update(zip(map(id, call.outputs), outputs, strict=True))
            if key in by_end:
                chain = by_end[key]
                start = call
                for _ in chain.operations[1:]:
                    start = reading.producers[id(start.inputs[0])]
                x = tensors[id(start.inputs[0])]
                found[id(chain)].add(chain, fused.get(id(chain.carrier)), x, outputs[0])
        return [tensors[id(tensor)] for tensor in graph.model.outputs]

    if whole is not None:
        run(whole, keras.tree.flatten(values))
    return found


def _input_structure(model: Any) -> Any:
    # Sequential models tell `input` only once somebody called them.
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def _random(rng: np.random.Generator, shape: Sequence[int | None], dtype: str) -> Any:
    batch, *sizes = shape
    known = [
        1 if batch is None else batch,
        *(_UNKNOWN_SIZE if size is None else size for size in sizes),
    ]
    if keras.backend.is_float_dtype(dtype):
        return keras.ops.cast(rng.standard_normal(known, dtype=np.float32), dtype)
    return keras.ops.cast(rng.integers(0, 2, known), dtype)


def _built_shape(model: Any) -> tuple[int | None, ...]:
    shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None or not all(size is None or isinstance(size, int) for size in shape):
        raise ValueError(
            "`inputs` must be given for a model whose input shape is not known. "
            f"Received: inputs=None, model={model.name}"
        )
    return tuple(shape)


def _as_array(value: Any) -> Array:
    is_double = keras.backend.standardize_dtype(value.dtype) == "float64"
    plain = keras.ops.cast(value, "float64" if is_double else "float32")
    return np.asarray(keras.ops.convert_to_numpy(plain))


def _work(chain: Chain, x_shape: tuple[int, ...]) -> tuple[int, int]:
    """Multiply-adds an image, and bytes of the depthwise output."""
    first = chain.convolution
    spec = ConvSpec(
        strides=first.strides,
        padding=first.padding if chain.padding is None else chain.padding,
        dilation_rate=first.dilation_rate,
        data_format=first.data_format,
    )
    channels = x_shape[spec.channels_axis] * first.depth_multiplier
    output: Any = spec.output_shape((1, *x_shape[1:]), first.kernel_size, channels)
    hidden = int(np.prod(output))
    # A depthwise convolution alone has none.
    filters = getattr(chain.carrier, "filters", 0)
    width = {"float64": 8, "float32": 4}.get(first.compute_dtype, 2)
    return hidden * (int(np.prod(first.kernel_size)) + filters), hidden * width
