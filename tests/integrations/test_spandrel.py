"""The networks as architectures of spandrel, with spandrel itself."""

import os
import shutil
import subprocess
import sys

import pytest
import spandrel_without_torchvision  # noqa: F401  before spandrel
import torch
from safetensors.torch import load_file, save_file
from small_networks import NETWORKS
from spandrel import (
    MAIN_REGISTRY,
    ArchRegistry,
    ImageModelDescriptor,
    MaskedImageModelDescriptor,
    ModelLoader,
    ModelTiling,
    UnsupportedDtypeError,
    UnsupportedModelError,
)
from spandrel.architectures.LaMa import LaMa as SpandrelLaMa
from tree import ROOT

from inr_kernels import models
from inr_kernels.integrations.spandrel import install
from inr_kernels.models import DEAR, IN2, LIIF, LaMa, LaMaConfig


@pytest.fixture(autouse=True)
def installed():
    """In spandrel's main registry; a second call changes the scale only."""
    install()
    install(scale=2)
    assert len({architecture.architecture.id for architecture in MAIN_REGISTRY}) == len(MAIN_REGISTRY)


def inputs(descriptor, height, width):
    image = torch.rand(1, 3, height, width)
    if isinstance(descriptor, ImageModelDescriptor):
        return (image,)
    mask = torch.zeros(1, 1, height, width)
    mask[..., 3:9, 5:20] = 1
    return image, mask


def own_result(model, *args):
    return model.upscale(*args, 2) if len(args) == 1 else model.inpaint(*args)


@pytest.mark.parametrize("size", [(24, 31), (33, 20)])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_network(name, size, tmp_path):
    model, path = NETWORKS[name]().eval(), tmp_path / "model.safetensors"
    model.save(path)
    descriptor = ModelLoader().load_from_file(path)
    architecture = descriptor.architecture
    assert (architecture.id, architecture.name) == (f"inr_kernels.{name}", name)
    assert descriptor.model.config == model.config and not descriptor.model.training
    args = inputs(descriptor, *size)
    assert torch.equal(descriptor(*args), own_result(model, *args))
    assert (descriptor.input_channels, descriptor.output_channels) == (3, 3)
    if len(args) == 1:
        assert (descriptor.purpose, descriptor.scale, descriptor.tiling) == ("SR", 2, ModelTiling.INTERNAL)
    else:
        assert isinstance(descriptor, MaskedImageModelDescriptor)
        assert (descriptor.purpose, descriptor.scale, descriptor.tiling) == ("Inpainting", 1, ModelTiling.DISCOURAGED)
        assert descriptor.size_requirements.minimum == model.min_side


@pytest.mark.parametrize("network", [LIIF, DEAR, IN2])
def test_shipped_networks_in_half_precision(network):
    """The flags of half precision are true, and its results near those of float32."""
    model, descriptor = network.pretrained(), ModelLoader().load_from_file(str(network.PRETRAINED))
    assert descriptor.supports_half and descriptor.supports_bfloat16
    args = inputs(descriptor, 40, 48)
    expected = own_result(model, *args)
    assert torch.equal(descriptor(*args), expected)
    for dtype, most in ((torch.bfloat16, 0.04), (torch.float16, 0.005)):
        descriptor.to(dtype)
        rounded = [arg.to(dtype) for arg in args]
        out = descriptor(*rounded)
        assert out.dtype == dtype and torch.equal(out, own_result(model.to(dtype), *rounded))
        assert (out.float() - expected).abs().max() < most


def test_lama_has_no_half_precision(tmp_path):
    """As spandrel's own: float16 does not hold the spectra of large pictures."""
    NETWORKS["LaMa"]().save(tmp_path / "model.safetensors")
    descriptor = ModelLoader().load_from_file(tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedDtypeError):
        descriptor.half()
    descriptor.bfloat16()
    assert descriptor(*(arg.bfloat16() for arg in inputs(descriptor, 24, 32))).isfinite().all()


def test_small_pictures_are_padded():
    descriptor = ModelLoader().load_from_file(IN2.PRETRAINED)
    image, mask = torch.rand(1, 3, 5, 7), torch.zeros(1, 1, 5, 7)
    mask[..., 2:4, 2:4] = 1
    out = descriptor(image, mask)
    assert out.shape == image.shape and torch.equal(out[:, :, 4:], image[:, :, 4:])


