"""Feature refinement: fills large holes of large images with the structure that a network finds at a small size."""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from inr_kernels._core.checks import is_positive_int, require
from inr_kernels.local_implicit.functional import WORKSPACE, check_workspace

from .common.frozen import Recomputed, measured
from .common.masking import blend, check_range, check_weights, known
from .common.network import Inpainter
from .common.progress import Progress

EPS = 1e-8  # of the published code, in the comparisons of masks
IMAGES = 15  # of three channels in float32 that exist at a time
EROSION = 7  # radius of the disk, in pixels of the smaller scale


class FeatureRefiner:
    """Inpaints by feature refinement: at each scale of a pyramid, optimizes a network's features so that the
    prediction, reduced to half its size, agrees with that of the next smaller scale.

        images and masks at n = min(1 + round(log2(min(H, W) / min_side)), max_scales) sizes, each half the next
        P_1 = decode(encode(I_1, M_1)),   J_1 = M_1 P_1 + (1 - M_1) I_1
        z_s = encode(I_s, M_s), then `iterations` - 1 steps of Adam on z_s against
              mean over M_s = 0 of |P_s - I_s| + mean over E_s = 1 of |half(P_s) - J_(s-1)|,   P_s = decode(z_s)
        J_s = M_s P_s + (1 - M_s) I_s

    half() is a Gaussian blur (5 x 5, sigma 1) and bilinear interpolation to (h // 2, w // 2). A pixel of M_(s-1) is
    missing where the same filter of M_s is above 0. E_s are the missing pixels of the smaller scale that are covered by
    M_s completely, eroded by a disk of 15 pixels. Every scale is padded by reflection to multiples of `modulo`. Adam
    has PyTorch's defaults. The weights are constant: only the features' gradients are computed, in a copy that shares
    the weights' memory (`Inpainter.frozen`), so the network is unchanged, also after an interrupt.

    `paper=True` is the method of the paper where its text differs from its published code, the default:

    - `iterations` steps and then one more forward, instead of `iterations` forwards with a step after all but the last.
    - No term for the known pixels: the loss is the mean over E_s alone. Without such pixels (thin holes) the result is
      the network's own.
    - Every scale down to about min_side: max_scales does not apply.

    Where the paper says less than the code, both are the code's: the learning rate (0.002 in the paper's text, 0.001
    in its pseudocode), the size at which the mask is eroded, and the composition with the known pixels. The published
    code reduces images above 1.8 megapixels; here every image is refined at its own size.

    Holes and sizes:

    - No hole: the image. Only holes (no pixel is known): the first term is left out.
    - Thin holes, for which E_s is empty: the second term is left out, as in the published code.
    - Images whose shorter side is below about sqrt(2) min_side have one scale: the network's own prediction.
    - Soft masks: each pixel with M > 0 is refined as missing; the result fades by M, as `Inpainter.forward`.
    - Batches: each image as if alone, one after another.

    With `max_memory`, what is kept for the backward is measured at the smallest scale. LaMa's blocks keep one bit per
    activation: Big-LaMa 0.14 GB at 1024 x 1024, where PyTorch keeps 9.0 GB. Where the bound requires it, the stages of
    IN2's decoder are computed again in the backward, if that keeps less. LaMa's first and last layers run in bands of
    rows. In addition to the bound there are the features with their gradient and Adam's
    two moments, the images, and the working memory of one layer: with Big-LaMa 0.7 KB per pixel in all.

    Args:
        network: any `Inpainter`.
        min_side: the smallest scale's shorter side is about this: the size of the network's training images.
        max_scales: maximum number of scales; 1: the network's own prediction.
        iterations: forwards per scale; 1: no refinement.
        lr: learning rate of Adam.
        modulo: see above. 1: no padding.
        max_memory: bytes that activations kept for the backward may take at the largest scale; None: no bound.
        paper: see above.
        workspace: bytes of working memory for layers in bands of rows, as in `Inpainter.decode`.

    Raises:
        TypeError: network is not an `Inpainter`.
        ValueError: a number that is not positive, or a min_side below about 1.4 times the network's.

    Source: Kulshreshtha, Pugh and Jiddi, Feature Refinement to Improve High Resolution Image Inpainting, 2022; its code
    in LaMa's repository.

    Example:
        >>> from inr_kernels.models import LaMa, LaMaConfig
        >>> refiner = FeatureRefiner(LaMa(LaMaConfig(features=8, blocks=1)), min_side=16, iterations=3)
        >>> image, mask = torch.rand(1, 3, 43, 59), torch.zeros(1, 43, 59, dtype=torch.bool)
        >>> mask[:, 5:32, 8:40] = True  # missing
        >>> refiner(image, mask).shape
        torch.Size([1, 3, 43, 59])
    """

    def __init__(
        self,
        network: Inpainter,
        min_side: int = 512,
        max_scales: int = 3,
        iterations: int = 15,
        lr: float = 0.002,
        modulo: int = 8,
        max_memory: int | None = None,
        *,
        paper: bool = False,
        workspace: int = WORKSPACE,
    ):
        if not isinstance(network, Inpainter):
            raise TypeError(f"network must be an Inpainter, with encode and decode; got {type(network).__name__}")
        integers = {"min_side": min_side, "max_scales": max_scales, "iterations": iterations, "modulo": modulo}
        for name, value in integers.items():
            require(is_positive_int(value), name, "be a positive integer", repr(value))
        # The smallest scale's shorter side is at least min_side / sqrt(2).
        minimum = math.ceil(math.sqrt(2) * max(network.min_side, 2))
        require(min_side >= minimum, "min_side", f"be at least {minimum} for {network.NETWORK}", min_side)
        require(0 < lr < math.inf, "lr", "be positive and finite", lr)
        require(max_memory is None or is_positive_int(max_memory), "max_memory", "be bytes or None", repr(max_memory))
        check_workspace(workspace)
        self.network, self.min_side, self.max_scales, self.modulo = network, min_side, max_scales, modulo
        self.iterations, self.lr, self.paper = iterations, lr, paper
        self.max_memory, self.workspace = max_memory, workspace

    def __call__(self, image: torch.Tensor, mask: torch.Tensor, *, progress: Progress = None) -> torch.Tensor:
        """Returns the inpainted image [B, 3, H, W] in the image's dtype; where M = 0 its own values, bit for bit.

        The result has no gradient. It is the same in every call with the same inputs, also for callers under
        `torch.no_grad` or `torch.inference_mode`: gradients are enabled inside, and the result is an ordinary tensor.

        Args:
            image: [B, 3, H, W], floating point, in [0, 1]; values under the mask are ignored, NaNs too.
            mask: [B, 1, H, W] or [B, H, W], bool, integer or floating point, 1 = missing.
            progress: called after each forward of the network as progress(forwards done, forwards in all).

        Raises:
            TypeError, ValueError: as `Inpainter.inpaint`; ValueError also for a max_memory that is too small.
        """
        with torch.inference_mode(False), torch.no_grad():
            mask = self.network._mask(image, mask)
            check_range(image, mask)
            image, mask = (t.clone() if t.is_inference() else t for t in (image.detach(), mask.detach()))
            done, total = itertools.count(1), len(image) * self.forwards(*image.shape[2:])

            def tick() -> None:
                if progress is not None:
                    progress(next(done), total)

            network = self.network.frozen(self.workspace)
            out = [self._refined(network, image[i : i + 1], mask[i : i + 1], tick) for i in range(len(image))]
            return torch.cat(out) if out else image.clone()

    def scales(self, height: int, width: int) -> int:
        """The number of scales for an image of that size."""
        n = 1 + round(max(0.0, math.log2(min(height, width) / self.min_side)))
        return n if self.paper else min(n, self.max_scales)

    def forwards(self, height: int, width: int) -> int:
        """The number of forwards for an image of that size: one at the smallest scale, `iterations` at the others."""
        return 1 + (self.scales(height, width) - 1) * (self.iterations + self.paper)

    def bytes_per_pixel(self) -> int:
        """Estimates the memory that a call needs for a pixel of the image, in addition to the workspace."""
        return self.network.bytes_per_refined_pixel() + IMAGES * 3 * 4

    def _refined(
        self, network: Inpainter, image: torch.Tensor, mask: torch.Tensor, tick: Callable[[], None]
    ) -> torch.Tensor:
        """The result for one image, [1, 3, H, W]."""
        size = image.shape[2:]
        if not mask.any():
            for _ in range(self.forwards(*size)):
                tick()
            return image.clone()
        parameter = next(network.parameters())
        dtype = torch.promote_types(parameter.dtype, torch.float32)  # of everything but the network
        hole = (mask > 0).to(dtype)
        images, holes = [known(image.to(dtype), hole)], [hole]
        for _ in range(self.scales(*size) - 1):
            images.append(half(images[-1]))
            holes.append((half(holes[-1]) >= EPS).to(dtype))
        bound = _Bound(network, self.max_memory) if self.max_memory and len(images) > 1 else None
        out = None
        for level, hole in zip(reversed(images), reversed(holes), strict=True):
            scale = _Scale(network, level, hole, self.modulo, self.workspace)
            if out is None:
                prediction = scale.decode() if bound is None else bound.measure(scale)
                check_weights(self.network, prediction)
                tick()
            else:
                if bound is not None:
                    bound.apply(scale)
                scale.optimize(out, self.iterations - (not self.paper), self.lr, not self.paper, tick)
                prediction = scale.decode()
                tick()
            prediction = prediction[..., : level.shape[2], : level.shape[3]].to(dtype).clamp(0, 1)
            out = torch.where(hole > 0, prediction, level)
        assert out is not None  # there is at least one scale
        return blend(image, mask, out.to(image.dtype))


