"""Any calls of the compiled border under Atheris, which looks for inputs that reach new code.

    pip install atheris hypothesis pytest ml_dtypes numpy
    make fuzz-border FUZZ_SECONDS=600

The calls and the rules that tell legal ones from others are those of tests/test_border.py: bytes
stand in for hypothesis's random numbers. The extension is built by Clang with the counters that
libFuzzer reads, so that its branches count.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

with atheris.instrument_imports(include=["sepconv"]):
    import test_border

TESTS = [
    test_border.test_any_forward_call_computes_or_is_refused,
    test_border.test_any_backward_call_computes_or_is_refused,
    test_border.test_any_geometry_has_a_plan_or_is_refused,
    test_border.test_a_geometry_that_is_none_is_refused,
    test_border.test_only_22_integers_are_a_geometry,
]


def try_one(data: bytes) -> None:
    """Runs the test that the first byte names on the others."""
    if data:
        TESTS[data[0] % len(TESTS)].hypothesis.fuzz_one_input(data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, try_one)
    atheris.Fuzz()
