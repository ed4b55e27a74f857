"""local_texture: LTE's and LTE+'s own numbers, float64, and what differs from local_implicit in its contract."""

import re

import pytest
import torch
from local_implicit_cases import assert_as_accurate, assert_kernel_as_accurate
from local_texture_cases import CASES, Case
from op_backends import backends_of

from inr_kernels import LocalTextureDecoder, explain, local_texture_decode
from inr_kernels.local_implicit import op, triton_kernels

BACKENDS = backends_of("local_texture")
FAST = [name for name in BACKENDS if name != "triton"]


def decoder_of(arrays):
    state = {name.removeprefix("state."): value for name, value in arrays.items() if name.startswith("state.")}
    return LocalTextureDecoder.from_state_dict(state | {"encoder.head.0.weight": torch.zeros(1)}).requires_grad_(False)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ["lte_a", "lte_x3", "lte_fast_a", "lte_fast_x3"])
def test_output_equals_ltes(golden, name, backend):
    arrays = golden(name)
    decoder, feat, image, expected = decoder_of(arrays), arrays["feat"], arrays["inp"], arrays["out"]
    expected = expected.permute(0, 2, 3, 1) if "fast" in name else expected
    out = decoder(feat, arrays["coord"], arrays["cell"], image, backend=backend)
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()
    cell = arrays["cell"] if "fast" in name else arrays["cell"][:, 0]
    rendered = decoder.render(feat, tuple(arrays["size"].tolist()), cell, image, backend=backend)
    assert (rendered.permute(0, 2, 3, 1).reshape(out.shape) - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_triton_equals_lte(golden):
    arrays = golden("lte_x3")
    coord, cell = arrays["coord"][:, ::9], arrays["cell"][:, ::9]
    out = decoder_of(arrays)(arrays["feat"], coord, cell, arrays["inp"], backend="triton")
    assert (out - arrays["out"][:, ::9]).abs().max() <= 2e-6 * arrays["out"].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_eager(case, dtype):
    half = dtype.itemsize == 2
    assert_kernel_as_accurate(Case(**CASES[case], relu_margin=half), dtype)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", ["LTE", "ragged", "one Linear", "one pixel"])
def test_triton_as_accurate_as_eager(case, fused, monkeypatch):
    monkeypatch.setattr(triton_kernels, "fused", lambda *_: fused)
    assert_kernel_as_accurate(Case(**CASES[case] | {"queries": 9}), torch.float32, "triton")


def test_triton_in_half_precision():
    assert_kernel_as_accurate(Case(queries=9, relu_margin=True), torch.float16, "triton")


def test_triton_in_runs_of_queries(monkeypatch):
    case = Case(queries=66, frequencies=2, hidden=())
    whole = case.run(torch.float32, "triton")
    monkeypatch.setattr(triton_kernels, "WORKSPACE", 1)
    for one, other in zip(whole, case.run(torch.float32, "triton"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_angles_are_not_rounded(backend):
    """cos(pi f) of an f of thousands of half turns, exact in float32, where float32's pi f is off by 1e-4."""
    turns = torch.arange(-4000, 4000, 123.25)
    coef, freq = torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    cell = torch.stack((turns, 0 * turns), -1)[None]
    eye = [torch.eye(2)], [torch.zeros(2)]
    out = local_texture_decode(
        coef, freq, torch.zeros_like(cell), cell, torch.tensor([[1.0, 0]]), *eye, backend=backend
    )
    angles = torch.pi * (turns.double() % 2)
    exact = torch.stack((angles.cos(), angles.sin()), -1)
    assert (out[0] - exact).abs().max() <= (2e-3 if backend == "reference" else 3e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", range(6))
def test_non_finite_values_do_not_spread(where, bad):
    coef, freq, coord, cell, phase, weights, biases = arguments = Case().cast(torch.float32)
    (coef, freq, coord, cell, phase, weights[1])[where].view(-1)[7] = bad
    ours, theirs = (local_texture_decode(*arguments, backend=name) for name in ("cpu", "reference"))
    assert torch.equal(ours.isnan(), theirs.isnan())
    finite = theirs.isfinite()
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-4, atol=1e-5)


def test_gradcheck_through_the_kernel():
    case = Case(batch=1, frequencies=2, size=(3, 4), queries=5, hidden=(6, 5))
    leaves = [t.clone().requires_grad_() for t in case.tensors]

    def decode(*tensors):
        return local_texture_decode(*case.arguments(tensors), backend="cpu")

    assert torch.autograd.gradcheck(decode, leaves)


def test_backward_is_deterministic():
    case = Case(batch=3, size=(9, 8), queries=700, hidden=(64, 64))
    runs = [case.run(torch.float32, "cpu") for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_opcheck():
    case = Case(batch=1, queries=5)
    coef, freq, coord, cell, phase, weights, biases = case.cast(torch.float32)
    texture = torch.cat((coef, freq), 1).permute(0, 2, 3, 1).contiguous().requires_grad_()
    y, x = (t.unsqueeze(1) for t in coord.unbind(-1))
    phase.requires_grad_()
    args = texture, y, x, cell[:, None], phase, weights, biases, 6, 0, True, False, ""
    torch.library.opcheck(torch.ops.inr_kernels.local_texture.default, args)
    backward = torch.randn(1, 1, 5, 3), texture.detach(), y, x, cell[:, None], phase.detach(), *args[5:], True, True
    torch.library.opcheck(torch.ops.inr_kernels.local_texture_backward.default, backward)


def test_op_checks_bounds():
    coef, freq, coord, cell, phase, weights, biases = Case().cast(torch.float32)
    texture = torch.cat((coef, freq), 1).permute(0, 2, 3, 1).contiguous()
    y, x = (t.unsqueeze(1) for t in coord.unbind(-1))
    good = [texture, y, x, cell[:, None], phase, weights, biases, 6, 0, True, False, ""]
    for position, wrong, text in [
        (0, texture[..., :27], r"hoisted must have 4 K > 0 channels, \[B, rows, w, 4 K\]; got \[2, 6, 7, 27\]"),
        (3, None, "cell must be a tensor; got None"),
        (4, phase[:3], r"position_weight must have shape \[7, 2\]; got \[3, 2\]"),
        (5, [weights[0][:, :9], *weights[1:]], r"weights\[0\] must have shape \[N, 14\]"),
        (10, True, "ensemble_first must be False; got True"),
    ]:
        with pytest.raises(ValueError, match=text):
            torch.ops.inr_kernels.local_texture(*good[:position], wrong, *good[position + 1 :])


BAD = {
    "odd coef": (0, lambda t: t[:, :13], ValueError, r"coef must have an even number of channels .* \[2, 13, 6, 7\]"),
    "other freq": (1, lambda t: t[:, :12], ValueError, r"freq must have shape \[2, 14, 6, 7\]; got \[2, 12, 6, 7\]"),
    "coord half": (2, lambda t: t.half(), TypeError, "coord must be float32"),
    "no cell": (3, lambda _: None, TypeError, "cell must be a torch.Tensor; got NoneType"),
    "short phase": (4, lambda t: t[:2], ValueError, r"phase_weight must have shape \[7, 2\]; got \[2, 2\]"),
    "no weights": (5, lambda _: [], ValueError, "weights must hold at least one Linear weight; got 0"),
    "bias missing": (6, lambda t: t[1:], ValueError, "biases must be as many as the 3 weights; got 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    position, change, error, text = BAD[name]
    arguments = list(Case().cast(torch.float32))
    arguments[position] = change(arguments[position])
    with pytest.raises(error, match=text):
        local_texture_decode(*arguments)


def test_gradient_of_the_coordinates_comes_from_the_reference():
    arguments = Case(queries=5).cast(torch.float32)
    leaves = [arguments[2].requires_grad_(), arguments[3].requires_grad_()]
    grads = torch.autograd.grad(local_texture_decode(*arguments).sum(), leaves)
    assert all(grad.abs().sum() > 0 for grad in grads)
    with pytest.raises(RuntimeError, match="backend 'cpu' does not compute the gradients of coord and cell"):
        local_texture_decode(*arguments, backend="cpu")


def small_decoder():
    return LocalTextureDecoder(4, hidden=(9, 8), hidden_dim=10)


@pytest.mark.parametrize("backend", FAST)
def test_render_equals_queries_on_the_grid(backend):
    decoder, feat, image = small_decoder().requires_grad_(False), torch.randn(2, 4, 7, 9), torch.rand(2, 3, 5, 6)
    case = Case(grid=(13, 19))
    cell = torch.tensor([[2 / 13, 2 / 19]]).expand(2, 2)
    whole = decoder.render(feat, (13, 19), image=image, backend=backend)
    query = decoder(feat, case.coord, cell, image, backend=backend)
    torch.testing.assert_close(whole.permute(0, 2, 3, 1).flatten(1, 2), query, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="workspace must be at least") as error:
        decoder.render(feat, (13, 19), workspace=1)
    least = int(re.search(r"at least (\d+) bytes", str(error.value))[1])
    banded = decoder.render(feat, (13, 19), image=image, workspace=least, backend=backend)
    torch.testing.assert_close(banded, whole, rtol=1e-5, atol=1e-6)


MEMORY = """
import re, torch
from inr_kernels import LocalTextureDecoder
decoder = LocalTextureDecoder(64, hidden=(64,))
feat, image = torch.randn(1, 64, 1000, 200), torch.rand(1, 3, 1000, 200)
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
with torch.no_grad():
    decoder.render(feat[:, :, :30], (30, 400), image=image, workspace=32 << 20)
    before = peak()
    out = decoder.render(feat, (500, 400), image=image, workspace=32 << 20)
    print(peak() - before - out.nbytes)
"""


def test_render_stays_in_its_workspace(run_python):
    """A workspace of 32 MB is kept for maps that take 410 MB."""
    assert int(run_python(MEMORY)) <= (32 << 20) + (8 << 20)  # what allocators keep in addition


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_maps_are_cached_until_something_changes(mode):
    decoder, coord, cell = small_decoder(), torch.rand(1, 5, 2), torch.ones(1, 2)
    with mode():
        feat = torch.randn(1, 4, 6, 7)
        decoder(feat, coord, cell)
        entry = decoder._hoisted._entry
        decoder(feat, coord, cell)
        assert decoder._hoisted._entry is entry
        decoder.freq.weight.mul_(2)
        out = decoder(feat, coord, cell)
        assert decoder._hoisted._entry is not entry
        assert torch.equal(out, decoder(feat.clone(), coord, cell))


def test_gradients_reach_all_parameters():
    decoder, feat, coord = small_decoder(), torch.randn(2, 4, 6, 7), torch.rand(2, 3, 5, 2)
    cell, image = torch.rand(2, 2) / 9, torch.rand(2, 3, 6, 7, requires_grad=True)
    leaves = [feat.requires_grad_(), image, *decoder.parameters()]
    grads = [
        torch.autograd.grad(decoder(feat, coord, cell, image, backend=name).square().sum(), leaves)
        for name in ("cpu", "reference")
    ]
    assert_as_accurate(*([feat, *run] for run in grads), [feat.double(), *(g.double() for g in grads[1])])
    assert all(grad.abs().sum() > 0 for grad in grads[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    decoder, feat, coord, cell = small_decoder(), torch.randn(2, 4, 6, 7), torch.rand(2, 9, 2), torch.rand(2, 2)
    exact = decoder(feat, coord, cell)
    with torch.autocast("cpu", dtype=dtype):
        out, image = decoder(feat, coord, cell), decoder.render(feat, (9, 9))
    assert out.dtype == image.dtype == dtype
    assert (out - exact).abs().max() < 0.03
    out.sum().backward()
    assert decoder.coef.weight.grad.dtype == torch.float32


def test_state_dict_is_ltes():
    decoder = LocalTextureDecoder(64)
    shapes = {key: tuple(value.shape) for key, value in decoder.state_dict().items()}
    expected = {f"{name}.weight": (256, 64, 3, 3) for name in ("coef", "freq")} | {"phase.weight": (128, 2)}
    expected |= {f"{name}.bias": (256,) for name in ("coef", "freq")}
    for i, n in enumerate((256, 256, 256, 3)):
        expected |= {f"imnet.layers.{2 * i}.weight": (n, 256), f"imnet.layers.{2 * i}.bias": (n,)}
    assert shapes == expected
    again = LocalTextureDecoder.from_state_dict(decoder.state_dict())
    assert all(torch.equal(value, decoder.state_dict()[key]) for key, value in again.state_dict().items())


def test_bad_state_dict():
    state = small_decoder().state_dict()
    with pytest.raises(ValueError, match=r"it has no phase.weight, imnet.layers.0.weight"):
        LocalTextureDecoder.from_state_dict({k: v for k, v in state.items() if k.startswith(("coef", "freq"))})
    with pytest.raises(ValueError, match=r"state must be of LTE or LTE\+: .*size mismatch for freq.weight"):
        LocalTextureDecoder.from_state_dict(state | {"freq.weight": state["freq.weight"][:4]})


@pytest.mark.parametrize(
    ("options", "text"),
    [({"hidden_dim": 7}, "hidden_dim must be a positive even integer; got 7"), ({"hidden": ()}, "that is not empty")],
)
def test_bad_decoder(options, text):
    with pytest.raises(ValueError, match=text):
        LocalTextureDecoder(4, **options)


def test_bad_image():
    with pytest.raises(ValueError, match=r"image must have shape \[B, C, H, W\] with B = 1 and C = 3; got \[1, 4"):
        small_decoder().render(torch.zeros(1, 4, 3, 3), (5, 5), image=torch.zeros(1, 4, 3, 3))


def test_explain(capsys):
    explain("local_texture")
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} == {*op.TEXTURE.backends}
