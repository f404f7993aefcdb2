"""The verbs for files and for the machine, as a shell calls them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from sepconv import machine
from sepconv.cli import app
from sepconv.demo import data
from sepconv.models.tensors import read_tensors, write_tensors


def call(*arguments, code=0):
    """A verb that needs no Keras, in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def shell(*arguments, code=0, **environment):
    """A verb in a process of its own, where it chooses the backend of Keras."""
    done = subprocess.run(
        [sys.executable, "-m", "sepconv.cli", *map(str, arguments)],
        env=os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def weights(tmp_path):
    """A file of weights with the names of Keras, of slim, and of an optimizer."""
    rng = np.random.default_rng(3)
    path = tmp_path / "weights.safetensors"
    shapes = {
        "net/sep/depthwise_kernel": (3, 5, 4, 2),
        "net/sep/pointwise_kernel": (1, 1, 8, 6),
        "net/sep/bias": (6,),
        "slim/depthwise_weights": (3, 3, 4, 1),
        "slim/pointwise_weights": (1, 1, 4, 2),
        "slim/biases": (2,),
        "net/sep/bias/Adam": (6,),
        "dense/kernel": (6, 2),
    }
    tensors = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    write_tensors(path, tensors)
    return path, tensors


def test_convert_translates_names_and_axes_there_and_back(weights, tmp_path):
    path, tensors = weights
    there, back = tmp_path / "there.pt", tmp_path / "back.safetensors"
    call("convert", path, there)
    of_torch = read_tensors(there)
    assert set(of_torch) == {
        *(f"net.sep.{name}" for name in ("depthwise.weight", "pointwise.weight", "pointwise.bias")),
        *(f"slim.{name}" for name in ("depthwise.weight", "pointwise.weight", "pointwise.bias")),
        "dense/kernel",
    }
    kernel = tensors["net/sep/depthwise_kernel"]
    expected = np.moveaxis(kernel, (2, 3), (0, 1)).reshape(8, 1, 3, 5)
    np.testing.assert_array_equal(of_torch["net.sep.depthwise.weight"], expected)
    answer = json.loads(call("convert", there, back, "--layout", "keras", "--json").stdout)
    assert answer["target"] == str(back)
    found = read_tensors(back)
    assert set(answer["tensors"]) == set(found)
    for name in ("pointwise_kernel", "bias"):
        np.testing.assert_array_equal(found[f"net/sep/{name}"], tensors[f"net/sep/{name}"])
    # The weight of torch does not tell how many of its channels come from one.
    np.testing.assert_array_equal(found["net/sep/depthwise_kernel"], kernel.reshape(3, 5, 8, 1))
    np.testing.assert_array_equal(found["slim/bias"], tensors["slim/biases"])


def test_convert_keeps_the_state_of_training_on_request(weights, tmp_path):
    path, tensors = weights
    target = tmp_path / "all.safetensors"
    call("convert", path, target, "--optimizer-slots")
    assert set(read_tensors(target)) == set(tensors)


def test_a_file_that_exists_is_replaced_on_request_only(weights, tmp_path):
    path, _ = weights
    target = tmp_path / "there.safetensors"
    target.write_bytes(b"mine")
    result = call("convert", path, target, code=1)
    assert "exists" in result.stderr
    assert target.read_bytes() == b"mine"
    call("convert", path, target, "--overwrite")
    assert "net/sep/bias" in read_tensors(target)


HOSTILE = {
    "truncated.safetensors": b"\xff\x00\x00\x00\x00\x00\x00\x00{",
    "pickle.pt": pickle.dumps(os.system),
    "empty.h5": b"",
    "text.keras": b"PK no archive",
    "unknown.bin": b"?",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("verb", ["convert", "inspect", "fuse"])
def test_a_hostile_file_is_one_line_and_leaves_nothing(verb, name, tmp_path):
    source, target = tmp_path / name, tmp_path / "out.keras"
    source.write_bytes(HOSTILE[name])
    arguments = [verb, source] if verb == "inspect" else [verb, source, target]
    result = call(*arguments, code=1)
    assert result.stdout == ""
    line = result.stderr.strip()
    assert line.startswith("error: ")
    assert name in line.replace("\n", "")
    assert "Traceback" not in line
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["out.tar"], "must end in"),
        (["out.keras"], "holds tensors and no model"),
        (["out.pt", "--layout", "onnx"], "`layout` must be one of"),
        (["out.pt", "--moving-averages", "--optimizer-slots"], "exclude each other"),
        (["out.keras", "--model", "weights.pt"], "must be the file of a model"),
        (["no/such/out.pt"], "there is no folder"),
        (["out.pt", "--model", "missing.h5"], "there is no such file"),
    ],
)
def test_what_cannot_be_converted_says_why(arguments, reason, weights, tmp_path):
    path, _ = weights
    target, *options = arguments
    result = call("convert", path, tmp_path / target, *options, code=1)
    assert reason in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == [path]


