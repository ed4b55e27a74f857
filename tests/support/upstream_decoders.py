"""LIIF decoders as other projects write them, and similar decoders that are not LIIF's."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from inr_kernels.integrations import liif, restore
from inr_kernels.integrations.class_swap import CANNOT_RUN
from inr_kernels.local_implicit.reference import pixel_centres


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: on problems this small, several would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(batch=2, size=(6, 5), queries=40):
    return torch.rand(batch, 3, *size), torch.rand(batch, queries, 2) * 2.4 - 1.2, torch.rand(batch, queries, 2) * 0.4


@contextlib.contextmanager
def without_cuda():
    """Runs upstream code, which calls .cuda(), on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
        yield


def original(model, *args, **kwargs):
    """The output of the original method."""
    memo = {id(vars(model).get("feat")): None}  # set by the last call; deepcopy refuses tensors that are not leaves
    with without_cuda():
        return restore(copy.deepcopy(model, memo))(*args, **kwargs)


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def is_accelerated(model, *args):
    """Whether a call runs on our op."""
    with without_cuda(), pytest.MonkeyPatch.context() as patch:
        calls = []
        decode = liif.decode_queries
        patch.setattr(liif, "decode_queries", lambda *a, **k: calls.append(a) or decode(*a, **k))
        model(*args)
    return bool(calls)


class Mlp(nn.Module):
    """imnet: LIIF's by default."""

    def __init__(self, inputs, outputs, hidden=(16, 12), activation=nn.ReLU, bias=True, extra=None):
        super().__init__()
        layers = []
        for width in hidden:
            layers += [nn.Linear(inputs, width, bias=bias), activation(), *([extra(width)] if extra else [])]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, outputs, bias=bias))

    def forward(self, x):
        return self.layers(x)


class Residual(Mlp):
    def forward(self, x):
        return self.layers(x) + x[..., :3]


