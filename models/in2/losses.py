"""IN²'s training losses, section 4.3 of its paper, and the discriminator.

    L_G = -E log D(x'),   L_D = -E log D(x) - E log(1 - D(x')) + r1 E |grad D(x)|²
    generator: l1 L_1 + L_G + perceptual L_per + feature_matching L_fm

x: photographs, x': filled ones, [B, 3, H, W] in [0, 1]. L_1 is not the paper's, and has the weight 0 by default. The
paper lists R1, without the square, among the generator's losses, where it has no gradient; here it is squared and part
of the discriminator's step, as in its source (Mescheder, Geiger and Nowozin, Which Training Methods for GANs do
actually Converge?, ICML 2018). See `r1_penalty` for its scale.

Source: Zhao, Yang and Fu, Learning Position-Aware Implicit Neural Network for Real-World Face Inpainting, 2024,
eq. 5-9.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ..common.classifiers import VGG19, Activations

RELUS = (1, 6, 11, 20, 29)  # relu1_1 ... relu5_1 of VGG-19, by their indices in torchvision's `features`


@dataclass(frozen=True)
class LossWeights:
    """The weights; the defaults are the paper's.

    Args:
        l1: of `l1_loss`, which the paper does not have.
        perceptual: lambda_per.
        feature_matching: lambda_fm. CoordFill and LaMa, which the paper follows, have 100.
        r1: lambda_R, for `r1_penalty`.
    """

    l1: float = 0.0
    perceptual: float = 10.0
    feature_matching: float = 0.1
    r1: float = 10.0


class Discriminator(nn.Module):
    """A patch discriminator of 4 x 4 convolutions with spectral norms and leaky ReLUs: CoordFill's, as in the paper.

    The convolutions have no bias, as CoordFill's with spectral norms.

    Args:
        channels: of all layers but the last; the first three have stride 2.

    Example:
        >>> logits, features = Discriminator((8, 8, 8, 8))(torch.rand(1, 3, 64, 48))
        >>> logits.shape, len(features)
        (torch.Size([1, 1, 6, 4]), 4)
    """

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512)):
        super().__init__()
        layers = zip((3, *channels), (*channels, 1), strict=True)
        convs = (nn.Conv2d(*pair, 4, 2 if i < 3 else 1, 1, bias=False) for i, pair in enumerate(layers))
        self.layers = nn.ModuleList(map(spectral_norm, convs))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """[B, 3, H, W] in [0, 1] -> logits [B, 1, h, w], one per patch, and the activations of every layer before."""
        x, features = 2 * x - 1, []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.layers[-1](x), features


class VGG19Features(Activations):
    """The activations relu1_1 to relu5_1 of VGG-19, each at half the size of the one before; no gradients of weights.

    Args:
        path: a state dict in the layout of torchvision's vgg19 (`features.0.weight`, ...), written by torch.save. The
            classifier's entries are not needed.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no file of torch.save, or a weight is missing.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015.
    """

    def __init__(self, path: str | PathLike[str]):
        super().__init__(path, VGG19, RELUS, "torchvision's vgg19")


def perceptual_features(weights: LossWeights, path: str | PathLike[str] | None) -> VGG19Features | None:
    """Returns the network for `perceptual_loss` from a file of VGG-19's weights, or None if its weight is 0.

    Raises:
        OSError: the file cannot be read.
        ValueError: no file is given, or it is another one.
    """
    if not weights.perceptual:
        return None
    if path is None:
        raise ValueError(
            "the perceptual loss needs the weights of VGG-19: the path of torchvision's vgg19-dcbb9e9d.pth, the state "
            'dict of torchvision.models.vgg19(weights="IMAGENET1K_V1"); or set loss.perceptual=0'
        )
    return VGG19Features(path)


def generator_loss(logits: torch.Tensor) -> torch.Tensor:
    """Returns L_G [], the mean of softplus(-logits), which does not saturate; logits [B, 1, h, w] of filled images."""
    return F.softplus(-logits).mean()


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Returns L_D [] without R1.

    Args:
        real: the discriminator's logits [B, 1, h, w] on photographs.
        fake: its logits [B, 1, h, w] on filled images, which the caller detaches.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(
    discriminator: Callable[[torch.Tensor], tuple[torch.Tensor, object]], image: torch.Tensor
) -> torch.Tensor:
    """Returns E |grad D(x)|² [], the mean over images [B, 3, H, W] in [0, 1] of the squared norm of the gradient.

    D(x) is the mean of an image's logits [h, w]: L_D is a mean over patches, too. The gradient is that for images in
    [-1, 1], which the discriminator's first layer sees. (The sum of the logits, as LaMa has it with a weight of 0.001,
    would grow with the number of patches: with the paper's weight of 10 the penalty is then hundreds of times L_D, and
    the discriminator becomes constant.) It is differentiable with respect to the discriminator's weights.
    """
    image = image.detach().requires_grad_()
    logits, _ = discriminator(image)
    (gradient,) = torch.autograd.grad(logits.flatten(1).mean(1).sum(), image, create_graph=True)
    return (gradient / 2).square().flatten(1).sum(1).mean()


def feature_matching_loss(real: Sequence[torch.Tensor], fake: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns L_fm [], the sum over layers i of the mean |D^i(x) - D^i(x')|, without gradients to the real features.

    real, fake: the discriminator's activations, one [B, C_i, h_i, w_i] per layer.
    """
    losses = (F.l1_loss(b, a.detach()) for a, b in zip(real, fake, strict=True))
    return sum(losses, start=fake[0].new_zeros(()))


def perceptual_loss(vgg: VGG19Features, image: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """Returns L_per [], the weighted sum over VGG-19's relu1_1 to relu5_1 of mean absolute differences.

    image, filled: [B, 3, H, W] in [0, 1].
    Weights 1/32, 1/16, 1/8, 1/4, 1: pix2pixHD's, which the paper cites without a list of layers.
    """
    with torch.no_grad():
        real = vgg(image)
    weights = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)
    losses = (w * F.l1_loss(b, a) for w, a, b in zip(weights, real, vgg(filled), strict=True))
    return sum(losses, start=filled.new_zeros(()))


def l1_loss(prediction: torch.Tensor, image: torch.Tensor, mask: torch.Tensor, missing: float = 5.0) -> torch.Tensor:
    """Returns L_1 [], the mean absolute error of all pixels plus `missing` times that of the missing ones.

    The latter is a mean over each image's missing pixels, then over images, so that the mean over a batch is the mean
    over its parts on several devices.

    prediction, image: [B, 3, H, W]; mask: [B, 1, H, W], 1 = missing.
    """
    error = (prediction - image).abs()
    return error.mean() + missing * mean_of_missing(error, mask)


def l2_loss(prediction: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared error [] of the missing pixels, averaged as in `l1_loss`, with its arguments."""
    return mean_of_missing((prediction - image).square(), mask)


def mean_of_missing(error: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean [] over images of each one's mean error [B, C, H, W] where the mask [B, 1, H, W] is 1."""
    holes = (error * mask).flatten(1).sum(1) / (error.shape[1] * mask.flatten(1).sum(1)).clamp(min=1)
    return holes.mean()
