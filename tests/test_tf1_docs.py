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


def run(backend: str, program: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": backend}, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_snippets_of_the_migration_page_run(backend):
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) >= 4
    run(backend, "\n".join(snippets))


def test_the_tests_that_the_page_names_exist():
    text = "".join(path.read_text() for path in (ROOT / "tests" / "tf1_contract").glob("*.py"))
    for number in set(re.findall(r"`(c\d{3})`", PAGE)):
        assert f"def test_{number}_" in text, number


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_legacy_network_trains(backend):
    program = "import sys; sys.path.insert(0, 'examples'); import legacy_xception as m\n"
    output = run(backend, program + "print('result', m.main(steps=80))")
    # Guessing gives 0.1.
    assert float(output.split("result")[1]) > 0.3
