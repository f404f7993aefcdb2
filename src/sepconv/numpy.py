"""The NumPy door: separable convolution and its gradients on arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, SupportsIndex

import numpy as np
import numpy.typing as npt

from sepconv.backends import choose
from sepconv.spec import ConvSpec, IntOrPair, canonical_padding, canonical_pair

__all__ = ["PreparedSeparableConv2D", "prepare", "separable_conv2d", "separable_conv2d_grad"]

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


def separable_conv2d(
    x: Array,
    depthwise_kernel: Array,
    pointwise_kernel: Array,
    bias: Array | None = None,
    *,
    strides: IntOrPair = 1,
    padding: str | Sequence[Sequence[SupportsIndex]] = "valid",
    dilation_rate: IntOrPair = 1,
    data_format: str = "channels_last",
    activation: str | None = None,
    input_activation: str | None = None,
    depthwise_bias: Array | None = None,
    depthwise_activation: str | None = None,
    out: Array | None = None,
) -> Array:
    """Computes a depthwise-separable 2-D convolution in one pass over memory.

        u[n, i, j, c*M + m] = sum over k, l of
            input_activation(x)[n, i*sh + k*dh - top, j*sw + l*dw - left, c] *
            depthwise_kernel[k, l, c, m]
        v = depthwise_activation(u + depthwise_bias)
        y[n, i, j, f] = activation(sum over q of v[n, i, j, q] * pointwise_kernel[0, 0, q, f] +
            bias[f])

    The input counts as zero outside the image, after `input_activation`. The kernel is not flipped.
    All arrays have the dtype of `x`: float32, float64, float16 or bfloat16 (of `ml_dtypes`). Sums
    run in float32, in float64 for float64; in the 16-bit dtypes, v is rounded as a stored array
    would be. The result does not depend on the number of threads.

    Args:
        x: Input, (batch, height, width, channels), or (batch, channels, height, width) for
            `data_format="channels_first"`. An array that is not contiguous is copied.
        depthwise_kernel: (kernel_height, kernel_width, channels, depth_multiplier), in both
            layouts.
        pointwise_kernel: (1, 1, channels * depth_multiplier, filters).
        bias: (filters,), or `None`.
        strides: An int, or one per direction.
        padding: `"valid"`, `"same"` (an odd row or column of zeros goes to the bottom or the right,
            as in TensorFlow), or `((top, bottom), (left, right))`.
        dilation_rate: An int, or one per direction.
        data_format: `"channels_last"` or `"channels_first"`.
        activation: One of `sepconv.spec.ACTIVATIONS`, `"swish"`, `"hard_swish"`, or `None`. Forms
            are those of Keras 3.
        input_activation: Activation of the input.
        depthwise_bias: Bias between the two stages, (channels * depth_multiplier,), or `None`.
        depthwise_activation: Activation between the two stages.
        out: Array for the result: contiguous, of its shape and dtype, apart from all inputs in
            memory. It saves what the system takes to hand out new memory.

    Returns:
        `out`, or a new array, (batch, out_height, out_width, filters) or as `data_format` says, in
        the dtype of `x`. It is empty when the kernel just does not fit.

    Raises:
        TypeError: a dtype is not supported or differs from that of `x`, or an argument is not of a
            type that it can be.
        ValueError: a shape or an argument is out of range, or `out` is not as said.

    Example:
        >>> import numpy as np
        >>> from sepconv.numpy import separable_conv2d
        >>> x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
        >>> depthwise_kernel = np.ones((3, 3, 1, 1), np.float32)
        >>> pointwise_kernel = np.array([[[[1, -1]]]], np.float32)
        >>> bias = np.array([-50, 50], np.float32)
        >>> y = separable_conv2d(x, depthwise_kernel, pointwise_kernel, bias, activation="relu")
        >>> y.shape
        (1, 2, 2, 2)
        >>> y[0, :, :, 0]
        array([[ 0.,  4.],
               [31., 40.]], dtype=float32)
        >>> separable_conv2d(x, depthwise_kernel, pointwise_kernel, strides=2, padding="same").shape
        (1, 2, 2, 2)
    """
    x, arrays, plan = _resolved(
        x,
        depthwise_kernel,
        pointwise_kernel,
        bias,
        depthwise_bias,
        strides,
        padding,
        dilation_rate,
        data_format,
        activation,
        input_activation,
        depthwise_activation,
    )
    y = _empty(plan, x.dtype) if out is None else _checked_out(out, plan, x, *arrays)
    if plan.storage is None:
        plan.forward(plan.geometry, x, *arrays, y)
    else:
        plan.forward(plan.geometry, *_views(plan.storage, x, *arrays, y), plan.dtype_code)
    return y


class PreparedSeparableConv2D:
    """A separable convolution whose weights are packed once, for any number of calls.

    `prepare` makes it. It holds copies of the weights and never changes: it may be called from
    several threads at once, with images of any size. Its results are those of `separable_conv2d`,
    to the bit.
    """

    __slots__ = ("_dtype", "_plan_of", "_weights")

    def __init__(
        self, dtype: np.dtype[Any], weights: Any, plan_of: Callable[[Shape], _Plan]
    ) -> None:
        self._dtype = dtype
        self._weights = weights
        self._plan_of = functools.lru_cache(maxsize=64)(plan_of)

    def __call__(self, x: Array, *, out: Array | None = None) -> Array:
        """Computes the convolution of `x`.

        Args:
            x: Input, (batch, height, width, channels) or as `data_format` says, in the dtype of the
                weights.
            out: As for `separable_conv2d`.

        Returns:
            `out`, or a new array.

        Raises:
            TypeError: another dtype than that of the weights, or something that is no array.
            ValueError: a shape is out of range, or `out` is not as `separable_conv2d` says.
        """
        x = _dense(x)
        dtype = self._dtype
        if x.dtype != dtype:
            _raise_dtypes_differ("x", x, dtype, "depthwise_kernel")
        plan = self._plan_of(x.shape)
        y = _empty(plan, dtype) if out is None else _checked_out(out, plan, x)
        if plan.storage is None:
            plan.forward_packed(plan.geometry, x, self._weights, y)
        else:
            plan.forward_packed(
                plan.geometry, x.view(plan.storage), self._weights, y.view(plan.storage)
            )
        return y


def prepare(
    depthwise_kernel: Array,
    pointwise_kernel: Array,
    bias: Array | None = None,
    *,
    strides: IntOrPair = 1,
    padding: str | Sequence[Sequence[SupportsIndex]] = "valid",
    dilation_rate: IntOrPair = 1,
    data_format: str = "channels_last",
    activation: str | None = None,
    input_activation: str | None = None,
    depthwise_bias: Array | None = None,
    depthwise_activation: str | None = None,
) -> PreparedSeparableConv2D:
    """Copies and packs the weights of a separable convolution, for many calls.

    Every call of `separable_conv2d` brings the pointwise kernel into the order in which the CPU
    reads it: with few pixels, several threads or bfloat16 that is a good part of the call. Where
    the weights stay the same, it need be done only once.

    Args:
        depthwise_kernel: (kernel_height, kernel_width, channels, depth_multiplier).
        pointwise_kernel: (1, 1, channels * depth_multiplier, filters).
        bias: (filters,), or `None`.
        strides: As for `separable_conv2d`, as are all arguments that follow.
        padding: `"valid"`, `"same"`, or `((top, bottom), (left, right))`.
        dilation_rate: An int, or one per direction.
        data_format: `"channels_last"` or `"channels_first"`.
        activation: Activation after the bias.
        input_activation: Activation of the input.
        depthwise_bias: Bias between the two stages, (channels * depth_multiplier,), or `None`.
        depthwise_activation: Activation between the two stages.

    Returns:
        A function of `x`. Later changes of the arrays do not reach it.

    Raises:
        TypeError: a dtype is not supported or differs from that of `depthwise_kernel`, or an
            argument is not of a type that it can be.
        ValueError: a shape or an argument is out of range.

    Example:
        >>> import numpy as np
        >>> from sepconv.numpy import prepare
        >>> kernels = np.ones((3, 3, 1, 1), np.float32), np.ones((1, 1, 1, 2), np.float32)
        >>> layer = prepare(*kernels, padding="same")
        >>> layer(np.ones((1, 4, 4, 1), np.float32))[0, :, :, 1]
        array([[4., 6., 6., 4.],
               [6., 9., 9., 6.],
               [6., 9., 9., 6.],
               [4., 6., 6., 4.]], dtype=float32)
    """
    kernel, pointwise = _dense(depthwise_kernel), _dense(pointwise_kernel)
    mid = None if depthwise_bias is None else _dense(depthwise_bias)
    end = None if bias is None else _dense(bias)
    dtype = kernel.dtype
    _check_dtype("depthwise_kernel", dtype)
    for name, array in (("pointwise_kernel", pointwise), ("depthwise_bias", mid), ("bias", end)):
        if array is not None and array.dtype != dtype:
            _raise_dtypes_differ(name, array, dtype, "depthwise_kernel")
    spec = ConvSpec(
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
        data_format=data_format,
        activation=activation,
        input_activation=input_activation,
        depthwise_activation=depthwise_activation,
    )
    end_shape = None if end is None else end.shape
    mid_shape = None if mid is None else mid.shape
    shapes = (kernel.shape, pointwise.shape, end_shape, mid_shape)
    names = (spec.activation, spec.input_activation, spec.depthwise_activation)
    # What is wrong with the weights shows on any image, as this one, in which every kernel fits.
    channels = (*kernel.shape, 1, 1, 1)[2]
    plan = _plan(
        dtype,
        (1, 1, 1, channels),
        *shapes,
        spec.strides,
        "same",
        spec.dilation_rate,
        "channels_last",
        *names,
    )
    key = (*shapes, spec.strides, spec.padding, spec.dilation_rate, spec.data_format, *names)
    operands: list[Array | None] = [kernel, pointwise, mid, end]
    if plan.storage is not None:
        operands = _views(plan.storage, *operands)
    weights = plan.pack(plan.geometry, *operands, plan.dtype_code)
    return PreparedSeparableConv2D(dtype, weights, lambda shape: _plan(dtype, shape, *key))


def separable_conv2d_grad(
    dy: Array,
    x: Array,
    depthwise_kernel: Array,
    pointwise_kernel: Array,
    bias: Array | None = None,
    *,
    strides: IntOrPair = 1,
    padding: str | Sequence[Sequence[SupportsIndex]] = "valid",
    dilation_rate: IntOrPair = 1,
    data_format: str = "channels_last",
    activation: str | None = None,
    input_activation: str | None = None,
    depthwise_bias: Array | None = None,
    depthwise_activation: str | None = None,
) -> tuple[Any, ...]:
    """Computes the gradients of `sum(dy * separable_conv2d(x, ...))`.

    The intermediate of the two stages is computed again, tile by tile, so nothing has to be kept
    from the forward call. The result does not depend on the number of threads, to the last bit.
    Where an activation has a kink, its slope is that of Keras: relu 0 at 0, relu6 0 at 0 and 6,
    leaky_relu 1 at 0, elu 1 at 0, hard_sigmoid 0 at both ends.

    Args:
        dy: Gradient of the output; shape and dtype of what `separable_conv2d` returns.
        x: As for `separable_conv2d`, as are all arguments that follow.
        depthwise_kernel: (kernel_height, kernel_width, channels, depth_multiplier).
        pointwise_kernel: (1, 1, channels * depth_multiplier, filters).
        bias: (filters,), or `None`.
        strides: An int, or one per direction.
        padding: `"valid"`, `"same"`, or `((top, bottom), (left, right))`.
        dilation_rate: An int, or one per direction.
        data_format: `"channels_last"` or `"channels_first"`.
        activation: Activation after the bias.
        input_activation: Activation of the input.
        depthwise_bias: Bias between the two stages, (channels * depth_multiplier,), or `None`.
        depthwise_activation: Activation between the two stages.

    Returns:
        (dx, d_depthwise_kernel, d_pointwise_kernel, d_bias), each in the shape and dtype of what it
        belongs to; `d_bias` is `None` without a bias. With `depthwise_bias`, its gradient follows
        as a fifth.

    Raises:
        TypeError: a dtype is not supported or differs from that of `x`, or an argument is not of a
            type that it can be.
        ValueError: a shape or an argument is out of range.

    Example:
        >>> import numpy as np
        >>> from sepconv.numpy import separable_conv2d_grad
        >>> x = np.arange(9.0).reshape(1, 3, 3, 1)
        >>> depthwise_kernel, pointwise_kernel = np.ones((2, 2, 1, 1)), np.full((1, 1, 1, 1), 3.0)
        >>> dy = np.ones((1, 2, 2, 1))
        >>> dx, d_depthwise_kernel, d_pointwise_kernel, d_bias = separable_conv2d_grad(
        ...     dy, x, depthwise_kernel, pointwise_kernel)
        >>> dx[0, :, :, 0]
        array([[ 3.,  6.,  3.],
               [ 6., 12.,  6.],
               [ 3.,  6.,  3.]])
        >>> d_pointwise_kernel.item(), d_bias is None
        (64.0, True)
    """
    x, arrays, plan = _resolved(
        x,
        depthwise_kernel,
        pointwise_kernel,
        bias,
        depthwise_bias,
        strides,
        padding,
        dilation_rate,
        data_format,
        activation,
        input_activation,
        depthwise_activation,
    )
    dy = _dense(dy)
    dtype = x.dtype
    if dy.dtype != dtype:
        _raise_dtypes_differ("dy", dy, dtype)
    if dy.shape != plan.y_shape:
        raise ValueError(
            f"`dy` must have the shape of the output, {plan.y_shape}. Received: dy.shape={dy.shape}"
        )
    dx = np.empty(x.shape, dtype)
    kernel, pointwise, mid, end = arrays
    d_kernel = np.empty(kernel.shape, dtype)
    d_pointwise = np.empty(pointwise.shape, dtype)
    d_mid = None if mid is None else np.empty(mid.shape, dtype)
    d_end = None if end is None else np.empty(end.shape, dtype)
    gradients = (dx, d_kernel, d_pointwise, d_mid, d_end)
    if plan.storage is None:
        plan.backward(plan.geometry, dy, x, *arrays, None, *gradients)
    else:
        views = _views(plan.storage, dy, x, *arrays, None, *gradients)
        plan.backward(plan.geometry, *views, plan.dtype_code)
    if mid is None:
        return dx, d_kernel, d_pointwise, d_end
    return dx, d_kernel, d_pointwise, d_end, d_mid


class _Plan(NamedTuple):
    """What a call needs to know that does not depend on the data."""

    geometry: npt.NDArray[np.int64]
    y_shape: Shape
    y_bytes: int
    forward: Callable[..., None]
    backward: Callable[..., None]
    pack: Callable[..., Any]
    forward_packed: Callable[..., None]
    storage: type[np.uint16] | None
    """The integers that carry a dtype which has no buffer protocol, bfloat16."""
    dtype_code: int


# Numbers are those of DType in csrc/sepconv.h.
_DTYPE_CODES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}


def _resolved(
    x: Array,
    depthwise_kernel: Array,
    pointwise_kernel: Array,
    bias: Array | None,
    depthwise_bias: Array | None,
    strides: Any,
    padding: Any,
    dilation_rate: Any,
    *names: Any,
) -> tuple[Array, tuple[Array, Array, Array | None, Array | None], _Plan]:
    """Returns `x` and the weights, dense and in the order of the native call, and the plan."""
    x = _dense(x)
    dtype = x.dtype
    depthwise_kernel = _dense(depthwise_kernel)
    pointwise_kernel = _dense(pointwise_kernel)
    if depthwise_kernel.dtype != dtype:
        _raise_dtypes_differ("depthwise_kernel", depthwise_kernel, dtype)
    if pointwise_kernel.dtype != dtype:
        _raise_dtypes_differ("pointwise_kernel", pointwise_kernel, dtype)
    bias_shape = depthwise_bias_shape = None
    if bias is not None:
        bias = _dense(bias)
        bias_shape = bias.shape
        if bias.dtype != dtype:
            _raise_dtypes_differ("bias", bias, dtype)
    if depthwise_bias is not None:
        depthwise_bias = _dense(depthwise_bias)
        depthwise_bias_shape = depthwise_bias.shape
        if depthwise_bias.dtype != dtype:
            _raise_dtypes_differ("depthwise_bias", depthwise_bias, dtype)

    # The cache takes (1.0, 1) for (1, 1), so pairs are checked before they become a key.
    key = (
        dtype,
        x.shape,
        depthwise_kernel.shape,
        pointwise_kernel.shape,
        bias_shape,
        depthwise_bias_shape,
        strides if type(strides) is int else _pair("strides", strides),
        padding if type(padding) is str else canonical_padding(padding),
        dilation_rate if type(dilation_rate) is int else _pair("dilation_rate", dilation_rate),
        *names,
    )
    try:
        plan = _plan_cached(*key)
    except TypeError:  # Not hashable, hence wrong; the plan itself finds the words for it.
        plan = None
    if plan is None:
        plan = _plan(*key)
    return x, (depthwise_kernel, pointwise_kernel, depthwise_bias, bias), plan


def _pair(argument: str, value: Any) -> tuple[int, int]:
    if type(value) is tuple and (*map(type, value),) == (int, int):
        return value
    return canonical_pair(argument, value)


def _plan(
    dtype: np.dtype[Any],
    x_shape: Shape,
    depthwise_kernel_shape: Shape,
    pointwise_kernel_shape: Shape,
    bias_shape: Shape | None,
    depthwise_bias_shape: Shape | None,
    strides: Any,
    padding: Any,
    dilation_rate: Any,
    data_format: str,
    activation: str | None,
    input_activation: str | None,
    depthwise_activation: str | None,
) -> _Plan:
    _check_dtype("x", dtype)
    spec = ConvSpec(
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
        data_format=data_format,
        activation=activation,
        input_activation=input_activation,
        depthwise_activation=depthwise_activation,
    )
    geometry = spec.resolve(
        x_shape, depthwise_kernel_shape, pointwise_kernel_shape, bias_shape, depthwise_bias_shape
    )
    kernels = choose(geometry, dtype.name, "cpu").load()
    flat = np.array(geometry, np.int64)
    flat.flags.writeable = False
    return _Plan(
        geometry=flat,
        y_shape=geometry.y_shape,
        y_bytes=math.prod(geometry.y_shape) * dtype.itemsize,
        forward=kernels.forward,
        backward=kernels.backward,
        pack=kernels.pack,
        forward_packed=kernels.forward_packed,
        storage=np.uint16 if dtype.name == "bfloat16" else None,
        dtype_code=_DTYPE_CODES[dtype.name],
    )


_plan_cached = functools.lru_cache(maxsize=4096)(_plan)


def _dense(array: Any) -> Array:
    """Returns the array, or a copy of it that is contiguous and aligned."""
    if type(array) is np.ndarray and array.flags.carray:
        return array
    return np.require(array, requirements=("C", "A", "E"))


# From here on the microsecond that alignment takes is less than it saves.
_LARGE = 1 << 16
_CACHE_LINE = 64


def _empty(plan: _Plan, dtype: np.dtype[Any]) -> Array:
    """Returns an empty output; one of some size starts at a cache line.

    Vectors then cross no line, neither here nor where the next layer reads them (up to 7 %).
    """
    if plan.y_bytes < _LARGE:
        return np.empty(plan.y_shape, dtype)
    memory = np.empty(plan.y_bytes + _CACHE_LINE, np.uint8)
    return np.ndarray(plan.y_shape, dtype, memory, -memory.ctypes.data % _CACHE_LINE)


def _checked_out(out: Any, plan: _Plan, x: Array, *weights: Array | None) -> Array:
    """Returns `out` if the output may be written there."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"`out` must be an array of NumPy. Received: {type(out).__name__}")
    if out.dtype != x.dtype:
        _raise_dtypes_differ("out", out, x.dtype)
    if out.shape != plan.y_shape:
        raise ValueError(
            f"`out` must have the shape of the output, {plan.y_shape}. "
            f"Received: out.shape={out.shape}"
        )
    if not out.flags.carray:
        raise ValueError(
            "`out` must be contiguous, aligned and writable. Received: "
            f"strides={out.strides}, aligned={out.flags.aligned}, writable={out.flags.writeable}"
        )
    for array in (x, *weights):
        if array is not None and np.may_share_memory(out, array):
            raise ValueError(
                "`out` must not share memory with `x` or the weights. Received: an array that does"
            )
    return out


def _views(dtype: npt.DTypeLike, *arrays: Array | None) -> list[Array | None]:
    return [None if array is None else array.view(dtype) for array in arrays]


def _check_dtype(argument: str, dtype: np.dtype[Any]) -> None:
    if dtype.name not in _DTYPE_CODES or not dtype.isnative:
        known = ", ".join(_DTYPE_CODES)
        raise TypeError(
            f"`{argument}` must have one of the dtypes {known}, in native byte order. "
            f"Received: {argument}.dtype={dtype}"
        )


def _raise_dtypes_differ(
    argument: str, array: Array, dtype: np.dtype[Any], other: str = "x"
) -> NoReturn:
    _check_dtype(other, dtype)
    raise TypeError(
        f"`{argument}` must have the dtype of `{other}`. "
        f"Received: {argument}.dtype={array.dtype}, {other}.dtype={dtype}"
    )
