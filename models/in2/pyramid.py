"""The implicit pyramid of IN²: a feature map rendered onto larger and larger grids, the last of them as colours."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core.checks import require, require_tensor
from inr_kernels.local_implicit import local_implicit_decode
from inr_kernels.local_implicit.functional import Form, check_size, render

# Where the ensemble of the four neighbours stands.
MODES = {"split": "first", "bilinear": "first", "liif": "last"}


class ImplicitUpsample(nn.Module):
    """INRB, the implicit neural representation block of IN²: a feature map at any size.

        split:     a = sum_t w_t ReLU(W_1 [f_t; d_t] + b_1),   out = MLP([a; cell])
        bilinear:  a = sum_t w_t f_t,                          out = MLP([a; cell])
        liif:      out = sum_t w_t MLP([f_t; d_t; cell])

    t are the four pixels of the map around an output pixel, d_t its offset from t in half pixels (y, x), w_t the area
    to the pixel opposite to t, cell = cell_scale (h / H, w / W).

    Args:
        in_channels, out_channels: of the maps.
        hidden: widths of the hidden layers, at least one; in "split" the first is W_1's.
        mode: "split", "bilinear" or "liif".
        cell_scale: 1: the paper's cell; 2: LIIF's, in half pixels of the map.
        reference: the same in plain PyTorch, all queries at once.

    Source: Zhao, Yang and Fu, Learning Position-Aware Implicit Neural Network for Real-World Face Inpainting, 2024,
    eq. 2-4, which leave f and the MLP open.

    Example:
        >>> ImplicitUpsample(8, 6, hidden=(16, 16))(torch.randn(1, 8, 5, 7), (9, 13)).shape
        torch.Size([1, 6, 9, 13])
    """

    def __init__(
        self, in_channels, out_channels, hidden=(256, 256, 256), mode="split", cell_scale=1.0, *, reference=False
    ):
        super().__init__()
        require(mode in MODES, "mode", f"be one of {', '.join(MODES)}", repr(mode))
        widths = in_channels, *hidden, out_channels
        require(
            hidden and min(widths) > 0, "in_channels, hidden, out_channels", "be positive, hidden not empty", widths
        )
        self.mode, self.cell_scale, self.reference = mode, cell_scale, reference
        self.form = Form(feat_unfold=False, ensemble_after=MODES[mode])
        inputs = [in_channels, *hidden]
        inputs[0] += 4 if mode == "liif" else 2
        inputs[1] += 2 if mode == "split" else 0
        layers = []
        for n_in, n_out in zip(inputs, widths[1:], strict=True):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        for layer in self.layers[::2]:  # He's: torch's own loses nine tenths of a map's contrast
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, feat, size, head=None, **options):
        """feat [B, C, h, w] -> [B, out_channels, H, W], or head of that.

        Args:
            size: (H, W).
            head: a convolution 3 x 3 with one pixel of zeros around.
            options: of the rendering in bands: workspace, progress.
        """
        require_tensor(feat, "feat", dims=(4,), like=self.layers[0].weight)
        weights, biases = self._linears()
        size = check_size(size)
        sides = [torch.full((len(feat),), self.cell_scale / n, device=feat.device) for n in size]
        cell = torch.stack(sides, -1)
        if self.reference:
            coord = torch.stack(torch.meshgrid(*(_centres(n, feat.device) for n in size), indexing="ij"), -1)
            coord = coord.expand(len(feat), *coord.shape)
            out = local_implicit_decode(feat, coord, cell, weights, biases, **self.form._asdict(), backend="reference")
            out = out.permute(0, 3, 1, 2)
            return out if head is None else head(out)
        if head is None:
            return render(feat, size, weights, biases, self.form, cell=cell, **options)
        weights[-1], biases[-1] = _taps(weights[-1], biases[-1], head)
        taps = render(feat, size, weights, biases, self.form, cell=cell, **options)
        out = F.fold(taps.flatten(2), taps.shape[2:], 3, padding=1)
        return out + head.bias.to(out.dtype).view(-1, 1, 1)

    def _linears(self):
        """Weights and biases as `local_implicit_decode` takes them."""
        linears = list(self.layers)[::2]
        weights, biases = [layer.weight for layer in linears], [layer.bias for layer in linears]
        if self.mode == "bilinear":  # a = ReLU(a) - ReLU(-a), with which "split" keeps every sign
            first = weights[0]
            channels = first.shape[1] - 2
            same = torch.eye(channels, channels + 2, dtype=first.dtype, device=first.device)
            weights[:1] = [torch.cat((same, -same)), torch.cat((first[:, :-2], -first[:, :-2], first[:, -2:]), 1)]
            biases.insert(0, first.new_zeros(2 * channels))
        return weights, biases

    def extra_repr(self):
        return f"mode={self.mode!r}, cell_scale={self.cell_scale}" + (", reference=True" if self.reference else "")


class ImplicitPyramidDecoder(nn.Module):
    """Colours at any size from the encoder's smallest map: an `ImplicitUpsample` to each larger grid, the last to the
    picture's, then a convolution 3 x 3.

    That convolution and the last Linear before it are one matrix, of nine values a colour instead of the features.

    Args:
        channels: of the map that comes in, and of every rendered one.
        out_channels: of the picture.
        hidden, mode, cell_scale, reference: of `ImplicitUpsample`.

    Example:
        >>> decoder = ImplicitPyramidDecoder((8, 6, 4), hidden=(16, 16))
        >>> decoder(torch.randn(1, 8, 5, 7), [(10, 13), (20, 26)]).shape
        torch.Size([1, 3, 20, 26])
    """

    def __init__(self, channels, out_channels=3, *, reference=False, **options):
        super().__init__()
        pairs = itertools.pairwise(channels)
        self.layers = nn.ModuleList(ImplicitUpsample(*pair, **options, reference=reference) for pair in pairs)
        self.head = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, feat, sizes, **options):
        """feat [B, C, h, w] -> [B, out_channels, H, W].

        Args:
            sizes: (H, W) of every layer's grid, the picture's last.
            options: of the rendering in bands: workspace; progress, of the last layer.
        """
        require(len(sizes) == len(self.layers), "sizes", f"be {len(self.layers)}, one a layer", sizes)
        inner = {name: value for name, value in options.items() if name != "progress"}
        for layer, size in zip(self.layers[:-1], sizes[:-1], strict=True):
            feat = layer(feat, size, **inner)
        return self.layers[-1](feat, sizes[-1], self.head, **options)


def _centres(n, device):
    """[n] float32: the centres of n pixels that span [-1, 1]."""
    return -1 + 1 / n + (2 / n) * torch.arange(n, dtype=torch.float32, device=device)


def _taps(weight, bias, head):
    """A Linear and the convolution 3 x 3 behind it as one Linear: what a pixel adds to each of its nine neighbours."""
    with torch.autocast(weight.device.type, enabled=False):
        kernel = head.weight.flip(2, 3)
        taps = torch.einsum("ocij,cn->oijn", kernel, weight), torch.einsum("ocij,c->oij", kernel, bias)
    return taps[0].flatten(0, 2), taps[1].flatten()
