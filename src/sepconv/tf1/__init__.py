"""`tf.layers.SeparableConv2D` as in TensorFlow 1, on JAX, PyTorch, NumPy or TensorFlow through Keras 3.

Legacy code that uses this layer changes one line:

    import sepconv.tf1 as tf        # was: import tensorflow.compat.v1 as tf

Variable scopes, reuse, names, collections and losses follow. There is no graph execution: calls compute
at once. Names that are not provided say so when they are used, and what to write instead.
"""

from __future__ import annotations

from typing import Any

import sepconv.keras  # noqa: F401 - picks the Keras backend before Keras is imported
import keras
from sepconv.tf1 import initializers, layers, losses, nn, train
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

def __getattr__(name: str) -> Any:
    return not_provided(name, "")
