"""LPIPS and FID, whose networks read weights from a given file."""

import importlib.resources
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core.checks import require

from ..common.checkpoints import load_data
from ..common.classifiers import ALEX, VGG16, Activations, load_weights

ALEX_RELUS, VGG_RELUS = (1, 4, 7, 9, 11), (3, 8, 15, 22, 29)
SIDE = 299  # of FID's pictures, in pixels


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, version 0.1, of AlexNet or VGG-16:

        sum over layers of mean over pixels of w · (f(x) / |f(x)| - f(y) / |f(y)|)²

    Args:
        path: a state dict of torchvision's alexnet or vgg16 (`alexnet-owt-7be5be79.pth`, `vgg16-397923af.pth`), written
            by torch.save. The layers' weights w are part of torchmetrics.

    Attributes:
        net: "alex" or "vgg", as the file has it.

    Raises:
        ImportError: torchmetrics is not installed.
        OSError: the file cannot be read.
        ValueError: it has no such weights.

    Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR 2018.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__()
        state = load_data(path)
        first = state.get("features.0.weight") if isinstance(state, dict) else None
        self.net = "alex" if first is not None and first.shape[-1] == 11 else "vgg"
        layers, relus = (ALEX, ALEX_RELUS) if self.net == "alex" else (VGG16, VGG_RELUS)
        self.activations = Activations(path, layers, relus, "torchvision's alexnet or vgg16")
        self.weights = [weight.flatten() for weight in _linear_weights(self.net)]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Returns the distance of images [B, 3, H, W] in [0, 1] as [B]."""
        distance = torch.zeros(len(y), dtype=torch.float32, device=y.device)
        for maps, weight in zip(self.activations(torch.cat([x, y])), self.weights, strict=True):
            unit = maps / (maps.norm(dim=1, keepdim=True) + 1e-10)
            squares = (unit[: len(y)] - unit[len(y) :]).square().mean((2, 3))
            distance = distance + squares @ weight.to(squares)
        return distance


def _linear_weights(net: str) -> list[torch.Tensor]:
    """The weights of the five layers, [1, C, 1, 1] each, in the file of torchmetrics."""
    try:
        folder = importlib.resources.files("torchmetrics.functional.image")
    except ImportError as error:
        raise ImportError("LPIPS needs torchmetrics: pip install 'inr-kernels[evaluate]'") from error
    with importlib.resources.as_file(folder / "lpips_models" / f"{net}.pth") as path:
        state = load_data(path)
    return [state[f"lin{i}.model.1.weight"] for i in range(5)]


class Convolution(nn.Module):
    """A convolution without bias, batch norm and ReLU.

    Args:
        inputs, outputs: channels.
        kernel: its side, or (height, width).
        stride: of the convolution; with stride 1 and `same` the output has the input's size.
    """

    def __init__(self, inputs: int, outputs: int, kernel: Any, stride: int = 1, same: bool = True):
        super().__init__()
        sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = tuple(side // 2 for side in sides) if same and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inputs, h, w] -> [B, outputs, h', w']."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block of Inception: parallel branches of convolutions and a pooled one, concatenated.

    Args:
        inputs: channels.
        branches: of each branch the name, and (channels, kernel, [stride]) of its convolutions; two in a list are
            parallel.
        pool: of the last branch: "mean" or "maximum" before a convolution of `pooled` channels, or "stride", a maximum
            at half the size that has no convolution.
    """

    def __init__(self, inputs: int, branches: Mapping[str, Any], pool: str, pooled: int = 0):
        super().__init__()
        self.pool, self.chains = pool, []
        for branch, layers in branches.items():
            self.chains.append(self._chain(branch, inputs, layers))
        if pooled:
            self.branch_pool = Convolution(inputs, pooled, 1)

    def _chain(self, branch: str, inputs: int, layers: Sequence[Any]) -> list[list[str]]:
        """Adds the layers of a branch; returns their names, where parallel ones share an entry."""
        chain: list[list[str]] = []
        for i, layer in enumerate(layers, 1):
            split = isinstance(layer, list)  # two parallel convolutions
            names = []
            for letter, spec in zip("ab", layer, strict=True) if split else [("", layer)]:
                name = branch if len(layers) == 1 else f"{branch}_{i}{letter}"
                self.add_module(name, Convolution(inputs, *spec))
                names.append(name)
            inputs = layer[0][0] if split else layer[0]
            chain.append(names)
        return chain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inputs, h, w] -> [B, outputs, h', w']."""
        outputs = []
        for chain in self.chains:
            y = x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        if self.pool == "mean":
            y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            y = F.max_pool2d(x, 3, *((2,) if self.pool == "stride" else (1, 1)))
        return torch.cat([*outputs, self.branch_pool(y) if hasattr(self, "branch_pool") else y], 1)


def _a(inputs: int, pooled: int) -> Mixed:
    branches = {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
    return Mixed(inputs, branches, "mean", pooled)


def _c(width: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    long = [(width, 1), (width, column), (width, row), (width, column), (192, row)]
    branches = {"branch1x1": [(192, 1)], "branch7x7": [(width, 1), (width, row), (192, column)], "branch7x7dbl": long}
    return Mixed(768, branches, "mean", 192)


def _e(inputs: int, pool: str) -> Mixed:
    both = [(384, (1, 3)), (384, (3, 1))]
    branches = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), both], "branch3x3dbl": [(448, 1), (384, 3), both]}
    return Mixed(inputs, branches, pool, 192)


class Inception(nn.Module):
    """The 2048 features of FID: Inception v3 as TensorFlow's FID has it.

    Args:
        path: its weights, `pt_inception-2015-12-05-6726825d.pth`, as pytorch-fid and LaMa have them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no such weights.

    Source: Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, 2017.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.pool_1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, same=False)
        self.pool_2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        down: dict[str, Any] = {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}
        self.Mixed_6a = Mixed(288, down, "stride")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(128), _c(160), _c(160), _c(192)
        down = {
            "branch3x3": [(192, 1), (320, 3, 2)],
            "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
        }
        self.Mixed_7a = Mixed(768, down, "stride")
        self.Mixed_7b, self.Mixed_7c = _e(1280, "mean"), _e(2048, "maximum")
        load_weights(self, path, "pytorch-fid's Inception")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the features [B, 2048] of images [B, 3, H, W] in [0, 1], which are resized to 299 x 299."""
        x = 2 * F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1
        for layer in self.children():
            x = layer(x)
        return x.mean((2, 3))


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the Fréchet distance of two normal distributions with the means and covariances of samples: FID.

        |mean_a - mean_b|² + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

    With cov = R^T R of the centred samples' QR decomposition, tr (cov_a cov_b)^(1/2) is the sum of the singular values
    of R_a R_b^T: exact also for fewer samples than features.

    Args:
        a, b: [samples, features], at least two samples each.

    Raises:
        ValueError: there are fewer samples.
    """
    require(min(len(a), len(b)) > 1, "a and b", "have at least two samples", f"{len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    means = a.mean(0), b.mean(0)
    r_a, r_b = (torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, "r").R for x, mean in zip((a, b), means, strict=True))
    cross = torch.linalg.svdvals(r_a @ r_b.T).sum()
    distance = (means[0] - means[1]).square().sum() + r_a.square().sum() + r_b.square().sum() - 2 * cross
    return max(0.0, distance.item())
