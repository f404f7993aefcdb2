"""The contract of `sepconv.tf1`: tests/tf1_contract under each Keras backend, in a process of its own.

Keras has one backend per process. Every test in that folder is reported here by its own name, which
starts with its number in the checklist. To run some of them by hand:

    KERAS_BACKEND=torch python -m pytest -o python_files='contract_*.py' tests/tf1_contract -k c029
"""

from __future__ import annotations

import ast
import fcntl
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "tf1_contract"
BACKENDS = ("jax", "torch", "numpy")
ITEMS = 111


def contract_tests() -> list[tuple[str, str]]:
    """(module, function) of every test, read from the text: importing would load Keras here."""
    return [
        (path.stem, node.name)
        for path in sorted(FOLDER.glob("contract_*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


TESTS = contract_tests()


def run(backend: str, folder: Path) -> dict[str, list[list[str]]]:
    """Outcomes by `module.function`: for each parametrisation, its name, outcome and text."""
    report = folder / f"{backend}.xml"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
        "-o", "python_files=contract_*.py", f"--junitxml={report}", str(FOLDER),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    finished = subprocess.run(
        command, env={**environment, "KERAS_BACKEND": backend}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if not report.exists():
        pytest.fail(f"no report from {backend}:\n{finished.stdout}\n{finished.stderr}")
    outcomes: dict[str, list[list[str]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2]
        name = case.get("name", "")
        children = list(case)
        result = children[0].tag if children else "passed"
        text = (children[0].get("message") or "") + "\n" + (children[0].text or "") if children else ""
        outcomes.setdefault(f"{module}.{name.partition('[')[0]}", []).append([name, result, text])
    return outcomes


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory):
    """A function from backend to outcomes; each backend runs once, whatever the number of workers."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    known: dict[str, dict[str, list[list[str]]]] = {}

    def of(backend: str) -> dict[str, list[list[str]]]:
        if backend not in known:
            stored = folder / f"tf1-contract-{backend}.json"
            with open(folder / f"tf1-contract-{backend}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not stored.exists():
                    stored.write_text(json.dumps(run(backend, folder)), encoding="utf-8")
            known[backend] = json.loads(stored.read_text(encoding="utf-8"))
        return known[backend]

    return of


@pytest.mark.parametrize(
    ("backend", "module", "name"),
    [
        pytest.param(backend, module, name, id=f"{backend}-{name}")
        for backend in BACKENDS
        for module, name in TESTS
    ],
)
def test_contract(outcomes, backend, module, name):
    results = outcomes(backend).get(f"{module}.{name}", [])
    assert results, f"{name} did not run on {backend}"
    failed = [f"{case}\n{text}" for case, result, text in results if result in ("failure", "error")]
    assert not failed, "\n".join(failed)
    if all(result == "skipped" for _, result, _ in results):
        pytest.skip(results[0][2].strip().splitlines()[0])


def test_every_item_of_the_checklist_has_a_test():
    numbers = {int(match[1]) for _, name in TESTS if (match := re.match(r"test_c(\d{3})_", name))}
    assert numbers == set(range(1, ITEMS + 1))
