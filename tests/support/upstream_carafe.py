"""CARAFE as in XiaLiPKU/CARAFE and its copies, and similar modules that compute something else."""

import torch
import torch.nn.functional as F
from torch import nn


class CARAFE(nn.Module):
    """Subclasses that compute something else override these methods."""

    def __init__(self, c, c_mid=4, scale=2, k_up=5, k_enc=3):
        super().__init__()
        self.scale = scale
        self.comp = nn.Sequential(nn.Conv2d(c, c_mid, 1, bias=False), nn.BatchNorm2d(c_mid), nn.ReLU(inplace=True))
        self.enc = nn.Conv2d(c_mid, (scale * k_up) ** 2, k_enc, padding=k_enc // 2)
        self.pix_shf = nn.PixelShuffle(scale)
        self.upsmp = nn.Upsample(scale_factor=scale, mode="nearest")
        self.unfold = nn.Unfold(kernel_size=k_up, dilation=scale, padding=k_up // 2 * scale)

    def normalize(self, kernels):
        return F.softmax(kernels, dim=1)

    def windows(self, x):
        return self.unfold(self.upsmp(x))

    def forward(self, X):
        batch, channels, height, width = X.shape
        kernels = self.normalize(self.pix_shf(self.enc(self.comp(X))))
        windows = self.windows(X).view(batch, channels, -1, height * self.scale, width * self.scale)
        return torch.einsum("bkhw,bckhw->bchw", [kernels, windows])


class Renamed(CARAFE):
    """As in copies: the argument has another name, and the batch norm comes after the convolution."""

    def forward(self, x):
        return super().forward(x)


class Sigmoid(CARAFE):
    def normalize(self, kernels):
        return kernels.sigmoid() / kernels.shape[1]


class Plus(CARAFE):
    def forward(self, X):
        return super().forward(X) + self.upsmp(X)


class Clamped(CARAFE):
    def windows(self, x):
        return self.unfold(self.upsmp(x.clamp(max=0.5)))


def changed(**layers):
    model = CARAFE(3)
    for name, layer in layers.items():
        setattr(model, name, layer)
    return model


UNSUPPORTED = {
    "sigmoid": (lambda: Sigmoid(3), "forward is not CARAFE's: its output differs on random inputs"),
    "plus": (lambda: Plus(3), "forward is not CARAFE's: its output differs on random inputs"),
    "clamped": (lambda: Clamped(3), "forward is not CARAFE's: its output differs on random inputs"),
    "bilinear": (
        lambda: changed(upsmp=nn.Upsample(scale_factor=2, mode="bilinear")),
        "its layers are not those of a scale of 2 and a kernel of 5",
    ),
    "undilated": (lambda: changed(unfold=nn.Unfold(5, padding=4)), "its layers are not those of a scale of 2"),
    "even": (lambda: changed(unfold=nn.Unfold(4)), "the kernel of unfold must be an odd number; got 4"),
    "other layer": (lambda: changed(pix_shf=nn.Identity()), "pix_shf is not a PixelShuffle"),
    "scale": (lambda: changed(scale=2.0), "scale must be a positive integer; got 2.0"),
    "patched": (lambda: changed(forward=torch.sin), "forward is patched on the object"),
}
