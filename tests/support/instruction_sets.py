"""Problems of every op on the C++ kernels, with the instruction set that INR_KERNELS_ISA names."""

import elementwise_filter_cases
import fourier_unit_cases
import local_implicit_cases
import local_texture_cases
import mlp_cases
import neighborhood_attention_cases
import torch
import unmask_attention_cases
from unmask_attention_cases import HOLES

from inr_kernels import _C
from inr_kernels._core import signs
from inr_kernels.fourier_unit import conv2d, conv3x3

HALF = torch.bfloat16, torch.float16
EXACT = torch.float32, torch.float64
# Case module, dtypes, options: vectors with a rest, several of them, and less than one.
PROBLEMS = [
    (local_implicit_cases, (*EXACT, torch.bfloat16), {}),
    (local_implicit_cases, (*EXACT, torch.bfloat16), {"ensemble_after": "first"}),
    (local_implicit_cases, (*EXACT, torch.bfloat16), {"hidden": (65, 31), "out": 19}),
    (local_implicit_cases, (*EXACT, torch.bfloat16), {"hidden": (1057, 40), "queries": 9}),
    (local_texture_cases, EXACT, {"frequencies": 21}),
    (local_texture_cases, HALF[:1], {"frequencies": 21, "relu_margin": True}),
    (mlp_cases, EXACT, {"rows": (70,), "widths": (35, 131, 19), "norm": True, "add": True}),
    (mlp_cases, EXACT, {"rows": (30,), "widths": (33, 1057, 40), "activation": "relu"}),
    (elementwise_filter_cases, (*EXACT, *HALF), {"size": (5, 37), "normalize": "taps"}),
    (elementwise_filter_cases, EXACT, {"size": (5, 37), "normalize": "all", "stride": 2}),
    (elementwise_filter_cases, EXACT, {"size": (4, 9), "normalize": "none", "dilation": 2}),
    *((unmask_attention_cases, (*EXACT, *HALF), {"shape": (2, 21, 9, 31), "hole": hole}) for hole in HOLES),
    (neighborhood_attention_cases, (*EXACT, *HALF), {"size": (7, 35), "kernel_size": 5}),
    (neighborhood_attention_cases, EXACT, {"size": (5, 9), "kernel_size": 3, "dim": 19, "bias": True}),
    (neighborhood_attention_cases, EXACT, {"size": (7, 35), "kernel_size": (7, 35)}),
    (neighborhood_attention_cases, EXACT, {"size": (10, 70), "key_size": (5, 35), "kernel_size": 5, "dim_v": 115}),
    (fourier_unit_cases, EXACT, {"channels": 7, "outputs": 13, "size": (9, 50)}),
]


def main():
    """Prints the instruction set that is in use."""
    torch.manual_seed(0)
    for cases, dtypes, options in PROBLEMS:
        for dtype in dtypes:
            cases.assert_kernel_as_accurate(cases.Case(**options), dtype, "cpu")
    for dtype in EXACT:
        x, kernel = (torch.randn(shape, dtype=dtype) for shape in [(2, 7, 9, 50), (8, 7, 3, 3)])
        torch.testing.assert_close(*(conv3x3(x, kernel, backend=b) for b in ("cpu", "reference")), rtol=1e-4, atol=1e-5)
        check_conv2d(dtype)
        assert torch.equal(signs.unpack(signs.pack(x), x.shape), x > 0)
        assert torch.equal(signs.select(x, signs.pack(-x)), torch.where(x < 0, x, 0))
    print(_C.isa())


def check_conv2d(dtype):
    """Compares conv2d with torch, with blocks of outputs of every size."""
    half = {"stride": 2, "padding": 1}
    problems = [(7, outputs, (5, 40)) for outputs in (2, 3, 5, 6, 8, 12, 16, 33)]
    problems += [(17, outputs, (47, 71)) for outputs in (12, 33)]  # with stride 2 by Winograd's algorithm
    for channels, outputs, size in problems:
        for form in (half, half | {"transposed": True}, {"padding": 3, "padding_mode": "reflect"}):
            x = torch.randn(2, channels, *size, dtype=dtype) / channels**0.5
            pair = (channels, outputs) if "transposed" in form else (outputs, channels)
            weight, bias = torch.randn(*pair, 3, 3, dtype=dtype), torch.randn(outputs, dtype=dtype)
            ours, theirs = (conv2d(x, weight, bias, backend=b, **form) for b in ("cpu", "reference"))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
