"""NATTEN's names on this package's ops: each version's signatures, and what is not accepted."""

import importlib.metadata
import importlib.util
import pickle
import sys

import pytest
import torch

from inr_kernels import NeighborhoodAttention2D, neighborhood_attention_2d, neighborhood_attention_3d
from inr_kernels._core import backends
from inr_kernels.integrations import install_as_natten, natten_api
from inr_kernels.integrations.natten_api import fused
from inr_kernels.integrations.natten_api import unfused as functions

WINDOW = {"kernel_size": (3, 2), "dilation": (1, 2)}


@pytest.fixture
def install(monkeypatch):
    """install_as_natten, undone after the test."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield install_as_natten
    for name in [name for name in sys.modules if name.split(".")[0] == "natten"]:
        del sys.modules[name]


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def qkv(*size, heads=2, dim=3):
    return [random(2, *size, heads, dim).requires_grad_() for _ in range(3)]


def heads_first(*tensors):
    return [t.movedim(-2, 1) for t in tensors]


def unfused(functions, q, k, v, *window, rpb=None, **options):
    """Attention by the functions that store the weights, as NATTEN's modules up to 0.17 compute it."""
    q, k, v = heads_first(q * q.shape[-1] ** -0.5, k, v)
    scores, sums = functions
    attn = scores(q, k, *window, **options) if rpb is None else scores(q, k, rpb, *window, **options)
    return sums(attn.softmax(-1), v, *window, **options).movedim(1, -2)


def assert_same(ours, expected, leaves):
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (ours, expected)))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fused_functions(rank):
    q, k, v = leaves = qkv(*(7, 5, 6)[:rank])
    more = [random(2, 4, 2, 3) for _ in range(2)]
    function = getattr(natten_api, f"na{rank}d")
    kernel, stride, causal = (3, 4, 2)[:rank], (2, 3, 1)[:rank], (True, False, True)[:rank]
    out, lse = function(q, k, v, kernel, stride, 1, causal, 0.0, *more, {"backend": "cutlass-fmha"}, return_lse=True)
    options = {"additional_keys": more[0], "additional_values": more[1], "return_lse": True}
    ours = fused._FUNCTIONS[rank]
    expected = ours(q, k, v, kernel, stride=stride, is_causal=causal, **options)
    torch.testing.assert_close(lse, expected[1])
    assert_same(out, expected[0], leaves)


def test_what_chooses_a_kernel_is_accepted():
    q, k, v = qkv(6, 7)
    tuning = {"q_tile_shape": (8, 8), "backward_kv_splits": None, "kernel_schedule": "auto", "torch_compile": True}
    expected = neighborhood_attention_2d(q, k, v, 3)
    for backend in (None, "hopper-fna", "cpu"):
        out = natten_api.na2d(q, k, v, 3, is_causal=None, backend=backend, attention_kwargs=tuning, **tuning)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda q: natten_api.na2d(q, q, q, 3, dropout=0.1), TypeError, "unexpected keyword argument 'dropout'"),
        (
            lambda q: natten_api.na2d(q, q, q, 3, attention_kwargs={"dropout": 1}),
            TypeError,
            "attention_kwargs got an unexpected keyword argument 'dropout'",
        ),
        (lambda q: natten_api.na2d(q, q, q, 3, backend="fast"), ValueError, "fast"),
        (lambda q: natten_api.na1d(q, q, q, 3), ValueError, "query must have 4 dimensions; got"),
        (lambda q: natten_api.na2d(q, q, q, 3, 4), ValueError, r"stride must be at most kernel_size \(3, 3\)"),
        (lambda q: natten_api.attention(q[0], q[0], q[0], seqlens_Q=1), TypeError, "keyword argument 'seqlens_Q'"),
        (lambda q: natten_api.na2d_qk(q, q, 9), ValueError, r"kernel_size must be at most \(7, 2\), the map's size"),
        (lambda q: natten_api.na2d_qk(q, q[:, :1], 2), ValueError, r"key must have query's shape \[2, 6, 7, 2, 3\]"),
        (lambda q: natten_api.na2d_av(q, q, 2), ValueError, r"attn must have shape \[2, 6, 7, 2, 4\]; got"),
        (
            lambda q: natten_api.na2d_qk(q, q, 2, rpb=torch.zeros(6, 3, 5)),
            ValueError,
            r"rpb must have shape \[6, 3, 3\]; got \[6, 3, 5\]",
        ),
    ],
)
def test_bad_argument(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.zeros(2, 6, 7, 2, 3))


