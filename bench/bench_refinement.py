"""Feature refinement with Big-LaMa, against the published loop with LaMa's own operations in PyTorch.

Eager is LaMa's order of operations, without gradients of the weights, and the published loop: masks are reduced and
eroded in every iteration. Both run the smallest scale once and refine the next, which is twice as large.
The minimum work: forwards and backwards of the layers behind the features, where a backward, of the features alone,
costs as much as a forward (the 3 x 3 convolutions counted directly, Fourier transforms not counted).
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from inr_kernels.models import FeatureRefiner, LaMa, LaMaConfig

from .bench_fourier_unit import lama_block
from .conftest import DEVICE

BIG = LaMaConfig(blocks=18)
SMOKE = LaMaConfig(features=8, blocks=1)


def problem(smoke):
    """Returns a LaMa of random weights, an image and a mask with a hole in the middle, and the number of forwards."""
    torch.manual_seed(0)
    config, side, iterations = (SMOKE, 48, 2) if smoke else (BIG, 1024, 15) if DEVICE == "cuda" else (BIG, 512, 3)
    model = LaMa(config).to(DEVICE).eval().requires_grad_(False)
    mask = torch.zeros(1, 1, side, side, device=DEVICE)
    mask[..., side // 4 : -side // 4, side // 4 : -side // 4] = 1
    return model, torch.rand(1, 3, side, side, device=DEVICE), mask, iterations


def decode(model, features):
    """Computes the layers behind the features, in LaMa's order of operations."""
    start = model.split
    for layer in model.model[start : start + model.config.blocks]:
        features = lama_block(layer, *features)
    return model.model[start + model.config.blocks :](features)


def published(model, image, mask, iterations):
    """Runs the published loop at two scales."""
    from inr_kernels.models.refinement import _eroded, half, reduced

    small, small_mask = half(image * (1 - mask)), (half(mask) > 0).float()
    with torch.no_grad():
        below = decode(model, model.encode(small, small_mask))
        below = small_mask * below + (1 - small_mask) * small
        features = [part.requires_grad_() for part in model.encode(image, mask)]
    optimizer, expanded = torch.optim.Adam(features, 0.002), mask.expand_as(image)
    for step in range(iterations):
        optimizer.zero_grad()
        prediction = decode(model, features)
        inner = _eroded((reduced(mask) == 1).float()).expand_as(below) > 0
        loss = F.l1_loss(half(prediction)[inner], below[inner]) + F.l1_loss(
            prediction[expanded == 0], image[expanded == 0]
        )
        if step < iterations - 1:
            loss.backward()
            optimizer.step()
    return mask * prediction.detach() + (1 - mask) * image


def flops(config, side, iterations):
    """Returns the FLOPs of the layers behind the features."""
    with torch.device("meta"):
        model = LaMa(config).eval()
        image, mask = torch.empty(1, 3, side, side), torch.empty(1, 1, side, side)
        features = model.encode(image, mask)
        with FlopCounterMode(display=False) as counter:
            decode(model, features)
    return counter.get_total_flops() * (2 * iterations - 1 + 1 / 4)


@pytest.mark.parametrize("implementation", ["eager", "ours"])
def bench_refinement(measure, smoke, implementation):
    from inr_kernels.models.common.frozen import measured

    model, image, mask, iterations = problem(smoke)
    side = image.shape[2]
    ours = implementation == "ours"
    network = model.frozen() if ours else model
    features = tuple(part.requires_grad_() for part in network.encode(image, mask))
    with measured(network) as storages:
        network.decode(features, (side, side)) if ours else decode(model, features)
    kept = sum(storages.values())
    del network, features, storages
    refiner = FeatureRefiner(model, min_side=side // 2, iterations=iterations)
    measure(
        lambda: refiner(image, mask) if ours else published(model, image, mask, iterations),
        op="refinement",
        case=f"Big-LaMa, {side // 2}² and {side}², {iterations} forwards",
        implementation=implementation,
        dtype=torch.float32,
        flops=lambda: flops(model.config, side, iterations),
        rounds=1,
        saved_bytes=kept,
    )
