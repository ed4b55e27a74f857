"""`python -m bench.estimate` writes bench/ESTIMATES.md: what each GPU kernel has to do on its paper shape, what the
compiler made of it, and what both predict on chips whose rates stand in datasheets. Nothing in it is measured.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

from inr_kernels._core import native

from . import sass
from .launches import LAUNCHES
from .report import seconds

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "bench" / "ESTIMATES.md"
ABOUT = """# What the kernels should take

**Nothing here is measured.** `python -m bench.estimate` writes this page without a GPU, from three things: what a
kernel has to do on its paper shape, by formula (`launches.py`); what the compiler made of it, from the disassembly; the
chips' rates, from datasheets.

- *needed*: bytes that must move, every input and output once, and FLOPs of the matrix products.
- *instructions*: of all warps, on sm_90; those of the main loop times its trips, the others once.
- A chip's cell: the time **at best**, the longest of five, as if each hid behind the others: the bytes at the memory's
  rate (m), the issued tensor-core instructions at theirs (t), all instructions at one a cycle and scheduler (i),
  additions and multiplications at the float32 rate (f), exponentials, logarithms and reciprocals at 16 a cycle and
  multiprocessor (e). *floor*: what the needed bytes or FLOPs take at the chip's rates, over that: no launch
  can pass it. *issued*: the FLOPs of the tensor-core instructions over those needed: above 100 % they multiply padding,
  masked pixels, or the same numbers in several warps. *warps*: what registers and shared memory let a multiprocessor
  hold. Left out are the rates of shared memory and of the L2 cache, which may hold small maps, and that few warps hide
  less.

The wgmma kernel of `local_implicit`, whose loops nest, is counted by hand: for a block's 128 rows 12,288 cycles of
products (at 4096 FLOP a cycle and multiprocessor) against 197 KB from the L2 cache (16 B a cycle and multiprocessor,
by clusters of two), 1.2 MB through shared memory (96 of 128 B a cycle) and 2,500 instructions a warp (40 % of what the
schedulers issue). An H200's rate is wgmma's; mma.sync reaches some 60 % of it by published microbenchmarks, which the
table does not know.

Rates, dense: """


@dataclass(frozen=True)
class Chip:
    """A GPU by its datasheet: clock at boost; FLOP/s of a product by the type of its inputs; bytes/s; and what a
    multiprocessor has: shared memory, and room for warps and blocks.
    """

    name: str
    arch: int
    multiprocessors: int
    clock: float
    flops: dict
    bandwidth: float
    shared: int
    warps: int
    blocks: int

    def occupancy(self, registers, shared, warps):
        """Warps that a multiprocessor holds of blocks of `warps`; registers come in units of 256 a warp."""
        by_registers = (1 << 16) // (-(-registers * 32 // 256) * 256) // warps
        by_shared = self.shared // (shared + 1024)  # a block's own kilobyte
        return warps * min(by_registers, by_shared, self.warps // warps, self.blocks)

    def seconds(self, launch, row):
        """{letter: time} of a launch."""
        cycles = self.multiprocessors * self.clock
        return {
            "m": launch.bytes / self.bandwidth,
            "t": issued(launch, row, "mma_flops") / self.flops[launch.unit],
            "i": issued(launch, row, "instructions") / (4 * cycles),
            "f": issued(launch, row, "fp32") * 64 / self.flops["fp32"],
            "e": issued(launch, row, "mufu") * 32 / (16 * cycles),
        }

    def floor(self, launch):
        """The time of what is needed."""
        return max(launch.bytes / self.bandwidth, launch.flops / self.flops[launch.unit])


def _rates(bf16, tf32, fp32):
    return {"bf16": bf16 * 1e12, "tf32": tf32 * 1e12, "fp32": fp32 * 1e12}


CHIPS = [
    Chip("A100", 80, 108, 1.41e9, _rates(312, 156, 19.5), 2.039e12, 164 << 10, 64, 32),
    Chip("L4", 89, 58, 2.04e9, _rates(121, 60.5, 30.3), 0.3e12, 100 << 10, 48, 24),
    Chip("RTX 4090", 89, 128, 2.52e9, _rates(165.2, 82.6, 82.6), 1.008e12, 100 << 10, 48, 24),
    Chip("H200", 90, 132, 1.98e9, _rates(989, 494, 67), 4.8e12, 228 << 10, 64, 32),
]


def issued(launch, row, key):
    """How often all warps of a launch do what `row` counts: the main loop's share as often as it runs."""
    warp = row[key] + row[f"loop_{key}"] * (launch.trips - 1 if row["loop_instructions"] else 0)
    return launch.programs * row["warps"] * warp


