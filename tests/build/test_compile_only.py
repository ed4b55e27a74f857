"""What the compiler makes of the GPU kernels, without a GPU: registers, stack, shared memory, tensor cores."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
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
MULTIPLIES = {"decode", "backpropagate", "add_products", "attend", "meet", "differentiate", "gather", "mix"}
KERNELS = {
    "local_implicit": {"decode", "backpropagate", "add_products", "spread", "add_segments"},
    "elementwise_filter": {"filter_pixels", "logsumexp", "kernel_gradient", "image_gradient"},
    "unmask_attention": {"attend", "meet"},
    "neighborhood_attention": {"attend", "differentiate", "gather", "sum_bias"},
    "fourier_unit": {"mix"},
}


def compiled(arch, op):
    script = Path(__file__).parents[1] / "support/compile_triton.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, script, str(arch), op]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", KERNELS)
def test_triton_kernels_fit(op, arch):
    print(f"\nsm_{arch}  kernel          dtype     mode    registers  stack  shared  warps")
    rows, wrong = compiled(arch, op), []
    for row in rows:
        kernel, dtype = row["kernel"], row["dtype"]
        print(
            f"        {kernel:15s}  {dtype:8s}  {row['mode']:6s}  {row['registers']:9d}"
            f"  {row['stack']:5d}  {row['shared']:6d}  {row['warps']:5d}"
        )
        allowed = STACK.get((kernel, dtype), 0) if arch != 90 else 0
        half = dtype in ("bfloat16", "tf32") and kernel in MULTIPLIES
        if row["stack"] > allowed or row["shared"] > SHARED[arch] or row["tensor_cores"] < half:
            wrong.append(row)
    assert {row["kernel"] for row in rows} >= KERNELS[op]
    assert not wrong


def cuda_tool(*arguments):
    """What cuobjdump, which comes with Triton, says of the native library."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, *arguments, native.load()[0].__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions():
    """{(arch, kernel): how often each instruction stands in its machine code}"""
    counts, kernel = {}, ()
    for line in cuda_tool("--dump-sass").splitlines():
        if found := re.match(r"\s*code for sm_(\d+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            kernel = arch, found[1]
            counts[kernel] = Counter()
        elif found := re.match(
            r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_]*(?:\.64x256x16|\.16816|\.ARRIVE|\.DEPBAR)?)", line
        ):
            counts[kernel][found[1]] += 1
    return counts


def needed(kernel):
    """m16n8k16 products for a warp's tiles of 16 rows: a hidden layer's, whose code is a loop's body, and 8 outputs."""
    found = re.search(r"decodeIL\w+?ELi(128|256)ELb[01]ELi([12])E", kernel)
    width, tiles = map(int, found.groups()) if found else (0, 0)
    return tiles * ((width // 16) * (width // 8) + width // 16)


def test_native_cuda_kernels_fit():
    library = native.load()[0]
    if library is None or not library.cuda_archs:
        sources = list((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
        assert not (sources and shutil.which("nvcc")), "CUDA sources and nvcc, yet nothing was compiled for CUDA"
        return  # built without CUDA: there is none
    counts = instructions()
    products = {kernel: count["HMMA.16816"] for kernel, count in counts.items()}
    assert {arch for arch, _ in products} == set(library.cuda_archs.split(","))
    usage, wrong, arch = cuda_tool("--dump-resource-usage"), [], ""
    for line in re.findall(r"arch = sm_(\d+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        if line[0]:
            arch = line[0]
            continue
        kernel, registers, stack, shared = line[1], *map(int, line[2:])
        short = re.sub(r"^_ZN3inr4cuda\d+_GLOBAL__N__\w*?_cu_[0-9a-f]{8}\d*", "", kernel)
        print(f"sm_{arch:3s}  {short:50s}  {registers:3d} registers  {products[arch, kernel]:4d} products")
        if stack or shared > 48 << 10 or products[arch, kernel] < needed(kernel):
            wrong.append((arch, kernel, registers, stack, shared))
    assert Counter(arch for arch, kernel in products if needed(kernel)) == dict.fromkeys(
        library.cuda_archs.split(","), 10
    )
    assert not wrong
    # A hidden layer of 64 rows is 16 products of [64, 16] x [16, 256], in four groups that are each waited for: were
    # they serialized, there would be as many waits as products.
    wgmma = [count for count in counts.values() if count["HGMMA.64x256x16"]]
    assert len(wgmma) == 4
    for count in wgmma:
        assert count["HGMMA.64x256x16"] == 16
        assert count["WARPGROUP.ARRIVE"] == count["WARPGROUP.DEPBAR"] == 4
