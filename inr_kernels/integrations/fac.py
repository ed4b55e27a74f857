"""STFAN's filter-adaptive convolution, the module KernelConv2D of STFAN and GLF-CR, and a drop-in for it.

    out[b, c, y, x] = sum_ij kernel[b, c K² + i K + j, y, x] input[b, c, y + i - K // 2, x + j - K // 2]

The border is replicated. There it needs an extension that builds with old CUDA alone. Who cannot build it changes one
line, `from FAC.kernelconv2d import KernelConv2D`, to

    from inr_kernels.integrations import fac as KernelConv2D

and KernelConv2D.KernelConv2D(K) runs anywhere; in place of the function `kernel2d_conv(feat, kernel, K)` stands
`elementwise_filter(feat, kernel, kernel_size=K, padding="replicate")`. Both have right gradients for batches above K²
too, where the extension's read another image. Whoever has it calls `accelerate`.
"""

import types

import torch
from torch import nn
from torch.autograd import Function

from . import class_swap, probe
from .filter_dtypes import are_filterable, filtered

WHAT = "STFAN's KernelConv2D"
EXTENSION = "kernelconv2d_cuda"
SHAPES = [(2, 3, 5, 4), (1, 1, 1, 3), (11, 2, 3, 2)]


class KernelConv2D(nn.Module):
    """STFAN's layer on `elementwise_filter`: any device, dtype and batch, right gradients.

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

    def __init__(self, kernel_size):
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, input, kernel):
        """input [B, C, H, W], kernel [B, C K², H, W] -> [B, C, H, W]."""
        return _filter(input, kernel, self.kernel_size)


def is_candidate(module):
    """Whether it deserves a word in the log: it is called KernelConv2D and is not ours."""
    return any(cls.__name__ == "KernelConv2D" and cls is not KernelConv2D for cls in type(module).__mro__)


def replace(module):
    """Accelerates one KernelConv2D, in place. Returns why it was left alone, "" if it was not."""
    return class_swap.attempt(module, _verify)


def why_not(module):
    """Why the structure is not STFAN's, "" if it is."""
    size, pad = getattr(module, "kernel_size", None), getattr(module, "pad", None)
    if type(size) is not int or size % 2 != 1:
        return f"kernel_size is not an odd number but {size}"
    if type(pad) is not nn.ReplicationPad2d or tuple(pad.padding) != (size // 2,) * 4:
        return f"pad is no ReplicationPad2d({size // 2})"
    if class_swap.has_hooks(pad):
        return "pad has a hook or a patched forward"
    return ""


def _verify(module):
    if class_swap.signature(type(module), "forward") != (("input",), ("kernel",)):
        raise class_swap.LeftAlone("forward does not take (input, kernel)")
    if "forward" in vars(module):
        raise class_swap.LeftAlone("forward is patched on the object")
    if reason := why_not(module):
        raise class_swap.LeftAlone(reason)
    forward = _runnable(type(module).forward)
    if reason := probe.first(_differs(module, forward, *shape) for shape in SHAPES):
        raise class_swap.LeftAlone(f"forward is not KernelConv2D's: {reason}")
    return _Filter, class_swap.verdict(module, "forward")


def _runnable(forward):
    """The method as it is or, if it calls the extension, the same code with our filter in the extension's place.

    So all around the extension is proven; the extension itself, which no CPU can run, is known by its name.
    """

    def calls_extension(value):
        return isinstance(value, type) and issubclass(value, Function) and EXTENSION in value.forward.__code__.co_names

    stand_ins = {name: _Unpadded for name, value in forward.__globals__.items() if calls_extension(value)}
    names = forward.__globals__ | stand_ins
    return types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)


class _Unpadded:
    """What the extension computes: the filter on an input that was padded before."""

    @staticmethod
    def apply(input, kernel, kernel_size):
        return filtered(input, kernel, kernel_size=kernel_size, groups=input.shape[1], padding="valid")


def _differs(module, forward, batch, channels, height, width):
    """Why forward is not ours, "" if on random numbers it is; in float32 on the CPU."""
    size = module.kernel_size
    with probe.quiet_and_plain() as random:
        shell = probe.shell(module, {"pad": nn.ReplicationPad2d(size // 2)})
        leaves = [random((batch, channels, height, width)), random((batch, channels * size**2, height, width), 100)]
        return probe.differs(
            shell,
            lambda _: forward(shell, *leaves),
            lambda _: _filter(*leaves, size, "reference"),
            leaves,
            random,
        )


def _filter(input, kernel, kernel_size, backend=None):
    if input.dtype.itemsize == 2 and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        input = input.float()  # the CPU's autocast pads so
    options = {"kernel_size": kernel_size, "groups": input.shape[1], "padding": "replicate", "backend": backend}
    return filtered(input, kernel, **options)


class _Filter(class_swap.Accelerated):
    _inr_replace = staticmethod(replace)

    def forward(self, input, kernel):
        """STFAN's."""
        reason = class_swap.why_changed(self) or why_not(self)
        if not reason and nn.modules.module._has_any_global_hook():
            reason = "there is a hook on all modules"
        if not reason and not _fits(input, kernel, self.kernel_size):
            reason = "the arguments of a call fit neither each other nor KernelConv2D"
        if reason:
            class_swap.as_before(self, reason)
            return super().forward(input, kernel)
        return _filter(input, kernel, self.kernel_size)


def _fits(input, kernel, kernel_size):
    if not are_filterable(input, kernel) or input.dim() != 4:
        return False
    batch, channels, *size = input.shape
    return kernel.shape == (batch, channels * kernel_size**2, *size)
