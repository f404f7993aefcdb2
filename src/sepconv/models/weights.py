"""Weights of separable convolutions: their layouts, and their names in the files of frameworks.

Keras and TensorFlow keep a depthwise kernel as (kernel_height, kernel_width, channels,
depth_multiplier), torch and ONNX as (channels * depth_multiplier, 1, kernel_height, kernel_width).
Channel `c` and multiplier `m` are output `c * depth_multiplier + m` in both.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sepconv.spec import canonical_pair

__all__ = [
    "SeparableNames",
    "SeparableWeights",
    "chosen_tensors",
    "depthwise_from_torch",
    "depthwise_to_torch",
    "is_moving_average",
    "is_numbered",
    "is_optimizer_slot",
    "pointwise_from_torch",
    "pointwise_to_torch",
    "separable_names",
    "separable_weights",
]

Array = npt.NDArray[Any]

_DEPTHWISE = "(kernel_height, kernel_width, channels, depth_multiplier)"
_DEPTHWISE_TORCH = "(channels * depth_multiplier, 1, kernel_height, kernel_width)"
_POINTWISE = "(1, 1, channels * depth_multiplier, filters)"
_POINTWISE_TORCH = "(filters, channels * depth_multiplier, 1, 1)"


# ------------------------------------------------------------------------------------------ layouts


def depthwise_to_torch(kernel: Array) -> Array:
    """Returns a depthwise kernel in the layout of torch and ONNX.

        weight[c * depth_multiplier + m, 0, i, j] = kernel[i, j, c, m]

    Args:
        kernel: (kernel_height, kernel_width, channels, depth_multiplier), of any dtype.

    Returns:
        (channels * depth_multiplier, 1, kernel_height, kernel_width), contiguous.

    Raises:
        ValueError: `kernel` has another rank, or a size of 0.

    Example:
        >>> import numpy as np
        >>> depthwise_to_torch(np.ones((3, 3, 4, 2))).shape
        (8, 1, 3, 3)
    """
    kernel = _checked("kernel", kernel, _DEPTHWISE)
    height, width, channels, multiplier = kernel.shape
    weight = kernel.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, height, width)
    return np.ascontiguousarray(weight)


def depthwise_from_torch(weight: Array, channels: int) -> Array:
    """Returns a depthwise weight of torch or ONNX in the layout of Keras.

    Args:
        weight: (channels * depth_multiplier, 1, kernel_height, kernel_width), of any dtype.
        channels: Of the input: the `groups` of the convolution. The weight does not tell them.

    Returns:
        (kernel_height, kernel_width, channels, depth_multiplier), contiguous.

    Raises:
        TypeError: `channels` is not an integer.
        ValueError: `weight` has another shape, or not a multiple of `channels` outputs.

    Example:
        >>> import numpy as np
        >>> depthwise_from_torch(np.ones((8, 1, 3, 3)), channels=4).shape
        (3, 3, 4, 2)
    """
    weight = _checked("weight", weight, _DEPTHWISE_TORCH)
    channels, _ = canonical_pair("channels", [channels, channels], minimum=1)
    outputs, inputs, height, width = weight.shape
    if inputs != 1 or outputs % channels:
        raise ValueError(
            f"`weight` must have the shape {_DEPTHWISE_TORCH} with {channels} channels. "
            f"Received: weight.shape={weight.shape}, channels={channels}"
        )
    kernel = weight.reshape(channels, outputs // channels, height, width).transpose(2, 3, 0, 1)
    return np.ascontiguousarray(kernel)


def pointwise_to_torch(kernel: Array) -> Array:
    """Returns a pointwise kernel in the layout of torch and ONNX.

    Args:
        kernel: (1, 1, channels * depth_multiplier, filters), of any dtype.

    Returns:
        (filters, channels * depth_multiplier, 1, 1), contiguous.

    Raises:
        ValueError: `kernel` has another shape.

    Example:
        >>> import numpy as np
        >>> pointwise_to_torch(np.ones((1, 1, 8, 5))).shape
        (5, 8, 1, 1)
    """
    kernel = _checked("kernel", kernel, _POINTWISE, ones=(0, 1))
    return np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))


def pointwise_from_torch(weight: Array) -> Array:
    """Returns a pointwise weight of torch or ONNX in the layout of Keras.

    Args:
        weight: (filters, channels * depth_multiplier, 1, 1), of any dtype.

    Returns:
        (1, 1, channels * depth_multiplier, filters), contiguous.

    Raises:
        ValueError: `weight` has another shape.

    Example:
        >>> import numpy as np
        >>> pointwise_from_torch(np.ones((5, 8, 1, 1))).shape
        (1, 1, 8, 5)
    """
    weight = _checked("weight", weight, _POINTWISE_TORCH, ones=(2, 3))
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0))


def _checked(argument: str, array: Any, words: str, ones: Sequence[int] = ()) -> Array:
    """The array, if it has four positive sizes, some of them 1."""
    checked: Array = np.asarray(array)
    if checked.ndim != 4 or 0 in checked.shape:
        raise ValueError(
            f"`{argument}` must have four positive sizes, {words}. "
            f"Received: {argument}.shape={checked.shape}"
        )
    if any(checked.shape[axis] != 1 for axis in ones):
        raise ValueError(
            f"`{argument}` must have the shape {words}. Received: {argument}.shape={checked.shape}"
        )
    return checked


# -------------------------------------------------------------------------------------------- names

# What optimizers of TensorFlow call their slots: after the variable, or around it.
_OPTIMIZER = re.compile(
    r"(Adam|AdamW|Adamax|AdaMax|Nadam|Momentum|RMSProp|RMSprop|Adagrad|AdagradDA|Adadelta|Ftrl"
    r"|LAMB|LARS)(_\d+)?"
)
_OPTIMIZER_SCALAR = re.compile(r"beta[12]_power(_\d+)?")
_OPTIMIZER_SCOPES = re.compile(r"_?optimizer(_weights|_states?|_state_dict|s|_?\d+)?")
# Entries of the state of the optimizers of torch.
_OPTIMIZER_STATE = {
    "acc_delta",
    "exp_avg",
    "exp_avg_sq",
    "exp_inf",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
}
_SHADOW = "/ExponentialMovingAverage"
# Where programs of torch keep averaged weights, and where then what was averaged is.
_AVERAGED = {
    "ema": "model",
    "ema_model": "model",
    "ema_state_dict": "state_dict",
    "model_ema": "model",
    "state_dict_ema": "state_dict",
}


def is_optimizer_slot(name: str) -> bool:
    """Tells whether a tensor of a file belongs to an optimizer, by its name.

    Known are slots of `tf.train` optimizers (`kernel/Adam_1`), of object-based checkpoints
    (`kernel/.OPTIMIZER_SLOT/...`), of Keras (`optimizer/...`, `Adam/...`) and of torch
    (`optimizer...`, `exp_avg`).

    Args:
        name: Of the tensor, as `read_tensors` gives it.

    Example:
        >>> is_optimizer_slot("sep/depthwise_kernel/Adam_1"), is_optimizer_slot("sep/bias")
        (True, False)
    """
    parts = _parts(name)
    first = parts[1] if parts[0] == "training" and len(parts) > 2 else parts[0]
    return (
        "OPTIMIZER_SLOT" in parts
        or _OPTIMIZER_SCALAR.fullmatch(parts[-1]) is not None
        or (len(parts) > 1 and _OPTIMIZER.fullmatch(parts[-1]) is not None)
        or (len(parts) > 2 and _OPTIMIZER.fullmatch(first) is not None)
        or any(_OPTIMIZER_SCOPES.fullmatch(part) for part in parts[:-1])
        or parts[-1] in _OPTIMIZER_STATE
    )


def is_moving_average(name: str) -> bool:
    """Tells whether a tensor of a file is the moving average of another one, by its name.

    Known are the shadows of `tf.train.ExponentialMovingAverage`, and state dicts of torch under
    `ema`, `ema_model`, `model_ema`, `ema_state_dict` and `state_dict_ema`.

    Args:
        name: Of the tensor, as `read_tensors` gives it.

    Example:
        >>> is_moving_average("sep/bias/ExponentialMovingAverage"), is_moving_average("sep/bias")
        (True, False)
    """
    return name.endswith(_SHADOW) or name.partition(".")[0] in _AVERAGED


def is_numbered(name: str) -> bool:
    """Tells whether the name of a tensor is the number of a weight in its layer, as in Keras 3.

    Args:
        name: Of the tensor, as `read_tensors` gives it.

    Example:
        >>> is_numbered("layers/dense/vars/0"), is_numbered("dense/kernel")
        (True, False)
    """
    return re.search(r"(^|/)vars/\d+$", name) is not None


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"[/.]", name) if part] or [name]


def _averaged_name(name: str) -> str:
    if name.endswith(_SHADOW):
        return name.removesuffix(_SHADOW)
    first, dot, rest = name.partition(".")
    return _AVERAGED[first] + dot + rest


def chosen_tensors(
    tensors: Mapping[str, Array], *, moving_averages: bool = False
) -> dict[str, Array]:
    """Returns the weights among the tensors of a file, without the state of its training.

    Args:
        tensors: By name, as `read_tensors` gives them.
        moving_averages: Whether to take moving averages in place of the weights that have one.

    Returns:
        By name, in the given order. A moving average has the name of what was averaged.

    Raises:
        ValueError: moving averages are asked for, and there is none.

    Example:
        >>> tensors = {"bias": 1, "bias/Adam": 2, "bias/ExponentialMovingAverage": 3}
        >>> chosen_tensors(tensors), chosen_tensors(tensors, moving_averages=True)
        ({'bias': 1}, {'bias': 3})
    """
    kept = {name: array for name, array in tensors.items() if not is_optimizer_slot(name)}
    averages = {
        _averaged_name(name): array for name, array in kept.items() if is_moving_average(name)
    }
    if moving_averages and not averages:
        raise ValueError(
            "`moving_averages` needs tensors that are moving averages. Received: "
            f"moving_averages=True, and none among {len(tensors)} tensors"
        )
    chosen = {name: array for name, array in kept.items() if not is_moving_average(name)}
    return {**chosen, **averages} if moving_averages else chosen


# ------------------------------------------------------------------------------------------- layers


class SeparableWeights(NamedTuple):
    """The weights of one separable convolution, in the layouts of Keras."""

    depthwise_kernel: Array
    """(kernel_height, kernel_width, channels, depth_multiplier)."""
    pointwise_kernel: Array
    """(1, 1, channels * depth_multiplier, filters)."""
    bias: Array | None
    """(filters,), or `None`."""
    depthwise_bias: Array | None = None
    """(channels * depth_multiplier,), or `None`. Pairs of torch and fused layers have one."""


class SeparableNames(NamedTuple):
    """Names of the weights of one separable convolution among the tensors of a file."""

    depthwise_kernel: str
    pointwise_kernel: str
    bias: str | None
    depthwise_bias: str | None
    is_torch: bool
    """Whether the kernels have the layouts of torch."""


def separable_weights(
    tensors: Mapping[str, Array],
    *,
    moving_averages: bool = False,
    depth_multiplier: int | Mapping[str, int] = 1,
) -> dict[str, SeparableWeights]:
    """Finds the separable convolutions among the tensors of a file, by their names and shapes.

    Found are, in one scope, `depthwise_kernel`, `pointwise_kernel` and perhaps `bias` (Keras,
    `tf.layers`) and `depthwise_bias` (our fused layers); `depthwise_weights`, `pointwise_weights`
    and perhaps `biases` (slim); `vars/0` to `vars/3` in that order, of fitting shapes (weights
    files of Keras 3); in one module
    `depthwise.weight` and `pointwise.weight` with their biases (torch); and any two modules whose
    weights follow each other, (n, 1, height, width) and (filters, n, 1, 1). A pair with a batch
    norm between the two is none of them: `sepconv.fuse` folds it.

    Args:
        tensors: By name, as `read_tensors` gives them. Of pairs without a common name, those that
            follow each other count.
        moving_averages: Whether to take moving averages in place of the weights.
        depth_multiplier: Depthwise outputs per channel, for pairs of torch, whose shapes do not
            tell it; or one by the name of each layer that has more than 1.

    Returns:
        By name, in the given order: the scope or module that has both weights, and the name of the
        depthwise module if that is not the same one. It is empty for weights without a scope.

    Raises:
        ValueError: the shapes of a layer do not fit together; there is no moving average; or
            `depth_multiplier` names a layer that is no pair of torch.

    Example:
        >>> import numpy as np
        >>> tensors = {"net.sep.depthwise.weight": np.ones((4, 1, 3, 3), "float32"),
        ...            "net.sep.pointwise.weight": np.ones((5, 4, 1, 1), "float32")}
        >>> found = separable_weights(tensors)["net.sep"]
        >>> found.depthwise_kernel.shape, found.pointwise_kernel.shape, found.bias
        ((3, 3, 4, 1), (1, 1, 4, 5), None)
    """
    chosen = chosen_tensors(tensors, moving_averages=moving_averages)
    layers = separable_names(chosen)
    multipliers = depth_multiplier if isinstance(depth_multiplier, Mapping) else {}
    for layer in multipliers:
        if layer not in layers or not layers[layer].is_torch:
            raise ValueError(
                "`depth_multiplier` must name pairs of torch among the tensors. "
                f"Received: {layer!r}, which is none"
            )
    common = 1 if isinstance(depth_multiplier, Mapping) else depth_multiplier
    return {
        layer: _weights(layer, names, chosen, multipliers.get(layer, common))
        for layer, names in layers.items()
    }


def separable_names(tensors: Mapping[str, Array]) -> dict[str, SeparableNames]:
    """Finds the separable convolutions as `separable_weights` does, and returns their names.

    Args:
        tensors: By name; all of them count.

    Raises:
        ValueError: two layers would have one name.

    Example:
        >>> import numpy as np
        >>> tensors = {"a/depthwise_weights": np.ones((3, 3, 4, 1)),
        ...            "a/pointwise_weights": np.ones((1, 1, 4, 5)), "a/biases": np.ones(5)}
        >>> separable_names(tensors)["a"][:3]
        ('a/depthwise_weights', 'a/pointwise_weights', 'a/biases')
    """
    found = {}
    for layer, names in (*_torch_pairs(tensors), *_scoped(tensors)):
        if layer in found:
            raise ValueError(f"`tensors` must not name a layer twice. Received: {layer!r}")
        found[layer] = names
    return found


_WORDS = (
    ("depthwise_kernel", "pointwise_kernel", "bias", "depthwise_bias"),
    ("depthwise_weights", "pointwise_weights", "biases", ""),
    # Files of Keras 3 number the weights of a layer. Only of shapes that no other layer has.
    ("vars/0", "vars/1", "vars/2", "vars/3"),
)


def _scoped(tensors: Mapping[str, Array]) -> Iterator[tuple[str, SeparableNames]]:
    """Layers of Keras, tf.layers and slim, whose weights have the layout already."""
    real = {name.removesuffix(":0"): name for name in tensors}
    for name in real:
        for words in _WORDS:
            scope = "" if name == words[0] else name.removesuffix(f"/{words[0]}")
            if scope == name or (pointwise := real.get(_under(scope, words[1]))) is None:
                continue
            depthwise = real[name]
            bias, depthwise_bias = (real.get(_under(scope, word)) for word in words[2:])
            if words[0] == "vars/0":
                shapes = np.shape(tensors[depthwise]), np.shape(tensors[pointwise])
                if not _fit(*shapes):
                    continue
                # Of a fused layer without a bias of the output, the other one is the third.
                if bias and np.shape(tensors[bias]) != shapes[1][3:]:
                    bias, depthwise_bias = None, bias
            yield scope, SeparableNames(depthwise, pointwise, bias, depthwise_bias, is_torch=False)


def _under(scope: str, word: str) -> str:
    return f"{scope}/{word}" if scope else word


def _fit(depthwise: Sequence[int], pointwise: Sequence[int]) -> bool:
    return (
        len(depthwise) == len(pointwise) == 4
        and 0 not in (*depthwise, *pointwise)
        and tuple(pointwise[:3]) == (1, 1, depthwise[2] * depthwise[3])
    )


def _torch_pairs(tensors: Mapping[str, Array]) -> list[tuple[str, SeparableNames]]:
    pairs: dict[str, tuple[str, SeparableNames]] = {}

    def add(layer: str, depthwise: str, pointwise: str) -> None:
        bias, depthwise_bias = (
            name if (name := f"{module}.bias") in tensors else None
            for module in (pointwise, depthwise)
        )
        names = SeparableNames(
            f"{depthwise}.weight", f"{pointwise}.weight", bias, depthwise_bias, is_torch=True
        )
        pairs[names.depthwise_kernel] = (layer, names)

    for name in tensors:
        # The whole name, or what follows a dot.
        scope = name.removesuffix("depthwise.weight")
        is_named = scope != name and (not scope or scope.endswith("."))
        if is_named and f"{scope}pointwise.weight" in tensors:
            add(scope.removesuffix("."), f"{scope}depthwise", f"{scope}pointwise")
    taken = {names.pointwise_kernel for _, names in pairs.values()} | set(pairs)
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    for depthwise, pointwise in itertools.pairwise(modules):
        weights = (f"{depthwise}.weight", f"{pointwise}.weight")
        if any(weight not in tensors or weight in taken for weight in weights):
            continue
        if _is_pair(*(np.shape(tensors[weight]) for weight in weights)):
            taken.update(weights)
            add(depthwise, depthwise, pointwise)
    return [pairs[name] for name in tensors if name in pairs]


def _is_pair(depthwise: Sequence[int], pointwise: Sequence[int]) -> bool:
    return (
        len(depthwise) == len(pointwise) == 4
        and 0 not in (*depthwise, *pointwise)
        and depthwise[1] == 1
        and tuple(pointwise[1:]) == (depthwise[0], 1, 1)
    )


def _weights(
    layer: str, names: SeparableNames, tensors: Mapping[str, Array], multiplier: int
) -> SeparableWeights:
    depthwise = np.asarray(tensors[names.depthwise_kernel])
    pointwise = np.asarray(tensors[names.pointwise_kernel])
    multiplier, _ = canonical_pair("depth_multiplier", [multiplier, multiplier], minimum=1)
    fits = _fit(depthwise.shape, pointwise.shape)
    if names.is_torch:
        fits = _is_pair(depthwise.shape, pointwise.shape) and not depthwise.shape[0] % multiplier
    if not fits:
        words = (_DEPTHWISE_TORCH, _POINTWISE_TORCH) if names.is_torch else (_DEPTHWISE, _POINTWISE)
        raise ValueError(
            f"{layer!r} must have weights of the shapes {words[0]} and {words[1]}. "
            f"Received: {names.depthwise_kernel} of {depthwise.shape}, {names.pointwise_kernel} of "
            f"{pointwise.shape}" + (f", depth_multiplier={multiplier}" if names.is_torch else "")
        )
    if names.is_torch:
        depthwise = depthwise_from_torch(depthwise, depthwise.shape[0] // multiplier)
        pointwise = pointwise_from_torch(pointwise)
    return SeparableWeights(
        depthwise,
        pointwise,
        _bias(names.bias, tensors, pointwise.shape[3]),
        _bias(names.depthwise_bias, tensors, pointwise.shape[2]),
    )


def _bias(name: str | None, tensors: Mapping[str, Array], size: int) -> Array | None:
    if name is None:
        return None
    bias = np.asarray(tensors[name])
    if bias.shape != (size,):
        raise ValueError(f"{name!r} must have the shape ({size},). Received: {bias.shape}")
    return bias
