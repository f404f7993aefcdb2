"""Runs test files under a backend of Keras, of which there is one per process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sepconv


def interpreter_with(backend: str) -> str:
    """This Python if it has the backend; for TensorFlow, else that of the original layer."""
    if importlib.util.find_spec(backend) is not None:
        return sys.executable
    other = os.environ.get("SEPCONV_ORACLE_PYTHON")
    if backend == "tensorflow" and other:
        check = [other, "-c", "import pytest, hypothesis, keras, tensorflow"]
        if subprocess.run(check, capture_output=True, check=False).returncode == 0:
            return other
    pytest.skip(f"{backend} is not installed")


def run_tests(backend: str, folder: Path, *files: Path, **environment: str) -> str:
    """Runs test files in a process of their own under a backend; returns what pytest printed."""
    python = interpreter_with(backend)
    # A path that holds nothing else: the other interpreter has packages of its own.
    packages = folder / "packages"
    packages.mkdir()
    (packages / "sepconv").symlink_to(Path(sepconv.__file__).parent, target_is_directory=True)
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "KERAS_HOME": str(folder),
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(packages),
        **environment,
    }
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    finished = subprocess.run(
        [*command, *map(str, files)], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout[-20_000:] + finished.stderr[-2_000:]
    return finished.stdout
