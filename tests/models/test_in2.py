"""IN²: parameters, kernels against plain PyTorch, sizes, masks, dtypes and checkpoints."""

import copy
import dataclasses
import pickle

import pytest
import torch

from inr_kernels.models import IN2, IN2Config
from inr_kernels.models.in2.blocks import ChannelAttentionBlock, ClampedAttention

TINY = IN2Config(channels=(16, 16, 32), blocks=1, heads=4, alpha=0.5, squeeze=4, hidden=(32, 24), any_size=True)


@torch.no_grad()
def stirred(model):
    """The model in eval mode, with statistics, scales and colours unlike a new network's."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):  # of norms
            parameter.uniform_(0.5, 1.5)
        if name.endswith("attention.1.bias"):  # keeps every gate open
            parameter.fill_(1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    for linear in (linear for layer in model.decoder.layers for linear in layer.layers[::2]):
        linear.bias.uniform_(-0.1, 0.1)
    model.decoder.head.weight.mul_(2)
    return model.eval()


def both(config=TINY, dtype=torch.double):
    """A network on the kernels, and the same in plain PyTorch."""
    ours, plain = stirred(IN2(config)), IN2(config, eager=True)
    plain.load_state_dict(ours.state_dict())
    return ours.to(dtype), plain.to(dtype).eval()


def example(batch=1, height=57, width=61, dtype=torch.double):
    """A random image, and a mask of 4 x 4 blocks, half of them missing."""
    holes = torch.rand(batch, 1, -(-height // 4), -(-width // 4)) < 0.5
    mask = holes.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :height, :width]
    return torch.rand(batch, 3, height, width, dtype=dtype), mask.to(dtype)


def close(a, b, atol=1e-7):
    """Compares non-constant images. (In float64, "liif" has float32 weights that sum to 1 within 1e-7.)"""
    assert b.std() > 0.02
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters():
    with torch.device("meta"):
        model = IN2()
    assert count(model) == 15_501_919
    assert [*map(count, model.encoder)] == [81_988, 390_792, 1_559_824]
    assert count(model.body) + count(model.body_conv) == 12_888_512
    assert [*map(count, model.decoder.layers)] == [231_296, 182_080, 165_696]
    assert count(model.decoder.head) == 1_731
    assert model.bytes_per_pixel() == model.half().bytes_per_pixel() == 688  # a CPU computes in float32


def test_eager_has_the_same_state_dict():
    ours, plain = (IN2(TINY, eager=flag).state_dict() for flag in (False, True))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in plain.items()}


@pytest.mark.parametrize("eager", [False, True])
def test_channel_attention_is_that_of_hat(golden, eager):
    case = golden("hat_cab")
    block = ChannelAttentionBlock(16, int(case["compress_ratio"]), int(case["squeeze_factor"]), eager=eager)
    block.load_state_dict({name[6:]: value for name, value in case.items() if name.startswith("state.")})
    torch.testing.assert_close(block(case["x"]), case["out"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(49, 49), (57, 61)])
def test_full_size_network(size):
    ours, plain = both(IN2Config(), torch.float)
    image, mask = example(1, *size, torch.float)
    with torch.no_grad():
        close(ours.predict(image, mask), plain.predict(image, mask), atol=3e-6)


@pytest.mark.parametrize("upsample", ["split", "bilinear", "liif"])
@pytest.mark.parametrize("size", [(57, 61), (49, 49), (30, 100), (9, 10), (64, 64)])
def test_equals_plain_pytorch(upsample, size):
    ours, plain = both(dataclasses.replace(TINY, upsample=upsample))
    image, mask = example(2, *size)
    with torch.no_grad():
        close(ours.predict(image, mask), plain.predict(image, mask))
        close(ours(image, mask, (35, 130)), plain(image, mask, (35, 130)))


@pytest.mark.parametrize(
    "change",
    [
        {"down_kernel": 4},
        {"ratio": 0.5},
        {"padding": "zeros"},
        {"padding": "replicate"},
        {"norm": "none"},
        {"encoder_alpha": 0.5},
        {"groups": 1},
        {"heads": 8},
        {"window": 3},
        {"rel_pos_bias": False},
        {"alpha": 0.03},
        {"attention_residual": False},
        {"compress": 3, "squeeze": 16},
        {"mlp_ratio": 1.5},
        {"group_convs": False},
        {"cell_scale": 2.0},
        {"fill": "smooth"},
        {"activation": "sigmoid"},
        {"encoder": "strided"},
        {"encoder": "lama"},
        {"encoder": "lama", "padding": "zeros", "norm": "none", "body": "ffc"},
        {"body": "ffc"},
        {"channel_attention": False},
        {"pyramid": False},
        {"pyramid": False, "upsample": "liif"},
    ],
)
def test_every_config_field_matters(change):
    """Kernels and plain PyTorch agree on it, and it changes the output."""
    ours, plain = both(dataclasses.replace(TINY, **change))
    image, mask = example(1, 40, 57)
    torch.manual_seed(0)
    usual = both()[0]
    shared = {
        k: v for k, v in ours.state_dict().items() if k in (own := usual.state_dict()) and own[k].shape == v.shape
    }
    usual.load_state_dict(shared, strict=False)
    with torch.no_grad():
        out = ours.predict(image, mask)
        close(out, plain.predict(image, mask))
        assert not torch.allclose(out, usual.predict(image, mask), rtol=0, atol=1e-4)


LARGE = [(443, 591), (591, 443), (683, 384), (768, 1024), (1024, 768), (1024, 576)]


@pytest.mark.parametrize("size", [*LARGE, (57, 61), (49, 49), (48, 20), (9, 9), (10, 300)])
def test_any_size(size):
    model, (image, mask) = stirred(IN2(TINY)), example(1, *size, torch.float)
    out = model.inpaint(image, mask)
    assert out.shape == image.shape and out.isfinite().all() and not out.requires_grad
    known = (mask == 0).expand_as(image)
    assert torch.equal(out[known], image[known]) and not torch.equal(out, image)


def test_inner_layers_render_onto_the_encoders_grids():
    """At any output size."""
    model, sizes = IN2(TINY).eval(), []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _, args, out: sizes.append((*args[0].shape[2:], *out.shape[2:])))
    image, mask = example(1, 443, 91, torch.float)
    assert model.inpaint(image, mask, scale=0.5).shape == (1, 3, 222, 46)
    assert sizes == [(56, 12, 111, 23), (111, 23, 222, 46), (222, 46, 222, 46)]
    assert TINY.grids((443, 91)) == [(222, 46), (111, 23), (56, 12)]


def test_a_clamped_window_covers_the_map():
    attention = ClampedAttention(12, 2, 7, rel_pos_bias=True).double()
    x = torch.randn(1, 5, 4, 12, dtype=torch.double)
    query, key, value = attention.qkv(x).view(20, 3, 2, 6).permute(1, 2, 0, 3)
    y, x_ = torch.meshgrid(torch.arange(5), torch.arange(4), indexing="ij")
    y, x_ = y.flatten(), x_.flatten()
    bias = attention.rpb[:, y - y[:, None] + 6, x_ - x_[:, None] + 6]
    out = (query @ key.mT * 6**-0.5 + bias).softmax(-1) @ value
    torch.testing.assert_close(attention(x), attention.proj(out.transpose(0, 1).reshape(1, 5, 4, 12)))


def test_masks_of_all_and_no_pixels():
    model, (image, mask) = stirred(IN2(TINY)), example(1, 30, 41, torch.float)
    assert torch.equal(model.inpaint(image, torch.zeros_like(mask)), image)
    other, everything = torch.rand_like(image), torch.ones_like(mask)
    out = model.inpaint(image, everything)
    assert torch.equal(out, model.inpaint(other, everything)) and out.isfinite().all()
    with torch.no_grad():  # as inpaint: gradients of weights need another order of operations
        assert torch.equal(out, model.predict(image, everything))


def test_values_under_the_mask_are_ignored():
    model, (image, mask) = stirred(IN2(TINY)), example(1, 30, 41, torch.float)
    missing = (mask == 1).expand_as(image)
    for value in (float("nan"), float("inf"), 7.0):
        assert torch.equal(model.inpaint(image.masked_fill(missing, value), mask), model.inpaint(image, mask))


def test_images_of_a_batch_are_independent():
    model, (image, mask) = stirred(IN2(TINY)).double(), example(3, 30, 41)
    mask[1], mask[2] = 0, 1
    alone = [model.inpaint(image[i : i + 1], mask[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(model.inpaint(image, mask), torch.cat(alone))
    assert model.inpaint(image[:0], mask[:0]).shape == (0, 3, 30, 41)


def test_sizes_and_bands():
    model, (image, mask), seen = stirred(IN2(TINY)), example(1, 30, 41, torch.float), []
    large = model.inpaint(image, mask, scale=2.5)
    assert large.shape == (1, 3, 75, 102)
    bands = model.inpaint(image, mask, (75, 102), workspace=1 << 18, progress=lambda *rows: seen.append(rows))
    torch.testing.assert_close(bands, large, rtol=0, atol=1e-6)
    assert len(seen) > 2 and seen[-1][0] == seen[-1][1]
    assert torch.equal(model.inpaint(image, mask, (30, 41)), model.inpaint(image, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    exact, _ = both()
    image, mask = example(2, 57, 61, dtype)
    errors = []
    with torch.no_grad():
        truth = exact.predict(image.double(), mask.double())
        for model in both():
            model.load_state_dict(exact.state_dict())
            out = model.to(dtype).predict(image, mask)
            assert out.dtype == dtype
            errors.append((out - truth).square().mean().sqrt())
    assert errors[0] < 2 * errors[1] and errors[0] < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    (ours, plain), (image, mask) = both(dtype=torch.float), example(2, 57, 61, torch.float)
    truth = copy.deepcopy(ours).double().predict(image.double(), mask.double()).detach()
    with torch.autocast("cpu", dtype), torch.no_grad():
        errors = [(model.predict(image, mask) - truth).square().mean().sqrt() for model in (ours, plain)]
        out = ours(image, mask)
    known = (mask == 0).expand_as(image)
    assert out.dtype == torch.float and torch.equal(out[known], image[known])
    assert errors[0] < 2 * errors[1] and errors[0] < 2 * torch.finfo(dtype).eps


def test_parameters_in_half_precision_keep_known_pixels():
    model, (image, mask) = stirred(IN2(TINY)).to(torch.bfloat16), example(1, 30, 41, torch.float)
    out, known = model.inpaint(image, mask), (mask == 0).expand_as(image)
    assert out.dtype == torch.float and torch.equal(out[known], image[known])


def test_channels_last():
    model, (image, mask) = stirred(IN2(TINY)).double(), example(2)
    expected = model.inpaint(image, mask)
    model = model.to(memory_format=torch.channels_last)
    close(model.inpaint(image.to(memory_format=torch.channels_last), mask), expected, atol=1e-12)


def test_compile():
    model, (image, mask) = stirred(IN2(TINY)), example(1, 30, 41, torch.float)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(image, mask), model(image, mask), atol=1e-5)


def test_training():
    """Gradients of all parameters and running statistics equal those of plain PyTorch."""
    (ours, plain), (image, mask) = both(), example(2, 41, 57)
    grads = []
    for model in (ours, plain):
        out = model.train()(image, mask)
        (out - image).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        scale = grads[1][name].abs().max()
        assert scale > 0 and grad.isfinite().all(), name
        torch.testing.assert_close(grad / scale, grads[1][name] / scale, rtol=0, atol=1e-10)
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_decode_from_changed_features():
    """As feature refinement uses the two parts."""
    model, (image, mask) = stirred(IN2(TINY)), example(1, 30, 41, torch.float)
    feat, grids, _ = model.encode(image, mask)
    assert grids == ((8, 11), (15, 21))
    assert torch.equal(model.decode((feat, grids), (30, 41)), model.predict(image, mask))
    feat = feat.detach().requires_grad_()
    model.decode((feat, grids), (30, 41)).sum().backward()
    assert feat.grad.any()


def test_copies_and_checkpoints(tmp_path):
    model, (image, mask) = stirred(IN2(TINY)), example(1, 30, 41, torch.float)
    path = tmp_path / "in2.safetensors"
    model.save(path, {"steps": 3})
    loaded = IN2.from_checkpoint(path)
    assert loaded.config == TINY and loaded.notes == {"steps": 3} and not loaded.training
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.inpaint(image, mask), model.inpaint(image, mask))
    close(IN2.from_checkpoint(path, eager=True).inpaint(image, mask), model.inpaint(image, mask), atol=1e-5)


@pytest.mark.parametrize("kind", ["truncated", "empty", "another", "missing"])
def test_damaged_checkpoints(tmp_path, kind):
    from safetensors.torch import save_file

    path = tmp_path / "in2.safetensors"
    IN2(TINY).save(path)
    if kind == "another":
        save_file({"weight": torch.zeros(2)}, path)
    elif kind == "missing":
        save_file({"weight": torch.zeros(2)}, path, {"config": "{}"})
    else:
        path.write_bytes(path.read_bytes()[: 500 if kind == "truncated" else 0])
    with pytest.raises(ValueError, match=r"in2.safetensors is not an IN2 checkpoint: .+"):
        IN2.from_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        IN2.from_checkpoint(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("image", "mask", "options", "error", "message"),
    [
        ((1, 3, 20, 20), (1, 1, 20, 21), {}, ValueError, r"mask must have shape \[B, 1, H, W\] = \[1, 1, 20, 20\]"),
        ((1, 3, 20, 20), (1, 3, 20, 20), {}, ValueError, "mask must have shape"),
        ((2, 3, 20, 20), (1, 1, 20, 20), {}, ValueError, "mask must have shape"),
        ((1, 1, 20, 20), (1, 1, 20, 20), {}, ValueError, r"image must have shape \[B, 3, H, W\]"),
        ((3, 20, 20), (1, 1, 20, 20), {}, ValueError, "image must have 4 dimensions"),
        ((1, 3, 8, 20), (1, 1, 8, 20), {}, ValueError, r"sides of at least 9; got \[1, 3, 8, 20\]"),
        ((1, 3, 20, 20), (1, 1, 20, 20), {"size": (0, 5)}, ValueError, "size must be two positive integers"),
        ((1, 3, 20, 20), (1, 1, 20, 20), {"scale": 0}, ValueError, "scale must be positive and finite; got 0"),
        (
            (1, 3, 20, 20),
            (1, 1, 20, 20),
            {"scale": 2, "size": (5, 5)},
            ValueError,
            "size must be None if scale is given",
        ),
        ((1, 3, 20, 20), None, {}, TypeError, "mask must be a torch.Tensor; got NoneType"),
    ],
)
def test_errors(image, mask, options, error, message):
    with pytest.raises(error, match=message):
        IN2(TINY)(torch.rand(image), None if mask is None else torch.zeros(mask), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upsample": "nearest"}, "upsample must be one of split, bilinear, liif; got 'nearest'"),
        ({"padding": "circular"}, "padding must be one of"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"down_kernel": 5}, "down_kernel must be 3 or 4; got 5"),
        ({"ratio": 1.0}, "ratio must give a width of 16 at least one local and one global channel; got 1.0"),
        ({"heads": 5}, "heads must divide 32 channels; got 5"),
        ({"squeeze": 32}, r"channels must be at least max\(compress, squeeze\) = 32"),
        ({"channels": ()}, "channels must not be empty"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
