"""The GPU kernels: in Triton's interpreter, compiled for GPUs that are not there, and on one."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sepconv
from sepconv import machine

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

HERE = Path(__file__).parent
# First layers of networks, filters that just fit a block, wide ones, and a larger kernel.
ROWS = ("112x112x32-64", "56x56x128-128", "19x19x728-728", "14x14x240-80k5")


def run_file(name: str, **environment: str) -> str:
    """Runs a test file in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    finished = subprocess.run(
        [*command, str(HERE / name)],
        env={
            **os.environ,
            # Wherever this process has the package from.
            "PYTHONPATH": str(Path(sepconv.__file__).parent.parent),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-20_000:] + finished.stderr[-2_000:]
    return finished.stdout


def test_kernels_agree_with_the_reference_in_the_interpreter():
    print(run_file("triton_contract.py", TRITON_INTERPRET="1").splitlines()[-1])


def test_the_torch_door_takes_them_in_the_interpreter():
    run_file("gpu_door_contract.py", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_kernels_agree_with_the_reference_on_a_gpu():
    # The time goes into compilation.
    parts = max(1, min(12, machine.usable_cpus()))

    def run(part: int) -> None:
        run_file("triton_contract.py", SEPCONV_SHARD=f"{part}/{parts}", TRITON_INTERPRET="0")

    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(run, range(parts)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_torch_door_on_a_gpu():
    run_file("torch_gpu_contract.py")


# ------------------------------------------------------------------------------ compiled, not run

# Bytes of shared memory that a program may use.
# Those of 8.0 are what `use_gpu_kernels` asks for.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
MOST_REGISTERS = 255
# Of each thread. Blocks are tuned for sm_90; one kernel is over by some registers on sm_80.
MOST_SPILLED_BYTES = {80: 128, 90: 0}


def variants() -> list[tuple[str, str, int, str, dict[str, str]]]:
    """(row, dtype, batch, layout, arguments of the spec) of what is compiled."""
    last, first = "channels_last", "channels_first"
    return [
        (ROWS[0], "bfloat16", 32, last, {}),
        (ROWS[1], "bfloat16", 32, last, {"activation": "relu"}),
        (ROWS[2], "bfloat16", 32, last, {}),
        (ROWS[3], "bfloat16", 32, last, {"activation": "silu"}),
        ("512x512x64-128", "float32", 16, first, {}),
        (ROWS[1], "float32", 32, last, {}),
        # Addresses of 64 bits.
        ("1024x1024x32-32", "bfloat16", 65, last, {}),
    ]


def compiled_names(argument: tuple[int, tuple[str, str, int, str, dict[str, str]]]) -> list[str]:
    """Compiles all kernels of a variant; one line for each."""
    import gpu_code

    capability, (row, dtype, batch, layout, options) = argument
    g = gpu_code.geometry(row, batch, layout, **options)
    lines, seen = [], []
    for made in gpu_code.record(g, getattr(torch, dtype)):
        if (made.kernel, made.constants) in seen:
            continue
        seen.append((made.kernel, made.constants))
        code = gpu_code.compiled(made, capability)
        lines.append(f"{row} {dtype} {layout} sm_{capability} {made.kernel}: {code}")
        assert code.shared_bytes <= SHARED_BYTES[capability], lines[-1]
        assert 0 < code.registers <= MOST_REGISTERS, lines[-1]
        assert code.spill_bytes <= MOST_SPILLED_BYTES[capability], lines[-1]
    assert lines
    return lines


@pytest.mark.parametrize("variant", variants(), ids=lambda v: "-".join((*v[:2], v[3])))
def test_main_variants_fit_the_gpu(variant):
    # All for the newer one; for the other one those whose tiles are largest.
    for capability in (90, 80) if variant[:2] == (ROWS[1], "bfloat16") else (90,):
        print(*compiled_names((capability, variant)), sep="\n")
