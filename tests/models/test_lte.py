"""LTE: the network around the texture decoder, and the files of jaewon-lee-b/lte."""

import copy

import pytest
import torch
import torch.nn.functional as F

from inr_kernels import models
from inr_kernels.local_implicit.reference import pixel_centres
from inr_kernels.models import LTE, LTEConfig

SMALL = LTEConfig(blocks=1, features=8, hidden=(16, 12), hidden_dim=16)


def grid(height, width):
    """coord [1, H * W, 2] and cell like it."""
    coord = torch.stack(torch.meshgrid(pixel_centres(height), pixel_centres(width), indexing="ij"), -1).view(1, -1, 2)
    return coord, torch.tensor([2 / height, 2 / width]).expand(coord.shape)


@pytest.fixture
def model():
    return LTE(SMALL).eval().requires_grad_(False)


def test_upscale_equals_the_query_of_every_pixel(model):
    image, size = torch.rand(1, 3, 7, 9), (16, 20)
    expected = model(image * 2 - 1, *grid(*size)).view(1, *size, 3).permute(0, 3, 1, 2).add(1).div(2).clamp(0, 1)
    torch.testing.assert_close(model.upscale(image, size=size), expected, rtol=1e-5, atol=1e-6)


def test_upscale_beyond_x4_limits_the_cell(model):
    """As LTE's evaluation does: cell * max(scale / 4, 1)."""
    image, size = torch.rand(1, 3, 5, 6), (40, 48)
    coord, cell = grid(*size)
    expected = model(image * 2 - 1, coord, cell * 2).view(1, *size, 3).permute(0, 3, 1, 2).add(1).div(2).clamp(0, 1)
    torch.testing.assert_close(model.upscale(image, 8), expected, rtol=1e-5, atol=1e-6)


def test_the_input_is_added(model):
    model.imnet.layers[-1].weight.zero_()
    model.imnet.layers[-1].bias.zero_()
    image = torch.rand(2, 3, 5, 6)
    expected = F.interpolate(image, scale_factor=3, mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.upscale(image, 3), expected, rtol=0, atol=1e-6)


def test_query_needs_features(model):
    with pytest.raises(RuntimeError, match="query_rgb needs features: call gen_feat first"):
        model.query_rgb(*grid(2, 2))


def test_copies_have_no_features(model):
    model.gen_feat(torch.rand(1, 3, 4, 5))
    copied = copy.deepcopy(model)
    assert copied.feat is None
    assert copied.inp is None


def plus(state):
    """The state dict as LTE+'s."""
    state = {
        k.replace("imnet.", ""): v[..., None, None] if k.endswith("weight") and v.dim() == 2 else v
        for k, v in state.items()
    }
    state["phase.weight"] = state["phase.weight"][..., 0, 0]
    for name in ("freq.weight", "freq.bias"):
        state[name] = torch.cat((state[name][::2], state[name][1::2]))
    return state


@pytest.mark.parametrize("encoder", ["edsr", "rdn"])
@pytest.mark.parametrize("form", ["lte", "lte-fast", "state dict", "state dict of LTE+"])
def test_published_files(form, encoder, tmp_path):
    """The config is found from the tensors."""
    config = {"blocks": 1, "features": 8, "hidden": (16, 12), "hidden_dim": 16, "encoder": encoder}
    if encoder == "rdn" and "state" not in form:  # which the files describe by a letter
        config |= {"blocks": 20, "convolutions": 6, "growth": 32}
    elif encoder == "rdn":
        config |= {"convolutions": 2, "growth": 4}
    model = LTE(LTEConfig(**config)).eval().requires_grad_(False)
    state = model.state_dict() if form in ("lte", "state dict") else plus(model.state_dict())
    contents = state
    if "state" not in form:
        args = {"n_resblocks": 1, "n_feats": 8} if encoder == "edsr" else {"G0": 8, "RDNconfig": "A"}
        name = {"edsr": "edsr-baseline", "rdn": "rdn"}[encoder]
        args = {"encoder_spec": {"name": name, "args": args | {"no_upsampling": True}}, "hidden_dim": 16}
        contents = {"model": {"name": form, "args": args, "sd": state}, "epoch": 1000}
    torch.save(contents, tmp_path / "lte.pth")
    for opened in (models.from_checkpoint(tmp_path / "lte.pth"), LTE.from_checkpoint(tmp_path / "lte.pth")):
        assert opened.config == model.config
        image = torch.rand(1, 3, 5, 6)
        assert torch.equal(opened.upscale(image, 2), model.upscale(image, 2))


def test_unreadable_files(tmp_path):
    args = {"encoder_spec": {"name": "swinir", "args": {"no_upsampling": True}}}
    torch.save({"model": {"name": "lte", "args": args, "sd": {}}}, tmp_path / "lte.pth")
    with pytest.raises(ValueError, match="its encoder is 'swinir', supported are edsr-baseline, edsr, rdn"):
        LTE.from_checkpoint(tmp_path / "lte.pth")
    torch.save({"phase.weight": torch.zeros(4, 2)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="must have the entries of LTE or LTE"):
        LTE.from_checkpoint(tmp_path / "part.pth")


@pytest.mark.parametrize(("options", "text"), [({"hidden_dim": 5}, "hidden_dim"), ({"encoder": "swinir"}, "encoder")])
def test_bad_config(options, text):
    with pytest.raises(ValueError, match=f"{text} must be"):
        LTEConfig(**options)
