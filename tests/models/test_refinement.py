"""Feature refinement: LaMa's published results, a literal restatement for every network, holes and sizes, memory."""

import contextlib
import itertools

import cv2
import numpy
import pytest
import torch
import torch.nn.functional as F
from test_inpainter import every_network, example, network
from test_lama import TINY, random_norms
from torch.utils._pytree import tree_flatten, tree_unflatten

import inr_kernels
from inr_kernels.models import IN2, LIIF, FeatureRefiner, IN2Config, LaMa, LaMaConfig, LIIFConfig
from inr_kernels.models.common.frozen import measured

DISK = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (15, 15))
SIDE = 16  # min_side, for pyramids of small images


def halved(x):
    """A Gaussian blur by a 5 x 5 kernel, then bilinear interpolation."""
    taps = torch.exp(-(torch.arange(-2.0, 3).double() ** 2) / 2)
    kernel = (taps[:, None] * taps / taps.sum() ** 2).to(x).expand(x.shape[1], 1, 5, 5)
    blurred = F.conv2d(F.pad(x, [2] * 4, mode="reflect"), kernel, groups=x.shape[1])
    return F.interpolate(blurred, [n // 2 for n in x.shape[2:]], mode="bilinear", align_corners=False)


def literally(network, image, mask, *, paper, iterations, scales, lr=0.002):
    """The published loop, or the paper's, as written: autograd through everything, masks recomputed by OpenCV."""
    images, masks = [image * (1 - mask)], [mask]
    for _ in range(scales - 1):
        images.append(halved(images[-1]))
        masks.append((halved(masks[-1]) >= 1e-8).to(mask))
    below = None
    for image, mask in zip(images[::-1], masks[::-1], strict=True):
        height, width = image.shape[2:]
        pad = (0, -width % 8, 0, -height % 8)
        padded, hole = (F.pad(x, pad, mode="reflect") for x in (image, mask))
        with torch.no_grad():
            parts, structure = tree_flatten(network.encode(padded, hole))
        at = [i for i, part in enumerate(parts) if isinstance(part, torch.Tensor)]
        z = [parts[i].clone().requires_grad_() for i in at]
        optimizer = torch.optim.Adam(z, lr)
        for step in itertools.count(1):
            for i, value in zip(at, z, strict=True):
                parts[i] = value
            prediction = network.decode(tree_unflatten(parts, structure), tuple(padded.shape[2:]))
            if below is None or step == iterations + paper:
                break
            smaller = halved(prediction[..., :height, :width])
            covered = F.interpolate(mask, smaller.shape[2:], mode="bilinear", align_corners=False) >= 1 - 1e-8
            inner = torch.from_numpy(cv2.erode(covered[0, 0].numpy().astype(numpy.uint8), DISK)).bool()
            known = (hole[0, 0] == 0).expand(3, -1, -1)
            losses = [(smaller[0] - below[0])[inner.expand(3, -1, -1)].abs().mean()]
            losses += [] if paper else [(prediction[0] - padded[0])[known].abs().mean()]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
        prediction = prediction[..., :height, :width].detach().clamp(0, 1)
        below = mask * prediction + (1 - mask) * image
    return below


def lama(golden):
    arrays = golden("lama_refine")
    model = LaMa(TINY)
    model.load_state_dict({name[6:]: value for name, value in arrays.items() if name.startswith("state.")})
    return arrays, model.eval()


def picture(height=70, width=83):
    """An image, and a mask with one hole that is thick enough to be refined."""
    image, mask = torch.rand(1, 3, height, width), torch.zeros(1, 1, height, width)
    mask[..., 3:64, 9:70] = 1
    return image, mask


@pytest.mark.parametrize("order", ["cpu", "reference", "module by module"])
def test_equals_lamas_refinement(golden, order):
    """In every order of the sums, the last of which is LaMa's own.

    float32 results differ from float64's as much as the published ones do: by 3e-6 at single pixels, where the rounding
    of a sum decides a step, and by 2e-8 on average.
    """
    arrays, model = lama(golden)
    if order == "module by module":  # each with a hook is called
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
    refiner = FeatureRefiner(model, min_side=int(arrays["min_side"]), iterations=int(arrays["n_iters"]))
    with contextlib.nullcontext() if order == "module by module" else inr_kernels.backend(order):
        out = refiner(arrays["image"], arrays["mask"])
        model.double()
        exact = refiner(arrays["image"].double(), arrays["mask"])
    assert (out - arrays["out"]).abs().max() <= 1e-5 and (out - arrays["out"]).abs().mean() <= 1e-7
    spread = (arrays["out"] - exact).abs().max()
    assert spread < 1e-5 and (out - exact).abs().max() <= 1.1 * spread + 1e-7


def test_triton_refines_as_the_reference():
    model, (image, mask) = network("LaMa"), picture(24, 33)
    refiner = FeatureRefiner(model, min_side=SIDE, iterations=2)
    with inr_kernels.backend("reference"):
        expected = refiner(image, mask)
    with inr_kernels.backend("triton"):
        torch.testing.assert_close(refiner(image, mask), expected, rtol=0, atol=1e-5)


@every_network
@pytest.mark.parametrize("paper", [False, True])
def test_equals_a_literal_restatement(name, paper):
    model, (image, mask) = network(name).double(), picture()
    image, mask = image.double(), mask.double()
    refiner = FeatureRefiner(model, min_side=SIDE, iterations=4, max_scales=2, paper=paper)
    scales = 3 if paper else 2
    assert refiner.scales(70, 83) == scales
    out = refiner(image, mask)
    expected = literally(model, image, mask, paper=paper, iterations=4, scales=scales)
    torch.testing.assert_close(out, torch.where(mask > 0, expected, image), rtol=0, atol=1e-9)
    plain = FeatureRefiner(model, min_side=SIDE, iterations=1)(image, mask)
    assert not torch.allclose(out, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((1024, 1024), {}, 2),
        ((724, 2000), {}, 1),
        ((725, 2000), {}, 2),
        ((300, 9000), {}, 1),
        ((4096, 4096), {}, 3),
        ((4096, 4096), {"paper": True}, 4),
        ((4096, 4096), {"max_scales": 1}, 1),
    ],
)
def test_numbers_of_scales(size, options, expected):
    assert FeatureRefiner(LaMa(TINY), **options).scales(*size) == expected


@every_network
def test_batches_as_if_alone(name):
    model, (image, mask) = network(name), example(2, 33, 40)
    refiner = FeatureRefiner(model, min_side=SIDE, iterations=2)
    alone = [refiner(image[i : i + 1], mask[i : i + 1]) for i in range(2)]
    assert torch.equal(refiner(image, mask), torch.cat(alone))
    assert refiner(image[:0], mask[:0]).shape == (0, 3, 33, 40)


def masks(height, width):
    found = {name: torch.zeros(1, 1, height, width) for name in ("thin", "border", "pixel", "all")}
    found["thin"][..., 2::9, :] = found["pixel"][..., 4, 5] = found["all"][:] = 1
    found["border"][..., width // 2 :] = 1
    return found


@pytest.mark.parametrize("name", ["LaMa", "IN2"])
@pytest.mark.parametrize("size", [(45, 67), (17, 300), (9, 13)], ids=str)
def test_holes_and_sizes(size, name):
    refiner = FeatureRefiner(network(name), min_side=SIDE, iterations=3)
    for mask in masks(*size).values():
        image = torch.rand(1, 3, *size)
        out = refiner(image.masked_fill(mask > 0, torch.nan), mask)
        assert out.shape == image.shape and out.isfinite().all()
        assert torch.equal(out[(mask == 0).expand_as(out)], image[(mask == 0).expand_as(out)])
    assert torch.equal(refiner(image, torch.zeros_like(mask)), image)


def test_thin_holes():
    """Without pixels to compare with the smaller scale: the paper's result is the network's own."""
    model, image, mask = network("LaMa"), torch.rand(1, 3, 64, 64), masks(64, 64)["thin"]
    plain = FeatureRefiner(model, min_side=SIDE, max_scales=1)(image, mask)
    torch.testing.assert_close(plain, model.inpaint(image, mask))
    assert torch.equal(FeatureRefiner(model, min_side=SIDE, paper=True)(image, mask), plain)
    assert not torch.equal(FeatureRefiner(model, min_side=SIDE)(image, mask), plain)  # the known pixels' term


def test_sizes_below_the_padding():
    """DEAR takes any size."""
    model = network("DEAR")
    for size in ((1, 1), (3, 20), (5, 2)):
        assert FeatureRefiner(model)(torch.rand(1, 3, *size), torch.ones(1, 1, *size)).isfinite().all()


def test_soft_masks_fade():
    model, (image, hard) = network("LaMa"), picture()
    soft = hard * (0.25 + 0.75 * torch.rand_like(hard))
    refiner = FeatureRefiner(model, min_side=SIDE, iterations=3)
    out = refiner(image, hard)
    torch.testing.assert_close(refiner(image, soft), soft * out + (1 - soft) * image)
    assert torch.equal(refiner(image, hard.bool()[:, 0]), out)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.6), (torch.float16, 0.25)], ids=str)
