"""Keras on the backend of the process: our layer, and the stock one."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from sepconv import set_num_threads
from sepconv.bench.engines import Ready, UnableError
from sepconv.bench.problems import Problem

_BACKEND = keras.backend.backend()
PACKAGES = ("keras", _BACKEND)


def limit_threads(threads: int) -> None:
    """Limits the backend and our kernels."""
    if _BACKEND == "torch":
        import torch

        torch.set_num_threads(threads)
    elif _BACKEND == "tensorflow":
        from sepconv.bench.engines import tensorflow

        tensorflow.limit_threads(threads)
        return
    set_num_threads(threads)


def forget() -> None:
    """Drops what Keras and its backend keep."""
    keras.utils.clear_session()
    if _BACKEND == "jax":
        import jax

        jax.clear_caches()


def prepare(name: str, problem: Problem, mode: str, copies: int, threads: int) -> Ready:
    """Makes a candidate ready; see `sepconv.bench.engines`."""
    kind: Any = keras.layers.SeparableConv2D
    if name.startswith("sepconv"):
        from sepconv.keras import SeparableConv2D as kind
    g = problem.geometry
    layer = kind(
        g.out_channels,
        (g.kernel_height, g.kernel_width),
        depth_multiplier=g.depth_multiplier,
        dtype=problem.dtype,
        **problem.keywords,
    )
    layer.build(problem.x.shape)
    layer.set_weights(list(problem.weights))
    if name.startswith("sepconv"):
        reason = layer.why_not(keras.KerasTensor(problem.x.shape, problem.dtype))
        if reason is not None:
            raise UnableError(reason)

    if _BACKEND == "jax":
        from sepconv.bench.engines import jax

        return jax.ready_of(
            lambda x, *weights: layer.stateless_call(weights, [], x)[0], problem, mode, copies
        )

    parameters = [variable.value for variable in layer.trainable_variables]

    def image(array: Any) -> Any:
        return keras.ops.convert_to_tensor(array.copy(), dtype=problem.dtype)

    inputs = [(image(problem.x), image(problem.dy)) for _ in range(copies)]

    def arrays(values: Any) -> list[Any]:
        return [
            np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(v, "float32"))) for v in values
        ]

    if _BACKEND == "torch":
        from sepconv.bench.engines import torch

        return torch.ready_of(layer, parameters, inputs, mode, arrays)

    from sepconv.bench.engines import tensorflow

    return tensorflow.ready_of(layer, parameters, inputs, mode, arrays)
