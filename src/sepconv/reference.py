"""The truth: the operation in float64 NumPy, its gradients, and how far a kernel may be from them.

`forward` and `backward` say what every kernel must compute, in the plainest way. `error_bounds`
says to which accuracy: unit roundoff x number of accumulated terms x the same computation on
absolute values, carried from stage to stage. Nothing here is fast.

Names: x input, a activated input, u depthwise output, v the same after bias and activation, z
pointwise output with bias, y output. Inside this file images are (batch, height, width, channels).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sepconv.spec import ACTIVATIONS, Geometry

__all__ = ["ACTIVATION_TABLE", "Activation", "Gradients", "backward", "error_bounds", "forward"]

Array = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]


# ------------------------------------------------------------------------------------ activations


class Activation(NamedTuple):
    """An activation with what is needed to differentiate it and to bound its error.

    The two scales are the formula on absolute values: what one rounding error is relative to when a
    kernel evaluates it term by term.
    """

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    value_scale: Callable[[Array], Array]
    slope_scale: Callable[[Array], Array]
    steepest: float
    """Largest |slope|, also across kinks: a Lipschitz constant of the value."""
    most_curved: float
    """Largest |second derivative| between kinks: a Lipschitz constant of the slope there."""
    kinks: tuple[tuple[float, float], ...] = ()
    """(position, jump of the slope)."""
    slope_per_output: float = 0.0
    """Lipschitz constant, between kinks, of the slope as a function of the value, if it is one."""


_erfc: Callable[[Array], Array] = np.vectorize(math.erfc, otypes=[np.float64])


def _sigmoid(z: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -z))  # Neither overflows nor loses its small values.


def _normal_cdf(z: Array) -> Array:
    return 0.5 * _erfc(-z / math.sqrt(2.0))


def _normal_pdf(z: Array) -> Array:
    return np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def _hard_sigmoid(z: Array) -> Array:
    return np.clip(z / 6.0 + 0.5, 0.0, 1.0)


# exp(-z*z/2), which the tails are made of, turns a rounding of its argument into z*z/2 of them.
def _gelu_value_scale(z: Array) -> Array:
    return np.abs(z) * (_normal_cdf(z) + 0.5 * z * z * _normal_cdf(-np.abs(z)))


def _gelu_slope_scale(z: Array) -> Array:
    tails = _normal_cdf(-np.abs(z)) + np.abs(z) * _normal_pdf(z)
    return _normal_cdf(z) + np.abs(z) * _normal_pdf(z) + 0.5 * z * z * tails


def _inside(z: Array, low: float, high: float, value: Array | float) -> Array:
    return np.where((z > low) & (z < high), value, 0.0)


ACTIVATION_TABLE: dict[str, Activation] = {
    "linear": Activation(
        value=lambda z: z,
        slope=np.ones_like,
        value_scale=np.zeros_like,
        slope_scale=np.zeros_like,
        steepest=1.0,
        most_curved=0.0,
    ),
    "relu": Activation(
        value=lambda z: np.maximum(z, 0.0),
        slope=lambda z: np.where(z > 0.0, 1.0, 0.0),
        value_scale=np.zeros_like,
        slope_scale=np.zeros_like,
        steepest=1.0,
        most_curved=0.0,
        kinks=((0.0, 1.0),),
    ),
    "relu6": Activation(
        value=lambda z: np.clip(z, 0.0, 6.0),
        slope=lambda z: _inside(z, 0.0, 6.0, 1.0),
        value_scale=np.zeros_like,
        slope_scale=np.zeros_like,
        steepest=1.0,
        most_curved=0.0,
        kinks=((0.0, 1.0), (6.0, 1.0)),
    ),
    "leaky_relu": Activation(
        value=lambda z: np.where(z >= 0.0, z, 0.2 * z),
        slope=lambda z: np.where(z >= 0.0, 1.0, 0.2),
        value_scale=lambda z: np.where(z >= 0.0, 0.0, -0.2 * z),
        slope_scale=lambda z: np.where(z >= 0.0, 0.0, 0.2),
        steepest=1.0,
        most_curved=0.0,
        kinks=((0.0, 0.8),),
    ),
    "sigmoid": Activation(
        value=_sigmoid,
        slope=lambda z: _sigmoid(z) * _sigmoid(-z),
        value_scale=_sigmoid,
        slope_scale=lambda z: _sigmoid(z) * (1.0 + _sigmoid(z)),
        steepest=0.25,
        most_curved=1.0 / (6.0 * math.sqrt(3.0)),
        slope_per_output=1.0,  # y * (1 - y)
    ),
    "tanh": Activation(
        value=np.tanh,
        slope=lambda z: 4.0 * _sigmoid(2.0 * z) * _sigmoid(-2.0 * z),
        value_scale=lambda z: np.abs(np.tanh(z)),
        slope_scale=lambda z: 1.0 + np.tanh(z) ** 2,
        steepest=1.0,
        most_curved=4.0 / (3.0 * math.sqrt(3.0)),
        slope_per_output=2.0,  # 1 - y * y
    ),
    "silu": Activation(
        value=lambda z: z * _sigmoid(z),
        slope=lambda z: _sigmoid(z) * (1.0 + z * _sigmoid(-z)),
        value_scale=lambda z: np.abs(z) * _sigmoid(z),
        slope_scale=lambda z: _sigmoid(z) * (1.0 + np.abs(z) * (1.0 + _sigmoid(z))),
        steepest=1.1,
        most_curved=0.5,
    ),
    "gelu": Activation(
        value=lambda z: z * _normal_cdf(z),
        slope=lambda z: _normal_cdf(z) + z * _normal_pdf(z),
        value_scale=_gelu_value_scale,
        slope_scale=_gelu_slope_scale,
        steepest=1.13,
        most_curved=2.0 / math.sqrt(2.0 * math.pi),
    ),
    "hard_sigmoid": Activation(
        value=_hard_sigmoid,
        slope=lambda z: _inside(z, -3.0, 3.0, 1.0 / 6.0),
        value_scale=lambda z: np.minimum(np.abs(z) / 6.0 + 0.5, 1.0),
        slope_scale=lambda z: _inside(z, -3.0, 3.0, 1.0 / 6.0),
        steepest=1.0 / 6.0,
        most_curved=0.0,
        kinks=((-3.0, 1.0 / 6.0), (3.0, 1.0 / 6.0)),
    ),
    "hard_silu": Activation(
        value=lambda z: z * _hard_sigmoid(z),
        slope=lambda z: np.where(z >= 3.0, 1.0, _inside(z, -3.0, 3.0, z / 3.0 + 0.5)),
        value_scale=lambda z: np.abs(z) * np.minimum(np.abs(z) / 6.0 + 0.5, 1.0),
        slope_scale=lambda z: _inside(z, -3.0, 3.0, np.abs(z) / 3.0 + 0.5),
        steepest=1.5,
        most_curved=1.0 / 3.0,
        kinks=((-3.0, 0.5), (3.0, 0.5)),
    ),
    "elu": Activation(
        value=lambda z: np.where(z >= 0.0, z, np.expm1(np.minimum(z, 0.0))),
        slope=lambda z: np.exp(np.minimum(z, 0.0)),
        value_scale=lambda z: np.where(z >= 0.0, 0.0, -np.expm1(np.minimum(z, 0.0))),
        slope_scale=lambda z: np.where(z >= 0.0, 0.0, 1.0),  # A kernel may use output + 1.
        steepest=1.0,
        most_curved=1.0,
        slope_per_output=1.0,  # y + 1
    ),
}
"""By canonical name. Forms and slopes at kinks are those of Keras 3."""


def _activation(code: int) -> Activation:
    return ACTIVATION_TABLE[ACTIVATIONS[code]]


# ------------------------------------------------------------- the linear stages, NHWC, in float64


def _to_nhwc(geometry: Geometry, image: AnyArray) -> Array:
    image = np.asarray(image, np.float64)
    return image if geometry.layout == 0 else image.transpose(0, 2, 3, 1)


def _to_layout(geometry: Geometry, image: Array) -> Array:
    return image if geometry.layout == 0 else np.ascontiguousarray(image.transpose(0, 3, 1, 2))


def _padded_extents(geometry: Geometry) -> tuple[int, int]:
    """Rows and columns that the kernel touches, from the first tap to the last."""
    g = geometry
    height = (g.out_height - 1) * g.stride_height + (g.kernel_height - 1) * g.dilation_height + 1
    width = (g.out_width - 1) * g.stride_width + (g.kernel_width - 1) * g.dilation_width + 1
    return max(height, 0), max(width, 0)


def _overlap(geometry: Geometry) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where image and padded image show the same pixels: slices of the one and of the other."""
    g = geometry
    height, width = _padded_extents(g)
    rows = max(min(g.in_height, height - g.pad_top), 0)
    columns = max(min(g.in_width, width - g.pad_left), 0)
    return (
        (slice(0, rows), slice(0, columns)),
        (slice(g.pad_top, g.pad_top + rows), slice(g.pad_left, g.pad_left + columns)),
    )


