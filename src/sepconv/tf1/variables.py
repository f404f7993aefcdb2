"""Variables with the names that legacy code knows: Keras variables of the active backend."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from sepconv.tf1 import graphs
from sepconv.tf1.tensors import DType, TensorShape, allow_float64, natural_dtype, to_numpy

__all__ = ["Variable"]


class _Op(NamedTuple):
    """What legacy code reads of the operation behind a variable."""

    name: str
    type: str = "VarHandleOp"


class Variable(keras.Variable):
    """A Keras variable whose `name` is its full name with `:0` behind it, as in a legacy graph.

    `variable.op.name`, which checkpoints use, and `variable.path` have no `:0`. `trainable` is
    fixed when the variable is made; `constraint` is the very object given, and optimizers apply it
    after each update. The variable has its value from the start: there is nothing to initialize
    later.

    Args:
        initial_value: An array, a tensor, a number, or a function of no arguments that returns one.
        trainable: Whether optimizers may change it, and so whether it is in `TRAINABLE_VARIABLES`.
        collections: Keys of the collections to put it in; `None` stands for `GLOBAL_VARIABLES`.
        name: Name in the current variable scope's graph; made unique. `None` stands for `Variable`.
        dtype: Element type; `None` stands for that of the value (float32 for Python floats).
        constraint: A function of the variable that returns its projected value.

    Raises:
        ValueError: `initial_value` is `None`.

    Example:
        >>> import sepconv.tf1 as tf
        >>> with tf.Graph().as_default():
        ...     step = tf.Variable(0, trainable=False, name="global_step")
        ...     step.name, step.op.name, tf.trainable_variables()
        ('global_step:0', 'global_step', [])
    """

    def __init__(
        self,
        initial_value: Any = None,
        trainable: bool = True,
        collections: Sequence[str] | None = None,
        *,
        name: str | None = None,
        dtype: Any = None,
        constraint: Callable[[Any], Any] | None = None,
    ) -> None:
        if initial_value is None:
            raise ValueError("`initial_value` must be specified. Received: initial_value=None")
        value = initial_value() if callable(initial_value) else initial_value
        dtype = natural_dtype(value) if dtype is None else dtype
        allow_float64(dtype)
        # Keras refuses plain values while a function is being traced, but takes initializers there.
        self._setup(
            lambda shape, dtype: keras.ops.convert_to_tensor(value, dtype=dtype),
            graphs.get_default_graph().unique_name(name or "Variable"),
            tuple(np.shape(value)),
            dtype,
            trainable,
            constraint,
        )
        self.record(collections)

    @classmethod
    def made(
        cls,
        initializer: Callable[..., Any],
        full_name: str,
        shape: Sequence[int],
        dtype: Any,
        trainable: bool,
        constraint: Callable[[Any], Any] | None,
    ) -> Variable:
        """Makes a variable of a given full name, and enters it nowhere.

        Args:
            initializer: Called with `(shape, dtype=...)`.
            full_name: Scope and name, without `:0`.
            shape: Sizes.
            dtype: Element type.
            trainable: Whether optimizers may change it.
            constraint: A function of the variable, or `None`.
        """
        variable = cls.__new__(cls)
        variable._setup(initializer, full_name, tuple(shape), dtype, trainable, constraint)
        return variable

    def _setup(
        self,
        initializer: Callable[..., Any],
        full_name: str,
        shape: tuple[int, ...],
        dtype: Any,
        trainable: bool,
        constraint: Callable[[Any], Any] | None,
    ) -> None:
        self._full_name: str | None = None
        self._owners: weakref.WeakSet[Any] = weakref.WeakSet()
        dtype = keras.backend.standardize_dtype(dtype)
        super().__init__(
            initializer,
            shape=shape,
            dtype=dtype,
            trainable=bool(trainable) and keras.backend.is_float_dtype(dtype),
            name=full_name.rpartition("/")[2] or "variable",
        )
        # The flag is a mark for collections here; torch has no gradient for integers to switch on.
        self._trainable = bool(trainable)
        # Keras refuses names with a slash and backends refuse those with a colon, so the full name
        # takes over once the value exists.
        self._full_name = full_name
        self.constraint = constraint

    def _convert_to_tensor(self, value: Any, dtype: Any = None) -> Any:
        # Where no type is named, Keras's NumPy backend rounds float64 to float32.
        return super()._convert_to_tensor(value, dtype=dtype or self._dtype)

    def record(self, collections: Sequence[str] | None = None) -> None:
        """Puts the variable into collections of the current graph; without one, does nothing.

        Args:
            collections: Keys; `None` stands for `GLOBAL_VARIABLES`.
        """
        graph = graphs.graph_mode()
        if graph is None:
            return
        keys = [graphs.GraphKeys.GLOBAL_VARIABLES] if collections is None else list(collections)
        if self.trainable and graphs.GraphKeys.TRAINABLE_VARIABLES not in keys:
            keys.append(graphs.GraphKeys.TRAINABLE_VARIABLES)
        graph.add_to_collections(keys, self)

    @property
    def name(self) -> str:
        """The full name with `:0` behind it."""
        name: str = super().name
        return name if self._full_name is None else f"{self._full_name}:0"

    @property
    def op(self) -> _Op:
        """Its `name` is the full name, without `:0`."""
        return _Op(self.path if self._full_name is None else self._full_name)

    @property
    def path(self) -> str:
        """The name that Keras goes by: the full name."""
        if self._full_name is None:
            path: str = super().path
            return path
        # torch does not register parameters with a dot in their name.
        return self._full_name.replace(".", "_")

    @property
    def dtype(self) -> DType:
        """The element type."""
        return DType(super().dtype)

    @property
    def trainable(self) -> bool:
        """Whether optimizers may change it: as it was made, whatever its layer's flag says.

        Where a Keras model runs the layers that own the variable, it is `False` while all of them
        are frozen: Keras asks the variable, not the layer.
        """
        return self._trainable and not self._frozen_in_keras_model()

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.Variable.trainable.fset(self, value)

    def _frozen_in_keras_model(self) -> bool:
        owners = list(self._owners)
        return any(owner.runs_in_keras_model for owner in owners) and not any(
            owner.trainable for owner in owners
        )

    def owned_by(self, layer: Any) -> None:
        """Notes a layer that uses the variable.

        Args:
            layer: Has `runs_in_keras_model` and `trainable`.
        """
        self._owners.add(layer)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        # Keras's own takes no `copy`, about which NumPy 2 warns.
        values = to_numpy(self.value)
        return np.array(values, dtype=dtype) if copy else np.asarray(values, dtype=dtype)

    def get_shape(self) -> TensorShape:
        """Returns the shape."""
        return TensorShape(self.shape)

    def read_value(self) -> Any:
        """Returns the value now, a tensor."""
        return keras.ops.convert_to_tensor(self)

    def initialized_value(self) -> Any:
        """Returns the value now, a tensor: a variable here is always initialized."""
        return self.read_value()
