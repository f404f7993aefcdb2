"""Every line lives in the room whose words it uses: imports, words and numbers of each file."""

import ast
import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sepconv import _native
from sepconv.spec import ACTIVATIONS, Geometry

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "sepconv"
CSRC = ROOT / "csrc"

# What every engine of the benchmark may import.
ENGINE = {"numpy", "sepconv", "sepconv.bench."}
# What the Python files of a room may import besides the standard library. The first pattern that
# fits a file is its room. A trailing dot stands for everything below a package.
ROOMS = {
    "spec.py": set(),
    "reference.py": {"numpy", "sepconv.spec"},
    "backends.py": {"sepconv.spec", "sepconv._native", "sepconv.triton.launch"},
    "numpy.py": {"numpy", "sepconv.spec", "sepconv.backends", "sepconv._native"},
    "jax.py": {"jax", "numpy", "sepconv.spec", "sepconv.backends", "sepconv._native"},
    "torch/quiet.py": {"torch"},
    "torch/composition.py": {"torch", "sepconv.spec"},
    "torch/operators.py": {"torch", "numpy", "sepconv.spec", "sepconv.backends"},
    "torch/plans.py": {
        "torch",
        "numpy",
        "sepconv.spec",
        "sepconv.backends",
        "sepconv.torch.operators",
    },
    "torch/derivatives.py": {
        "torch",
        "sepconv.spec",
        "sepconv._native",
        "sepconv.torch.composition",
        "sepconv.torch.operators",
        "sepconv.torch.quiet",
    },
    "torch/at_once.py": {
        "torch",
        "sepconv.torch.derivatives",
        "sepconv.torch.operators",
        "sepconv.torch.plans",
        "sepconv.torch.quiet",
    },
    "torch/functions.py": {"torch", "sepconv.spec", "sepconv.backends", "sepconv.torch."},
    "torch/*": {"torch", "sepconv.spec", "sepconv.torch."},
    # The number of blocks and their sizes are integers that anyone may ask for; tensors and the
    # compiler are needed by those who launch.
    "triton/__init__.py": set(),
    "triton/kernels.py": {"triton"},
    "triton/tuning.py": {"sepconv.spec"},
    "triton/ceilings.py": {"torch"},
    "triton/recording.py": {
        "torch",
        "numpy",
        "sepconv.spec",
        "sepconv.triton.kernels",
        "sepconv.triton.launch",
    },
    "triton/explanation.py": {
        "torch",
        "sepconv.spec",
        "sepconv.triton.ceilings",
        "sepconv.triton.recording",
    },
    "triton/launch.py": {
        "torch",
        "numpy",
        "sepconv.spec",
        "sepconv.triton.kernels",
        "sepconv.triton.tuning",
    },
    "keras.py": {
        "keras",
        "jax",
        "sepconv.spec",
        "sepconv.backends",
        "sepconv.numpy",
        "sepconv.jax",
    },
    "tf1/*": {
        "keras",
        "numpy",
        "ml_dtypes",
        "jax",
        "torch",
        "tensorflow",
        "sepconv.spec",
        "sepconv.keras",
        "sepconv.tf1.",
    },
    "plans.py": {
        "sepconv.spec",
        "sepconv.backends",
        "sepconv._native",
        "sepconv.machine",
        "sepconv.triton.explanation",
    },
    "__init__.py": {
        "sepconv.spec",
        "sepconv.plans",
        "sepconv._native",
        "sepconv.models.fuse",
        "sepconv.models.load",
    },
    "machine.py": {"numpy", "sepconv", "sepconv._native"},
    "timing.py": {"numpy"},
    "progress.py": set(),
    # An engine runs in a process of its own, with its framework and a door of ours.
    "bench/engines/jax.py": {"jax", *ENGINE, "sepconv.jax"},
    "bench/engines/keras.py": {"keras", "jax", "torch", *ENGINE, "sepconv.keras"},
    "bench/engines/litert.py": {"ai_edge_litert", "flatbuffers", *ENGINE},
    "bench/engines/numpy.py": {"ml_dtypes", *ENGINE, "sepconv.numpy", "sepconv.backends"},
    "bench/engines/onnxruntime.py": {"onnx", "onnxruntime", *ENGINE},
    "bench/engines/openvino.py": {"openvino", *ENGINE},
    "bench/engines/tensorflow.py": {"tensorflow", *ENGINE},
    "bench/engines/torch.py": {"torch", *ENGINE, "sepconv.torch"},
    "bench/engines/cuda.py": {
        "torch",
        "sepconv",
        "sepconv.machine",
        "sepconv.bench.",
        "sepconv.torch",
        "sepconv.triton.ceilings",
    },
    "bench/engines/__init__.py": set(),
    "bench/pictures.py": {"matplotlib", "numpy", "sepconv.bench."},
    "bench/command.py": {"rich", "sepconv", "sepconv.backends", "sepconv.plans", "sepconv.bench."},
    "bench/*": {
        "numpy",
        "sepconv",
        "sepconv._native",
        "sepconv.machine",
        "sepconv.numpy",
        "sepconv.plans",
        "sepconv.spec",
        "sepconv.timing",
        "sepconv.bench.",
    },
    "cli.py": {
        "typer",
        "rich",
        "sepconv",
        "sepconv.bench.",
        "sepconv.commands.",
        "sepconv.demo.",
        "sepconv.doctor",
        "sepconv.models.",
        "sepconv.progress",
    },
    "models/__init__.py": set(),
    "models/exclusion.py": set(),
    "models/report.py": {"rich"},
    "models/fuse.py": {
        "sepconv.models.exclusion",
        "sepconv.models.keras_fuse",
        "sepconv.models.report",
        "sepconv.models.torch_fuse",
    },
    "models/keras_graph.py": {"keras"},
    "models/keras_values.py": {"keras"},
    "models/keras_rebuild.py": {"keras", "sepconv.models.keras_graph"},
    "models/keras_assign.py": {"keras", "numpy", "sepconv.models.keras_graph"},
    "models/keras_fused.py": {"keras", "jax", "sepconv.spec", "sepconv.keras"},
    "models/keras_files.py": {
        "h5py",
        "keras",
        "sepconv.keras",
        "sepconv.models.keras_fused",
        "sepconv.models.keras_values",
        "sepconv.models.tensors",
        "sepconv.models.weights",
        "sepconv.progress",
    },
    "models/keras_onnx.py": {
        "keras",
        "numpy",
        "sepconv.spec",
        "sepconv.keras",
        "sepconv.models.keras_chains",
        "sepconv.models.keras_files",
        "sepconv.models.keras_fused",
        "sepconv.models.keras_graph",
        "sepconv.models.onnx",
        "sepconv.models.weights",
        "sepconv.progress",
    },
    "models/load.py": {
        "numpy",
        "sepconv.models.keras_files",
        "sepconv.models.tensors",
        "sepconv.models.weights",
    },
    "models/keras_*.py": {
        "keras",
        "numpy",
        "sepconv.spec",
        "sepconv.keras",
        "sepconv.models.exclusion",
        "sepconv.models.keras_chains",
        "sepconv.models.keras_fused",
        "sepconv.models.keras_graph",
        "sepconv.models.keras_measure",
        "sepconv.models.keras_rebuild",
        "sepconv.models.keras_values",
        "sepconv.models.report",
        "sepconv.progress",
    },
    "models/torch_graph.py": {"torch", "sepconv.torch"},
    "models/torch_functions.py": {"torch", "sepconv.models.torch_graph"},
    "models/torch_fuse.py": {
        "torch",
        "sepconv.spec",
        "sepconv.torch",
        "sepconv.torch.composition",
        "sepconv.models.exclusion",
        "sepconv.models.report",
        "sepconv.models.torch_functions",
        "sepconv.models.torch_graph",
    },
    "models/atomic.py": set(),
    "models/convert.py": {
        "numpy",
        "sepconv.models.atomic",
        "sepconv.models.fuse",
        "sepconv.models.keras_assign",
        "sepconv.models.keras_files",
        "sepconv.models.load",
        "sepconv.models.onnx",
        "sepconv.models.report",
        "sepconv.models.tensors",
        "sepconv.models.weights",
        "sepconv.progress",
    },
    "models/inspect.py": {
        "numpy",
        "sepconv.models.convert",
        "sepconv.models.keras_graph",
        "sepconv.models.load",
        "sepconv.models.tensors",
        "sepconv.models.weights",
    },
    "doctor.py": {
        "numpy",
        "torch",
        "sepconv",
        "sepconv._native",
        "sepconv.backends",
        "sepconv.machine",
        "sepconv.spec",
        "sepconv.progress",
    },
    "commands/*": {"rich", "sepconv.doctor", "sepconv.models."},
    "models/weights.py": {"numpy", "sepconv.spec"},
    "models/checkpoints.py": {"numpy", "ml_dtypes"},
    "models/tensors.py": {
        "h5py",
        "ml_dtypes",
        "numpy",
        "safetensors",
        "torch",
        "sepconv.models.atomic",
        "sepconv.models.checkpoints",
        "sepconv.progress",
    },
    "models/onnx.py": {
        "numpy",
        "onnx",
        "sepconv.spec",
        "sepconv.models.atomic",
        "sepconv.models.keras_onnx",
        "sepconv.models.weights",
    },
    "demo/*": {
        "h5py",
        "jax",
        "keras",
        "matplotlib",
        "numpy",
        "rich",
        "skimage",
        "sepconv",
        "sepconv.keras",
        "sepconv.machine",
        "sepconv.timing",
        "sepconv.demo.",
    },
}
PYTHON_FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
# The demo stands outside of the library: it makes layers as a user does. Fusion makes layers from
# those of a model, with all that they have.
CONTRACT_ROOM = ["keras.py", "tf1/*", "demo/*", "models/keras_*.py"]