def _taps(geometry: Geometry) -> list[tuple[int, int, slice, slice]]:
    """Per kernel element: its place, and the rows and columns of the padded image that it meets."""
    g = geometry
    return [
        (
            i,
            j,
            slice(i * g.dilation_height, None, g.stride_height),
            slice(j * g.dilation_width, None, g.stride_width),
        )
        for i in range(g.kernel_height)
        for j in range(g.kernel_width)
    ]


def _pad(geometry: Geometry, a: Array) -> Array:
    (rows, columns), (padded_rows, padded_columns) = _overlap(geometry)
    padded = np.zeros((geometry.batch, *_padded_extents(geometry), geometry.in_channels))
    padded[:, padded_rows, padded_columns] = a[:, rows, columns]
    return padded


def _depthwise(geometry: Geometry, a: Array, kernel: Array) -> Array:
    """u[n, y, x, c*M + m] = sum_ij a[n, y*sh + i*dh - top, x*sw + j*dw - left, c] k[i, j, c, m]."""
    g = geometry
    padded = _pad(g, a)
    u = np.zeros((g.batch, g.out_height, g.out_width, g.in_channels, g.depth_multiplier))
    for i, j, rows, columns in _taps(g):
        met = padded[:, rows, columns][:, : g.out_height, : g.out_width]
        u += met[..., None] * kernel[i, j]
    return u.reshape(g.batch, g.out_height, g.out_width, g.depthwise_channels)


