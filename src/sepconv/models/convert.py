"""Models and weights from one kind of file to another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sepconv.models.atomic import replacing
from sepconv.models.fuse import fuse
from sepconv.models.load import holds_model, load, optimizer_tensors
from sepconv.models.report import Report
from sepconv.models.tensors import read_tensors, write_tensors
from sepconv.models.weights import (
    chosen_tensors,
    depthwise_to_torch,
    is_numbered,
    is_optimizer_slot,
    pointwise_to_torch,
    separable_names,
    separable_weights,
)
from sepconv.progress import tracked

__all__ = ["LAYOUTS", "check_target", "convert", "fuse_file", "tensors_of", "translated"]

Array = npt.NDArray[Any]

LAYOUTS = ("keras", "torch")
"""Names and axes of the weights of separable convolutions."""

_MODEL_ENDINGS = (".keras", ".weights.h5", ".onnx")
_TENSOR_ENDINGS = (".safetensors", ".pt", ".pth")
# What joins scopes, and what the weights are called in them, in the order of `SeparableWeights`.
_WORDS = {
    "keras": ("/", ("depthwise_kernel", "pointwise_kernel", "bias", "depthwise_bias")),
    "torch": (".", ("depthwise.weight", "pointwise.weight", "pointwise.bias", "depthwise.bias")),
}


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    layout: str | None = None,
    moving_averages: bool = False,
    optimizer_slots: bool = False,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Writes the model or the weights of a file in the format that the ending of `target` names.

    A model becomes a model (`.keras`), its weights for Keras (`.weights.h5`), named tensors
    (`.safetensors`, `.pt`, `.pth`) or a model of ONNX (`.onnx`). Named tensors become named
    tensors, or with `model` the weights of a model.

    Args:
        source: What `sepconv.load` reads.
        target: The file to write; its folder must exist.
        model: The file of a model whose weights the tensors of `source` are, by their names (see
            `sepconv.models.keras_assign.assign`), or in `.weights.h5` of Keras 3 by their place.
        layout: Names and axes of separable convolutions among tensors: `"keras"`, `"torch"`, or
            `None` for torch in files of torch, and as they are in others.
        moving_averages: Whether to take moving averages in place of the weights.
        optimizer_slots: Whether to keep what optimizers and moving averages have stored as well.
        overwrite: Whether a file that exists is replaced.

    Returns:
        Names of the tensors that were written; of the weights for a model.

    Raises:
        FileExistsError: `target` exists, and `overwrite` is false.
        FileNotFoundError: there is no `source`, or no folder for `target`.
        ImportError: the package of a format is missing.
        ValueError: `source` is damaged, or the conversion is none that is known.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> write_tensors(f"{folder}/a.safetensors", {"bias": np.ones(3, "float32")})
        >>> convert(f"{folder}/a.safetensors", f"{folder}/b.safetensors")
        ('bias',)
    """
    source, target = Path(source), Path(target)
    ending = check_target(target, overwrite=overwrite)
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}. Received: {layout!r}")
    if layout is not None and ending not in _TENSOR_ENDINGS:
        raise ValueError(f"`layout` is for files of tensors. Received: {layout!r} for {target}")
    if moving_averages and optimizer_slots:
        raise ValueError("`moving_averages` and `optimizer_slots` exclude each other")
    if model is not None and optimizer_slots:
        raise ValueError("`optimizer_slots` are no weights of a `model`")
    if model is not None:
        net = _with_tensors(Path(model), source, moving_averages=moving_averages)
        moving_averages = False
    else:
        net = load(source) if holds_model(source) else None
    if ending in _TENSOR_ENDINGS:
        tensors = read_tensors(source) if net is None else tensors_of(net)
        if optimizer_slots and net is not None:
            tensors |= optimizer_tensors(source)
        if not optimizer_slots:
            tensors = chosen_tensors(tensors, moving_averages=moving_averages)
        chosen = layout or ("torch" if ending != ".safetensors" else None)
        tensors = tensors if chosen is None else translated(tensors, chosen)
        write_tensors(target, tensors)
        return tuple(tensors)
    if net is None:
        raise ValueError(
            f"{source}: holds tensors and no model, which {ending} needs. "
            f"They can become {', '.join(_TENSOR_ENDINGS)}, or with `model` the weights of a model"
        )
    if moving_averages or optimizer_slots:
        raise ValueError(
            "`moving_averages` and `optimizer_slots` choose among tensors. "
            f"Received: {source}, a model, for {target}"
        )
    if ending == ".onnx":
        from sepconv.models.onnx import export_onnx

        export_onnx(net, target)
    else:
        with replacing(target) as beside:
            net.save(beside) if ending == ".keras" else net.save_weights(beside)
    return tuple(variable.path for variable in net.weights)


def _with_tensors(path: Path, source: Path, *, moving_averages: bool) -> Any:
    """The model of a file, with the tensors of another one as its weights."""
    if not holds_model(path):
        raise ValueError(f"`model` must be the file of a model. Received: {path}")
    if holds_model(source):
        raise ValueError(f"`model` is for files of tensors. Received: {source}, a model")
    from sepconv.models.keras_assign import assign

    model = load(path)
    tensors = chosen_tensors(read_tensors(source), moving_averages=moving_averages)
    if source.suffix.lower() == ".h5" and any(map(is_numbered, tensors)):
        from sepconv.models.keras_files import load_weights

        load_weights(source, model)
        return model
    try:
        assign(model, translated(tensors, "keras"))
    except ValueError as error:
        raise ValueError(f"{source} does not fit {path}: {error}") from error
    return model


