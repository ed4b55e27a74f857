"""The interface of the networks that inpaint: the same meaning in each of them."""

import pytest
import torch
from PIL import Image

import inr_kernels
from inr_kernels.models import DEAR, IN2, DEARConfig, ImplicitAutoencoder, IN2Config, LaMa, LaMaConfig
from inr_kernels.models.common.masking import blend, check_mask, known, output_size

NETWORKS = {
    "DEAR": lambda: DEAR(DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8, 8))),
    "DEAR, smooth": lambda: DEAR(
        DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8, 8), fill="smooth")
    ),
    "IN2": lambda: IN2(IN2Config(channels=(16, 16), groups=1, blocks=1, hidden=(8, 8))),
    "IN2, any size": lambda: IN2(IN2Config(channels=(16, 16), groups=1, blocks=1, hidden=(8, 8), any_size=True)),
    "ImplicitAutoencoder": lambda: ImplicitAutoencoder(latent="local", channels=8, hidden=(8, 8)),
    "LaMa": lambda: LaMa(LaMaConfig(features=8, blocks=1)),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


@torch.no_grad()
def network(name):
    """A network in eval mode whose output is not constant."""
    model = NETWORKS[name]().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def example(batch=2, height=21, width=26):
    mask = torch.rand(batch, 1, height, width) < 0.4
    mask[..., 0, 0], mask[..., 0, 1] = False, True
    return torch.rand(batch, 3, height, width), mask


@every_network
def test_methods_follow_from_encode_and_decode(name):
    model, (image, mask) = network(name), example()
    raw = model.predict(image, mask)
    assert torch.equal(model.decode(model.encode(image, mask), (21, 26)), raw) and raw.requires_grad
    assert raw.shape == image.shape and raw.std() > 1e-4
    holes = mask.expand_as(image)
    assert torch.equal(model(image, mask), torch.where(holes, raw, image))
    assert torch.equal(model(image, mask, (21, 26)), model(image, mask))
    out = model.inpaint(image, mask)
    with torch.no_grad():  # convolutions round otherwise where weights need gradients
        raw = model.predict(image, mask)
    assert torch.equal(out, torch.where(holes, raw.clamp(0, 1), image)) and not out.requires_grad


@pytest.mark.parametrize("name", ["DEAR", "DEAR, smooth", "IN2, any size"])
def test_at_another_size_every_pixel_is_predicted(name):
    model, (image, mask) = network(name), example()
    for options in ({"size": (30, 27)}, {"scale": 1.5}):
        raw = model.predict(image, mask, **options)
        assert raw.shape[2:] == options.get("size", (32, 39))
        assert torch.equal(model(image, mask, **options), raw)
        with torch.no_grad():  # convolutions round otherwise where weights need gradients
            raw = model.predict(image, mask, **options)
        assert torch.equal(model.inpaint(image, mask, **options), raw.clamp(0, 1))


@pytest.mark.parametrize("name", ["IN2", "LaMa", "ImplicitAutoencoder"])
def test_other_sizes_are_refused(name):
    """By networks that were trained at the image's size only."""
    model, (image, mask) = network(name), example()
    assert not model.any_size and torch.equal(model(image, mask, scale=1.0), model(image, mask))
    for method in (model, model.predict, model.inpaint):
        for options in ({"size": (42, 52)}, {"scale": 1.1}):
            match = rf"size must be the image's \(21, 26\), the only one that this {model.NETWORK} renders; got \("
            with pytest.raises(ValueError, match=match):
                method(image, mask, **options)


@every_network
def test_mask_dtypes_and_shapes(name):
    model, (image, mask) = network(name), example()
    expected = model.inpaint(image, mask)
    for other in (mask[:, 0], mask.byte(), mask.byte() * 255, mask.long(), mask.float(), mask.half(), mask.double()):
        assert torch.equal(model.inpaint(image, other), expected)
    assert torch.equal(model.inpaint(image, mask.float() * 7 - 1), expected)  # clamped
    assert torch.equal(model.inpaint(image, mask.float().masked_fill(mask, torch.nan)), expected)  # NaN: missing


@every_network
def test_values_under_the_mask_are_ignored(name):
    model, (image, mask) = network(name), example()
    expected = model.inpaint(image, mask)
    for value in (torch.nan, torch.inf, 7.0):
        assert torch.equal(model.inpaint(image.masked_fill(mask, value), mask), expected)


@every_network
def test_soft_masks_blend(name):
    model, (image, mask) = network(name), example()
    soft = mask * torch.rand_like(image[:, :1])
    expected = soft * model.predict(image, soft) + (1 - soft) * image
    torch.testing.assert_close(model(image, soft), expected)
    assert torch.equal(model(image, soft)[(soft == 0).expand_as(image)], image[(soft == 0).expand_as(image)])


