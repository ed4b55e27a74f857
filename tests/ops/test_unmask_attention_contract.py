"""unmask_attention apart from its values: errors, empty calls, memory, torch.compile, export, opcheck."""

import pytest
import torch
from op_backends import backends_of
from unmask_attention_cases import Case, mask_of

import inr_kernels
from inr_kernels import UnmaskAttention, explain, unmask_attention
from inr_kernels.unmask_attention import op

BACKENDS = backends_of("unmask_attention")
FEAT, MASK = torch.zeros(2, 4, 5, 6), torch.zeros(2, 1, 5, 6)

# What is wrong -> changes to a good call, the error, and what its text must say.
BAD = {
    "feat no tensor": ({"feat": [1]}, TypeError, "feat must be a torch.Tensor; got list"),
    "feat integer": ({"feat": FEAT.int()}, TypeError, "feat must have a floating-point dtype; got torch.int32"),
    "feat float8": ({"feat": FEAT.to(torch.float8_e4m3fn)}, TypeError, "feat must have a dtype of at least 16 bits"),
    "feat of 3 dimensions": ({"feat": FEAT[0]}, ValueError, r"feat must have 4 dimensions; got \[4, 5, 6\]"),
    "feat without pixels": ({"feat": FEAT[..., :0]}, ValueError, "at least one channel and one pixel"),
    "mask no tensor": ({"mask": None}, TypeError, "mask must be a torch.Tensor; got NoneType"),
    "mask complex": (
        {"mask": MASK * 1j},
        TypeError,
        "mask must have a bool, integer or floating-point dtype; got torch.complex64",
    ),
    "mask of another size": (
        {"mask": MASK[..., 1:]},
        ValueError,
        r"mask must have shape \[2, 1, 5, 6\] for feat \[2, 4, 5, 6\]; got \[2, 1, 5, 5\]",
    ),
    "mask of another batch": ({"mask": MASK[:1]}, ValueError, r"mask must have shape \[2, 1, 5, 6\]"),
    "mask of the features' channels": ({"mask": FEAT}, ValueError, r"mask must have shape \[2, 1, 5, 6\]"),
    "mask without channel": ({"mask": MASK[:, 0]}, ValueError, r"mask must have shape \[2, 1, 5, 6\]"),
    "mask on another device": ({"mask": MASK.to("meta")}, ValueError, "mask must be on cpu; got meta"),
    "scale no number": ({"scale": "1"}, ValueError, "scale must be a finite number or None; got '1'"),
    "scale NaN": ({"scale": float("nan")}, ValueError, "scale must be a finite number or None; got nan"),
    "mask_keys no bool": ({"mask_keys": 1}, ValueError, "mask_keys must be a bool; got 1"),
    "backend no name": ({"backend": 3}, TypeError, "backend must be a name or None; got 3"),
    "no such backend": ({"backend": "fast"}, ValueError, "backend must be one of cpu, reference, triton"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    changes, error, text = BAD[name]
    with pytest.raises(error, match=text):
        unmask_attention(**{"feat": FEAT, "mask": MASK} | changes)


def test_op_checks_bounds():
    forward, weight = torch.ops.inr_kernels.unmask_attention, torch.ones(2, 30)
    feat = FEAT.flatten(2)
    out, softmax = forward(feat, weight, 0.5, False, "")
    for wrong in (weight[:, 1:], weight[:1], weight.double(), weight.half()):
        with pytest.raises(ValueError, match="weight must have"):
            forward(feat, wrong, 0.5, False, "")
    with pytest.raises(ValueError, match="feat must have 3 dimensions"):
        forward(FEAT, weight, 0.5, False, "")
    backward = torch.ops.inr_kernels.unmask_attention_backward
    good = [feat, out, softmax, feat, weight, 0.5, False, ""]
    backward(*good)
    for i, wrong, name in [
        (0, feat[:, :1], "grad"),
        (0, feat.double(), "grad"),
        (1, out[..., 1:], "out"),
        (2, softmax[:, :1], "softmax"),
        (4, weight[:1], "weight"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must have"):
            backward(*good[:i], wrong, *good[i + 1 :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    feat = FEAT[:0].clone().requires_grad_()
    out = unmask_attention(feat, MASK[:0], backend=backend)
    assert out.shape == (0, 4, 5, 6)
    assert torch.autograd.grad(out.sum(), feat)[0].shape == feat.shape


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64, torch.bfloat16])
def test_masks_of_any_dtype(dtype):
    feat, mask = torch.randn(2, 4, 5, 6), mask_of("some", 2, 5, 6)
    assert torch.equal(unmask_attention(feat, mask.to(dtype)), unmask_attention(feat, mask))


def test_mask_is_clamped_to_0_and_1():
    feat, mask = torch.randn(2, 4, 5, 6), mask_of("some", 2, 5, 6)
    assert torch.equal(unmask_attention(feat, 255 * mask), unmask_attention(feat, mask))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_any_strides(layout):
    feat, mask = torch.randn(2, 4, 10, 6), mask_of("some", 2, 10, 6)
    laid_out = {
        "channels_last": lambda: feat.contiguous(memory_format=torch.channels_last),
        "sliced": lambda: torch.cat((feat, feat), 3)[..., :6],
        "expanded": lambda: feat,
    }[layout]()
    mask = mask[:1].expand(2, -1, -1, -1) if layout == "expanded" else mask
    out = unmask_attention(laid_out, mask)
    assert torch.equal(out, unmask_attention(feat, mask.clone()))
    assert out.is_contiguous()


def test_gradient_with_any_strides():
    feat, mask = torch.randn(2, 4, 5, 6, requires_grad=True), mask_of("some", 2, 5, 6)
    grads = [
        torch.autograd.grad(unmask_attention(feat, mask), feat, grad)[0]
        for grad in (torch.ones(1, 1, 1, 1).expand(2, 4, 5, 6), torch.ones(2, 4, 5, 6))
    ]
    assert torch.equal(*grads)


def test_saved_memory_is_linear_in_the_pixels():
    feat, mask = torch.randn(1, 8, 40, 40, requires_grad=True), mask_of("some", 1, 40, 40)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        unmask_attention(feat, mask)
    assert sum(t.numel() for t in saved) == 1600 * (8 + 8 + 1 + 2)


def test_many_small_images_take_little_memory(run_python):
    """Each takes less than one of the blocks into which large images are divided."""
    code = """if True:
        import resource, torch
        from inr_kernels import unmask_attention
        feat, mask = torch.randn(20000, 2, 2, 2, requires_grad=True), torch.zeros(20000, 1, 2, 2)
        def attend(images):
            unmask_attention(feat[:images], mask[:images], backend="cpu").sum().backward()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attend(3)
        print(-attend(3) + attend(20000))
    """
    assert int(run_python(code)) < 20000 * 16, "KB"


def test_mask_gradient_and_transforms_use_the_reference():
    feat, mask = torch.randn(1, 3, 3, 4, dtype=torch.float64), torch.rand(1, 1, 3, 4, dtype=torch.float64)
    for mask_keys in (False, True):
        attend = lambda f, m, k=mask_keys: unmask_attention(f, m, mask_keys=k)  # noqa: E731
        assert torch.autograd.gradcheck(attend, (feat.requires_grad_(), mask.requires_grad_()))
        assert torch.autograd.gradcheck(attend, (feat, mask), check_forward_ad=True, check_backward_ad=False)
    with pytest.raises(RuntimeError, match="'cpu' does not compute the gradient of mask; use backend"):
        unmask_attention(feat, mask, backend="cpu")
    feat, mask = feat.detach(), mask.detach()
    grads = torch.func.grad(lambda f: unmask_attention(f, mask).sum())(feat)
    torch.testing.assert_close(grads, torch.autograd.grad(unmask_attention(feat.requires_grad_(), mask).sum(), feat)[0])


def test_a_second_derivative_raises():
    feat = torch.randn(1, 3, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(unmask_attention(feat, MASK[:1, :, :3, :4]).sum(), feat, create_graph=True)
    with pytest.raises(RuntimeError, match="do not support second derivatives; use backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    feat, mask = torch.randn(1, 4, 5, 6, requires_grad=True), mask_of("some", 1, 5, 6)
    with torch.autocast("cpu", dtype=dtype):
        out = unmask_attention(feat, mask)
    assert out.dtype == dtype
    assert torch.equal(out, unmask_attention(feat.to(dtype), mask))
    out.sum().backward()
    assert feat.grad.dtype == torch.float32


def arguments(gradients=False, mask_keys=False):
    case = Case((2, 5, 4, 6), "mixed", mask_keys)
    weight = 1 - case.mask.double().flatten(1)
    return case.feat.flatten(2).requires_grad_(gradients), weight, 0.5, mask_keys, ""


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("mask_keys", [False, True])
def test_opcheck_forward(mask_keys, gradients):
    torch.library.opcheck(torch.ops.inr_kernels.unmask_attention.default, arguments(gradients, mask_keys))


@pytest.mark.parametrize("mask_keys", [False, True])
def test_opcheck_backward(mask_keys):
    feat, weight, *form = arguments(mask_keys=mask_keys)
    out, softmax = torch.ops.inr_kernels.unmask_attention(feat, weight, *form)
    args = torch.randn_like(feat), out, softmax, feat, weight, *form
    torch.library.opcheck(torch.ops.inr_kernels.unmask_attention_backward.default, args)


class Model(torch.nn.Module):
    """Features, and the attention on them, as in training."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.attention = UnmaskAttention()

    def forward(self, image, mask):
        return self.attention(self.features(image), mask)


def test_compile_trains():
    model, image, mask = Model(), torch.rand(2, 3, 5, 6), mask_of("some", 2, 5, 6)
    compiled, runs = torch.compile(model, fullgraph=True), []
    for run in (model, compiled):
        out = run(image, mask)
        runs.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for eager, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-6)


def test_compile_infers_with_other_shapes():
    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((5, 6), (8, 9), (12, 7)):
            image, mask = torch.rand(2, 3, *size), mask_of("some", 2, *size)
            torch.testing.assert_close(compiled(image, mask), model(image, mask), rtol=1e-5, atol=1e-6)


def test_export():
    model, args = Model(), (torch.rand(2, 3, 5, 6), mask_of("some", 2, 5, 6))
    exported = torch.export.export(model, args).module()
    torch.testing.assert_close(exported(*args), model(*args), rtol=1e-5, atol=1e-6)


def test_layer_holds_its_options():
    layer = UnmaskAttention(scale=0.5, mask_keys=True)
    assert repr(layer) == "UnmaskAttention(scale=0.5, mask_keys=True, backend=None)"
    assert not layer.state_dict()
    feat, mask = torch.randn(2, 4, 5, 6), mask_of("some", 2, 5, 6)
    assert torch.equal(layer(feat, mask), unmask_attention(feat, mask, scale=0.5, mask_keys=True))


def test_explain_and_requested_backend(capsys, monkeypatch):
    text = explain(unmask_attention, FEAT.bfloat16(), MASK)
    assert capsys.readouterr().out.strip() == text
    assert text.startswith("unmask_attention on cpu, bfloat16\n  cpu        runs  <- default")
    with pytest.raises(RuntimeError, match="it takes at most 64 channels in this dtype; got 65"):
        unmask_attention(torch.zeros(1, 65, 2, 2), torch.zeros(1, 1, 2, 2), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run unmask_attention: it takes CUDA tensors"):
        unmask_attention(FEAT, MASK, backend="triton")
    with inr_kernels.backend("reference"):
        assert torch.equal(unmask_attention(FEAT, MASK), FEAT)


def test_the_reference_runs_in_parts(monkeypatch):
    """The reference also runs in bounded memory: here some rows at a time."""
    case = Case((2, 5, 6, 7), "mixed")
    whole = case.run(torch.float64, "reference")
    monkeypatch.setattr(op, "_REFERENCE_SCORES", 1000)
    with inr_kernels.backend("reference"):  # through the op, as where no other backend can run
        feat, weight = case.feat.flatten(2).requires_grad_(), 1 - case.mask.double().flatten(1)
        out, _ = torch.ops.inr_kernels.unmask_attention(feat, weight, 5**-0.5, False, "")
        (grad,) = torch.autograd.grad(out, feat, case.grad.flatten(2))
    torch.testing.assert_close((out, grad), tuple(t.flatten(2) for t in whole))


def test_works_in_a_forked_child(in_a_fork):
    feat, mask = torch.randn(1, 16, 40, 40), mask_of("some", 1, 40, 40)
    assert in_a_fork(lambda: unmask_attention(feat, mask, backend="cpu"))
