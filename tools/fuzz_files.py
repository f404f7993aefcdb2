"""Damages files of models at random and loads them: a ValueError or a model, never anything else.

    python tools/fuzz_files.py --seconds 600

Every file is loaded in a process of its own, with a limit of memory and of time, so that a crash
counts as one and the next file is tried. What was neither is written to --keep, with its seed.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np

import sepconv
from sepconv.models.tensors import write_tensors

SECONDS_PER_FILE = 30
MEMORY_BYTES = 3 << 30
INTERESTING = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 50,
    2**63 - 1,
    2**64 - 1,
)


def seeds(folder: Path) -> list[Path]:
    """Writes one valid file of each format."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.SeparableConv2D(4, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2),
        ]
    )
    tensors = {variable.path: np.asarray(variable) for variable in net.variables}
    paths = [folder / name for name in ("net.keras", "net.h5", "net.weights.h5")]
    for path in paths[:2]:
        net.save(path)
    net.save_weights(paths[2])
    for name in ("net.safetensors", "net.pt"):
        write_tensors(folder / name, tensors)
        paths.append(folder / name)
    return paths


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Returns the bytes with one to four changes of several kinds."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not data:
            break
        # Headers lie at the ends.
        at = rng.choice((rng.randrange(len(data)), rng.randrange(min(512, len(data)))))
        at = at if rng.random() < 0.8 else len(data) - 1 - at % min(512, len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(INTERESTING) & ((1 << 8 * width) - 1)
            data[at : at + width] = value.to_bytes(width, "little")
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + rng.randrange(1, 64)]
        else:
            data[at:at] = data[rng.randrange(len(data)) :][: rng.randrange(1, 64)]
    return bytes(data)


def outcome_of(path: Path) -> str:
    """Loads a file in a child: "model", "ValueError", or what else happened."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            signal.alarm(SECONDS_PER_FILE)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES,) * 2)
            os.dup2(os.open(str(path) + ".log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
            sepconv.load(path)
            code = 0
        except ValueError as error:
            code = 1 if str(path) in str(error) else 2
            if code == 2:
                traceback.print_exc()
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    names = ("model", "ValueError", "ValueError without the file", "another exception")
    return names[os.WEXITSTATUS(status)]


def main() -> None:
    """Damages and loads until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz-files"))
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        originals = {path: path.read_bytes() for path in seeds(folder)}
        for path in originals:
            if outcome_of(path) != "model":
                raise SystemExit(f"{path} is valid and does not load")
        number = options.seed * 10**9
        while time.monotonic() < end:
            original = list(originals)[number % len(originals)]
            path = folder / f"damaged-{original.name}"
            path.write_bytes(damaged(originals[original], random.Random(number)))
            outcome = outcome_of(path)
            counts[original.name, outcome] += 1
            if outcome not in ("model", "ValueError"):
                kept = options.keep / f"{number}-{outcome.replace(' ', '-')}-{original.name}"
                kept.write_bytes(path.read_bytes())
                log = Path(str(path) + ".log").read_text(errors="replace")
                Path(str(kept) + ".log").write_text(log)
            number += 1
    for (file, outcome), count in sorted(counts.items()):
        print(f"{file:20} {outcome:30} {count:7}")
    print(f"{sum(counts.values())} files")


if __name__ == "__main__":
    main()
