"""Fusion of Keras models, under backends of Keras; `keras_fuse_contract.py` says what it owes."""

from __future__ import annotations

from pathlib import Path

import pytest
from keras_backends import run_tests

HERE = Path(__file__).parent


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_contract(backend, tmp_path):
    run_tests(backend, tmp_path, HERE / "keras_fuse_contract.py")
