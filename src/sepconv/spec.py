"""The plan of a separable convolution: hyper-parameters in, exact integers out.

`ConvSpec` understands the arguments once; `ConvSpec.resolve` turns them and the array shapes into
a `Geometry`, the flat list of integers that every kernel receives. The padding and output-size
formulas of the library live here and nowhere else. They use only `+ - * //` and comparisons, so
that unknown (`None`) and symbolic sizes pass through them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

__all__ = [
    "ACTIVATIONS",
    "ConvSpec",
    "Geometry",
    "canonical_activation",
    "canonical_padding",
    "canonical_pair",
]

ACTIVATIONS: tuple[str, ...] = (
    "linear",
    "relu",
    "relu6",
    "leaky_relu",
    "sigmoid",
    "tanh",
    "silu",
    "gelu",
    "hard_sigmoid",
    "hard_silu",
    "elu",
)
"""Names of the fused activations. The index of a name is its number in a `Geometry`."""

_ALIASES = {"swish": "silu", "hard_swish": "hard_silu"}
_DATA_FORMATS = ("channels_last", "channels_first")
_MAX_SIZE = 2**63 - 1

Padding: TypeAlias = "str | tuple[tuple[int, int], tuple[int, int]]"
"""`"valid"`, `"same"`, or `((top, bottom), (left, right))`."""

IntOrPair: TypeAlias = "SupportsIndex | Iterable[SupportsIndex]"


def canonical_activation(name: str | None, argument: str = "activation") -> str:
    """Returns the name under which a fused activation is listed in `ACTIVATIONS`.

    Args:
        name: A name known to Keras, or `None` for no activation.
        argument: What to call the argument in an error message.

    Returns:
        One of `ACTIVATIONS`.

    Raises:
        TypeError: `name` is neither text nor `None`.
        ValueError: no fused activation has this name.

    Example:
        >>> canonical_activation("swish"), canonical_activation(None)
        ('silu', 'linear')
    """
    if name is None:
        return "linear"
    if not isinstance(name, str):
        raise TypeError(
            f"`{argument}` must be the name of an activation or None. Received: {argument}={name!r}"
        )
    canonical = _ALIASES.get(name, name)
    if canonical not in ACTIVATIONS:
        known = ", ".join((*ACTIVATIONS, *_ALIASES))
        raise ValueError(f"`{argument}` must be one of {known}. Received: {argument}={name!r}")
    return canonical


class Geometry(NamedTuple):
    """Every integer of one call, in the order in which it crosses every border."""

    batch: int
    in_height: int
    in_width: int
    in_channels: int
    depth_multiplier: int
    out_height: int
    out_width: int
    out_channels: int
    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    dilation_height: int
    dilation_width: int
    pad_top: int
    pad_left: int
    layout: int
    """0: (batch, height, width, channels). 1: (batch, channels, height, width)."""
    input_activation: int
    depthwise_activation: int
    activation: int
    has_depthwise_bias: int
    has_bias: int

    @property
    def depthwise_channels(self) -> int:
        """Channels between the two stages; channel `c`, multiplier `m` is `c*M + m`."""
        return self.in_channels * self.depth_multiplier

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """Shape of the input, in the layout."""
        return self._image_shape(self.in_height, self.in_width, self.in_channels)

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output, in the layout."""
        return self._image_shape(self.out_height, self.out_width, self.out_channels)

    @property
    def depthwise_kernel_shape(self) -> tuple[int, int, int, int]:
        """(kernel_height, kernel_width, in_channels, depth_multiplier)."""
        return (self.kernel_height, self.kernel_width, self.in_channels, self.depth_multiplier)

    @property
    def pointwise_kernel_shape(self) -> tuple[int, int, int, int]:
        """(1, 1, in_channels * depth_multiplier, out_channels)."""
        return (1, 1, self.depthwise_channels, self.out_channels)

    @property
    def bias_shape(self) -> tuple[int]:
        """(out_channels,), whether or not there is a bias."""
        return (self.out_channels,)

    @property
    def depthwise_bias_shape(self) -> tuple[int]:
        """(in_channels * depth_multiplier,), whether or not there is a bias between the stages."""
        return (self.depthwise_channels,)

    @property
    def macs(self) -> int:
        """Multiply-adds of a forward call, taps that fall on the padding included."""
        taps = self.kernel_height * self.kernel_width
        pixels = self.batch * self.out_height * self.out_width
        return pixels * self.depthwise_channels * (taps + self.out_channels)

    def _image_shape(self, height: int, width: int, channels: int) -> tuple[int, int, int, int]:
        if self.layout == 0:
            return (self.batch, height, width, channels)
        return (self.batch, channels, height, width)


