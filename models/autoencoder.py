"""ImplicitAutoencoder: fills the missing pixels of an image by an implicit function of the position."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels import LocalImplicitDecoder
from inr_kernels._core.checks import is_positive_int, require, shape
from inr_kernels.local_implicit.functional import WORKSPACE, Form, check_size, render
from inr_kernels.local_implicit.op import centres

from .common.masking import blend, known
from .common.network import WEIGHTS, Inpainter
from .common.progress import FUSED, Progress, parameters

# Channels of the residual blocks and of the latent, with which each reading has the deck's 4.7e5 parameters.
WIDTHS = {"global": (24, 3), "local": (96, 8)}


@dataclass(frozen=True)
class AutoencoderConfig:
    """The structure of an `ImplicitAutoencoder`. The deck does not say whether the implicit function reads the whole
    latent or one pixel of it; both readings have its 4.7e5 parameters.

    Args:
        latent: "global": the implicit function reads the whole latent, so that images have one size, `side`; "local":
            the latent's pixel at the position, for images of any size.
        channels: of the residual blocks; 0: 24 ("global") or 96 ("local").
        latent_channels: of the latent; 0: 3 or 8.
        blocks: residual blocks of the encoder. 3: the deck.
        hidden: widths of the implicit function's hidden layers. Four of 128: the deck.
        side: height and width of the images, if latent is "global". 32: the deck.
        mask_channel: whether the encoder sees the mask. False: the deck, whose input is the masked image.

    Raises:
        ValueError: a value that is not supported.
    """

    latent: str = "global"
    channels: int = 0
    latent_channels: int = 0
    blocks: int = 3
    hidden: tuple[int, ...] = (128, 128, 128, 128)
    side: int = 32
    mask_channel: bool = False

    def __post_init__(self) -> None:
        require(self.latent in WIDTHS, "latent", f"be one of {', '.join(WIDTHS)}", repr(self.latent))
        for name, width in zip(("channels", "latent_channels"), WIDTHS[self.latent], strict=True):
            object.__setattr__(self, name, getattr(self, name) or width)
        for name in ("channels", "latent_channels", "blocks", "side"):
            value = getattr(self, name)
            require(is_positive_int(value), name, "be a positive integer", repr(value))

    @property
    def depth(self) -> int:
        """The number of repeated layers, each of which has tensors in the state dict."""
        return self.blocks + len(self.hidden)


class ResidualBlock(nn.Module):
    """skip(x) + conv3x3(ReLU(conv3x3(x))); skip is a 1 x 1 convolution where the channels change."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        first, last = (nn.Conv2d(n, outputs, 3, padding=1) for n in (inputs, outputs))
        self.body = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, O, H, W]."""
        return self.skip(x) + self.body(x)


class ImplicitAutoencoder(Inpainter):
    """An autoencoder whose decoder is a function of the position:

        Z = encoder(I (1 - M))      three residual blocks and a 1 x 1 convolution, at the image's size
        global:  rgb(x) = MLP([Z; x])          all of Z, as one vector
        local:   rgb(x) = MLP([Z_p; x])        p: the pixel at x

    x = (y, x) is the position in the image, which spans [-1, 1]; pixels are at their centres. 470,406 parameters
    (global) or 470,379 (local). Both are cases of `local_implicit`: the global latent is a map of one pixel, whose
    product with the first weight is computed once per image; in the local one the pixel's own position is two further
    channels.

    Args:
        config: an AutoencoderConfig.
        eager: the same network in plain PyTorch, without kernels of this package, for comparison.
        fields: of the config, in its place: `ImplicitAutoencoder(latent="local")`.

    Raises:
        TypeError: config and fields are given, or a field that the config does not have.

    Source: Lee, Implicit Image Inpainting, 2022 (slides). They leave open the activations, the padding, and the number
    of channels; the image is in [0, 1], and missing pixels are 0 in the encoder's input.

    Example:
        >>> model = ImplicitAutoencoder(latent="local").eval()
        >>> model.inpaint(torch.rand(1, 3, 21, 30), torch.zeros(1, 21, 30, dtype=torch.bool)).shape
        torch.Size([1, 3, 21, 30])
    """

    NETWORK = "ImplicitAutoencoder"
    CONFIG = AutoencoderConfig
    KEY = "encoder.0.skip.weight"
    PRETRAINED = WEIGHTS / "autoencoder.safetensors"

    def __init__(self, config: AutoencoderConfig | None = None, *, eager: bool = False, **fields: Any):
        super().__init__()
        if config is not None and fields:
            raise TypeError(f"give either config or its fields; got config and {', '.join(fields)}")
        self.config = config = config or AutoencoderConfig(**fields)
        self.notes, self.eager = {}, eager
        inputs, channels = 3 + config.mask_channel, config.channels
        blocks = [ResidualBlock(channels if i else inputs, channels) for i in range(config.blocks)]
        self.encoder = nn.Sequential(*blocks, nn.Conv2d(channels, config.latent_channels, 1))
        codes = config.latent_channels * (config.side**2 if self._is_global else 1)
        self._form = Form(feat_unfold=False, local_ensemble=False)
        self.decoder = LocalImplicitDecoder(codes, hidden=config.hidden, cell_decode=False, **self._form.flags())
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """He initialization; the position counts as much as all of the latent."""
        for layer in self._linears:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self._linears[0].weight[:, -2:])

    @property
    def _is_global(self) -> bool:
        return self.config.latent == "global"

    @property
    def _linears(self) -> list[Any]:
        layers: Any = self.decoder.imnet.layers
        return list(layers)[::2]

    @property
    def min_side(self) -> int:
        """`AutoencoderConfig.side` if latent is "global", else 1."""
        return self.config.side if self._is_global else 1

    @property
    def any_size(self) -> bool:
        """False: it was trained at the positions of the image's pixels."""
        return False

    def encode(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns Z [B, latent_channels, H, W].

        Arguments and errors: as `Inpainter.encode`; if latent is "global", H = W = `AutoencoderConfig.side`.
        """
        dtype = self._linears[0].weight.dtype
        mask, image = self._mask(image, mask).to(dtype), image.to(dtype)
        seen = known(image, mask)
        return self.encoder(torch.cat((seen, mask), 1) if self.config.mask_channel else seen)

    def _mask(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = super()._mask(image, mask)
        side = self.config.side
        fits = not self._is_global or tuple(image.shape[2:]) == (side, side)
        require(fits, "image", f"have shape [B, 3, {side}, {side}], the only size of this network", shape(image))
        return mask

    def decode(
        self, features: torch.Tensor, size: tuple[int, int], *, workspace: int = WORKSPACE, progress: Progress = None
    ) -> torch.Tensor:
        """As `Inpainter.decode`, from Z."""
        if self.eager:
            out = self._decode_eagerly(features, *check_size(size))
            if progress is not None:
                progress(1, 1)
            return out
        weights, biases = [layer.weight for layer in self._linears], [layer.bias for layer in self._linears]
        if self._is_global:
            feat = features.flatten(1)[:, :, None, None]
        else:  # x = x_p + offset / sides, where the op gives the offset
            height, width = features.shape[2:]
            feat = torch.cat((features, _positions(features, height, width)), 1)
            y, x = weights[0][:, -2:].split(1, 1)
            weights[0] = torch.cat((weights[0], y / height, x / width), 1)
        options: dict[str, Any] = {"cell_decode": False, "workspace": workspace, "progress": progress}
        return render(feat, size, weights, biases, self._form, **options)

    def _decode_eagerly(self, features: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """`decode`, all pixels at once."""
        if self._is_global:
            codes = features.flatten(1)[:, :, None, None].expand(-1, -1, height, width)
        else:
            codes = F.interpolate(features, (height, width), mode="nearest-exact")
        inputs = torch.cat((codes, _positions(features, height, width)), 1)
        return self.decoder.imnet.layers(inputs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[operator]

    def _work(self, image: torch.Tensor, size: tuple[int, int]) -> tuple[float, float, float]:
        """Multiplications."""
        pixels = len(image) * math.prod(image.shape[2:])
        decoding = parameters(*self._linears[1:]) / FUSED * len(image) * math.prod(size)
        return parameters(self.encoder) * pixels, 0, decoding

    def _encoding_modules(self) -> list[tuple[nn.Module, float]]:
        return [(layer, parameters(layer)) for layer in self.encoder]

    def bytes_per_pixel(self) -> int:
        """Estimates the memory that `inpaint` needs for a pixel of the input, in addition to workspace and output."""
        values = 4 * self.config.channels + 2 * self.config.latent_channels + 12
        return values * max(4, self._linears[0].weight.element_size())


def _positions(like: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, 2, H, W] of like's dtype: (y, x) of the pixels."""
    y, x = (centres(n, like.device).to(like.dtype) for n in (height, width))
    return torch.stack((y[:, None].expand(height, width), x.expand(height, width))).expand(len(like), -1, -1, -1)


@dataclass(frozen=True)
class AutoencoderLossWeights:
    """alpha and beta of the deck, which does not give their values.

    Args:
        mse: alpha.
        tv: beta.
    """

    mse: float = 1.0
    tv: float = 0.01


def autoencoder_loss(
    prediction: torch.Tensor,
    image: torch.Tensor,
    mask: torch.Tensor,
    weights: AutoencoderLossWeights = AutoencoderLossWeights(),
) -> torch.Tensor:
    """Returns the deck's loss [], alpha MSE + beta TV.

    MSE is the mean over the missing pixels, TV the sum of the squared differences between neighbouring pixels of the
    filled image per pixel and channel.

    Args:
        prediction: of `predict`, [B, 3, H, W].
        image: the original [B, 3, H, W].
        mask: [B, 1, H, W] in [0, 1], 1 = missing.
        weights: alpha and beta.
    """
    mse = ((prediction - image).square() * mask).sum() / (image.shape[1] * mask.sum()).clamp(min=1)
    filled = blend(image, mask, prediction)
    tv = sum(filled.diff(dim=dim).square().sum() for dim in (2, 3)) / filled.numel()
    return weights.mse * mse + weights.tv * tv


def training_step(
    model: ImplicitAutoencoder,
    image: torch.Tensor,
    mask: torch.Tensor,
    weights: AutoencoderLossWeights = AutoencoderLossWeights(),
) -> torch.Tensor:
    """Returns the loss of one step on images [B, 3, H, W] without missing pixels, and masks [B, 1, H, W]."""
    return autoencoder_loss(model.predict(image, mask), image, mask, weights)