def test_half_precision(dtype, error):
    """The steps are float32's, up to the rounding of the predictions; known pixels keep all their digits."""
    model, (image, mask) = network("LaMa"), picture()
    exact, plain = (FeatureRefiner(model, min_side=SIDE, iterations=n, lr=0.01)(image, mask) for n in (8, 1))
    out = FeatureRefiner(model.to(dtype), min_side=SIDE, iterations=8, lr=0.01)(image, mask)
    assert out.dtype == torch.float and torch.equal(out[..., 64:, :], image[..., 64:, :])
    assert (out - exact).norm() <= error * (plain - exact).norm()


def test_callers_without_gradients():
    """The same result under every mode, without a gradient; the network does not change."""
    model, (image, mask) = network("LaMa").train(), picture()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refiner = FeatureRefiner(model, min_side=SIDE, iterations=3)
    expected = refiner(image.requires_grad_(), mask)
    assert not expected.requires_grad and image.grad is None
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            out = refiner(image * 1, mask * 1)
        assert torch.equal(out, expected) and not out.requires_grad and not out.is_inference()
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_progress_and_interrupts():
    model, (image, mask), done = network("LaMa"), picture(), []
    refiner = FeatureRefiner(model, min_side=SIDE, iterations=3)
    refiner(image.expand(2, -1, -1, -1), torch.cat((mask, 0 * mask)), progress=lambda *counts: done.append(counts))
    total = 2 * (1 + 2 * 3)
    assert done == [(n, total) for n in range(1, total + 1)] and total == 2 * refiner.forwards(70, 83)

    def interrupt(forwards, _):
        if forwards == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refiner(image, mask, progress=interrupt)
    assert not model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def kept(model, features, size):
    """Bytes that autograd keeps of decode."""
    with measured(model) as storages:
        model.decode(features, size)
    return sum(storages.values())


