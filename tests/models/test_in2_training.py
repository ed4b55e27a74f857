"""IN²'s training: crops, steps, losses, and the quality of the shipped checkpoint."""

import math

import numpy
import pytest
import torch
from training_cases import resumed, same, vgg19_state

from inr_kernels.models import IN2, IN2Config
from inr_kernels.models.data.crops import in2_batch, in2_shape
from inr_kernels.models.data.photographs import HELD_OUT, TRAINED_ON, photographs
from inr_kernels.models.evaluation.run import compare_inpainting
from inr_kernels.models.in2 import losses as in2_losses
from inr_kernels.models.in2.network import SMALL
from inr_kernels.models.training import in2 as train_in2

TINY = IN2Config(channels=(16, 16), groups=1, blocks=1, heads=2, hidden=(16, 16), norm="none")


def generator(seed=0):
    return numpy.random.default_rng(seed)


def crops(area=32**2, size=2):
    return in2_batch(photographs("astronaut"), generator(), size, area)


@pytest.mark.parametrize("area", [64**2, 256**2, 512**2])
def test_shapes_of_the_adaptive_strategy(area):
    shapes = [in2_shape(rng, area) for rng in [generator()] for _ in range(500)]
    aspects = [math.log(height / width) for height, width in shapes]
    assert all(abs(height * width / area - 1) < 0.02 for height, width in shapes)
    slack = 2 / math.sqrt(area)
    assert max(map(abs, aspects)) < math.log(16 / 9) + slack
    assert min(aspects) < -0.5 and max(aspects) > 0.5 and abs(numpy.mean(aspects)) < 0.05
    assert {side % 8 for shape in shapes for side in shape} == set(range(8))
    assert shapes == [in2_shape(rng, area) for rng in [generator()] for _ in range(500)]


def test_every_batch_has_another_shape():
    photos = photographs("chelsea")  # 300 x 451: too small for a crop of 512²
    shapes = set()
    for area in (40**2, 64**2, 512**2):
        for seed in range(3):
            image, mask = in2_batch(photos, generator(seed), 2, area)
            assert image.shape == (2, 3, *mask.shape[2:]) and mask.shape[:2] == (2, 1)
            assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.02 and 0 < mask.mean() < 1
            assert not torch.equal(image[0], image[1]) and not torch.equal(mask[0], mask[1])
            again = in2_batch(photos, generator(seed), 2, area)
            assert torch.equal(again[0], image) and torch.equal(again[1], mask)
            shapes.add(image.shape)
    assert len(shapes) == 9


def test_training_lowers_the_loss():
    model, batch = IN2(TINY), crops()
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(60):
        loss = train_in2.training_step(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_missing_pixels_have_a_higher_weight():
    image, mask = crops()

    class Off:
        """A prediction that is off by 0.1 where `where` is 1."""

        def __init__(self, where):
            self.where = where

        def predict(self, image, mask):
            return image + 0.1 * self.where

    share = mask.mean().item()
    missing, known = (train_in2.training_step(Off(where), image, mask).item() for where in (mask, 1 - mask))
    assert missing == pytest.approx(0.1 * (share + train_in2.MISSING), rel=1e-4)
    assert known == pytest.approx(0.1 * (1 - share), rel=1e-4)


def test_training_resumes(tmp_path, monkeypatch):
    assert resumed(train_in2, IN2, tmp_path, monkeypatch, "--area", "400").config == SMALL


def test_adversarial_training(tmp_path, monkeypatch):
    """It resumes with its discriminator, but not a run without one."""
    monkeypatch.setattr(train_in2, "SMALL", TINY)
    values, penalties, step, r1 = [], [], train_in2.Adversary.step, in2_losses.r1_penalty

    def watched(self, image, out):
        before = [p.clone() for p in self.discriminator.parameters()]
        values.append(step(self, image, out))
        assert any((a - b).any() for a, b in zip(before, self.discriminator.parameters(), strict=True))
        return values[-1]

    def penalty(discriminator, image):
        penalties.append(r1(discriminator, image))
        return penalties[-1]

    monkeypatch.setattr(train_in2.Adversary, "step", watched)
    monkeypatch.setattr(in2_losses, "r1_penalty", penalty)
    words = "--area", "1600", "--adversarial"
    whole = resumed(train_in2, IN2, tmp_path, monkeypatch, *words)
    assert len(values) == len(penalties) == 9  # four; three, of which two count; two
    assert all(value.isfinite() for value in values + penalties) and min(penalties) > 0
    state = torch.load(tmp_path / "parts.training.pt")
    assert state.keys() == {"model", "optimizer", "discriminator", "discriminator_optimizer", "step"}
    plain = resumed(train_in2, IN2, tmp_path, monkeypatch, *words[:2])
    assert not same(plain, whole)
    with pytest.raises(ValueError, match=r"--resume must find .*discriminator.* in .*; got model, optimizer"):
        resumed(train_in2, IN2, tmp_path, monkeypatch, *words, "--resume")


def test_perceptual_training(tmp_path):
    """The paper's L_per, with weights in a file."""
    torch.save(vgg19_state(), tmp_path / "vgg19.pth")
    features, model, batch = in2_losses.VGG19Features(tmp_path / "vgg19.pth"), IN2(TINY).eval(), crops()
    plain, both = (train_in2.training_step(model, *batch, vgg=vgg) for vgg in (None, features))
    assert both > plain
    both.backward()
    assert model.decoder.head.weight.grad.isfinite().all()


def test_pretrained_fills_holes_of_any_size():
    """Far better than the mean colour, for sides that are multiples of 8 and others."""
    (photo,) = photographs(HELD_OUT)
    for right, bottom in ((412, 308), (409, 303)):
        ours, grey, _ = compare_inpainting(IN2.pretrained(), photo.crop((220, 180, right, bottom)))
        assert ours > grey + 5


def test_notes_of_pretrained():
    model = IN2.pretrained()
    assert model.config == SMALL and not model.training and model.decoder.head.weight.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) < 700_000
    assert HELD_OUT not in TRAINED_ON
    assert model.notes["trained_on"] == [f"skimage.data.{name}" for name in TRAINED_ON]
    assert model.notes["psnr_mean_telea"].keys() == {"256x384", "253x381"}
