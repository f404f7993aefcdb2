"""LiteRT, whose CPU kernels are those of XNNPACK."""

from __future__ import annotations

import itertools
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.cpu_options import CpuOptions
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.options import Options

from sepconv.bench.engines import Ready, UnableError
from sepconv.bench.problems import DTYPES, Problem

PACKAGES = ("ai-edge-litert",)


def limit_threads(threads: int) -> None:
    """The compiled model does it."""


def forget() -> None:
    """Nothing is kept."""


def prepare(name: str, problem: Problem, mode: str, copies: int, threads: int) -> Ready:
    """Makes a compiled model ready; see `sepconv.bench.engines`."""
    if DTYPES[problem.dtype] != 4:
        raise UnableError("its CPU kernels have no convolution of this dtype")
    if problem.spec.channels_axis == 1:
        raise UnableError("its convolutions take channels last only")
    options = Options(
        hardware_accelerators=HardwareAccelerator.CPU,
        cpu_options=CpuOptions(num_threads=threads),
    )
    model = CompiledModel.from_buffer(_flatbuffer(problem), options=options)
    if not model.is_fully_accelerated():
        raise UnableError("XNNPACK does not take the whole model")
    outputs = model.create_output_buffers(0)

    def buffers() -> Any:
        made = model.create_input_buffers(0)
        made[0].write(problem.x)
        return made

    turns = itertools.cycle([buffers() for _ in range(copies)])

    def call() -> Any:
        model.run_by_index(0, next(turns), outputs)
        return outputs[0]

    shape = problem.geometry.y_shape
    size = int(np.prod(shape))
    return Ready(call, lambda value: [np.asarray(value.read(size, np.float32)).reshape(shape)])


def _flatbuffer(problem: Problem) -> bytes:
    """The layer as DEPTHWISE_CONV_2D and CONV_2D with constant weights."""
    g, spec = problem.geometry, problem.spec
    if not isinstance(spec.padding, str):
        raise UnableError("its convolutions pad by their own rule only")
    kernel = problem.depthwise_kernel
    constants = {
        "depthwise": kernel.reshape(1, *kernel.shape[:2], g.depthwise_channels),
        "no bias": np.zeros(g.depthwise_channels, np.float32),
        "pointwise": problem.pointwise_kernel.transpose(3, 0, 1, 2),
        "bias": problem.bias,
    }
    # Buffer 0 is the empty one, for tensors that are computed.
    blocks = [schema.BufferT()]
    tensors = []

    def tensor(name: str, shape: tuple[int, ...], buffer: int = 0) -> int:
        made = schema.TensorT()
        made.name, made.shape, made.buffer = name, list(shape), buffer
        made.type = schema.TensorType.FLOAT32
        tensors.append(made)
        return len(tensors) - 1

    x = tensor("x", g.x_shape)
    weights = []
    for name, array in constants.items():
        block = schema.BufferT()
        block.data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        weights.append(tensor(name, array.shape, len(blocks)))
        blocks.append(block)
    u = tensor("u", (g.batch, g.out_height, g.out_width, g.depthwise_channels))
    y = tensor("y", g.y_shape)

    depthwise = schema.DepthwiseConv2DOptionsT()
    depthwise.padding = getattr(schema.Padding, spec.padding.upper())
    depthwise.strideH, depthwise.strideW = spec.strides
    depthwise.dilationHFactor, depthwise.dilationWFactor = spec.dilation_rate
    depthwise.depthMultiplier = g.depth_multiplier
    pointwise = schema.Conv2DOptionsT()
    pointwise.padding = schema.Padding.VALID
    pointwise.strideH = pointwise.strideW = 1
    pointwise.dilationHFactor = pointwise.dilationWFactor = 1

    codes, operators = [], []
    for index, (builtin, kind, options, inputs, output) in enumerate(
        (
            ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions", depthwise, [x, *weights[:2]], u),
            ("CONV_2D", "Conv2DOptions", pointwise, [u, *weights[2:]], y),
        )
    ):
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, builtin)
        code.deprecatedBuiltinCode, code.version = code.builtinCode, 1
        codes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = index, inputs, [output]
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        operator.builtinOptions = options
        operators.append(operator)

    graph = schema.SubGraphT()
    graph.tensors, graph.operators, graph.inputs, graph.outputs = tensors, operators, [x], [y]
    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, codes, [graph], blocks
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
