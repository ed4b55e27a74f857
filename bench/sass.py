"""Reads the disassembly of kernels: instructions, those of the main loop, and FLOPs of tensor-core instructions."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
LABEL = re.compile(r"^\s*(\.L_\w+):")
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
FP32 = ("FFMA", "FADD", "FMUL")
SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(16|8|4)")


def tool(name, *arguments, folder=None):
    """Runs one of the CUDA tools that Triton includes, in a folder; returns its output."""
    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def flops(opcode):
    """Returns the FLOPs of an instruction on the tensor cores per warp; four warps share an HGMMA. 0 for others."""
    if not (match := SHAPE.match(opcode)):
        return 0
    m, n, k = (int(side) for side in match.groups() if side)
    return 2 * m * n * k // (4 if opcode.startswith("HGMMA") else 1)


def listing(text):
    """Returns [(opcode, operands)] and {label: index of its instruction} of the disassembly of one function."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if match := LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := INSTRUCTION.search(line):
            instructions.append((match[1], match[2]))
    return instructions, labels


def loops(instructions, labels):
    """Returns the ranges (begin, end) that backward branches repeat, and (0, 0)."""
    found = [(0, 0)]
    for place, (opcode, operands) in enumerate(instructions):
        if opcode.startswith("BRA") and (target := re.search(r"\((\.L_\w+)\)", operands)):
            begin = labels.get(target[1], place + 1)
            if begin < place:  # not a branch to itself, which pads the end
                found.append((begin, place + 1))
    return found


def main_loop(instructions, labels):
    """Returns (begin, end) of the longest loop; (0, 0) without any."""
    return max(loops(instructions, labels), key=lambda loop: loop[1] - loop[0])


def inner_loop(instructions, labels):
    """Returns (begin, end) of the shortest of the loops with the most products on tensor cores; (0, 0) without any."""

    def products(loop):
        return sum(flops(opcode) for opcode, _ in instructions[slice(*loop)])

    return max(loops(instructions, labels), key=lambda loop: (products(loop), loop[0] - loop[1]))


def count(text):
    """Counts one warp that runs every instruction once: {"instructions", "mma_flops", "fp32", "mufu"}, and "loop_..."
    of the main loop, "inner_..." of the inner loop. fp32: additions, multiplications and fused multiply-adds; mufu:
    exponentials and the like.
    """
    instructions, labels = listing(text)
    parts = {"": instructions}
    parts |= {"loop_": instructions[slice(*main_loop(instructions, labels))]}
    parts |= {"inner_": instructions[slice(*inner_loop(instructions, labels))]}
    found = {}
    for prefix, part in parts.items():
        found[f"{prefix}instructions"] = len(part)
        found[f"{prefix}mma_flops"] = sum(flops(opcode) for opcode, _ in part)
        found[f"{prefix}fp32"] = sum(opcode.split(".")[0] in FP32 for opcode, _ in part)
        found[f"{prefix}mufu"] = sum(opcode.startswith("MUFU") for opcode, _ in part)
    return found


def functions(library, arch):
    """Yields (name, {"registers", "stack", "shared"}, disassembly) of every kernel of a library for sm_{arch}."""
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "-xelf", "all", Path(library).resolve(), folder=folder)
        for cubin in sorted(Path(folder).glob(f"*sm_{arch}*.cubin")):
            usage = tool("cuobjdump", "--dump-resource-usage", cubin)
            code = dict(sections(tool("nvdisasm", "-c", cubin)))
            for name, registers, stack, shared in USAGE.findall(usage):
                found = {"registers": int(registers), "stack": int(stack), "shared": int(shared)}
                yield name, found, code[name]


def sections(text):
    """Splits a disassembly into (function, its text)."""
    parts = re.split(r"^\s*\.section\s+\.text\.([\w$.]+),.*$", text, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)