def test_the_scale_is_that_of_the_last_installation():
    before = ModelLoader().load_from_file(LIIF.PRETRAINED)
    install(scale=3)
    image = torch.rand(1, 3, 8, 9)
    after = ModelLoader().load_from_file(LIIF.PRETRAINED)
    assert before(image).shape[2:] == (16, 18) and after(image).shape[2:] == (24, 27)
    with pytest.raises(ValueError, match=r"scale must be a positive integer; got 2\.5"):
        install(scale=2.5)


def test_another_registry():
    registry = ArchRegistry()
    install(registry, scale=3)
    loaded = [ModelLoader(registry=each).load_from_file(LIIF.PRETRAINED) for each in (registry, MAIN_REGISTRY)]
    assert [descriptor.scale for descriptor in loaded] == [3, 2]


def test_published_files(tmp_path):
    """What `from_checkpoint` opens without a header: yinboc/liif's .pth, and LaMa's keys without a prefix."""
    args = {"imnet_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [8, 8]}}}
    encoder = {"n_resblocks": 1, "n_feats": 4, "res_scale": 0.5, "no_upsampling": True}
    args["encoder_spec"] = {"name": "edsr-baseline", "args": encoder}
    liif = NETWORKS["LIIF"]().eval()
    torch.save({"model": {"name": "liif", "args": args, "sd": liif.state_dict()}, "epoch": 3}, tmp_path / "liif.pth")
    descriptor = ModelLoader().load_from_file(tmp_path / "liif.pth")
    assert descriptor.architecture.id == "inr_kernels.LIIF" and descriptor.model.config.res_scale == 0.5
    lama = LaMa(LaMaConfig(features=8, blocks=1)).eval()
    torch.save({"state_dict": lama.state_dict()}, tmp_path / "lama.ckpt")
    descriptor = ModelLoader().load_from_file(tmp_path / "lama.ckpt")
    args = inputs(descriptor, 24, 32)
    assert descriptor.architecture.id == "inr_kernels.LaMa" and torch.equal(descriptor(*args), lama.inpaint(*args))


def test_spandrels_own_lama(tmp_path):
    """Its files, of the structure that it fixes, are still its own, and ours opens them too."""
    lama = LaMa(LaMaConfig(blocks=18)).eval()
    state = {f"generator.{name}": value for name, value in lama.state_dict().items()}
    torch.save(state, tmp_path / "lama.ckpt")
    descriptor = ModelLoader().load_from_file(tmp_path / "lama.ckpt").eval()
    assert descriptor.architecture.id == "LaMa" and isinstance(descriptor.model, SpandrelLaMa)
    ours = models.from_checkpoint(tmp_path / "lama.ckpt")
    args = inputs(descriptor, 32, 40)
    torch.testing.assert_close(descriptor(*args), ours.inpaint(*args), rtol=0, atol=1e-4)


def test_what_is_refused(tmp_path):
    DEAR.pretrained().save(tmp_path / "dear.safetensors")
    state = load_file(tmp_path / "dear.safetensors")
    with pytest.raises(UnsupportedModelError, match="this state dict is not a DEAR checkpoint: its metadata has no"):
        ModelLoader().load_from_state_dict(state)
    save_file({"weight": torch.ones(3)}, tmp_path / "other.safetensors", {"network": "x", "config": "{}"})
    save_file({"weight": torch.ones(3)}, tmp_path / "plain.safetensors")
    for name in ("other", "plain"):
        with pytest.raises(UnsupportedModelError):
            ModelLoader().load_from_file(tmp_path / f"{name}.safetensors")
    shutil.copy(LIIF.PRETRAINED, tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 5000)
    with pytest.raises(Exception, match=r"(?i)header|incomplete|metadata|invalid"):
        ModelLoader().load_from_file(tmp_path / "cut.safetensors")


def test_other_files_load_as_before(tmp_path):
    """The loader's state dict has further keys for our files only."""
    save_file({"weight": torch.ones(3)}, tmp_path / "plain.safetensors", {"format": "pt"})
    assert ModelLoader().load_state_dict_from_file(tmp_path / "plain.safetensors").keys() == {"weight"}


def test_without_spandrel():
    code = "import sys; sys.modules['spandrel'] = None; import inr_kernels.integrations.spandrel"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.endswith("ImportError: this needs spandrel: pip install 'inr-kernels[spandrel]'\n")
