"""GPU kernels compiled without a GPU: what each takes of registers and shared memory.

    python gpu_code.py [--target 90] [row of the benchmark ...]

Calls run on tensors without memory, and launches are recorded instead of made. Prints one line for
each kernel of each call.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from sepconv.bench.rows import parse_row
from sepconv.spec import Geometry
from sepconv.triton import kernels
from sepconv.triton.recording import Launch, record

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
OPTIONS = ("num_warps", "num_stages")


class Code(NamedTuple):
    """What the compiler made of it."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    instructions: int


def compiled(made: Launch, capability: int) -> Code:
    """Compiles a launch for a device of this compute capability."""
    kernel = getattr(kernels, made.kernel)
    constants = {k: v for k, v in made.constants.items() if k not in OPTIONS}
    options = {k: v for k, v in made.constants.items() if k in OPTIONS}
    if constants.get("PRECISION") is not None:
        constants["PRECISION"] = "tf32"  # What torch's switch says of convolutions by itself.
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, made.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = f"*{DTYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name in constants:
        signature.setdefault(name, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _usage(result.asm["ptx"], result.metadata.shared, capability)


def _usage(ptx: str, shared: int, capability: int) -> Code:
    """What ptxas says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        ptxas = nvidia.get_ptxas(capability).path
        cubin = str(Path(folder) / "kernel.cubin")
        said = subprocess.run(
            [ptxas, "-v", f"--gpu-name={arch}", str(path), "-o", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        tools = Path(ptxas).parent
        sass = subprocess.run(
            [str(tools / "nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True
        ).stdout

    def most(pattern: str) -> int:
        return max((int(number) for number in re.findall(pattern, said)), default=0)

    return Code(
        registers=most(r"Used (\d+) registers"),
        shared_bytes=shared,
        stack_bytes=most(r"(\d+) bytes stack frame"),
        spill_bytes=most(r"(\d+) bytes spill stores"),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
    )


def geometry(row: str, batch: int, data_format: str, **arguments: str) -> Geometry:
    """Of a row of the benchmark, such as 19x19x728-728k3."""
    layer = parse_row(row)
    spec = replace(layer.spec(data_format), **arguments)
    between = layer.channels * layer.depth_multiplier
    image = (layer.height, layer.width)
    last = data_format == "channels_last"
    return spec.resolve(
        (batch, *image, layer.channels) if last else (batch, layer.channels, *image),
        (*layer.kernel, layer.channels, layer.depth_multiplier),
        (1, 1, between, layer.filters),
        (layer.filters,),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", type=int, default=90)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layout", default="channels_last")
    parser.add_argument("rows", nargs="*", default=["112x112x32-64"])
    arguments = parser.parse_args()
    for row in arguments.rows:
        g = geometry(row, arguments.batch, arguments.layout)
        for made in record(g, getattr(torch, arguments.dtype)):
            blocks = [v for k, v in made.constants.items() if k.startswith(("BLOCK", "TILE"))]
            warps = made.constants["num_warps"]
            code = compiled(made, arguments.target)
            print(row, made.kernel, "grid", made.grid, "blocks", blocks, "warps", warps, *code)


if __name__ == "__main__":
    main()
