"""The Triton backward of elementwise_filter in one pass: its tiles, its halos, and borders, in Triton's interpreter."""

import pytest
import torch
from elementwise_filter_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from inr_kernels._core.backends import vjp
from inr_kernels.elementwise_filter import triton_kernels
from inr_kernels.elementwise_filter.reference import elementwise_filter

ALL_TERMS = (0.5, 0.25, 2.0)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# Several tiles along both axes, or one; channels that share logits; several dilations; maps below the reach.
FORMS = {
    "tiles": {"size": (20, 66), "channels": 1, "groups": 1, "padding": "reflect"},
    "rows of tiles": {
        "size": (40, 20),
        "channels": 1,
        "groups": 1,
        "padding": "replicate",
        "kernel_size": (5, 5),
        "layout": "taps innermost",
    },
    "one tile": {"size": (9, 11), "padding": "valid", "kernel_size": (3, 5), "dilation": 2},
    "shared logits": {"channels": 6, "groups": 2, "size": (18, 35), "normalize": "none"},
    "dilations": {"size": (21, 34), "dilation": (1, 3), "normalize": "none"},
    "below the reach": {"size": (2, 3), "padding": "replicate", "kernel_size": (5, 5)},
    "reflected at both ends": {"size": (3, 3), "padding": "reflect", "kernel_size": (5, 5)},
    "another grid": {"size": (5, 9), "upscale": 2, "stride": 3, "groups": 1},
    "many channels": {"channels": 10, "groups": 2, "size": (5, 6), "padding": "reflect"},
    "folded dilation": {"size": (7, 9), "padding": "reflect", "dilation": 2},
}


def backward(case, dtype):
    """The kernels' gradients on a case's tensors, and the reference's in float64 and in the dtype."""
    options = case.options(dtype)
    if isinstance(case.dilation, int):
        options["dilation"] = (case.dilation,)
    x, kernel = (t.to(dtype) for t in case.tensors[:2])
    form = *list(options.values())[:-1], options["log_window"]
    grad = torch.randn(len(options["dilation"]), *x.shape[:2], *kernel.shape[2:]).to(dtype)
    found = triton_kernels.backward(grad, x, case.laid_out(kernel), *form, needs_x=True, needs_kernel=True)
    theirs = []
    for other in (torch.float64, dtype):
        window = None if form[-1] is None else form[-1].to(other)
        run = lambda x, kernel, window=window: elementwise_filter(x, kernel, *form[:-1], window)  # noqa: E731
        theirs.append(vjp(run, grad.to(other), x.to(other), kernel.to(other)))
    return found, *theirs


@pytest.mark.parametrize("name", FORMS)
def test_one_pass(name):
    options = {"batch": 1, "channels": 2, "groups": 2, "normalize": "taps", "coefficients": ALL_TERMS} | FORMS[name]
    case = Case(**options, window=options["normalize"] == "taps")
    for dtype in FLOATS if name == "one tile" else FLOATS[:1]:
        for one, exact, eager in zip(*backward(case, dtype), strict=True):
            assert one.dtype == dtype
            scale, few = exact.abs().max().clamp(1), 4e-6 + (torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)
            assert (one - exact).abs().max() <= 2 * (eager - exact).abs().max() + few * scale


def test_the_same_bits():
    case = Case(batch=1, channels=1, groups=1, size=(20, 70), normalize="taps", padding="reflect")
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(backward(case, torch.bfloat16)[0])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("upscale", [1, 2])
def test_one_gradient(upscale, needs, monkeypatch):
    launched = []
    for name in ("gradients", "image_gradient", "kernel_gradient", "logsumexp"):
        kernel = getattr(triton_kernels, name)
        monkeypatch.setattr(triton_kernels, name, Recorder(kernel, name, launched))
    x, kernel = (torch.randn(1, c, 5 * s, 6 * s) for c, s in ((2, 1), (18, upscale)))
    rest = (3, 3), 2, (1,), 1, upscale, "zeros", "taps", 2.0, 0.0, -1.0, None
    grad = torch.randn(1, 1, 2, 5 * upscale, 6 * upscale)
    both = triton_kernels.backward(grad, x, kernel, *rest, needs_x=True, needs_kernel=True)
    launched.clear()
    found = triton_kernels.backward(grad, x, kernel, *rest, needs_x=needs[0], needs_kernel=needs[1])
    assert [one is not None for one in found] == list(needs)
    for one, other in zip(found, both, strict=True):
        torch.testing.assert_close(other if one is None else one, other)
    on_other_grid = upscale == 2 and needs[0]
    assert launched == (["logsumexp", "image_gradient"] if on_other_grid else ["gradients"])


class Recorder:
    """A kernel that notes its launches."""

    def __init__(self, kernel, name, launched):
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    sides=st.tuples(*[st.integers(1, 300)] * 2),
    margin=st.tuples(*[st.integers(0, 3)] * 2),
    halo=st.tuples(*[st.integers(0, 9)] * 2),
    align=st.sampled_from([1, 2, 4]),
    pixels=st.sampled_from([128, 512, 1024]),
)
def test_tiles_cover_the_map_once_with_their_halos(sides, margin, halo, align, pixels):
    tile = triton_kernels.smallest_cover(sides, margin, halo, (1, align), pixels)
    if tile is None:
        assert max(halo) > 1
        return
    height, width = tile.size
    assert height * width <= pixels
    assert not tile.first[1] % align
    assert tile.counts[1] == 1 or width < align or not (width - 2 * tile.halo[1]) % align
    for n, m, h, size, wide, first, count in zip(sides, margin, halo, *tile, strict=True):
        inner = size - 2 * wide
        assert first + wide <= -m and first + wide + count * inner >= n + m  # every pixel is inside a halo
        assert wide >= h or (count == 1 and first <= -m and first + size >= n + m)