def in_room(name, patterns):
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def syntax_tree(name):
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"), filename=name)


def own_module(name):
    """Whether a dotted name is a module of the package."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir() or name == "sepconv._native"


def imported_modules(tree):
    """Modules that a file imports anywhere: third-party by first name, our own by full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if own_module(name) else node.module for name in names]
        else:
            continue
        for name in names:
            first = name.split(".")[0]
            if first == "sepconv":
                yield name
            elif first not in sys.stdlib_module_names:
                yield first


def allows(allowed, module):
    return module in allowed or any(
        entry.endswith(".") and (module + ".").startswith(entry) for entry in allowed
    )


@pytest.mark.parametrize("name", PYTHON_FILES)
def test_a_file_imports_only_what_its_room_may(name):
    allowed = next((ROOMS[room] for room in ROOMS if in_room(name, [room])), None)
    assert allowed is not None, f"{name} has no room in ROOMS"
    strangers = {m for m in imported_modules(syntax_tree(name)) if not allows(allowed, m)}
    assert not strangers


def test_backends_loads_kernels_only_when_they_are_called():
    top_level = ast.Module([n for n in syntax_tree("backends.py").body if is_import(n)], [])
    assert set(imported_modules(top_level)) == {"sepconv.spec"}


def is_import(node):
    return isinstance(node, ast.Import | ast.ImportFrom)


