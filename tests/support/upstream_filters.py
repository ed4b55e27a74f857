"""Element-wise filters as other projects write them, and similar modules that compute something else."""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from inr_kernels.integrations.class_swap import CANNOT_RUN

kernelconv2d_cuda = None  # a CUDA extension, not installed here


class KernelConv(nn.Module):
    """MISF's. Subclasses that compute something else override these methods."""

    mode = "constant"

    def __init__(self, kernel_size=(3,), sep_conv=False, core_bias=False):
        super().__init__()
        self.kernel_size, self.sep_conv, self.core_bias = list(kernel_size), sep_conv, core_bias

    def weights(self, core, batch, count, colours, size):
        return core.view(batch, count, -1, colours, *size)

    def apply_taps(self, frames, core, rate):
        frames = frames if frames.dim() == 5 else frames.unsqueeze(2)
        batch, count, colours, *size = frames.shape
        (side,) = self.kernel_size
        border = side // 2 * rate
        padded = F.pad(frames.flatten(1, 2), [border] * 4, mode=self.mode)
        windows = F.unfold(padded, side, dilation=rate).view(batch, count, colours, side**2, *size).transpose(2, 3)
        return (self.weights(core, batch, count, colours, size) * windows).sum(2).squeeze(2)

    def forward(self, frames, core, white_level=1.0, rate=1):
        return self.apply_taps(frames, core, rate) / white_level


class NoRate(KernelConv):
    """JPGNet's second one: drops every axis of length one."""

    def forward(self, frames, core, white_level=1.0):
        return self.apply_taps(frames, core, 1).squeeze() / white_level


class Pair(KernelConv):
    """KPN's."""

    def forward(self, frames, core, white_level=1.0):
        out = self.apply_taps(frames, core, 1).squeeze() / white_level
        return out, out.mean(1)


class Replicated(KernelConv):
    mode = "replicate"


class Softmax(KernelConv):
    def weights(self, *args):
        return super().weights(*args).softmax(2)


class ColoursFirst(KernelConv):
    def weights(self, core, batch, count, colours, size):
        return core.view(batch, count, colours, -1, *size).transpose(2, 3)


class PlusFrames(KernelConv):
    def forward(self, frames, core, white_level=1.0, rate=1):
        return super().forward(frames, core, white_level, rate) + frames


class WhiteTwice(KernelConv):
    def forward(self, frames, core, white_level=1.0, rate=1):
        return super().forward(frames, core, white_level, rate) / white_level


class RateIgnored(KernelConv):
    def forward(self, frames, core, white_level=1.0, rate=1):
        return super().forward(frames, core, white_level)


class InPlace(KernelConv):
    def forward(self, frames, core, white_level=1.0, rate=1):
        out = super().forward(frames, core, white_level, rate)
        with torch.no_grad():
            core.mul_(1)
        return out


class StoresOutput(KernelConv):
    def forward(self, frames, core, white_level=1.0, rate=1):
        self.last = super().forward(frames, core, white_level, rate)
        return self.last


class Detached(KernelConv):
    def forward(self, frames, core, white_level=1.0, rate=1):
        return super().forward(frames.detach(), core, white_level, rate)


class Noisy(KernelConv):
    def forward(self, frames, core, white_level=1.0, rate=1):
        out = super().forward(frames, core, white_level, rate)
        return out + torch.randn_like(out) if self.training else out


class MoreArguments(KernelConv):
    def forward(self, frames, core, white_level=1.0, rate=1, residual=None):
        return super().forward(frames, core, white_level, rate)


class OtherDefault(KernelConv):
    def forward(self, frames, core, white_level=1.0, rate=2):
        return super().forward(frames, core, white_level, rate)