def test_attention_and_merging():
    q, k, v = (t.flatten(1, 2) for t in qkv(3, 4))
    whole, lse = natten_api.attention(q, k, v, return_lse=True)
    halves = [natten_api.attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(5), slice(5, 12))]
    merged = natten_api.merge_attentions(*map(list, zip(*halves, strict=True)), torch_compile=False)
    torch.testing.assert_close(merged, (whole, lse))


@pytest.mark.parametrize("lengths", [(12, 12), (12, 7), (7, 12)])
def test_causal_attention(lengths):
    q, k, v = leaves = [random(2, lengths[i > 0], 2, 3).requires_grad_() for i in range(3)]
    out, lse = natten_api.attention(q, k, v, is_causal=True, return_lse=True)
    assert torch.equal(natten_api.attention(q, k, v, is_causal=True), out)
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first(q, k, v), is_causal=True)
    assert_same(out, expected.movedim(1, -2), leaves)
    scores = torch.einsum("bihd,bjhd->bihj", q, k) * 3**-0.5
    later = torch.arange(lengths[1]) > torch.arange(lengths[0])[:, None, None]
    torch.testing.assert_close(lse, scores.masked_fill(later, -torch.inf).logsumexp(-1))


@pytest.mark.parametrize(
    ("rank", "names", "window", "bias"),
    [
        (1, ("natten1dqkrpb", "natten1dav"), (5, 2), True),
        (1, ("natten1dqkrpb", "natten1dav"), (2,), True),  # before 0.14.5
        (2, ("natten2dqkrpb", "natten2dav"), (3, 2), True),
        (2, ("natten2dqkrpb", "natten2dav"), (2,), True),
        (2, ("na2d_qk_with_bias", "na2d_av"), (3, 1), True),
        (2, ("natten2dqk", "natten2dav"), (3, 2), False),
        (3, ("natten3dqkrpb", "natten3dav"), (2, 3, 2, 1), True),  # 0.15: kernel_size_d, kernel_size, dilation_d, ...
        (3, ("na3d_qk", "na3d_av"), ((2, 3, 3), (2, 1, 1)), False),
    ],
)
def test_functions_that_store_the_weights(rank, names, window, bias):
    q, k, v = leaves = qkv(*((12,), (8, 7), (4, 5, 6))[rank - 1])
    kernel, dilation = {1: (5, 2), 2: (3, window[-1]), 3: ((2, 3, 3), (2, 1, 1))}[rank]
    sides = [2 * n - 1 for n in ((kernel,) * rank if isinstance(kernel, int) else kernel)]
    rpb = random(2, *sides).requires_grad_() if bias else None
    out = unfused([getattr(natten_api, name) for name in names], q, k, v, *window, rpb=rpb)
    expected = fused._FUNCTIONS[rank](q, k, v, kernel, dilation=dilation, rpb=rpb)
    assert_same(out, expected, leaves + ([rpb] if bias else []))


def test_causal_weights_and_additional_keys():
    q, k, v = leaves = qkv(6, 7)
    more = [random(2, 4, 2, 3).requires_grad_() for _ in range(2)]
    causal = {"is_causal": (True, False)}
    attn = natten_api.na2d_qk(*heads_first(q * 3**-0.5, k), **WINDOW, **causal, additional_keys=heads_first(more[0])[0])
    assert attn.shape == (2, 2, 6, 7, 10)
    assert (attn == -torch.inf).any()
    values = {"additional_values": heads_first(more[1])[0]}
    out = natten_api.na2d_av(attn.softmax(-1), *heads_first(v), **WINDOW, **causal, **values).movedim(1, -2)
    options = {"additional_keys": more[0], "additional_values": more[1]}
    assert_same(out, neighborhood_attention_2d(q, k, v, **WINDOW, **causal, **options), [*leaves, *more])


def test_second_derivatives_of_functions_that_store_the_weights():
    tensors = [random(1, 1, 5, 2).requires_grad_() for _ in range(3)]

    def run(q, k, v):
        return natten_api.na1d_av(natten_api.na1d_qk(q, k, 3).softmax(-1), v, 3)

    assert torch.autograd.gradgradcheck(run, tensors)


def stored(q, k, v, **options):
    return natten_api.na2d_av(natten_api.na2d_qk(q, k, 3, **options).softmax(-1), v, 3, **options)


