"""LIIF: state-dict keys, checkpoints, upscaling, training."""

import copy
import pickle

import numpy
import pytest
import torch
from PIL import Image
from training_cases import same

from inr_kernels import LocalImplicitDecoder
from inr_kernels.models import EDSR, LIIF, LIIFConfig
from inr_kernels.models.data.photographs import HELD_OUT, TRAINED_ON, photographs
from inr_kernels.models.evaluation.run import compare_upscaling
from inr_kernels.models.liif.network import SMALL

SCALES = (2, 2.7, 3.7)  # of the notes of the shipped checkpoint
TINY = LIIFConfig(blocks=2, features=8, hidden=(16, 12))


def linear(name, outputs, inputs):
    return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}


def conv(name, outputs, inputs, kernel=3):
    return {f"{name}.weight": [outputs, inputs, kernel, kernel], f"{name}.bias": [outputs]}


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (torch.zeros(1, 3, 9, 9).byte(), TypeError, "image must have a floating-point dtype; got torch.uint8"),
        ([[0.0]], TypeError, "image must be a torch.Tensor; got list"),
        (numpy.zeros((9, 9, 3)), TypeError, "image must be a torch.Tensor; got ndarray"),
        (Image.new("RGB", (9, 9)), TypeError, "image must be a torch.Tensor; got Image"),
        (torch.zeros(1, 3, 9, 9).to_sparse(), TypeError, "image must be a dense tensor; got torch.sparse_coo"),
        (torch.zeros(3, 9, 9), ValueError, "image must have 4 dimensions"),
        (torch.zeros(1, 3, 9, 0), ValueError, r"image must have shape .*; got \[1, 3, 9, 0\]"),
        (torch.zeros(1, 4, 9, 9), ValueError, r"image must have shape \[B, 3, H, W\] with sides of at least 1"),
        (torch.zeros(1, 3, 9, 9, device="meta"), ValueError, "image must be on the network's device cpu; got meta"),
    ],
    ids=["integers", "list", "array", "picture", "sparse", "three dimensions", "no pixel", "four channels", "meta"],
)
def test_upscale_checks_its_image(image, kind, message):
    model = LIIF(TINY)
    for run in (lambda: model.upscale(image, 2), lambda: model.gen_feat(image), lambda: model.encoder(image)):
        with pytest.raises(kind, match=message):
            run()


@pytest.mark.parametrize("workspace", [None, "x", -1, True])
def test_upscale_checks_its_workspace(workspace):
    with pytest.raises(ValueError, match="workspace must be a positive number of bytes; got"):
        LIIF(TINY).upscale(torch.zeros(1, 3, 9, 9), 2, workspace=workspace)


@pytest.mark.parametrize(("factor", "shift"), [(255, 0), (2, -1)])
def test_upscale_checks_the_range(factor, shift):
    image = torch.linspace(0, 1, 243).view(1, 3, 9, 9)
    with pytest.raises(ValueError, match=r"image must have values in \[0, 1\]; got values from"):
        LIIF(TINY).upscale(image * factor + shift, 2)
    image[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"image must have values in \[0, 1\]; got NaN"):
        LIIF(TINY).upscale(image, 2)
    image[0, 0, 0, 0] = 0
    assert LIIF(TINY).upscale(image * 1.4 - 0.2, 2).shape == (1, 3, 18, 18)  # as bicubic resampling overshoots


def test_upscale_names_weights_that_are_not_finite():
    model = LIIF(TINY)
    model.encoder.head[0].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"weights of this LIIF hold NaN or infinity, first in encoder\.head\.0\.weight"
    ):
        model.upscale(torch.zeros(1, 3, 9, 9), 2)


def test_upscale_of_an_empty_batch():
    assert LIIF(TINY).upscale(torch.zeros(0, 3, 9, 9), 2).shape == (0, 3, 18, 18)


