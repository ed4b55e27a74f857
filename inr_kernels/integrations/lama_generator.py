"""LaMa's generator in other projects: the nn.Sequential whose first layers are fast Fourier convolutions.

Its convolutions, transposed convolutions, norms and ReLUs are torch's own layers, which `FusedSequential` recognises by
their types, so there is nothing to compare.
"""

from typing import Any

from torch import nn

from inr_kernels.fourier_unit import FFC_BN_ACT, FusedSequential

from . import class_swap, lama
from .class_swap import AcceleratedModule, Adapter, Match, Unsupported, register


def is_candidate(module: nn.Module) -> bool:
    """Whether the module is a sequence with one of LaMa's layers and convolutions of torch."""
    if getattr(type(module), "_inr_original", type(module)) is not nn.Sequential:
        return False
    layers: Any = module
    has_convolutions = any(type(layer) in (nn.Conv2d, nn.ConvTranspose2d) for layer in layers)
    return has_convolutions and any(lama.is_kind(layer, FFC_BN_ACT) for layer in layers)


def verify(module: nn.Module) -> Match:
    """The match of a sequence; Unsupported if its forward is patched."""
    if "forward" in vars(module):
        raise Unsupported("forward is patched on the object")
    return class_swap.match(module, _Generator, "forward")


class _Generator(AcceleratedModule):
    """nn.Sequential with the forward of FusedSequential."""

    def forward(self, x):
        if class_swap.falls_back(self, class_swap.why_changed(self)):
            return super().forward(x)
        return FusedSequential.forward(self, x)


ADAPTER = register(Adapter("LaMa's generator", is_candidate, verify))
