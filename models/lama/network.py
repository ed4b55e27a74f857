"""LaMa: inpainting with fast Fourier convolutions, at any size."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inr_kernels._core.checks import require
from inr_kernels._core.hooks import is_untouched
from inr_kernels.fourier_unit import FusedSequential, frozen
from inr_kernels.local_implicit.functional import WORKSPACE, check_size, check_workspace

from ..common import checkpoints
from ..common.constant import constant
from ..common.deprecated import deprecated
from ..common.frozen import InBands, Recomputed
from ..common.graphs import Graphed, check_shape
from ..common.masking import check_mask, known
from ..common.network import Inpainter
from ..common.progress import Progress, parameters, reporting
from .ffc import FFC_BN_ACT, ConcatTupleLayer, FFCResnetBlock

MIN_BAND = 64  # pixels; in a lower band most work would be the halo's
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "none": nn.Identity}


@dataclass(frozen=True)
class LaMaConfig:
    """The structure of a LaMa; the defaults are LaMa-Fourier's, Big-LaMa has 18 blocks.

    Args:
        inputs, outputs: channels; the inputs are the masked image and the mask.
        features: of the first layer; doubled by each downsampling, up to `max_features`.
        downsamplings, blocks: numbers of layers that halve the size, and of FFC blocks after them.
        ratio: share of the global channels in the blocks.
        max_features: see features.
        enable_lfu: whether the blocks have local Fourier units.
        activation: "sigmoid", "tanh" or "none", on the output.

    Raises:
        ValueError: activation is none of them.
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

    def __post_init__(self) -> None:
        require(self.activation in ACTIVATIONS, "activation", f"be one of {', '.join(ACTIVATIONS)}", self.activation)

    @property
    def depth(self) -> int:
        """The number of repeated layers, each of which has tensors in the state dict."""
        return self.downsamplings + self.blocks

    def width(self, level: int) -> int:
        """Channels after `level` downsamplings."""
        return min(self.max_features, self.features << level)


