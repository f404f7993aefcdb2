"""Initializers by their legacy names and arguments, and how a variable gets its first value.

The classes are Keras initializers. A Keras initializer without a seed repeats itself: the same
object gives two variables of one shape the same values. Legacy code hands one object to a whole
network (as the initializer of a scope, say), so a variable here takes a fresh seed instead, from
its graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from sepconv.tf1 import graphs
from sepconv.tf1.tensors import allow_float64, continued

__all__ = [
    "constant",
    "constant_initializer",
    "glorot_normal",
    "glorot_normal_initializer",
    "glorot_uniform",
    "glorot_uniform_initializer",
    "he_normal",
    "he_uniform",
    "identity",
    "identity_initializer",
    "lecun_normal",
    "lecun_uniform",
    "ones",
    "ones_initializer",
    "orthogonal",
    "orthogonal_initializer",
    "random_normal",
    "random_normal_initializer",
    "random_uniform",
    "random_uniform_initializer",
    "truncated_normal",
    "truncated_normal_initializer",
    "uniform_unit_scaling",
    "uniform_unit_scaling_initializer",
    "variance_scaling",
    "variance_scaling_initializer",
    "zeros",
    "zeros_initializer",
]


class _Legacy:
    """Takes the call of legacy code: `initializer(shape, dtype=None, partition_info=None)`."""

    _dtype: Any = None

    def __call__(self, shape: Any, dtype: Any = None, partition_info: Any = None) -> Any:
        """Returns a value for a variable."""
        dtype = dtype or self._dtype or "float32"
        return super().__call__(tuple(shape), dtype=dtype)  # type: ignore[misc]

    def plain(self) -> keras.initializers.Initializer:
        """Returns the Keras initializer that this one is an alias of."""
        keras_class: Any = next(c for c in type(self).__mro__ if c.__module__.startswith("keras."))
        config = self.get_config()  # type: ignore[attr-defined]
        plain: keras.initializers.Initializer = keras_class.from_config(config)
        return plain


class zeros_initializer(_Legacy, keras.initializers.Zeros):
    """All zeros.

    Args:
        dtype: Element type if the call names none.
    """

    def __init__(self, dtype: Any = None) -> None:
        self._dtype = dtype


class ones_initializer(_Legacy, keras.initializers.Ones):
    """All ones.

    Args:
        dtype: Element type if the call names none.
    """

    def __init__(self, dtype: Any = None) -> None:
        self._dtype = dtype


@keras.saving.register_keras_serializable(package="sepconv")
class constant_initializer(keras.initializers.Initializer):
    """Given values.

    Args:
        value: A number, or as many values as the variable has, or fewer: the last one goes on.
        dtype: Element type if the call names none.
        verify_shape: Whether `value` must have the shape of the variable.

    Example:
        >>> import sepconv.tf1 as tf
        >>> with tf.Graph().as_default():
        ...     v = tf.get_variable("v", [2], initializer=tf.constant_initializer([1, 2]))
        ...     v.numpy().tolist()
        [1.0, 2.0]
    """

    def __init__(self, value: Any = 0, dtype: Any = None, verify_shape: bool = False) -> None:
        self.value = value
        self._dtype = dtype
        self.verify_shape = verify_shape

    def __call__(self, shape: Any, dtype: Any = None, partition_info: Any = None) -> Any:
        """Returns a value for a variable."""
        shape = tuple(shape)
        values = np.asarray(self.value)
        if self.verify_shape and values.shape != shape:
            raise ValueError(
                "`value` must have the shape of the variable. "
                f"Received: value of shape {values.shape} for a variable of shape {shape}"
            )
        values = continued(values, shape)
        return ops.convert_to_tensor(values, dtype=dtype or self._dtype or "float32")

    def plain(self) -> keras.initializers.Initializer:
        """Returns Keras's constant initializer if the value is a number, else this one."""
        if np.ndim(self.value) == 0:
            return keras.initializers.Constant(self.value)
        return self

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, ready for JSON."""
        return {"value": np.asarray(self.value).tolist(), "verify_shape": self.verify_shape}


class random_uniform_initializer(_Legacy, keras.initializers.RandomUniform):
    """Uniform between two bounds.

    Args:
        minval: Lower bound.
        maxval: Upper bound; `None` stands for 1.
        seed: An integer makes every variable get the same values; `None` gives each its own.
        dtype: Element type if the call names none.
    """

    def __init__(
        self, minval: float = 0.0, maxval: float | None = None, seed: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(minval, 1.0 if maxval is None else maxval, seed)
        self._dtype = dtype


class random_normal_initializer(_Legacy, keras.initializers.RandomNormal):
    """Normally distributed.

    Args:
        mean: Mean.
        stddev: Standard deviation.
        seed: As in `random_uniform_initializer`.
        dtype: Element type if the call names none.
    """

    def __init__(
        self, mean: float = 0.0, stddev: float = 1.0, seed: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(mean, stddev, seed)
        self._dtype = dtype


class truncated_normal_initializer(_Legacy, keras.initializers.TruncatedNormal):
    """Normally distributed, redrawn beyond two standard deviations.

    Args:
        mean: Mean.
        stddev: Standard deviation before the cut.
        seed: As in `random_uniform_initializer`.
        dtype: Element type if the call names none.
    """

    def __init__(
        self, mean: float = 0.0, stddev: float = 1.0, seed: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(mean, stddev, seed)
        self._dtype = dtype


class variance_scaling_initializer(_Legacy, keras.initializers.VarianceScaling):
    """Scaled by the number of inputs or outputs of a weight.

    Args:
        scale: Factor of the variance.
        mode: `fan_in`, `fan_out` or `fan_avg`.
        distribution: `uniform`, `truncated_normal`, `untruncated_normal`, or `normal`, which means
            the truncated one.
        seed: As in `random_uniform_initializer`.
        dtype: Element type if the call names none.
    """

    def __init__(
        self,
        scale: float = 1.0,
        mode: str = "fan_in",
        distribution: str = "truncated_normal",
        seed: Any = None,
        dtype: Any = None,
    ) -> None:
        distribution = "truncated_normal" if distribution == "normal" else distribution
        super().__init__(scale, mode, distribution, seed)
        self._dtype = dtype


class uniform_unit_scaling_initializer(_Legacy, keras.initializers.VarianceScaling):
    """Uniform on (-factor*sqrt(3/n), factor*sqrt(3/n)), n the number of inputs of a weight.

    Args:
        factor: Factor of the bound.
        seed: As in `random_uniform_initializer`.
        dtype: Element type if the call names none.
    """

    def __init__(self, factor: float = 1.0, seed: Any = None, dtype: Any = None) -> None:
        super().__init__(factor**2, "fan_in", "uniform", seed)
        self._dtype = dtype


class glorot_uniform_initializer(_Legacy, keras.initializers.GlorotUniform):
    """Uniform on (-L, L), L = sqrt(6 / (fan_in + fan_out)).

    Args:
        seed: As in `random_uniform_initializer`.
        dtype: Element type if the call names none.
    """

    def __init__(self, seed: Any = None, dtype: Any = None) -> None:
        super().__init__(seed)
        self._dtype = dtype


class glorot_normal_initializer(_Legacy, keras.initializers.GlorotNormal):
    """Truncated normal of standard deviation sqrt(2 / (fan_in + fan_out)).

    Args:
        seed: As in `random_uniform_initializer`.
        dtype: Element type if the call names none.
    """

    def __init__(self, seed: Any = None, dtype: Any = None) -> None:
        super().__init__(seed)
        self._dtype = dtype


class orthogonal_initializer(_Legacy, keras.initializers.Orthogonal):
    """Rows or columns orthogonal to each other.

    Args:
        gain: Factor.
        seed: As in `random_uniform_initializer`.
        dtype: Element type if the call names none.
    """

    def __init__(self, gain: float = 1.0, seed: Any = None, dtype: Any = None) -> None:
        super().__init__(gain, seed)
        self._dtype = dtype


class identity_initializer(_Legacy, keras.initializers.Identity):
    """The identity matrix.

    Args:
        gain: Factor.
        dtype: Element type if the call names none.
    """

    def __init__(self, gain: float = 1.0, dtype: Any = None) -> None:
        super().__init__(gain)
        self._dtype = dtype


zeros = zeros_initializer
ones = ones_initializer
constant = constant_initializer
random_uniform = random_uniform_initializer
random_normal = random_normal_initializer
truncated_normal = truncated_normal_initializer
variance_scaling = variance_scaling_initializer
uniform_unit_scaling = uniform_unit_scaling_initializer
glorot_uniform = glorot_uniform_initializer
glorot_normal = glorot_normal_initializer
orthogonal = orthogonal_initializer
identity = identity_initializer
he_normal = keras.initializers.HeNormal
he_uniform = keras.initializers.HeUniform
lecun_normal = keras.initializers.LecunNormal
lecun_uniform = keras.initializers.LecunUniform


def plain(initializer: Any) -> Any:
    """Returns an initializer as stock Keras knows it; anything that is no alias, as it is.

    Args:
        initializer: Any initializer, or `None`.
    """
    return initializer.plain() if hasattr(initializer, "plain") else initializer


def for_variable(
    initializer: Any, name: str, default: Callable[[], Any] = keras.initializers.GlorotUniform
) -> Callable[..., Any]:
    """Returns what gives one variable its first value, as a function of `(shape, dtype=...)`.

    Args:
        initializer: A Keras initializer, a function of `(shape, dtype=...)` and perhaps
            `partition_info`, a class of these, or `None`.
        name: Name of the variable, for the error.
        default: Makes the initializer that `None` stands for.

    Returns:
        A function that gives the same value at every call and raises `ValueError` where the
        initializer returns another shape.
    """
    if initializer is None:
        initializer = default()
    elif inspect.isclass(initializer):
        initializer = initializer()
    initializer = _with_own_seed(initializer)
    try:
        takes_partition = "partition_info" in inspect.signature(initializer).parameters
    except (TypeError, ValueError):
        takes_partition = False
    extra = {"partition_info": None} if takes_partition else {}

    def first_value(shape: Sequence[int], dtype: Any = None) -> Any:
        allow_float64(dtype)
        value = ops.convert_to_tensor(initializer(tuple(shape), dtype=dtype, **extra), dtype=dtype)
        if tuple(value.shape) != tuple(shape):
            raise ValueError(
                f"The initializer of variable {name} must return the shape {tuple(shape)}. "
                f"Received: {tuple(value.shape)}"
            )
        return value

    return first_value


def _with_own_seed(initializer: Any) -> Any:
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    keras_initializer = plain(initializer)
    config = keras_initializer.get_config()
    if config.get("seed", 0) is not None:
        return initializer
    config["seed"] = graphs.get_default_graph().next_seed()
    return type(keras_initializer).from_config(config)