def triton_rows(arch, op):
    """What the compiler made of the op's Triton kernels: compile_triton.py's report, with `sass.count`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "tests/support/compile_triton.py", str(arch), op, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        for row in map(json.loads, done.stdout.splitlines()):
            text = sass.tool("nvdisasm", row.pop("cubin"), "-c")
            yield row | sass.count(text) | {"op": op}


def native_rows(arch):
    """The same of the CUDA kernels in `inr_kernels._C`, by their mangled names; nothing without CUDA. Threads and
    dynamic shared memory are the launches' to say.
    """
    library = native.load()[0]
    for name, usage, text in sass.functions(library.__file__, arch) if library and library.cuda_archs else ():
        yield {"kernel": name, "arch": arch} | usage | sass.count(text)


def found(launch, rows):
    """The launch's row: the `nth` of its op, kernel, mode and dtype, or of the CUDA kernel whose name has `native`."""
    if launch.native:
        some = [row | launch.native for row in rows if launch.kernel in row["kernel"] and "op" not in row]
    else:
        wanted = launch.op, launch.kernel, launch.mode, launch.dtype
        some = [row for row in rows if (row.get("op"), row["kernel"], row.get("mode"), row.get("dtype")) == wanted]
    return some[launch.nth] if len(some) > launch.nth else None


def amount(value, unit):
    """1.23 GFLOP, 45.6 MB."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}" if value else ""


def cell(chip, launch, row):
    """What a launch's row predicts on a chip."""
    times, tensor = chip.seconds(launch, row), issued(launch, row, "mma_flops")
    bound = max(times, key=times.get)
    parts = [f"**{seconds(times[bound])}** {bound}", f"floor {chip.floor(launch) / times[bound]:.0%}"]
    parts += [f"issued {tensor / launch.flops:.0%}"] if tensor else []
    warps = chip.occupancy(row["registers"], row["shared"], row["warps"])
    if not warps:
        return "does not fit"
    return ", ".join([*parts, f"{warps}/{chip.warps} warps"])


def line(launch, rows):
    """The table's line of a launch; None where nothing was compiled for it."""
    by_chip = [(chip, found(launch, [row for row in rows if row["arch"] == chip.arch])) for chip in CHIPS]
    if not by_chip[-1][1]:
        return None
    return [
        f"`{launch.name}`",
        launch.case,
        f"{amount(launch.bytes, 'B')}, {amount(launch.flops, 'FLOP')}".strip(", "),
        amount(issued(launch, by_chip[-1][1], "instructions"), ""),
        *(cell(chip, launch, row) if row else "" for chip, row in by_chip),
    ]


HEADER = ["kernel", "launch", "needed", "instructions", *(chip.name for chip in CHIPS)]


def page(rows):
    """The Markdown of all launches."""
    rates = [
        f"{chip.name} {chip.flops['bf16'] / 1e12:g} TFLOP/s bf16, {chip.flops['tf32'] / 1e12:g} tf32,"
        f" {chip.flops['fp32'] / 1e12:g} fp32, {chip.bandwidth / 1e9:g} GB/s, {chip.multiprocessors} multiprocessors at"
        f" {chip.clock / 1e9:g} GHz"
        for chip in CHIPS
    ]
    compiler = f"Compiled by Triton {triton.__version__}."
    parts = [ABOUT + ";\n".join(rates) + ".", compiler]
    for op in dict.fromkeys(launch.op for launch in LAUNCHES):
        table = [HEADER, ["---"] * len(HEADER)]
        table += filter(None, [line(launch, rows) for launch in LAUNCHES if launch.op == op])
        parts.append(f"## {op}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in table))
    return "\n\n".join(parts) + "\n"


def main():
    """Compiles every kernel for every chip's architecture and writes the page."""
    rows = []
    for arch in sorted({chip.arch for chip in CHIPS}):
        for op in dict.fromkeys(launch.op for launch in LAUNCHES):
            rows += triton_rows(arch, op)
        rows += native_rows(arch)
    partial = PAGE.with_suffix(".partial")
    partial.write_text(page(rows))
    os.replace(partial, PAGE)
    print(f"{PAGE.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