class _Scale:
    """An image [1, 3, h, w] of the pyramid, its mask [1, 1, h, w], and the features of both, padded."""

    def __init__(self, network: Inpainter, image: torch.Tensor, hole: torch.Tensor, modulo: int, workspace: int):
        self.network, self.hole, self.workspace = network, hole, workspace
        rows, columns = (_reflected(n, modulo, image.device) for n in image.shape[2:])
        self.image, self.padded_hole = (t[:, :, rows][..., columns] for t in (image, hole))
        leaves, self.structure = tree_flatten(network.encode(self.image, self.padded_hole))
        found = [leaf.is_floating_point() if isinstance(leaf, torch.Tensor) else False for leaf in leaves]
        # In the image's dtype, float32 or float64: a step of Adam may be too small for half precision.
        self.features = [leaf.to(image.dtype, copy=True) for leaf, is_one in zip(leaves, found, strict=True) if is_one]
        self.leaves = [leaf.dtype if is_one else leaf for leaf, is_one in zip(leaves, found, strict=True)]

    def decode(self) -> torch.Tensor:
        """The prediction of the features, [1, 3, H, W] with the padding."""
        tensors = iter(self.features)
        leaves = [next(tensors).to(leaf) if isinstance(leaf, torch.dtype) else leaf for leaf in self.leaves]
        height, width = self.image.shape[2:]
        features = tree_unflatten(leaves, self.structure)
        return self.network.decode(features, (height, width), workspace=self.workspace)

    def optimize(self, below: torch.Tensor, steps: int, lr: float, known_term: bool, tick: Callable[[], None]) -> None:
        """Takes steps on the features; below: the result at the smaller scale; tick: called after each step."""
        known_weight = _mean_weights(1 - self.padded_hole) if known_term else None
        inner_weight = _mean_weights(_eroded((reduced(self.hole) >= 1 - EPS).to(self.hole.dtype)))
        for feature in self.features:
            feature.requires_grad_()
        optimizer = torch.optim.Adam(self.features, lr)
        for _ in range(steps):
            with torch.enable_grad():
                prediction = self.decode()
            gradient = self._loss_gradient(prediction.detach(), below, known_weight, inner_weight)
            # A power of two, against underflow in half precision.
            loss_scale = 2.0**16 if prediction.dtype == torch.float16 else 1.0
            gradient = (gradient * loss_scale).to(prediction.dtype)
            gradients = torch.autograd.grad(prediction, self.features, gradient, allow_unused=True)
            for feature, found in zip(self.features, gradients, strict=True):
                feature.grad = found if found is None or loss_scale == 1 else found / loss_scale
            del prediction, gradient, gradients, found  # before the next forward
            optimizer.step()
            tick()

    def _loss_gradient(
        self,
        prediction: torch.Tensor,
        below: torch.Tensor,
        known_weight: torch.Tensor | None,
        inner_weight: torch.Tensor,
    ) -> torch.Tensor:
        """The gradient of the loss with respect to the padded prediction."""
        height, width = self.hole.shape[2:]
        prediction = prediction.to(self.image.dtype).requires_grad_()
        with torch.enable_grad():
            loss = (inner_weight * (half(prediction[..., :height, :width]) - below).abs()).sum()
            if known_weight is not None:
                loss = loss + (known_weight * (prediction - self.image).abs()).sum()
        return torch.autograd.grad(loss, prediction)[0]