def test_state_dict_has_the_published_keys():
    keys = conv("encoder.sub_mean", 3, 3, 1) | conv("encoder.add_mean", 3, 3, 1)
    keys |= conv("encoder.head.0", 64, 3) | conv("encoder.body.16", 64, 64)
    for block in range(16):
        for layer in (0, 2):
            keys |= conv(f"encoder.body.{block}.body.{layer}", 64, 64)
    for layer, (inputs, outputs) in enumerate([(580, 256), *[(256, 256)] * 3, (256, 3)]):
        keys |= linear(f"imnet.layers.{2 * layer}", outputs, inputs)
    model = LIIF()
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == keys
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in keys if "_mean" in name}
    assert sum(p.numel() for p in model.imnet.parameters()) == 346_883


def published(config, **changes):
    """A checkpoint as yinboc/liif's trainer writes it, and its model."""
    model = LIIF(config)
    args = {
        "encoder_spec": {
            "name": "edsr-baseline",
            "args": {
                "no_upsampling": True,
                "n_resblocks": config.blocks,
                "n_feats": config.features,
            },
        },
        "imnet_spec": {
            "name": "mlp",
            "args": {"out_dim": 3, "hidden_list": list(config.hidden)},
        },
    }
    sd = dict(model.state_dict())
    optimizer = {"name": "adam", "args": {"lr": 1e-4}, "sd": {}}
    model_spec = {"name": "liif", "args": args, "sd": sd} | changes
    return {"model": model_spec, "optimizer": optimizer, "epoch": 1}, model


def test_reads_published_checkpoints(tmp_path):
    checkpoint, model = published(TINY)
    torch.save(checkpoint, tmp_path / "liif.pth")
    loaded = LIIF.from_checkpoint(tmp_path / "liif.pth")
    assert same(loaded, model) and loaded.config == TINY and not loaded.training


def test_published_defaults(tmp_path):
    checkpoint, model = published(LIIFConfig(cell_decode=False, feat_unfold=False))
    args = checkpoint["model"]["args"]
    args["encoder_spec"]["args"] = {"no_upsampling": True}
    args |= {"cell_decode": False, "feat_unfold": False}
    torch.save(checkpoint, tmp_path / "liif.pth")
    assert same(LIIF.from_checkpoint(str(tmp_path / "liif.pth")), model)


def test_safetensors_round_trip(tmp_path):
    model = LIIF(TINY)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"an older file")
    model.save(path, {"steps": 3})
    loaded = LIIF.from_checkpoint(path)
    assert same(loaded, model) and loaded.config == TINY and loaded.notes == {"steps": 3}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def damaged(kind):
    checkpoint, model = published(TINY)
    sd = model.state_dict()
    args = checkpoint["model"]["args"]
    if kind == "swinir":
        args["encoder_spec"] = {"name": "swinir", "args": {}}
    elif kind == "rdn":
        args["encoder_spec"] = {"name": "rdn", "args": {"no_upsampling": True, "RDNconfig": "C"}}
    elif kind == "encoder":
        del args["encoder_spec"]
    elif kind == "decoder":
        args["imnet_spec"] = None
    elif kind == "flag":
        args["posenc"] = True
    elif kind == "upsampler":
        args["encoder_spec"]["args"]["no_upsampling"] = False
    elif kind == "lte":
        checkpoint["model"]["name"] = "lte"
    elif kind == "missing":
        checkpoint["model"]["sd"] = {k: v for k, v in sd.items() if "head" not in k}
    elif kind == "shape":
        checkpoint["model"]["sd"] = sd | {"imnet.layers.0.bias": torch.zeros(5)}
    elif kind == "nothing":
        return {"model": {"weight": torch.zeros(3)}}
    elif kind == "tensor":
        return torch.zeros(3)
    return checkpoint


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("swinir", "its encoder is 'swinir', supported are edsr-baseline, edsr, rdn"),
        ("rdn", "its RDN is not one of 3 x 3 convolutions and the configuration A or B"),
        ("encoder", "its model has no encoder_spec"),
        ("decoder", "its model has no imnet_spec"),
        ("flag", "its config has the entry 'posenc', which a LIIF does not have"),
        ("upsampler", "its encoder has an upsampler"),
        ("lte", "it contains the network 'lte'"),
        ("missing", "it has no tensor encoder.head.0.weight, which its config needs"),
        ("shape", r"its tensor imnet.layers.0.bias has the shape \[5\]; its config needs \[16\]"),
        ("nothing", "it has no tensor imnet.layers.0.weight"),
        ("tensor", "it has no state dict, but a value of the type Tensor"),
    ],
)
def test_unsupported_checkpoints(tmp_path, kind, reason):
    path = tmp_path / "other.pth"
    torch.save(damaged(kind), path)
    with pytest.raises(ValueError, match=f"other.pth is not a LIIF checkpoint: .*{reason}"):
        LIIF.from_checkpoint(path)