def test_lama_keeps_bits():
    """At most a fifteenth of what autograd keeps of the network's own layers in plain PyTorch."""
    model, (image, mask) = random_norms(LaMa(LaMaConfig(features=16, blocks=6))).eval(), picture(64, 64)
    constant = model.frozen()
    features = [part.requires_grad_() for part in constant.encode(image, mask)]
    bits = kept(constant, tuple(features), (64, 64))
    with inr_kernels.backend("reference"):
        assert bits <= kept(model.requires_grad_(False), tuple(features), (64, 64)) / 15


def test_memory_is_bounded():
    model = IN2(IN2Config(channels=(16, 16), groups=1, blocks=1, hidden=(64, 64))).eval()
    image, mask = picture()
    expected = FeatureRefiner(model, min_side=SIDE, iterations=3)(image, mask)
    with pytest.raises(ValueError, match=r"max_memory must be at least \d+ bytes for .* pixels; got 1000"):
        FeatureRefiner(model, min_side=SIDE, iterations=3, max_memory=1000)(image, mask)
    out = FeatureRefiner(model, min_side=SIDE, iterations=3, max_memory=900_000)(image, mask)
    assert torch.equal(out, expected)


@every_network
def test_workspace_reaches_every_layer(name, monkeypatch):
    model, (image, mask) = network(name), picture()
    expected, given = FeatureRefiner(model, min_side=SIDE, iterations=2)(image, mask), []
    frozen, decode = type(model).frozen, type(model).decode
    spies = {
        "frozen": lambda self, workspace: given.append(workspace) or frozen(self, workspace),
        "decode": lambda self, *args, workspace: given.append(workspace) or decode(self, *args, workspace=workspace),
    }
    for method, spy in spies.items():
        monkeypatch.setattr(type(model), method, spy)
    out = FeatureRefiner(model, min_side=SIDE, iterations=2, workspace=1 << 24)(image, mask)
    assert set(given) == {1 << 24} and len(given) > 2
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_errors():
    model = LaMa(TINY)
    with pytest.raises(TypeError, match="network must be an Inpainter, with encode and decode; got LIIF"):
        FeatureRefiner(LIIF(LIIFConfig(features=8, blocks=1, hidden=(8,))))
    bad = {"min_side": (0, 12, 20.5), "max_scales": (0, None), "iterations": (0, True), "lr": (0, float("nan"))}
    bad |= {"modulo": (0,), "max_memory": (0, 1.5), "workspace": (0, None)}
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name} must be .*; got {value!r}"):
                FeatureRefiner(model, **{name: value})
    with pytest.raises(ValueError, match="mask must have shape"):
        FeatureRefiner(model)(torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 15))


def test_values_and_weights_are_checked_as_in_inpaint():
    model = LaMa(LaMaConfig(features=8, blocks=1)).eval()
    image, mask = torch.rand(1, 3, 40, 40), torch.zeros(1, 1, 40, 40)
    mask[..., 10:30, 10:30] = 1
    refiner = FeatureRefiner(model, min_side=16, iterations=2)
    with pytest.raises(ValueError, match=r"image must have values in \[0, 1\]; got values from 0 to 2"):
        refiner(image * 255, mask)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="the weights of this LaMa hold NaN or infinity"):
        refiner(image, mask, progress=lambda done, total: pytest.fail("found after the smallest scale"))
