"""LaMa: inpainting with fast Fourier convolutions, at any size."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from inr_kernels._core.checks import require, require_tensor, shape

from ..common import checkpoints
from ..common.graphs import Graphed
from ..common.masking import known
from .ffc import FFC_BN_ACT, ConcatTupleLayer, FFCResnetBlock

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "none": nn.Identity}


@dataclass(frozen=True)
class LaMaConfig:
    """What fixes a LaMa's parameters; the defaults are LaMa-Fourier, Big-LaMa has 18 blocks.

    Args:
        inputs, outputs: channels; the inputs are the masked image and the mask.
        features: of the first layer; doubled by each downsampling, up to `max_features`.
        downsamplings, blocks: numbers of layers that halve the size, and of FFC blocks between.
        ratio: share of the global channels in the blocks.
        enable_lfu: whether the blocks have local Fourier units.
        activation: "sigmoid", "tanh" or "none", on the output.
    """

    inputs: int = 4
    outputs: int = 3
    features: int = 64
    downsamplings: int = 3
    blocks: int = 9
    ratio: float = 0.75
    max_features: int = 1024
    enable_lfu: bool = False
    activation: str = "sigmoid"

    def width(self, level):
        """Channels after that many downsamplings."""
        return min(self.max_features, self.features << level)


class LaMa(nn.Module):
    """LaMa's generator: convolutions down, FFC blocks, convolutions up; its state dict has LaMa's keys, `model.*`.

    Source: Suvorov et al., Resolution-robust Large Mask Inpainting with Fourier Convolutions, WACV 2022.

    Example:
        >>> model = LaMa(LaMaConfig(features=8, blocks=2)).eval()
        >>> model.inpaint(torch.rand(1, 3, 43, 59), torch.zeros(1, 1, 43, 59)).shape
        torch.Size([1, 3, 43, 59])
    """

    def __init__(self, config=LaMaConfig()):
        super().__init__()
        self.config, self.notes = config, {}
        width, last = config.width, config.downsamplings
        common = {"activation_layer": nn.ReLU, "enable_lfu": config.enable_lfu}
        layers = [nn.ReflectionPad2d(3), FFC_BN_ACT(config.inputs, width(0), 7, 0, 0, **common)]
        for level in range(last):
            ratio = config.ratio if level == last - 1 else 0
            layers.append(FFC_BN_ACT(width(level), width(level + 1), 3, 0, ratio, stride=2, padding=1, **common))
        ratios = {"ratio_gin": config.ratio, "ratio_gout": config.ratio, "enable_lfu": config.enable_lfu}
        layers += [FFCResnetBlock(width(last), "reflect", nn.BatchNorm2d, **ratios) for _ in range(config.blocks)]
        layers.append(ConcatTupleLayer())
        for level in reversed(range(last)):
            up = nn.ConvTranspose2d(width(level + 1), width(level), 3, stride=2, padding=1, output_padding=1)
            layers += [up, nn.BatchNorm2d(width(level)), nn.ReLU(inplace=True)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width(0), config.outputs, 7), ACTIVATIONS[config.activation]()]
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        """[B, 4, H, W], the masked image in [0, 1] and the mask, 1 = hole -> [B, 3, H', W'], H and W rounded up to 8s.

        The top left corners stand on each other.
        """
        return self.model(x)

    def graphed(self, shape):
        """`forward` for inputs [B, 4, H, W] of one shape as a CUDA graph: see `Graphed`."""
        return Graphed(self, [shape])

    @torch.no_grad()
    def inpaint(self, image, mask):
        """Fills the holes of a picture; what is known comes back bit for bit.

        Args:
            image: [B, 3, H, W] in [0, 1], sides of at least 9, or one more than 2 ** downsamplings.
            mask: [B, 1, H, W], 1 = hole; between 0 and 1 the result is mixed.

        Returns:
            [B, 3, H, W].

        Raises:
            TypeError, ValueError: image or mask does not fit; the message says what.
        """
        require_tensor(image, "image", dims=(4,))
        require_tensor(mask, "mask", dims=(4,), like=image)
        channels, least = self.config.inputs - 1, max(4, (1 << self.config.downsamplings) + 1)
        fits = image.shape[1] == channels and min(image.shape[2:]) >= least
        require(fits, "image", f"have shape [B, {channels}, H, W] with sides of at least {least}", shape(image))
        expected = [len(image), 1, *image.shape[2:]]
        require(list(mask.shape) == expected, "mask", f"have shape {expected}, the image's", shape(mask))
        mask = mask.clamp(0, 1)
        masked = known(image, mask)
        filled = self(torch.cat((masked, mask), 1))[..., : image.shape[2], : image.shape[3]]
        return torch.where(mask == 0, image, masked + mask * filled)

    def save(self, path, notes=None):
        """Writes safetensors: parameters, config and notes (JSON)."""
        checkpoints.save(self, path, notes or self.notes)

    @classmethod
    def from_checkpoint(cls, path, activation="sigmoid"):
        """A model in eval mode from a .safetensors or from LaMa's Lightning checkpoint.

        Keys are `model.*` or `generator.model.*`; what is beside them, a discriminator say, is left out, and the
        config follows from the shapes. A checkpoint's pickled objects of other libraries are read as empty shells:
        none of their code runs.

        Args:
            path: of the file.
            activation: on the output, where the file does not say; LaMa's published models have "sigmoid".

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, or holds something else; the message says what.
        """
        return checkpoints.load(
            path, "a LaMa", lambda config: cls(LaMaConfig(**config)), lambda path: _read(path, activation)
        )


class _Shell:
    """Stands for any class that a checkpoint names and that is not needed."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        pass


def _read_lightning(path):
    """The state dict. Lightning pickles its callbacks' classes and the configuration's beside it."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    shells = [(type("Shell", (_Shell,), {}), name) for name in names]
    with torch.serialization.safe_globals(shells):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("it has no state_dict of tensors")
    return state


def _read(path, activation):
    """(config, state dict, notes) of a file of ours, another's safetensors, or Lightning's."""
    if Path(path).suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            if "config" in (file.metadata() or {}):
                return checkpoints.read(path)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    else:
        state = _read_lightning(path)
    if any(name.startswith("generator.") for name in state):
        state = {name[10:]: value for name, value in state.items() if name.startswith("generator.")}
    return dataclasses.asdict(_config_of(state, activation)), state, {}


def _config_of(state, activation):
    """The config that gives a state dict its shapes."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if "model.1.ffc.convl2l.weight" not in shapes:
        raise ValueError("it has no generator's model.1.ffc.convl2l.weight")
    down = sum(bool(re.fullmatch(r"model\.\d+\.ffc\.convl2l\.weight", name)) for name in shapes) - 1
    blocks = [name for name in shapes if re.fullmatch(r"model\.\d+\.conv1\.ffc\.convl2l\.weight", name)]
    features, inputs, *_ = shapes["model.1.ffc.convl2l.weight"]
    local, across = shapes[f"model.{down + 1}.ffc.convl2l.weight"][0], f"model.{down + 1}.ffc.convl2g.weight"
    width = local + (shapes[across][0] if across in shapes else 0)
    ratio = (width - local) / width
    last = max(int(match[1]) for name in shapes if (match := re.fullmatch(r"model\.(\d+)\.weight", name)))
    return LaMaConfig(
        inputs,
        shapes[f"model.{last}.weight"][0],
        features,
        down,
        len(blocks),
        ratio if int(width * ratio) == width - local else math.nextafter(ratio, 1),
        max_features=width if width < features << down else 1024,
        enable_lfu=any(".lfu." in name for name in shapes),
        activation=activation,
    )
