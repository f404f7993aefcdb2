"""Computes random layers on an older CPU, real or emulated, and compares them with the reference.

    python tools/old_cpu.py draw FILE
    qemu-x86_64 -cpu Nehalem python tools/old_cpu.py compute FILE portable

The target is the one that the package must choose. PYTHONPATH names the folder of the tests, and
that of the packages if the interpreter does not know it. Drawing is a step of its own because the
wheel of ml_dtypes needs AVX: on a CPU without, bfloat16 is left out.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

LAYERS = 64


def draw(file: Path) -> None:
    """Writes the layers into a file."""
    from properties import cases

    problems = [cases.draw(0, number, ("portable",)).problem for number in range(LAYERS)]
    file.write_bytes(pickle.dumps(problems))


def compute(file: Path, target: str) -> None:
    """Compares the layers of a file; ends the program where one is wrong."""
    import numpy as np
    from properties.doors import by_numpy

    import sepconv
    from sepconv import reference

    if sepconv.cpu_target() != target:
        raise SystemExit(f"chose {sepconv.cpu_target()}, not {target}")
    dtypes = [np.dtype(name) for name in ("float32", "float64", "float16")]
    if target != "portable":
        import ml_dtypes

        dtypes.append(np.dtype(ml_dtypes.bfloat16))
    compared = 0
    for problem in pickle.loads(file.read_bytes()):
        for dtype in dtypes:
            arrays = problem.arrays(dtype)
            y, gradients = by_numpy(problem, arrays)
            truth = reference.forward(problem.geometry, *arrays.forward)
            truths = reference.backward(problem.geometry, *arrays.backward)
            bound, bounds = reference.error_bounds(problem.geometry, dtype.name, *arrays.backward)
            for array, true, allowed in zip(
                (y, *gradients), (truth, *truths), (bound, *bounds), strict=True
            ):
                if array is not None:
                    if not (np.abs(array.astype(np.float64) - true) <= allowed).all():
                        raise SystemExit(f"{dtype}: an error is beyond its bound: {problem}")
                    compared += 1
    names = ", ".join(dtype.name for dtype in dtypes)
    print(f"{target}: {LAYERS} layers in {names}: {compared} arrays within their bounds")


def main() -> None:
    """Does what the arguments say."""
    verb, file, *target = sys.argv[1:]
    if verb == "draw":
        draw(Path(file))
    else:
        compute(Path(file), *target)


if __name__ == "__main__":
    main()
