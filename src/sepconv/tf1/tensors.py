"""Tensors, dtypes and shapes by their legacy names, as thin aliases of `keras.ops`.

This is the vocabulary that legacy code writes around the layer, no more. Everything computes at
once, or symbolically on Keras tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

__all__ = [
    "DType",
    "TensorShape",
    "TensorSpec",
    "abs",
    "add",
    "add_n",
    "argmax",
    "as_dtype",
    "bfloat16",
    "bool",
    "cast",
    "concat",
    "constant",
    "convert_to_tensor",
    "divide",
    "equal",
    "exp",
    "expand_dims",
    "float16",
    "float32",
    "float64",
    "half",
    "identity",
    "int32",
    "int64",
    "is_tensor",
    "log",
    "matmul",
    "maximum",
    "minimum",
    "multiply",
    "no_op",
    "one_hot",
    "ones",
    "ones_like",
    "pow",
    "random_normal",
    "random_uniform",
    "reduce_max",
    "reduce_mean",
    "reduce_min",
    "reduce_sum",
    "reshape",
    "shape",
    "sqrt",
    "square",
    "squeeze",
    "stack",
    "stop_gradient",
    "subtract",
    "to_float",
    "transpose",
    "uint8",
    "zeros",
    "zeros_like",
]


class DType(str):
    """An element type: the Keras name of it, with the attributes that legacy code reads.

    Example:
        >>> import sepconv.tf1 as tf
        >>> tf.float32.name, tf.float32 == "float32", tf.float32.is_floating
        ('float32', True, True)
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        """The name, such as `float32`."""
        return str(self)

    @property
    def base_dtype(self) -> DType:
        """The type itself."""
        return self

    @property
    def as_numpy_dtype(self) -> Any:
        """The NumPy scalar type."""
        if self == "bfloat16":
            import ml_dtypes

            return ml_dtypes.bfloat16
        return np.dtype(str(self)).type

    @property
    def is_floating(self) -> Any:
        """Whether it is a floating-point type."""
        return "float" in self

    @property
    def is_integer(self) -> Any:
        """Whether it is an integer type."""
        return "int" in self

    @property
    def is_complex(self) -> Any:
        """Whether it is a complex type."""
        return "complex" in self


float16 = half = DType("float16")
bfloat16 = DType("bfloat16")
float32 = DType("float32")
float64 = DType("float64")
int32 = DType("int32")
int64 = DType("int64")
uint8 = DType("uint8")
bool = DType("bool")


def as_dtype(type_value: Any) -> DType:
    """Returns the `DType` of a name, a NumPy type or a backend's own type.

    Args:
        type_value: Such as `"float32"`, `numpy.float32`, `tensor.dtype`.

    Raises:
        TypeError: it names no type.

    Example:
        >>> import numpy as np
        >>> import sepconv.tf1 as tf
        >>> tf.as_dtype(np.float64) is tf.float64 or tf.as_dtype(np.float64) == tf.float64
        True
    """
    if isinstance(type_value, np.dtype):
        type_value = type_value.name
    elif isinstance(type_value, type) and issubclass(type_value, np.generic):
        type_value = np.dtype(type_value).name
    try:
        return DType(keras.backend.standardize_dtype(type_value))
    except (ValueError, TypeError):
        raise TypeError(
            f"`dtype` must name an element type. Received: dtype={type_value!r}"
        ) from None


class TensorShape(tuple[Any, ...]):
    """A shape: a tuple of sizes, `None` where one is not known.

    Example:
        >>> import sepconv.tf1 as tf
        >>> shape = tf.TensorShape([None, 8, 8, 3])
        >>> shape.as_list(), shape.ndims, shape[-1]
        ([None, 8, 8, 3], 4, 3)
    """

    def __new__(cls, dims: Iterable[Any]) -> TensorShape:
        """Makes a shape of sizes."""
        return super().__new__(cls, dims)

    def as_list(self) -> list[Any]:
        """Returns the sizes as a list."""
        return list(self)

    @property
    def ndims(self) -> int:
        """The number of dimensions."""
        return len(self)

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self)

    @property
    def dims(self) -> list[Any]:
        """The sizes as a list."""
        return list(self)

    def is_fully_defined(self) -> Any:
        """Returns whether every size is known."""
        return None not in self

    def num_elements(self) -> int | None:
        """Returns the product of the sizes, or `None` if one is not known."""
        return int(np.prod(self, dtype=np.int64)) if self.is_fully_defined() else None


class TensorSpec(NamedTuple):
    """Shape and element type of a tensor that is not there."""

    shape: Any
    dtype: Any = float32
    name: str | None = None


def constant(
    value: Any, dtype: Any = None, shape: Sequence[int] | None = None, name: str | None = None
) -> Any:
    """Returns a tensor of given values.

    Args:
        value: A number, nested lists or an array. Python floats become float32, integers int32; an
            array keeps its type.
        dtype: Element type, or `None`.
        shape: Sizes; a shorter value is continued with its last element. `None`: as the value.
        name: Not used.

    Example:
        >>> import sepconv.tf1 as tf
        >>> tf.constant(2.0, shape=[2]).shape == (2,)
        True
    """
    dtype = natural_dtype(value) if dtype is None else dtype
    array = to_numpy(value) if ops.is_tensor(value) else np.asarray(value)
    if shape is not None:
        array = continued(array, shape)
    return convert_to_tensor(array, dtype)


