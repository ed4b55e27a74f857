"""local_implicit apart from its values: errors, bounded memory, caching, threads."""

import copy
import gc
import pickle
import re
import threading
import weakref

import pytest
import torch
from local_implicit_cases import Case
from op_backends import backends_of

from inr_kernels import LocalImplicitDecoder, local_implicit_decode
from inr_kernels.local_implicit import module
from inr_kernels.local_implicit.functional import Form, hoist_features


def arguments(**changes):
    """The arguments of a valid call, some of them replaced."""
    feat, coord, cell, weights, biases = Case().cast(torch.float32)
    return {"feat": feat, "coord": coord, "cell": cell, "weights": weights, "biases": biases} | changes


# What is wrong -> how to make it from good arguments, the error, and what its text must say.
BAD = {
    "feat no tensor": (lambda a: {"feat": [1]}, TypeError, "feat must be a torch.Tensor; got list"),
    "feat integer": (lambda a: {"feat": a["feat"].int()}, TypeError, "feat must have a floating-point dtype"),
    "feat of 3 dimensions": (lambda a: {"feat": a["feat"][0]}, ValueError, r"feat must have 4 dimensions; got \[5, 6"),
    "feat empty": (lambda a: {"feat": a["feat"][:, :, :0]}, ValueError, "at least one channel and one pixel"),
    "coord of 1 dimension": (lambda a: {"coord": a["coord"][0, 0]}, ValueError, "coord must have 3 or 4 dimensions"),
    "coord of another batch": (
        lambda a: {"coord": torch.rand(3, 100, 2)},
        ValueError,
        r"coord must have shape \[B, Q, 2\] or \[B, H, W, 2\] with B = feat's 2; got \[3, 100, 2\]",
    ),
    "coord of 3 columns": (lambda a: {"coord": torch.rand(2, 9, 3)}, ValueError, r"got \[2, 9, 3\]"),
    "coord half": (lambda a: {"coord": a["coord"].half()}, TypeError, "half precision is too coarse"),
    "cell half": (lambda a: {"cell": a["cell"].bfloat16()}, TypeError, "cell must be float32"),
    "cell of another length": (
        lambda a: {"cell": a["cell"][:, :5]},
        ValueError,
        r"cell must have shape \[B, 2\] = \[2, 2\] or coord's \[2, 33, 2\]; got \[2, 5, 2\]",
    ),
    "no cell, columns for it": (lambda a: {"cell": None}, ValueError, r"weights\[0\] must have shape \[N, 47\]"),
    "unfold, columns without": (lambda a: {"feat_unfold": False}, ValueError, r"\(5 channels \+ 2 offsets \+ 2 cell\)"),
    "one weight": (lambda a: {"weights": a["weights"][:1]}, ValueError, "at least two Linear weights; got 1"),
    "a bias missing": (lambda a: {"biases": a["biases"][1:]}, ValueError, "as many as the 3 weights; got 2"),
    "weights that do not chain": (
        lambda a: {"weights": [a["weights"][0], torch.rand(7, 9), a["weights"][2]]},
        ValueError,
        r"weights\[1\] must have shape \[N, 20\], N > 0; got \[7, 9\]",
    ),
    "a short bias": (
        lambda a: {"biases": [*a["biases"][:2], torch.rand(2)]},
        ValueError,
        r"biases\[2\] must have shape \[3\]; got \[2\]",
    ),
    "another dtype": (
        lambda a: {"feat": a["feat"].double()},
        ValueError,
        r"weights\[0\] must have feat's dtype torch.float64; got torch.float32",
    ),
    "another device": (lambda a: {"coord": a["coord"].to("meta")}, ValueError, "coord must be on cpu; got meta"),
    "no such ensemble": (lambda a: {"ensemble_after": "second"}, ValueError, '"last" or "first"; got \'second\''),
    "no such backend": (lambda a: {"backend": "fast"}, ValueError, "backend must be one of cpu, reference, triton"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    change, error, text = BAD[name]
    good = arguments()
    with pytest.raises(error, match=text):
        local_implicit_decode(**good | change(good))


BAD_DECODERS = {
    "no hidden layer": ({"hidden": ()}, "hidden a sequence of them that is not empty"),
    "a number of layers": ({"hidden": 16}, "hidden a sequence of them that is not empty; got 4, 16, 3"),
    "a width that is no integer": ({"hidden": (8, "9")}, "must be positive integers"),
    "no channels": ({"in_channels": 0}, "must be positive integers"),
    "no such ensemble": ({"ensemble_after": "never"}, "ensemble_after must be"),
}


@pytest.mark.parametrize("name", BAD_DECODERS)
def test_bad_decoder(name):
    kwargs, text = BAD_DECODERS[name]
    with pytest.raises(ValueError, match=text):
        LocalImplicitDecoder(**{"in_channels": 4} | kwargs)


@pytest.mark.parametrize("size", [(0, 5), (5,), 7, (2.5, 3), (-1, 4), "ab"])
def test_bad_render_size(size):
    with pytest.raises(ValueError, match="size must be two positive integers"):
        LocalImplicitDecoder(4, hidden=(8,)).render(torch.randn(1, 4, 3, 3), size)


@pytest.mark.parametrize(
    ("feat", "text"),
    [
        (torch.zeros(1, 5, 3, 3), r"feat must have 4 channels; got \[1, 5, 3, 3\]"),
        (torch.zeros(1, 4, 3, 3).double(), "feat must have the layer's dtype torch.float32; got torch.float64"),
        (torch.zeros(1, 4, 3, 3, device="meta"), "feat must be on cpu; got meta"),
    ],
)
def test_decoder_names_feat_not_its_weights(feat, text):
    decoder = LocalImplicitDecoder(4, hidden=(8,))
    with pytest.raises(ValueError, match=text):
        decoder(feat, torch.zeros(1, 1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=text):
        decoder.render(feat, (5, 5))


def test_decoder_requires_its_cell():
    decoder = LocalImplicitDecoder(4, hidden=(8,))
    with pytest.raises(ValueError, match="cell must be given"):
        decoder(torch.randn(1, 4, 3, 3), torch.zeros(1, 1, 2))


def test_op_checks_bounds():
    feat, coord, cell, weights, biases = Case().cast(torch.float32)
    hoisted = hoist_features(feat, weights[0], biases[0], Form())
    y, x = (t.unsqueeze(1) for t in coord.unbind(-1))
    good = [hoisted, y, x, cell[:, None], weights[0][:, 45:], weights[1:], biases[1:], 6, 0, True, False, ""]
    op = torch.ops.inr_kernels.local_implicit
    op(*good)
    columns = hoisted.shape[3]
    for position, wrong, text in [
        (0, hoisted[0], "hoisted must have 4 dimensions"),
        (0, hoisted[:, :, :0], "hoisted must have at least one pixel"),
        (0, hoisted.double(), "position_weight must have dtype torch.float64"),
        (1, y[0], r"y must have shape \[B, R, S\]"),
        (1, y.double(), "y must have dtype torch.float32"),
        (2, x[:, :, :5], r"x must have shape \[2, 1, 33\]; got \[2, 1, 5\]"),
        (3, cell, r"cell must have shape \[2, 1, 33, 2\]"),
        (4, good[4][:, :2], rf"position_weight must have shape \[{columns}, 4\]"),
        (5, weights[2:], "biases must be as many as the 1 weights; got 2"),
        (5, [weights[2], weights[1]], r"weights\[0\] must have shape"),
        (5, [weights[1], weights[2].double()], r"weights\[1\] must have hoisted's dtype torch.float32"),
        (6, [biases[1], biases[1]], r"biases\[1\] must have shape \[3\]"),
        (7, 5, "band_start must place 6 rows within the map's height 5; got 0"),
        (8, 1, "band_start must place 6 rows within the map's height 6; got 1"),
        (8, -1, "band_start must place"),
    ]:
        with pytest.raises(ValueError, match=text):
            op(*good[:position], wrong, *good[position + 1 :])
    with pytest.raises(ValueError, match="weights must hold at least one Linear weight"):
        op(*good[:5], [], [], *good[7:])
    grad = torch.ones(2, 1, 33, 3)
    torch.ops.inr_kernels.local_implicit_backward(grad, *good, True, True)
    for wrong in (grad[:, :, :1], grad.double()):
        with pytest.raises(ValueError, match="grad must have"):
            torch.ops.inr_kernels.local_implicit_backward(wrong, *good, True, True)
    band = [hoisted[:, 3:], *good[1:8], 3, *good[9:]]  # rows 3 to 5, but the queries are everywhere
    with pytest.raises(ValueError, match="a query reads a row outside the hoisted band"):
        op(*band)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("where", ["coord", "cell", "feat", "weights"])
def test_non_finite_values_do_not_spread(where, bad):
    args = arguments()
    if where == "weights":
        args["weights"][1][3, 4] = bad
    else:
        args[where].view(2, -1)[0, 7] = bad
    ours, theirs = (local_implicit_decode(**args, backend=name) for name in ("cpu", "reference"))
    assert torch.equal(ours.isnan(), theirs.isnan())
    finite = theirs.isfinite()
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-4, atol=1e-5)


def test_large_products_are_as_large_as_the_references():
    """Sums of parts would overflow where the product does not."""
    args = arguments()
    args["weights"][1].mul_(1e12)
    args["feat"].mul_(1e24)
    ours, theirs = (local_implicit_decode(**args, backend=name) for name in ("cpu", "reference"))
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
    finite = theirs.isfinite()
    assert (theirs[finite].abs() > 1e34).any()
    torch.testing.assert_close(ours[finite] / 1e36, theirs[finite] / 1e36, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", [name for name in backends_of("local_implicit") if name != "triton"])
@pytest.mark.parametrize(
    ("unfold", "cell", "after"), [(True, True, "last"), (False, False, "last"), (True, True, "first")]
)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (13, 19), (14, 18), (31, 3)])
def test_render_equals_queries_on_the_grid(size, unfold, cell, after, backend):
    decoder = LocalImplicitDecoder(4, hidden=(9, 8), feat_unfold=unfold, cell_decode=cell, ensemble_after=after)
    feat = torch.randn(2, 4, 7, 9)
    case = Case(batch=2, channels=4, size=(7, 9), grid=size)
    with torch.no_grad():
        image = decoder.render(feat, size, backend=backend)
        query = decoder(feat, case.tensors["coord"], case.tensors["cell"] if cell else None, backend=backend)
        full = image.permute(0, 2, 3, 1).flatten(1, 2)
        assert torch.equal(full, query) if backend == "cpu" else torch.allclose(full, query, atol=1e-6)
        with pytest.raises(ValueError, match="workspace must be at least") as error:
            decoder.render(feat, size, workspace=1)
        min_bytes = int(re.search(r"at least (\d+) bytes", str(error.value))[1])
        bands = []
        banded = decoder.render(feat, size, workspace=min_bytes, backend=backend, progress=lambda *a: bands.append(a))
    assert len(bands) >= 2 * min(size[0], 3)
    torch.testing.assert_close(banded, image, rtol=1e-5, atol=1e-6)


def test_render_takes_a_cell_and_gives_gradients():
    decoder = LocalImplicitDecoder(4, hidden=(9, 8))
    feat, cell = torch.randn(2, 4, 5, 6, requires_grad=True), torch.rand(2, 2)
    images = [decoder.render(feat, (11, 13), cell, workspace=w) for w in (1 << 28, 40_000)]
    grads = [torch.autograd.grad(image.square().sum(), feat)[0] for image in images]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    assert not torch.equal(images[0], decoder.render(feat, (11, 13)))


def test_render_rejects_too_small_a_workspace():
    decoder = LocalImplicitDecoder(4, hidden=(9, 8))
    with pytest.raises(ValueError, match=r"workspace must be at least \d+ bytes for these shapes; got 100"):
        decoder.render(torch.randn(1, 4, 5, 6), (9, 9), workspace=100)
    with pytest.raises(ValueError, match="workspace must be a positive number of bytes; got None"):
        decoder.render(torch.randn(1, 4, 5, 6), (9, 9), workspace=None)


MEMORY = """
import re, torch
from inr_kernels import LocalImplicitDecoder
decoder, feat = LocalImplicitDecoder(64, hidden=(256,)), torch.randn(1, 64, {h}, 200)
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
with torch.no_grad():
    decoder.render(feat[:, :, :30], (30, 400), workspace=32 << 20, backend={backend!r})
    before = peak()
    out = decoder.render(feat, ({h} // 2, 400), workspace=32 << 20, backend={backend!r})
    print(peak() - before - out.nbytes)
"""


def test_render_stays_in_its_workspace(run_python):
    """A workspace of 32 MB is kept for a map that takes 205 MB hoisted (and 461 MB unfolded)."""
    grown = int(run_python(MEMORY.format(h=1000, backend="cpu")))
    assert grown <= (32 << 20) + (8 << 20)  # what allocators keep in addition


class Counted:
    """Counts how often the first layer is hoisted."""

    def __init__(self, monkeypatch):
        self.calls = 0

        def counted(*args, **kwargs):
            self.calls += 1
            return hoist_features(*args, **kwargs)

        monkeypatch.setattr(module, "hoist_features", counted)


# What happens between two queries -> whether the first layer must be hoisted again.
CHANGES = {
    "nothing": (lambda d, f: f, False),
    "features edited": (lambda d, f: f.mul_(2), True),
    "features edited through data": (lambda d, f: f.data.mul_(2) is None or f, True),
    "an equal clone": (lambda d, f: f.clone(), True),
    "weight edited": (lambda d, f: d.imnet.layers[0].weight.mul_(2) is None or f, True),
    "weight edited through data": (lambda d, f: d.imnet.layers[0].weight.data.mul_(2) is None or f, True),
    "bias edited": (lambda d, f: d.imnet.layers[0].bias.add_(1) is None or f, True),
    "other weights edited": (lambda d, f: d.imnet.layers[2].weight.mul_(2) is None or f, False),
    "state loaded": (lambda d, f: d.load_state_dict({k: v + 1 for k, v in d.state_dict().items()}) and f, True),
    "dtype": (lambda d, f: d.double() and f.double(), True),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CHANGES)
def test_hoisted_map_is_cached_until_something_changes(name, mode, monkeypatch):
    change, again = CHANGES[name]
    counted = Counted(monkeypatch)
    decoder = LocalImplicitDecoder(4, hidden=(9, 8))
    case = Case(batch=2, channels=4)
    coord, cell = case.tensors["coord"], case.tensors["cell"]
    with mode():
        feat = torch.randn(2, 4, 6, 7)
        decoder(feat, coord[:, :9], cell[:, :9])
        feat = change(decoder, feat)
        out = decoder(feat, coord, cell)
        # An inference tensor is compared by value, so an equal clone may hit the cache; this is not guaranteed.
        assert torch.equal(out, decoder(feat.clone(), coord, cell))
    assert counted.calls - 2 == again


def test_map_hoisted_in_inference_mode_is_not_used_in_training():
    decoder, feat = LocalImplicitDecoder(4, hidden=(9, 8)), torch.randn(1, 4, 6, 7)
    decoder.imnet.layers[0].requires_grad_(False)
    query = torch.zeros(1, 1, 2), torch.ones(1, 2)
    with torch.inference_mode():
        decoder(feat, *query)
    decoder(feat, *query).sum().backward()
    assert decoder.imnet.layers[2].weight.grad is not None


def test_hoisted_map_is_freed_with_its_features():
    decoder, feat = LocalImplicitDecoder(4, hidden=(9, 8)), torch.randn(1, 4, 6, 7)
    with torch.no_grad():
        decoder(feat, torch.zeros(1, 1, 2), torch.ones(1, 2))
    hoisted = weakref.ref(decoder._hoisted._entry.hoisted)
    del feat
    gc.collect()
    assert hoisted() is None


def test_pickle_and_deepcopy_do_not_copy_the_map():
    decoder, feat = LocalImplicitDecoder(4, hidden=(9, 8)), torch.randn(1, 4, 6, 7)
    query = torch.rand(1, 5, 2), torch.ones(1, 2)
    with torch.no_grad():
        out = decoder(feat, *query)
        for other in (pickle.loads(pickle.dumps(decoder)), copy.deepcopy(decoder)):
            assert other._hoisted._entry is None
            assert torch.equal(other(feat, *query), out)


def test_state_dict_is_liifs():
    decoder = LocalImplicitDecoder(64)
    shapes = {key: tuple(value.shape) for key, value in decoder.state_dict().items()}
    widths = [580, 256, 256, 256, 256, 3]
    expected = {}
    for i in range(5):
        expected[f"imnet.layers.{2 * i}.weight"] = (widths[i + 1], widths[i])
        expected[f"imnet.layers.{2 * i}.bias"] = (widths[i + 1],)
    assert shapes == expected
    assert sum(p.numel() for p in decoder.parameters()) == 346_883


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    decoder = LocalImplicitDecoder(4, hidden=(9, 8))
    feat, case = torch.randn(2, 4, 6, 7), Case(batch=2, channels=4)
    exact = decoder(feat, case.tensors["coord"], case.tensors["cell"])
    with torch.autocast("cpu", dtype=dtype):
        out = decoder(feat, case.tensors["coord"], case.tensors["cell"])
        image = decoder.render(feat, (9, 9))
    assert out.dtype == image.dtype == dtype
    assert (out - exact).abs().max() < 0.02
    out.sum().backward()
    assert decoder.imnet.layers[0].weight.grad.dtype == torch.float32


def test_two_threads_decode_at_once():
    decoder = LocalImplicitDecoder(8, hidden=(64, 64))
    problems = [(torch.randn(1, 8, 9 + i, 8), torch.rand(1, 3000, 2), torch.rand(1, 2)) for i in range(2)]
    with torch.no_grad():
        expected = [decoder(*p) for p in problems]
    wrong = []

    def work(i):
        with torch.no_grad():
            wrong.extend(i for _ in range(20) if not torch.equal(decoder(*problems[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_works_in_a_forked_child(in_a_fork):
    case = Case(batch=1, queries=5000, hidden=(64, 64))
    feat, coord, cell, weights, biases = case.cast(torch.float32)
    hoisted = hoist_features(feat, weights[0], biases[0], Form())  # torch's convolution may hang in a child
    y, x = (t.unsqueeze(1) for t in coord.unbind(-1))
    args = hoisted, y, x, cell[:, None], weights[0][:, 45:], weights[1:], biases[1:], 6, 0, True, False, "cpu"
    assert in_a_fork(lambda: torch.ops.inr_kernels.local_implicit(*args))


def test_any_number_of_threads_gives_the_same():
    case = Case(batch=1, queries=20_000, hidden=(64, 64))
    before = torch.get_num_threads()
    outs = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        outs.append(case.decode(torch.float32, "cpu")[0])
    torch.set_num_threads(before)
    assert all(torch.equal(outs[0], out) for out in outs[1:])
