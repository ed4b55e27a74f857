"""LIIF's checkpoints as yinboc/liif and mmagic publish them, built from their own names of tensors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from published_cases import Callback, holds, prefixed
from safetensors.torch import save_file

from inr_kernels import models
from inr_kernels.models import LIIF, LIIFConfig
from inr_kernels.models.liif import RDN


def conv(inputs, outputs, kernel):
    return {
        "weight": torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5,
        "bias": torch.randn(outputs),
    }


def layers(named):
    return {f"{name}.{part}": value for name, layer in named.items() for part, value in layer.items()}


def imnet(inputs, widths):
    sizes = [inputs, *widths, 3]
    return layers(
        {
            f"imnet.layers.{2 * i}": {"weight": torch.randn(b, a) / a**0.5, "bias": torch.randn(b)}
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        }
    )


def rdn_state(blocks, convolutions, growth, features, first, block, dense, fusion, last):
    """An RDN's state dict; the names are patterns of the two projects."""
    state = {first.format(1): conv(3, features, 3), first.format(2): conv(features, features, 3)}
    for i in range(blocks):
        for j in range(convolutions):
            state[dense.format(i, j)] = conv(features + growth * j, growth, 3)
        state[block.format(i)] = conv(features + growth * convolutions, features, 1)
    return layers(state | {fusion: conv(blocks * features, features, 1), last: conv(features, features, 3)})


YINBOC = (
    "encoder.SFENet{}",
    "encoder.RDBs.{}.LFF",
    "encoder.RDBs.{}.convs.{}.conv.0",
    "encoder.GFF.0",
    "encoder.GFF.1",
)
MMAGIC = ("sfe{}", "rdbs.{}.lff", "rdbs.{}.layers.{}.conv", "gff.0", "gff.1")


def rdn(state, image, blocks, convolutions, first, block, dense, fusion, last):
    """RDN by its definition."""

    def run(name, x):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[2] // 2)

    shallow = run(first.format(1), image)
    x, outputs = run(first.format(2), shallow), []
    for i in range(blocks):
        y = x
        for j in range(convolutions):
            y = torch.cat((y, run(dense.format(i, j), y).relu()), 1)
        x = x + run(block.format(i), y)
        outputs.append(x)
    return shallow + run(last, run(fusion, torch.cat(outputs, 1)))


def spec(state, encoder, hidden, **flags):
    """A file of yinboc/liif's trainer."""
    args = {"encoder_spec": encoder, "imnet_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": hidden}}}
    return {"model": {"name": "liif", "args": args | flags, "sd": state}, "optimizer": {"sd": {}}, "epoch": 1000}


@torch.no_grad()
def test_yinbocs_rdn(tmp_path):
    """Configuration A, of 20 blocks of 6 layers that add 32 channels."""
    state = rdn_state(20, 6, 32, 8, *YINBOC) | imnet(8 * 9 + 4, [16, 12])
    encoder = {"name": "rdn", "args": {"G0": 8, "RDNconfig": "A", "no_upsampling": True}}
    torch.save(spec(state, encoder, [16, 12]), tmp_path / "rdn-liif.pth")
    model = LIIF.from_checkpoint(tmp_path / "rdn-liif.pth")
    config = {"encoder": "rdn", "blocks": 20, "convolutions": 6, "growth": 32, "features": 8, "hidden": (16, 12)}
    assert model.config == LIIFConfig(**config) and holds(model, state)
    image = torch.randn(1, 3, 7, 9)
    torch.testing.assert_close(model.gen_feat(image), rdn(state, image, 20, 6, *YINBOC), rtol=1e-4, atol=1e-4)


def test_the_published_rdn():
    """Configuration B with yinboc/liif's decoder."""
    with torch.device("meta"):
        model = LIIF(LIIFConfig(encoder="rdn"))
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes["encoder.RDBs.15.convs.7.conv.0.weight"] == [64, 512, 3, 3]
    assert shapes["encoder.RDBs.15.LFF.weight"] == [64, 576, 1, 1] and shapes["encoder.GFF.0.weight"] == [
        64,
        1024,
        1,
        1,
    ]
    assert sum(p.numel() for p in model.parameters()) == 22_320_835


@torch.no_grad()
def test_rdn_tiles_are_exact():
    encoder, image = RDN(2, 4, 4, 2).double(), torch.randn(1, 3, 40, 50, dtype=torch.double)
    torch.testing.assert_close(encoder.tiled(image, workspace=1), encoder(image), rtol=0, atol=1e-13)


@torch.no_grad()
def test_mmagics_rdn(tmp_path):
    state = rdn_state(2, 3, 5, 4, *MMAGIC) | imnet(4 * 9 + 4, [16])
    torch.save({"meta": {"iter": 1}, "state_dict": prefixed("generator.", state)}, tmp_path / "liif_rdn.pth")
    model = models.from_checkpoint(tmp_path / "liif_rdn.pth")
    config = {"encoder": "rdn", "blocks": 2, "convolutions": 3, "growth": 5, "features": 4, "hidden": (16,)}
    assert model.config == LIIFConfig(**config)
    image = torch.randn(1, 3, 7, 9)
    torch.testing.assert_close(model.gen_feat(image), rdn(state, image, 2, 3, *MMAGIC), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.imnet.layers[2].weight, state["imnet.layers.2.weight"])
    model.save(tmp_path / "own.safetensors")
    own = models.from_checkpoint(tmp_path / "own.safetensors")
    assert own.config == model.config and holds(own, model.state_dict())


@pytest.mark.parametrize("kind", ["state_dict", "bare", "safetensors"])
@pytest.mark.parametrize(("unfold", "cell"), [(True, True), (True, False), (False, True), (False, False)])
@torch.no_grad()
def test_mmagics_edsr(kind, unfold, cell, tmp_path):
    named = {"conv_first": conv(3, 8, 3), "conv_after_body": conv(8, 8, 3)}
    named |= {f"body.{i}.conv{j}": conv(8, 8, 3) for i in range(3) for j in (1, 2)}
    state = layers(named) | imnet(8 * (9 if unfold else 1) + (4 if cell else 2), [16, 12])
    path = tmp_path / "liif_edsr.pth"
    if kind == "state_dict":
        torch.save({"meta": {}, "state_dict": prefixed("generator.", state), "message_hub": Callback()}, path)
    else:
        (save_file if kind == "safetensors" else torch.save)(state, path)
    model = models.from_checkpoint(path)
    expected = LIIFConfig(blocks=3, features=8, hidden=(16, 12), feat_unfold=unfold, cell_decode=cell)
    assert model.config == expected
    image = torch.randn(1, 3, 7, 9)

    def run(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    head = x = run("conv_first", image)
    for i in range(3):
        x = x + run(f"body.{i}.conv2", run(f"body.{i}.conv1", x).relu())
    torch.testing.assert_close(model.gen_feat(image), head + run("conv_after_body", x), rtol=1e-4, atol=1e-4)


def test_a_bare_state_dict_of_yinbocs(tmp_path):
    for config in (
        LIIFConfig(blocks=2, features=8, hidden=(16,)),
        LIIFConfig(encoder="rdn", blocks=1, features=4, growth=3),
    ):
        model = LIIF(config)
        torch.save(model.state_dict(), tmp_path / "liif.pth")
        loaded = models.from_checkpoint(tmp_path / "liif.pth")
        assert holds(loaded, model.state_dict()) and loaded.encoder.halo == model.encoder.halo
