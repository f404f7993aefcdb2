"""What is compared: a candidate runs a layer, forward or as a training step, until it is done."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from problems import Problem

from sepconv.timing import Block, block_of

JOBS = ("forward", "training")


@dataclass
class Candidate:
    """A layer made ready. `results` runs once; blocks time it.

    A training step is the forward pass with its output and all four gradients: of the input, of
    both kernels, and of the bias.
    """

    results: dict[str, Callable[[], list[np.ndarray]]]
    blocks: dict[str, Block]


Maker = Callable[[Problem, int], Candidate]
"""(layer, how many copies of its input take turns) -> candidate."""


def sepconv_numpy(problem: Problem, copies: int) -> Candidate:
    from sepconv.numpy import separable_conv2d, separable_conv2d_grad

    keywords = _keywords(problem)
    inputs = itertools.cycle([(problem.x.copy(), problem.dy.copy()) for _ in range(copies)])

    def forward() -> list[np.ndarray]:
        return [separable_conv2d(next(inputs)[0], *problem.weights, **keywords)]

    def training() -> list[np.ndarray]:
        x, dy = next(inputs)
        y = separable_conv2d(x, *problem.weights, **keywords)
        return [y, *separable_conv2d_grad(dy, x, *problem.weights, **keywords)]

    return _candidate(forward, training, list)


def sepconv_jax(problem: Problem, copies: int) -> Candidate:
    from sepconv.jax import separable_conv2d, why_not

    keywords = _keywords(problem)
    reason = why_not(problem.x, *problem.weights, **keywords)
    if reason is not None:
        raise RuntimeError(f"sepconv.jax would not run its kernel: {reason}")
    return _jax(lambda x, *weights: separable_conv2d(x, *weights, **keywords), problem, copies)


def jax_lax(problem: Problem, copies: int) -> Candidate:
    return _jax(functools.partial(lax_layer, problem), problem, copies)


def lax_layer(problem: Problem, x: Any, depthwise: Any, pointwise: Any, bias: Any) -> Any:
    """The layer as two convolutions of JAX."""
    from jax import lax

    g = problem.geometry
    numbers = ("NHWC", "HWIO", "NHWC")
    shape = (g.kernel_height, g.kernel_width, 1, g.depthwise_channels)
    u = lax.conv_general_dilated(
        x,
        depthwise.reshape(shape),
        (g.stride_height, g.stride_width),
        problem.padding,
        rhs_dilation=(g.dilation_height, g.dilation_width),
        dimension_numbers=numbers,
        feature_group_count=g.in_channels,
    )
    return lax.conv_general_dilated(u, pointwise, (1, 1), "VALID", dimension_numbers=numbers) + bias


def keras_stock(problem: Problem, copies: int) -> Candidate:
    import keras

    return _keras(keras.layers.SeparableConv2D, problem, copies)


def keras_sepconv(problem: Problem, copies: int) -> Candidate:
    from sepconv.keras import SeparableConv2D

    return _keras(SeparableConv2D, problem, copies)


def torch_contiguous(problem: Problem, copies: int) -> Candidate:
    import torch

    return _torch_pair(problem, copies, torch.contiguous_format)


def torch_channels_last(problem: Problem, copies: int) -> Candidate:
    import torch

    return _torch_pair(problem, copies, torch.channels_last)


def sepconv_torch(problem: Problem, copies: int) -> Candidate:
    import torch

    from sepconv import backends
    from sepconv.torch import separable_conv2d

    reason = backends.why_not(problem.geometry, "float32")
    if reason is not None:
        raise RuntimeError(f"sepconv.torch would not run its kernel: {reason}")
    spec = problem.spec
    keywords = {"stride": spec.strides, "padding": spec.padding, "dilation": spec.dilation_rate}

    def layer(x: Any, *weights: Any) -> Any:
        return separable_conv2d(x, *weights, **keywords)

    return _torch(layer, problem, copies, torch.channels_last, None)


class TensorFlow:
    """TensorFlow in another interpreter, asked over a pipe; it sleeps while others are timed."""

    def __init__(self, python: str, threads: int) -> None:
        worker = Path(__file__).with_name("tensorflow_worker.py")
        self._folder = tempfile.TemporaryDirectory()
        # Its own log lines say nothing about the result and would mix with the table.
        self._log = open(os.path.join(self._folder.name, "log"), "w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, str(worker), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.version: str = self._ask(command="version")

    def __call__(self, problem: Problem, copies: int) -> Candidate:
        path = os.path.join(self._folder.name, "problem.npz")
        arrays = {"x": problem.x, "dy": problem.dy, "bias": problem.bias}
        np.savez(
            path, depthwise=problem.depthwise_kernel, pointwise=problem.pointwise_kernel, **arrays
        )
        config = {
            "filters": problem.geometry.out_channels,
            "kernel_size": problem.depthwise_kernel.shape[:2],
            "depth_multiplier": problem.geometry.depth_multiplier,
            **_keywords(problem),
        }
        self._ask(command="prepare", path=path, config=config, copies=copies)

        def results(job: str) -> list[np.ndarray]:
            out = os.path.join(self._folder.name, "results.npz")
            self._ask(command="results", job=job, path=out)
            with np.load(out) as file:
                return [file[name] for name in file.files]

        return Candidate(
            {job: functools.partial(results, job) for job in JOBS},
            {job: functools.partial(self._time, job) for job in JOBS},
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._log.close()
        self._folder.cleanup()

    def _time(self, job: str, calls: int) -> list[float]:
        return self._ask(command="time", job=job, calls=calls)

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(
                f"The TensorFlow process ended. It wrote: {self._log.read()[-2000:]}"
            )
        return json.loads(line)


MAKERS: dict[str, Maker] = {
    "sepconv numpy": sepconv_numpy,
    "sepconv jax": sepconv_jax,
    "sepconv keras": keras_sepconv,
    "sepconv torch": sepconv_torch,
    "keras on jax": keras_stock,
    "jax.lax": jax_lax,
    "torch": torch_contiguous,
    "torch channels_last": torch_channels_last,
}
"""By name, stock Keras on JAX among them: it is what the ratios refer to."""

BASELINE = "keras on jax"


def _candidate(
    forward: Callable[[], Any], training: Callable[[], Any], arrays: Callable[[Any], Any]
) -> Candidate:
    calls = {"forward": forward, "training": training}
    return Candidate(
        {job: lambda call=call: arrays(call()) for job, call in calls.items()},
        {job: block_of(call) for job, call in calls.items()},
    )


def _keywords(problem: Problem) -> dict[str, Any]:
    spec = problem.spec
    return {
        "strides": spec.strides,
        "padding": spec.padding,
        "dilation_rate": spec.dilation_rate,
    }


def _jax(layer: Callable[..., Any], problem: Problem, copies: int) -> Candidate:
    import jax

    weights = [jax.device_put(array) for array in problem.weights]
    inputs: Iterator[Any] = itertools.cycle(
        [
            (jax.device_put(problem.x.copy()), jax.device_put(problem.dy.copy()))
            for _ in range(copies)
        ]
    )
    run = jax.jit(layer)
    step = jax.jit(jax_step(layer))

    def forward() -> Any:
        return jax.block_until_ready([run(next(inputs)[0], *weights)])

    def training() -> Any:
        x, dy = next(inputs)
        return jax.block_until_ready(step(dy, x, *weights))

    return _candidate(forward, training, lambda values: [np.asarray(value) for value in values])


def jax_step(layer: Callable[..., Any]) -> Callable[..., Any]:
    """A training step of a JAX function; it returns y too, or XLA would not compute it."""
    import jax

    def step(dy: Any, *operands: Any) -> Any:
        y, pull = jax.vjp(layer, *operands)
        return [y, *pull(dy)]

    return step


def _keras(kind: Any, problem: Problem, copies: int) -> Candidate:
    g = problem.geometry
    layer = kind(
        g.out_channels,
        (g.kernel_height, g.kernel_width),
        depth_multiplier=g.depth_multiplier,
        **_keywords(problem),
    )
    layer.build(problem.x.shape)
    layer.set_weights(list(problem.weights))
    if hasattr(layer, "why_not") and layer.why_not(problem.x) is not None:
        raise RuntimeError(f"sepconv.keras would not run its kernel: {layer.why_not(problem.x)}")
    return _jax(lambda x, *weights: layer.stateless_call(weights, [], x)[0], problem, copies)


def _torch_pair(problem: Problem, copies: int, memory_format: Any) -> Candidate:
    import torch

    g = problem.geometry
    (top, bottom), (left, right) = problem.padding
    even = top == bottom and left == right

    def layer(x: Any, depthwise: Any, pointwise: Any, bias: Any) -> Any:
        if not even:
            x = torch.nn.functional.pad(x, (left, right, top, bottom))
        u = torch.nn.functional.conv2d(
            x,
            depthwise,
            stride=(g.stride_height, g.stride_width),
            padding=(top, left) if even else 0,
            dilation=(g.dilation_height, g.dilation_width),
            groups=g.in_channels,
        )
        return torch.nn.functional.conv2d(u, pointwise, bias)

    return _torch(layer, problem, copies, memory_format, memory_format)


def _torch(
    layer: Callable[..., Any], problem: Problem, copies: int, image_format: Any, weight_format: Any
) -> Candidate:
    """A layer on tensors; weights stay in the memory order of Keras if `weight_format` is None."""
    import torch

    g = problem.geometry

    def image(array: np.ndarray) -> Any:
        value = torch.from_numpy(array.copy()).permute(0, 3, 1, 2)
        return value.contiguous(memory_format=image_format)

    shape = (g.depthwise_channels, 1, g.kernel_height, g.kernel_width)
    weights = [
        torch.from_numpy(problem.depthwise_kernel.copy()).permute(2, 3, 0, 1).reshape(shape),
        torch.from_numpy(problem.pointwise_kernel.copy()).permute(3, 2, 0, 1),
    ]
    if weight_format is not None:
        weights = [weight.contiguous(memory_format=weight_format) for weight in weights]
    weights.append(torch.from_numpy(problem.bias.copy()))
    inputs = itertools.cycle([(image(problem.x), image(problem.dy)) for _ in range(copies)])

    def forward() -> Any:
        with torch.inference_mode():
            return [layer(next(inputs)[0], *weights)]

    def training() -> Any:
        x, dy = next(inputs)
        operands = [value.detach().requires_grad_() for value in (x, *weights)]
        y = layer(*operands)
        return [y, *torch.autograd.grad(y, operands, dy)]

    def arrays(values: Any) -> list[np.ndarray]:
        y, *gradients = (value.detach() for value in values)
        out = [y.permute(0, 2, 3, 1).numpy()]
        if gradients:
            dx, d_depthwise, d_pointwise, d_bias = gradients
            d_depthwise = d_depthwise.reshape(
                g.in_channels, g.depth_multiplier, g.kernel_height, g.kernel_width
            )
            out += [
                dx.permute(0, 2, 3, 1).numpy(),
                d_depthwise.permute(2, 3, 0, 1).numpy(),
                d_pointwise.permute(2, 3, 1, 0).numpy(),
                d_bias.numpy(),
            ]
        return out

    return _candidate(forward, training, arrays)
