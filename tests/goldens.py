"""Loads the golden vectors and says how close an implementation must come to them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sepconv import ConvSpec, reference
from sepconv.spec import ACTIVATIONS, Geometry, canonical_activation

FOLDER = Path(__file__).parent / "goldens"
GRADIENTS = ("grad_input", "grad_depthwise_kernel", "grad_pointwise_kernel", "grad_bias")
# Relative to the largest magnitude of the array, at least to 1. In float32 the bounds of the
# reference, which hold for the worst order of summation, count as well.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6}


@dataclass(frozen=True)
class OutsideActivation:
    """An activation that no kernel fuses: a door, or the test, runs it behind a linear kernel."""

    value: Callable[[np.ndarray], np.ndarray]
    vjp: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """(z, dy) -> dz."""
    steepest: float
    most_curved: float
    """Lipschitz constants of value and vjp, in the largest change of any element they depend on."""


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _softmax_vjp(z: np.ndarray, dy: np.ndarray) -> np.ndarray:
    y = _softmax(z)
    return y * (dy - (dy * y).sum(-1, keepdims=True))


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * z)


OUTSIDE_ACTIVATIONS = {
    "softplus": OutsideActivation(
        lambda z: np.logaddexp(z, 0.0), lambda z, dy: dy * _sigmoid(z), 1.0, 0.25
    ),
    # Along the last axis as stored. |dy_i/dz_j| summed over j is at most 1/2, and so on.
    "softmax": OutsideActivation(_softmax, _softmax_vjp, 0.5, 2.0),
    # The form of tf.layers; that of Keras 3, which the kernels have, has the slope 1/6.
    "hard_sigmoid": OutsideActivation(
        lambda z: np.clip(0.2 * z + 0.5, 0.0, 1.0),
        lambda z, dy: np.where(np.abs(z) < 2.5, 0.2 * dy, 0.0),
        0.2,
        0.0,
    ),
}


@dataclass(frozen=True)
class Case:
    """One golden case: a layer, what goes in, and what has to come out."""

    id: str
    tag: str
    config: dict[str, Any]
    """Arguments of the layer; the activation under the name that the original layer gives it."""
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    spec_kwargs: dict[str, Any]
    """Arguments of `ConvSpec` and of the doors; `activation` only if the kernels fuse it."""
    outside_activation: str | None
    """Key of `OUTSIDE_ACTIVATIONS` when the kernels do not fuse the activation of the layer."""

    @property
    def geometry(self) -> Geometry:
        x, kernel, pointwise, bias = self.inputs(np.float64)
        return ConvSpec(**self.spec_kwargs).resolve(
            x.shape, kernel.shape, pointwise.shape, None if bias is None else bias.shape
        )

    @property
    def exact_in_float32(self) -> bool:
        return bool(self.meta.get("exact_in_float32"))

    def inputs(self, dtype: Any) -> tuple[Any, Any, Any, Any]:
        """(x, depthwise_kernel, pointwise_kernel, bias or None) in a dtype."""
        names = ("input", "depthwise_kernel", "pointwise_kernel", "bias")
        return tuple(
            self.arrays[name].astype(dtype) if name in self.arrays else None for name in names
        )

    def upstream(self, dtype: Any) -> np.ndarray:
        return self.arrays["upstream"].astype(dtype)

    @property
    def output(self) -> np.ndarray:
        return self.arrays["output"]

    @property
    def gradients(self) -> tuple[Any, Any, Any, Any]:
        """(dx, d_depthwise_kernel, d_pointwise_kernel, d_bias or None), float64."""
        return tuple(self.arrays.get(name) for name in GRADIENTS)


@functools.cache
def load_cases() -> tuple[Case, ...]:
    """Every case, in the order of `index.json`."""
    return tuple(_load(entry["file"]) for entry in json.loads((FOLDER / "index.json").read_text()))


def _load(file: str) -> Case:
    with np.load(FOLDER / file, allow_pickle=False) as stored:
        config, meta = json.loads(str(stored["config"])), json.loads(str(stored["meta"]))
        arrays = {name: stored[name] for name in stored.files if name not in ("config", "meta")}
    for array in arrays.values():
        array.flags.writeable = False
    outside = config["activation"] if config["activation"] in OUTSIDE_ACTIVATIONS else None
    fused = None if outside else config["activation"]
    assert canonical_activation(fused) in ACTIVATIONS
    return Case(
        id=meta["id"],
        tag=meta["tag"],
        config=config,
        meta=meta,
        arrays=arrays,
        spec_kwargs={
            "strides": tuple(config["strides"]),
            "padding": config["padding"],
            "dilation_rate": tuple(config["dilation_rate"]),
            "data_format": config["data_format"],
            "activation": fused,
        },
        outside_activation=outside,
    )


def case_ids(case: Case) -> str:
    """For `pytest.mark.parametrize(..., ids=case_ids)`."""
    return f"{case.id}-{case.tag}"


def _relative(tolerance: float, true: np.ndarray) -> float:
    return tolerance * max(1.0, np.abs(true).max(initial=0.0))


@functools.cache
def _bounds(case_id: str, dtype: str) -> tuple[Any, tuple[Any, ...]]:
    """Bounds of the output and of the gradients that there are."""
    case = next(case for case in load_cases() if case.id == case_id)
    gradients = [true for true in case.gradients if true is not None]
    y_bound = _relative(TOLERANCE[dtype], case.output)
    bounds = tuple(_relative(TOLERANCE[dtype], true) for true in gradients)
    if dtype == "float64":
        return y_bound, bounds
    y_derived, derived = _derived_bounds(case, dtype)
    return (
        np.minimum(y_bound, y_derived),
        tuple(np.minimum(*pair) for pair in zip(bounds, derived, strict=False)),
    )


def _derived_bounds(case: Case, dtype: str) -> tuple[Any, tuple[Any, ...]]:
    geometry, inputs, dy = case.geometry, case.inputs(np.float64), case.upstream(np.float64)
    if case.outside_activation is None:
        y_bound, bounds = reference.error_bounds(geometry, dtype, dy, *inputs)
        return y_bound, bounds[:4]
    # The activation turns the error of its input into one of y and of the dz that goes back. For
    # its own arithmetic it gets 16 roundings of quantities of the size of their largest one.
    outside = OUTSIDE_ACTIVATIONS[case.outside_activation]
    rounding = 16.0 * 2.0**-24
    z = reference.forward(geometry, *inputs)
    dz = outside.vjp(z, dy)
    z_bound, _ = reference.error_bounds(geometry, dtype, dy, *inputs)
    if case.outside_activation == "softmax":  # The only one that mixes elements.
        z_error = np.broadcast_to(z_bound.max(-1, keepdims=True), z.shape)
        dy_size = np.broadcast_to(np.abs(dy).max(-1, keepdims=True), z.shape)
    else:
        z_error, dy_size = z_bound, np.abs(dy)
    y_bound = outside.steepest * z_error + rounding * (np.abs(z) + 1.0)
    dz_error = dy_size * (outside.most_curved * z_error + rounding * (np.abs(z) + 1.0))
    _, bounds = reference.error_bounds(geometry, dtype, dz, *inputs, dy_error=dz_error)
    return y_bound, bounds[:4]


def assert_within(actual: Any, true: np.ndarray, bound: np.ndarray | float, what: str) -> None:
    """Fails, naming the worst element, unless |actual - true| <= bound in every element."""
    actual = np.asarray(actual)
    assert actual.shape == true.shape, f"{what}: shape {actual.shape}, not {true.shape}"
    if actual.size == 0:
        return
    error = np.abs(actual.astype(np.float64) - true)
    bound = np.broadcast_to(bound, error.shape)
    outside = ~(error <= bound)  # NaN is outside.
    if outside.any():
        excess = np.where(outside, error / np.maximum(bound, 1e-300), 0.0)
        excess = np.where(np.isnan(excess), np.inf, excess)
        worst = np.unravel_index(np.argmax(excess), error.shape)
        raise AssertionError(
            f"{what}: {int(outside.sum())} of {error.size} elements are out of bounds; the worst "
            f"is {tuple(map(int, worst))}: {actual[worst]} instead of {true[worst]}, off by "
            f"{error[worst]:.3g}, allowed {bound[worst]:.3g}"
        )


def check(case: Case, dtype: str, y: Any = None, gradients: Any = None) -> None:
    """Compares an output, gradients, or both with a case.

    Args:
        case: The case.
        dtype: Name of the dtype that the implementation computed in: "float32" (bounds derived
            from the operation count; to the last bit if the case is exact) or "float64" (1e-12).
        y: The output, or `None` to leave it out.
        gradients: (dx, d_depthwise_kernel, d_pointwise_kernel[, d_bias]), or `None`.
    """
    y_bound, bounds = _bounds(case.id, dtype)
    if case.exact_in_float32:
        y_bound, bounds = 0.0, (0.0,) * 4
    label = f"case {case_ids(case)} in {dtype}"
    if y is not None:
        assert_within(y, case.output, y_bound, f"{label}, output")
    if gradients is not None:
        expected = [true for true in case.gradients if true is not None]
        received = [gradient for gradient in gradients if gradient is not None]
        assert len(received) == len(expected), f"{label}: {len(received)} gradients"
        for name, gradient, true, bound in zip(GRADIENTS, received, expected, bounds, strict=False):
            assert_within(gradient, true, bound, f"{label}, {name}")