def _depthwise_to_input(geometry: Geometry, du: Array, kernel: Array) -> Array:
    """The transpose of `_depthwise` in its input: da."""
    g = geometry
    du = du.reshape(g.batch, g.out_height, g.out_width, g.in_channels, g.depth_multiplier)
    padded = np.zeros((g.batch, *_padded_extents(g), g.in_channels))
    for i, j, rows, columns in _taps(g):
        padded[:, rows, columns][:, : g.out_height, : g.out_width] += (du * kernel[i, j]).sum(-1)
    (rows, columns), (padded_rows, padded_columns) = _overlap(g)
    da = np.zeros((g.batch, g.in_height, g.in_width, g.in_channels))
    da[:, rows, columns] = padded[:, padded_rows, padded_columns]
    return da


def _depthwise_to_kernel(geometry: Geometry, a: Array, du: Array) -> Array:
    """The transpose of `_depthwise` in its kernel: d_depthwise_kernel."""
    g = geometry
    padded = _pad(g, a)
    du = du.reshape(g.batch, g.out_height, g.out_width, g.in_channels, g.depth_multiplier)
    gradient = np.zeros(g.depthwise_kernel_shape)
    for i, j, rows, columns in _taps(g):
        met = padded[:, rows, columns][:, : g.out_height, : g.out_width]
        gradient[i, j] = (met[..., None] * du).sum((0, 1, 2))
    return gradient


def _pointwise(v: Array, kernel: Array) -> Array:
    z: Array = v @ kernel[0, 0]
    return z


def _pointwise_to_input(dz: Array, kernel: Array) -> Array:
    dv: Array = dz @ kernel[0, 0].T
    return dv


def _pointwise_to_kernel(v: Array, dz: Array) -> Array:
    gradient = v.reshape(-1, v.shape[-1]).T @ dz.reshape(-1, dz.shape[-1])
    return gradient[None, None]


# -------------------------------------------------------------------------------------- the truth


class Gradients(NamedTuple):
    """One array per differentiable argument, in its shape; `None` for a bias that is not there."""

    dx: Array
    d_depthwise_kernel: Array
    d_pointwise_kernel: Array
    d_bias: Array | None
    d_depthwise_bias: Array | None


class _Stages(NamedTuple):
    a: Array
    u: Array
    v: Array
    z: Array


