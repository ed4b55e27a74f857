"""The 3 x 3 convolution of networks that also run on a CPU."""

import torch
from torch import nn

from inr_kernels.fourier_unit import conv3x3
from inr_kernels.fourier_unit.module.fused import is_constant, is_dense, prefers_conv2d
from inr_kernels.fourier_unit.op import kept

MIN_WIDTH = 16  # channels of the input and of the output; with fewer, torch's convolution is faster


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution with zero padding, which can also add a map and apply a ReLU.

    In float32 and float64 on a CPU it is `conv3x3`, for training too, and in half precision where torch is slow. In
    other dtypes, on other devices, with few channels, under autocast, and for torch.jit.trace and the export to ONNX it
    is torch's convolution. Where no gradient of the weight is needed, the weight in the form that the kernel reads, 8/3
    of its size in float32, is kept between calls, as long as its values stay the same.

    Args:
        inputs, outputs: channels.
        eager: whether it always is torch's.
    """

    def __init__(self, inputs: int, outputs: int, eager: bool = False):
        super().__init__(inputs, outputs, 3, padding=1)
        self.eager = eager

    def forward(self, x: torch.Tensor, add: torch.Tensor | None = None, relu: bool = False) -> torch.Tensor:
        """[B, C, H, W] -> [B, O, H, W], plus `add` of that shape, or the ReLU of it."""
        is_wide = min(self.in_channels, self.out_channels) >= MIN_WIDTH
        is_own = is_dense(self) and self.padding == self.stride == (1, 1)  # its options have not been changed
        if is_wide and is_own and not self.eager and prefers_conv2d(x):
            (kept.keep if is_constant(self) else kept.forget)(self.weight)
            return conv3x3(x, self.weight, self.bias, add=add, relu=relu, padding="zeros")
        out = super().forward(x)
        out = out if add is None else out + add
        return out.relu() if relu else out
