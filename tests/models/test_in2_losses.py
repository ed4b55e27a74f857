"""IN²'s losses: values, gradients, and both steps of the training together."""

import math

import pytest
import torch
from training_cases import vgg19_state

from inr_kernels.models import IN2, IN2Config
from inr_kernels.models.in2.losses import (
    Discriminator,
    LossWeights,
    VGG19Features,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    l1_loss,
    perceptual_features,
    perceptual_loss,
    r1_penalty,
)


def test_adversarial_losses_are_the_papers():
    logits = torch.tensor([[-2.0, 0.5], [3.0, 0.0]], dtype=torch.double)
    other = logits.flip(0)
    chance = torch.sigmoid(logits)
    torch.testing.assert_close(generator_loss(logits), -chance.log().mean())
    expected = -chance.log().mean() - (1 - torch.sigmoid(other)).log().mean()
    torch.testing.assert_close(discriminator_loss(logits, other), expected)
    assert generator_loss(torch.tensor([-200.0])) == 200  # where log D(x') is -infinity


def test_generator_loss_does_not_saturate():
    logits = torch.tensor([-50.0], requires_grad=True)
    generator_loss(logits).backward()
    assert logits.grad == -1


def test_weights():
    """The paper's, which has no L1."""
    assert LossWeights() == LossWeights(l1=0, perceptual=10, feature_matching=0.1, r1=10)


def test_discriminator():
    model = Discriminator()
    logits, features = model(torch.rand(2, 3, 96, 64))
    assert logits.shape == (2, 1, 10, 6)
    assert [tuple(f.shape[1:]) for f in features] == [(64, 48, 32), (128, 24, 16), (256, 12, 8), (512, 11, 7)]
    assert sum(p.numel() for p in model.parameters()) == 16 * (
        3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512
    )  # no bias
    for layer in model.eval().layers:
        bound = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert 0.5 < bound < 1.5  # an estimate that a few passes bring to 1


@pytest.mark.parametrize("patches", [1, 6])
def test_r1_is_the_squared_norm_of_the_mean_logits_gradient(patches):
    """For images in [-1, 1], and however many patches there are."""
    weight = torch.randn(3, 4, 5, dtype=torch.double, requires_grad=True)

    def linear(x):
        logit = ((2 * x - 1) * weight).sum((1, 2, 3))
        return logit.view(-1, 1, 1, 1).expand(-1, 1, 1, patches), []

    penalty = r1_penalty(linear, torch.rand(2, 3, 4, 5, dtype=torch.double))
    torch.testing.assert_close(penalty, weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_r1_lets_the_discriminator_separate():
    """Noise from noise with a grey square. With the gradient of the logits' sum the loss stayed at 2 ln 2 = 1.3863."""
    torch.manual_seed(0)
    judge, weights = Discriminator((8, 16, 16, 16)), LossWeights()
    optimizer = torch.optim.Adam(judge.parameters(), 3e-3)
    for _ in range(25):
        image = torch.rand(2, 3, 48, 48)
        filled = image.clone()
        filled[..., 12:36, 12:36] = 0.5
        loss = discriminator_loss(judge(image)[0], judge(filled)[0])
        optimizer.zero_grad()
        (loss + weights.r1 * r1_penalty(judge, image)).backward()
        optimizer.step()
    assert loss < 1.2


def test_feature_matching():
    real = [torch.zeros(1, 2, 3, 3, requires_grad=True), torch.zeros(1, 4, 2, 2, requires_grad=True)]
    fake = [torch.full((1, 2, 3, 3), 2.0, requires_grad=True), torch.full((1, 4, 2, 2), -3.0, requires_grad=True)]
    loss = feature_matching_loss(real, fake)
    loss.backward()
    assert loss == 5 and real[0].grad is None and fake[1].grad.sum() == -1


def test_perceptual_loss(tmp_path):
    state = vgg19_state()
    torch.save(state, tmp_path / "vgg19.pth")
    vgg = VGG19Features(tmp_path / "vgg19.pth")
    assert not any(p.requires_grad for p in vgg.parameters())
    image, filled = torch.rand(2, 1, 3, 37, 33)
    filled.requires_grad_()
    maps = vgg(image)
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 37, 33), (128, 18, 16), (256, 9, 8), (512, 4, 4), (512, 2, 2)]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    first = torch.conv2d(
        (image - mean.view(3, 1, 1)) / std.view(3, 1, 1), state["features.0.weight"], state["features.0.bias"], 1, 1
    )
    torch.testing.assert_close(maps[0], first.relu())
    pairs = zip((1 / 32, 1 / 16, 1 / 8, 1 / 4, 1), maps, vgg(filled), strict=True)
    loss = perceptual_loss(vgg, image, filled)
    torch.testing.assert_close(loss, sum(w * (a - b).abs().mean() for w, a, b in pairs))
    loss.backward()
    assert filled.grad.any() and perceptual_loss(vgg, image, image) == 0


def test_perceptual_loss_needs_a_file():
    with pytest.raises(
        ValueError, match=r"VGG-19: the path of torchvision's vgg19-\w+\.pth.*; or set loss.perceptual=0"
    ):
        perceptual_features(LossWeights(), None)
    assert perceptual_features(LossWeights(perceptual=0), None) is None


def test_l1():
    image, mask = torch.rand(2, 3, 4, 5), (torch.rand(2, 1, 4, 5) < 0.5).float()
    mask[0, 0, 0, 0] = 1
    other = torch.rand_like(image)
    error = (other - image).abs()
    expected = error.mean() + 5 * error[mask.expand_as(image) == 1].mean()
    torch.testing.assert_close(l1_loss(other, image, mask), expected)
    torch.testing.assert_close(l1_loss(other, image, 0 * mask), error.mean())


def test_other_weights_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"other\.pth must hold the weights of torchvision's vgg19; got no features\.0\.bias"
    ):
        VGG19Features(tmp_path / "other.pth")
    state = vgg19_state()
    state["features.2.weight"] = state["features.2.weight"][:, :3]
    torch.save(state, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match=r"weights of torchvision's vgg19; got other shapes of features\.2\.weight"):
        VGG19Features(tmp_path / "shape.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(
        ValueError, match=r"text\.pth cannot be read: it is neither a safetensors file nor one of torch"
    ):
        VGG19Features(tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError):
        VGG19Features(tmp_path / "none.pth")


def test_both_steps_of_a_training():
    model = IN2(IN2Config(channels=(16, 16, 32), blocks=1, groups=1, heads=4, hidden=(16, 16)))
    judge, weights = Discriminator((8, 8, 8, 8)), LossWeights()
    image, mask = torch.rand(2, 3, 40, 36), torch.zeros(2, 1, 40, 36)
    mask[..., 10:25, 8:30] = 1
    filled = model(image, mask)
    real, _ = judge(image)
    fake, _ = judge(filled.detach())
    loss = discriminator_loss(real, fake) + weights.r1 * r1_penalty(judge, image)
    assert math.isfinite(loss.item())
    loss.backward()
    assert all(p.grad.any() for p in judge.parameters()) and model.decoder.head.weight.grad is None
    with torch.no_grad():
        _, real = judge(image)
    fake, features = judge(filled)
    (generator_loss(fake) + weights.feature_matching * feature_matching_loss(real, features)).backward()
    assert model.decoder.head.weight.grad.any() and model.encoder[0].down.ffc.convl2l.weight.grad.any()