def _stages(
    geometry: Geometry,
    x: Array,
    depthwise_kernel: Array,
    pointwise_kernel: Array,
    bias: AnyArray | None,
    depthwise_bias: AnyArray | None,
) -> _Stages:
    a = _activation(geometry.input_activation).value(x)
    u = _depthwise(geometry, a, depthwise_kernel)
    if depthwise_bias is not None:
        u = u + depthwise_bias
    v = _activation(geometry.depthwise_activation).value(u)
    z = _pointwise(v, pointwise_kernel)
    if bias is not None:
        z = z + bias
    return _Stages(a, u, v, z)


def _float64(array: AnyArray | None) -> Any:
    return None if array is None else np.asarray(array, np.float64)


def forward(
    geometry: Geometry,
    x: AnyArray,
    depthwise_kernel: AnyArray,
    pointwise_kernel: AnyArray,
    bias: AnyArray | None = None,
    depthwise_bias: AnyArray | None = None,
) -> Array:
    """Computes the operation in float64.

        y = activation(depthwise_activation(depthwise(input_activation(x)) + depthwise_bias)
                       @ pointwise_kernel + bias)

    Args:
        geometry: The call, from `ConvSpec.resolve`.
        x: `geometry.x_shape`, of any real dtype, as are all arrays.
        depthwise_kernel: (kernel_height, kernel_width, channels, depth_multiplier).
        pointwise_kernel: (1, 1, channels * depth_multiplier, filters).
        bias: (filters,), or `None`.
        depthwise_bias: (channels * depth_multiplier,), or `None`.

    Returns:
        y, `geometry.y_shape`, float64.

    Example:
        >>> import numpy as np
        >>> from sepconv import ConvSpec
        >>> x, kernel, pointwise = np.full((1, 2, 2, 1), 3.0), np.ones((2, 2, 1, 1)), np.eye(1)
        >>> geometry = ConvSpec(activation="relu6").resolve(x.shape, kernel.shape, (1, 1, 1, 1))
        >>> forward(geometry, x, kernel, pointwise[None, None])
        array([[[[6.]]]])
    """
    stages = _stages(
        geometry,
        _to_nhwc(geometry, x),
        _float64(depthwise_kernel),
        _float64(pointwise_kernel),
        _float64(bias),
        _float64(depthwise_bias),
    )
    return _to_layout(geometry, _activation(geometry.activation).value(stages.z))


def backward(
    geometry: Geometry,
    dy: AnyArray,
    x: AnyArray,
    depthwise_kernel: AnyArray,
    pointwise_kernel: AnyArray,
    bias: AnyArray | None = None,
    depthwise_bias: AnyArray | None = None,
) -> Gradients:
    """Computes the gradients of `sum(dy * forward(...))` in float64.

    Args:
        geometry: The call, from `ConvSpec.resolve`.
        dy: `geometry.y_shape`.
        x: `geometry.x_shape`.
        depthwise_kernel: (kernel_height, kernel_width, channels, depth_multiplier).
        pointwise_kernel: (1, 1, channels * depth_multiplier, filters).
        bias: (filters,), or `None`.
        depthwise_bias: (channels * depth_multiplier,), or `None`.

    Returns:
        The gradients, float64.
    """
    g = geometry
    x, dy = _to_nhwc(g, x), _to_nhwc(g, dy)
    depthwise_kernel, pointwise_kernel = _float64(depthwise_kernel), _float64(pointwise_kernel)
    stages = _stages(
        g, x, depthwise_kernel, pointwise_kernel, _float64(bias), _float64(depthwise_bias)
    )

    dz = dy * _activation(g.activation).slope(stages.z)
    dv = _pointwise_to_input(dz, pointwise_kernel)
    du = dv * _activation(g.depthwise_activation).slope(stages.u)
    da = _depthwise_to_input(g, du, depthwise_kernel)
    dx = da * _activation(g.input_activation).slope(x)
    return Gradients(
        dx=_to_layout(g, dx),
        d_depthwise_kernel=_depthwise_to_kernel(g, stages.a, du),
        d_pointwise_kernel=_pointwise_to_kernel(stages.v, dz),
        d_bias=None if bias is None else dz.sum((0, 1, 2)),
        d_depthwise_bias=None if depthwise_bias is None else du.sum((0, 1, 2)),
    )


# ---------------------------------------------------------------------------------- the error bound


class _Approximation(NamedTuple):
    """A true value, and how far the computed one may be from it."""

    value: Array
    error: Array | float = 0.0

    @property
    def magnitude(self) -> Array:
        """The largest absolute value that the computed one may have."""
        return np.abs(self.value) + self.error


