"""Metrics against scikit-image, SciPy, torchmetrics and torchvision."""

import math

import numpy
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchmetrics.functional.image.lpips as reference
from skimage import metrics as skimage
from torch import nn

from inr_kernels.models.evaluation import perceptual
from inr_kernels.models.evaluation.metrics import CONVENTIONS, LUMA, Convention, compare, levels, psnr


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair(height=40, width=50):
    target = torch.rand(1, 3, height, width)
    return (target + 0.1 * torch.randn_like(target)).clamp(0, 1), target


def arrays(*images, kind="float", crop=0):
    inner = slice(crop, -crop or None)
    return [levels(image, kind)[0, :, inner, inner].double().numpy() for image in images]


@pytest.mark.parametrize(
    ("name", "kind", "border", "options"),
    [
        ("plain", "round", 0, {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}),
        ("dear", "float", 0, {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}),
        ("liif-div2k", "float", 8, {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}),
        *((name, "truncate", 0, {}) for name in ("coordfill", "in2")),
    ],
)
def test_colour_conventions_are_scikit_images(name, kind, border, options):
    found = compare(*pair(), convention=CONVENTIONS[name], scale=2)
    torch.manual_seed(0)
    a, b = arrays(*pair(), kind=kind, crop=border)
    assert found["psnr"] == pytest.approx(skimage.peak_signal_noise_ratio(b, a, data_range=1), abs=1e-5)
    expected = skimage.structural_similarity(a, b, win_size=11, data_range=1, channel_axis=0, **options)
    assert found["ssim"] == pytest.approx(expected, abs=1e-6)
    assert found["l1"] == pytest.approx(numpy.abs(a - b).mean(), abs=1e-9)


def test_liif_compares_the_luminance_without_a_border():
    a, b = pair()
    found = compare(a, b, convention=CONVENTIONS["liif"], scale=2.5)["psnr"]
    difference = ((a - b) * torch.tensor([65.738, 129.057, 25.064]).view(3, 1, 1) / 256).sum(1)[:, 3:-3, 3:-3]
    assert found == pytest.approx(-10 * difference.square().mean().log10().item(), abs=1e-4)
    assert sum(LUMA) == pytest.approx(219.859 / 256)


def test_lamas_ssim_has_zeros_around_the_picture():
    """From its definition: a window of 11 pixels, sigma 1.5, around every pixel."""
    a, b = (levels(image, "truncate").double() for image in pair(13, 17))
    line = torch.exp(-(torch.arange(-5.0, 6).double() ** 2) / (2 * 1.5**2))
    window = (line / line.sum()).outer(line / line.sum()).expand(3, 1, 11, 11)

    def mean(x):
        return F.conv2d(x, window, padding=5, groups=3)

    of_a, of_b = mean(a), mean(b)
    variances = mean(a * a) - of_a**2 + mean(b * b) - of_b**2
    covariance = mean(a * b) - of_a * of_b
    ssim = (2 * of_a * of_b + 1e-4) * (2 * covariance + 9e-4) / ((of_a**2 + of_b**2 + 1e-4) * (variances + 9e-4))
    assert compare(a, b, convention=CONVENTIONS["lama"])["ssim"] == pytest.approx(ssim.mean().item(), abs=1e-6)


def test_holes_are_measured_alone():
    a, b = pair()
    mask = torch.zeros(1, 1, 40, 50)
    assert math.isnan(compare(a, b, mask)["psnr_holes"])
    mask[..., 3:9, 4:20] = 1
    x, y = arrays(a, b, kind="round")
    expected = 10 * math.log10(1 / ((x - y)[:, 3:9, 4:20] ** 2).mean())
    assert compare(a, b, mask)["psnr_holes"] == pytest.approx(expected, abs=1e-5)


def test_levels():
    every = torch.arange(256).div(255)
    assert all(torch.equal(levels(every, kind), every) for kind in ("float", "round", "truncate"))
    between = torch.tensor([-1, 10.4 / 255, 10.6 / 255, 2])
    assert (levels(between, "round") * 255).round().tolist() == [0, 10, 11, 255]
    assert (levels(between, "truncate") * 255).round().tolist() == [0, 10, 10, 255]


def test_equal_pictures():
    image = torch.rand(1, 3, 12, 12)
    assert compare(image, image) == {"psnr": math.inf, "ssim": pytest.approx(1), "l1": 0}


@pytest.mark.parametrize(
    ("size", "convention", "rule"),
    [
        ((11, 10), Convention(""), "the picture must have sides of at least 11 pixels; got [11, 10]"),
        ((20, 20), Convention("", border=5), "the picture must have sides of at least 11 pixels; got [10, 10]"),
    ],
)
def test_pictures_that_are_too_small(size, convention, rule):
    with pytest.raises(ValueError) as error:
        compare(torch.rand(1, 3, *size), torch.rand(1, 3, *size), convention=convention)
    assert str(error.value) == rule


