"""Compiles every launch of the Triton backend ahead of time and prints its resources as JSON lines; needs no GPU.

Run without TRITON_INTERPRET: `python _compile_triton.py 89`. A driver without a device stands behind Triton, and a
launch stops after the compilation, so what is compiled is what the launcher would launch, argument by argument.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from inr_kernels.fourier_unit import triton_kernels as fourier_unit
from inr_kernels.local_implicit import triton_kernels

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|QMMA|UTCHMMA)\b")


class Driver:
    """As much of a Triton driver as compiling takes."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def tool(name, cubin, *options):
    """The output of one of the CUDA tools that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BIN / name, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(kernel):
    cubin = kernel.asm["cubin"]
    usage = dict(re.findall(r"(REG|STACK):(\d+)", tool("cuobjdump", cubin, "--dump-resource-usage")))
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "tensor_cores": bool(TENSOR_CORE.search(tool("nvdisasm", cubin, "-c"))),
        "fused": "fma.rn.f32" in kernel.asm["ptx"],
    }


def paper_shape(dtype, first):
    """LIIF's decoder, 256 x 4 to 3 channels, on one 48 x 48 patch; the values are never read."""
    widths = [256, 256, 256, 256, 3]
    y, x, cell = torch.empty(1, 64, 64), torch.empty(1, 64, 64), torch.empty(1, 64, 64, 2)
    weights = [torch.empty(n, k, dtype=dtype) for k, n in pairwise(widths)]
    if first:
        weights[0] = torch.empty(256, 258, dtype=dtype)
    biases = [torch.empty(n, dtype=dtype) for n in widths[1:]]
    hoisted, position = torch.empty(1, 48, 48, 256, dtype=dtype), torch.empty(256, 2 if first else 4, dtype=dtype)
    return hoisted, y, x, cell, position, weights, biases, 48, 0, True, first


def main(arch):
    compiled, label = {}, {}
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(kernel.hash, {"kernel": self.__name__, **label, "asm": kernel})
        return kernel

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(Driver(arch))
    triton_kernels._capability = lambda device: divmod(arch, 10)
    for dtype in (torch.bfloat16, torch.float32):
        for first in (False, True):
            label.update(dtype=str(dtype).removeprefix("torch."), ensemble="first" if first else "last")
            args = paper_shape(dtype, first)
            triton_kernels.forward(*args)
            grad = torch.empty(1, 64, 64, 3, dtype=dtype)
            triton_kernels.backward(grad, *args, needs_hoisted=True, needs_weights=True)
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        label.update(dtype="float32" if precision == "highest" else "tf32", ensemble="")
        spectrum, weight = torch.empty(1, 192, 64, 33, dtype=torch.complex64), torch.empty(384, 384)
        fourier_unit.product(spectrum, weight, torch.empty(384), True, 1)  # Big-LaMa's, at 512 x 512
        fourier_unit.product(spectrum.view(192, 64, 1, 33), torch.empty(128, 128), None, False, 1)  # its columns' DFT
    for row in compiled.values():
        kernel = row.pop("asm")
        print(json.dumps({"arch": arch, **row, **resources(kernel)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
