"""Names of the original that are not provided, and what to write instead."""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["NOT_PROVIDED", "not_provided"]

_SESSION = (
    "there is no graph execution, every call computes at once: "
    "call the network on arrays and use its result"
)
_INITIALIZE = "variables have their values as soon as they are made: delete the line"
_FEED = (
    "pass arrays to the network where the feed dict went in, or a keras.Input for a symbolic call"
)
_PARTITION = "variables are not split into parts: delete the argument"
_SAVE = "use keras.saving, or variable.op.name with variable.numpy() and variable.assign(value)"
_ASSIGN = "use the variable's own assign, assign_add or assign_sub, which act at once"
_OPTIMIZE = "use keras.optimizers with tf.train.value_and_gradients"
_PYTHON = "calls compute at once: use Python"
_OTHERS = "not part of what this layer needs"

NOT_PROVIDED: dict[str, dict[str, str]] = {
    "": {
        "ConfigProto": _SESSION,
        "GradientTape": "use tf.train.value_and_gradients(function, variables)",
        "InteractiveSession": _SESSION,
        "Session": _SESSION,
        "app": _OTHERS,
        "assign": _ASSIGN,
        "assign_add": _ASSIGN,
        "assign_sub": _ASSIGN,
        "cond": _PYTHON,
        "contrib": "use keras.regularizers and keras.initializers",
        "control_dependencies": _PYTHON,
        "data": _OTHERS,
        "device": _OTHERS,
        "estimator": _OTHERS,
        "fixed_size_partitioner": _PARTITION,
        "flags": _OTHERS,
        "function": "use jax.jit with stateless_call, or torch.compile",
        "gfile": _OTHERS,
        "global_variables_initializer": _INITIALIZE,
        "gradients": "use tf.train.value_and_gradients(function, variables)",
        "group": _PYTHON,
        "image": _OTHERS,
        "initialize_all_variables": _INITIALIZE,
        "local_variables_initializer": _INITIALIZE,
        "logging": "use Python's logging",
        "make_template": "use tf.variable_scope with reuse=tf.AUTO_REUSE",
        "min_max_variable_partitioner": _PARTITION,
        "placeholder": _FEED,
        "placeholder_with_default": _FEED,
        "py_func": _PYTHON,
        "saved_model": _SAVE,
        "summary": _OTHERS,
        "tables_initializer": _INITIALIZE,
        "variable_axis_size_partitioner": _PARTITION,
        "variables_initializer": _INITIALIZE,
        "while_loop": _PYTHON,
    },
    "layers": {
        "AveragePooling2D": "use keras.layers.AveragePooling2D",
        "BatchNormalization": "use keras.layers.BatchNormalization",
        "Conv2D": "use keras.layers.Conv2D",
        "Conv2DTranspose": "use keras.layers.Conv2DTranspose",
        "Dense": "use keras.layers.Dense",
        "Dropout": "use keras.layers.Dropout",
        "Flatten": "use keras.layers.Flatten",
        "MaxPooling2D": "use keras.layers.MaxPooling2D",
        "SeparableConv1D": "use keras.layers.SeparableConv1D",
        "average_pooling2d": "use tf.nn.avg_pool",
        "batch_normalization": "use keras.layers.BatchNormalization",
        "conv2d": "use tf.get_variable and tf.nn.conv2d, or keras.layers.Conv2D",
        "conv2d_transpose": "use keras.layers.Conv2DTranspose",
        "dense": "use tf.get_variable and tf.matmul, or keras.layers.Dense",
        "dropout": "use keras.layers.Dropout",
        "flatten": "use tf.reshape",
        "max_pooling2d": "use tf.nn.max_pool",
        "separable_conv1d": "use keras.layers.SeparableConv1D",
    },
    "losses": {
        "absolute_difference": "use keras.losses",
        "cosine_distance": "use keras.losses",
        "hinge_loss": "use keras.losses",
        "huber_loss": "use keras.losses",
        "log_loss": "use keras.losses",
        "sigmoid_cross_entropy": "use keras.losses",
    },
    "train": {
        "AdadeltaOptimizer": _OPTIMIZE,
        "AdagradOptimizer": _OPTIMIZE,
        "Checkpoint": _SAVE,
        "FtrlOptimizer": _OPTIMIZE,
        "MonitoredTrainingSession": _SESSION,
        "RMSPropOptimizer": _OPTIMIZE,
        "Saver": _SAVE,
        "get_or_create_global_step": "use tf.Variable(0, trainable=False, name='global_step')",
        "exponential_decay": "use keras.optimizers.schedules.ExponentialDecay",
    },
}
"""By module (`""` for `tf` itself) and name: what to write instead."""


class _NotProvided:
    """Stands for such a name: calling it, or reading an attribute of it, raises."""

    def __init__(self, name: str, instead: str) -> None:
        self.__name__ = name
        self._message = f"{name} is not provided by sepconv.tf1: {instead}."

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(self._message)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotImplementedError(self._message)


def not_provided(name: str, module: str) -> Any:
    """Returns what stands for a name that is not provided.

    Args:
        name: What legacy code wrote behind the dot.
        module: Where: `""` for `tf` itself, else such as `layers`.

    Returns:
        Something that raises `NotImplementedError`, with what to write instead, when used.

    Raises:
        AttributeError: the name is not listed.
    """
    path = f"tf.{module}.{name}" if module else f"tf.{name}"
    if name in NOT_PROVIDED[module]:
        return _NotProvided(path, NOT_PROVIDED[module][name])
    raise AttributeError(
        f"{path} is not provided: sepconv.tf1 has what legacy code writes around "
        "tf.layers.SeparableConv2D, see docs/migration-tf-layers.md"
    )
