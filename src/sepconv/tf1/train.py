"""`tf.train`: optimizers whose `minimize` takes the loss as a function.

So it is in the original's eager mode: there is no session that could compute a gradient later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from sepconv.tf1 import graphs
from sepconv.tf1.provided import not_provided

__all__ = [
    "AdamOptimizer",
    "GradientDescentOptimizer",
    "MomentumOptimizer",
    "Optimizer",
    "value_and_gradients",
]


def value_and_gradients(loss: Callable[[], Any], variables: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Computes a loss and its gradients with respect to variables.

    Activity losses of calls made by `loss` are in `REGULARIZATION_LOSSES` while it runs, and gone
    after it. Changes that it makes to other variables, such as moving averages, stay.

    Args:
        loss: A function of no arguments that returns a scalar tensor.
        variables: Variables that exist.

    Returns:
        (loss, one gradient per variable; `None` for a variable that the loss does not depend on).

    Raises:
        NotImplementedError: the NumPy backend has no gradients.

    Example:
        >>> import sepconv.tf1 as tf
        >>> with tf.Graph().as_default():
        ...     v = tf.get_variable("v", [1], initializer=tf.constant_initializer(3.0))
        ...     value, (gradient,) = tf.train.value_and_gradients(
        ...         lambda: tf.reduce_sum(tf.square(v)), [v])
        ...     float(value), float(gradient[0])
        (9.0, 6.0)
    """
    backends = {"jax": _with_jax, "torch": _with_torch, "tensorflow": _with_tensorflow}
    name = keras.backend.backend()
    if name not in backends:
        raise NotImplementedError(
            f"The Keras backend {name!r} has no gradients: train with jax, torch or tensorflow."
        )
    with graphs.get_default_graph().step():
        return backends[name](loss, list(variables))


class _RecordingScope(keras.StatelessScope):
    """Remembers which variables were assigned inside it."""

    def __init__(self, state_mapping: Any) -> None:
        super().__init__(state_mapping=state_mapping, collect_losses=True)
        self.assigned: dict[int, Any] = {}

    def add_update(self, update: Any) -> None:
        super().add_update(update)
        self.assigned[id(update[0])] = update[0]


def _with_jax(loss: Callable[[], Any], variables: list[Any]) -> tuple[Any, list[Any]]:
    import jax

    assigned: list[Any] = []

    def computed(values: list[Any]) -> tuple[Any, list[Any]]:
        with _RecordingScope(list(zip(variables, values, strict=True))) as scope:
            value = loss()
            assigned[:] = scope.assigned.values()
            return value, [scope.get_current_value(variable) for variable in assigned]

    values = [variable.value for variable in variables]
    (value, updates), gradients = jax.value_and_grad(computed, has_aux=True)(values)
    for variable, update in zip(assigned, updates, strict=True):
        variable.assign(update)
    return value, gradients


def _with_torch(loss: Callable[[], Any], variables: list[Any]) -> tuple[Any, list[Any]]:
    import torch

    value = loss()
    parameters = [variable.value for variable in variables]
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return value.detach(), list(gradients)


def _with_tensorflow(loss: Callable[[], Any], variables: list[Any]) -> tuple[Any, list[Any]]:
    import tensorflow

    values = [variable.value for variable in variables]
    with tensorflow.GradientTape() as tape:
        value = loss()
    return value, tape.gradient(value, values)


