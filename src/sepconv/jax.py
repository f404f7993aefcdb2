"""The JAX door: one differentiable operation on JAX arrays.

On the CPU a call is one custom call of XLA forward, and one backward for all gradients. On any
other platform JAX's own two convolutions run instead; the choice is made when a computation is
lowered, and `why_not` tells which.

How it differentiates. Three primitives, all carrying the integers of the call in `geometry`:

    forward    (operands) -> y
    tangent    (operands; tangents) -> tangent of y        linear in the tangents
    backward   (dy, operands) -> gradients                 linear in dy

`tangent` and `backward` are each other's transpose, so reverse mode is one `backward`. Without
activations and biases `forward` is linear in each of x, depthwise_kernel and pointwise_kernel, and
the derivatives of all three primitives are again calls of them with one operand replaced. With
activations, `forward` is differentiated a second time as activation(linear forward + bias), where
JAX sees the activation. `operands` are x, depthwise_kernel, pointwise_kernel, then depthwise_bias
and bias where the geometry has them; `wrt` holds positions among them.

How it is spread over devices. Where a computation is partitioned by XLA (`jit` over a mesh),
`forward` and `backward` tell that images and filters are independent: every device runs the kernel
on its images and its filters. What is summed over those, gradients, is summed over the devices.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.dispatch import prim_requires_devices_during_lowering  # There is no public name.
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sepconv import _native, backends
from sepconv.spec import ACTIVATIONS, ConvSpec, Geometry, IntOrPair

__all__ = ["separable_conv2d", "why_not"]

Positions: TypeAlias = "tuple[int, ...]"


def separable_conv2d(
    x: jax.typing.ArrayLike,
    depthwise_kernel: jax.typing.ArrayLike,
    pointwise_kernel: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = None,
    *,
    strides: IntOrPair = 1,
    padding: str | Sequence[Sequence[SupportsIndex]] = "valid",
    dilation_rate: IntOrPair = 1,
    data_format: str = "channels_last",
    activation: str | Callable[[jax.Array], jax.Array] | None = None,
    input_activation: str | None = None,
    depthwise_bias: jax.typing.ArrayLike | None = None,
    depthwise_activation: str | None = None,
) -> jax.Array:
    """Computes a depthwise-separable 2-D convolution.

        u = depthwise_activation(depthwise(input_activation(x), depthwise_kernel) + depthwise_bias)
        y = activation(pointwise(u, pointwise_kernel) + bias)

    It can be transformed by `jit`, `grad`, `jvp`, `vmap`, `checkpoint`, `shard_map` and what is
    built on them, to any order.

    Args:
        x: Input, (batch, height, width, channels), or (batch, channels, height, width) with
            `data_format="channels_first"`. Any floating-point dtype.
        depthwise_kernel: (kernel_height, kernel_width, channels, depth_multiplier), dtype of `x`.
        pointwise_kernel: (1, 1, channels * depth_multiplier, filters), dtype of `x`.
        bias: (filters,), dtype of `x`, or `None`.
        strides: An int, or one per direction.
        padding: `"valid"`, `"same"`, or `((top, bottom), (left, right))`.
        dilation_rate: An int, or one per direction.
        data_format: `"channels_last"` or `"channels_first"`.
        activation: A name in `sepconv.spec.ACTIVATIONS`, `None`, or any function of an array, which
            JAX then runs on the result.
        input_activation: A name, or `None`.
        depthwise_bias: (channels * depth_multiplier,), dtype of `x`, or `None`.
        depthwise_activation: A name, or `None`.

    Returns:
        (batch, out_height, out_width, filters), or in the layout of `data_format`; dtype of `x`.

    Raises:
        TypeError: an array is not floating-point, or dtypes differ.
        ValueError: an argument is out of range, or shapes do not fit together.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 5, 5, 2))
        >>> kernels = jnp.ones((3, 3, 2, 1)), jnp.ones((1, 1, 2, 4))
        >>> y = separable_conv2d(x, *kernels, padding="same", activation="relu")
        >>> y.shape, float(y[0, 2, 2, 0])
        ((1, 5, 5, 4), 18.0)
        >>> jax.grad(lambda x: separable_conv2d(x, *kernels).sum())(x).shape
        (1, 5, 5, 2)
    """
    after = activation if callable(activation) else None
    spec = ConvSpec(
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
        data_format=data_format,
        activation=None if callable(activation) else activation,
        input_activation=input_activation,
        depthwise_activation=depthwise_activation,
    )
    geometry, operands = _plan(spec, x, depthwise_kernel, pointwise_kernel, bias, depthwise_bias)
    # Compiled also outside of jit. A symbolic batch (jax.export) cannot cross the border.
    function = _composition if _is_symbolic(geometry.batch) else _compiled_forward
    y = function(geometry, *operands)
    return y if after is None else after(y)


def why_not(
    x: jax.typing.ArrayLike,
    depthwise_kernel: jax.typing.ArrayLike,
    pointwise_kernel: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = None,
    *,
    depthwise_bias: jax.typing.ArrayLike | None = None,
    **keywords: Any,
) -> str | None:
    """Tells why a call of `separable_conv2d` would run JAX's own convolutions.

    Args:
        x: As in `separable_conv2d`; a `jax.ShapeDtypeStruct` will do, here and below.
        depthwise_kernel: As there.
        pointwise_kernel: As there.
        bias: As there.
        depthwise_bias: As there.
        **keywords: The other keywords there.

    Returns:
        `None` if the kernel of this library runs it, else the reason. An array that does not say
        where it lives counts as being on `jax.default_backend()`.

    Raises:
        TypeError: as `separable_conv2d`.
        ValueError: as `separable_conv2d`.

    Example:
        >>> import jax.numpy as jnp
        >>> why_not(jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 1)), jnp.ones((1, 1, 2, 4))) is None
        True
    """
    if callable(keywords.get("activation")):
        keywords["activation"] = None
    spec = ConvSpec(**keywords)
    geometries: list[Geometry] = []

    def note(*arrays: Any) -> jax.Array:
        geometry, operands = _plan(spec, *arrays)
        geometries.append(geometry)
        return operands[0]

    arrays = (x, depthwise_kernel, pointwise_kernel, bias, depthwise_bias)
    dtype = jax.eval_shape(note, *arrays).dtype
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        platform = next(iter(x.devices())).platform
    else:
        platform = jax.default_backend()
    return _refusal(geometries[0], dtype, platform)


def _is_symbolic(size: object) -> bool:
    return not isinstance(size, int)


def _refusal(geometry: Geometry, dtype: np.dtype[Any], platform: str) -> str | None:
    if _is_symbolic(geometry.batch):
        return f"the batch size is symbolic, {geometry.batch}"
    if _REGISTRATION_FAULT is not None:
        return _REGISTRATION_FAULT
    if platform in ("gpu", "cuda", "rocm"):
        return (
            "on a GPU, JAX computes its own two convolutions: the GPU kernels of this library take "
            f"tensors of torch, and the data is on {platform!r}"
        )
    return backends.why_not(geometry, dtype.name, platform)


def _plan(
    spec: ConvSpec,
    x: jax.typing.ArrayLike,
    depthwise_kernel: jax.typing.ArrayLike,
    pointwise_kernel: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None,
    depthwise_bias: jax.typing.ArrayLike | None,
) -> tuple[Geometry, list[jax.Array]]:
    """Returns the integers of a call and its operands, all of one dtype."""
    given = {
        "x": x,
        "depthwise_kernel": depthwise_kernel,
        "pointwise_kernel": pointwise_kernel,
        "depthwise_bias": depthwise_bias,
        "bias": bias,
    }
    arrays = {name: jnp.asarray(value) for name, value in given.items() if value is not None}
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"`{name}` must be floating-point. Received: {name} of {array.dtype}")
    strong = [array.dtype for array in arrays.values() if not jax.typeof(array).weak_type]
    if len(set(strong)) > 1:
        received = ", ".join(f"{name} of {array.dtype}" for name, array in arrays.items())
        raise TypeError(f"arrays must have one dtype; none is cast. Received: {received}")
    # A weakly typed array has taken its dtype from a Python number, and follows its company in JAX.
    dtype = strong[0] if strong else jnp.result_type(*arrays.values())
    operands = [lax.convert_element_type(array, dtype) for array in arrays.values()]
    shapes = {name: array.shape for name, array in arrays.items()}
    batch = shapes["x"][:1]
    symbolic = any(map(_is_symbolic, batch))
    geometry = spec.resolve(
        (1, *shapes["x"][1:]) if symbolic else shapes["x"],
        shapes["depthwise_kernel"],
        shapes["pointwise_kernel"],
        shapes.get("bias"),
        shapes.get("depthwise_bias"),
    )
    return (geometry._replace(batch=batch[0]) if symbolic else geometry), operands


# ----------------------------------------------------------------- the operation in JAX's own terms


def _hard_sigmoid(x: jax.Array) -> jax.Array:
    # XLA divides by 6 in its own way, so the ends are found before.
    inside = jnp.where(x <= -3, 0, x / 6 + 0.5)
    return jnp.where(x >= 3, 1, inside).astype(x.dtype)


# Written so that JAX takes the slopes of the kernels at the kinks.
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "relu6": lambda x: jnp.where(x >= 6, 6, jax.nn.relu(x)).astype(x.dtype),
    "leaky_relu": functools.partial(jax.nn.leaky_relu, negative_slope=0.2),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "hard_sigmoid": _hard_sigmoid,
    "hard_silu": lambda x: x * _hard_sigmoid(x),
    "elu": jax.nn.elu,
}


def _activate(code: int, x: jax.Array) -> jax.Array:
    return _ACTIVATIONS[ACTIVATIONS[code]](x)


def _along_channels(geometry: Geometry, vector: jax.Array) -> jax.Array:
    return vector if geometry.layout == 0 else vector[:, None, None]


def _named(geometry: Geometry, operands: Sequence[Any]) -> tuple[Any, Any, Any, Any, Any]:
    """Operands, with None for a bias that the geometry does not have."""
    x, depthwise_kernel, pointwise_kernel, *biases = operands
    depthwise_bias = biases.pop(0) if geometry.has_depthwise_bias else None
    bias = biases.pop(0) if geometry.has_bias else None
    return x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias


def _composition(
    geometry: Geometry, *operands: jax.Array, depthwise: Callable[..., jax.Array] | None = None
) -> jax.Array:
    """The operation by JAX's convolutions, or with another depthwise stage."""
    g = geometry
    x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias = _named(g, operands)
    # What the last window needs beyond the input; negative where it ends before the input does.
    reach_height = (g.kernel_height - 1) * g.dilation_height + 1
    reach_width = (g.kernel_width - 1) * g.dilation_width + 1
    bottom = (g.out_height - 1) * g.stride_height + reach_height - g.in_height - g.pad_top
    right = (g.out_width - 1) * g.stride_width + reach_width - g.in_width - g.pad_left
    padding = (g.pad_top, bottom), (g.pad_left, right)
    stage = depthwise or _depthwise_by_convolution
    u = stage(g, _activate(g.input_activation, x), depthwise_kernel, padding)
    if depthwise_bias is not None:
        u += _along_channels(g, depthwise_bias)
    u = _activate(g.depthwise_activation, u)
    numbers = _dimension_numbers(g)
    y = lax.conv_general_dilated(u, pointwise_kernel, (1, 1), "VALID", dimension_numbers=numbers)
    if bias is not None:
        y += _along_channels(g, bias)
    return _activate(g.activation, y)


