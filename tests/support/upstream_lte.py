"""LTE decoders as other projects write them, and similar decoders that are not LTE's."""

import torch
import torch.nn.functional as F
from torch import nn
from upstream_decoders import Mlp

from inr_kernels.local_implicit.reference import pixel_centres


class Texture(nn.Module):
    """LTE, ELTE and SLTE: `kind`. Subclasses that compute something else change the attributes."""

    area_eps, turn = 1e-9, torch.pi

    def __init__(self, kind="LTE", channels=4, hidden_dim=12, **mlp_options):
        super().__init__()
        self.encoder = nn.Conv2d(3, channels, 3, padding=1)
        self.coef = nn.Conv2d(channels, hidden_dim, 3, padding=1)
        self.freq = nn.Conv2d(channels, hidden_dim // 2 if kind == "ELTE" else hidden_dim, 3, padding=1)
        if kind != "SLTE":
            self.phase = nn.Linear(2, hidden_dim // 2, bias=False)
        if kind == "ELTE":
            self.coord_fc = nn.Linear(2, hidden_dim // 2, bias=False)
        self.imnet = Mlp(hidden_dim + (2 if kind == "SLTE" else 0), 3, **mlp_options)
        self.kind = kind

    def gen_feat(self, inp):
        self.inp = inp
        self.feat = self.encoder(inp)
        self.coeff, self.freqq = self.coef(self.feat), self.freq(self.feat)
        return self.feat

    def query_rgb(self, coord, cell=None):
        out = self.decode(self.coeff, self.freqq, coord.unsqueeze(1), cell.unsqueeze(1))[:, 0]
        return out + self.skip(coord.unsqueeze(1))[:, 0]

    def skip(self, coord):
        sampled = F.grid_sample(self.inp, coord.flip(-1), padding_mode="border", align_corners=False)
        return sampled.permute(0, 2, 3, 1)

    def wave(self, freq, rel, cell):
        if self.kind == "ELTE":
            return freq * self.coord_fc(rel)
        return (freq.unflatten(-1, (-1, 2)) * rel.unsqueeze(-2)).sum(-1)

    def apply_mlp(self, x, centre):
        return self.imnet(torch.cat((x, centre), -1) if self.kind == "SLTE" else x)

    def decode(self, coef, freq, coord, cell):
        size = coef.shape[-2:]
        centres = torch.stack(torch.meshgrid(*map(pixel_centres, size), indexing="ij")).cuda()
        centres = centres.expand(len(coef), 2, *size)
        scale = coord.new_tensor(size)
        preds, areas = [], []
        for side_y in (-1, 1):
            for side_x in (-1, 1):
                moved = coord.clone()
                moved[..., 0] += side_y / size[0] + 1e-6
                moved[..., 1] += side_x / size[1] + 1e-6
                grid = moved.clamp(-1 + 1e-6, 1 - 1e-6).flip(-1)
                q_coef, q_freq, centre = (
                    F.grid_sample(t, grid, mode="nearest", align_corners=False).permute(0, 2, 3, 1)
                    for t in (coef, freq, centres)
                )
                rel = (coord - centre) * scale
                wave = self.wave(q_freq, rel, cell)
                if self.kind != "SLTE":
                    wave = wave + self.phase(cell * scale)
                basis = torch.cat((torch.cos(self.turn * wave), torch.sin(self.turn * wave)), -1)
                preds.append(self.apply_mlp(q_coef * basis, centre))
                areas.append(rel.prod(-1).abs() + self.area_eps)
        total = sum(areas)
        return sum(pred * (area / total).unsqueeze(-1) for pred, area in zip(preds, areas[::-1], strict=True))

    def forward(self, inp, coord, cell):
        self.gen_feat(inp)
        return self.query_rgb(coord, cell)


class Plus(Texture):
    """LTE+."""

    def __init__(self, channels=4, hidden_dim=12, out=3):
        super().__init__(channels=channels, hidden_dim=hidden_dim)
        del self.imnet
        self.layers = nn.Sequential(nn.Conv2d(hidden_dim, 8, 1), nn.ReLU(), nn.Conv2d(8, out, 1))

    def gen_feat(self, inp):
        self.inp, self.feat = inp, self.encoder(inp)
        return self.feat

    def wave(self, freq, rel, cell):
        return (freq.unflatten(-1, (2, -1)) * rel.unsqueeze(-1)).sum(-2)

    def apply_mlp(self, x, centre):
        return self.layers(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def query_rgb(self, coord, cell):
        cell = cell[:, None, None].expand(coord.shape)
        out = self.decode(self.coef(self.feat), self.freq(self.feat), coord, cell) + self.skip(coord)
        return out.permute(0, 3, 1, 2)


class NoSkip(Texture):
    def skip(self, coord):
        return 0 * super().skip(coord)


class HalfTurns(Texture):
    turn = torch.pi / 2


class HalfSplit(Texture):
    def wave(self, freq, rel, cell):
        return (freq.unflatten(-1, (2, -1)) * rel.unsqueeze(-1)).sum(-2)


class LargeAreaEps(Texture):
    area_eps = 1e-2


def with_hook():
    model = Texture()
    model.phase.register_forward_hook(lambda *_: None)
    return model


def with_biased_phase():
    model = Texture()
    model.phase = nn.Linear(2, 6)
    return model


def with_long_phase():
    """LTEW's, whose cell has ten columns."""
    model = Texture()
    model.phase = nn.Linear(10, 6, bias=False)
    return model


def without_mlp():
    model = Texture()
    del model.imnet
    return model


DIFFERENT = "query_rgb is not LTE's: its output differs on random inputs"
UNSUPPORTED = {
    "no skip": (NoSkip, DIFFERENT),
    "other angle": (HalfTurns, DIFFERENT),
    "other pairs": (HalfSplit, DIFFERENT),
    "other area": (LargeAreaEps, DIFFERENT),
    "hook": (with_hook, "its MLP or a layer that it uses has a hook"),
    "phase with a bias": (with_biased_phase, "its phase has a bias"),
    "another cell": (with_long_phase, "do not have the shapes of LTE, LTE+, ELTE or SLTE"),
    "no MLP": (without_mlp, "it has no MLP that is an nn.Sequential"),
    "GELU": (lambda: Texture(activation=nn.GELU), "its MLP must be Linear, ReLU, ...; got Linear, GELU"),
    "no bias": (lambda: Texture(bias=False), "a layer of its MLP has no bias"),
}