class _Bound:
    """Keeps the memory for the backward within `max_memory` bytes: measures it at one scale, plans for the others."""

    def __init__(self, network: Inpainter, max_memory: int):
        self.max_memory = max_memory
        self.stages = [module for module in network.modules() if isinstance(module, Recomputed)]
        self.others = self.pixels = 0  # bytes that autograd kept outside of the stages, at a scale of so many pixels

    def measure(self, scale: _Scale) -> torch.Tensor:
        """The scale's prediction; measures what autograd would keep of it."""
        for stage in self.stages:
            stage.active, stage.measures = False, True
        for feature in scale.features:
            feature.requires_grad_()
        with torch.enable_grad(), measured(scale.network) as storages:
            prediction = scale.decode().detach()
        for stage in self.stages:
            stage.measures = False
        self.others, self.pixels = sum(storages.values()), scale.image[0, 0].numel()
        return prediction

    def apply(self, scale: _Scale) -> None:
        """Chooses the stages that are computed again, for the memory of this scale."""
        factor = scale.image[0, 0].numel() / self.pixels
        excess = factor * (self.others + sum(stage.kept for stage in self.stages)) - self.max_memory
        for stage in sorted(self.stages, key=lambda stage: stage.kept_if_active - stage.kept):
            saving = factor * (stage.kept - stage.kept_if_active)
            stage.active = excess > 0 and saving > 0
            excess -= saving * stage.active
        sides = " x ".join(map(str, scale.hole.shape[2:]))
        needed = math.ceil(self.max_memory + excess)
        require(excess <= 0, "max_memory", f"be at least {needed} bytes for {sides} pixels", self.max_memory)


