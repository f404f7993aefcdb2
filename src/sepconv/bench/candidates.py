"""Who is measured: the doors of this library, and the peers with their settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from sepconv.bench.problems import MODES

__all__ = ["CANDIDATES", "DOORS", "PEERS", "USUAL_PEERS", "Candidate", "choose"]


@dataclass(frozen=True)
class Candidate:
    """Someone who computes the layer.

    Attributes:
        name: As in the tables.
        engine: Module of `sepconv.bench.engines` that runs it.
        packages: What must be importable, as Python names it.
        install: How to get that.
        settings: How it is run, in words.
        ours: Whether it is a door of this library.
        modes: What it can do at all.
        door: The door of ours that users of this peer would take; empty for those without one.
        keras_backend: The backend that its process chooses for Keras.
        in_tensorflow: Whether it runs in the interpreter that has TensorFlow.
    """

    name: str
    engine: str
    packages: tuple[str, ...]
    install: str
    settings: str
    ours: bool = False
    modes: tuple[str, ...] = MODES
    door: str = ""
    keras_backend: str = ""
    in_tensorflow: bool = False

    @property
    def group(self) -> str:
        """Candidates of one group share a process, and so the thread pool of their framework."""
        return f"{self.engine} {self.keras_backend}".strip()

    def absent(self) -> str | None:
        """Tells which packages are not there and how to get them; `None` if nothing is missing."""
        if self.in_tensorflow:
            return None  # Only its own interpreter knows.
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"needs {', '.join(absent)}. Run: {self.install}" if absent else None


_INFERENCE = MODES[:1]
_OURS = "pip install 'sepconv[{}]'"
_BENCH = _OURS.format("bench")
_TENSORFLOW = (
    "name a Python that has TensorFlow by --tensorflow-python or SEPCONV_ORACLE_PYTHON "
    "(pip install tensorflow-cpu)"
)
_PAIR = "two convolutions, eager, under inference_mode or autograd, large pages"

CANDIDATES: tuple[Candidate, ...] = (
    Candidate(
        "sepconv.numpy prepared",
        "numpy",
        (),
        "",
        "weights packed by `prepare`, output array reused",
        ours=True,
        modes=_INFERENCE,
    ),
    Candidate("sepconv.numpy", "numpy", (), "", "arrays in, new array out", ours=True),
    Candidate(
        "sepconv.jax", "jax", ("jax",), _OURS.format("jax"), "the door under jax.jit", ours=True
    ),
    Candidate(
        "sepconv.torch",
        "torch",
        ("torch",),
        _OURS.format("torch"),
        "the module, channels_last tensors; large pages (THP_MEM_ALLOC_ENABLE=1)",
        ours=True,
    ),
    Candidate(
        "sepconv.torch contiguous",
        "torch",
        ("torch",),
        _OURS.format("torch"),
        "the module, contiguous tensors",
        ours=True,
    ),
    Candidate(
        "sepconv.keras on jax",
        "keras",
        ("keras", "jax"),
        _OURS.format("keras,jax"),
        "the layer, stateless and under jax.jit",
        ours=True,
        keras_backend="jax",
    ),
    Candidate(
        "sepconv.keras on torch",
        "keras",
        ("keras", "torch"),
        _OURS.format("keras,torch"),
        "the layer, called eagerly",
        ours=True,
        keras_backend="torch",
    ),
    Candidate(
        "torch",
        "torch",
        ("torch",),
        _OURS.format("torch"),
        f"{_PAIR}, contiguous tensors",
        door="sepconv.torch contiguous",
    ),
    Candidate(
        "torch channels_last",
        "torch",
        ("torch",),
        _OURS.format("torch"),
        f"{_PAIR}, tensors and weights in channels_last",
        door="sepconv.torch",
    ),
    Candidate(
        "torch.compile",
        "torch",
        ("torch",),
        _OURS.format("torch"),
        "that pair compiled for its sizes; weights frozen for inference",
        door="sepconv.torch",
    ),
    Candidate(
        "jax.lax",
        "jax",
        ("jax",),
        _OURS.format("jax"),
        "two convolutions under jax.jit",
        door="sepconv.jax",
    ),
    Candidate(
        "keras on jax",
        "keras",
        ("keras", "jax"),
        _OURS.format("keras,jax"),
        "the stock layer, stateless and under jax.jit",
        door="sepconv.keras on jax",
        keras_backend="jax",
    ),
    Candidate(
        "keras on torch",
        "keras",
        ("keras", "torch"),
        _OURS.format("keras,torch"),
        "the stock layer, called eagerly",
        door="sepconv.keras on torch",
        keras_backend="torch",
    ),
    Candidate(
        "keras on tensorflow",
        "keras",
        ("keras", "tensorflow"),
        _TENSORFLOW,
        "the stock layer in a tf.function",
        keras_backend="tensorflow",
        in_tensorflow=True,
    ),
    Candidate(
        "tensorflow",
        "tensorflow",
        ("tensorflow",),
        _TENSORFLOW,
        "tf.nn.separable_conv2d and bias_add in a tf.function, without XLA",
        in_tensorflow=True,
    ),
    Candidate(
        "litert",
        "litert",
        ("ai_edge_litert", "flatbuffers"),
        _BENCH,
        "compiled model, XNNPACK, weights constant, input and output buffers reused",
        modes=_INFERENCE,
        door="sepconv.numpy prepared",
    ),
    Candidate(
        "onnxruntime",
        "onnxruntime",
        ("onnxruntime", "onnx"),
        _BENCH,
        "all graph optimisations, weights constant, NCHW images (its own layout), input and output "
        "bound",
        modes=_INFERENCE,
        door="sepconv.numpy prepared",
    ),
    Candidate(
        "openvino",
        "openvino",
        ("openvino",),
        _BENCH,
        "latency hint, precision pinned, weights constant, images in the caller's layout, input "
        "and output tensors shared",
        modes=_INFERENCE,
        door="sepconv.numpy prepared",
    ),
)
"""In the order of the tables."""

DOORS: tuple[str, ...] = tuple(c.name for c in CANDIDATES if c.ours)
"""Names of our doors; the first that has a time is what ratios refer to."""

PEERS: tuple[str, ...] = tuple(c.name for c in CANDIDATES if not c.ours)
"""Names of all others."""

USUAL_PEERS: tuple[str, ...] = (
    "torch",
    "torch channels_last",
    "jax.lax",
    "keras on jax",
    "tensorflow",
)
"""What the frameworks of our doors do themselves, without a compiler at run time."""


def choose(doors: Sequence[str] = DOORS, peers: Sequence[str] = USUAL_PEERS) -> list[Candidate]:
    """Returns the candidates with these names, in the order of the tables.

    Args:
        doors: Some of `DOORS`.
        peers: Some of `PEERS`; or `"keras"` for the stock layer on every backend, `"all"` for all.

    Raises:
        ValueError: a name is unknown.

    Example:
        >>> [candidate.name for candidate in choose(["sepconv.jax"], ["keras", "openvino"])][-2:]
        ['keras on tensorflow', 'openvino']
    """
    groups = {"keras": tuple(name for name in PEERS if name.startswith("keras ")), "all": PEERS}
    for argument, names, known in (("door", doors, DOORS), ("peer", peers, (*PEERS, *groups))):
        for name in names:
            if name not in known:
                raise ValueError(
                    f"`{argument}` must be one of {', '.join(known)}. Received: {argument}={name!r}"
                )
    chosen = {*doors, *(name for peer in peers for name in groups.get(peer, (peer,)))}
    return [candidate for candidate in CANDIDATES if candidate.name in chosen]
