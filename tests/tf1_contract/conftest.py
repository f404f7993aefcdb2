"""Fixtures of the contract of `sepconv.tf1`, which test_tf1_contract.py runs once per backend."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest

# Only tests import Keras, not this file: pytest reads it when it runs the whole test suite too.


def pytest_pycollect_makemodule() -> None:
    """Where KERAS_BACKEND names none, lets sepconv pick one before a test imports Keras."""
    importlib.import_module("sepconv.tf1")


@pytest.fixture(autouse=True)
def fresh_names() -> Iterator[None]:
    """No test sees the names, variables or mode of another."""
    import keras

    import sepconv.tf1 as tf

    tf.enable_eager_execution()
    tf.reset_default_graph()
    keras.utils.set_random_seed(11)
    yield
    tf.enable_eager_execution()
    tf.reset_default_graph()


@pytest.fixture
def graph() -> Iterator[Any]:
    """[G]: a graph of its own is current."""
    import sepconv.tf1 as tf

    with tf.Graph().as_default() as graph:
        yield graph


@pytest.fixture(params=["graph", "eager"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """[G] and [E]: once with a graph current, once without."""
    import sepconv.tf1 as tf

    with contextlib.ExitStack() as stack:
        if request.param == "graph":
            stack.enter_context(tf.Graph().as_default())
        yield request.param
