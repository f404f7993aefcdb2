"""The contract of `sepconv.tf1`: the tests of tests/tf1_contract, once per backend of Keras.

Keras has one backend per process, so each run is a process of its own. The names of those tests
start with their numbers in the checklist. To run some of them by hand:

    KERAS_BACKEND=torch python -m pytest tests/tf1_contract/contract_*.py -k c029
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from keras_backends import run_tests

FILES = sorted((Path(__file__).parent / "tf1_contract").glob("contract_*.py"))
ITEMS = 111


@pytest.mark.parametrize("backend", ["jax", "torch", "numpy", "tensorflow"])
def test_contract(backend, tmp_path):
    # Code that runs once, on small arrays, is not worth the time to make it fast.
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    counts = run_tests(backend, tmp_path, *FILES, **quick).strip().splitlines()[-1]
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
