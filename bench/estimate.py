"""`python -m bench.estimate` writes bench/ESTIMATES.md: lower bounds of the run times of the GPU kernels.

They follow from the work of each launch, its machine code, and the rates in the chips' datasheets. Nothing is measured.
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

from . import op_modules, sass
from .launches import launches
from .report import markdown, seconds

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "bench" / "ESTIMATES.md"
ABOUT = """# Estimated run times of the GPU kernels

**Nothing here is measured, and no kernel has run on a GPU yet.** `python -m bench.estimate` computes this page without
a GPU, from three sources: the work of each launch on the shape of the paper, by formula (`launches` in
`bench_<op>.py`); the machine code that the compiler generated, from its disassembly; the rates in the datasheets.

Columns:

- *needed*: the bytes to move, every input and output once, and the FLOPs of the matrix products.
- *instructions*: of all warps, on sm_90; those of the main loop are multiplied by its trips, the others count once.
- One column per chip. The time is a lower bound: the longest of five, as if they overlapped completely. A letter names
  the longest:
  - m: the needed bytes at the memory bandwidth;
  - t: the issued tensor-core instructions at their rate;
  - i: all instructions, at one per cycle and scheduler;
  - f: additions and multiplications at the float32 rate;
  - e: exponentials, logarithms and reciprocals, at 16 per cycle and multiprocessor.
- *floor*: the time of the needed bytes or FLOPs at the chip's rates, divided by the time above. No implementation can
  exceed 100 %.
- *issued*: the FLOPs of the tensor-core instructions divided by the needed ones. Above 100 %, the kernel multiplies
  padding or masked pixels, or the same numbers in several warps.
- *warps*: how many a multiprocessor holds with these registers and this shared memory, of how many at most.

Not modelled: the rates of shared memory and of the L2 cache, which can hold small maps, and that few warps hide less
latency.

The wgmma kernel of `local_implicit` has nested loops and is counted by hand. For the 128 rows of a block: 12,288 cycles
of products (at 4096 FLOP per cycle and multiprocessor) against 197 KB from the L2 cache (16 B per cycle and
multiprocessor, in clusters of two), 1.2 MB through shared memory (96 of 128 B per cycle) and 2,500 instructions per
warp (40 % of what the schedulers issue). The H200's rate is that of wgmma; mma.sync reaches about 60 % of it in
published microbenchmarks, which the table does not take into account.

Rates, dense: """

# Sums of this page's rows, of the revision before a change of the kernels and of the one after it.
CHANGES = """## What changes of the kernels did

By the same estimate, with Triton 3.7.1; the sums of all launches of a backward.