def _dimension_numbers(geometry: Geometry) -> tuple[str, str, str]:
    return ("NHWC", "HWIO", "NHWC") if geometry.layout == 0 else ("NCHW", "HWIO", "NCHW")


Padding: TypeAlias = "tuple[tuple[int, int], tuple[int, int]]"


def _depthwise_by_convolution(
    geometry: Geometry, x: jax.Array, kernel: jax.Array, padding: Padding
) -> jax.Array:
    g = geometry
    return lax.conv_general_dilated(
        x,
        kernel.reshape(g.kernel_height, g.kernel_width, 1, g.depthwise_channels),
        window_strides=(g.stride_height, g.stride_width),
        padding=padding,
        rhs_dilation=(g.dilation_height, g.dilation_width),
        dimension_numbers=_dimension_numbers(g),
        feature_group_count=g.in_channels,
    )


_MOST_TAPS = 64  # A program of more is long, and slow to compile.


def _depthwise_by_taps(
    geometry: Geometry, x: jax.Array, kernel: jax.Array, padding: Padding
) -> jax.Array:
    """A sum over the taps, whose derivatives XLA divides between devices as it should.

    Of a convolution in groups it adds up the gradient by the kernel too often, where images are
    spread over one of several axes of a mesh (jaxlib 0.10.2).
    """
    g = geometry
    if g.kernel_height * g.kernel_width > _MOST_TAPS:
        return _depthwise_by_convolution(g, x, kernel, padding)
    rows = 1 if g.layout == 0 else 2  # The axis of the rows; that of the columns follows.
    strides, sizes, edges = [1] * 4, list(x.shape), [(0, 0, 0)] * 4
    strides[rows : rows + 2] = g.stride_height, g.stride_width
    sizes[rows : rows + 2] = g.out_height, g.out_width
    edges[rows : rows + 2] = [(before, after, 0) for before, after in padding]
    x = lax.pad(x, jnp.zeros((), x.dtype), edges)
    exact = jnp.promote_types(x.dtype, jnp.float32)
    u = jnp.zeros((), exact)
    for row in range(g.kernel_height):
        for column in range(g.kernel_width):
            start, weights = [0] * 4, kernel[row, column]
            start[rows : rows + 2] = row * g.dilation_height, column * g.dilation_width
            end = [a + (n - 1) * s + 1 for a, n, s in zip(start, sizes, strides, strict=True)]
            pixels = lax.slice(x, start, end, strides)
            # The multiplier is an axis of its own, after that of the channels.
            if g.layout == 0:
                pixels = pixels[..., None]
            else:
                pixels, weights = pixels[:, :, None], weights[:, :, None, None]
            u += pixels.astype(exact) * weights.astype(exact)
    sizes[3 if g.layout == 0 else 1] = g.depthwise_channels
    return u.reshape(sizes).astype(x.dtype)