def test_sizes_differ():
    with pytest.raises(ValueError, match=r"prediction must have the target's shape \[1, 3, 12, 13\]; got"):
        compare(torch.rand(1, 3, 12, 12), torch.rand(1, 3, 12, 13))


def features(net):
    """AlexNet's or VGG-16's convolutions with random weights, in torchvision's order, and its file's contents."""
    relus = [nn.ReLU() for _ in range(13)]
    if net == "alex":
        convs = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
        layers = [layer for conv, relu in zip(convs, relus, strict=False) for layer in (nn.Conv2d(*conv), relu)]
        layers[2:2], layers[5:5] = [nn.MaxPool2d(3, 2)], [nn.MaxPool2d(3, 2)]
    else:
        layers, inputs = [], 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                layers += [nn.Conv2d(inputs, width, 3, 1, 1), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_torchmetrics(net, tmp_path, monkeypatch):
    """torchmetrics has its formula and the layers' weights, but takes the network from torchvision."""
    layers = features(net)
    state = {f"features.{name}": value for name, value in layers.state_dict().items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(2)}, tmp_path / "net.pth")
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *_: layers)
    expected = reference._LPIPS(net=net, pretrained=True)
    ours = perceptual.LPIPS(tmp_path / "net.pth")
    a, b = torch.rand(2, 2, 3, 64, 72)
    assert ours.net == net and not any(parameter.requires_grad for parameter in ours.parameters())
    torch.testing.assert_close(ours(a, b), expected(a, b, normalize=True).flatten())
    assert ours(a, a).tolist() == [0, 0]


@pytest.mark.parametrize("network", [perceptual.LPIPS, perceptual.Inception])
@pytest.mark.parametrize("contents", [[1, 2], {"features.0.weight": torch.zeros(5)}])
def test_other_files(network, contents, tmp_path):
    torch.save(contents, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth must hold the weights of .*; got no .*\.weight"):
        network(tmp_path / "net.pth")


def test_inception_is_torchvisions(tmp_path, monkeypatch):
    """The expected values are of torchvision's network, with pytorch-fid's poolings, these weights and 96 x 96 pixels.

    Its file has the layers' names, and those of a classifier.
    """
    monkeypatch.setattr(perceptual, "load_weights", lambda *_: None)
    network = perceptual.Inception("").eval().requires_grad_(False)
    monkeypatch.undo()
    rng, weights = torch.Generator().manual_seed(0), {}
    for name, value in sorted(network.state_dict().items()):
        if name.endswith("conv.weight"):
            weights[name] = torch.randn(value.shape, generator=rng) * math.sqrt(2 / value[0].numel())
        elif name.endswith(("running_var", "bn.weight")):
            weights[name] = torch.rand(value.shape, generator=rng) + 0.5
        elif value.is_floating_point():
            weights[name] = torch.randn(value.shape, generator=rng) * 0.1
    torch.save(weights | {"fc.bias": torch.zeros(1008)}, tmp_path / "inception.pth")
    monkeypatch.setattr(perceptual, "SIDE", 96)
    found = perceptual.Inception(tmp_path / "inception.pth")(torch.linspace(0, 1, 6000).view(1, 3, 40, 50).sin())
    assert found.shape == (1, 2048)
    expected = [0.36288, 1.14268, 0.18088, 0.0, 0.0, 0.43423, 0.01587]
    torch.testing.assert_close(found[0, ::300], torch.tensor(expected), rtol=1e-3, atol=1e-3)
    assert found.mean().item() == pytest.approx(0.19312, rel=1e-3)


@pytest.mark.parametrize("samples", [(40, 50), (5, 6), (3, 30)])
def test_frechet_distance_is_scipys(samples):
    """Also with fewer samples than features, where the covariances are singular."""
    mixing = torch.randn(8, 8, dtype=torch.float64)
    a, b = torch.randn(samples[0], 8).double() @ mixing, torch.randn(samples[1], 8).double() + 0.5
    covariances = [numpy.cov(x.numpy(), rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm((covariances[0] @ covariances[1]).astype(complex)).real
    means = a.mean(0) - b.mean(0)
    expected = means.square().sum().item() + sum(map(numpy.trace, covariances)) - 2 * numpy.trace(root)
    assert perceptual.frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert perceptual.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_needs_two_samples():
    with pytest.raises(ValueError, match="a and b must have at least two samples; got 1 and 3"):
        perceptual.frechet_distance(torch.rand(1, 4), torch.rand(3, 4))


def test_psnr_of_images_is_the_same():
    a, b = pair()
    from inr_kernels.models.data.images import to_image

    images = [to_image(image) for image in (a, b)]
    assert psnr(*images, 0) == pytest.approx(compare(a, b)["psnr"], abs=1e-6)