def continued(values: np.ndarray[Any, Any], shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Returns values in a shape; if they are too few, the last one goes on.

    Args:
        values: At least one.
        shape: Sizes.

    Raises:
        ValueError: they are too many.
    """
    flat = values.reshape(-1)
    count = int(np.prod(shape, dtype=np.int64))
    if flat.size > count:
        raise ValueError(
            f"`value` must have at most the {count} elements of the shape {tuple(shape)}. "
            f"Received: {flat.size} elements"
        )
    return np.concatenate([flat, np.repeat(flat[-1:], count - flat.size)]).reshape(tuple(shape))


def natural_dtype(value: Any) -> str | None:
    """Returns the element type that legacy code gives a value, or `None` if it gives it none.

    That is the type of an array or tensor, float32 for Python floats, int32 for Python integers.

    Args:
        value: An array, a tensor, a number, or nested lists of numbers.
    """
    if hasattr(value, "dtype"):
        name: str = keras.backend.standardize_dtype(value.dtype)
        return name
    return {"f": "float32", "i": "int32", "u": "int32", "b": "bool"}.get(
        np.asarray(value).dtype.kind
    )


def convert_to_tensor(value: Any, dtype: Any = None, name: str | None = None) -> Any:
    """Returns a tensor of the backend with the element type of `value`, or with the given one.

    Args:
        value: A tensor, a variable, an array, a number or nested lists.
        dtype: Element type; `None` stands for that of an array, float32 for Python floats, int32
            for Python integers.
        name: Not used.
    """
    dtype = natural_dtype(value) if dtype is None else dtype
    if dtype is not None:
        dtype = as_dtype(dtype)
        allow_float64(dtype)
    return ops.convert_to_tensor(value, dtype=dtype)


def to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    """Returns a tensor as an array.

    Args:
        tensor: Of the backend; a variable's value, say.
    """
    # As Keras does it, NumPy 2 warns of torch and TensorFlow.
    if keras.backend.backend() == "tensorflow" and hasattr(tensor, "numpy"):
        return np.asarray(tensor.numpy())
    if keras.backend.backend() != "torch" or not hasattr(tensor, "detach"):
        return np.asarray(keras.ops.convert_to_numpy(tensor))
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        import ml_dtypes

        return np.asarray(tensor.float().numpy().astype(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


def allow_float64(dtype: str) -> None:
    """Switches 64-bit types on in JAX when float64 is asked for and they are off.

    The layer promises to stay in float64 for float64 data. JAX would round to float32 silently; the
    switch is process-wide and said once in the log.

    Args:
        dtype: Name of an element type.
    """
    if dtype != "float64" or keras.backend.backend() != "jax":
        return
    import jax

    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        import logging

        logging.getLogger("sepconv").info(
            "float64 data: switching on jax_enable_x64 for this process"
        )
        jax.config.update("jax_enable_x64", True)


def _filled(value: int, function: str) -> Callable[..., Any]:
    def filled(shape: Any, dtype: Any = float32, name: str | None = None) -> Any:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return convert_to_tensor(np.full(shape, value, np.int8), dtype)

    filled.__name__ = filled.__qualname__ = function
    filled.__doc__ = f"Returns a tensor of {function}: `{function}(shape, dtype=tf.float32)`."
    return filled


zeros = _filled(0, "zeros")
ones = _filled(1, "ones")


def operand(value: Any) -> Any:
    """Returns what an operation of the backend takes: a tensor, or a number as it is.

    Args:
        value: A tensor, a variable, an array, a number or nested lists.
    """
    if isinstance(value, keras.Variable):
        return value.value
    return convert_to_tensor(value) if isinstance(value, (np.ndarray, list, tuple)) else value


def _reduction(function: str, operation: Callable[..., Any]) -> Callable[..., Any]:
    def reduction(
        input_tensor: Any,
        axis: Any = None,
        keepdims: Any = None,
        name: str | None = None,
        reduction_indices: Any = None,
        keep_dims: Any = None,
    ) -> Any:
        axis = reduction_indices if axis is None else axis
        axis = tuple(axis) if isinstance(axis, list) else axis
        keep = keepdims or keep_dims or False
        return operation(operand(input_tensor), axis=axis, keepdims=keep)

    reduction.__name__ = reduction.__qualname__ = function
    reduction.__doc__ = (
        f"Reduces a tensor along `axis` (all axes by default): `{function}(input_tensor, axis)`."
    )
    return reduction


reduce_sum = _reduction("reduce_sum", ops.sum)
reduce_mean = _reduction("reduce_mean", ops.mean)
reduce_max = _reduction("reduce_max", ops.max)
reduce_min = _reduction("reduce_min", ops.min)


def _elementwise(function: str, operation: Callable[..., Any], operands: int) -> Callable[..., Any]:
    def elementwise(*tensors: Any, name: str | None = None) -> Any:
        if len(tensors) != operands:
            raise TypeError(
                f"`{function}` takes {operands} tensors. Received: {len(tensors)} tensors"
            )
        return operation(*(operand(tensor) for tensor in tensors))

    elementwise.__name__ = elementwise.__qualname__ = function
    elementwise.__doc__ = f"Computes `{function}` elementwise, of {operands} tensor(s)."
    return elementwise


abs = _elementwise("abs", ops.absolute, 1)
square = _elementwise("square", ops.square, 1)
sqrt = _elementwise("sqrt", ops.sqrt, 1)
exp = _elementwise("exp", ops.exp, 1)
log = _elementwise("log", ops.log, 1)
add = _elementwise("add", ops.add, 2)
subtract = _elementwise("subtract", ops.subtract, 2)
multiply = _elementwise("multiply", ops.multiply, 2)
divide = _elementwise("divide", ops.divide, 2)
maximum = _elementwise("maximum", ops.maximum, 2)
minimum = _elementwise("minimum", ops.minimum, 2)
pow = _elementwise("pow", ops.power, 2)
equal = _elementwise("equal", ops.equal, 2)
matmul = _elementwise("matmul", ops.matmul, 2)
stop_gradient = _elementwise("stop_gradient", ops.stop_gradient, 1)
zeros_like = _elementwise("zeros_like", ops.zeros_like, 1)
ones_like = _elementwise("ones_like", ops.ones_like, 1)
is_tensor = ops.is_tensor


def add_n(inputs: Sequence[Any], name: str | None = None) -> Any:
    """Returns the sum of a list of tensors.

    Args:
        inputs: At least one tensor; all of one shape.
        name: Not used.

    Raises:
        ValueError: the list is empty.
    """
    if len(inputs) == 0:
        raise ValueError("`inputs` must hold at least one tensor. Received: inputs=[]")
    total = operand(inputs[0])
    for tensor in inputs[1:]:
        total = ops.add(total, operand(tensor))
    return total


def identity(input: Any, name: str | None = None) -> Any:
    """Returns the tensor, or a variable's value."""
    return convert_to_tensor(input)


def cast(x: Any, dtype: Any, name: str | None = None) -> Any:
    """Returns a tensor in another element type."""
    dtype = as_dtype(dtype)
    allow_float64(dtype)
    return ops.cast(operand(x), dtype)


def to_float(x: Any, name: str = "ToFloat") -> Any:
    """Returns a tensor in float32."""
    return cast(x, float32)


def reshape(tensor: Any, shape: Sequence[int], name: str | None = None) -> Any:
    """Returns a tensor in another shape; one size may be -1."""
    return ops.reshape(operand(tensor), tuple(shape))


def transpose(a: Any, perm: Sequence[int] | None = None, name: str | None = None) -> Any:
    """Returns a tensor with its axes permuted, reversed by default."""
    return ops.transpose(operand(a), perm)


def concat(values: Sequence[Any], axis: int, name: str = "concat") -> Any:
    """Returns tensors joined along an axis."""
    return ops.concatenate([operand(value) for value in values], axis=axis)


def stack(values: Sequence[Any], axis: int = 0, name: str = "stack") -> Any:
    """Returns tensors stacked along a new axis."""
    return ops.stack([operand(value) for value in values], axis=axis)


def expand_dims(input: Any, axis: int, name: str | None = None) -> Any:
    """Returns a tensor with an axis of size 1 more."""
    return ops.expand_dims(operand(input), axis)


def squeeze(input: Any, axis: Any = None, name: str | None = None) -> Any:
    """Returns a tensor without its axes of size 1, or without the given ones."""
    return ops.squeeze(operand(input), axis=tuple(axis) if isinstance(axis, list) else axis)


def shape(input: Any, name: str | None = None) -> Any:
    """Returns the shape of a tensor."""
    return ops.shape(operand(input))


def argmax(input: Any, axis: int = 0, name: str | None = None) -> Any:
    """Returns the index of the largest element along an axis."""
    return ops.argmax(operand(input), axis=axis)


def one_hot(indices: Any, depth: int, dtype: Any = float32, name: str | None = None) -> Any:
    """Returns vectors that are 1 at the index and 0 elsewhere."""
    return ops.one_hot(operand(indices), depth, dtype=dtype)


def random_normal(
    shape: Sequence[int],
    mean: float = 0.0,
    stddev: float = 1.0,
    dtype: Any = float32,
    seed: int | None = None,
    name: str | None = None,
) -> Any:
    """Returns normally distributed values."""
    return keras.random.normal(tuple(shape), mean, stddev, dtype=dtype, seed=seed)


def random_uniform(
    shape: Sequence[int],
    minval: float = 0.0,
    maxval: float = 1.0,
    dtype: Any = float32,
    seed: int | None = None,
    name: str | None = None,
) -> Any:
    """Returns values uniform between `minval` and `maxval`."""
    return keras.random.uniform(tuple(shape), minval, maxval, dtype=dtype, seed=seed)


def no_op(name: str | None = None) -> None:
    """Does nothing: there are no operations to group here."""