def _is_multilinear(geometry: Geometry) -> bool:
    g = geometry
    activations = g.input_activation, g.depthwise_activation, g.activation
    return not any((*activations, g.has_depthwise_bias, g.has_bias))


def _separated(geometry: Geometry, *operands: jax.Array) -> jax.Array:
    """The operation as activation(multilinear forward + bias), which JAX can take apart."""
    g = geometry
    if g.depthwise_activation:  # The forward is then no product of its operands.
        return _composition(g, *operands, depthwise=_depthwise_by_taps)
    x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias = _named(g, operands)
    multilinear = g._replace(input_activation=0, activation=0, has_depthwise_bias=0, has_bias=0)
    y = _forward(multilinear, _activate(g.input_activation, x), depthwise_kernel, pointwise_kernel)
    if depthwise_bias is not None:
        y += _along_channels(g, depthwise_bias @ pointwise_kernel[0, 0])
    if bias is not None:
        y += _along_channels(g, bias)
    return _activate(g.activation, y)


def _replaced(
    operands: Sequence[Any], positions: Sequence[int], values: Sequence[Any]
) -> list[Any]:
    result = list(operands)
    for position, value in zip(positions, values, strict=True):
        result[position] = value
    return result


# ---------------------------------------------------------------------------- the three primitives

