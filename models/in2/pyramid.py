"""The implicit pyramid of IN²: renders a feature map onto successively larger grids, the last of them as colours."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core.checks import require, require_input, without_autocast
from inr_kernels.local_implicit import local_implicit_decode
from inr_kernels.local_implicit.functional import WORKSPACE, Form, check_size, render
from inr_kernels.local_implicit.functional.checks import check_widths

from ..common.deprecated import eager_or_reference
from ..common.progress import FUSED, Progress, parameters, shares

# Whether the four neighbours are blended after the first or the last hidden layer.
MODES = {"split": "first", "bilinear": "first", "liif": "last"}


class ImplicitUpsample(nn.Module):
    """INRB, the implicit neural representation block of IN²: renders a feature map at any size.

        split:     a = sum_t w_t ReLU(W_1 [f_t; d_t] + b_1),   out = MLP([a; cell])
        bilinear:  a = sum_t w_t f_t,                          out = MLP([a; cell])
        liif:      out = sum_t w_t MLP([f_t; d_t; cell])

    t are the four pixels of the map around an output pixel, d_t its offset from t in half pixels (y, x), w_t the area
    of the rectangle between the output pixel and the pixel opposite to t, cell = cell_scale (h / H, w / W).

    Args:
        in_channels, out_channels: of the maps.
        hidden: widths of the hidden layers, at least one; in "split" the first is W_1's.
        mode: "split", "bilinear" or "liif".
        cell_scale: 1: the paper's cell; 2: LIIF's, in half pixels of the map.
        eager: the same in plain PyTorch, all queries at once.
        reference: deprecated alias of eager.

    Raises:
        ValueError: a mode or width that is not supported.

    Source: Zhao, Yang and Fu, Learning Position-Aware Implicit Neural Network for Real-World Face Inpainting, 2024,
    eq. 2-4, which leave f and the MLP open.

    Example:
        >>> ImplicitUpsample(8, 6, hidden=(16, 16))(torch.randn(1, 8, 5, 7), (9, 13)).shape
        torch.Size([1, 6, 9, 13])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: Sequence[int] = (256, 256, 256),
        mode: str = "split",
        cell_scale: float = 1.0,
        *,
        eager: bool = False,
        reference: bool | None = None,
    ):
        super().__init__()
        require(mode in MODES, "mode", f"be one of {', '.join(MODES)}", repr(mode))
        check_widths(in_channels, hidden, out_channels)
        self.in_channels, self.mode, self.cell_scale = in_channels, mode, cell_scale
        self.eager = eager_or_reference(eager, reference)
        self.form = Form(feat_unfold=False, ensemble_after=MODES[mode])
        inputs = [in_channels, *hidden]
        inputs[0] += 4 if mode == "liif" else 2
        inputs[1] += 2 if mode == "split" else 0
        layers = []
        for n_in, n_out in zip(inputs, (*hidden, out_channels), strict=True):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        linears: list[Any] = list(self.layers)[::2]
        for layer in linears:  # PyTorch's default initialization reduces contrast by 90 %
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        feat: torch.Tensor,
        size: tuple[int, int],
        head: nn.Conv2d | None = None,
        *,
        workspace: int = WORKSPACE,
        progress: Progress = None,
    ) -> torch.Tensor:
        """feat [B, C, h, w] -> [B, out_channels, H, W], or [B, 3, H, W] with a head of three channels.

        Args:
            feat: [B, C, h, w].
            size: (H, W).
            head: a 3 x 3 convolution with zero padding, applied to the output.
            workspace: bytes that the rendering in bands of rows may use.
            progress: called after each band as progress(rows done, rows in all).

        Raises:
            TypeError: feat is not a floating-point tensor.
            ValueError: a shape, size, device or workspace that does not fit.
        """
        weights, biases = self._linears()
        require_input(feat, "feat", self.in_channels, weights[0])
        size = check_size(size)
        options: dict[str, Any] = {"workspace": workspace, "progress": progress}
        sides = [feat.new_full((len(feat),), self.cell_scale / n, dtype=torch.float32) for n in size]
        cell = torch.stack(sides, -1)
        if self.eager:
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
        assert head.bias is not None
        return out + head.bias.to(out.dtype).view(-1, 1, 1)

    def _linears(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Weights and biases as `local_implicit_decode` takes them."""
        linears: list[Any] = list(self.layers)[::2]
        weights, biases = [layer.weight for layer in linears], [layer.bias for layer in linears]
        if self.mode == "bilinear":  # as "split", with a = ReLU(a) - ReLU(-a)
            first = weights[0]
            channels = first.shape[1] - 2
            same = torch.eye(channels, channels + 2, dtype=first.dtype, device=first.device)
            weights[:1] = [torch.cat((same, -same)), torch.cat((first[:, :-2], -first[:, :-2], first[:, -2:]), 1)]
            biases.insert(0, first.new_zeros(2 * channels))
        return weights, biases

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, cell_scale={self.cell_scale}" + (", eager=True" if self.eager else "")


class ImplicitPyramidDecoder(nn.Module):
    """Renders colours at any size from the encoder's smallest map: an `ImplicitUpsample` to each larger grid, the last
    to the image's, then a 3 x 3 convolution.

    That convolution is merged with the last Linear before it into one matrix with nine values per colour, so that the
    features at the image's size are never stored.

    Args:
        channels: of the input map, and of every rendered one.
        out_channels: of the image.
        eager, reference: as `ImplicitUpsample`.
        options: hidden, mode and cell_scale of `ImplicitUpsample`.

    Example:
        >>> decoder = ImplicitPyramidDecoder((8, 6, 4), hidden=(16, 16))
        >>> decoder(torch.randn(1, 8, 5, 7), [(10, 13), (20, 26)]).shape
        torch.Size([1, 3, 20, 26])
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int = 3,
        *,
        eager: bool = False,
        reference: bool | None = None,
        **options: Any,
    ):
        super().__init__()
        eager = eager_or_reference(eager, reference)
        pairs = itertools.pairwise(channels)
        self.layers = nn.ModuleList(ImplicitUpsample(*pair, **options, eager=eager) for pair in pairs)
        self.head = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(
        self,
        feat: torch.Tensor,
        sizes: Sequence[tuple[int, int]],
        *,
        workspace: int = WORKSPACE,
        progress: Progress = None,
    ) -> torch.Tensor:
        """feat [B, C, h, w] -> [B, out_channels, H, W].

        Args:
            feat: [B, C, h, w].
            sizes: (H, W) of every layer's grid, the image's last.
            workspace: bytes that the rendering in bands of rows may use.
            progress: called as progress(done, total) by all layers, see `common.progress`.

        Raises:
            TypeError, ValueError: as `ImplicitUpsample.forward`; ValueError also for another number of sizes.
        """
        require(len(sizes) == len(self.layers), "sizes", f"have one size per layer, {len(self.layers)} in all", sizes)
        parts: Sequence[Progress] = [None] * len(sizes)
        if progress is not None:
            parts = shares(progress, *self.work([len(feat) * math.prod(size) for size in sizes]))
        for layer, size, part in zip(self.layers[:-1], sizes[:-1], parts[:-1], strict=True):
            feat = layer(feat, size, workspace=workspace, progress=part)
        return self.layers[-1](feat, sizes[-1], self.head, workspace=workspace, progress=parts[-1])

    def work(self, pixels: Sequence[int]) -> list[float]:
        """The cost of each layer in an encoder's multiplications, for the number of pixels that it renders."""
        return [parameters(layer) / FUSED * n for layer, n in zip(self.layers, pixels, strict=True)]


def _centres(n: int, device: torch.device) -> torch.Tensor:
    """[n] float32: the centres of n pixels that span [-1, 1]."""
    return -1 + 1 / n + (2 / n) * torch.arange(n, dtype=torch.float32, device=device)


def _taps(weight: torch.Tensor, bias: torch.Tensor, head: nn.Conv2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges a Linear and the 3 x 3 convolution behind it into one Linear: what a pixel adds to its nine neighbours."""
    with without_autocast(weight):
        kernel = head.weight.flip(2, 3)
        taps = torch.einsum("ocij,cn->oijn", kernel, weight), torch.einsum("ocij,c->oij", kernel, bias)
    return taps[0].flatten(0, 2), taps[1].flatten()
