"""The legacy programs of tests/tf1_programs, run with the original and with `sepconv.tf1`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "tf1_programs"
TEXT = (FOLDER / "programs.txt").read_text(encoding="utf-8")
TITLES = [section.partition("\n")[0] for section in TEXT.split("=== ")[1:]]
ORACLE = os.environ.get("SEPCONV_ORACLE_PYTHON")
BACKENDS = ("jax", "torch")

# `make test` makes the environment of the original and names it here.
pytestmark = pytest.mark.skipif(
    not ORACLE, reason="SEPCONV_ORACLE_PYTHON does not name a Python with TensorFlow and tf-keras"
)

# A deviation that the migration page lists: the original leaves the variables of a failed call behind.
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
    assert ORACLE is not None
    return run(ORACLE, "tensorflow.compat.v1", TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3")


@pytest.fixture(scope="session", params=BACKENDS)
def ours(request) -> dict:
    return run(sys.executable, "sepconv.tf1", KERAS_BACKEND=request.param)


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