_forward_p = Primitive("sepconv_forward")
_tangent_p = Primitive("sepconv_tangent")
_backward_p = Primitive("sepconv_backward")
_backward_p.multiple_results = True


def _num_operands(geometry: Geometry) -> int:
    return 3 + geometry.has_depthwise_bias + geometry.has_bias


# The names of these two in JAX changed in 0.10 and 0.8.
def _varying(array: jax.Array) -> frozenset[Any]:
    aval: Any = jax.typeof(array)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma


def _vary(array: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    if hasattr(lax, "pcast"):
        return lax.pcast(array, axes, to="varying")
    return lax.pvary(array, axes)  # type: ignore[attr-defined]


def _aligned(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Inside `shard_map`, makes arrays vary over the same mesh axes, as the primitives need."""
    axes = [_varying(array) for array in arrays]
    every = frozenset().union(*axes)
    return [
        _vary(array, tuple(every - own)) if every - own else array
        for array, own in zip(arrays, axes, strict=True)
    ]


def _forward(geometry: Geometry, *operands: jax.Array) -> jax.Array:
    return _forward_p.bind(*_aligned(operands), geometry=geometry)


def _tangent(
    geometry: Geometry,
    operands: Sequence[jax.Array],
    y: Sequence[jax.Array],
    wrt: Positions,
    tangents: Sequence[jax.Array],
) -> jax.Array:
    """`y` is empty or holds the output; it is passed on to the transpose."""
    args = _aligned((*operands, *y, *tangents))
    return _tangent_p.bind(*args, geometry=geometry, wrt=wrt)


def _backward(
    geometry: Geometry,
    dy: jax.Array,
    operands: Sequence[jax.Array],
    y: Sequence[jax.Array],
    wrt: Positions,
) -> list[jax.Array]:
    """`y` is empty or holds the output, which spares the kernel computing it again."""
    args = _aligned((dy, *operands, *y))
    return _backward_p.bind(*args, geometry=geometry, wrt=wrt)


def _split_tangent(args: Sequence[Any], geometry: Geometry, wrt: Positions) -> tuple[Any, Any, Any]:
    """Returns operands, y, tangents."""
    count, end = _num_operands(geometry), len(args) - len(wrt)
    return args[:count], args[count:end], args[end:]


def _split_backward(args: Sequence[Any], geometry: Geometry) -> tuple[Any, Any, Any]:
    """Returns dy, operands, y."""
    count = 1 + _num_operands(geometry)
    return args[0], args[1:count], args[count:]


# What each primitive computes, in terms of JAX or of the others.


def _tangent_by_jax(*args: jax.Array, geometry: Geometry, wrt: Positions) -> jax.Array:
    operands, _, tangents = _split_tangent(args, geometry, wrt)
    if _is_multilinear(geometry):
        terms = [
            _forward(geometry, *_replaced(operands, [position], [tangent]))
            for position, tangent in zip(wrt, tangents, strict=True)
        ]
        return functools.reduce(jnp.add, terms)

    def function(*chosen: jax.Array) -> jax.Array:
        return _separated(geometry, *_replaced(operands, wrt, chosen))

    return jax.jvp(function, [operands[i] for i in wrt], list(tangents))[1]


def _backward_by_jax(
    function: Callable[..., jax.Array], *args: jax.Array, geometry: Geometry, wrt: Positions
) -> list[jax.Array]:
    dy, operands, _ = _split_backward(args, geometry)

    def of_chosen(*chosen: jax.Array) -> jax.Array:
        return function(geometry, *_replaced(operands, wrt, chosen))

    return list(jax.vjp(of_chosen, *(operands[i] for i in wrt))[1](dy))


# Shapes.


def _output_shape(geometry: Geometry, operands: Sequence[Any]) -> Any:
    """Over a mesh of explicit axes, y is spread like the images of x and the filters."""
    sharding = operands[0].sharding
    if any(array.sharding.spec.count(None) < array.ndim for array in operands):
        _, axes = _spread(geometry, _operand_dimensions(geometry), operands)
        sharding = _placed(sharding.mesh, axes, _output_dimensions(geometry))
    return operands[0].update(shape=geometry.y_shape, sharding=sharding, weak_type=False)


@_forward_p.def_abstract_eval
def _forward_shape(*operands: Any, geometry: Geometry) -> Any:
    return _output_shape(geometry, operands)


@_tangent_p.def_abstract_eval
def _tangent_shape(*args: Any, geometry: Geometry, wrt: Positions) -> Any:
    return _output_shape(geometry, _split_tangent(args, geometry, wrt)[0])


@_backward_p.def_abstract_eval
def _backward_shape(*args: Any, geometry: Geometry, wrt: Positions) -> list[Any]:
    _, operands, _ = _split_backward(args, geometry)
    return [operands[i].update(weak_type=False) for i in wrt]


# Derivatives.


def _is_zero(value: Any) -> bool:
    return isinstance(value, ad.Zero)


def _zero_tangent(value: jax.Array) -> Any:
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def _nonzero(values: Sequence[Any]) -> Positions:
    return tuple(i for i, value in enumerate(values) if not _is_zero(value))


def _saves_output(geometry: Geometry) -> bool:
    return geometry.activation != 0 and _native.slope_follows_from_output(geometry.activation)


def _blank(undefined: Any) -> jax.Array:
    """Stands for the operand that a gradient is taken by and, without activations, free of."""
    return jnp.zeros(undefined.aval.shape, undefined.aval.dtype)


def _forward_jvp(
    operands: Sequence[Any], tangents: Sequence[Any], *, geometry: Geometry
) -> tuple[Any, Any]:
    y = _forward(geometry, *operands)
    wrt = _nonzero(tangents)
    saved = [y] if _saves_output(geometry) else []
    return y, _tangent(geometry, operands, saved, wrt, [tangents[i] for i in wrt])


def _tangent_jvp(
    args: Sequence[Any], args_tangents: Sequence[Any], *, geometry: Geometry, wrt: Positions
) -> tuple[Any, Any]:
    operands, y, tangents = _split_tangent(args, geometry, wrt)
    # `y` is a function of the operands, and the terms below account for every use of those.
    of_operands, _, of_tangents = _split_tangent(args_tangents, geometry, wrt)
    terms = []
    if live := _nonzero(of_tangents):
        values = [of_tangents[i] for i in live]
        terms.append(_tangent(geometry, operands, y, tuple(wrt[i] for i in live), values))
    if changed := _nonzero(of_operands):

        def function(*chosen: jax.Array) -> jax.Array:
            everything = (*_replaced(operands, changed, chosen), *tangents)
            return _tangent_by_jax(*everything, geometry=geometry, wrt=wrt)

        point = [operands[i] for i in changed]
        terms.append(jax.jvp(function, point, [of_operands[i] for i in changed])[1])
    out = _tangent(geometry, operands, y, wrt, tangents)
    return out, functools.reduce(jnp.add, terms) if terms else _zero_tangent(out)


def _backward_jvp(
    args: Sequence[Any], args_tangents: Sequence[Any], *, geometry: Geometry, wrt: Positions
) -> tuple[Any, Any]:
    dy, operands, y = _split_backward(args, geometry)
    of_dy, of_operands, _ = _split_backward(args_tangents, geometry)
    changed = _nonzero(of_operands)
    terms: dict[int, list[jax.Array]] = {position: [] for position in wrt}

    def collect(positions: Positions, gradients: Sequence[jax.Array]) -> None:
        for position, gradient in zip(positions, gradients, strict=True):
            terms[position].append(gradient)

    if not _is_zero(of_dy):
        collect(wrt, _backward(geometry, of_dy, operands, y, wrt))
    if _is_multilinear(geometry):
        for i in changed:  # The gradient by an operand does not depend on this operand.
            if others := tuple(position for position in wrt if position != i):
                replaced = _replaced(operands, [i], [of_operands[i]])
                collect(others, _backward(geometry, dy, replaced, [], others))
    elif changed:

        def function(*chosen: jax.Array) -> list[jax.Array]:
            everything = (dy, *_replaced(operands, changed, chosen))
            return _backward_by_jax(_separated, *everything, geometry=geometry, wrt=wrt)

        point = [operands[i] for i in changed]
        collect(wrt, jax.jvp(function, point, [of_operands[i] for i in changed])[1])
    out = _backward(geometry, dy, operands, y, wrt)
    sums = [
        functools.reduce(jnp.add, terms[position]) if terms[position] else _zero_tangent(gradient)
        for position, gradient in zip(wrt, out, strict=True)
    ]
    return out, sums


def _forward_transpose(ct: Any, *operands: Any, geometry: Geometry) -> list[Any]:
    if not _is_multilinear(geometry):
        raise NotImplementedError(
            "`separable_conv2d` with an activation or a bias is not linear, so it has no transpose"
        )
    (i,) = (i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand))
    if _is_zero(ct):
        return [None] * len(operands)
    known = _replaced(operands, [i], [_blank(operands[i])])
    return _replaced([None] * len(operands), [i], _backward(geometry, ct, known, [], (i,)))


def _tangent_transpose(ct: Any, *args: Any, geometry: Geometry, wrt: Positions) -> list[Any]:
    operands, y, tangents = _split_tangent(args, geometry, wrt)
    result: list[Any] = [None] * len(args)
    asked = [i for i, tangent in enumerate(tangents) if ad.is_undefined_primal(tangent)]
    if not _is_zero(ct):
        gradients = _backward(geometry, ct, operands, y, tuple(wrt[i] for i in asked))
        first = len(args) - len(wrt)
        result = _replaced(result, [first + i for i in asked], gradients)
    return result


def _backward_transpose(cts: Any, *args: Any, geometry: Geometry, wrt: Positions) -> list[Any]:
    dy, operands, y = _split_backward(args, geometry)
    result: list[Any] = [None] * len(args)
    live = _nonzero(cts)
    if not live:
        return result
    positions, values = tuple(wrt[i] for i in live), [cts[i] for i in live]
    if ad.is_undefined_primal(dy):
        result[0] = _tangent(geometry, operands, y, positions, values)
        return result
    # Linear in operand i: <ct, gradient by p> = <operand i, gradient by i with p replaced by ct>.
    (i,) = (i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand))
    terms = [
        _backward(geometry, dy, _replaced(operands, [i, p], [_blank(operands[i]), ct]), [], (i,))[0]
        for p, ct in zip(positions, values, strict=True)
    ]
    result[1 + i] = functools.reduce(jnp.add, terms)
    return result


# Batching. An image here is an array whose first axis is the batch.


def _batched(
    primitive: Any,
    images: Callable[[Sequence[Any], Geometry, Positions], set[int]],
    args: Sequence[Any],
    dims: Sequence[Any],
    *,
    geometry: Geometry,
    wrt: Positions | None = None,
) -> tuple[Any, Any]:
    """Folds a mapped axis into the batch; where a kernel or its gradient is mapped, loops."""
    params = {} if wrt is None else {"wrt": wrt}
    mapped = [i for i, dim in enumerate(dims) if dim is not None]
    args = _replaced(args, mapped, [jnp.moveaxis(args[i], dims[i], 0) for i in mapped])
    size = args[mapped[0]].shape[0]
    foldable = images(args, geometry, wrt or ())
    if foldable.issuperset(mapped) and (not primitive.multiple_results or wrt == (0,)):
        folded = list(args)
        for i in foldable:
            whole = args[i] if i in mapped else jnp.broadcast_to(args[i], (size, *args[i].shape))
            folded[i] = whole.reshape(size * geometry.batch, *whole.shape[2:])
        bigger = geometry._replace(batch=size * geometry.batch)
        out = primitive.bind(*_aligned(folded), geometry=bigger, **params)
        out = jax.tree.map(lambda y: y.reshape(size, geometry.batch, *y.shape[1:]), out)
    else:

        def one(slices: Sequence[jax.Array]) -> Any:
            whole = _aligned(_replaced(args, mapped, slices))
            return primitive.bind(*whole, geometry=geometry, **params)

        out = lax.map(one, [args[i] for i in mapped])
    return out, [0] * len(out) if primitive.multiple_results else 0


def _forward_images(args: Sequence[Any], geometry: Geometry, wrt: Positions) -> set[int]:
    return {0}


def _tangent_images(args: Sequence[Any], geometry: Geometry, wrt: Positions) -> set[int]:
    count, first = _num_operands(geometry), len(args) - len(wrt)
    return {0, *range(count, first), *(first + i for i, p in enumerate(wrt) if p == 0)}


def _backward_images(args: Sequence[Any], geometry: Geometry, wrt: Positions) -> set[int]:
    return {0, 1, *range(1 + _num_operands(geometry), len(args))}


# Partitioning. A dimension has a name; "images" and "filters" may be spread over mesh axes.

Axes: TypeAlias = "tuple[Any, ...]"
Dimensions: TypeAlias = "tuple[str, ...]"


def _operand_dimensions(geometry: Geometry) -> list[Dimensions]:
    x = ("images", "rows", "columns", "channels")
    if geometry.layout != 0:
        x = ("images", "channels", "rows", "columns")
    depthwise_kernel = ("kernelrows", "kernelcolumns", "channels", "multiplier")
    pointwise_kernel = ("one", "another", "depthwisechannels", "filters")
    depthwise_bias = [("depthwisechannels",)] * geometry.has_depthwise_bias
    bias = [("filters",)] * geometry.has_bias
    return [x, depthwise_kernel, pointwise_kernel, *depthwise_bias, *bias]


def _output_dimensions(geometry: Geometry) -> Dimensions:
    if geometry.layout == 0:
        return "images", "outrows", "outcolumns", "filters"
    return "images", "filters", "outrows", "outcolumns"


def _sharding_rule(inputs: Sequence[Dimensions], outputs: Sequence[Dimensions]) -> Any:
    sides = (", ".join(" ".join(names) for names in side) for side in (inputs, outputs))
    every = dict.fromkeys(name for names in (*inputs, *outputs) for name in names)
    whole = tuple(name for name in every if name not in ("images", "filters"))
    return " -> ".join(sides), {"need_replication_factors": whole}


def _spread(
    geometry: Geometry, dimensions: Sequence[Dimensions], arrays: Sequence[Any]
) -> tuple[Geometry, dict[str, Axes]]:
    """The call of one device, and the mesh axes that images and filters are spread over.

    The first array that is spread along a dimension decides. One axis cannot do both; images, which
    are larger than weights, come first.
    """
    axes: dict[str, Axes] = {}
    sizes = {"images": geometry.batch, "filters": geometry.out_channels}
    for name, size in sizes.items():
        for names, array in zip(dimensions, arrays, strict=True):
            sharding = array.sharding
            if name not in names or not isinstance(sharding, NamedSharding):
                continue
            entry = (*sharding.spec, *[None] * len(names))[names.index(name)]
            found = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
            parts = np.prod([sharding.mesh.shape[axis] for axis in found], dtype=int)
            # The partitioner would fill up unequal parts, and their gradients, with anything.
            if parts > 1 and size % parts == 0 and not {*found} & {*axes.get("images", ())}:
                axes[name], sizes[name] = found, size // int(parts)
                break
    return geometry._replace(batch=sizes["images"], out_channels=sizes["filters"]), axes


def _placed(mesh: Mesh, axes: dict[str, Axes], names: Dimensions) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(axes.get(name) for name in names)))


@functools.partial(custom_partitioning, static_argnums=(0,))
def _spread_forward(geometry: Geometry, *operands: jax.Array) -> jax.Array:
    return _forward_p.bind(*operands, geometry=geometry)


def _partition_forward(geometry: Geometry, mesh: Mesh, operands: Any, y: Any) -> Any:
    inputs, output = _operand_dimensions(geometry), _output_dimensions(geometry)
    part, axes = _spread(geometry, [*inputs, output], [*operands, y])

    def compute(*operands: jax.Array) -> jax.Array:
        return _forward_p.bind(*operands, geometry=part)

    return (
        mesh,
        compute,
        _placed(mesh, axes, output),
        tuple(_placed(mesh, axes, names) for names in inputs),
    )


_spread_forward.def_partition(
    partition=_partition_forward,
    infer_sharding_from_operands=lambda *args: _partition_forward(*args)[2],
    sharding_rule=lambda geometry, *_: _sharding_rule(
        _operand_dimensions(geometry), [_output_dimensions(geometry)]
    ),
)


def _backward_dimensions(
    geometry: Geometry, wrt: Positions, count: int
) -> tuple[list[Dimensions], list[Dimensions]]:
    """Of the `count` arguments of `backward`, and of its results."""
    operands, y = _operand_dimensions(geometry), _output_dimensions(geometry)
    inputs = [y, *operands, y][:count]
    return inputs, [operands[position] for position in wrt]


@functools.partial(custom_partitioning, static_argnums=(0, 1))
def _spread_backward(geometry: Geometry, wrt: Positions, *args: jax.Array) -> list[jax.Array]:
    return _backward_p.bind(*args, geometry=geometry, wrt=wrt)


def _partition_backward(
    geometry: Geometry, wrt: Positions, mesh: Mesh, args: Any, gradients: Any
) -> Any:
    inputs, outputs = _backward_dimensions(geometry, wrt, len(args))
    part, axes = _spread(geometry, [*inputs[1:], inputs[0]], [*args[1:], args[0]])

    def compute(*args: jax.Array) -> list[jax.Array]:
        results = []
        found = _backward_p.bind(*args, geometry=part, wrt=wrt)
        for names, gradient in zip(outputs, found, strict=True):
            summed = [axis for name in axes if name not in names for axis in axes[name]]
            results.append(lax.psum(gradient, tuple(summed)) if summed else gradient)
        return results

    return (
        mesh,
        compute,
        [_placed(mesh, axes, names) for names in outputs],
        tuple(_placed(mesh, axes, names) for names in inputs),
    )


_spread_backward.def_partition(
    partition=_partition_backward,
    infer_sharding_from_operands=lambda *args: _partition_backward(*args)[2],
    sharding_rule=lambda geometry, wrt, mesh, inputs, outputs: _sharding_rule(
        *_backward_dimensions(geometry, wrt, len(inputs))
    ),
)


# Lowering.


def _is_partitioned(ctx: Any) -> bool:
    """Whether XLA will divide the computation between devices; inside of `shard_map` it is done."""
    devices = getattr(ctx.module_context.axis_context, "device_assignment", None) or ()
    # The rules are functions of this process, which an exported computation leaves.
    return len(devices) > 1 and not ctx.module_context.lowering_parameters.for_export


def _lower_forward(ctx: Any, *operands: Any, geometry: Geometry, platform: str = "") -> Any:
    if _is_partitioned(ctx):
        spread = functools.partial(_spread_forward, geometry)
        return mlir.lower_fun(spread, multiple_results=False)(ctx, *operands)
    if platform == "" or _refusal(geometry, ctx.avals_in[0].dtype, platform) is not None:
        return _FORWARD_BY_JAX(ctx, *operands, geometry=geometry)
    rule = jax.ffi.ffi_lowering("sepconv_forward")
    return rule(ctx, *operands, geometry=np.array(geometry, np.int64))


def _lower_backward(
    ctx: Any, *args: Any, geometry: Geometry, wrt: Positions, platform: str = ""
) -> Any:
    if _is_partitioned(ctx):
        spread = functools.partial(_spread_backward, geometry, wrt)
        return mlir.lower_fun(spread, multiple_results=True)(ctx, *args)
    if platform == "" or _refusal(geometry, ctx.avals_in[0].dtype, platform) is not None:
        return _BACKWARD_BY_JAX(ctx, *args, geometry=geometry, wrt=wrt)
    _, _, y = _split_backward(args, geometry)
    flags = [position in wrt for position in range(_num_operands(geometry))]
    named = [bool(flag) for flag in _named(geometry, flags)]
    rule = jax.ffi.ffi_lowering("sepconv_backward")
    return rule(
        ctx,
        *args,
        geometry=np.array(geometry, np.int64),
        wrt=np.array(named, np.int64),
        has_y=bool(y),
    )


def _register_handlers() -> str | None:
    """Makes the kernels known to XLA; returns why that cannot be done, or None."""
    handlers = _native.xla_handlers()
    if not handlers:
        return "sepconv was built without the XLA headers, so JAX cannot call its kernel"
    # XLA would accept the registration and then, if it is older, refuse to start on the CPU.
    text = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text(encoding="utf-8")
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text))
    running = int(found["MAJOR"]), int(found["MINOR"])
    built = handlers.pop("api_version")
    if running[0] != built[0] or running[1] < built[1]:
        return f"sepconv was built for XLA FFI {built}, and the installed jaxlib has {running}"
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return None


def _forward_by_jax(*operands: jax.Array, geometry: Geometry) -> jax.Array:
    return _composition(geometry, *operands)


_FORWARD_BY_JAX = mlir.lower_fun(_forward_by_jax, multiple_results=False)
_BACKWARD_BY_JAX = mlir.lower_fun(
    functools.partial(_backward_by_jax, _composition), multiple_results=True
)
_REGISTRATION_FAULT = _register_handlers()

for _primitive in (_forward_p, _tangent_p, _backward_p):
    _primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
    # `custom_partitioning`, into which they may be lowered, needs to know the devices.
    prim_requires_devices_during_lowering.add(_primitive)
ad.primitive_jvps[_forward_p] = _forward_jvp
ad.primitive_jvps[_tangent_p] = _tangent_jvp
ad.primitive_jvps[_backward_p] = _backward_jvp
ad.primitive_transposes[_forward_p] = _forward_transpose
ad.primitive_transposes[_tangent_p] = _tangent_transpose
ad.primitive_transposes[_backward_p] = _backward_transpose
for _primitive, _images in (
    (_forward_p, _forward_images),
    (_tangent_p, _tangent_images),
    (_backward_p, _backward_images),
):
    batching.primitive_batchers[_primitive] = functools.partial(_batched, _primitive, _images)
mlir.register_lowering(_tangent_p, mlir.lower_fun(_tangent_by_jax, multiple_results=False))
for _primitive, _lower in ((_forward_p, _lower_forward), (_backward_p, _lower_backward)):
    mlir.register_lowering(_primitive, _lower)
    mlir.register_lowering(_primitive, functools.partial(_lower, platform="cpu"), platform="cpu")

_compiled_forward = jax.jit(_forward, static_argnums=0, inline=True)