class Gated(KernelConv):
    """Multiplies by a parameter that is initialised to one."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, frames, core, white_level=1.0, rate=1):
        return super().forward(frames, core, white_level, rate) * self.gate


class CudaOnly(Function):
    """Calls the extension, and raises on a CPU."""

    @staticmethod
    def forward(ctx, input, kernel, kernel_size):
        if not input.is_cuda:
            raise NotImplementedError
        return kernelconv2d_cuda.forward(input, kernel, kernel_size)


class KernelConv2D(nn.Module):
    """STFAN's."""

    padding = nn.ReplicationPad2d

    def __init__(self, kernel_size=3):
        super().__init__()
        self.kernel_size, self.pad = kernel_size, self.padding(kernel_size // 2)

    def before(self, input):
        return self.pad(input)

    def after(self, out, input):
        return out

    def forward(self, input, kernel):
        return self.after(CudaOnly.apply(self.before(input), kernel, self.kernel_size), input)


class Ported(KernelConv2D):
    """A port that replaces the extension by PyTorch code for any device."""

    def forward(self, input, kernel):
        batch, channels, *size = input.shape
        windows = F.unfold(self.pad(input), self.kernel_size).view(batch, channels, -1, *size)
        return (kernel.view_as(windows) * windows).sum(2)


class ZeroPadded(KernelConv2D):
    padding = nn.ZeroPad2d


class PlusInput(KernelConv2D):
    def after(self, out, input):
        return out + input


class PaddedTwice(KernelConv2D):
    def before(self, input):
        return self.pad(input[..., 1:-1, 1:-1].contiguous()) if input.shape[-2] > 2 else self.pad(input)


class SignLost(KernelConv2D):
    def before(self, input):
        return self.pad(input.abs())


class AnotherExtension(KernelConv2D):
    def forward(self, input, kernel):
        raise NotImplementedError


class Raft(nn.Module):
    """RAFT's convex upsampling. Subclasses that compute something else override these methods."""

    channels = 2

    def __init__(self, factor=8):
        super().__init__()
        self.factor, self.net = factor, nn.Conv2d(2, 3, 1)

    def weights(self, mask):
        return mask.softmax(2)

    def windows(self, flow, factor):
        return F.unfold(factor * flow, 3, padding=1)

    def factor_of(self, mask):
        return self.factor

    def upsample_flow(self, flow, mask):
        batch, channels, height, width = flow.shape
        channels, factor = self.channels or channels, self.factor_of(mask)
        weights = self.weights(mask.view(batch, 1, 9, factor, factor, height, width))
        windows = self.windows(flow, factor).view(batch, channels, 9, 1, 1, height, width)
        out = (weights * windows).sum(2).permute(0, 1, 4, 2, 5, 3)
        return out.reshape(batch, channels, factor * height, factor * width)

    def forward(self, flow, mask):
        return self.upsample_flow(flow, mask)


class Stereo(Raft):
    """RAFT-Stereo's: any number of channels."""

    channels = None


class AnyFactor(Raft):
    """Derives the factor from the mask."""

    def factor_of(self, mask):
        return round((mask.shape[1] // 9) ** 0.5)


class NoSoftmax(Raft):
    def weights(self, mask):
        return mask


class Tempered(Raft):
    def weights(self, mask):
        return (0.25 * mask).softmax(2)


class FactorTwice(Raft):
    def windows(self, flow, factor):
        return super().windows(factor * flow, factor)


class NoFactor(Raft):
    def windows(self, flow, factor):
        return super().windows(flow / factor, factor)


class ReplicatedFlow(Raft):
    def windows(self, flow, factor):
        return F.unfold(F.pad(factor * flow, [1] * 4, mode="replicate"), 3)


class PlusBilinear(Raft):
    def upsample_flow(self, flow, mask):
        return super().upsample_flow(flow, mask) + F.interpolate(flow, scale_factor=self.factor, mode="bilinear")


class FlowInPlace(Raft):
    def upsample_flow(self, flow, mask):
        out = super().upsample_flow(flow, mask)
        with torch.no_grad():
            flow.mul_(self.factor)
        return out


class UsesItsNetwork(Raft):
    def upsample_flow(self, flow, mask):
        return self.net(super().upsample_flow(flow, mask))


class TakesFeatures(Raft):
    def upsample_flow(self, flow, feature, bilinear=False):
        return super().upsample_flow(flow, feature)


def patched(build, name):
    model = build()
    setattr(model, name, functools.partial(getattr(type(model), name), model))
    return model


def hooked():
    model = KernelConv2D()
    model.pad.register_forward_hook(lambda module, args, out: 2 * out)
    return model


OUTPUT, GRADIENTS, IN_PLACE = "its output differs on random", "its gradients differ", "modifies its arguments in place"

# Name: (how to build a module that must not be accelerated, part of the logged reason).
UNSUPPORTED = {
    "replicates the border": (Replicated, OUTPUT),
    "softmax of the core": (Softmax, OUTPUT),
    "colours before taps": (ColoursFirst, OUTPUT),
    "adds the frames": (PlusFrames, OUTPUT),
    "white_level twice": (WhiteTwice, OUTPUT),
    "ignores the rate": (RateIgnored, OUTPUT),
    "modifies the core in place": (InPlace, IN_PLACE),
    "stores its output": (StoresOutput, "it sets attributes"),
    "no gradient to the frames": (Detached, GRADIENTS),
    "noise in training": (Noisy, OUTPUT),
    "more arguments": (MoreArguments, "its forward takes "),
    "another default": (OtherDefault, "its forward takes "),
    "a gate": (Gated, CANNOT_RUN),
    "separable": (lambda: KernelConv(sep_conv=True), "its kernels are separable"),
    "a bias": (lambda: KernelConv(core_bias=True), "its kernels have a bias"),
    "two sizes": (lambda: KernelConv((3, 5)), "kernel_size must be a list of one odd number; got [3, 5]"),
    "an even size": (lambda: KernelConv((4,)), "kernel_size must be a list of one odd number; got [4]"),
    "patched KernelConv": (lambda: patched(KernelConv, "forward"), "forward is patched on the object"),
    "zero padding": (ZeroPadded, "pad is not ReplicationPad2d(1)"),
    "adds its input": (PlusInput, OUTPUT),
    "crops first": (PaddedTwice, CANNOT_RUN),
    "of the absolute values": (SignLost, OUTPUT),
    "an extension of another name": (AnotherExtension, CANNOT_RUN),
    "even K": (lambda: KernelConv2D(4), "kernel_size must be an odd number; got 4"),
    "a hook on pad": (hooked, "pad has a hook"),
    "patched KernelConv2D": (lambda: patched(KernelConv2D, "forward"), "forward is patched on the object"),
    "no softmax": (NoSoftmax, OUTPUT),
    "a temperature": (Tempered, OUTPUT),
    "the factor twice": (FactorTwice, OUTPUT),
    "no factor": (NoFactor, OUTPUT),
    "replicates the flow": (ReplicatedFlow, OUTPUT),
    "adds bilinear flow": (PlusBilinear, OUTPUT),
    "modifies the flow in place": (FlowInPlace, IN_PLACE),
    "a network of its own": (UsesItsNetwork, "or uses layers of the model"),
    "a factor too large": (lambda: Raft(17), "it takes no mask of 9 f² channels with a factor f from 1 to 16"),
    "features": (
        TakesFeatures,
        "its upsample_flow takes 3 arguments (flow, feature, bilinear=False), not (flow, mask)",
    ),
    "patched upsample_flow": (lambda: patched(Raft, "upsample_flow"), "upsample_flow is patched on the object"),
}