def fuse_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    inference: bool = False,
    exclude: Any = (),
    tolerance: float | None = None,
    overwrite: bool = False,
) -> Report:
    """Writes the model of a file with fused layers, as a `.keras` file.

    Args:
        source: A model of Keras.
        target: The file to write; its folder must exist.
        inference: As in `sepconv.fuse`, like the two that follow.
        exclude: As there.
        tolerance: As there.
        overwrite: Whether a file that exists is replaced.

    Returns:
        What was swapped and what was not.

    Raises:
        FileExistsError: `target` exists, and `overwrite` is false.
        FileNotFoundError: there is no `source`, or no folder for `target`.
        ImportError: the package of a format is missing.
        ValueError: `source` holds no model or is damaged, or as `sepconv.fuse`.
    """
    source, target = Path(source), Path(target)
    if target.suffix.lower() != ".keras":
        raise ValueError(f"`target` must end in .keras. Received: {target}")
    check_target(target, overwrite=overwrite)
    if not holds_model(source):
        raise ValueError(f"{source}: holds tensors and no model")
    model, report = fuse(
        load(source, fused=False), inference=inference, exclude=exclude, tolerance=tolerance
    )
    with replacing(target) as beside:
        model.save(beside)
    return report


def check_target(target: Path, *, overwrite: bool) -> str:
    """Returns the ending of a file that may be written.

    Raises:
        FileExistsError: it exists, and `overwrite` is false.
        FileNotFoundError: there is no such folder.
        ValueError: the ending is unknown.
    """
    endings = (*_MODEL_ENDINGS, *_TENSOR_ENDINGS)
    ending = next((each for each in endings if target.name.lower().endswith(each)), None)
    if ending is None:
        raise ValueError(f"`target` must end in one of {', '.join(endings)}. Received: {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: there is no folder {target.parent}")
    if target.is_dir() or (target.exists() and not overwrite):
        raise FileExistsError(f"{target}: exists, and is not replaced unless that is asked for")
    return ending


def tensors_of(model: Any) -> dict[str, Array]:
    """Returns the weights of a Keras model by their paths, such as `sep/depthwise_kernel`.

    Models in models may use a path again; then a number follows it.
    """
    tensors: dict[str, Array] = {}
    for variable in tracked(model.weights, "weights taken"):
        name, number = variable.path, 1
        while name in tensors:
            number += 1
            name = f"{variable.path}_{number}"
        tensors[name] = np.asarray(variable.numpy())
    return tensors


def translated(tensors: Mapping[str, Array], layout: str) -> dict[str, Array]:
    """Returns tensors with the names and axes of another framework for separable convolutions.

    `scope/depthwise_kernel`, `scope/pointwise_kernel`, `scope/bias` and `scope/depthwise_bias`, or
    their names in slim, become `scope.depthwise.weight`, `scope.pointwise.weight`,
    `scope.pointwise.bias` and `scope.depthwise.bias` for `"torch"`, and these become those for
    `"keras"`. All other tensors stay as they are. A weight of
    torch does not tell how many of its channels come from one: for Keras it gets a depth multiplier
    of 1.

    Args:
        tensors: By name.
        layout: One of `LAYOUTS`.

    Raises:
        ValueError: shapes do not fit, or two tensors would have one name.

    Example:
        >>> names = {"sep/depthwise_kernel": np.ones((3, 3, 4, 1)),
        ...          "sep/pointwise_kernel": np.ones((1, 1, 4, 5))}
        >>> {name: array.shape for name, array in translated(names, "torch").items()}
        {'sep.depthwise.weight': (4, 1, 3, 3), 'sep.pointwise.weight': (5, 4, 1, 1)}
    """
    # Slots of optimizers stay: they have no layout that is known.
    weights = {name: array for name, array in tensors.items() if not is_optimizer_slot(name)}
    layers = separable_names(weights)
    found = separable_weights(weights)
    replaced: dict[str, dict[str, Array]] = {}
    consumed: set[str] = set()
    for layer, names in layers.items():
        # Only what says that it is a pair: others may belong to a larger layer.
        is_named = names.depthwise_kernel == _joined(layer, ".", "depthwise.weight")
        if names.is_torch == (layout == "torch") or (names.is_torch and not is_named):
            continue
        depthwise, pointwise, bias, depthwise_bias = found[layer]
        if layout == "torch":
            depthwise, pointwise = depthwise_to_torch(depthwise), pointwise_to_torch(pointwise)
        mark, words = _WORDS[layout]
        scope = layer.replace("/" if mark == "." else ".", mark)
        arrays = (depthwise, pointwise, bias, depthwise_bias)
        replaced[names.depthwise_kernel] = {
            _joined(scope, mark, word): array
            for word, array in zip(words, arrays, strict=True)
            if array is not None
        }
        consumed.update(name for name in names[:4] if name is not None)
    result: dict[str, Array] = {}
    for name, array in tensors.items():
        new = replaced.get(name, {} if name in consumed else {name: array})
        for key, value in new.items():
            if key in result:
                raise ValueError(f"Two tensors would have the name {key!r}")
            result[key] = value
    return result


def _joined(scope: str, mark: str, word: str) -> str:
    return f"{scope}{mark}{word}" if scope else word
