"""Compiles every launch of an op's Triton backend ahead of time and prints its resources as JSON lines; needs no GPU.

Run without TRITON_INTERPRET: `python _compile_triton.py 89 local_implicit`; with a folder as a third argument, which
then has the kernels' cubins. A driver without a device stands behind
Triton, and a launch stops after the compilation, so what is compiled is what the launcher would launch, argument by
argument.
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

from inr_kernels.elementwise_filter import triton_kernels as filter_kernels
from inr_kernels.fourier_unit import triton_kernels as fourier_kernels
from inr_kernels.local_implicit import triton_kernels as implicit_kernels
from inr_kernels.neighborhood_attention import triton_kernels as neighborhood_kernels
from inr_kernels.unmask_attention import triton_kernels as attention_kernels

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
        "tensor_cores": "mma" in kernel.asm["ptx"] and bool(TENSOR_CORE.search(tool("nvdisasm", cubin, "-c"))),
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


def local_implicit(dtype):
    """Launches the decoder, forward and backward; yields the name of each mode before it does."""
    for mode in ("last", "first"):
        yield mode
        args = paper_shape(dtype, mode == "first")
        implicit_kernels.forward(*args)
        grad = torch.empty(1, 64, 64, 3, dtype=dtype)
        implicit_kernels.backward(grad, *args, needs_hoisted=True, needs_weights=True)


# channels, groups, (kernel_size, dilation, stride, upscale, padding, normalize, alpha, beta, gamma), window
FILTERS = {
    "DEAR": (64, 64, ((3, 3), (1,), 1, 1, "zeros", "taps", 2.0, 0.0, -1.0), False),
    "STFAN": (64, 64, ((5, 5), (1,), 1, 1, "replicate", "none", 0.0, 0.0, 1.0), False),
    "PASA": (64, 2, ((3, 3), (1,), 2, 1, "reflect", "all", 0.0, 0.0, 1.0), False),
    "CARAFE": (64, 1, ((9, 9), (1,), 1, 2, "zeros", "taps", 0.0, 0.0, 1.0), True),
}


def elementwise_filter(dtype):
    """Launches each filter, forward and backward; yields its name before it does."""
    for mode, (channels, groups, options, window) in FILTERS.items():
        if dtype == torch.float32 and mode in ("STFAN", "PASA"):
            continue  # the others, larger, stand for them
        yield mode
        (kh, kw), dilations, stride, upscale, *_ = options
        x = torch.empty(2, channels, 64, 64, dtype=dtype)
        kernel = torch.empty(2, groups * kh * kw, *[64 * upscale // stride] * 2, dtype=dtype)
        args = x, kernel, options[0], groups, *options[1:], torch.empty(kh, kw) if window else None
        filter_kernels.forward(*args)
        grad = torch.empty(len(dilations), 2, channels, *kernel.shape[2:], dtype=dtype)
        filter_kernels.backward(grad, *args, needs_x=True, needs_kernel=True)


def unmask_attention(dtype):
    """Launches the attention, forward and backward; yields the channels, and if keys are masked, before it does."""
    for channels, mask_keys in ((64, False), (64, True), (128, False), (256, False)):
        if channels > max(attention_kernels.BLOCKS[dtype.itemsize]):
            continue
        yield f"{channels}{' keys' if mask_keys else ''}"
        feat, weight = torch.empty(2, channels, 4096, dtype=dtype), torch.ones(2, 4096)
        out, softmax = attention_kernels.forward(feat, weight, 0.125, mask_keys)
        attention_kernels.backward(torch.empty_like(feat), feat, weight, out, softmax, 0.125, mask_keys)


def neighborhood_attention(dtype):
    """Launches IN²'s attention, packed, with a bias, forward and backward; yields the head's width before it does."""
    for dim in (32, 128):
        yield f"dim {dim}"
        qkv, rpb = torch.empty(1, 64, 64, 3, 8, dim, dtype=dtype), torch.empty(8, 13, 13)
        form = (7, 7), (1, 2), (1, 1), (False, False), dim**-0.5
        out, lse = neighborhood_kernels.forward([qkv], rpb, *form)
        neighborhood_kernels.backward(out, lse, lse, [qkv], rpb, *form, needs=[True, True])


def fourier_unit(dtype):
    """Launches the product on the spectrum, Big-LaMa's at 512 x 512, and its columns' DFT; yields the precision before.

    The spectrum is float32 always: dtype bfloat16 stands for TF32, on the tensor cores.
    """
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    yield "ieee" if dtype == torch.float32 else "tf32"
    spectrum, weight = torch.empty(1, 192, 64, 33, dtype=torch.complex64), torch.empty(384, 384)
    fourier_kernels.product(spectrum, weight, torch.empty(384), True, 1)
    fourier_kernels.product(spectrum.view(192, 64, 1, 33), torch.empty(128, 128), None, False, 1)


OPS = {
    "local_implicit": local_implicit,
    "elementwise_filter": elementwise_filter,
    "unmask_attention": unmask_attention,
    "neighborhood_attention": neighborhood_attention,
    "fourier_unit": fourier_unit,
}


def main(arch, op, folder=None):
    """A line for each kernel that the op compiles; the mode is the first that needs it."""
    compiled, label = {}, {}
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(kernel.hash, {"kernel": self.__name__, **label, "asm": kernel})
        return kernel

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(Driver(arch))
    implicit_kernels._capability = lambda device: divmod(arch, 10)
    for dtype in (torch.bfloat16, torch.float32):
        for mode in OPS[op](dtype):
            label.update(dtype=str(dtype).removeprefix("torch."), mode=mode)
    for name, row in compiled.items():
        kernel = row.pop("asm")
        row = {"arch": arch, **row, **resources(kernel)}
        if folder:
            row["cubin"] = str(Path(folder, f"{name}.cubin"))
            Path(row["cubin"]).write_bytes(kernel.asm["cubin"])
        print(json.dumps(row))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