def test_odd_files_and_endings_are_told_in_one_line(weights, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    (tmp_path / "folder.h5").mkdir()
    for name in ("pipe.safetensors", "zero.pt", "folder.h5"):
        assert call("inspect", tmp_path / name, code=1).stderr.strip().endswith(": not a file")
    assert "nor one of a model: .keras" in call("inspect", tmp_path, code=1).stderr
    refusal = call("fuse", weights[0], tmp_path / "out.h5", code=1).stderr
    assert refusal.startswith("error: `target` must end in .keras. Received: ")


def test_usage_and_traces(weights):
    assert call("convert", code=2).stdout == ""
    result = CliRunner().invoke(app, ["--debug", "inspect", "no-such-file.keras"])
    assert isinstance(result.exception, FileNotFoundError)


def test_a_terminal_sees_how_far_the_work_is_and_nobody_else(tmp_path):
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        file.update({"a": np.ones(2), "b": np.ones(3)})
    seen = {}
    for terminal in (False, True):
        for options in ((), ("--json",)):
            result = CliRunner(env={"TTY_COMPATIBLE": str(int(terminal))}).invoke(
                app, ["inspect", str(path), *options]
            )
            assert result.exit_code == 0
            seen[terminal, options] = result.stderr
    assert "2 of 2 tensors read" in seen.pop((True, ()))
    assert set(seen.values()) == {""}


def test_inspect_shows_tensors_and_their_role(weights, tmp_path):
    path, tensors = weights
    facts = json.loads(call("inspect", path, "--json").stdout)
    assert {layer["name"]: layer["parameters"] for layer in facts["layers"]} == {
        "net/sep": 3 * 5 * 4 * 2 + 8 * 6 + 6,
        "slim": 3 * 3 * 4 + 4 * 2 + 2,
    }
    roles = {each["name"]: each["role"] for each in facts["variables"]}
    assert roles.pop("net/sep/bias/Adam") == "optimizer slot"
    assert set(roles.values()) == {"weight"}
    assert {each["bytes"] for each in facts["variables"]} == {a.nbytes for a in tensors.values()}
    text = call("inspect", path).stdout
    assert "3x5x4x2" in text
    # What a file says is text, and no command for the terminal.
    odd = tmp_path / "odd.safetensors"
    write_tensors(odd, {"[red]\x1b[2Jname": np.ones(2, np.float32)})
    assert "[red]?[2Jname" in call("inspect", odd).stdout


def test_a_published_model_is_inspected_fused_and_converted(tmp_path):
    source = data.emotion_model_path()
    fused, tensors = tmp_path / "fused.keras", tmp_path / "weights.safetensors"
    facts = json.loads(shell("inspect", source, "--json").stdout)
    separable = [layer for layer in facts["layers"] if layer["kind"] == "SeparableConv2D"]
    assert len(separable) == 8
    # 3x3 pixels of 8 channels, then 8 to 16, at 60x60 positions.
    assert separable[0]["macs"] == 60 * 60 * (9 * 8 + 8 * 16)
    assert separable[0]["parameters"] == 9 * 8 + 8 * 16
    report = json.loads(shell("fuse", source, fused, "--inference", "--json").stdout)
    assert len(report["candidates"]) == 8
    assert all(candidate["reason"] is None for candidate in report["candidates"])
    shell("convert", fused, tensors)
    kernels = [name for name in read_tensors(tensors) if name.endswith("/depthwise_kernel")]
    assert len(kernels) == 8
    network = tmp_path / "net.onnx"
    answer = json.loads(shell("convert", fused, network, "--json").stdout)
    assert len(answer["tensors"]) == 56
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    (x,) = session.get_inputs()
    (probabilities,) = session.run(None, {x.name: data.astronaut_face().pixels})
    # The astronaut is happy, as in the demo.
    assert probabilities[0, 3] > 0.998
    # What the optimizer of Keras 2 stored beside the model.
    slots = {each["name"] for each in facts["variables"] if each["role"] == "optimizer slot"}
    everything = tmp_path / "all.safetensors"
    shell("convert", source, everything, "--optimizer-slots")
    assert len(slots) > 50
    assert slots < set(read_tensors(everything))


def test_layers_that_are_called_twice_or_hidden(tmp_path):
    """MACs count every call; a file of weights alone has its separable convolutions."""
    path, weights = tmp_path / "net.keras", tmp_path / "net.weights.h5"
    program = """
        import sys, keras
        from keras import layers
        inner = keras.Sequential(
            [keras.Input((8, 8, 2)), layers.Conv2DTranspose(4, 2, strides=2)], name="inner"
        )
        x = keras.Input((8, 8, 2))
        same = layers.SeparableConv2D(2, 3, padding="same", name="same")
        y = layers.Dense(3)(layers.Flatten()(inner(same(same(x)))))
        net = keras.Model(x, layers.Reshape((3, 1))(y))
        net.compile("adam", "mse")
        net.save(sys.argv[1])
        net.save_weights(sys.argv[2])
        # Such weights have no names, so they go into a model of the same layers, and no other.
        from sepconv.models.convert import convert
        other = keras.models.clone_model(net)
        other.save("other.keras")
        keras.Model(other.input, other.layers[2].output).save("part.keras")
        convert(sys.argv[2], "full.safetensors", model="other.keras")
        convert("other.keras", "other.safetensors")
        convert(sys.argv[1], "net.safetensors")
        keras.Sequential([keras.Input((8, 8, 2)), layers.Conv2D(3, 1)]).save("wider.keras")
        for model in ("part.keras", "wider.keras"):
            try:
                convert(sys.argv[2], "no.keras", model=model)
            except ValueError as error:
                print(error)
    """
    environment = os.environ | {"KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", textwrap.dedent(program), path, weights]
    refusals = subprocess.run(
        command, check=True, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ).stdout
    facts = json.loads(shell("inspect", path, "--json", KERAS_BACKEND="torch").stdout)
    found = {layer["name"]: layer for layer in facts["layers"]}
    assert found["same"]["macs"] == 2 * 64 * (9 * 2 + 2 * 2)
    assert found["same"]["output_shape"] == [None, 8, 8, 2]
    assert found["inner/conv2d_transpose"]["macs"] == 64 * 4 * 2 * 4
    assert found["dense"]["macs"] == 16 * 16 * 4 * 3
    assert found["dense"]["bytes"] == 4 * (16 * 16 * 4 * 3 + 3)
    assert found["reshape"]["macs"] is None
    assert "optimizer/vars/0" in {each["name"] for each in facts["variables"]}
    facts = json.loads(call("inspect", weights, "--json").stdout)
    (only,) = facts["layers"]
    assert only["kind"] == "SeparableConv2D"
    assert only["parameters"] == 9 * 2 + 2 * 2 + 2
    full, other, of_net = (
        read_tensors(tmp_path / f"{name}.safetensors") for name in ("full", "other", "net")
    )
    np.testing.assert_equal(full, of_net)
    assert not np.array_equal(other["dense/kernel"], of_net["dense/kernel"])
    assert refusals.count(f"{weights}: not the weights of this model") == 2
    assert not (tmp_path / "no.keras").exists()


def test_biases_between_the_stages_keep_their_names(tmp_path):
    rng = np.random.default_rng(5)
    path, there, back = (tmp_path / name for name in ("a.safetensors", "b.pt", "c.safetensors"))
    shapes = {
        "sep/depthwise_kernel": (3, 3, 4, 1),
        "sep/pointwise_kernel": (1, 1, 4, 5),
        "sep/bias": (5,),
        "sep/depthwise_bias": (4,),
    }
    tensors = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    write_tensors(path, tensors)
    call("convert", path, there)
    np.testing.assert_array_equal(
        read_tensors(there)["sep.depthwise.bias"], tensors["sep/depthwise_bias"]
    )
    call("convert", there, back, "--layout", "keras")
    np.testing.assert_equal(read_tensors(back), tensors)


def test_doctor_tells_what_runs():
    facts = json.loads(shell("doctor", "--json").stdout)
    assert facts["native_fault"] is None
    assert facts["target"] in facts["targets"]
    assert facts["packages"]["numpy"] == np.__version__
    found = {door["name"]: door["reason"] for door in facts["doors"]}
    assert found == {"numpy": "", "jax": "", "torch": "", "keras": ""}
    native, triton = facts["backends"]
    assert (native["device"], native["runs"]) == (machine.cpu_name(), True)
    # Either there is a GPU, or somebody says what is missing.
    assert triton["name"] == "triton"
    assert triton["runs"] == (triton["reason"] == "")
    # A door that cannot run says why, and the others are not concerned.
    other = json.loads(shell("doctor", "--json", KERAS_BACKEND="no-such-backend").stdout)
    reasons = {door["name"]: door["reason"] for door in other["doors"]}
    assert reasons.pop("keras") != ""
    assert set(reasons.values()) == {""}
    assert machine.cpu_name() in shell("doctor").stdout


def test_a_machine_without_the_native_kernel_is_unhealthy(tmp_path):
    program = (
        "import sys; sys.modules['sepconv._native'] = None\n"
        "from sepconv.doctor import examine\n"
        "health = examine()\n"
        "assert health.native_fault, health\n"
        "assert all('native kernel' in door.reason for door in health.doors)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_shell_gets_its_completion():
    script = shell(_SEPCONV_COMPLETE="source_bash")
    assert "complete" in script.stdout
    found = shell(
        _SEPCONV_COMPLETE="complete_bash", COMP_WORDS="sepconv con", COMP_CWORD="1"
    ).stdout.split()
    assert "convert" in found