class LaMa(Inpainter):
    """LaMa's generator: convolutions down, FFC blocks, convolutions up. Its state dict has LaMa's keys, `model.*`.

    `from_checkpoint` also opens the files that LaMa is distributed in; the config is derived from the shapes:

    - Lightning checkpoints, of torch before 1.6 too, and state dicts in a file of torch.save or safetensors
    - the TorchScript archive big-lama.pt of IOPaint, simple-lama and other tools
    - the zip file that LaMa publishes, with config.yaml and models/best.ckpt

    The generator's keys may have prefixes ("generator.", "model.", "module."); other keys are ignored. The option
    `activation` is the activation on the output where neither the file nor config.yaml names it, "sigmoid" by default
    as in LaMa's published models. LaMa has no `eager` option.

    No code of a file is run. Pickles are read by torch's weights-only unpickler, and objects of classes that it does
    not know, such as Lightning's callbacks, become empty containers. Of a TorchScript archive the pickle and the
    tensors are read in the same way; its sources are neither compiled nor read.

    The generator itself is `model.model`: it takes
    [B, 4, H, W], the masked image in [0, 1] and the mask, and returns [B, 3, H', W'], H and W rounded up to multiples
    of 2 ** downsamplings, with the same top left corner.

    Args:
        config: a LaMaConfig.

    Attributes:
        split: index of the layer of `model` at which `decode` takes over from `encode`; by default the first FFC
            block, where LaMa's feature refinement splits. The features there are (local, global).

    Source: Suvorov et al., Resolution-robust Large Mask Inpainting with Fourier Convolutions, WACV 2022.

    Example:
        >>> model = LaMa(LaMaConfig(features=8, blocks=2)).eval()
        >>> model.inpaint(torch.rand(1, 3, 43, 59), torch.zeros(1, 43, 59, dtype=torch.bool)).shape
        torch.Size([1, 3, 43, 59])
        >>> local, global_ = model.encode(torch.rand(1, 3, 43, 59), torch.zeros(1, 1, 43, 59))
        >>> local.shape, global_.shape
        (torch.Size([1, 16, 6, 8]), torch.Size([1, 48, 6, 8]))
    """

    NETWORK = "LaMa"
    CONFIG = LaMaConfig
    KEY = "model.1.ffc.convl2l.weight"
    READS = "LaMa's .ckpt, .pt and .zip"

    def __init__(self, config: LaMaConfig = LaMaConfig()):
        super().__init__()
        self.config, self.notes = config, {}
        self.split = config.downsamplings + 2
        width, last = config.width, config.downsamplings
        common: dict[str, Any] = {"activation_layer": nn.ReLU, "enable_lfu": config.enable_lfu}
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), FFC_BN_ACT(config.inputs, width(0), 7, 0, 0, **common)]
        for level in range(last):
            ratio = config.ratio if level == last - 1 else 0
            layers.append(FFC_BN_ACT(width(level), width(level + 1), 3, 0, ratio, stride=2, padding=1, **common))
        common = {"ratio_gin": config.ratio, "ratio_gout": config.ratio, "enable_lfu": config.enable_lfu}
        layers += [FFCResnetBlock(width(last), "reflect", nn.BatchNorm2d, **common) for _ in range(config.blocks)]
        layers.append(ConcatTupleLayer())
        for level in reversed(range(last)):
            up = nn.ConvTranspose2d(width(level + 1), width(level), 3, stride=2, padding=1, output_padding=1)
            layers += [up, nn.BatchNorm2d(width(level)), nn.ReLU(inplace=True)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width(0), config.outputs, 7), ACTIVATIONS[config.activation]()]
        self.model: nn.Sequential = FusedSequential(*layers)

    def encode(self, image: torch.Tensor, mask: torch.Tensor) -> Any:
        """Returns the output of the layers before `split`, by default (local, global).

        Arguments and errors: as `Inpainter.encode`; sides of at least max(4, 2 ** downsamplings + 1).
        """
        dtype = next(self.parameters()).dtype
        mask = self._mask(image, mask).to(dtype)
        return self.model[: self.split](torch.cat((known(image.to(dtype), mask), mask), 1))

    @property
    def min_side(self) -> int:
        """The minimum side: reflection padding in the blocks needs maps of at least two pixels."""
        return max(4, (1 << self.config.downsamplings) + 1)

    @property
    def any_size(self) -> bool:
        """False: its decoder has the encoder's sizes."""
        return False

    def _mask(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        device = next(self.parameters()).device
        return check_mask(image, mask, device, channels=self.config.inputs - 1, min_side=self.min_side)

    def _work(self, image: torch.Tensor, size: tuple[int, int]) -> tuple[float, float, float]:
        """Numbers of layers, which take similar times."""
        return len(self._layers(slice(self.split))), 0, len(self._layers(slice(self.split, None)))

    def _encoding_modules(self) -> list[tuple[nn.Module, float]]:
        return self._layers(slice(self.split))

    def _layers(self, part: slice) -> list[tuple[nn.Module, float]]:
        """The layers of this part of `model` that have parameters, for `progress`: they take similar times."""
        return [(layer, 1) for layer in list(self.model)[part] if parameters(layer)]

    def decode(
        self, features: Any, size: tuple[int, int], *, workspace: int = WORKSPACE, progress: Progress = None
    ) -> torch.Tensor:
        """As `Inpainter.decode`, but at the size of the encoded image only, and all rows at once, whatever `workspace`.

        Raises:
            ValueError: another size.
        """
        size = check_size(size)
        check_workspace(workspace)
        with reporting(lambda: self._layers(slice(self.split, None)), progress):
            out = self.model[self.split :](features)
        step = 1 << self.config.downsamplings
        fits = all(n - step < side <= n for side, n in zip(size, out.shape[2:], strict=True))
        require(fits, "size", f"be that of the encoded image, at most {tuple(out.shape[2:])}", size)
        return out[..., : size[0], : size[1]]

    def forward(
        self,
        image: torch.Tensor,
        mask: Any = None,
        size: tuple[int, int] | None = None,
        *,
        scale: float | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """As `Inpainter.forward`. A single tensor of 4 channels is deprecated; it goes to the generator, `model`."""
        if mask is None and isinstance(image, torch.Tensor) and image.shape[1:2] == (self.config.inputs,):
            deprecated("LaMa(x) is deprecated: call LaMa.model(x) or LaMa(image, mask)")
            return self.model(image)
        return super().forward(image, mask, size, scale=scale, **options)

    def graphed(
        self, shape: tuple[int, ...], size: tuple[int, int] | None = None, *, scale: float | None = None, **options: Any
    ) -> Graphed:
        """As `Inpainter.graphed`. A shape of 4 channels is deprecated; it gives a graph of the generator, `model`."""
        if check_shape(shape)[1:2] == (self.config.inputs,):
            deprecated("graphed([B, 4, H, W]) is deprecated: give the image's shape")
            return Graphed(self.model, [shape])
        return super().graphed(shape, size, scale=scale, **options)

    def frozen(self, workspace: int = WORKSPACE) -> "LaMa":
        """As `Inpainter.frozen`: the FFC blocks keep one bit per activation, the other layers run in bands of rows."""
        model = super().frozen(workspace)
        config, split = self.config, self.split
        layers: list[Any] = list(model.model)
        first, step = config.downsamplings + 2, 1 << config.downsamplings  # of the blocks; pixels to one of theirs
        after = first + config.blocks + 1
        for block in layers[first : after - 1]:
            for name in ("conv1", "conv2") if isinstance(block, FFCResnetBlock) else ():
                setattr(block, name, frozen(getattr(block, name)))
        middle: list[nn.Module] = [Recomputed(block) for block in layers[first : after - 1]]
        # The last convolution sees 3 pixels to each side, the ones with a stride step - 1 in all.
        halo, rows = -(-(step + 2) // step), max(1, MIN_BAND // step)
        pixel = 10 * config.features * max(4, next(self.parameters()).element_size())
        front, tail = nn.Sequential(*layers[:first]), nn.Sequential(*layers[after:])
        width = config.width(config.downsamplings)
        both = 0 < int(width * config.ratio) < width  # whether there are local and global features
        if both and split >= first and is_untouched(*front.modules()):
            model.split -= first - 1
            front = nn.Sequential(InBands(front, 1 / step, halo * step, pixel, workspace, rows * step))
        if split <= after and is_untouched(*tail.modules()):
            tail = nn.Sequential(*constant(tail))
            tail = nn.Sequential(InBands(tail, step, halo, pixel * step * step, workspace, rows))
        model.model = nn.Sequential(*front, *middle, layers[after - 1], *tail)
        return model

    def bytes_per_pixel(self) -> int:
        """Estimates the memory that `inpaint` needs for a pixel, in addition to the output."""
        return round(5 * self.config.features * max(4, next(self.parameters()).element_size()))

    def bytes_per_refined_pixel(self) -> int:
        """As `Inpainter.bytes_per_refined_pixel`; the first and last layers run in bands of rows."""
        level = self.config.downsamplings
        maps = 20 * self.config.width(level) / 4**level  # features, gradients, Adam's moments, the maps of a layer
        return round((maps + self.config.blocks) * max(4, next(self.parameters()).element_size()))

    @classmethod
    def _read(cls, contents: checkpoints.Contents, activation: str = "sigmoid") -> checkpoints.Checkpoint:
        if checkpoint := checkpoints.parse(contents, cls.NETWORK):
            return checkpoint
        state = checkpoints.state_dict(contents, cls.KEY)
        written = _written_activation(contents.texts.get("config.yaml", ""))
        return checkpoints.Checkpoint(_config_of(state, written or activation), state, {})


def _written_activation(config: str) -> str:
    """The activation in LaMa's config.yaml, "" if it names none; true is tanh there."""
    found = re.search(r"^\s*add_out_act:\s*(\w+)", config, re.MULTILINE)
    name = found[1].lower() if found else ""
    return {"true": "tanh", "false": "none"}.get(name, name)


def _config_of(state: Mapping[str, torch.Tensor], activation: str) -> dict[str, Any]:
    """The config of a state dict with these shapes."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    down = sum(bool(re.fullmatch(r"model\.\d+\.ffc\.convl2l\.weight", name)) for name in shapes) - 1
    blocks = [name for name in shapes if re.fullmatch(r"model\.\d+\.conv1\.ffc\.convl2l\.weight", name)]
    features, inputs, *_ = shapes[LaMa.KEY]
    local, across = shapes[f"model.{down + 1}.ffc.convl2l.weight"][0], f"model.{down + 1}.ffc.convl2g.weight"
    width = local + (shapes[across][0] if across in shapes else 0)
    ratio = (width - local) / width
    last = max(int(match[1]) for name in shapes if (match := re.fullmatch(r"model\.(\d+)\.weight", name)))
    return {
        "inputs": inputs,
        "outputs": shapes[f"model.{last}.weight"][0],
        "features": features,
        "downsamplings": down,
        "blocks": len(blocks),
        "ratio": ratio if int(width * ratio) == width - local else math.nextafter(ratio, 1),
        "max_features": width if width < features << down else 1024,
        "enable_lfu": any(".lfu." in name for name in shapes),
        "activation": activation,
    }
