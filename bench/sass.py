"""What a kernel's disassembly says: its instructions, those of its main loop, and the FLOPs of its tensor-core ones."""

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
    """The output of one of the CUDA tools that Triton brings, run in a folder."""
    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def flops(opcode):
    """What one warp's tensor-core instruction does; four warps share an HGMMA."""
    if not (match := SHAPE.match(opcode)):
        return 0
    m, n, k = (int(side) for side in match.groups() if side)
    return 2 * m * n * k // (4 if opcode.startswith("HGMMA") else 1)


def listing(text):
    """[(opcode, operands)] and {label: the instruction's place} of one function's disassembly."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if match := LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := INSTRUCTION.search(line):
            instructions.append((match[1], match[2]))
    return instructions, labels


def main_loop(instructions, labels):
    """(first, last + 1) of the longest piece that a branch repeats; (0, 0) without any."""
    loops = [(0, 0)]
    for place, (opcode, operands) in enumerate(instructions):
        if opcode.startswith("BRA") and (target := re.search(r"\((\.L_\w+)\)", operands)):
            begin = labels.get(target[1], place + 1)
            if begin < place:  # not a branch to itself, which pads the end
                loops.append((begin, place + 1))
    return max(loops, key=lambda loop: loop[1] - loop[0])


def count(text):
    """Per warp, if every instruction ran once: {"instructions", "mma_flops", "fp32", "mufu"}; and the main loop's,
    "loop_..."; fp32: additions, multiplications or both at once.
    """
    instructions, labels = listing(text)
    begin, end = main_loop(instructions, labels)
    found = {}
    for prefix, part in (("", instructions), ("loop_", instructions[begin:end])):
        found[f"{prefix}instructions"] = len(part)
        found[f"{prefix}mma_flops"] = sum(flops(opcode) for opcode, _ in part)
        found[f"{prefix}fp32"] = sum(opcode.split(".")[0] in FP32 for opcode, _ in part)
        found[f"{prefix}mufu"] = sum(opcode.startswith("MUFU") for opcode, _ in part)
    return found


def functions(library, arch):
    """(name, {"registers", "stack", "shared"}, disassembly) of every kernel that a library has for sm_{arch}."""
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "-xelf", "all", Path(library).resolve(), folder=folder)
        for cubin in sorted(Path(folder).glob(f"*sm_{arch}*.cubin")):
            usage = tool("cuobjdump", "--dump-resource-usage", cubin)
            code = dict(sections(tool("nvdisasm", "-c", cubin)))
            for name, registers, stack, shared in USAGE.findall(usage):
                found = {"registers": int(registers), "stack": int(stack), "shared": int(shared)}
                yield name, found, code[name]


def sections(text):
    """(function, its part) of a disassembly."""
    parts = re.split(r"^\s*\.section\s+\.text\.([\w$.]+),.*$", text, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)
