"""Case number n of a seed: the two numbers determine it completely."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np
from strategies import Problem

from sepconv import ConvSpec
from sepconv.spec import ACTIVATIONS

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
UNIT_ROUNDOFF = {
    "float32": 2.0**-24,
    "float64": 2.0**-53,
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
}
# In hundredths. A new shape costs JAX a compilation, so it gets few.
DOORS = {"numpy": 40, "torch": 34, "torch_keras": 15, "keras": 7, "jax": 4}
LAWS = (
    "adjoint_x",
    "adjoint_depthwise_kernel",
    "adjoint_pointwise_kernel",
    "adjoint_bias",
    "adjoint_depthwise_bias",
    "linear",
    "scaled",
    "translated",
    "subsampled",
    "zero_stuffed",
    "repeated_channels",
)


@dataclass(frozen=True)
class Case:
    """One call, where it runs, and the law that it is tried on."""

    door: str
    target: str
    dtype: str
    law: str
    problem: Problem

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def draw(seed: int, number: int, targets: tuple[str, ...]) -> Case:
    """Case `number` of `seed`.

    Args:
        seed: Of the whole series.
        number: Of the case; no other case is needed to draw it.
        targets: Instruction sets that this machine can run.
    """
    rng = np.random.default_rng([seed, number])

    def one_of(options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    def pair(low: int, high: int) -> tuple[int, int]:
        first, second = rng.integers(low, high + 1, 2)
        return int(first), int(second)

    door = str(rng.choice(list(DOORS), p=[share / 100 for share in DOORS.values()]))
    # The layer of Keras has the words of Keras: no padding by numbers, one activation, one bias.
    layer = door == "keras"
    padding: Any = one_of(["valid", "same", "explicit"][: 2 if layer else 3])
    if padding == "explicit":
        padding = (pair(0, 3), pair(0, 3))
    spec = ConvSpec(
        strides=(int(rng.integers(1, 4)),) * 2 if layer else pair(1, 3),
        padding=padding,
        dilation_rate=one_of([(1, 1), (1, 1), pair(1, 3)]) if not layer else (1, 1),
        data_format=one_of(["channels_last", "channels_first"]),
        activation=one_of(ACTIVATIONS),
        input_activation="linear" if layer else one_of(["linear", one_of(ACTIVATIONS)]),
        depthwise_activation="linear" if layer else one_of(["linear", one_of(ACTIVATIONS)]),
    )
    kernel_size = pair(1, 4)
    sizes = []
    for axis in (0, 1):
        reach = (kernel_size[axis] - 1) * spec.dilation_rate[axis] + 1
        around = 0 if isinstance(spec.padding, str) else sum(spec.padding[axis])
        least = 1 if spec.padding == "same" else max(1, reach - around)
        sizes.append(least + int(rng.integers(0, 8)))
    problem = Problem(
        spec=spec,
        batch=int(rng.integers(1, 4)),
        height=sizes[0],
        width=sizes[1],
        channels=int(rng.integers(1, 11)),
        depth_multiplier=one_of([1, 1, 2, 3]),
        kernel_size=kernel_size,
        filters=int(rng.integers(1, 20)),
        use_bias=bool(rng.integers(2)),
        use_depthwise_bias=not layer and bool(rng.integers(2)),
        seed=int(rng.integers(2**31)),
    )
    return Case(
        door=door,
        target=one_of(targets),
        dtype=one_of(list(DTYPES)),
        law=one_of(LAWS),
        problem=problem,
    )
