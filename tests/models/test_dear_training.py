"""DEAR's training: masks, crops, steps, and the quality of the shipped checkpoint."""

import dataclasses
from contextlib import nullcontext

import numpy
import pytest
import torch
from PIL import Image
from torch.nn import Linear
from training_cases import batch, same

from inr_kernels.models import DEAR, DEARConfig
from inr_kernels.models.common.masking import known
from inr_kernels.models.common.smooth import smooth_fill
from inr_kernels.models.data import images
from inr_kernels.models.data.masks import free_form_mask
from inr_kernels.models.data.photographs import HELD_OUT, PART, TRAINED_ON, photographs
from inr_kernels.models.dear.config import SMALL
from inr_kernels.models.evaluation.metrics import psnr
from inr_kernels.models.evaluation.run import compare_joint
from inr_kernels.models.training import config, dear


@pytest.mark.parametrize("size", [(40, 40), (90, 200), (23, 17)])
def test_free_form_masks(size):
    masks = [free_form_mask(size, numpy.random.default_rng(seed), share=0.2) for seed in (1, 1, 2)]
    for mask in masks:
        assert mask.shape == (1, *size) and set(mask.unique().tolist()) == {0, 1}
        assert mask.mean() >= 0.2 and (min(size) < 20 or mask.mean() < 0.5)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_batches():
    """The queries of the whole target show what the input shows."""
    image, mask, coord, cell, rgb = batch("dear", 1, "queries=0", "batch=3", "side=40", "scales=[1,4]")
    side = 40
    assert image.shape == (3, 3, side, side) and mask.shape == (3, 1, side, side)
    n = round(2 / cell[0, 0].item())
    assert side <= n <= 4 * side and coord.shape == (3, n * n, 2) and rgb.shape == (3, n * n, 3)
    target = rgb.unflatten(1, (n, n)).permute(0, 3, 1, 2)
    shrunk = torch.nn.functional.interpolate(target, (side, side), mode="bicubic", antialias=True)
    torch.testing.assert_close(shrunk, image, rtol=0, atol=0.05)


def test_training_lowers_the_loss():
    """From grey to the colours of two crops."""
    structure = DEARConfig(channels=32, features=8, blocks=1, filter_blocks=1, norm="none", hidden=(32, 32))
    model = DEAR(structure)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    crops, objective = batch("dear", 0, "queries=200"), dear.Objective(config.load("dear_small"))
    losses = []
    for _ in range(60):
        loss = sum(objective(model, crops, nullcontext).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_baselines_are_worse_than_the_original():
    photo = photographs(HELD_OUT)[0].crop((220, 180, 284, 244))

    class Perfect(Linear):
        def inpaint(self, image, mask, size):
            return torch.nn.functional.interpolate(image, size, mode="bicubic").clamp(0, 1)

    for scale, minimum in ((1, 99), (2, 20)):
        ours, baseline = compare_joint(Perfect(1, 1), photo, scale)
        assert ours > minimum and 10 < baseline < ours


def test_a_start_has_the_features_of_a_checkpoint():
    """Its output is still the smooth fill."""
    started, shipped = DEAR(SMALL).eval(), DEAR.pretrained()
    grey = DEAR(dataclasses.replace(SMALL, fill="zeros"))
    grey.load_state_dict(shipped.state_dict())
    dear.begin(started, grey)
    assert same(started.encoder, shipped.encoder) and same(started.decoder, shipped.decoder)
    image, mask = torch.rand(1, 3, 20, 24), (torch.rand(1, 1, 20, 24) < 0.3).float()
    *_, fill = started.encode(image, mask)
    torch.testing.assert_close(started.predict(image, mask), fill)
    assert (shipped.predict(image, mask) - fill).abs().max() > 1e-2


# The gain of training over the smooth fill that the network starts from, in dB.
@pytest.mark.parametrize(("scale", "gained"), [(1, 0.4), (2, 0.3), (4, 0.7)])
def test_pretrained_beats_the_baselines(scale, gained):
    """Telea's method; for larger images, bicubic interpolation after a fill with the mean colour."""

    class Start(Linear):  # as `load_start`'s network, see above, without the time of its encoders
        def inpaint(self, image, mask, size):
            return torch.nn.functional.interpolate(smooth_fill(known(image, mask), mask), size, mode="bicubic")

    photo = photographs(HELD_OUT)[0].crop(PART)
    ours, baseline = compare_joint(DEAR.pretrained(), photo, scale)
    start, _ = compare_joint(Start(1, 1), photo, scale)
    assert ours > baseline + (0.5 if scale == 1 else 3) and ours > start + gained


def test_pretrained_sharpens():
    """Without missing pixels, x2 beats bicubic interpolation."""
    photo = photographs(HELD_OUT)[0].crop(PART)
    small, shown = images.shrink(photo, 2)
    image = images.to_tensor(small)
    ours = DEAR.pretrained().inpaint(image, torch.zeros_like(image[:, :1]), shown.size[::-1])
    bicubic = small.resize(shown.size, Image.BICUBIC)
    assert psnr(images.to_image(ours), shown, 0) > psnr(bicubic, shown, 0) + 0.5


def test_notes_of_pretrained():
    model = DEAR.pretrained()
    assert model.config == SMALL and not model.training and model.filter_head.weight.dtype == torch.float32
    trained_on = model.notes["trained_on"]
    assert trained_on["scikit-image"] == TRAINED_ON and len(trained_on) == 2
    assert model.notes["held_out"][0] == f"skimage.data.{HELD_OUT}" and HELD_OUT not in TRAINED_ON
    assert model.notes["recipe"]["steps"] == model.notes["step"]


def test_the_norm_under_vmap_and_with_channels_last():
    from inr_kernels.models.dear.blocks import InstanceNorm

    x = torch.randn(2, 3, 4, 5, 6)
    expected = torch.stack([torch.group_norm(image, 4) for image in x])
    torch.testing.assert_close(torch.vmap(InstanceNorm())(x), expected)
    last = InstanceNorm()(x[0].contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected[0])