def test_windows_of_inference_mode_serve_gradients():
    q, k, v = [random(1, 1, 9, 11, 2).requires_grad_() for _ in range(3)]
    with torch.inference_mode():
        expected = stored(q, k, v)
    out = stored(q, k, v)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert q.grad is not None


def test_windows_of_a_graph_capture(monkeypatch):
    """Those that a capture computes hold no values before a replay: later calls do not use them."""
    q, k, v = (random(1, 1, 10, 11, 2) for _ in range(3))
    expected, capturing = stored(q, k, v), [True]
    functions._cached_windows.clear()
    monkeypatch.setattr(backends, "is_capturing", lambda device: bool(capturing))
    for tensor in functions._windows((10, 11), 2, 3, 1, False, q.device)[:3]:
        tensor.zero_()
    capturing.clear()
    assert torch.equal(stored(q, k, v), expected)


def test_functions_that_store_the_weights_are_exported_and_compiled():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return stored(q, k, v, is_causal=True)

    q, k, v = (random(1, 1, 4, 13, 2) for _ in range(3))
    program = torch.export.export(Layer(), (q, k, v))
    expected = Layer()(q, k, v)
    torch.testing.assert_close(program.module()(q, k, v), expected)
    torch._dynamo.reset()
    compiled = torch.compile(Layer(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_windows_are_found_without_reading_their_values(causal):
    q = torch.empty(1, 1, 5, 12, 2, device="meta")
    assert stored(q, q, q, is_causal=causal).shape == q.shape


def gathered(q, k, v, keys):
    """The scores and the weighted sums, by a gather and a matrix product."""
    q, k, v = (t.flatten(2, 3) for t in (q, k, v))
    scores = (k[:, :, keys] @ q[..., None]).squeeze(-1)
    return scores, (scores.softmax(-1)[..., None, :] @ v[:, :, keys]).squeeze(-2)


def test_error_in_half_precision():
    tensors = [torch.randn(1, 2, 16, 16, 32).bfloat16().requires_grad_() for _ in range(3)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    keys = functions._windows((16, 16), 2, 7, 1, False, torch.device("cpu"))[0]

    def ours(q, k, v):
        scores = natten_api.na2d_qk(q, k, 7)
        return scores.flatten(2, 3), natten_api.na2d_av(scores.softmax(-1), v, 7).flatten(2, 3)

    def results(function, leaves):
        outs = function(*leaves)
        assert {out.dtype for out in outs} == {leaves[0].dtype}
        grads = torch.autograd.grad(outs, leaves, [w.to(out.dtype) for w, out in zip(weights, outs, strict=True)])
        return [t.double() for t in (*outs, *grads)]

    weights = [torch.randn(out.shape).bfloat16() for out in ours(*tensors)]
    expected = results(ours, exact)
    plain = results(lambda *leaves: gathered(*leaves, keys), tensors)
    for our, their, right in zip(results(ours, tensors), plain, expected, strict=True):
        assert (our - right).norm() <= 2 * (their - right).norm() + 1e-12


def test_weights_of_another_dtype_than_the_values():
    attn = torch.rand(1, 2, 6, 7, 9).requires_grad_()
    value = torch.randn(1, 2, 6, 7, 4).bfloat16().requires_grad_()
    more = torch.randn(1, 2, 3, 4).bfloat16()
    out = natten_api.na2d_av(attn, value, 3)
    torch.testing.assert_close(out, natten_api.na2d_av(attn.bfloat16(), value, 3))
    assert [g.dtype for g in torch.autograd.grad(out.sum(), [attn, value])] == [torch.float32, torch.bfloat16]
    wider = torch.cat([attn, torch.rand(1, 2, 6, 7, 3)], -1)
    out = natten_api.na2d_av(wider, value, 3, additional_values=more)
    assert (out.dtype, out.shape) == (torch.bfloat16, value.shape)


def test_bias_by_the_name_of_each_function():
    q, rpb = random(1, 2, 6, 7, 3), random(2, 5, 5)
    expected = natten_api.na2d_qk(q, q, 3, rpb=rpb)
    torch.testing.assert_close(natten_api.na2d_qk_with_bias(q, q, bias=rpb, kernel_size=3, dilation=1), expected)
    torch.testing.assert_close(natten_api.natten2dqkrpb(q, q, rpb=rpb, kernel_size=3, dilation=1), expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules(rank):
    layer = getattr(natten_api, f"NeighborhoodAttention{rank}D")(8, 2, 3, 2, 1, True, False, 0.0)
    assert (layer.kernel_size, layer.stride, layer.is_causal) == ((3,) * rank, (2,) * rank, (True,) * rank)
    assert (layer.embed_dim, layer.head_dim, layer.scale) == (8, 4, 0.5)
    assert list(layer.state_dict()) == ["qkv.weight", "proj.weight", "proj.bias"]
    x = torch.randn(2, *(6, 5, 4)[:rank], 8)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    out = natten_api.neighborhood_attention_generic(q, k, v, (3,) * rank, 2, is_causal=True)
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(-2)))
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x))


