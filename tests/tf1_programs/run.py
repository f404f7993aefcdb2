"""Runs the legacy programs of programs.txt with `tf` from the module named on the command line.

    python run.py tensorflow.compat.v1 | sepconv.tf1  < programs.txt

Prints one JSON object: for each program, what it showed, and what its graph held at the end.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings

import numpy as np

warnings.simplefilter("ignore")


def main() -> None:
    """Runs every program in a graph of its own."""
    tf = importlib.import_module(sys.argv[1])
    original = sys.argv[1].startswith("tensorflow")
    text = sys.stdin.read()
    results = {}
    for section in text.split("=== ")[1:]:
        title, _, program = section.partition("\n")
        results[title] = run(tf, original, program)
    json.dump(results, sys.stdout)


def run(tf, original, program):
    shown = []
    x_value = np.random.default_rng(7).standard_normal((2, 8, 8, 3)).astype("float32")
    fills = {}

    def value_of(name, shape):
        seed = [ord(character) for character in name]
        return np.random.default_rng(seed).standard_normal(shape)

    def fill():
        """Gives every variable a value that depends on its name alone."""
        for variable in tf.global_variables():
            value = value_of(variable.op.name, tuple(variable.shape))
            if original:
                fills[variable.op.name] = (variable, value)
            else:
                variable.assign(value)

    def y_again(y, **arguments):
        """The output with the values as they are now."""
        if original:
            return y
        return tf.layers.separable_conv2d(x, 4, 3, reuse=True, **arguments)

    def evaluated(tensor):
        if not original:
            from sepconv.tf1.tensors import to_numpy

            return to_numpy(tensor)
        with tf.Session() as session:
            session.run(tf.global_variables_initializer())
            for variable, value in fills.values():
                variable.load(value, session)
            return session.run(tensor)

    def number(tensor):
        value = np.asarray(evaluated(tensor), "float64")
        shown.append({"number": value.ravel().tolist(), "shape": list(value.shape)})

    def show(*values):
        shown.append({"show": json.loads(json.dumps(values, default=str))})

    def attempt(function):
        try:
            function()
        except Exception as error:
            builtin = next(c for c in type(error).__mro__ if c.__module__ == "builtins")
            shown.append({"raises": builtin.__name__})
        else:
            shown.append({"raises": None})

    with tf.Graph().as_default():
        x = tf.constant(x_value)
        names = dict(  # noqa: C408
            tf=tf, np=np, x=x, fill=fill, number=number, show=show, attempt=attempt, y_again=y_again
        )
        exec(program, names)
        return {
            "shown": shown,
            "variables": [
                [
                    v.name,
                    v.op.name,
                    list(map(int, v.shape)),
                    v.dtype.base_dtype.name,
                    bool(v.trainable),
                ]
                for v in tf.global_variables()
            ],
            "trainable": [v.name for v in tf.trainable_variables()],
            "losses": len(tf.losses.get_regularization_losses()),
            "updates": len(tf.get_collection(tf.GraphKeys.UPDATE_OPS)),
        }


if __name__ == "__main__":
    main()
