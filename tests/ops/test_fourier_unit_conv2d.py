"""conv2d and FusedSequential: numbers against torch's convolutions, gradients, errors, and what is fused."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from op_backends import backends_of
from torch import nn

import inr_kernels
from inr_kernels import explain
from inr_kernels.fourier_unit import FFC, FFC_BN_ACT, FusedSequential, conv2d
from inr_kernels.fourier_unit.op import kept

HALF = {"stride": 2, "padding": 1}
REFLECT = {"padding_mode": "reflect"}
# batch, channels, outputs, height, width, kernel, options
PROBLEMS = {
    "one pixel": (1, 1, 1, 1, 1, (1, 1), {}),
    "1 x 1": (2, 5, 4, 7, 9, (1, 1), {}),
    "1 x 1, chunks of channels": (1, 400, 30, 5, 30, (1, 1), {}),
    "1 x 1, a stride": (2, 5, 4, 7, 9, (1, 1), {"stride": 2}),
    "half, reflected": (2, 5, 14, 7, 9, (3, 3), HALF | REFLECT),
    "half, chunks of channels": (1, 70, 25, 6, 66, (3, 3), HALF | REFLECT),
    "half, zeros": (1, 40, 64, 9, 130, (3, 3), HALF),
    "7 x 7": (1, 4, 64, 10, 15, (7, 7), {}),
    "7 x 7 to 3 channels": (1, 33, 3, 8, 70, (7, 7), {"padding": 3} | REFLECT),
    "long rows": (1, 2, 2, 4, 1100, (3, 3), {"padding": 1} | REFLECT),
    "larger than the image": (1, 2, 2, 2, 2, (5, 5), {"padding": 2}),
    "steps of 3": (2, 7, 3, 8, 11, (5, 5), {"stride": 3, "padding": 2}),
    "two strides": (1, 3, 5, 5, 21, (2, 3), {"stride": (1, 4), "padding": (0, 2)} | REFLECT),
    "transposed": (1, 70, 30, 5, 33, (3, 3), HALF | {"transposed": True, "output_padding": 1}),
    "transposed, 4 x 4": (2, 7, 3, 5, 6, (4, 4), HALF | {"transposed": True}),
    "transposed, stride 1": (2, 7, 3, 5, 6, (3, 2), {"transposed": True}),
    "transposed, outputs without a product": (2, 3, 9, 4, 5, (2, 1), {"stride": (3, 2), "transposed": True}),
    # By Winograd's algorithm: many channels, outputs and pixels.
    "half, many channels": (2, 70, 26, 47, 71, (3, 3), HALF | REFLECT),
    "half, many channels, zeros": (1, 16, 13, 48, 72, (3, 3), HALF),
    "transposed, many channels": (1, 70, 25, 24, 36, (3, 3), HALF | {"transposed": True, "output_padding": (0, 1)}),
    "transposed, two strides": (1, 3, 5, 5, 6, (5, 3), {"stride": (3, 2), "padding": (2, 1), "transposed": True}),
}


def tensors_of(name, dtype=torch.float64):
    """x, weight, bias, scale, add."""
    batch, channels, outputs, height, width, kernel, options = PROBLEMS[name]
    pair = (channels, outputs) if options.get("transposed") else (outputs, channels)
    shapes = [(batch, channels, height, width), (*pair, *kernel), (outputs,), (outputs,)]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator).float().to(dtype) for shape in shapes]
    x, weight, bias, scale = (t.double() for t in tensors)
    out = conv2d(x, weight, bias, scale=scale, backend="reference", **options)
    add = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    add[(out + add).abs() < 1e-3] += 0.01  # no rounding changes the sign before the ReLU
    return [*tensors, add.float().to(dtype)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_prepared_weights_give_the_same_bits(name):
    x, weight, bias, scale, add = tensors_of(name, torch.float32)
    options = {"scale": scale, "add": add, "relu": True, "backend": "cpu"} | PROBLEMS[name][-1]
    expected = conv2d(x, weight, bias, **options)
    kept.keep(weight)
    for _ in range(2):
        assert torch.equal(conv2d(x, weight, bias, **options), expected)
    weight.mul_(2)
    assert torch.equal(conv2d(x, weight, bias, **options), conv2d(x, weight.clone(), bias, **options))


def run(name, dtype, backend):
    leaves = x, weight, bias, scale, add = [t.requires_grad_() for t in tensors_of(name, dtype)]
    out = conv2d(x, weight, bias, scale=scale, add=add, relu=True, backend=backend, **PROBLEMS[name][-1])
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_is_as_accurate_as_torchs_convolution(name):
    truth = run(name, torch.float64, "reference")
    runs = (run(name, torch.float32, backend) for backend in ("cpu", "reference"))
    for ours, theirs, exact in zip(*runs, truth, strict=True):
        assert ours.shape == exact.shape
        for norm in (torch.max, torch.linalg.vector_norm):
            scale = max(norm(exact.abs()).item(), 1e-300)
            error, other = (norm((t - exact).abs()).item() / scale for t in (ours, theirs))
            assert error <= 2 * other + 4e-7
    for ours, exact in zip(run(name, torch.float64, "cpu"), truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-11)


def test_the_reference_is_torchs_convolution():
    x, weight, bias, scale, add = tensors_of("half, reflected")
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, stride=2) * scale.view(-1, 1, 1)
    expected = (expected + bias.view(-1, 1, 1) + add).relu()
    options = {"scale": scale, "add": add, "relu": True, "backend": "reference"} | HALF | REFLECT
    assert torch.equal(conv2d(x, weight, bias, **options), expected)


@pytest.mark.parametrize("name", ["half, reflected", "transposed, two strides"])
def test_gradgradcheck(name):
    options = PROBLEMS[name][-1]
    pair = (2, 3) if options.get("transposed") else (3, 2)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 3, 4), (*pair, 2, 3), (3,)]
    leaves = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    function = lambda x, weight, scale: conv2d(x, weight, scale=scale, relu=True, backend="cpu", **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("name", ["half, chunks of channels", "half, many channels"])
def test_threads_get_the_same_bits(name):
    x, weight, bias, *_ = (t.float() for t in tensors_of(name))
    before, results = torch.get_num_threads(), []
    x = torch.cat([x] * 8)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(conv2d(x, weight, bias, backend="cpu", **HALF))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fast_half_precision_is_torchs_convolution(dtype, fast_half):
    x, weight, *_ = (t.to(dtype) for t in tensors_of("transposed"))
    options = PROBLEMS["transposed"][-1]
    assert torch.equal(conv2d(x, weight, **options), F.conv_transpose2d(x, weight, None, 2, 1, 1))
    with torch.autocast("cpu", dtype=dtype):
        assert conv2d(x.float(), weight, **options).dtype == dtype
    with pytest.raises(RuntimeError, match="cannot run conv2d: it takes float32 and float64"):
        conv2d(x, weight, backend="cpu", **options)


X, KERNEL = torch.ones(2, 4, 5, 6), torch.ones(3, 4, 3, 3)
BAD = {
    "no tensor": ({"x": 1}, TypeError, "x must be a torch.Tensor; got int"),
    "5 dimensions": ({"weight": KERNEL[None]}, ValueError, r"weight must have 4 dimensions; got \[1, 3, 4, 3, 3\]"),
    "other channels": ({"x": X[:, :3]}, ValueError, r"weight must have shape \[O, 3, kh, kw\], none 0; got"),
    "transposed weight": ({"transposed": True}, ValueError, r"weight must have shape \[4, O, kh, kw\], none 0; got"),
    "no pixel": ({"x": X[..., :0]}, ValueError, "x must have at least one channel and one pixel; got"),
    "no output": ({"x": X[..., :2]}, ValueError, "x must be at least as large as the kernel, padded"),
    "stride 0": ({"stride": 0}, ValueError, r"stride must be a number of at least 1, or two; got \(0, 0\)"),
    "stride of 3": ({"stride": (1, 2, 3)}, ValueError, r"stride must be an integer, or two; got \(1, 2, 3\)"),
    "padding by name": ({"padding": "same"}, ValueError, "padding must be an integer, or two; got 'same'"),
    "half a stride": ({"stride": (1.5, 2)}, ValueError, r"stride must be an integer, or two; got \(1.5, 2\)"),
    "negative padding": (
        {"padding": -1},
        ValueError,
        r"padding must be a number of at least 0, or two; got \(-1, -1\)",
    ),
    "such padding": ({"padding_mode": "wrap"}, ValueError, "padding_mode must be 'zeros' or 'reflect'; got 'wrap'"),
    "too wide": (
        {"padding": 5} | REFLECT,
        ValueError,
        r"x must have longer sides than padding \(5, 5\) with 'reflect'",
    ),
    "reflected, transposed": (
        {"transposed": True} | REFLECT,
        ValueError,
        "padding_mode must be 'zeros' with transposed",
    ),
    "output_padding": ({"output_padding": 1}, ValueError, r"output_padding must be 0 without transposed; got \(1, 1\)"),
    "output_padding of a stride": (
        {"output_padding": 1, "transposed": True},
        ValueError,
        r"output_padding must be less than stride \(1, 1\); got \(1, 1\)",
    ),
    "bias": ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \[3\]; got \[4\]"),
    "scale": ({"scale": torch.ones(2)}, ValueError, r"scale must have shape \[3\]; got \[2\]"),
    "add": ({"add": X}, ValueError, r"add must have shape \[2, 3, 3, 4\]; got \[2, 4, 5, 6\]"),
    "dtype": ({"weight": KERNEL.double()}, ValueError, "weight must have x's dtype torch.float32; got torch.float64"),
    "backend": ({"backend": "cup"}, ValueError, "backend must be one of .* for conv2d; got 'cup'"),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name, backend):
    changes, error, text = BAD[name]
    with pytest.raises(error, match=text):
        conv2d(**{"x": X, "weight": KERNEL, "backend": backend} | changes)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck(transposed, gradients):
    x, weight, bias, scale, add = (t.float() for t in tensors_of("transposed, 4 x 4" if transposed else "7 x 7"))
    tensors = [t.requires_grad_(gradients) for t in (x, weight, scale, bias, add)]
    options = ([2, 2], [1, 1]) if transposed else ([1, 1], [0, 0])
    arguments = *tensors, True, *options, "zeros", transposed, [0, 0], ""
    torch.library.opcheck(torch.ops.inr_kernels.conv2d.default, arguments)


@pytest.mark.parametrize("backend", backends_of("conv2d"))
def test_empty_batch(backend):
    assert conv2d(X[:0], KERNEL, backend=backend).shape == (0, 3, 3, 4)


def test_compiles_and_explains():
    compiled = torch.compile(lambda x: conv2d(x, KERNEL, backend="cpu", **HALF), fullgraph=True)
    torch.testing.assert_close(compiled(X), conv2d(X, KERNEL, backend="cpu", **HALF))
    assert "cpu        runs  <- default" in explain(conv2d, X, KERNEL)
    many = torch.func.vmap(lambda x: conv2d(x[None], KERNEL)[0])(X)
    torch.testing.assert_close(many, conv2d(X, KERNEL))


# -------------------------------------------------------------------------------------------------- FusedSequential


def chain():
    torch.manual_seed(0)
    layers = [nn.ReflectionPad2d(2), nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.ConvTranspose2d(4, 5, 3, 2, 1, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3, 2, 1, groups=1)]
    layers += [nn.Sigmoid(), nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 2, 1)]
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return FusedSequential(*layers).eval()


def ops_of(model, x):
    with torch.profiler.profile() as profile:
        out = model(x)
    return out, {event.key: event.count for event in profile.key_averages()}


def test_a_sequence_is_fused():
    model, x = chain().requires_grad_(False), torch.randn(2, 3, 6, 7).requires_grad_()
    plain = nn.Sequential(*model)
    out, counts = ops_of(model, x)
    assert counts["inr_kernels::conv2d"] == 4 and counts["aten::conv2d"] == 1  # the one with groups
    assert not {"aten::batch_norm", "aten::relu", "aten::reflection_pad2d"} & set(counts)
    torch.testing.assert_close(out, plain(x))
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (out, plain(x))]
    torch.testing.assert_close(*grads)
    assert isinstance(model[:3], FusedSequential) and list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("reason", ["training", "gradients", "hook", "backend", "autocast"])
def test_when_a_sequence_calls_its_layers(reason):
    model, x = chain().requires_grad_(reason == "gradients"), torch.randn(2, 3, 6, 7)
    if reason == "training":
        model.requires_grad_().train()
    if reason == "hook":
        for layer in model:
            layer.register_forward_hook(lambda *_: None)
    backend = inr_kernels.backend("reference") if reason == "backend" else contextlib.nullcontext()
    with backend, torch.autocast("cpu", enabled=reason == "autocast"):
        out, counts = ops_of(model, x)
        expected = nn.Sequential(*model)(x)
    assert "inr_kernels::conv2d" not in counts
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, padding="same"), FFC(3, 4, 3, 0, 0, padding="same")])
def test_padding_by_a_word(layer):
    x = torch.randn(1, 3, 6, 7)
    layer.eval().requires_grad_(False)
    plain = layer.convl2l if isinstance(layer, FFC) else layer
    out = layer(x)[0] if isinstance(layer, FFC) else FusedSequential(layer)(x)
    torch.testing.assert_close(out, plain(x))


def test_an_image_without_a_batch():
    model, x = chain()[:2].requires_grad_(False), torch.randn(3, 6, 7)
    torch.testing.assert_close(model(x), nn.Sequential(*model)(x))


def test_layers_of_an_ffc_use_conv2d():
    layer = FFC_BN_ACT(6, 8, 3, 0, 0.75, stride=2, padding=1, activation_layer=nn.ReLU, bias=True, enable_lfu=False)
    layer, x = layer.eval().requires_grad_(False), torch.randn(1, 6, 9, 12)
    (local, global_), counts = ops_of(layer, x)
    assert counts["inr_kernels::conv2d"] == 2
    with inr_kernels.backend("reference"):
        expected = layer(x)
    torch.testing.assert_close((local, global_), tuple(expected))