class Optimizer:
    """A Keras optimizer by its legacy methods.

    Constraints of the variables are applied after each update.

    Args:
        keras_optimizer: Does the update.
    """

    def __init__(self, keras_optimizer: keras.optimizers.Optimizer) -> None:
        self.keras_optimizer = keras_optimizer

    def compute_gradients(
        self, loss: Callable[[], Any], var_list: Sequence[Any] | None = None, **_: Any
    ) -> list[tuple[Any, Any]]:
        """Returns pairs of gradient and variable.

        Args:
            loss: A function of no arguments that returns a scalar tensor.
            var_list: Variables that exist; `None` stands for the collection `TRAINABLE_VARIABLES`.

        Raises:
            TypeError: `loss` is a tensor.
            ValueError: there are no variables.
        """
        if not callable(loss):
            raise TypeError(
                "`loss` must be a function of no arguments that computes the loss: a tensor here "
                f"is a value, not a graph to differentiate. Received: loss={loss!r}"
            )
        variables = list(graphs.trainable_variables() if var_list is None else var_list)
        if not variables:
            raise ValueError(
                "No variables to optimize: `var_list` is empty, or it is None and the graph has no "
                "trainable variables yet. Call the network once first."
            )
        _, gradients = value_and_gradients(loss, variables)
        return list(zip(gradients, variables, strict=True))

    def apply_gradients(
        self, grads_and_vars: Sequence[tuple[Any, Any]], global_step: Any = None, name: Any = None
    ) -> None:
        """Updates variables, then applies their constraints.

        Args:
            grads_and_vars: Pairs of gradient and variable; those without a gradient are left alone.
            global_step: A variable to count up, or `None`.
            name: Not used.
        """
        pairs = list(grads_and_vars)
        if not self.keras_optimizer.built:
            self.keras_optimizer.build([variable for _, variable in pairs])
        present = [(gradient, variable) for gradient, variable in pairs if gradient is not None]
        if not present:
            raise ValueError("`grads_and_vars` must have at least one gradient that is not None.")
        self.keras_optimizer.apply_gradients(present)
        if global_step is not None:
            global_step.assign(global_step + 1)

    def minimize(
        self,
        loss: Callable[[], Any],
        global_step: Any = None,
        var_list: Sequence[Any] | None = None,
        **_: Any,
    ) -> None:
        """Takes one step: `compute_gradients`, then `apply_gradients`.

        Args:
            loss: A function of no arguments that returns a scalar tensor.
            global_step: A variable to count up, or `None`.
            var_list: Variables that exist; `None` stands for the collection `TRAINABLE_VARIABLES`.

        Raises:
            TypeError: `loss` is a tensor.
            ValueError: there are no variables.
        """
        self.apply_gradients(self.compute_gradients(loss, var_list), global_step)


class GradientDescentOptimizer(Optimizer):
    """`v -= learning_rate * g`.

    Args:
        learning_rate: A number.
        use_locking: Not used.
        name: Not used.

    Example:
        >>> import sepconv.tf1 as tf
        >>> with tf.Graph().as_default():
        ...     v = tf.get_variable("v", [1], initializer=tf.constant_initializer(3.0))
        ...     optimizer = tf.train.GradientDescentOptimizer(0.5)
        ...     optimizer.minimize(lambda: tf.reduce_sum(tf.square(v)))
        ...     v.numpy().tolist()
        [0.0]
    """

    def __init__(
        self, learning_rate: Any, use_locking: bool = False, name: str = "GradientDescent"
    ) -> None:
        super().__init__(keras.optimizers.SGD(learning_rate))


class MomentumOptimizer(Optimizer):
    """`a = momentum * a + g; v -= learning_rate * a`.

    Args:
        learning_rate: A number.
        momentum: A number.
        use_locking: Not used.
        name: Not used.
        use_nesterov: Whether to step by the gradient ahead.
    """

    def __init__(
        self,
        learning_rate: Any,
        momentum: float,
        use_locking: bool = False,
        name: str = "Momentum",
        use_nesterov: bool = False,
    ) -> None:
        super().__init__(
            keras.optimizers.SGD(learning_rate, momentum=momentum, nesterov=use_nesterov)
        )


class AdamOptimizer(Optimizer):
    """Adam, with the original's `epsilon`.

    Args:
        learning_rate: A number.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        epsilon: Added to the square root.
        use_locking: Not used.
        name: Not used.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        use_locking: bool = False,
        name: str = "Adam",
    ) -> None:
        super().__init__(
            keras.optimizers.Adam(learning_rate, beta_1=beta1, beta_2=beta2, epsilon=epsilon)
        )


def __getattr__(name: str) -> Any:
    return not_provided(name, "train")