@pytest.mark.parametrize("name", ["liif.pth", "liif.safetensors"])
@pytest.mark.parametrize("length", [0, 7, 300, 5000])
def test_truncated_checkpoints(tmp_path, name, length):
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(published(TINY)[0], path)
    else:
        LIIF(TINY).save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{name} is not a LIIF checkpoint: "):
        LIIF.from_checkpoint(path)


def test_safetensors_of_another_model(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"it has no tensor imnet\.layers\.0\.weight"):
        LIIF.from_checkpoint(tmp_path / "other.safetensors")


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        LIIF.from_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize("size", [(70, 90), (13, 100), (100, 13), (1, 1), (24, 25)])
def test_tiles_are_exact(size):
    encoder = EDSR(2, 8).double()
    picture = torch.randn(2, 3, *size, dtype=torch.double)
    with torch.no_grad():
        tiled, whole = encoder.tiled(picture, workspace=1), encoder(picture)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-14)


def test_tiles_keep_to_the_workspace():
    encoder, sizes = EDSR(2, 8), []
    encoder.head.register_forward_hook(lambda _, args, out: sizes.append(args[0].shape[2:].numel()))
    with torch.no_grad():
        encoder.tiled(torch.randn(1, 3, 200, 300), workspace=1 << 19)
    assert len(sizes) > 1 and max(sizes) * 8 * 4 * 4 <= 1 << 19


def test_forward_is_encoder_then_decoder():
    model = LIIF(TINY)
    picture, coord = torch.rand(2, 3, 7, 9), torch.rand(2, 50, 2) * 2 - 1
    cell = torch.full((2, 50, 2), 0.1)
    out = model(picture, coord, cell)
    decoder = LocalImplicitDecoder(8, hidden=TINY.hidden)
    decoder.load_state_dict({k: v for k, v in model.state_dict().items() if "imnet" in k})
    torch.testing.assert_close(out, decoder(model.encoder(picture), coord, cell))
    torch.testing.assert_close(model.query_rgb(coord, cell), out)


def test_every_parameter_learns():
    model = LIIF(TINY)
    model(torch.rand(1, 3, 7, 9), torch.rand(1, 50, 2), torch.rand(1, 2)).square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == {name for name in model.state_dict() if "_mean" in name}


def test_copies():
    model = LIIF(TINY)
    model(torch.rand(1, 3, 7, 9), torch.rand(1, 50, 2), torch.rand(1, 2))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(other, model) and other.config == model.config
        with pytest.raises(RuntimeError, match="call gen_feat first"):
            other.query_rgb(torch.rand(1, 5, 2), torch.rand(1, 2))


@pytest.mark.parametrize(
    ("shape", "options", "size"),
    [
        ((1, 3, 10, 12), {"scale": 2.5}, (25, 30)),
        ((2, 3, 5, 4), {"scale": 1}, (5, 4)),
        ((1, 3, 1, 1), {"scale": 3.7}, (4, 4)),
        ((1, 3, 6, 5), {"size": (9, 31)}, (9, 31)),
        ((1, 3, 6, 5), {"scale": 0.01}, (1, 1)),
    ],
)
def test_upscale(shape, options, size):
    out = LIIF(TINY).upscale(torch.rand(shape), **options)
    assert out.shape == (*shape[:2], *size) and not out.requires_grad
    assert out.min() >= 0 and out.max() <= 1


