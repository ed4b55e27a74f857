"""Classifiers of torchvision whose activations losses and metrics compare. Their weights are read from a given file."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from inr_kernels._core.checks import require

from .checkpoints import load_data

# Layers of `features`: a convolution is (channels, side, stride, padding), followed by a ReLU; "M" is a maximum.
ALEX: tuple[Any, ...] = ((64, 11, 4, 2), "M", (192, 5, 1, 2), "M", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))


def _vgg(*stages: tuple[int, int]) -> tuple[Any, ...]:
    """The layers of stages of (channels, convolutions), with maxima between them."""
    return sum((("M", *((width, 3, 1, 1),) * count) for width, count in stages), ())[1:]


VGG16 = _vgg((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
VGG19 = _vgg((64, 2), (128, 2), (256, 4), (512, 4), (512, 1))  # up to relu5_1


def load_weights(module: nn.Module, path: str | os.PathLike[str], what: str) -> None:
    """Loads a state dict that has at least the module's entries; the module goes to eval mode, without gradients.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no such state dict.
    """
    state = load_data(path)
    needed = {name: value for name, value in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    rule = f"hold the weights of {what}"
    wrong = [name for name in needed if not isinstance(state, dict) or name not in state]
    require(not wrong, os.fspath(path), rule, f"no {', '.join(wrong[:3])}")
    wrong = [name for name in needed if state[name].shape != needed[name].shape]
    require(not wrong, os.fspath(path), rule, f"other shapes of {', '.join(wrong[:3])}")
    module.load_state_dict({name: state[name] for name in needed}, strict=False)
    module.float().requires_grad_(False).eval()


class Activations(nn.Module):
    """The activations of a classifier after some of its ReLUs.

    Args:
        path: a state dict of torchvision's network (`features.0.weight`, ...), written by torch.save. The classifier's
            entries are not needed.
        layers: ALEX, VGG16 or VGG19.
        relus: indices in torchvision's `features`.
        what: the network's name, for errors.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no such weights.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, path: str | os.PathLike[str], layers: Iterable[Any], relus: Sequence[int], what: str):
        super().__init__()
        self.features, self.relus, channels = nn.Sequential(), relus, 3
        for layer in layers:
            if layer == "M":
                self.features.append(nn.MaxPool2d(3 if layers is ALEX else 2, 2))
                continue
            width, *rest = layer
            self.features.extend([nn.Conv2d(channels, width, *rest), nn.ReLU()])
            channels = width
        load_weights(self, path, what)
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            value = torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[B, 3, H, W] in [0, 1] -> the maps [B, C_i, h_i, w_i]."""
        x, maps = (x - self.mean) / self.std, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.relus:
                maps.append(x)
        return maps