# Roundings that a kernel may spend on the formula of an activation or its slope, approximations of
# exp, tanh and erfc included.
_ACTIVATION_ROUNDINGS = 8


# Sums run in float32, in float64 for float64. Stored in 16 bits are results, and what goes from one
# stage to the next (v forward, du backward), as in a network of separate layers.
# (roundoff of sums, smallest normal number of sums, roundoff of storing, smallest step of storing)
_FORMATS = {
    "float32": (2.0**-24, 2.0**-126, 0.0, 0.0),
    "float64": (2.0**-53, 2.0**-1022, 0.0, 0.0),
    "bfloat16": (2.0**-24, 2.0**-126, 2.0**-8, 2.0**-126),
    "float16": (2.0**-24, 2.0**-126, 2.0**-11, 2.0**-25),
}


class _Arithmetic:
    """Bounds on what arithmetic of one dtype makes of approximations.

    Sums of n products in any order, with or without fused multiply-add, are off by at most
    n*roundoff / (1 - n*roundoff) times the sum of the absolute products. Results below the smallest
    normal number may be flushed to zero.
    """

    def __init__(self, dtype: str) -> None:
        roundoff, self.smallest, self.store_roundoff, self.store_step = _FORMATS[dtype]
        self.roundoff = roundoff + 2.0**-53  # The reference itself rounds in float64.

    def stored(self, result: _Approximation) -> _Approximation:
        """What is left of a result in the dtype of the arrays."""
        return _Approximation(result.value, result.error + self._storing(result.magnitude))

    def sum_error(self, terms: int, sum_of_magnitudes: Array) -> Array:
        share = terms * self.roundoff
        return share / (1.0 - share) * sum_of_magnitudes + terms * self.smallest

    def contract(
        self,
        operation: Callable[[Array, Array], Array],
        terms: int,
        left: _Approximation,
        right: _Approximation,
        bias: Array | None = None,
    ) -> _Approximation:
        """`operation(left, right) + bias`, where operation is a sum of so many products."""
        value = operation(left.value, right.value)
        magnitude = operation(left.magnitude, right.magnitude)
        error = np.zeros_like(value)
        if np.any(left.error):
            error += operation(left.error + np.zeros_like(left.value), right.magnitude)
        if np.any(right.error):
            error += operation(np.abs(left.value), right.error + np.zeros_like(right.value))
        if bias is not None:
            value, magnitude, terms = value + bias, magnitude + np.abs(bias), terms + 1
        return _Approximation(value, error + self.sum_error(terms, magnitude))

    def total(self, terms: int, approximation: _Approximation) -> _Approximation:
        """The sum over all pixels."""
        ones = np.ones((*approximation.value.shape[:-1], 1))
        return self.contract(
            lambda left, right: (left * right).sum((0, 1, 2)),
            terms,
            approximation,
            _Approximation(ones),
        )

    def multiply(self, left: _Approximation, right: _Approximation) -> _Approximation:
        return self.contract(np.multiply, 1, left, right)

    def activate(self, code: int, z: _Approximation) -> _Approximation:
        f = _activation(code)
        evaluation = self._evaluation(code, z.value, f.value_scale(z.value))
        return _Approximation(f.value(z.value), f.steepest * z.error + evaluation)

    def slope(self, code: int, z: _Approximation, from_output: bool = False) -> _Approximation:
        """The slope at z, or, `from_output`, as it follows from the stored output."""
        f = _activation(code)
        error = f.most_curved * z.error + self._evaluation(code, z.value, f.slope_scale(z.value))
        if from_output:
            error = error + f.slope_per_output * self._storing(np.abs(f.value(z.value)))
        for position, jump in f.kinks:
            # A computed z may lie on the other side. An exact one lies where it lies.
            margin = z.error + _ACTIVATION_ROUNDINGS * self.roundoff * abs(position)
            if from_output:  # Beside a kink the value moves by z/6 at least (hard_sigmoid).
                margin = margin + 6.0 * self._storing(np.abs(f.value(np.array(position))))
            uncertain = (np.abs(z.value - position) <= margin) & (np.asarray(z.error) > 0.0)
            error = error + jump * uncertain
        return _Approximation(f.slope(z.value), error)

    def _storing(self, magnitude: Array) -> Array:
        return self.store_roundoff * magnitude + self.store_step

    def _evaluation(self, code: int, z: Array, scale: Array) -> Array:
        # Some formulas multiply an exp that was flushed by z.
        flushed = self.smallest * (1.0 + np.abs(z)) if _activation(code).most_curved else 0.0
        return _ACTIVATION_ROUNDINGS * self.roundoff * scale + flushed