@pytest.mark.parametrize("version", ["0.14", "0.15", "0.17", "0.20", "0.21"])
def test_installed(version, install):
    natten = install(version)
    assert importlib.metadata.version("natten") == natten.__version__
    assert natten.__version__.startswith(version)
    assert importlib.util.find_spec("natten.functional") is not None
    from natten import NeighborhoodAttention2D as Installed
    from natten.functional import natten2dav, natten2dqkrpb

    q, k, v = qkv(6, 7)
    rpb = random(2, 5, 5)
    out = unfused((natten2dqkrpb, natten2dav), q, k, v, 3, 2, rpb=rpb)
    torch.testing.assert_close(out, neighborhood_attention_2d(q, k, v, 3, dilation=2, rpb=rpb))
    layer = Installed(8, 2, 3, 2).double()
    has_bias = version in ("0.14", "0.15")
    twin = NeighborhoodAttention2D(8, 2, 3, 1 if minor(version) >= 20 else 2, rel_pos_bias=has_bias).double()
    twin = twin if minor(version) < 20 else NeighborhoodAttention2D(8, 2, 3, stride=2).double()
    twin.load_state_dict(layer.state_dict())
    x = random(2, 6, 7, 8)
    torch.testing.assert_close(layer(x), twin(x))
    if has_bias:
        assert layer(x[:, :4]).shape == (2, 4, 7, 8)
    else:
        with pytest.raises(ValueError, match="kernel_size must be at most"):
            layer(x[:, :2])
    if minor(version) >= 17:
        out = natten.na2d(q, k, v, 3, 2)
        window = {"dilation": 2} if minor(version) == 17 else {"stride": 2}
        torch.testing.assert_close(out, neighborhood_attention_2d(q, k, v, 3, **window))
    assert natten.has_fused_na()
    assert natten.use_fused_na(True) is None


def minor(version):
    return int(version.split(".")[1])


def test_dropout_of_weights_in_old_modules(install):
    layer = install("0.17").NeighborhoodAttention2D(8, 2, 3, attn_drop=0.5, rel_pos_bias=True)
    x = torch.randn(2, 6, 7, 8)
    whole = layer.eval()(x)
    layer.train()
    torch.manual_seed(0)
    assert (layer(x) - whole).abs().max() > 1e-3
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert (mean - whole).norm() < 0.1 * whole.norm()
    layer.attn_drop.p = 1e-9
    torch.testing.assert_close(layer(x), whole)


def test_modules_of_version_15_in_three_dimensions(install):
    layer = install("0.15").NeighborhoodAttention3D(8, 2, 3, 2, 1, 2, bias=False)
    assert (layer.kernel_size, layer.dilation) == ((2, 3, 3), (2, 1, 1))
    q, k, v = (t.float() for t in layer.qkv(torch.randn(1, 4, 4, 5, 8)).unflatten(-1, (3, 2, 4)).unbind(-3))
    expected = neighborhood_attention_3d(q, k, v, (2, 3, 3), dilation=(2, 1, 1))
    torch.testing.assert_close(layer._attend(torch.stack([q, k, v], -3)), expected)


def test_repr_names_the_scale_if_it_was_given():
    assert "qk_scale" not in repr(natten_api.NeighborhoodAttention2D(8, 2, 3))
    assert "qk_scale=0.25" in repr(natten_api.NeighborhoodAttention2D(8, 2, 3, qk_scale=0.25))


def test_install_replaces_only_its_own(install):
    assert install("0.17").__version__ == "0.17.5"
    assert "natten.context" in sys.modules
    install("0.14")
    assert "natten.context" not in sys.modules
    assert install().__version__ == "0.21.7"
    with pytest.raises(ValueError, match=r"version must be one of 0\.14, .*; got '1'"):
        install("1")
    sys.modules["natten"] = type(sys)("natten")
    with pytest.raises(RuntimeError, match="natten is imported already"):
        install()
