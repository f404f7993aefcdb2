"""The contract of `sepconv.tf1`: the tests of tests/tf1_contract, once per backend of Keras.

Keras has one backend per process, so each run is a process of its own. The names of those tests
start with their numbers in the checklist. To run some of them by hand:

    KERAS_BACKEND=torch python -m pytest tests/tf1_contract/contract_*.py -k c029
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
from keras_backends import interpreter_with, path_to_the_package

FILES = sorted((Path(__file__).parent / "tf1_contract").glob("contract_*.py"))
ITEMS = 111


@pytest.mark.parametrize("backend", ["jax", "torch", "numpy", "tensorflow"])
def test_contract(backend, tmp_path):
    python = interpreter_with(backend)
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "KERAS_HOME": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # Code that runs once, on small arrays, is not worth the time to make it fast.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": path_to_the_package(tmp_path),
    }
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    finished = subprocess.run(
        [*command, *map(str, FILES)], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout[-20_000:] + finished.stderr[-2_000:]
    counts = finished.stdout.strip().splitlines()[-1]
    assert ("skipped" in counts) == (backend == "numpy"), counts
    print(backend, counts)


def test_every_item_of_the_checklist_has_a_test():
    names = [
        node.name
        for path in FILES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    ]
    numbers = {int(match[1]) for name in names if (match := re.match(r"test_c(\d{3})_", name))}
    assert numbers == set(range(1, ITEMS + 1))
