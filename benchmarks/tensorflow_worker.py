"""The TensorFlow side of run.py: requests come as lines of JSON, each is answered by one line.

Run by an interpreter that has TensorFlow. Whatever else TensorFlow prints goes to standard error.
"""

import itertools
import json
import os
import sys
import time

# Standard output carries answers only.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402


class Layer:
    """One layer as tf.nn computes it, inside compiled functions."""

    def __init__(self, path, config, copies):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        strides = (1, *config["strides"], 1)
        padding, dilations = config["padding"].upper(), config["dilation_rate"]
        weights = [tf.constant(arrays[name]) for name in ("depthwise", "pointwise", "bias")]
        pairs = [(tf.constant(arrays["x"]), tf.constant(arrays["dy"])) for _ in range(copies)]
        self.inputs = itertools.cycle([tuple(map(tf.identity, pair)) for pair in pairs])
        self.weights = weights

        def layer(x, depthwise, pointwise, bias):
            y = tf.nn.separable_conv2d(x, depthwise, pointwise, strides, padding, None, dilations)
            return tf.nn.bias_add(y, bias)

        @tf.function
        def forward(x, *operands):
            return [layer(x, *operands)]

        @tf.function
        def training(x, dy, *operands):
            with tf.GradientTape() as tape:
                tape.watch([x, *operands])
                y = layer(x, *operands)
            return [y, *tape.gradient(y, [x, *operands], output_gradients=dy)]

        self.functions = {"forward": forward, "training": training}

    def call(self, job):
        x, dy = next(self.inputs)
        operands = (x, dy) if job == "training" else (x,)
        # On the CPU a function returns when its values are computed: TensorFlow's default.
        return self.functions[job](*operands, *self.weights)

    def block(self, job, calls):
        self.call(job)
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            self.call(job)
            seconds.append(time.perf_counter() - start)
        return seconds


def main():
    threads = int(sys.argv[1])
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    layer = None
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        answer = None
        if command == "version":
            answer = tf.__version__
        elif command == "prepare":
            layer = Layer(**request)
        elif command == "results":
            values = [value.numpy() for value in layer.call(request["job"])]
            np.savez(request["path"], *values)
        elif command == "time":
            answer = layer.block(**request)
        print(json.dumps(answer), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
