"""The migration page and the legacy example, run as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "migration-tf-layers.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TRAIN = """
import sys
sys.path.insert(0, "examples")
import legacy_xception
print("accuracy", legacy_xception.main(steps=40))
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_snippets_of_the_page_run_and_the_legacy_network_trains(backend, tmp_path):
    assert len(SNIPPETS) >= 5
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "KERAS_HOME": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        # Most of the time would go into making code fast that runs once.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        # Threads of several test processes that wait for each other are slower than one.
        "OMP_NUM_THREADS": "1",
    }
    program = "\n".join([*SNIPPETS, TRAIN])
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    # Guessing gives 0.1, with a standard deviation of 0.013.
    assert float(finished.stdout.split("accuracy")[-1]) > 0.25


def test_the_tests_that_the_page_names_exist():
    files = (ROOT / "tests" / "tf1_contract").glob("contract_*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    table = PAGE.split("## Arguments and properties")[1].split("##")[0]
    named = set()
    for first, last in re.findall(r"`c(\d{3})`(?: to `c(\d{3})`)?", table):
        named |= set(range(int(first), int(last or first) + 1))
    assert len(named) > 90
    for number in named:
        assert f"def test_c{number:03}_" in text, number
    for name in re.findall(r"`(test_\w+)`", table):
        assert f"def {name}(" in text, name
