"""DEAR's training: its masks, its steps, and what the shipped checkpoint can do."""

import numpy
import pytest
import torch
from training_cases import resumed, same

from inr_kernels.models import DEAR, DEARConfig
from inr_kernels.models.data import images
from inr_kernels.models.dear.network import PRETRAINED, SMALL
from inr_kernels.models.evaluation.metrics import psnr
from inr_kernels.models.training import dear as train_dear


@pytest.mark.parametrize("size", [(40, 40), (90, 200), (23, 17)])
def test_free_form_masks(size):
    masks = [train_dear.free_form_mask(size, numpy.random.default_rng(seed), share=0.2) for seed in (1, 1, 2)]
    for mask in masks:
        assert mask.shape == (1, *size) and set(mask.unique().tolist()) == {0, 1}
        assert mask.mean() >= 0.2 and (min(size) < 20 or mask.mean() < 0.5)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_batches():
    photos = train_dear.photographs(train_dear.TRAINED_ON[0])
    batches = [train_dear.batch(photos, numpy.random.default_rng(seed), 3) for seed in (1, 1, 2)]
    for image, mask, target in batches:
        side = train_dear.SIDE
        assert image.shape == (3, 3, side, side) and mask.shape == (3, 1, side, side)
        assert target.shape[:2] == (3, 3) and side <= target.shape[2] == target.shape[3] <= 4 * side
        shrunk = torch.nn.functional.interpolate(target, (side, side), mode="bicubic", antialias=True)
        torch.testing.assert_close(shrunk, image, rtol=0, atol=0.05)
    assert all(torch.equal(a, b) for a, b in zip(*batches[:2], strict=True))
    assert not torch.equal(batches[0][0], batches[2][0])


def test_training_lowers_the_loss():
    """From grey to the colours of two crops."""
    config = DEARConfig(channels=32, features=8, blocks=1, filter_blocks=1, norm="none", hidden=(32, 32))
    model = DEAR(config)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    crops = train_dear.batch(train_dear.photographs("astronaut"), numpy.random.default_rng(0), 2)
    losses = []
    for _ in range(60):
        loss = train_dear.training_step(model, *crops, 200)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_training_resumes_where_it_stopped(tmp_path, monkeypatch):
    assert resumed(train_dear, DEAR, tmp_path, monkeypatch, "--queries", "16").config == SMALL


def test_the_rivals_are_what_they_are_called():
    """Mean-filled bicubic and Telea leave the known pixels alone, and are worse than the original."""
    photo = train_dear.photographs(train_dear.HELD_OUT)[0].crop((220, 180, 284, 244))

    class Perfect:
        def inpaint(self, image, mask, size):
            return torch.nn.functional.interpolate(image, size, mode="bicubic").clamp(0, 1)

    for scale, least in ((1, 99), (2, 20)):
        ours, rival = train_dear.measure(Perfect(), photo, scale)
        assert ours > least and 10 < rival < ours


def test_a_start_has_the_features_alone():
    """Of the shipped network, but its pictures are the smooth fill."""
    started, shipped = train_dear.started(PRETRAINED).eval(), DEAR.pretrained()
    assert same(started.encoder, shipped.encoder) and same(started.decoder, shipped.decoder)
    image, mask = torch.rand(1, 3, 20, 24), (torch.rand(1, 1, 20, 24) < 0.3).float()
    *_, fill = started.encode(image, mask)
    torch.testing.assert_close(started(image, mask), fill)
    assert (shipped(image, mask) - fill).abs().max() > 1e-2


# What training gained or, in the holes, lost to the smooth fill that the network starts from, in dB.
@pytest.mark.parametrize(("scale", "gained"), [(1, -0.2), (2, 0.2), (4, -0.4)])
def test_pretrained_beats_its_rivals(scale, gained):
    """Telea's method; for larger pictures, bicubic interpolation of the one with the mean colour in its holes."""
    photo = train_dear.photographs(train_dear.HELD_OUT)[0].crop(train_dear.PART)
    ours, rival = train_dear.measure(DEAR.pretrained(), photo, scale)
    start, _ = train_dear.measure(train_dear.started(PRETRAINED), photo, scale)
    assert ours > rival + (0.5 if scale == 1 else 3) and ours > start + gained


def test_pretrained_sharpens():
    """What is known, twice as large, beats its bicubic interpolation."""
    photo = train_dear.photographs(train_dear.HELD_OUT)[0].crop(train_dear.PART)
    small, shown = images.shrink(photo, 2)
    image = images.to_tensor(small)
    ours = DEAR.pretrained().inpaint(image, torch.zeros_like(image[:, :1]), shown.size[::-1])
    bicubic = small.resize(shown.size, train_dear.Image.BICUBIC)
    assert psnr(images.to_image(ours), shown, 0) > psnr(bicubic, shown, 0) + 0.5


def test_pretrained_says_what_it_is():
    model = DEAR.pretrained()
    assert model.config == SMALL and not model.training and model.filter_head.weight.dtype == torch.float32
    assert train_dear.HELD_OUT not in train_dear.TRAINED_ON
    assert model.notes["trained_on"] == [f"skimage.data.{name}" for name in train_dear.TRAINED_ON]
    assert {f"x{scale}" for scale in train_dear.SCALES} == model.notes["psnr_and_rival"].keys()