class Decoder(nn.Module):
    """LIIF's decoder. Subclasses that compute something else change these attributes."""

    eps, area_eps, limit, kernel, mirror, device = 1e-6, 1e-9, 1 - 1e-6, 3, True, "cuda"

    def __init__(self, local_ensemble=True, feat_unfold=True, cell_decode=True, channels=4, mlp=Mlp, **mlp_options):
        super().__init__()
        self.local_ensemble, self.feat_unfold, self.cell_decode = local_ensemble, feat_unfold, cell_decode
        self.encoder = nn.Conv2d(3, channels, 3, padding=1)
        inputs = channels * (self.kernel**2 if feat_unfold else 1) + (4 if cell_decode else 2)
        self.imnet = mlp(inputs, 3, **mlp_options)

    def decode(self, feat, coord, cell):
        size = feat.shape[-2:]
        if self.feat_unfold:
            feat = F.unfold(feat, self.kernel, padding=self.kernel // 2).view(len(feat), -1, *size)
        centres = torch.stack(torch.meshgrid(*map(pixel_centres, size), indexing="ij"))
        centres = centres.cuda() if self.device == "cuda" else centres.to(feat)
        centres = centres.expand(len(feat), 2, *size)
        scale = coord.new_tensor(size)
        sides, eps = ((-1, 1), self.eps) if self.local_ensemble else ((0,), 0)
        preds, areas = [], []
        for side_y in sides:
            for side_x in sides:
                moved = coord.clone()
                moved[..., 0] += side_y / size[0] + eps
                moved[..., 1] += side_x / size[1] + eps
                grid = moved.clamp(-self.limit, self.limit).flip(-1)[:, None]
                picked, centre = (
                    F.grid_sample(t, grid, mode="nearest", align_corners=False)[:, :, 0].transpose(1, 2)
                    for t in (feat, centres)
                )
                offset = (coord - centre) * scale
                x = [picked, offset, *([cell * scale] if self.cell_decode else [])]
                preds.append(self.imnet(torch.cat(x, -1)))
                areas.append(offset.prod(-1).abs() + self.area_eps)
        total = sum(areas)
        if self.mirror:
            areas.reverse()
        return sum(pred * (area / total).unsqueeze(-1) for pred, area in zip(preds, areas, strict=True))


class StoresFeatures(Decoder):
    """The interface of yinboc/liif."""

    def gen_feat(self, inp):
        self.feat = self.encoder(inp)
        return self.feat

    def query_rgb(self, coord, cell=None):
        return self.decode(self.feat, coord, cell)

    def forward(self, inp, coord, cell):
        self.gen_feat(inp)
        return self.query_rgb(coord, cell)


class TakesFeatures(Decoder):
    """The interface of mmagic: no attribute `encoder`, chunks of eval_bsize."""

    device = "input"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv_first, self.eval_bsize = self.encoder, 7
        del self.encoder

    def gen_feature(self, x):
        return self.conv_first(x)

    def query_rgb(self, feature, coord, cell=None):
        return self.decode(feature, coord, cell)

    def batched_predict(self, x, coord, cell):
        with torch.no_grad():
            chunks = zip(coord.split(self.eval_bsize, 1), cell.split(self.eval_bsize, 1), strict=True)
            return torch.cat([self.query_rgb(x, *chunk) for chunk in chunks], 1)

    def forward(self, x, coord, cell, test_mode=False):
        decode = self.batched_predict if test_mode else self.query_rgb
        return decode(self.gen_feature(x), coord, cell)


class PlusInput(StoresFeatures):
    def gen_feat(self, inp):
        self.inp = inp
        return super().gen_feat(inp)

    def query_rgb(self, coord, cell=None):
        picked = F.grid_sample(self.inp, coord.flip(-1)[:, None], align_corners=False)[:, :, 0]
        return super().query_rgb(coord, cell) + picked.transpose(1, 2)


class PlusInputIfAny(PlusInput):
    inp = None

    def query_rgb(self, coord, cell=None):
        return StoresFeatures.query_rgb(self, coord, cell) if self.inp is None else super().query_rgb(coord, cell)


class PlusInputFromForward(StoresFeatures):
    """Only forward stores the input."""

    inp = None

    def forward(self, inp, coord, cell):
        self.inp = inp
        return super().forward(inp, coord, cell)

    def query_rgb(self, coord, cell=None):
        out = super().query_rgb(coord, cell)
        return out if self.inp is None else out + self.inp.mean()


class PlusGate(StoresFeatures):
    """Adds a parameter that is initialised to zero."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(3))

    def query_rgb(self, coord, cell=None):
        return super().query_rgb(coord, cell) + self.gate


class PlusNoise(StoresFeatures):
    def query_rgb(self, coord, cell=None):
        out = super().query_rgb(coord, cell)
        return out + torch.randn_like(out) if self.training else out


class Detached(StoresFeatures):
    def query_rgb(self, coord, cell=None):
        return self.decode(self.feat.detach(), coord, cell)


class NoEps(StoresFeatures):
    eps = 0


class LargeAreaEps(StoresFeatures):
    area_eps = 1e-6


class KeepsOutput(StoresFeatures):
    def query_rgb(self, coord, cell=None):
        self.out = super().query_rgb(coord, cell)
        return self.out


class NoClamp(StoresFeatures):
    limit = 9.0


class NotMirrored(StoresFeatures):
    mirror = False


class Unfold5(StoresFeatures):
    kernel = 5


class Options(StoresFeatures):
    def query_rgb(self, coord, cell=None, **_):
        return super().query_rgb(coord, cell)


class SmallCells(StoresFeatures):
    """Same as LIIF up to a scale of 4."""

    def query_rgb(self, coord, cell=None):
        return super().query_rgb(coord, cell.clamp(min=0.1))


class NoFlags(nn.Module):
    def __init__(self):
        super().__init__()
        self.imnet = Mlp(8, 3)

    def query_rgb(self, coord, cell=None):
        return coord


def without_imnet():
    model = StoresFeatures()
    model.imnet = None
    return model


def with_hook():
    model = StoresFeatures()
    model.imnet.layers[2].register_forward_hook(lambda module, args, out: 2 * out)
    return model


def with_parametrized_weight():
    model = StoresFeatures()
    parametrizations.weight_norm(model.imnet.layers[0])
    assert parametrize.is_parametrized(model.imnet.layers[0])
    return model


def with_mixed_dtypes():
    model = StoresFeatures()
    model.imnet.layers[2].half()
    return model


class Packed(torch.Tensor):
    pass


def with_packed_weights():
    model = StoresFeatures()
    layer = model.imnet.layers[0]
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    return model


def with_patched_forward():
    model = StoresFeatures()
    model.imnet.forward = lambda x: model.imnet.layers(x) + 1
    return model


def with_patched_query():
    model = StoresFeatures()
    model.query_rgb = lambda coord, cell=None: coord
    return model


OUTPUT, LAYERS, PATCHED = "its output differs on random", "must be Linear, ReLU", "hook or a patched forward"

# Name: (how to build a decoder that must not be accelerated, part of the logged reason).
UNSUPPORTED = {
    "adds its input": (PlusInput, OUTPUT),
    "adds its input, if any": (PlusInputIfAny, OUTPUT),
    "adds what forward stored": (PlusInputFromForward, OUTPUT),
    "adds a parameter": (PlusGate, OUTPUT),
    "adds noise in training": (PlusNoise, OUTPUT),
    "no gradient to the features": (Detached, "its gradients differ"),
    "no eps": (NoEps, OUTPUT),
    "larger eps in areas": (LargeAreaEps, OUTPUT),
    "stores its output": (KeepsOutput, "sets attributes"),
    "no clamp": (NoClamp, OUTPUT),
    "areas not mirrored": (NotMirrored, OUTPUT),
    "5 x 5": (Unfold5, "are not features, offset and cell"),
    "5 x 5, whose inputs would fit": (lambda: Unfold5(channels=9), CANNOT_RUN),
    "clamps the cell": (SmallCells, OUTPUT),
    "another MLP": (lambda: StoresFeatures(mlp=Residual), OUTPUT),
    "more arguments": (Options, "its query_rgb takes 3 arguments (coord, cell=None, **_), not (coord, cell) or ("),
    "dropout": (lambda: StoresFeatures(extra=lambda _: nn.Dropout()), LAYERS),
    "batch norm": (lambda: StoresFeatures(extra=nn.BatchNorm1d), LAYERS),
    "GELU": (lambda: StoresFeatures(activation=nn.GELU), LAYERS),
    "no hidden layer": (lambda: StoresFeatures(hidden=()), LAYERS),
    "parametrized weight": (with_parametrized_weight, LAYERS),
    "no bias": (lambda: StoresFeatures(bias=False), "no bias"),
    "hook": (with_hook, PATCHED),
    "patched forward": (with_patched_forward, PATCHED),
    "patched query_rgb": (with_patched_query, "patched on the object"),
    "mixed dtypes": (with_mixed_dtypes, "differ in dtype"),
    "packed weights": (with_packed_weights, "of a tensor subclass"),
    "no imnet": (without_imnet, "it has no imnet"),
    "no flags": (NoFlags, "it has no attribute local_ensemble"),
}
