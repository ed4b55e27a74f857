"""ImplicitAutoencoder: parameters, kernels against plain PyTorch, loss, training, export, the command line."""

import contextlib
import copy

import numpy
import pytest
import torch
from PIL import Image

from inr_kernels import cli
from inr_kernels.models import AutoencoderConfig, ImplicitAutoencoder, export_program, from_checkpoint
from inr_kernels.models.autoencoder import AutoencoderLossWeights, autoencoder_loss, training_step
from inr_kernels.models.data.images import read, to_tensor
from inr_kernels.models.data.photographs import photographs

STEPS = 80
TINY = {"channels": 8, "hidden": (12, 9), "side": 12}
both_latents = pytest.mark.parametrize("latent", ["global", "local"])


def example(*size, batch=2, dtype=torch.double):
    """Random images and masks, at least one pixel of each known and missing."""
    mask = (torch.rand(batch, 1, *size) < 0.5).to(dtype)
    mask[..., 0, :2] = torch.tensor([0, 1], dtype=dtype)
    return torch.rand(batch, 3, *size, dtype=dtype), mask


def network(latent, **fields):
    """A network, and the same in plain PyTorch."""
    ours = ImplicitAutoencoder(**TINY | {"latent": latent} | fields).double()
    plain = ImplicitAutoencoder(ours.config, eager=True).double()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize(
    ("latent", "encoder", "decoder"), [("global", 26_883, 443_523), ("local", 419_048, 51_331)], ids=str
)
def test_parameters(latent, encoder, decoder):
    model = ImplicitAutoencoder(latent=latent)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder, model)]
    assert counts == [encoder, decoder, encoder + decoder]
    assert f"{counts[2]:,} parameters" in ImplicitAutoencoder.__doc__.replace(" (local)", " parameters")
    masked = ImplicitAutoencoder(latent=latent, mask_channel=True)
    extra = (9 + 1) * model.config.channels  # of the first convolution and the skip
    assert sum(p.numel() for p in masked.parameters()) == counts[2] + extra
    assert ImplicitAutoencoder().config == AutoencoderConfig("global", 24, 3)
    assert ImplicitAutoencoder(latent="local").config == AutoencoderConfig("local", 96, 8)


@both_latents
@pytest.mark.parametrize("mask_channel", [False, True])
def test_equals_plain_pytorch(latent, mask_channel):
    """Outputs, also in bands, and gradients."""
    (ours, plain), (image, mask) = network(latent, mask_channel=mask_channel), example(12, 12)
    expected = plain.predict(image, mask)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours.predict(image, mask), expected, rtol=0, atol=1e-6)  # positions are float32
    seen = []
    bands = ours.inpaint(image, mask, workspace=1 << 16, progress=lambda *share: seen.append(share))
    torch.testing.assert_close(bands, plain.inpaint(image, mask), rtol=0, atol=1e-6)
    assert seen[-1][0] == seen[-1][1]
    for model in (ours, plain):
        training_step(model, image, mask).backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert a.grad.any(), name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("size", [(1, 1), (7, 30), (13, 5)])
