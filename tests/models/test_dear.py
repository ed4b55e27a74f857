"""DEAR: kernels against plain PyTorch, any size and mask, precision, initialization, checkpoints."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inr_kernels.models import DEAR, DEARConfig
from inr_kernels.models.dear.config import SMALL
from inr_kernels.models.dear.losses import dear_loss, sample_queries

TINY = DEARConfig(channels=16, features=6, blocks=2, filter_blocks=1, hidden=(12, 10))
CONFIGS = {
    "default": {},
    "no norm": {"norm": "none"},
    "smooth fill": {"fill": "smooth"},
    "literal": {"high_pass": "ones", "padding": "zeros"},
    "softmax over all": {"softmax": "all", "padding": "replicate"},
    "sizes": {"filter_size": 5, "importance_size": 5},
    "keys": {"mask_keys": True},
    "unfold and cell": {"feat_unfold": True, "cell_decode": True},
    "no ReLU, no sigmoid": {"feature_relu": False, "importance_sigmoid": False},
    "no DSE": {"dse": False},
    "no USE": {"use": False},
    "no PIM": {"pim": False},
    "base": {"dse": False, "use": False, "pim": False},
}


def network(dtype=torch.float64, **changes):
    """A DEAR whose output depends on every parameter, and the same network in plain PyTorch."""
    config = dataclasses.replace(TINY, **changes)
    fused, plain = DEAR(config), DEAR(config, eager=True)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    plain.load_state_dict(fused.state_dict())
    return fused.to(dtype), plain.to(dtype)


def example(*size, batch=2, dtype=torch.float64):
    """Random images and random masks with at least one known pixel."""
    mask = (torch.rand(batch, 1, *size) < 0.4).to(dtype)
    mask[..., 0, 0] = 0
    return torch.rand(batch, 3, *size, dtype=dtype), mask


def close(a, b, atol=1e-6):  # float64, except for the ensemble's float32 weights
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_parameters():
    model = DEAR()
    assert sum(p.numel() for p in model.parameters()) == 21_962_206
    assert "21,962,206 parameters" in DEAR.__doc__
    assert model.encoder[0].weight.shape == (64, 4, 7, 7) and model.encoder[0].stride == (1, 1)
    assert len(model.encoder) - 6 == len(model.filter_encoder) - 6 == 8
    assert model.filter_head.weight.shape == (256 * 9, 256, 1, 1)
    assert [layer.weight.shape[1] for layer in model.implicit.imnet.layers[::2]] == [131, 256, 256, 256, 256]
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in DEAR(eager=True).state_dict().items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_plain_pytorch(name):
    fused, plain = network(**CONFIGS[name])
    image, mask = example(13, 18)
    mask[0] *= torch.rand_like(mask[0])  # soft masks, too
    for ours, theirs in zip(fused.encode(image, mask), plain.encode(image, mask), strict=True):
        close(ours, theirs, 1e-10)
    assert fused.predict(image, mask).std() > 0.01
    close(fused.predict(image, mask, (29, 31)), plain.predict(image, mask, (29, 31)))
    coord, cell = torch.rand(2, 40, 2) * 2 - 1, torch.full((2, 2), 0.1)
    cell = cell if fused.config.cell_decode else None
    close(fused.query(image, mask, coord, cell), plain.query(image, mask, coord, cell))


def test_plain_pytorch_calls_no_kernel():
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.name())
            return func(*args, **kwargs or {})

    kernels = {f"inr_kernels::{op}" for op in ("elementwise_filter", "unmask_attention", "local_implicit")}
    for model, expected in zip(network(), (kernels, set()), strict=True):
        image, mask = example(12, 12)
        for run, coord in ((model, ()), (model.query, [torch.zeros(2, 1, 2)])):
            called = set()
            with torch.no_grad(), Recorder():
                run(image, mask, *coord)
            assert {name for name in called if name.startswith("inr_kernels")} == expected


SIZES = [(1, 1), (1, 9), (33, 1), (2, 3), (5, 7), (12, 12), (13, 30), (16, 17)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"scale": 2.5}, {"size": (11, 6)}])
def test_any_size(size, options):
    fused, plain = network()
    image, mask = example(*size)
    out = fused.predict(image, mask, **options)
    scale = options.get("scale", 1)
    assert out.shape == (2, 3, *options.get("size", [max(1, round(n * scale)) for n in size]))
    close(out, plain.predict(image, mask, **options))


def test_empty_batch():
    out = network()[0](torch.rand(0, 3, 9, 8).double(), torch.rand(0, 1, 9, 8).double(), scale=2)
    assert out.shape == (0, 3, 18, 16)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("mask_keys", [False, True])
def test_every_image_has_its_own_mask(eager, mask_keys):
    """Masks of no pixel, of all pixels, and soft ones."""
    model = network(mask_keys=mask_keys)[eager]
    image, mask = example(9, 14, batch=4)
    mask[1], mask[2], mask[3] = 0, 1, torch.rand(1, 9, 14)
    together = model(image, mask, scale=1.5)
    assert together.isfinite().all()
    for i in range(4):
        close(together[i : i + 1], model(image[i : i + 1], mask[i : i + 1], scale=1.5))


@pytest.mark.parametrize("eager", [False, True])
def test_values_under_the_mask_are_ignored(eager):
    model = network()[eager]
    image, mask = example(9, 14)
    expected = model.predict(image, mask)
    hidden = torch.where(mask == 1, torch.nan, image)
    close(model.predict(hidden, mask), expected, 0)
    _, kernels, _ = model.encode(image, mask)
    close(model.reconstruct(hidden, mask, kernels), model.reconstruct(image, mask, kernels), 0)
    assert (model.predict(image, 1 - mask) - expected).abs().max() > 1e-3


def test_attention_is_that_of_the_paper():
    """Eq. 6-7 written out: E is the mean of F at missing pixels; W is in (0, 1)."""
    model = network()[0]
    image, mask = example(9, 14)
    encoded, *_ = model.encode(image, mask)
    feat, attended, weight = encoded.split([6, 6, 1], 1)
    f, m = feat.flatten(2).transpose(1, 2), mask.flatten(2).transpose(1, 2)
    expected = (((1 - m) * f) @ f.transpose(1, 2) / 6**0.5).softmax(-1) @ f
    close(attended.flatten(2).transpose(1, 2), expected, 1e-12)
    holes = attended.transpose(0, 1)[:, mask[:, 0] == 1]
    means = feat.mean((2, 3)).repeat_interleave(mask.sum((1, 2, 3)).long(), 0)
    close(holes.transpose(0, 1), means, 1e-12)
    assert feat.min() >= 0 and weight.min() > 0 and weight.max() < 1


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_those_of_plain_pytorch(name):
    models = network(**CONFIGS[name])
    image, mask = example(9, 14)
    coord, cell = torch.rand(2, 40, 2) * 2 - 1, torch.full((2, 2), 0.1)
    for model in models:
        encoded, kernels, seen = model.encode(image, mask)
        rgb = model.decode_at(encoded, seen, coord, cell if model.config.cell_decode else None)
        rebuilt = model.reconstruct(image, mask, kernels) if model.config.pim else None
        loss = dear_loss(rgb, torch.zeros_like(rgb), rebuilt, image)
        loss.backward()
    for (key, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert ours.grad.any(), key
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=key)


def test_predict_has_gradients():
    model, _ = network()
    model.predict(*example(9, 14), scale=1.5).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eager", [False, True])
def test_half_precision(dtype, eager):
    model = network(torch.float32, norm="none")[eager]
    image, mask = example(13, 18, dtype=torch.float32)
    expected = model.predict(image, mask, scale=2).detach()
    half = copy.deepcopy(model).to(dtype).predict(image, mask, scale=2)
    assert half.dtype == dtype
    assert (half - expected).norm() < 0.05 * expected.norm()
    with torch.autocast("cpu", dtype):
        cast = model.predict(image, mask, scale=2)
    assert cast.dtype == dtype and model.encode(image, mask)[0].dtype == torch.float32
    assert (cast - expected).norm() < 0.05 * expected.norm()
    cast.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiles():
    model = network(torch.float32)[0]
    image, mask = example(13, 18, dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(image, mask, (20, 31)), model(image, mask, (20, 31)), 1e-5)
    close(compiled(image, mask[:, 0] > 0), model(image, mask), 1e-5)


def test_memory_format_does_not_matter():
    model, _ = network()
    image, mask = example(13, 18)
    expected = model(image, mask)
    close(model(image.contiguous(memory_format=torch.channels_last), mask), expected, 1e-12)
    padded_image, padded_mask = (torch.cat([x, x], 3)[..., :18] for x in (image, mask))
    close(model(padded_image, padded_mask), expected, 1e-12)
    close(model.to(memory_format=torch.channels_last)(image, mask), expected, 1e-12)


def test_bands():
    """The smallest workspace gives the same image; progress reaches the total."""
    model, seen = network()[0], []
    image, mask = example(13, 18)
    small = model(image, mask, scale=20, workspace=1 << 18, progress=lambda *rows: seen.append(rows))
    close(small, model(image, mask, scale=20), 1e-12)
    done = [rows for rows, _ in seen]
    assert done == sorted(set(done)) and len(done) > 3 and seen[-1][0] == seen[-1][1]


def test_tiles():
    """A tile is the middle of the map of its surroundings; a tile larger than the image changes nothing."""
    model, _ = network(norm="none")
    image, mask = example(13, 30)
    mask = mask / 2
    close(model.predict(image, mask, tile=30), model.predict(image, mask), 1e-12)
    out = model.inpaint(image, mask, scale=2, tile=8)
    assert out.shape == (2, 3, 26, 60)
    seen, mask = model._see(image, mask)
    encoded = model._encode_tiles(seen, mask, 8)
    part, *_ = model.encode(image[..., 4:, 12:28], mask[..., 4:, 12:28])
    close(encoded[..., 8:, 16:24], part[..., 4:, 4:12], 1e-12)
    model._encode_tiles(seen, mask, 5).sum().backward()
    assert model.encoder[0].weight.grad.any()


@pytest.mark.parametrize("mask_keys", [False, True])
def test_progress(mask_keys):
    """Attention is most of the work of a large image: its rows are reported, which changes nothing."""
    model, seen = network(mask_keys=mask_keys)[0], [0.0]
    image, mask = example(70, 40)
    out = model.inpaint(image, mask / 2, progress=lambda done, total: seen.append(done / total))
    close(out, model.inpaint(image, mask / 2), 1e-12)
    convolutions, attention, rendering = model._work(image, (70, 40))
    steps = [after - before for before, after in itertools.pairwise(seen)]
    assert min(steps) > 0 and seen[-1] == 1 and attention > 2 * (convolutions + rendering)
    assert max(steps) < 0.05 or mask_keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inpaint_keeps_known_pixels(dtype):
    model = network(dtype)[0]
    image, mask = example(13, 18, dtype=torch.float32)
    image = image.to(dtype)
    out = model.inpaint(image, mask)
    known = (mask == 0).expand_as(out)
    assert torch.equal(out[known], image[known]) and not out.requires_grad
    exact = image.double() / 3  # with more digits than the network's
    assert torch.equal(model.inpaint(exact, mask.double())[known], exact[known])
    with torch.no_grad():
        close(out[~known], model.predict(image, mask)[~known].clamp(0, 1), 0)
    large = model.inpaint(image * 1.4, mask, scale=3)
    assert large.shape == (2, 3, 39, 54) and large.min() >= 0 and large.max() <= 1


IMAGE, MASK = torch.rand(2, 3, 8, 9), torch.zeros(2, 1, 8, 9)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((IMAGE[0], MASK), {}, "image must have 4 dimensions"),
        (
            (IMAGE[:, :2], MASK),
            {},
            r"image must have shape \[B, 3, H, W\] with sides of at least 1; got \[2, 2, 8, 9\]",
        ),
        ((IMAGE[..., :0], MASK), {}, "image must have shape"),
        (
            (IMAGE, MASK[..., :8]),
            {},
            r"mask must have shape \[B, 1, H, W\] = \[2, 1, 8, 9\] or .* \[2, 8, 9\]; got \[2, 1, 8, 8\]",
        ),
        ((IMAGE, MASK[:1]), {}, "mask must have shape"),
        ((IMAGE, IMAGE), {}, "mask must have shape"),
        ((IMAGE, MASK), {"size": (9, 9), "scale": 2}, r"size must be None if scale is given; got \(9, 9\) and 2"),
        ((IMAGE, MASK), {"scale": float("nan")}, "scale must be positive and finite; got nan"),
        ((IMAGE, MASK), {"tile": 0}, "tile must be positive; got 0"),
        ((IMAGE, MASK), {"tile": 8}, "tile must be None in a config with instance norm; got 8"),
        ((IMAGE, MASK), {"size": (0, 9)}, "size must be two positive integers"),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        DEAR(TINY)(*arguments, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fill": "mean"}, "fill must be one of zeros, smooth; got 'mean'"),
        ({"norm": "batch"}, "norm must be one of instance, none; got 'batch'"),
        ({"high_pass": "one"}, "high_pass must be one of delta, ones"),
        ({"softmax": "channels"}, "softmax must be one of taps, all"),
        ({"padding": "circular"}, "padding must be one of reflect, replicate, zeros"),
        ({"channels": 18}, "channels must be a positive multiple of 4; got 18"),
        ({"filter_size": 4}, "filter_size must be odd and positive; got 4"),
        ({"importance_size": -3}, "importance_size must be odd and positive; got -3"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        DEARConfig(**changes)


def test_loss():
    rgb, target = torch.rand(2, 5, 3), torch.rand(2, 5, 3)
    rebuilt, image = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    expected = (rgb - target).abs().mean() + 0.01 * (rebuilt - image).abs().mean()
    close(dear_loss(rgb, target, rebuilt, image), expected, 1e-7)


def test_queries_are_pixels():
    image = torch.rand(2, 3, 7, 12)
    coord, cell, rgb = sample_queries(image, 2000, torch.Generator().manual_seed(1))
    found = torch.nn.functional.grid_sample(image, coord.flip(-1)[:, None], mode="nearest", align_corners=False)
    assert torch.equal(found[:, :, 0].transpose(1, 2), rgb)
    assert torch.equal(cell, torch.tensor([[2 / 7, 2 / 12]] * 2))
    pixels = {tuple(pixel) for pixel in ((coord[0] + 1) / cell[0] - 0.5).round().int().tolist()}
    assert pixels == set(itertools.product(range(7), range(12)))


def test_initialization():
    """A new network gives grey, reconstructs its input, and has the masked image among its features."""
    model = DEAR(dataclasses.replace(SMALL, fill="zeros"))
    image, mask = example(16, 20, dtype=torch.float32)
    encoded, kernels, known = model.encode(image, mask)
    assert torch.equal(known, image * (1 - mask))
    close(model.decode_at(encoded, known, torch.zeros(2, 1, 2)), torch.full((2, 1, 3), 0.5), 0.3)
    close(model.reconstruct(image, mask, kernels), known, 0.6)
    for colour in range(3):
        both = torch.stack([encoded[:, colour].flatten(), known[:, colour].flatten()])
        assert both.corrcoef()[0, 1] > 0.9
    gone = encoded[:, :3] * mask
    assert gone.abs().mean() < 0.2


@pytest.mark.parametrize("size", [(26, 36), (29, 31), (5, 40)])
def test_a_new_network_starts_from_the_smooth_fill(size):
    """`predict` and `query` add the same interpolation to the network's output."""
    image, mask = example(13, 18, dtype=torch.float32)
    fresh = DEAR(dataclasses.replace(TINY, fill="smooth"))
    *_, seen = fresh.encode(image, mask)
    start = torch.nn.functional.interpolate(seen, size, mode="bicubic")
    close(fresh.predict(image, mask, size), start)
    model = network(torch.float32, fill="smooth")[0]
    out = model.predict(image, mask, size)
    assert (out - start).abs().mean() > 1e-3
    coord = torch.stack(torch.meshgrid(*((2 * torch.arange(n) + 1) / n - 1 for n in size), indexing="ij"), -1)
    found = model.query(image, mask, coord.flatten(0, 1).expand(2, -1, 2))
    close(found.transpose(1, 2).view_as(out), out, 1e-5)


def test_checkpoint_round_trip(tmp_path):
    model, path = DEAR(dataclasses.replace(TINY, mask_keys=True)), tmp_path / "model.safetensors"
    path.write_bytes(b"an older file")
    model.save(path, {"steps": 3})
    loaded = DEAR.from_checkpoint(path)
    assert loaded.config == model.config and loaded.notes == {"steps": 3} and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert DEAR.from_checkpoint(path, eager=True).eager
    size = path.stat().st_size
    model.save(path, dtype=torch.float16)
    assert path.stat().st_size < 0.7 * size
    for a, b in zip(DEAR.from_checkpoint(path).parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("length", [0, 7, 300, 5000])
def test_truncated_checkpoints(tmp_path, length):
    path = tmp_path / "dear.safetensors"
    DEAR(TINY).save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"dear.safetensors is not a DEAR checkpoint: "):
        DEAR.from_checkpoint(path)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        DEAR.from_checkpoint(tmp_path / "none.safetensors")
