"""Resources of the compiled GPU kernels, without a GPU: registers, stack, shared memory, tensor-core instructions."""

import fcntl
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
from compile_triton import OLDEST, TRITON_OPS, kernels

from inr_kernels._core import native

ROOT = Path(__file__).parents[2]
ARCHS = [80, 89, 90, 120]
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # maximum bytes of a block
# The rows of kernels that were compiled before; `pytest --record-compiled` writes them.
RECORD = Path(__file__).with_name("compiled_kernels.jsonl")
KERNELS = {op: set(kernels(op)) for op in TRITON_OPS}


def allowed_stack(version, row):
    """Bytes of stack, that is spilled registers, that are known and accepted."""
    kernel, arch = row["kernel"], row["arch"]
    if kernel in ("decode", "backpropagate") and row["dtype"] == "bfloat16" and arch != 90:
        # With mma.sync the fused kernels fill all 255 registers: the state of 256 channels, its successor and the
        # accumulator are 160 of them. Some 40 words spill in each layer, against 512 tensor-core instructions.
        return {"decode": 160, "backpropagate": 64}[kernel]
    if (version, arch, kernel, row["mode"]) == (OLDEST, 90, "decode", "last"):
        # In training, where it also stores the states, with chunks of 128 channels. The pinned Triton's code needs 229
        # registers, and so does not spill.
        return 208 if row["dtype"] == "bfloat16" else 0
    if (version, arch, kernel, row["mode"]) == (OLDEST, 120, "image_gradient", "CARAFE"):
        # ptxas stops at 168 registers, so that three blocks fit a multiprocessor, and spills six words in a loop of
        # 570 instructions, in both dtypes. The pinned Triton's code needs 106 registers.
        return 24
    if (arch, kernel, row["mode"]) == (90, "filter_pixels", "RAFT"):
        # ptxas stops at 128 registers, so that four blocks fit a multiprocessor, and spills two words in bfloat16.
        return 8
    return 0


def compiled(arch, folder, known):
    """The rows of `compile_triton.py` for all ops, with the installed Triton or the one in `folder`.

    known: rows by key, of kernels that are not compiled again.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(folder), os.environ.get("PYTHONPATH", "")] if folder else [os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, ROOT / "tests/support/compile_triton.py", str(arch), "all", "--known", "/dev/stdin"]
    run = subprocess.run(command, env=environment, input="\n".join(known), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-5000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return [known.get(row["key"], row) for row in rows]


def recorded(version, arch):
    """The recorded rows of a version of Triton and an architecture, by key."""
    rows = map(json.loads, RECORD.read_text().splitlines() if RECORD.exists() else ())
    return {row["key"]: row for row in rows if (row["triton"], row["arch"]) == (version, arch)}


def record(rows):
    """Replaces the recorded rows of the version and the architecture of `rows`."""
    same = {(row["triton"], row["arch"]) for row in rows}
    with open(RECORD, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        others = [row for row in map(json.loads, file) if (row["triton"], row["arch"]) not in same]
        file.truncate(0)
        order = ("triton", "arch", "op", "kernel", "dtype", "mode", "key")
        for row in sorted(others + rows, key=lambda row: [row[name] for name in order]):
            file.write(json.dumps(row) + "\n")


# With the oldest Triton for sm_90 and sm_120 only, where it failed or used a stack: each of these takes minutes.
VERSIONS = [(OLDEST, arch) for arch in ARCHS if arch >= 90] + [("installed", arch) for arch in ARCHS]


# What the kernels depend on, and how they are compiled.
FILES = [f"inr_kernels/{op}/**/*.py" for op in TRITON_OPS] + [f"tests/support/{op}_cases.py" for op in TRITON_OPS]
FILES += ["inr_kernels/_core/backends.py", "tests/support/compile_triton.py", "tests/build/test_compile_only.py"]
FILES += ["tests/build/compiled_kernels.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize(("version", "arch"), VERSIONS)
def test_triton_kernels_fit(version, arch, request, if_changed):
    if request.config.getoption("record_compiled"):
        return check_triton_kernels(version, arch, request)
    run = lambda _: check_triton_kernels(version, arch, request)  # noqa: E731
    if_changed(run, {"kernels": FILES}, OLDEST if version == OLDEST else triton.__version__)


def check_triton_kernels(version, arch, request):
    folder = request.getfixturevalue("oldest_triton") if version == OLDEST else None
    print(f"\nsm_{arch}  kernel                 dtype     mode    registers  stack  shared  warps")
    full = OLDEST if version == OLDEST else triton.__version__
    known = {} if request.config.getoption("record_compiled") else recorded(full, arch)
    rows, wrong = compiled(arch, folder, known), []
    for row in rows:
        kernel, dtype = row["kernel"], row["dtype"]
        print(
            f"        {kernel:21s}  {dtype:8s}  {row['mode']:6s}  {row['registers']:9d}"
            f"  {row['stack']:5d}  {row['shared']:6d}  {row['warps']:5d}"
        )
        fits = row["stack"] <= allowed_stack(version, row) and row["shared"] <= SHARED[arch]
        multiplies = dtype == "bfloat16" and kernels(row["op"])[kernel]
        if not fits or row["tensor_cores"] < multiplies:
            wrong.append(row)
    assert {row["triton"] for row in rows} == {full}
    assert {op: {row["kernel"] for row in rows if row["op"] == op} for op in TRITON_OPS} == KERNELS
    assert not wrong
    if request.config.getoption("record_compiled"):
        record(rows)
    stale = known.keys() - {row["key"] for row in rows}
    assert not stale, f"{RECORD.name} is out of date: pytest --record-compiled {Path(__file__).relative_to(ROOT)}"


def cuda_tool(*arguments):
    """The output of cuobjdump, which comes with Triton, for the native library."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, *arguments, native.load()[0].__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions():
    """{(arch, kernel): the count of each instruction in its machine code}"""
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