| what | kernels | bytes | instructions | A100 | L4 | RTX 4090 | H200 |
| --- | --- | --- | --- | --- | --- | --- | --- |
| `elementwise_filter`, float32 | before: four, and a product in PyTorch that is not counted | 3.76 GB | 1.6 G | 2.77 ms | 12.5 ms | 3.72 ms | 1.53 ms |
|  | after: `gradients` | 1.41 GB | 202 M | 0.691 ms | 4.7 ms | 1.4 ms | 0.294 ms |
| `elementwise_filter`, bfloat16 | before: the same, and a cast of 906 MB that is not counted | 2.42 GB | 1.66 G | 2.71 ms | 8.05 ms | 2.4 ms | 1.59 ms |
|  | after: `gradients` | 705 MB | 223 M | 0.357 ms | 2.35 ms | 0.699 ms | 0.213 ms |
| `neighborhood_attention`'s queries and bias | before: `query_backward`, `bias_backward` | 312 MB | 4.54 G | 7.28 ms | 9.34 ms | 3.42 ms | 4.35 ms |
|  | after: `query_backward`, and the sum of its shares in PyTorch that is not counted | 185 MB | 511 M | 0.82 ms | 1.06 ms | 0.387 ms | 0.489 ms |
|  | today, when the same kernel also attends in three dimensions | 185 MB | 664 M | 1.06 ms | 1.37 ms | 0.503 ms | 0.635 ms |
| `neighborhood_attention`'s forward, bfloat16 | Triton: `attend` | 136 MB | 333 M | 0.539 ms | 0.694 ms | 0.255 ms | 0.319 ms |
|  | CUDA C++: `attend, mma.sync` | 136 MB | 88.7 M | 0.146 ms | 0.454 ms | 0.135 ms | 84.8 µs |
| its backward with the bias | Triton: `query_backward`, `key_value_backward` | 391 MB | 1.04 G | 1.67 ms | 2.16 ms | 0.792 ms | 0.994 ms |
|  | CUDA C++: the same, mma.sync | 386 MB | 307 M | 0.51 ms | 1.28 ms | 0.382 ms | 0.294 ms |
| `elementwise_filter`'s forward, float32 | Triton: `filter_pixels` | 738 MB | 331 M | 0.544 ms | 2.46 ms | 0.732 ms | 0.317 ms |
|  | CUDA C++: `filter_3x3` | 738 MB | 223 M | 0.362 ms | 2.46 ms | 0.732 ms | 0.214 ms |
| `elementwise_filter`'s forward, bfloat16 | Triton: `filter_pixels` | 369 MB | 344 M | 0.565 ms | 1.23 ms | 0.366 ms | 0.329 ms |
|  | CUDA C++: `filter_3x3` | 369 MB | 239 M | 0.387 ms | 1.23 ms | 0.366 ms | 0.229 ms |
| `elementwise_filter`'s backward, float32 | Triton: `gradients` | 1.41 GB | 202 M | 0.691 ms | 4.7 ms | 1.4 ms | 0.294 ms |
|  | CUDA C++: the same | 1.41 GB | 250 M | 0.691 ms | 4.7 ms | 1.4 ms | 0.294 ms |
| `elementwise_filter`'s backward, bfloat16 | Triton: `gradients` | 705 MB | 223 M | 0.357 ms | 2.35 ms | 0.699 ms | 0.213 ms |
|  | CUDA C++: the same | 705 MB | 265 M | 0.42 ms | 2.35 ms | 0.699 ms | 0.253 ms |
"""  # noqa: E501


@dataclass(frozen=True)
class Chip:
    """A GPU by its datasheet.

    Args:
        name: the product.
        arch: compute capability, 90 for 9.0.
        multiprocessors: their number.
        clock: boost clock in Hz.
        flops: dense FLOP/s of matrix products by the type of their inputs.
        bandwidth: of the memory, bytes/s.
        shared: bytes of shared memory of a multiprocessor.
        warps, blocks: the most that a multiprocessor holds.
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
        """Returns the warps that a multiprocessor holds, of blocks of `warps`."""
        # Registers are allocated in units of 256 per warp.
        by_registers = (1 << 16) // (-(-registers * 32 // 256) * 256) // warps
        by_shared = self.shared // (shared + 1024)  # the system reserves 1 KB per block
        return warps * min(by_registers, by_shared, self.warps // warps, self.blocks)

    def seconds(self, launch, row):
        """Returns {letter: seconds} of a launch, the five bounds of the page."""
        cycles = self.multiprocessors * self.clock
        return {
            "m": launch.bytes / self.bandwidth,
            "t": issued(launch, row, "mma_flops") / self.flops[launch.unit],
            "i": issued(launch, row, "instructions") / (4 * cycles),
            "f": issued(launch, row, "fp32") * 64 / self.flops["fp32"],
            "e": issued(launch, row, "mufu") * 32 / (16 * cycles),
        }

    def floor(self, launch):
        """Returns the seconds of the necessary bytes or FLOPs."""
        return max(launch.bytes / self.bandwidth, launch.flops / self.flops[launch.unit])


def _rates(bf16, tf32, fp32):
    return {"bf16": bf16 * 1e12, "tf32": tf32 * 1e12, "fp32": fp32 * 1e12}


CHIPS = [
    Chip(
        name="A100",
        arch=80,
        multiprocessors=108,
        clock=1.41e9,
        flops=_rates(bf16=312, tf32=156, fp32=19.5),
        bandwidth=2.039e12,
        shared=164 << 10,
        warps=64,
        blocks=32,
    ),
    Chip(
        name="L4",
        arch=89,
        multiprocessors=58,
        clock=2.04e9,
        flops=_rates(bf16=121, tf32=60.5, fp32=30.3),
        bandwidth=0.3e12,
        shared=100 << 10,
        warps=48,
        blocks=24,
    ),
    Chip(
        name="RTX 4090",
        arch=89,
        multiprocessors=128,
        clock=2.52e9,
        flops=_rates(bf16=165.2, tf32=82.6, fp32=82.6),
        bandwidth=1.008e12,
        shared=100 << 10,
        warps=48,
        blocks=24,
    ),
    Chip(
        name="H200",
        arch=90,
        multiprocessors=132,
        clock=1.98e9,
        flops=_rates(bf16=989, tf32=494, fp32=67),
        bandwidth=4.8e12,
        shared=228 << 10,
        warps=64,
        blocks=32,
    ),
]


def issued(launch, row, key):
    """Returns a count of `row` over all warps of a launch, with the main loop's part times its trips."""
    loop = launch.native.loop if launch.native else "loop"
    warp = row[key] + row[f"{loop}_{key}"] * (launch.trips - 1 if row[f"{loop}_instructions"] else 0)
    return launch.programs * row["warps"] * warp


def triton_rows(arch, op):
    """Yields the resources and instruction counts of the op's Triton kernels: compile_triton.py and `sass.count`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "tests/support/compile_triton.py", str(arch), op, "--folder", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        for row in map(json.loads, done.stdout.splitlines()):
            text = sass.tool("nvdisasm", row.pop("cubin"), "-c")
            yield row | sass.count(text) | {"op": op}


def native_rows(arch):
    """Yields the same of the CUDA kernels in `inr_kernels._C`, by their mangled names; nothing without CUDA.

    The launches add what the machine code does not contain: threads and dynamic shared memory.
    """
    library = native.load()[0]
    for name, usage, text in sass.functions(library.__file__, arch) if library and library.cuda_archs else ():
        yield {"kernel": name, "arch": arch} | usage | sass.count(text)


def found(launch, rows):
    """Returns the row of a launch, or None: the `nth` of its op, kernel, mode and dtype, or its CUDA kernel's."""
    if launch.native:
        added = {"warps": launch.native.warps, "shared": launch.native.shared}
        some = [row | added for row in rows if launch.kernel in row["kernel"] and "op" not in row]
    else:
        key = launch.op, launch.kernel, launch.mode, launch.dtype
        some = [row for row in rows if (row.get("op"), row["kernel"], row.get("mode"), row.get("dtype")) == key]
    return some[launch.nth] if len(some) > launch.nth else None


def amount(value, unit):
    """Formats an amount: 1.23 GFLOP, 45.6 MB."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}" if value else ""


def cell(chip, launch, row):
    """Formats the bounds of a launch on a chip."""
    times, tensor = chip.seconds(launch, row), issued(launch, row, "mma_flops")
    bound = max(times, key=times.get)
    parts = [f"**{seconds(times[bound])}** {bound}", f"floor {chip.floor(launch) / times[bound]:.0%}"]
    parts += [f"issued {tensor / launch.flops:.0%}"] if tensor else []
    warps = chip.occupancy(row["registers"], row["shared"], row["warps"])
    if not warps:
        return "does not fit"
    return ", ".join([*parts, f"{warps}/{chip.warps} warps"])


def cells(launch, rows):
    """Returns the cells of a launch, or None if its kernel was not compiled."""
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
    """Returns the Markdown of all launches."""
    rates = [
        f"{chip.name} {chip.flops['bf16'] / 1e12:g} TFLOP/s bf16, {chip.flops['tf32'] / 1e12:g} tf32,"
        f" {chip.flops['fp32'] / 1e12:g} fp32, {chip.bandwidth / 1e9:g} GB/s, {chip.multiprocessors} multiprocessors at"
        f" {chip.clock / 1e9:g} GHz"
        for chip in CHIPS
    ]
    compiler = f"Compiled by Triton {triton.__version__}."
    parts = [ABOUT + ";\n".join(rates) + ".", compiler]
    for op in op_modules():
        lines = [cells(launch, rows) for launch in launches() if launch.op == op]
        parts.append(f"## {op}\n\n" + markdown(HEADER, filter(None, lines)))
    return "\n\n".join([*parts, CHANGES])


def main():
    """Compiles every kernel for the architecture of every chip and writes the page."""
    rows = []
    for arch in sorted({chip.arch for chip in CHIPS}):
        for op in op_modules():
            rows += triton_rows(arch, op)
        rows += native_rows(arch)
    partial = PAGE.with_suffix(".partial")
    partial.write_text(page(rows))
    os.replace(partial, PAGE)
    print(f"{PAGE.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