def compared_strings(tree):
    """Strings that a file compares with, looks up in a literal, or matches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            operands = node.value.keys
        else:
            continue
        for operand in operands:
            for leaf in ast.walk(operand):
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                    yield leaf.value


@pytest.mark.parametrize("name", PYTHON_FILES)
def test_only_the_plan_interprets_padding_and_data_format(name):
    words = {"same", "valid", "channels_first", "channels_last"}
    found = words & {string.lower() for string in compared_strings(syntax_tree(name))}
    if name == "spec.py":
        assert found, "the plan no longer compares them: has the rule moved?"
    else:
        assert not found


def test_the_plan_uses_integer_arithmetic_only():
    tree = syntax_tree("spec.py")
    operators = {
        type(node.op)
        for node in ast.walk(tree)
        # An operation on two constants is a constant.
        if isinstance(node, ast.BinOp)
        and not (isinstance(node.left, ast.Constant) and isinstance(node.right, ast.Constant))
    }
    # BitOr is the `|` of annotations.
    assert operators <= {ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.BitOr}
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert not [value for value in constants if isinstance(value, float)]


@pytest.mark.parametrize("name", [n for n in PYTHON_FILES if not in_room(n, CONTRACT_ROOM)])
def test_weights_are_made_in_the_contract_room_only(name):
    words = re.compile(r"(initializer|regularizer|constraint)s?$")
    names = set()
    for node in ast.walk(syntax_tree(name)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            names.add(node.arg)
    assert not {n for n in names if words.search(n)}


def code_of(path):
    """The text of a C++ file without comments and strings."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    return re.sub(r'(?<!include )"(?:\\.|[^"\\\n])*"', '""', text)


CORE_FILES = sorted(p for p in CSRC.iterdir() if p.suffix in {".cc", ".h"})


def test_the_core_includes_no_python_and_no_framework():
    includes = {
        name
        for path in CORE_FILES
        for name in re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', code_of(path))
    }
    assert {"sepconv.h", "vector"} <= includes
    assert not {i for i in includes if re.match(r"(bind|Python|nanobind|numpy|torch|xla|jax)", i)}


def test_the_border_includes_only_the_interface_of_the_core():
    for path in (CSRC / "bind").iterdir():
        own = set(re.findall(r'#\s*include\s*"([^"]+)"', code_of(path)))
        assert own <= {"sepconv.h", "bind/xla_ffi.h", "xla/ffi/api/ffi.h"}, path


def test_only_simd_h_uses_intrinsics():
    intrinsic = re.compile(r"\b(_mm\d*_\w+|__m\d{3}\w*|__builtin_ia32_\w+|v\w+q?_[fsu]\d+)\b")
    assert intrinsic.search(code_of(CSRC / "simd.h"))
    for path in CORE_FILES:
        # Some speak of the thread, not of vectors: that it waits, in which mode it computes, and
        # that what it wrote has arrived.
        names = ("pause", "stmxcsr", "ldmxcsr", "sfence")
        of_the_thread = {f"__builtin_ia32_{name}" for name in names}
        found = set(intrinsic.findall(code_of(path))) - of_the_thread
        assert path.name == "simd.h" or not found, path


def test_only_parallel_knows_about_threads():
    primitive = re.compile(
        r"std::(?:jthread|thread|mutex|condition_variable|future|async|atomic|\w+_semaphore)\b"
        r"|\bpthread_\w+|\bomp_\w+|#\s*pragma omp|\bthread_local\b"
    )
    allowed = {
        "parallel.h": None,
        "parallel.cc": None,
        "core_test.cc": None,  # calls the core from several threads
        "targets.cc": {"std::atomic"},  # the table in use, read by every call
        "buffer.cc": {"thread_local"},  # blocks kept per caller
        "amx-inl.h": {"thread_local"},  # registers that are emulated, for tests
    }
    assert primitive.search(code_of(CSRC / "parallel.cc"))
    for path in [*CORE_FILES, *(CSRC / "bind").iterdir()]:
        exempt = allowed.get(path.name, set())
        if exempt is not None:
            assert set(primitive.findall(code_of(path))) <= exempt, path


def test_tile_sizes_stand_in_the_tuning_file():
    for name in ("forward.cc", "forward.h", "backward.cc", "tiles.h"):
        numbers = {int(n) for n in re.findall(r"(?<![\w.])\d+\b", code_of(CSRC / name))}
        assert not {n for n in numbers if n >= 8}, name


def test_block_sizes_of_the_gpu_stand_in_the_tuning_file():
    allowed = {
        "kernels.py": {16, 0x7FFF, 0xFFFF0000},  # the bits of bfloat16
        "launch.py": {24, 31, 4096},  # the bits of an address; calls that are remembered
    }
    for name, others in allowed.items():
        constants = [n for n in ast.walk(syntax_tree(f"triton/{name}")) if type(n) is ast.Constant]
        numbers = {node.value for node in constants if type(node.value) is int}
        assert not {n for n in numbers if n >= 8} - others, name


def test_every_core_file_is_compiled():
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for path in [*CORE_FILES, *(CSRC / "bind").iterdir()]:
        if path.suffix == ".cc":
            assert f"csrc/{path.relative_to(CSRC).as_posix()}" in cmake


def test_python_and_native_agree_on_the_geometry():
    assert _native.geometry_fields() == Geometry._fields


def test_python_and_native_agree_on_the_activations():
    assert _native.activations() == ACTIVATIONS


def test_the_type_stub_names_what_the_extension_has():
    stub = ast.parse((PACKAGE / "_native.pyi").read_text(encoding="utf-8"))
    declared = {
        node.name: [a.arg for a in node.args.args]
        for node in stub.body
        if isinstance(node, ast.FunctionDef)
    }
    classes = {node.name for node in stub.body if isinstance(node, ast.ClassDef)}
    present = {name for name in dir(_native) if not name.startswith("__")}
    assert {*declared, *classes} == present
    for name, arguments in declared.items():
        signature = getattr(_native, name).__doc__.splitlines()[0]
        assert re.findall(r"(\w+): ", signature) == arguments, name


FRAMEWORKS = {"jax", "jaxlib", "keras", "torch", "tensorflow", "ml_dtypes"}


@pytest.mark.parametrize(
    ("modules", "permitted"),
    [
        ("sepconv", set()),
        ("sepconv, sepconv.numpy, sepconv.backends, sepconv.reference", set()),
        ("sepconv.jax", {"jax", "jaxlib", "ml_dtypes"}),
        ("sepconv.torch", {"torch"}),
    ],
)
def test_importing_a_door_imports_its_framework_and_no_other(modules, permitted):
    code = f"import {modules}, sys; print(*(m for m in sys.modules if '.' not in m))"
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    ).stdout
    loaded = set(output.split()) & (FRAMEWORKS | {"typer", "rich", "matplotlib", "skimage"})
    assert loaded <= permitted