def min_products(kernel):
    """The least m16n8k16 products of a kernel.

    Of local_implicit's warps with their tiles of 16 rows: of one hidden layer, the body of a loop, and of 8 outputs. Of
    neighborhood_attention's: the body of the loop over rows of 16 keys or queries, of which the forward takes two.
    """
    if found := re.search(r"(attend|query_backward|key_value_backward)IL\w+?ELi(32|64|128)E", kernel):
        return int(found[2]) // 8 * {"attend": 4, "query_backward": 3, "key_value_backward": 4}[found[1]]
    found = re.search(r"decodeIL\w+?ELi(128|256)ELb[01]ELi([12])E", kernel)
    width, tiles = map(int, found.groups()) if found else (0, 0)
    return tiles * ((width // 16) * (width // 8) + width // 16)


def backward_filter_fits(kernel, registers, count):
    """Of elementwise_filter's backward: two blocks of 256 threads fit a multiprocessor for 3 x 3 taps, and its variant
    for aligned rows has at most 2048 instructions (32 KB)."""
    found = re.search(r"gradientsIL\w+?ELi3ELb([01])E", kernel)
    return not found or (registers <= 128 and (found[1] == "0" or count <= 2048))


def test_native_cuda_kernels_fit():
    library = native.load()[0]
    if library is None or not library.cuda_archs:
        sources = list((ROOT / "csrc" / "cuda").glob("*.cu"))
        assert not (sources and shutil.which("nvcc")), "CUDA sources and nvcc, yet nothing was compiled for CUDA"
        return  # built without CUDA
    archs, counts = set(library.cuda_archs.split(",")), instructions()
    products = {kernel: count["HMMA.16816"] for kernel, count in counts.items()}
    # The sources for Hopper alone are compiled for sm_90a, whichever other architectures were requested, or not at all.
    assert {arch for arch, kernel in products if "_sm90_" not in kernel} == archs
    usage, wrong, arch = cuda_tool("--dump-resource-usage"), [], ""
    for line in re.findall(r"arch = sm_(\d+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        if line[0]:
            arch = line[0]
            continue
        kernel, registers, stack, shared = line[1], *map(int, line[2:])
        short = re.sub(r"^_ZN3inr4cuda\d+_GLOBAL__N__\w*?_cu_[0-9a-f]{8}\d*", "", kernel)
        print(
            f"sm_{arch:3s}  {short:50s}  {registers:3d} registers  {products[arch, kernel]:4d} products of"
            f" {counts[arch, kernel].total():5d} instructions"
        )
        count = counts[arch, kernel].total()
        is_wrong = stack or shared > 48 << 10 or products[arch, kernel] < min_products(kernel)
        if is_wrong or not backward_filter_fits(kernel, registers, count):
            wrong.append((arch, kernel, registers, stack, shared))
    assert Counter(arch for arch, kernel in products if min_products(kernel)) == dict.fromkeys(archs, 10 + 6 + 8)
    assert Counter(arch for arch, kernel in products if "gradientsIL" in kernel) == dict.fromkeys(archs, 15)
    assert not wrong
    # A hidden layer of 64 rows is 16 products of [64, 16] x [16, 256], in four groups with one wait each: if ptxas had
    # serialized them, there would be as many waits as products.
    wgmma = [count for count in counts.values() if count["HGMMA.64x256x16"]]
    assert len(wgmma) == 4 or (not wgmma and "90" not in archs)
    for count in wgmma:
        assert count["HGMMA.64x256x16"] == 16
        assert count["WARPGROUP.ARRIVE"] == count["WARPGROUP.DEPBAR"] == 4
