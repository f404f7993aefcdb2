"""Fixtures of the contract of `sepconv.tf1`. Run by tests/test_tf1_contract.py, once per backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras
import pytest

import sepconv.tf1 as tf


@pytest.fixture(autouse=True)
def fresh_names() -> Iterator[None]:
    """No test sees the names, variables or mode of another."""
    tf.enable_eager_execution()
    tf.reset_default_graph()
    keras.utils.set_random_seed(11)
    yield
    tf.enable_eager_execution()
    tf.reset_default_graph()


@pytest.fixture
def graph() -> Iterator[tf.Graph]:
    """[G]: a graph of its own is current."""
    with tf.Graph().as_default() as graph:
        yield graph


@pytest.fixture(params=["graph", "eager"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """[G] and [E]: once with a graph current, once without."""
    with contextlib.ExitStack() as stack:
        if request.param == "graph":
            stack.enter_context(tf.Graph().as_default())
        yield request.param
