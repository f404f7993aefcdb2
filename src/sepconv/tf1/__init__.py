"""`tf.layers.SeparableConv2D` as in TensorFlow 1, on any backend of Keras 3.

Legacy code that uses this layer changes one line:

    import sepconv.tf1 as tf        # was: import tensorflow.compat.v1 as tf

Variable scopes, reuse, names, collections and losses follow. There is no graph execution: calls
compute at once. Names that are not provided say so when they are used, and what to write instead.
"""

from __future__ import annotations

from typing import Any

import sepconv.keras  # noqa: F401 - picks the backend, which must come before Keras is imported

# isort: split
import keras

from sepconv.tf1 import graphs, initializers, layers, losses, nn, scopes, tensors, train
from sepconv.tf1.graphs import *  # noqa: F403
from sepconv.tf1.initializers import (
    constant_initializer,
    glorot_normal_initializer,
    glorot_uniform_initializer,
    identity_initializer,
    ones_initializer,
    orthogonal_initializer,
    random_normal_initializer,
    random_uniform_initializer,
    truncated_normal_initializer,
    uniform_unit_scaling_initializer,
    variance_scaling_initializer,
    zeros_initializer,
)
from sepconv.tf1.provided import not_provided
from sepconv.tf1.scopes import *  # noqa: F403
from sepconv.tf1.tensors import *  # noqa: F403
from sepconv.tf1.variables import Variable

__all__ = [
    "Variable",
    "constant_initializer",
    "glorot_normal_initializer",
    "glorot_uniform_initializer",
    "identity_initializer",
    "initializers",
    "keras",
    "layers",
    "losses",
    "nn",
    "ones_initializer",
    "orthogonal_initializer",
    "random_normal_initializer",
    "random_uniform_initializer",
    "train",
    "truncated_normal_initializer",
    "uniform_unit_scaling_initializer",
    "variance_scaling_initializer",
    "zeros_initializer",
]
__all__ += graphs.__all__
__all__ += scopes.__all__
__all__ += tensors.__all__


def __getattr__(name: str) -> Any:
    return not_provided(name, "")
