"""Which interpreter runs tests on a backend of Keras, and how it finds this package."""

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


def path_to_the_package(folder: Path) -> str:
    """A PYTHONPATH that holds nothing else: the other interpreter has packages of its own."""
    link = folder / "packages"
    link.mkdir()
    (link / "sepconv").symlink_to(Path(sepconv.__file__).parent, target_is_directory=True)
    return str(link)
