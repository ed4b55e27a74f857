"""What the compiler makes of the GPU kernels, without a GPU: registers, stack, shared memory, tensor cores."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from inr_kernels._core import native

ARCHS = [80, 89, 90, 120]
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a block may have

# Bytes of stack that are known, by kernel and dtype. With mma.sync the fused kernels fill all 255 registers: the
# state of 256 channels, its successor and the accumulator are 160 of them. Some 40 words spill in each layer,
# against 512 tensor-core instructions.
STACK = {("decode", "bfloat16"): 160, ("backpropagate", "bfloat16"): 64}
MULTIPLIES = {"decode", "backpropagate", "add_products", "mix"}


@functools.cache
def compiled(arch):
    script = Path(__file__).with_name("_compile_triton.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, script, str(arch)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("arch", ARCHS)
def test_triton_kernels_fit(arch):
    print(f"\nsm_{arch}  kernel          dtype     ensemble  registers  stack  shared  warps")
    wrong = []
    for row in compiled(arch):
        kernel, dtype = row["kernel"], row["dtype"]
        print(
            f"        {kernel:14s}  {dtype:8s}  {row['ensemble']:8s}  {row['registers']:9d}"
            f"  {row['stack']:5d}  {row['shared']:6d}  {row['warps']:5d}"
        )
        allowed = STACK.get((kernel, dtype), 0) if arch != 90 else 0
        half = dtype in ("bfloat16", "tf32") and kernel in MULTIPLIES
        if row["stack"] > allowed or row["shared"] > SHARED[arch] or row["tensor_cores"] < half:
            wrong.append(row)
    assert {row["kernel"] for row in compiled(arch)} >= MULTIPLIES | {"spread", "add_segments"}
    assert not wrong


def test_native_cuda_kernels_fit():
    library = native.load()[0]
    if library is None or not library.cuda_archs:
        sources = list((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
        assert not (sources and shutil.which("nvcc")), "CUDA sources and nvcc, yet nothing was compiled for CUDA"
        return  # built without CUDA: there is none
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", library.__file__], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    assert found
    assert not [name for name, _, stack in found if int(stack)]