@every_network
def test_dtypes(name):
    """The prediction has the network's dtype, the result the image's; known pixels keep all their digits."""
    model, (image, mask) = network(name).double(), example()
    assert model.predict(image, mask).dtype == torch.double and model(image, mask).dtype == torch.float
    model, image = model.float(), image.double() / 3
    out, kept = model.inpaint(image, mask), ~mask.expand_as(image)
    assert model.predict(image, mask).dtype == torch.float
    assert out.dtype == torch.double and torch.equal(out[kept], image[kept])


@every_network
@pytest.mark.parametrize("options", [{}, {"workspace": 1 << 22}])
def test_progress(name, options):
    """It grows while the image is encoded and while it is decoded, and reaches the total."""
    model, (image, mask), seen = network(name), example(), []
    encode, encoded = model.encode, []

    def count(*args, **options):
        features = encode(*args, **options)
        encoded.append(len(seen))
        return features

    model.encode = count
    model.inpaint(image, mask, progress=lambda *done: seen.append(done), **options)
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted({*done}) and done[-1] == totals[-1] and len({*totals}) == 1
    assert 1 < encoded[0] < len(seen)


@every_network
def test_memory_estimates_are_positive(name):
    model = NETWORKS[name]()
    assert isinstance(model.bytes_per_pixel(), int) and model.bytes_per_pixel() > 0
    assert model.bytes_per_output_pixel >= 0


IMAGE, MASK = torch.rand(2, 3, 20, 24), torch.zeros(2, 1, 20, 24)


@every_network
@pytest.mark.parametrize(
    ("image", "mask", "error", "message"),
    [
        (IMAGE.byte(), MASK, TypeError, "image must have a floating-point dtype; got torch.uint8"),
        (IMAGE.numpy(), MASK, TypeError, "image must be a torch.Tensor; got ndarray"),
        (Image.new("RGB", (24, 20)), MASK, TypeError, "image must be a torch.Tensor; got Image"),
        (IMAGE.to_sparse(), MASK, TypeError, "image must be a dense tensor; got torch.sparse_coo"),
        (IMAGE, MASK.to_sparse(), TypeError, "mask must be a dense tensor; got torch.sparse_coo"),
        (IMAGE, MASK.numpy(), TypeError, "mask must be a torch.Tensor; got ndarray"),
        (IMAGE, None, TypeError, "mask must be a torch.Tensor; got NoneType"),
        (
            IMAGE,
            MASK.cfloat(),
            TypeError,
            "mask must have a bool, integer or floating-point dtype; got torch.complex64",
        ),
        (IMAGE[0], MASK, ValueError, "image must have 4 dimensions"),
        (IMAGE[:, :2], MASK, ValueError, r"image must have shape \[B, 3, H, W\] with sides of at least \d"),
        (IMAGE[..., :0], MASK[..., :0], ValueError, r"image must have shape .*; got \[2, 3, 20, 0\]"),
        (IMAGE, MASK[:1], ValueError, r"mask must have shape \[B, 1, H, W\] = \[2, 1, 20, 24\] or \[B, H, W\] = "),
        (IMAGE, MASK[0, 0], ValueError, r"mask must have shape .*; got \[20, 24\]"),
        (IMAGE, IMAGE, ValueError, r"mask must have shape .*; got \[2, 3, 20, 24\]"),
        (IMAGE.to("meta"), MASK, ValueError, "image must be on the network's device cpu; got meta"),
        (IMAGE, MASK.to("meta"), ValueError, "mask must be on cpu, like image; got meta"),
    ],
)
def test_errors(name, image, mask, error, message):
    model = NETWORKS[name]().eval()
    for method in (model.encode, model.predict, model, model.inpaint):
        with pytest.raises(error, match=message):
            method(image, mask)


@every_network
@pytest.mark.parametrize(("factor", "shift"), [(255, 0), (2, -1)])
def test_inpaint_checks_the_range_of_known_values(name, factor, shift):
    model, (image, mask) = network(name), example()
    with pytest.raises(ValueError, match=r"image must have values in \[0, 1\]; got values from"):
        model.inpaint(image * factor + shift, mask)
    model.inpaint(image * 1.4 - 0.2, mask)  # as bicubic resampling overshoots


@every_network
@pytest.mark.parametrize(
    ("value", "got"),
    [("nan", "NaN in a known pixel"), ("inf", "values from .* to inf"), ("-inf", "values from -inf to")],
)
def test_inpaint_refuses_known_values_that_are_not_finite(name, value, got):
    model, (image, mask) = network(name), example()
    image[0, 1, 0, 1] = float(value)  # in the hole
    model.inpaint(image, mask)
    image[0, 1, 0, 0] = float(value)
    with pytest.raises(ValueError, match=rf"image must have values in \[0, 1\]; got {got}"):
        model.inpaint(image, mask)