def error_bounds(
    geometry: Geometry,
    dtype: str,
    dy: AnyArray,
    x: AnyArray,
    depthwise_kernel: AnyArray,
    pointwise_kernel: AnyArray,
    bias: AnyArray | None = None,
    depthwise_bias: AnyArray | None = None,
    *,
    dy_error: AnyArray | float = 0.0,
    from_output: bool = False,
    stages_stored: bool = False,
) -> tuple[Array, Gradients]:
    """Bounds |kernel - reference| for each element of the output and of the gradients.

    Every order of summation stays within them, so a kernel beyond them has a fault. Through an
    activation an error grows by at most its steepest slope. Where a pre-activation is so close to a
    kink that the kernel may see the other side, its slope may be wrong by the whole jump.

    Args:
        geometry: The call, from `ConvSpec.resolve`.
        dtype: Name of the dtype of the kernel's arrays. The arrays given here must be the ones that
            the kernel receives: they count as exact.
        dy: `geometry.y_shape`.
        x: `geometry.x_shape`.
        depthwise_kernel: (kernel_height, kernel_width, channels, depth_multiplier).
        pointwise_kernel: (1, 1, channels * depth_multiplier, filters).
        bias: (filters,), or `None`.
        depthwise_bias: (channels * depth_multiplier,), or `None`.
        dy_error: How far the `dy` that the kernel receives may be from the one given here.
        from_output: Whether the backward kernel may take the slope of `activation` from the stored
            output, which matters in 16 bits.
        stages_stored: Whether the kernel may also store u and z before their activations, and dz
            and dv, as a network of separate layers does.

    Returns:
        (bound of y, bounds of the gradients), each in the shape of what it bounds.
    """
    g = geometry
    arithmetic = _Arithmetic(dtype)
    exact_x = _Approximation(_to_nhwc(g, x))
    kernel = _Approximation(_float64(depthwise_kernel))
    pointwise = _Approximation(_float64(pointwise_kernel))
    received_dy = _Approximation(
        _to_nhwc(g, dy), _to_nhwc(g, np.broadcast_to(np.asarray(dy_error, np.float64), g.y_shape))
    )
    taps, pixels = g.kernel_height * g.kernel_width, g.batch * g.out_height * g.out_width

    def between(result: _Approximation) -> _Approximation:
        return arithmetic.stored(result) if stages_stored else result

    a = arithmetic.activate(g.input_activation, exact_x)
    u = arithmetic.contract(
        lambda left, right: _depthwise(g, left, right), taps, a, kernel, _float64(depthwise_bias)
    )
    u = between(u)
    v = arithmetic.stored(arithmetic.activate(g.depthwise_activation, u))
    z = arithmetic.contract(_pointwise, g.depthwise_channels, v, pointwise, _float64(bias))
    y = arithmetic.activate(g.activation, between(z))

    dz = between(arithmetic.multiply(received_dy, arithmetic.slope(g.activation, z, from_output)))
    dv = between(arithmetic.contract(_pointwise_to_input, g.out_channels, dz, pointwise))
    du = arithmetic.stored(arithmetic.multiply(dv, arithmetic.slope(g.depthwise_activation, u)))
    da = arithmetic.contract(
        lambda left, right: _depthwise_to_input(g, left, right),
        taps * g.depth_multiplier,
        du,
        kernel,
    )
    dx = arithmetic.multiply(da, arithmetic.slope(g.input_activation, exact_x))
    d_kernel = arithmetic.contract(
        lambda left, right: _depthwise_to_kernel(g, left, right), pixels, a, du
    )
    d_pointwise = arithmetic.contract(_pointwise_to_kernel, pixels, v, dz)

    def bound(result: _Approximation) -> Array:
        return arithmetic.stored(result).error + np.zeros_like(result.value)

    bounds = Gradients(
        dx=_to_layout(g, bound(dx)),
        d_depthwise_kernel=bound(d_kernel),
        d_pointwise_kernel=bound(d_pointwise),
        d_bias=None if bias is None else bound(arithmetic.total(pixels, dz)),
        d_depthwise_bias=None if depthwise_bias is None else bound(arithmetic.total(pixels, du)),
    )
    return _to_layout(g, bound(y)), bounds
