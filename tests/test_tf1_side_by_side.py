"""The legacy programs of tests/tf1_programs, run with the original and with `sepconv.tf1`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sepconv

FOLDER = Path(__file__).parent / "tf1_programs"
TEXT = (FOLDER / "programs.txt").read_text(encoding="utf-8")
TITLES = [section.partition("\n")[0] for section in TEXT.split("=== ")[1:]]
ORACLE = os.environ.get("SEPCONV_ORACLE_PYTHON", "")
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3"}
# Code that runs once, on small arrays, is not worth the time to make it fast.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
BACKENDS = ("jax", "torch", "tensorflow")

# `make test` makes the environment of the original and names it here.
pytestmark = pytest.mark.skipif(
    not ORACLE, reason="SEPCONV_ORACLE_PYTHON does not name a Python with TensorFlow and tf-keras"
)

# A deviation of the migration page: the original leaves the variables of a failed call behind.
LEAVES_NOTHING = {"dtype mismatch"}


def run(python: str, module: str, **variables: str) -> dict:
    finished = subprocess.run(
        [python, str(FOLDER / "run.py"), module], input=TEXT, capture_output=True, text=True,
        env={**os.environ, **variables}, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout[finished.stdout.index("{") :])


@pytest.fixture(scope="session")
def original() -> dict:
    return run(ORACLE, "tensorflow.compat.v1", TF_USE_LEGACY_KERAS="1", **QUIET)


@pytest.fixture(scope="session", params=BACKENDS)
def ours(request) -> dict:
    if request.param != "tensorflow" or importlib.util.find_spec("tensorflow") is not None:
        return run(sys.executable, "sepconv.tf1", KERAS_BACKEND=request.param, **QUICK)
    # Keras 3 is in the environment of the original too, and sepconv needs nothing but NumPy there.
    package = Path(sepconv.__file__).parent.parent
    return run(ORACLE, "sepconv.tf1", KERAS_BACKEND="tensorflow", PYTHONPATH=str(package), **QUIET)


def test_there_are_at_least_forty_programs():
    assert len(TITLES) == len(set(TITLES)) >= 40


@pytest.mark.parametrize("title", TITLES)
def test_program(original, ours, title):
    expected, found = original[title], ours[title]
    if title in LEAVES_NOTHING:
        assert found["variables"] == found["trainable"] == []
        assert expected["variables"]
    else:
        for key in ("variables", "trainable", "losses", "updates"):
            assert found[key] == expected[key], key
    assert len(found["shown"]) == len(expected["shown"])
    for mine, theirs in zip(found["shown"], expected["shown"], strict=True):
        if "number" in theirs:
            assert mine["shape"] == theirs["shape"]
            assert np.allclose(mine["number"], theirs["number"], rtol=1e-4, atol=1e-4)
        else:
            assert mine == theirs