def test_upscale_in_pieces():
    """Tiles and bands of the smallest workspace give the same image; progress reaches the total."""
    model, picture, seen = LIIF(TINY), torch.rand(2, 3, 50, 60), []
    small = model.upscale(picture, 2.7, workspace=1 << 19, progress=lambda *rows: seen.append(rows))
    torch.testing.assert_close(small, model.upscale(picture, 2.7), rtol=0, atol=1e-5)
    done = [rows for rows, _ in seen]
    assert done == sorted(set(done)) and len(done) > 3 and seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("encoder", ["edsr", "rdn"])
def test_progress_of_an_encoder_in_one_piece(encoder):
    """It is reported after each block."""
    model, seen = LIIF(LIIFConfig(blocks=3, features=8, hidden=(8,), encoder=encoder)), []
    model.upscale(torch.rand(1, 3, 20, 22), 2, progress=lambda *done: seen.append(done))
    done = [part for part, _ in seen]
    assert done == sorted({*done}) and len(done) > 3 and done[-1] == seen[-1][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_upscale_in_other_dtypes(dtype):
    model, picture = LIIF.pretrained(), torch.rand(1, 3, 12, 13)
    other = copy.deepcopy(model).to(dtype)
    out = other.upscale(picture.to(dtype), 2)
    assert out.dtype == dtype and other.upscale(picture, 2).dtype == picture.dtype
    torch.testing.assert_close(out.float(), model.upscale(picture, 2), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 3, 4, 4), {}, "give either scale or size; got scale=None, size=None"),
        ((1, 3, 4, 4), {"scale": 2, "size": (8, 8)}, "give either scale or size"),
        ((1, 1, 4, 4), {"scale": 2}, r"image must have shape \[B, 3, H, W\] .*; got \[1, 1, 4, 4\]"),
        ((3, 4, 4), {"scale": 2}, "image must have 4 dimensions"),
        ((1, 3, 4, 4), {"size": (0, 8)}, "size must be two positive integers"),
    ],
)
def test_upscale_errors(shape, options, message):
    with pytest.raises(ValueError, match=message):
        LIIF(TINY).upscale(torch.rand(shape), **options)


@pytest.mark.parametrize("scale", SCALES)
def test_pretrained_beats_bicubic(scale):
    (photo,) = photographs(HELD_OUT)
    ours, bicubic = compare_upscaling(LIIF.pretrained(), photo.crop((220, 180, 480, 360)), scale)
    assert ours > bicubic + 0.3


def test_notes_of_pretrained():
    model = LIIF.pretrained()
    assert model.config == SMALL and not model.training
    assert HELD_OUT not in TRAINED_ON
    assert model.notes["trained_on"] == [f"skimage.data.{name}" for name in TRAINED_ON]
    assert {f"x{scale}" for scale in SCALES} == model.notes["psnr_and_bicubic"].keys()


@pytest.mark.parametrize("value", [0.2, 0.5, 0.9])
def test_the_rim_of_even_pictures(value):
    """The zeros around the picture change corners, as docs/networks.md says; a border that is cut off avoids it."""
    model = LIIF.pretrained()
    off = (model.upscale(torch.full((1, 3, 32, 32), value), 4) - value).abs()
    assert off[..., 8:-8, 8:-8].max() < 0.008 and off[..., :8, 16:-16].max() < 0.013
    assert off.max() < 0.13 and (value == 0.5 or off.max() > 0.05)
    bordered = model.upscale(torch.full((1, 3, 40, 40), value), 4)[..., 16:-16, 16:-16]
    assert (bordered - value).abs().max() < 0.008
