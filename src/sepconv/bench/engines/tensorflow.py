"""TensorFlow: the operations of `tf.nn` inside compiled functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from sepconv.bench.engines import Ready, UnableError
from sepconv.bench.problems import MODES, Problem

PACKAGES = ("tensorflow", "tensorflow-cpu")


def limit_threads(threads: int) -> None:
    """Limits the pools; this must come before the first operation."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def forget() -> None:
    """Nothing is kept."""


def prepare(name: str, problem: Problem, mode: str, copies: int, threads: int) -> Ready:
    """Makes the layer ready; see `sepconv.bench.engines`."""
    spec = problem.spec
    if not isinstance(spec.padding, str):
        raise UnableError("tf.nn.separable_conv2d pads by its own rule only")
    if spec.channels_axis == 1:
        raise UnableError("its depthwise convolution takes channels last only on a CPU")
    padding = spec.padding.upper()

    def cast(array: Any) -> Any:
        return tf.identity(tf.cast(tf.constant(array), problem.dtype))

    depthwise, pointwise, bias = (cast(weight) for weight in problem.weights)

    def layer(x: Any) -> Any:
        y = tf.nn.separable_conv2d(
            x, depthwise, pointwise, (1, *spec.strides, 1), padding, dilations=spec.dilation_rate
        )
        return tf.nn.bias_add(y, bias)

    inputs = [(cast(problem.x), cast(problem.dy)) for _ in range(copies)]
    return ready_of(
        layer,
        [depthwise, pointwise, bias],
        inputs,
        mode,
        lambda values: [tf.cast(value, tf.float32).numpy() for value in values],
    )


def ready_of(
    layer: Callable[[Any], Any],
    parameters: Sequence[Any],
    inputs: Sequence[tuple[Any, Any]],
    mode: str,
    arrays: Callable[[Sequence[Any]], Sequence[Any]],
) -> Ready:
    """Makes a layer ready.

    Args:
        layer: x -> y.
        parameters: Its weights, in the order of their gradients.
        inputs: (x, dy), which take turns.
        mode: One of `MODES`.
        arrays: (y, gradients of x and of the weights) -> as in `Ready`.
    """
    turns = itertools.cycle(inputs)

    @tf.function
    def run_forward(x: Any) -> Any:
        return [layer(x)]

    @tf.function
    def run_step(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            operands = [x, *parameters]
            tape.watch(operands)
            y = layer(x)
        return [y, *tape.gradient(y, operands, output_gradients=dy)]

    def forward() -> Any:
        # On the CPU a function returns when its values are computed: TensorFlow's default.
        return run_forward(next(turns)[0])

    def training() -> Any:
        return run_step(*next(turns))

    return Ready(forward if mode == MODES[0] else training, arrays)
