"""OpenVINO on its CPU plugin."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as opset

from sepconv.bench.engines import Ready, UnableError
from sepconv.bench.problems import DTYPES, Problem, aligned_copy

PACKAGES = ("openvino",)


def limit_threads(threads: int) -> None:
    """The compiled model does it."""


def forget() -> None:
    """Nothing is kept."""


def prepare(name: str, problem: Problem, mode: str, copies: int, threads: int) -> Ready:
    """Makes an inference request ready; see `sepconv.bench.engines`."""
    half = DTYPES[problem.dtype] == 2
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(_model(problem), "CPU", settings)
    precision = compiled.get_property("INFERENCE_PRECISION_HINT")
    if half and precision != openvino.Type.bf16:
        raise UnableError("its CPU plugin has no bfloat16 on this processor")
    request = compiled.create_infer_request()
    y = aligned_copy(np.zeros(problem.geometry.y_shape, np.float32))
    request.set_output_tensor(openvino.Tensor(y, shared_memory=True))
    inputs = [aligned_copy(problem.x) for _ in range(copies)]
    turns = itertools.cycle([openvino.Tensor(x, shared_memory=True) for x in inputs])

    def call() -> Any:
        request.set_input_tensor(next(turns))
        request.infer()
        return y

    # The tensors share the memory of the inputs, which must live as long.
    call.inputs = inputs  # type: ignore[attr-defined]
    return Ready(call, lambda value: [value])


def _model(problem: Problem) -> Any:
    g, spec = problem.geometry, problem.spec
    (top, bottom), (left, right) = problem.padding
    kernel = problem.depthwise_kernel.transpose(2, 3, 0, 1)
    groups = (g.in_channels, g.depth_multiplier, 1, g.kernel_height, g.kernel_width)
    x = opset.parameter([g.batch, g.in_channels, g.in_height, g.in_width], np.float32, name="x")
    u = opset.group_convolution(
        x,
        opset.constant(np.ascontiguousarray(kernel).reshape(groups)),
        list(spec.strides),
        [top, left],
        [bottom, right],
        list(spec.dilation_rate),
    )
    pointwise = opset.constant(np.ascontiguousarray(problem.pointwise_kernel.transpose(3, 2, 0, 1)))
    z = opset.convolution(u, pointwise, [1, 1], [0, 0], [0, 0], [1, 1])
    y = opset.add(z, opset.constant(problem.bias.reshape(1, -1, 1, 1)))
    model = openvino.Model([y], [x], "layer")
    if spec.channels_axis == 1:
        return model
    # It takes images as they lie, and computes them so.
    steps = openvino.preprocess.PrePostProcessor(model)
    for end in (steps.input(), steps.output()):
        end.tensor().set_layout(openvino.Layout("NHWC"))
        end.model().set_layout(openvino.Layout("NCHW"))
    return steps.build()
