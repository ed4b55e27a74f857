"""STFAN's filter-adaptive convolution: the module KernelConv2D of STFAN and GLF-CR, and a drop-in for it.

    out[b, c, y, x] = sum_ij kernel[b, c K² + i K + j, y, x] input[b, c, y + i - K // 2, x + j - K // 2]

The border is replicated. The original needs an extension that builds with old CUDA versions only. Without it, change
one line, `from FAC.kernelconv2d import KernelConv2D`, to

    from inr_kernels.integrations import fac as KernelConv2D

and KernelConv2D.KernelConv2D(K) runs on any device. Replace the function `kernel2d_conv(feat, kernel, K)` by
`elementwise_filter(feat, kernel, kernel_size=K, padding="replicate")`. Both have correct gradients for batches above K²
too, where the extension reads another image. With the extension installed, call `accelerate`.
"""

import types

import torch
from torch import nn
from torch.autograd import Function

from inr_kernels._core.hooks import has_hooks

from . import class_swap, probe
from .class_swap import Adapter, Match, Unsupported, register
from .filter_dtypes import are_supported, filter_as_eager

EXTENSION = "kernelconv2d_cuda"
SHAPES = [(2, 3, 5, 4), (1, 1, 1, 3), (11, 2, 3, 2)]


class KernelConv2D(nn.Module):
    """STFAN's layer on `elementwise_filter`, for any device, dtype and batch size, with correct gradients.

    Args:
        kernel_size: K, odd.

    Raises:
        ValueError: at the call, as `elementwise_filter`.

    Source: Zhou et al., "Spatio-Temporal Filter Adaptive Network for Video Deblurring", ICCV 2019.

    Example:
        >>> import torch
        >>> KernelConv2D(5)(torch.randn(1, 4, 6, 7), torch.randn(1, 4 * 25, 6, 7)).shape
        torch.Size([1, 4, 6, 7])
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, input: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        """input [B, C, H, W], kernel [B, C K², H, W] -> [B, C, H, W]."""
        return _filter(input, kernel, self.kernel_size)


def is_candidate(module: nn.Module) -> bool:
    """Whether the class is called KernelConv2D and is not ours."""
    return any(cls.__name__ == "KernelConv2D" and cls is not KernelConv2D for cls in type(module).__mro__)


def verify(module: nn.Module) -> Match:
    """The match of one KernelConv2D; Unsupported if it is not STFAN's."""
    class_swap.check_method(module, "forward", [(("input",), ("kernel",))])
    if reason := _why_not(module):
        raise Unsupported(reason)
    forward = _with_our_filter(type(module).forward)
    if reason := probe.first_reason(_why_different(module, forward, *shape) for shape in SHAPES):
        raise Unsupported(f"forward is not KernelConv2D's: {reason}")
    return class_swap.match(module, _Filter, "forward")


def _why_not(module):
    """Why the structure is not STFAN's, "" if it is."""
    size, pad = getattr(module, "kernel_size", None), getattr(module, "pad", None)
    if type(size) is not int or size % 2 != 1:
        return f"kernel_size must be an odd number; got {size}"
    if type(pad) is not nn.ReplicationPad2d or tuple(pad.padding) != (size // 2,) * 4:
        return f"pad is not ReplicationPad2d({size // 2})"
    if has_hooks(pad):
        return "pad has a hook or a patched forward"
    return ""


def _with_our_filter(forward):
    """The method, with our filter instead of the CUDA extension if the method calls it.

    Everything around the extension is compared; the extension itself, which no CPU can run, is identified by its name.
    """

    def calls_extension(value):
        return isinstance(value, type) and issubclass(value, Function) and EXTENSION in value.forward.__code__.co_names

    replaced = {name: _Unpadded for name, value in forward.__globals__.items() if calls_extension(value)}
    names = forward.__globals__ | replaced
    return types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)


class _Unpadded:
    """Computes what the extension does: the filter on an input that is already padded."""

    @staticmethod
    def apply(input, kernel, kernel_size):
        return filter_as_eager(input, kernel, kernel_size=kernel_size, groups=input.shape[1], padding="valid")


def _why_different(module, forward, batch, channels, height, width):
    """Why forward differs from ours on random numbers, "" if it does not; in float32 on the CPU."""
    size = module.kernel_size
    with probe.sandbox() as random:
        bare = probe.without_weights(module, {"pad": nn.ReplicationPad2d(size // 2)})
        leaves = [random((batch, channels, height, width)), random((batch, channels * size**2, height, width), 100)]
        return probe.why_different(
            bare,
            lambda _: forward(bare, *leaves),
            lambda _: _filter(*leaves, size, "reference"),
            leaves,
            random,
        )


def _filter(input, kernel, kernel_size, backend=None):
    if input.dtype.itemsize == 2 and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        input = input.float()  # as the padding does under the CPU's autocast
    options = {"kernel_size": kernel_size, "groups": input.shape[1], "padding": "replicate", "backend": backend}
    return filter_as_eager(input, kernel, **options)


class _Filter(class_swap.AcceleratedModule):
    def forward(self, input, kernel):
        """STFAN's method."""
        if class_swap.falls_back(self, _why_not_this_call(self, input, kernel)):
            return super().forward(input, kernel)
        return _filter(input, kernel, self.kernel_size)


def _why_not_this_call(module, input, kernel):
    if reason := class_swap.why_changed(module) or _why_not(module):
        return reason
    if nn.modules.module._has_any_global_hook():
        return "a hook on all modules is registered"
    fits = are_supported(input, kernel) and input.dim() == 4
    if fits:
        batch, channels, *size = input.shape
        fits = kernel.shape == (batch, channels * module.kernel_size**2, *size)
    return "" if fits else class_swap.UNSUPPORTED_CALL


ADAPTER = register(Adapter("STFAN's KernelConv2D", is_candidate, verify))