@dataclass(frozen=True, init=False, repr=True)
class ConvSpec:
    """The hyper-parameters of a separable convolution, checked and in one canonical form.

    For one direction with size n, kernel k, stride s, dilation d and reach r = (k - 1)*d + 1:

        "valid":          out = floor((n - r) / s) + 1
        "same":           out = ceil(n / s), total = max((out - 1)*s + r - n, 0);
                          floor(total / 2) zeros go before, the rest after
        (before, after):  out = floor((n + before + after - r) / s) + 1

    Args:
        strides: An int, or one per direction (height, width).
        padding: `"valid"` or `"same"` in any case, or `((top, bottom), (left, right))`.
        dilation_rate: An int, or one per direction.
        data_format: `"channels_last"` or `"channels_first"` in any case.
        activation: Name of the activation after the bias, or `None`.
        input_activation: Name of the activation of the input, before it is padded.
        depthwise_activation: Name of the activation between the two stages.

    Raises:
        TypeError: a size is not an integer, or an activation is not text.
        ValueError: an argument is out of range.

    Example:
        >>> spec = ConvSpec(strides=2, padding="SAME", activation="swish")
        >>> spec.strides, spec.padding, spec.activation
        ((2, 2), 'same', 'silu')
        >>> spec.output_shape((None, 7, 8, 3), kernel_size=3, filters=16)
        (None, 4, 4, 16)
        >>> geometry = spec.resolve((1, 7, 8, 3), (3, 3, 3, 1), (1, 1, 3, 16), bias_shape=(16,))
        >>> geometry.y_shape, geometry.pad_top, geometry.pad_left
        ((1, 4, 4, 16), 1, 0)
    """

    strides: tuple[int, int]
    padding: Padding
    dilation_rate: tuple[int, int]
    data_format: str
    activation: str
    input_activation: str
    depthwise_activation: str

    def __init__(
        self,
        *,
        strides: IntOrPair = (1, 1),
        padding: str | Sequence[Sequence[SupportsIndex]] = "valid",
        dilation_rate: IntOrPair = (1, 1),
        data_format: str = "channels_last",
        activation: str | None = None,
        input_activation: str | None = None,
        depthwise_activation: str | None = None,
    ) -> None:
        fields = {
            "strides": canonical_pair("strides", strides, minimum=1),
            "padding": canonical_padding(padding),
            "dilation_rate": canonical_pair("dilation_rate", dilation_rate, minimum=1),
            "data_format": _data_format(data_format),
            "activation": canonical_activation(activation),
            "input_activation": canonical_activation(input_activation, "input_activation"),
            "depthwise_activation": canonical_activation(
                depthwise_activation, "depthwise_activation"
            ),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def channels_axis(self) -> int:
        """The axis of the channels, counted from the front: 3 or 1."""
        return 3 if self.data_format == "channels_last" else 1

    def resolve(
        self,
        x_shape: Sequence[int],
        depthwise_kernel_shape: Sequence[int],
        pointwise_kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        depthwise_bias_shape: Sequence[int] | None = None,
    ) -> Geometry:
        """Checks the shapes of a call against each other and returns its integers.

        Args:
            x_shape: (batch, height, width, channels), or as `data_format` says.
            depthwise_kernel_shape: (kernel_height, kernel_width, channels, depth_multiplier).
            pointwise_kernel_shape: (1, 1, channels * depth_multiplier, filters).
            bias_shape: (filters,), or `None` for no bias.
            depthwise_bias_shape: (channels * depth_multiplier,), or `None`.

        Returns:
            The geometry. An output without pixels is legal.

        Raises:
            ValueError: shapes do not fit together, the kernel does not fit into the padded input,
                or an array would have more than 2**63 - 1 elements.
        """
        shapes = (
            tuple(x_shape),
            tuple(depthwise_kernel_shape),
            tuple(pointwise_kernel_shape),
            None if bias_shape is None else tuple(bias_shape),
            None if depthwise_bias_shape is None else tuple(depthwise_bias_shape),
        )
        try:
            return _resolve_cached(self, *shapes)
        except TypeError:  # Symbolic sizes need not be hashable.
            return _resolve(self, *shapes)

    def output_shape(
        self, x_shape: Sequence[int | None], kernel_size: IntOrPair, filters: int
    ) -> tuple[int | None, int | None, int | None, int | None]:
        """Returns the shape of the output; sizes that are not known stay `None`.

        Args:
            x_shape: Shape of the input in the layout. Its channel size is not looked at.
            kernel_size: An int, or one per direction.
            filters: Number of output channels.

        Returns:
            Four sizes, in the layout.

        Raises:
            ValueError: an argument is out of range, or the output would have a negative size.
        """
        shape = tuple(x_shape)
        _check_rank("x_shape", shape, 4, self._layout_words())
        kernel = canonical_pair("kernel_size", kernel_size, minimum=1)
        filters = _integer("filters", filters, minimum=1)
        batch, height, width, _ = self._unpack("x_shape", shape)
        (out_height, _), (out_width, _) = self._directions(height, width, kernel)
        if self.channels_axis == 3:
            return (batch, out_height, out_width, filters)
        return (batch, filters, out_height, out_width)

    def padding_amounts(
        self, in_height: int, in_width: int, kernel_size: IntOrPair
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the zeros around the input, ((top, bottom), (left, right)).

        Args:
            in_height: Height of the input.
            in_width: Width of the input.
            kernel_size: An int, or one per direction.

        Returns:
            The amounts; in `"same"` padding the odd one is at the bottom or on the right.

        Raises:
            ValueError: an argument is out of range, or the output would have a negative size.
        """
        kernel = canonical_pair("kernel_size", kernel_size, minimum=1)
        (_, rows), (_, columns) = self._directions(in_height, in_width, kernel)
        return rows, columns

    def _layout_words(self) -> str:
        if self.channels_axis == 3:
            return "(batch, height, width, channels)"
        return "(batch, channels, height, width)"

    def _unpack(self, argument: str, shape: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
        """Splits a shape in the layout into batch, height, width, channels."""
        for size in shape:
            if size is not None and size < 0:
                raise ValueError(
                    f"`{argument}` must not have negative sizes. Received: {argument}={shape}"
                )
        if self.channels_axis == 3:
            batch, height, width, channels = shape
        else:
            batch, channels, height, width = shape
        return batch, height, width, channels

    def _directions(self, height: Any, width: Any, kernel: Sequence[Any]) -> tuple[Any, Any]:
        return self._direction(0, height, kernel[0]), self._direction(1, width, kernel[1])

    def _direction(self, axis: int, size: Any, kernel: Any) -> tuple[Any, tuple[Any, Any]]:
        """The formula of the class: output size and padding along one axis."""
        stride, dilation = self.strides[axis], self.dilation_rate[axis]
        reach = (kernel - 1) * dilation + 1
        if size is None:
            return None, (None, None)
        if self.padding == "same":
            out = (size + stride - 1) // stride
            total = max((out - 1) * stride + reach - size, 0)
            before = total // 2
            after = total - before
        else:
            before, after = (0, 0) if isinstance(self.padding, str) else self.padding[axis]
            out = (size + before + after - reach) // stride + 1
        if out < 0:
            direction = ("height", "width")[axis]
            raise ValueError(
                "`kernel_size`, dilated, must fit into the padded input so that no output size is "
                f"negative. Received: {direction}={size}, padding={self.padding!r}, "
                f"kernel_size={kernel}, dilation_rate={dilation}, strides={stride}, which would "
                f"give an output {direction} of {out}"
            )
        if reach > _MAX_SIZE or size + before + after > _MAX_SIZE:
            raise ValueError(
                "`kernel_size` and `dilation_rate` must keep the padded input below 2**63 rows and "
                f"columns. Received: kernel_size={kernel}, dilation_rate={dilation}, "
                f"padding={self.padding!r}"
            )
        return out, (before, after)


def _resolve(
    spec: ConvSpec,
    x_shape: tuple[int, ...],
    depthwise_kernel_shape: tuple[int, ...],
    pointwise_kernel_shape: tuple[int, ...],
    bias_shape: tuple[int, ...] | None,
    depthwise_bias_shape: tuple[int, ...] | None,
) -> Geometry:
    depthwise_words = "(kernel_height, kernel_width, channels, depth_multiplier)"
    pointwise_words = "(1, 1, channels * depth_multiplier, filters)"
    _check_rank("x", x_shape, 4, spec._layout_words())
    _check_rank("depthwise_kernel", depthwise_kernel_shape, 4, depthwise_words)
    _check_rank("pointwise_kernel", pointwise_kernel_shape, 4, pointwise_words)
    batch, in_height, in_width, in_channels = spec._unpack("x.shape", x_shape)
    if in_channels < 1:
        raise ValueError(f"`x` must have at least one channel. Received: x.shape={x_shape}")
    _check_positive("depthwise_kernel", depthwise_kernel_shape)
    _check_positive("pointwise_kernel", pointwise_kernel_shape)

    kernel_height, kernel_width, kernel_channels, depth_multiplier = depthwise_kernel_shape
    if kernel_channels != in_channels:
        raise ValueError(
            f"`depthwise_kernel` must have the {in_channels} channels of `x` along axis 2. "
            f"Received: x.shape={x_shape}, depthwise_kernel.shape={depthwise_kernel_shape}"
        )
    depthwise_channels = in_channels * depth_multiplier
    expected = (1, 1, depthwise_channels)
    if pointwise_kernel_shape[:3] != expected:
        raise ValueError(
            f"`pointwise_kernel` must have the shape (1, 1, {depthwise_channels}, filters), where "
            f"{depthwise_channels} is channels * depth_multiplier. Received: "
            f"pointwise_kernel.shape={pointwise_kernel_shape}, "
            f"depthwise_kernel.shape={depthwise_kernel_shape}"
        )
    out_channels = pointwise_kernel_shape[3]
    _check_bias("bias", bias_shape, out_channels)
    _check_bias("depthwise_bias", depthwise_bias_shape, depthwise_channels)
    rows, columns = spec._directions(in_height, in_width, (kernel_height, kernel_width))
    (out_height, (pad_top, _)), (out_width, (pad_left, _)) = rows, columns

    geometry = Geometry(
        batch=batch,
        in_height=in_height,
        in_width=in_width,
        in_channels=in_channels,
        depth_multiplier=depth_multiplier,
        out_height=out_height,
        out_width=out_width,
        out_channels=out_channels,
        kernel_height=kernel_height,
        kernel_width=kernel_width,
        stride_height=spec.strides[0],
        stride_width=spec.strides[1],
        dilation_height=spec.dilation_rate[0],
        dilation_width=spec.dilation_rate[1],
        pad_top=pad_top,
        pad_left=pad_left,
        layout=_DATA_FORMATS.index(spec.data_format),
        input_activation=ACTIVATIONS.index(spec.input_activation),
        depthwise_activation=ACTIVATIONS.index(spec.depthwise_activation),
        activation=ACTIVATIONS.index(spec.activation),
        has_depthwise_bias=int(depthwise_bias_shape is not None),
        has_bias=int(bias_shape is not None),
    )
    _check_count("x", geometry.x_shape)
    _check_count("depthwise_kernel", geometry.depthwise_kernel_shape)
    _check_count("pointwise_kernel", geometry.pointwise_kernel_shape)
    _check_count("y", geometry.y_shape)
    return geometry


_resolve_cached = functools.lru_cache(maxsize=4096)(_resolve)


def _integer(argument: str, value: Any, minimum: int, received: Any = None) -> int:
    """Returns `value` as a plain int; `received` is what the user wrote, for the message."""
    received = value if received is None else received
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"`{argument}` must be made of integers. Received: {argument}={received!r}"
        ) from None
    if number < minimum:
        rule = "positive" if minimum == 1 else "non-negative"
        raise ValueError(f"`{argument}` must be {rule}. Received: {argument}={received!r}")
    if number > _MAX_SIZE:
        raise ValueError(f"`{argument}` must be below 2**63. Received: {argument}={received!r}")
    return number


def canonical_pair(argument: str, value: Any, minimum: int = 1) -> tuple[int, int]:
    """Returns an integer, or a pair of integers, as a pair of plain ints.

    Args:
        argument: What to call the value in an error message.
        value: An integer for both directions, or two of them. NumPy integers will do.
        minimum: The smallest legal integer, 0 or 1.

    Returns:
        (for the height, for the width).

    Raises:
        TypeError: an element is not an integer; booleans and floats are not.
        ValueError: there are not two elements, or one is out of range.

    Example:
        >>> canonical_pair("strides", 2), canonical_pair("strides", [1, 2])
        ((2, 2), (1, 2))
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        number = _integer(argument, value, minimum)
        return number, number
    try:
        elements = tuple(value)
    except TypeError:  # Scalar arrays claim to be iterable.
        number = _integer(argument, value, minimum)
        return number, number
    if len(elements) != 2:
        raise ValueError(
            f"`{argument}` must be an integer or a pair of integers. "
            f"Received: {argument}={elements!r}"
        )
    first, second = (_integer(argument, element, minimum, elements) for element in elements)
    return first, second


def canonical_padding(value: Any) -> Padding:
    """Returns a `padding` argument in lower case, or as pairs of plain ints.

    Args:
        value: `"valid"` or `"same"` in any case, or `((top, bottom), (left, right))`.

    Returns:
        The same, canonical.

    Raises:
        TypeError: an amount is not an integer.
        ValueError: `value` is none of these, or an amount is negative.

    Example:
        >>> canonical_padding("SAME"), canonical_padding([[1, 2], [0, 0]])
        ('same', ((1, 2), (0, 0)))
    """
    if isinstance(value, str):
        if value.lower() in ("same", "valid"):
            return value.lower()
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        rows = tuple(
            tuple(row) if isinstance(row, Iterable) and not isinstance(row, (str, bytes)) else row
            for row in value
        )
        if len(rows) == 2 and all(isinstance(row, tuple) and len(row) == 2 for row in rows):
            (top, bottom), (left, right) = (
                tuple(_integer("padding", amount, 0, rows) for amount in row) for row in rows
            )
            return (top, bottom), (left, right)
        value = rows
    raise ValueError(
        '`padding` must be "valid", "same" or ((top, bottom), (left, right)). '
        f"Received: padding={value!r}"
    )


def _data_format(value: Any) -> str:
    if isinstance(value, str) and value.lower() in _DATA_FORMATS:
        return value.lower()
    raise ValueError(
        '`data_format` must be "channels_last" or "channels_first". '
        f"Received: data_format={value!r}"
    )


def _check_rank(argument: str, shape: tuple[Any, ...], rank: int, words: str) -> None:
    if len(shape) != rank:
        label = argument if argument.endswith("_shape") else f"{argument}.shape"
        raise ValueError(
            f"`{argument}` must have {rank} dimensions, {words}. Received: {label}={shape}"
        )


def _check_positive(argument: str, shape: tuple[Any, ...]) -> None:
    for size in shape:
        if size < 1:
            raise ValueError(
                f"`{argument}` must have positive sizes. Received: {argument}.shape={shape}"
            )


def _check_bias(argument: str, shape: tuple[Any, ...] | None, size: Any) -> None:
    if shape is not None and (len(shape) != 1 or shape[0] != size):
        raise ValueError(
            f"`{argument}` must have the shape ({size},). Received: {argument}.shape={shape}"
        )


def _check_count(argument: str, shape: tuple[Any, ...]) -> None:
    count = 1
    for size in shape:
        count = count * size
    if count > _MAX_SIZE:
        raise ValueError(
            f"`{argument}` must have fewer than 2**63 elements. Received: {argument}.shape={shape}"
        )