def half(x: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, C, h // 2, w // 2]: a Gaussian blur of 5 x 5 pixels, sigma 1, then `reduced`."""
    taps = torch.exp(-0.5 * torch.arange(-2, 3, dtype=x.dtype, device=x.device) ** 2)
    taps = taps / taps.sum()
    images = F.pad(x, (2, 2, 2, 2), mode="reflect").flatten(0, 1).unsqueeze(1)
    blurred = F.conv2d(F.conv2d(images, taps.view(1, 1, 1, 5)), taps.view(1, 1, 5, 1))
    return reduced(blurred.squeeze(1).unflatten(0, x.shape[:2]))


def reduced(x: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, C, h // 2, w // 2] by bilinear interpolation."""
    size = [n // 2 for n in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _eroded(mask: torch.Tensor) -> torch.Tensor:
    """A mask [1, 1, h, w] of zeros and ones, eroded by a disk of 15 pixels; outside of the image it counts as 1."""
    y = torch.arange(-EROSION, EROSION + 1, dtype=mask.dtype, device=mask.device)
    disk = (y.abs() <= (EROSION**2 - y[:, None] ** 2).sqrt().round()).to(mask.dtype)
    return (F.conv2d(1 - mask, disk[None, None], padding=EROSION) < 0.5).to(mask.dtype)


def _mean_weights(mask: torch.Tensor) -> torch.Tensor:
    """Weights [1, 1, h, w] of a mean over three channels of the mask's pixels; all zero if it has none."""
    return mask / (3 * mask.sum()).clamp(min=1)


def _reflected(n: int, modulo: int, device: torch.device) -> torch.Tensor:
    """The indices that pad n pixels at their end, by reflection, to the next multiple."""
    period = max(2 * (n - 1), 1)
    index = torch.arange(-(-n // modulo) * modulo, dtype=torch.long, device=device) % period
    return torch.minimum(index, period - index)