def test_local_takes_any_size(size):
    (ours, plain), (image, mask) = network("local"), example(*size) if size != (1, 1) else (torch.rand(1, 3, 1, 1),) * 2
    mask = mask[:, :1].round()
    torch.testing.assert_close(ours.predict(image, mask), plain.predict(image, mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_latents
def test_half_precision(latent, dtype):
    (exact, _), (image, mask) = network(latent), example(12, 12)
    expected, errors = exact.predict(image, mask), []
    for eager in (False, True):
        model = ImplicitAutoencoder(exact.config, eager=eager)
        model.load_state_dict(exact.state_dict())
        model, given = model.to(dtype), (image.to(dtype), mask.to(dtype))
        errors.append((model.predict(*given) - expected).norm() / expected.norm())
        with torch.autocast("cpu", dtype):
            assert model.float().predict(image.float(), mask).dtype == dtype
    assert errors[0] < 2 * errors[1] + torch.finfo(dtype).eps


def test_global_has_one_size():
    model, (image, mask) = network("global")[0], example(12, 13)
    assert model.min_side == 12 and network("local")[0].min_side == 1
    with pytest.raises(
        ValueError, match=r"image must have shape \[B, 3, 12, 12\], the only size of .*; got \[2, 3, 12, 13"
    ):
        model.predict(image, mask)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent": "both"}, "latent must be one of global, local; got 'both'"),
        ({"blocks": 0}, "blocks must be a positive integer; got 0"),
        ({"side": -1}, "side must be a positive integer; got -1"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        ImplicitAutoencoder(**fields)


def test_either_config_or_fields():
    with pytest.raises(TypeError, match="give either config or its fields; got config and latent"):
        ImplicitAutoencoder(AutoencoderConfig(), latent="local")


def test_loss_is_the_decks():
    """MSE over the missing pixels, TV over the filled image."""
    prediction, (image, mask) = torch.rand(2, 3, 5, 6).double(), example(5, 6)
    missing = mask.expand_as(image) == 1
    filled = torch.where(missing, prediction, image)
    mse = (prediction - image)[missing].square().mean()
    steps = [(filled[:, :, 1:] - filled[:, :, :-1]), (filled[..., 1:] - filled[..., :-1])]
    tv = sum((step**2).sum() for step in steps) / (2 * 3 * 5 * 6)
    expected = 0.7 * mse + 0.3 * tv
    torch.testing.assert_close(autoencoder_loss(prediction, image, mask, AutoencoderLossWeights(0.7, 0.3)), expected)
    assert autoencoder_loss(prediction, image, 0 * mask, AutoencoderLossWeights(tv=0)) == 0


@both_latents
def test_training_lowers_the_loss(latent):
    """On 32 x 32 crops of a photograph, with random pixels missing."""
    torch.manual_seed(0)
    photo = to_tensor(photographs("astronaut")[0].resize((256, 256), Image.Resampling.BICUBIC))
    crops = photo.unfold(2, 32, 32).unfold(3, 32, 32)[0].flatten(1, 2).transpose(0, 1)  # [64, 3, 32, 32]
    model = ImplicitAutoencoder(latent=latent, channels=8, hidden=(16, 16))
    optimizer, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    for _ in range(STEPS):
        image = crops[torch.randint(64, (4,))]
        share = torch.empty(4, 1, 1, 1).uniform_(0.1, 0.9)
        loss = training_step(model, image, (torch.rand(4, 1, 32, 32) < share).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert numpy.mean(losses[-20:]) < 0.5 * numpy.mean(losses[:20])


@both_latents
def test_export(latent):
    """In plain PyTorch; the local one for any size."""
    model, any_size = network(latent)[0].float().eval(), latent == "local"
    program = export_program(model, dynamic=any_size, size=(12, 12)).module()
    for size in ((12, 12), (9, 14))[: 1 + any_size]:
        image, mask = example(*size, batch=1, dtype=torch.float)
        torch.testing.assert_close(program(image, mask), model.inpaint(image, mask), rtol=0, atol=1e-5)


def test_copies_and_checkpoints(tmp_path):
    model, (image, mask) = network("global")[0].float().eval(), example(12, 12, dtype=torch.float)
    model.save(tmp_path / "net.safetensors", {"steps": 3})
    for other in (from_checkpoint(tmp_path / "net.safetensors"), copy.deepcopy(model)):
        assert type(other) is ImplicitAutoencoder and torch.equal(
            other.inpaint(image, mask), model.inpaint(image, mask)
        )
    eager = ImplicitAutoencoder.from_checkpoint(tmp_path / "net.safetensors", eager=True)
    assert eager.eager and eager.notes == {"steps": 3}


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network("global")[0].float().save("net.safetensors")
    rng = numpy.random.default_rng(0)
    for side in (12, 14):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), numpy.uint8)).save(f"{side}.png")
        Image.fromarray(rng.integers(0, 2, (side, side), numpy.uint8) * 255).save(f"mask{side}.png")
        words = ["inpaint", f"{side}.png", "--mask", f"mask{side}.png", "--model", "net.safetensors", "-o", "out.png"]
        with pytest.raises(SystemExit) if side == 14 else contextlib.nullcontext():
            cli.main(words)
    assert read("out.png", 1e6).colour.shape == (1, 3, 12, 12)
    assert "image must have shape [B, 3, 12, 12], the only size" in capsys.readouterr().err
