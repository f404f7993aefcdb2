"""A published network, loaded with its weights, its layers swapped for ours, and both compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import numpy.typing as npt

from sepconv.demo.data import Face
from sepconv.keras import SeparableConv2D
from sepconv.timing import Timing, block_of, interleaved

__all__ = [
    "EMOTIONS",
    "SEPARABLE_LAYERS",
    "Comparison",
    "LayerRow",
    "SwapError",
    "check_kernel",
    "compare",
    "jitted",
    "load_legacy_model",
    "swap_separable_layers",
]

EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
"""The classes of the mini-Xception, in the order of its outputs."""

SEPARABLE_LAYERS = 8
"""How many separable convolutions the mini-Xception has."""

Array = npt.NDArray[Any]


class SwapError(RuntimeError):
    """Not every layer that should have become ours did."""


@dataclass(frozen=True)
class LayerRow:
    """One separable convolution of the network, stock and ours.

    Attributes:
        name: Of the layer.
        input_shape: (height, width, channels) of its input.
        filters: Channels of its output.
        largest: Largest absolute value of the stock layer's output.
        difference: Largest absolute difference of the two outputs, each inside its own network.
        stock: Time of the stock layer alone.
        ours: Time of our layer alone.
    """

    name: str
    input_shape: tuple[int, ...]
    filters: int
    largest: float
    difference: float
    stock: Timing
    ours: Timing


@dataclass(frozen=True)
class Comparison:
    """One network with stock layers and with ours, on one face.

    Attributes:
        stock_probabilities: (7,) of the stock network.
        our_probabilities: (7,) of ours.
        logits_difference: Largest absolute difference before the softmax.
        layers: One row a separable convolution.
        times: {batch size: (stock, ours)} of the whole network.
    """

    stock_probabilities: Array
    our_probabilities: Array
    logits_difference: float
    layers: tuple[LayerRow, ...]
    times: dict[int, tuple[Timing, Timing]]

    @property
    def label(self) -> str:
        """The class that our network gives the face."""
        return EMOTIONS[int(np.argmax(self.our_probabilities))]

    @property
    def probability(self) -> float:
        """The probability of that class."""
        return float(np.max(self.our_probabilities))


def load_legacy_model(path: Path) -> keras.Model:
    """Loads a network from an HDF5 file that Keras 2 wrote.

    Args:
        path: Of the file.

    Example:
        >>> from sepconv.demo.data import emotion_model_path
        >>> load_legacy_model(emotion_model_path()).output_shape
        (None, 7)
    """
    # The layers load as they are. The optimizer of that time has arguments that Keras 3 refuses,
    # and nothing is trained here.
    return keras.models.load_model(
        path, custom_objects={"VarianceScaling": _ReplacedByTheFile}, compile=False
    )


def swap_separable_layers(model: keras.Model, expected: int) -> keras.Model:
    """Returns a copy of a network with our layer in place of every stock SeparableConv2D.

    Args:
        model: Any Keras network. A subclass of the stock layer is not touched: it may compute
            something else.
        expected: How many layers have to be ours in the copy.

    Returns:
        The copy, with the same names and weights.

    Raises:
        SwapError: the copy has another number of our layers.

    Example:
        >>> inputs = keras.Input((8, 8, 3))
        >>> net = keras.Model(inputs, keras.layers.SeparableConv2D(4, 3)(inputs))
        >>> type(swap_separable_layers(net, expected=1).layers[-1]).__module__
        'sepconv.keras'
    """

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        kind = SeparableConv2D if type(layer) is keras.layers.SeparableConv2D else type(layer)
        return kind.from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    copy.set_weights(model.get_weights())
    # Counted in the copy: a swap that Keras undid on the way would be missed otherwise.
    layers = _separable_layers(copy)
    swapped = sum(isinstance(layer, SeparableConv2D) for layer in layers)
    if swapped != expected:
        left = [layer.name for layer in layers if not isinstance(layer, SeparableConv2D)]
        raise SwapError(
            f"{expected} SeparableConv2D layers must be swapped. Received: {swapped} swapped, "
            f"left as they were: {', '.join(left) or 'none'}"
        )
    return copy


def check_kernel(model: keras.Model) -> None:
    """Checks that our layers in a network run our kernel, so that it is what gets measured.

    Args:
        model: A network with layers of ours.

    Raises:
        RuntimeError: a layer would run the computation of Keras; the message says why.

    Example:
        >>> inputs = keras.Input((8, 8, 3))
        >>> check_kernel(keras.Model(inputs, SeparableConv2D(4, 3)(inputs)))
    """
    for layer in _separable_layers(model):
        reason = layer.why_not(layer.input) if isinstance(layer, SeparableConv2D) else None
        if reason is not None:
            raise RuntimeError(f"Layer {layer.name} would not run the kernel of sepconv: {reason}")


def jitted(model: keras.layers.Layer) -> Callable[[Any], Any]:
    """Returns the compiled inference of a layer or network, which returns when it is done.

    Args:
        model: A built layer or network.
    """
    trainable = [variable.value for variable in model.trainable_variables]
    fixed = [variable.value for variable in model.non_trainable_variables]

    # Weights are arguments, so that the compiler cannot compute with them ahead of time. Without
    # the argument `training` Keras infers; a single layer would not accept it.
    @jax.jit
    def run(trainable: Any, fixed: Any, x: Any) -> Any:
        return model.stateless_call(trainable, fixed, x)[0]

    return lambda x: jax.block_until_ready(run(trainable, fixed, x))


def compare(
    stock: keras.Model,
    ours: keras.Model,
    face: Face,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    rounds: int = 7,
) -> Comparison:
    """Runs both networks on a face: outputs, differences layer by layer, times.

    Args:
        stock: The network as it was loaded.
        ours: The same with our layers.
        face: The input.
        batch_sizes: How many copies of the face one call gets when it is timed.
        rounds: Of the timing.
    """
    names = [layer.name for layer in _separable_layers(stock)]
    stock_run, our_run = jitted(_probe(stock, names)), jitted(_probe(ours, names))
    stock_outputs = [np.asarray(value) for value in stock_run(face.pixels)]
    our_outputs = [np.asarray(value) for value in our_run(face.pixels)]
    differences = [
        float(np.max(np.abs(a - b))) for a, b in zip(stock_outputs, our_outputs, strict=True)
    ]

    rows = []
    for index, name in enumerate(names):
        layer = stock.get_layer(name)
        shape = tuple(layer.input.shape[1:])
        # Random: inside the network the input is whatever the layers before it made of the face.
        x = np.random.default_rng(index).standard_normal((1, *shape), dtype=np.float32)
        timing = _times(jitted(layer), jitted(ours.get_layer(name)), x, rounds)
        largest = float(np.max(np.abs(stock_outputs[index])))
        rows.append(LayerRow(name, shape, layer.filters, largest, differences[index], *timing))

    whole_stock, whole_ours = jitted(stock), jitted(ours)
    times = {}
    for size in batch_sizes:
        batch = np.repeat(face.pixels, size, axis=0)
        times[size] = _times(whole_stock, whole_ours, batch, rounds)
    return Comparison(
        stock_probabilities=stock_outputs[-1][0],
        our_probabilities=our_outputs[-1][0],
        logits_difference=differences[-2],
        layers=tuple(rows),
        times=times,
    )


class _ReplacedByTheFile:
    """Stands for the random start of a weight that is read from the file a moment later.

    A random start costs the compilation of a random generator for every shape: in the
    mini-Xception 12 seconds, nine tenths of the loading.
    """

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.initializers.Initializer:
        return keras.initializers.Zeros()


def _separable_layers(model: keras.Model) -> list[keras.layers.SeparableConv2D]:
    """Returns the separable convolutions of a network and of the networks inside it, in order."""
    found = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found.extend(_separable_layers(layer))
        elif isinstance(layer, keras.layers.SeparableConv2D):
            found.append(layer)
    return found


def _probe(model: keras.Model, names: Sequence[str]) -> keras.Model:
    """Returns the network that also gives what the named layers and the last two layers compute."""
    layers = [model.get_layer(name) for name in names] + model.layers[-2:]
    return keras.Model(model.inputs, [layer.output for layer in layers])


def _times(
    stock: Callable[[Any], Any], ours: Callable[[Any], Any], x: Array, rounds: int
) -> tuple[Timing, Timing]:
    value = jax.device_put(x)
    blocks = {"stock": block_of(lambda: stock(value)), "ours": block_of(lambda: ours(value))}
    times = interleaved(blocks, rounds=rounds)
    return times["stock"], times["ours"]
