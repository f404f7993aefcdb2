"""ONNX Runtime on its CPU provider."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from sepconv.bench.engines import Ready, UnableError
from sepconv.bench.problems import DTYPES, Problem, aligned_copy

PACKAGES = ("onnxruntime", "onnx")


def limit_threads(threads: int) -> None:
    """The session does it."""


def forget() -> None:
    """Nothing is kept."""


def prepare(name: str, problem: Problem, mode: str, copies: int, threads: int) -> Ready:
    """Makes a session ready; see `sepconv.bench.engines`."""
    if DTYPES[problem.dtype] != 4:
        raise UnableError("the CPU provider has no convolution of this dtype")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(
        _model(problem).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    g = problem.geometry
    y_shape = (g.batch, g.out_channels, g.out_height, g.out_width)
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type(y_shape, np.float32, "cpu")

    def bound() -> Any:
        binding = session.io_binding()
        x = aligned_copy(problem.to_nchw(problem.x))
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
        binding.bind_ortvalue_output("y", y)
        return binding

    turns = itertools.cycle([bound() for _ in range(copies)])

    def call() -> Any:
        session.run_with_iobinding(next(turns))
        return y

    return Ready(call, lambda value: [problem.from_nchw(value.numpy())])


def _model(problem: Problem) -> onnx.ModelProto:
    g = problem.geometry
    (top, bottom), (left, right) = problem.padding
    depthwise = problem.depthwise_kernel.transpose(2, 3, 0, 1)
    constants = {
        "depthwise": depthwise.reshape(g.depthwise_channels, 1, g.kernel_height, g.kernel_width),
        "pointwise": problem.pointwise_kernel.transpose(3, 2, 0, 1),
        "bias": problem.bias,
    }
    nodes = [
        helper.make_node(
            "Conv",
            ["x", "depthwise"],
            ["u"],
            group=g.in_channels,
            kernel_shape=[g.kernel_height, g.kernel_width],
            strides=problem.spec.strides,
            dilations=problem.spec.dilation_rate,
            pads=[top, left, bottom, right],
        ),
        helper.make_node("Conv", ["u", "pointwise", "bias"], ["y"]),
    ]
    x_shape = (g.batch, g.in_channels, g.in_height, g.in_width)
    y_shape = (g.batch, g.out_channels, g.out_height, g.out_width)
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
        [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in constants.items()],
    )
    # Versions that every runtime of the last years reads.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
