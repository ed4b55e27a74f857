"""Element-wise filters as other projects write them, and such as only look like theirs."""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

kernelconv2d_cuda = None  # an extension that this machine cannot build


class KernelConv(nn.Module):
    """MISF's; what its subclasses do otherwise are these methods."""

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
    """JPGNet's other one: every axis of length one goes."""

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


class Keeps(KernelConv):
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
    """A factor that is one until it is trained."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, frames, core, white_level=1.0, rate=1):
        return super().forward(frames, core, white_level, rate) * self.gate


class OnCudaAlone(Function):
    """An extension's door: it refuses a CPU."""

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
        return self.after(OnCudaAlone.apply(self.before(input), kernel, self.kernel_size), input)


class Ported(KernelConv2D):
    """On any device: all but the extension, which another wrote anew."""

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
    """RAFT's convex upsampling, among other things; what its subclasses do otherwise are these methods."""

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
    """The mask says how much larger."""

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


class OfItsNet(Raft):
    def upsample_flow(self, flow, mask):
        return self.net(super().upsample_flow(flow, mask))


class OfFeatures(Raft):
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


NUMBERS, GRADIENTS, EDITS = "another output on random", "other gradients", "it changes its arguments"

# What builds a module that must be left alone, and a part of the reason.
MUTANTS = {
    "replicates the border": (Replicated, NUMBERS),
    "softmax of the core": (Softmax, NUMBERS),
    "colours before taps": (ColoursFirst, NUMBERS),
    "adds the frames": (PlusFrames, NUMBERS),
    "white_level twice": (WhiteTwice, NUMBERS),
    "ignores the rate": (RateIgnored, NUMBERS),
    "edits the core": (InPlace, EDITS),
    "keeps its output": (Keeps, "it sets attributes"),
    "no gradient to the frames": (Detached, GRADIENTS),
    "noise in training": (Noisy, NUMBERS),
    "more arguments": (MoreArguments, "forward does not take (frames, core"),
    "another default": (OtherDefault, "forward does not take (frames, core"),
    "a gate": (Gated, "trying it raised AttributeError"),
    "separable": (lambda: KernelConv(sep_conv=True), "its cores are separable"),
    "a bias": (lambda: KernelConv(core_bias=True), "its cores have a bias"),
    "two sizes": (lambda: KernelConv((3, 5)), "kernel_size is not one odd number but [3, 5]"),
    "an even size": (lambda: KernelConv((4,)), "kernel_size is not one odd number but [4]"),
    "patched KernelConv": (lambda: patched(KernelConv, "forward"), "forward is patched on the object"),
    "zero padding": (ZeroPadded, "pad is no ReplicationPad2d(1)"),
    "adds its input": (PlusInput, NUMBERS),
    "crops first": (PaddedTwice, "trying it raised"),
    "of the absolute values": (SignLost, NUMBERS),
    "an extension of another name": (AnotherExtension, "trying it raised NotImplementedError"),
    "even K": (lambda: KernelConv2D(4), "kernel_size is not an odd number but 4"),
    "a hook on pad": (hooked, "pad has a hook"),
    "patched KernelConv2D": (lambda: patched(KernelConv2D, "forward"), "forward is patched on the object"),
    "no softmax": (NoSoftmax, NUMBERS),
    "a temperature": (Tempered, NUMBERS),
    "the factor twice": (FactorTwice, NUMBERS),
    "no factor": (NoFactor, NUMBERS),
    "replicates the flow": (ReplicatedFlow, NUMBERS),
    "adds bilinear flow": (PlusBilinear, NUMBERS),
    "edits the flow": (FlowInPlace, EDITS),
    "a network of its own": (OfItsNet, "has no attribute 'net'"),
    "a factor too large": (lambda: Raft(17), "it raised RuntimeError"),
    "features": (OfFeatures, "upsample_flow does not take (flow, mask)"),
    "patched upsample_flow": (lambda: patched(Raft, "upsample_flow"), "upsample_flow is patched on the object"),
}
