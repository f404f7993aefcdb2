"""The Keras layer, side by side with the stock one, under each backend of Keras."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from keras_backends import run_tests

HERE = Path(__file__).parent
UNTOUCHED_CONFIG = {
    "floatx": "float32",
    "epsilon": 1e-07,
    "backend": "tensorflow",
    "image_data_format": "channels_last",
}
# A warning that saving and reading weights raises inside of Keras.
KERAS_WITH_NUMPY_2 = "ignore:__array__ implementation:DeprecationWarning"


def run(code: str, **environment: str) -> str:
    """Runs Python code in a process of its own and returns what it prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KERAS_")}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-W", KERAS_WITH_NUMPY_2, "-c", code],
        env=kept | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("backend", ["jax", "numpy", "torch", "tensorflow"])
def test_contract(backend, tmp_path):
    run_tests(backend, tmp_path, HERE / "layer_contract.py", JAX_ENABLE_X64="1")


def test_a_process_without_sepconv_loads_our_models_as_stock_ones(tmp_path):
    build = """
        import sys, keras, sepconv.keras
        inputs = keras.Input((8, 8, 3))
        keras.Model(inputs, sepconv.keras.SeparableConv2D(4, 3)(inputs)).save(sys.argv[1])
    """
    load = """
        import sys, keras
        stock = keras.layers.SeparableConv2D
        objects = {"sepconv>SeparableConv2D": stock}
        model = keras.models.load_model(sys.argv[1], custom_objects=objects)
        assert type(model.layers[1]) is stock and "sepconv" not in sys.modules
        print(model.output_shape)
    """
    path = tmp_path / "model.keras"
    for code in (build, load):
        lines = "\n".join(line.strip() for line in code.splitlines())
        lines = lines.replace("sys.argv[1]", repr(str(path)))
        out = run(lines, KERAS_BACKEND="numpy", KERAS_HOME=str(tmp_path))
    assert out.strip() == "(None, 6, 6, 4)"


# ------------------------------------------------------------------------ which backend Keras gets

WHICH = """
import logging
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
logging.getLogger("jax").setLevel(logging.ERROR)
import sys
logging.getLogger().handlers[0].setStream(sys.stdout)
import sepconv.keras, keras
print(keras.config.backend())
"""


def test_the_first_installed_framework_is_picked_and_named_in_the_log(tmp_path):
    for _ in range(2):  # At the first import, Keras writes a config that nobody chose.
        said, backend = run(WHICH, KERAS_HOME=str(tmp_path)).splitlines()
        assert said.startswith("sepconv.keras: No Keras backend was chosen: using jax.")
        assert backend == "jax"
        assert json.loads((tmp_path / "keras.json").read_text()) == UNTOUCHED_CONFIG


def test_a_chosen_backend_stays(tmp_path):
    assert run(WHICH, KERAS_HOME=str(tmp_path), KERAS_BACKEND="numpy").split() == ["numpy"]
    (tmp_path / "keras.json").write_text(json.dumps(UNTOUCHED_CONFIG | {"backend": "numpy"}))
    assert run(WHICH, KERAS_HOME=str(tmp_path)).split() == ["numpy"]


def test_keras_that_was_imported_before_stays_as_it_is(tmp_path):
    code = """
import os
os.environ["KERAS_BACKEND"] = "numpy"
import keras
del os.environ["KERAS_BACKEND"]
"""
    assert run(code + WHICH, KERAS_HOME=str(tmp_path)).split() == ["numpy"]


def test_without_jax_the_next_framework_is_picked(tmp_path):
    code = """
import importlib.util, os, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "jax" else real(name, *rest)
class Stop(Exception): pass
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "keras": raise Stop
sys.meta_path.insert(0, Finder)
try:
    import sepconv.keras
except Stop:
    print(os.environ["KERAS_BACKEND"])
"""
    expected = "torch" if importlib.util.find_spec("torch") else "tensorflow"
    assert run(code, KERAS_HOME=str(tmp_path)).split() == [expected]