@every_network
def test_inpaint_names_weights_that_are_not_finite(name):
    model, (image, mask) = network(name), example()
    next(model.parameters()).data[0] = torch.nan
    with pytest.raises(ValueError, match=f"weights of this {model.NETWORK} hold NaN or infinity, first in "):
        model.inpaint(image, mask)
    assert model(image, mask).isnan().any()  # only inpaint reads the values


@every_network
def test_meta_tensors_have_shapes_only(name):
    model = NETWORKS[name]().eval().to("meta")
    out = model.inpaint(IMAGE.to("meta"), MASK.to("meta"))
    assert out.is_meta and out.shape == IMAGE.shape


@every_network
@pytest.mark.parametrize("workspace", [None, "x", -1])
def test_workspace_errors(name, workspace):
    with pytest.raises(ValueError, match="workspace must be a positive number of bytes; got"):
        NETWORKS[name]().eval().inpaint(IMAGE, MASK, workspace=workspace)


@every_network
def test_errors_of_decode_and_graphed(name):
    model = NETWORKS[name]().eval()
    with pytest.raises(ValueError, match="size must be two positive integers"):
        model.decode(model.encode(IMAGE, MASK), None)
    for shape in (3, None, (1, 3, "x", 4), (1, 3, 0, 4)):
        with pytest.raises(ValueError, match="shape must be a sequence of positive integers; got"):
            model.graphed(shape)


@every_network
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (9, 9), "scale": 2}, r"size must be None if scale is given; got \(9, 9\) and 2"),
        ({"size": (0, 9)}, "size must be two positive integers"),
        ({"size": (10**9, 10**9)}, "size must have at most 1099511627776 pixels"),
        ({"scale": float("nan")}, "scale must be positive and finite; got nan"),
        ({"scale": -1}, "scale must be positive and finite; got -1"),
    ],
)
def test_size_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        NETWORKS[name]()(IMAGE, MASK, **options)


def test_empty_batches_and_single_pixels():
    for name in NETWORKS:
        assert NETWORKS[name]().eval().inpaint(IMAGE[:0], MASK[:0]).shape == (0, 3, 20, 24)
    assert NETWORKS["DEAR"]().inpaint(IMAGE[..., :1, :1], MASK[..., :1, :1]).shape == (2, 3, 1, 1)


def test_compiles_at_several_sizes():
    """Networks share the compiled code of `forward`, so one of them must not make sizes dynamic for the next."""
    torch._dynamo.reset()
    with torch.no_grad():
        for name in ("IN2", "DEAR", "LaMa"):
            model = network(name)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            for size in ((21, 26), (13, 18)):
                image, mask = example(1, *size)
                torch.testing.assert_close(compiled(image, mask), model(image, mask))
    torch._dynamo.reset()


def test_known_and_blend():
    image = torch.tensor([0.5, torch.nan, 0.25, torch.nan]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    mask = torch.tensor([0.0, 1.0, 0.5, 1.0]).view(1, 1, 2, 2)
    assert known(image, mask)[0, 0].tolist() == [[0.5, 0], [0.125, 0]]
    assert blend(image, mask, torch.ones_like(image))[0, 0].tolist() == [[0.5, 1], [0.625, 1]]
    assert output_size(image, None, 0.1) == (1, 1) and output_size(image, (5, 6), None) == (5, 6)


def test_mask_keeps_a_floating_point_dtype():
    cpu = torch.device("cpu")
    assert check_mask(IMAGE, MASK.double(), cpu).dtype == torch.double
    assert check_mask(IMAGE.half(), MASK.int(), cpu).dtype == torch.half
    assert check_mask(IMAGE, MASK[:, 0], cpu).shape == MASK.shape


@pytest.mark.parametrize(("backend", "calls"), [("cpu", 12), ("reference", 1)])
def test_attention_in_bands_where_masked_pixels_cost_nothing(monkeypatch, backend, calls):
    """For the progress, which is finer then; the reference would compute all pixels in each band."""
    model, made = DEAR(DEARConfig(channels=16, features=6, blocks=2, filter_blocks=1, hidden=(12, 10))).eval(), []
    attend = inr_kernels.unmask_attention
    monkeypatch.setattr(
        inr_kernels, "unmask_attention", lambda *args, **options: made.append(1) or attend(*args, **options)
    )
    image, mask = torch.rand(1, 3, 12, 16), torch.zeros(1, 1, 12, 16)
    mask[..., 3:6, 4:9] = 1
    with inr_kernels.backend(backend):
        out = model.inpaint(image, mask, progress=lambda done, total: None)
        assert len(made) == calls
        torch.testing.assert_close(out, model.inpaint(image, mask))
