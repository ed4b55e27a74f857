"""IN²'s training: crops, steps, losses, and the quality of the shipped checkpoint."""

import dataclasses
import itertools
import math
from contextlib import nullcontext

import numpy
import pytest
import torch
from training_cases import batch

from inr_kernels.models import DEAR, IN2, IN2Config
from inr_kernels.models.common.smooth import smooth_fill
from inr_kernels.models.data.crops import shape_of
from inr_kernels.models.data.photographs import HELD_OUT, TRAINED_ON, photographs
from inr_kernels.models.evaluation.run import compare_inpainting
from inr_kernels.models.in2.network import SMALL
from inr_kernels.models.training import config, in2

TINY = IN2Config(channels=(16, 16), groups=1, blocks=1, heads=2, hidden=(16, 16), norm="none")


def generator(seed=0):
    return numpy.random.default_rng(seed)


def loss(model, batch):
    """L1 alone, with the missing pixels at five times the weight."""
    options = config.load("in2_small", ["loss.l1=1", "loss.missing=5", "loss.l2=0", "loss.hint=0"])
    terms = in2.Objective(options)(model, batch, nullcontext)
    return sum(terms.values())


@pytest.mark.parametrize("area", [64**2, 256**2, 512**2])
def test_shapes_of_the_adaptive_strategy(area):
    shapes = [shape_of(area, (9 / 16, 16 / 9), rng) for rng in [generator()] for _ in range(500)]
    aspects = [math.log(height / width) for height, width in shapes]
    assert all(abs(height * width / area - 1) < 0.02 for height, width in shapes)
    slack = 2 / math.sqrt(area)
    assert max(map(abs, aspects)) < math.log(16 / 9) + slack
    assert min(aspects) < -0.5 and max(aspects) > 0.5 and abs(numpy.mean(aspects)) < 0.05
    assert {side % 8 for shape in shapes for side in shape} == set(range(8))
    assert shapes == [shape_of(area, (9 / 16, 16 / 9), rng) for rng in [generator()] for _ in range(500)]


def test_every_batch_has_another_shape():
    shapes = set()
    for area in (40**2, 64**2, 512**2):  # the photograph is too small for a crop of 512²
        for step in range(3):
            image, mask = batch("in2", step, f"area={area}", photos=("chelsea",))
            assert image.shape == (2, 3, *mask.shape[2:]) and mask.shape[:2] == (2, 1)
            assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.02 and 0 < mask.mean() < 1
            assert not torch.equal(image[0], image[1]) and not torch.equal(mask[0], mask[1])
            shapes.add(image.shape)
    assert len(shapes) == 9


def test_training_lowers_the_loss():
    model, crops = IN2(TINY), batch("in2", 0, "area=1024")
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(60):
        value = loss(model, crops)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_start_has_the_features_of_a_checkpoint():
    """Its output is still the smooth fill."""
    whole, started = IN2(TINY).eval(), IN2(dataclasses.replace(TINY, fill="smooth")).eval()
    torch.nn.init.ones_(started.decoder.head.weight)
    in2.begin(started, whole)
    assert torch.equal(started.encoder[0].down.ffc.convl2l.weight, whole.encoder[0].down.ffc.convl2l.weight)
    image, mask = torch.rand(1, 3, 20, 24), (torch.rand(1, 1, 20, 24) < 0.3).float()
    fill = smooth_fill(image * (1 - mask), mask)
    torch.testing.assert_close(started.predict(image, mask), fill)
    torch.testing.assert_close(IN2(dataclasses.replace(TINY, fill="smooth")).eval().predict(image, mask), fill)

    in2.begin(again := IN2(SMALL).eval(), shipped := IN2.pretrained())
    assert torch.equal(again.predict(image, mask), shipped.predict(image, mask))
    assert (shipped.predict(image, mask) - fill).abs().max() > 1e-3


def test_missing_pixels_have_a_higher_weight():
    image, mask = (tensor[:1] for tensor in batch("in2", 0, "area=1024"))

    class Off:
        """A prediction that is off by 0.1 where `where` is 1."""

        def __init__(self, where):
            self.where = where

        def predict(self, image, mask):
            return image + 0.1 * self.where

    share = mask.mean().item()
    missing, known = (loss(Off(where), (image, mask)).item() for where in (mask, 1 - mask))
    assert missing == pytest.approx(0.1 * (share + 5), rel=1e-4)
    assert known == pytest.approx(0.1 * (1 - share), rel=1e-4)


def test_hint_is_the_weighted_error_of_each_channel_in_units_of_its_variance():
    torch.manual_seed(0)
    mapped, target = (
        torch.randn(2, 3, 6, 8).double(),
        torch.randn(2, 3, 5, 8).double() * torch.tensor([1, 2, 0.01])[:, None, None],
    )
    mask = (torch.rand(2, 1, 5, 8) < 0.3).double()
    variances, means = ([f(target[:, c]).item() for c in range(3)] for f in (torch.var, torch.mean))
    expected = 0.0
    for i, c, y, x in itertools.product(range(2), range(3), range(5), range(8)):
        weight = 1 + 2 * mask[i, 0, y, x] / mask.mean()
        unit = max(variances[c], 0.1 * sum(variances) / 3)
        expected += weight * (mapped[i, c, y, x] - target[i, c, y, x] + means[c]) ** 2 / unit / (2 * 3 * 5 * 8)
    torch.testing.assert_close(in2.hint_loss(mapped, target, mask), expected, rtol=1e-12, atol=0)


def test_features_learn_those_of_the_teacher(tmp_path):
    """A file of a teacher is the same as the teacher that ships; the teacher is no part of what is trained."""
    DEAR.pretrained().save(tmp_path / "teacher.safetensors")
    fields = ["model={channels: [16], groups: 1, blocks: 1, heads: 2, hidden: [16], fill: smooth}", "loss.hint=1"]
    model, crops = IN2(dataclasses.replace(TINY, channels=(16,), hidden=(16,), fill="smooth", norm="batch")), None
    found = []
    for changes in ([], [f"loss.teacher={tmp_path / 'teacher.safetensors'}"]):
        torch.manual_seed(0)
        options = config.load("in2_small", [*fields, *changes])
        objective = in2.Objective(options)
        crops = batch("in2", 0, "area=1000")
        found.append(objective(model, crops, nullcontext)["hint"].item())
    assert found[0] == found[1] > 0
    conv = objective.parts["hint"]
    optimizer = torch.optim.Adam([*model.parameters(), *conv.parameters()], 3e-3)
    for _ in range(40):
        terms = objective(model, crops, nullcontext)
        optimizer.zero_grad()
        terms["hint"].backward()
        optimizer.step()
    assert terms["hint"].item() < 0.6 * found[0]
    assert list(objective.parts) == ["hint"] and all(p.grad is None for p in objective.teacher.parameters())


def test_the_teacher_is_checked_before_the_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors"):
        in2.check(config.load("in2_small", ["loss.hint=1", f"loss.teacher={tmp_path / 'no.safetensors'}"]))
    in2.check(config.load("in2_small", ["loss.hint=0", "loss.teacher=no.safetensors"]))


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
    trained_on = model.notes["trained_on"]
    assert trained_on["scikit-image"] == TRAINED_ON and len(trained_on) == 2
    assert model.notes["held_out"][0] == f"skimage.data.{HELD_OUT}" and HELD_OUT not in TRAINED_ON
    assert model.notes["recipe"]["steps"] == model.notes["step"]
