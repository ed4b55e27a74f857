"""LocalImplicitDecoder and LocalTextureDecoder: LIIF's and LTE's decoders, with a cache of the hoisted first layer."""

import functools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core import backends
from inr_kernels._core.checks import is_positive_int, require, require_input, require_tensor, shape

from .functional import WORKSPACE, Form, decode_queries, hoist_features, interpolate, render
from .functional.checks import check_widths


class LocalImplicitDecoder(nn.Module):
    """Decodes a feature map at arbitrary coordinates, or renders an image of any size from it, as LIIF does.

    `rgb = decoder(feat, coord, cell)`, `image = decoder.render(feat, (H, W))`. Formula, shapes, dtypes and errors are
    those of `local_implicit_decode`. The state dict has LIIF's keys, `imnet.layers.{0,2,...}.{weight,bias}`, and no
    others.

    Without gradients, the hoisted first layer is cached for the next call with the same feature tensor (so that callers
    that process an image in chunks compute it once) and dropped when the features or the weights change. On a CPU both
    are compared by value; on a GPU by tensor version, which does not notice in-place edits through `.data` but does
    notice those under torch.no_grad().

    Args:
        in_channels: channels C of the features.
        out_channels: channels of the image.
        hidden: widths of the hidden layers, at least one.
        feat_unfold, local_ensemble, cell_decode: LIIF's flags.
        ensemble_after: "last" (LIIF) or "first" (the "split" INRB of IN²).

    Source: Chen, Liu and Wang, Learning Continuous Image Representation with Local Implicit Image Function, CVPR 2021,
    eq. 1-5.

    Example:
        >>> decoder = LocalImplicitDecoder(8, hidden=(32, 32))
        >>> decoder.render(torch.randn(1, 8, 6, 7), (15, 20)).shape
        torch.Size([1, 3, 15, 20])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 3,
        hidden: Sequence[int] = (256, 256, 256, 256),
        feat_unfold: bool = True,
        local_ensemble: bool = True,
        cell_decode: bool = True,
        ensemble_after: str = "last",
    ):
        super().__init__()
        check_widths(in_channels, hidden, out_channels)
        require(ensemble_after in ("last", "first"), "ensemble_after", 'be "last" or "first"', repr(ensemble_after))
        self.in_channels = in_channels
        self.form = Form(feat_unfold, local_ensemble, ensemble_after)
        self.cell_decode = cell_decode
        inputs = [in_channels * 9 if feat_unfold else in_channels, *hidden]
        inputs[0] += 2
        if cell_decode:
            inputs[1 if ensemble_after == "first" else 0] += 2
        self.imnet = _mlp(inputs, (*hidden, out_channels))
        self._hoisted = HoistCache()

    def _parameters_for(self, feat: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Weights and biases; raises unless feat fits them."""
        weights, biases = _linears(self.imnet)
        require_input(feat, "feat", self.in_channels, weights[0])
        return weights, biases

    def forward(
        self,
        feat: torch.Tensor,
        coord: torch.Tensor,
        cell: torch.Tensor | None = None,
        *,
        backend: str | None = None,
    ) -> torch.Tensor:
        """feat [B, C, h, w], coord [B, Q, 2] or [B, H, W, 2], cell [B, 2] or like coord -> [B, ..., out_channels]."""
        if self.cell_decode and cell is None:
            raise ValueError("cell must be given for a decoder with cell_decode=True; got None")
        cell = cell if self.cell_decode else None  # LIIF ignores it, too
        weights, biases = self._parameters_for(feat)
        hoist = self._hoisted.keyed(feat, weights[0], biases[0])
        return decode_queries(feat, coord, cell, weights, biases, self.form, backend=backend, hoist=hoist)

    def render(
        self,
        feat: torch.Tensor,
        size: tuple[int, int],
        cell: torch.Tensor | None = None,
        *,
        workspace: int = WORKSPACE,
        backend: str | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> torch.Tensor:
        """feat [B, C, h, w] -> [B, out_channels, H, W], in bands of rows that need at most `workspace` bytes.

        progress: called after each band as progress(finished rows, total rows).
        """
        weights, biases = self._parameters_for(feat)
        return render(
            feat,
            size,
            weights,
            biases,
            self.form,
            cell_decode=self.cell_decode,
            cell=cell,
            workspace=workspace,
            backend=backend,
            progress=progress,
        )

    def extra_repr(self) -> str:
        """The options, for print."""
        flags = ", ".join(f"{name}={value!r}" for name, value in self.form.flags().items())
        return f"{flags}, cell_decode={self.cell_decode}"


class LocalTextureDecoder(nn.Module):
    """Decodes a feature map at arbitrary coordinates, or renders an image of any size from it, as LTE does.

    `rgb = decoder(feat, coord, cell)`, `image = decoder.render(feat, (H, W))`. Two 3 x 3 convolutions map the features
    to coefficients and frequencies, once per pixel; from there on the formula, dtypes and errors are those of
    `local_texture_decode`. The state dict has LTE's keys, `coef.*`, `freq.*`, `phase.*` and `imnet.layers.*`. The maps
    are cached as the first layer of `LocalImplicitDecoder` is.

    Args:
        in_channels: channels C of the features.
        out_channels: channels of the image.
        hidden: widths of the MLP's hidden layers.
        hidden_dim: coefficients per pixel, half of them of cosines and half of sines; even.

    Source: Lee and Jin, Local Texture Estimator for Implicit Representation Function, CVPR 2022.

    Example:
        >>> decoder = LocalTextureDecoder(8, hidden=(32, 32), hidden_dim=32)
        >>> decoder.render(torch.randn(1, 8, 6, 7), (15, 20)).shape
        torch.Size([1, 3, 15, 20])
    """

    form = Form(texture=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 3,
        hidden: Sequence[int] = (256, 256, 256),
        hidden_dim: int = 256,
    ):
        super().__init__()
        check_widths(in_channels, hidden, out_channels)
        fits = is_positive_int(hidden_dim) and hidden_dim % 2 == 0
        require(fits, "hidden_dim", "be a positive even integer", repr(hidden_dim))
        self.in_channels = in_channels
        self.coef = nn.Conv2d(in_channels, hidden_dim, 3, padding=1)
        self.freq = nn.Conv2d(in_channels, hidden_dim, 3, padding=1)
        self.phase = nn.Linear(2, hidden_dim // 2, bias=False)
        self.imnet = _mlp((hidden_dim, *hidden), (*hidden, out_channels))
        self._hoisted = HoistCache()

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> "LocalTextureDecoder":
        """The decoder in a state dict of LTE (`imnet.layers.*`) or LTE+ (`layers.*`, 1 x 1 convolutions).

        Entries of other parts, such as `encoder.*`, are ignored. LTE+ orders the frequencies along y before those along
        x, LTE in pairs: the decoder has LTE's order.

        Raises:
            ValueError: an entry is missing or has another shape.
        """
        state = from_published(state)
        coef, phase = state["coef.weight"], state["phase.weight"]
        shapes = [value.shape for name, value in state.items() if re.fullmatch(r"imnet\.layers\.\d+\.weight", name)]
        hidden = [n for n, _ in shapes[:-1]]
        with torch.device(coef.device):
            decoder = cls(coef.shape[1], shapes[-1][0], hidden, 2 * len(phase)).to(coef.dtype)
        try:
            decoder.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"state must be of LTE or LTE+: {' '.join(str(error).split())}") from error
        return decoder

    def _parameters_for(self, feat: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Weights and biases in the form that `Form.texture` describes; raises unless feat fits them."""
        require_input(feat, "feat", self.in_channels, self.coef.weight)
        weights, biases = _linears(self.imnet)
        kernel = in_halves(self.coef.weight, self.freq.weight).flatten(1)
        phase = F.pad(self.phase.weight, (0, 0, 0, len(kernel) - len(self.phase.weight)))
        assert self.coef.bias is not None and self.freq.bias is not None
        return [torch.cat((kernel, phase), 1), *weights], [in_halves(self.coef.bias, self.freq.bias), *biases]

    def forward(
        self,
        feat: torch.Tensor,
        coord: torch.Tensor,
        cell: torch.Tensor,
        image: torch.Tensor | None = None,
        *,
        backend: str | None = None,
    ) -> torch.Tensor:
        """Decodes feat [B, C, h, w] at coord [B, Q, 2] or [B, H, W, 2] -> [B, ..., out_channels].

        cell: [B, 2] or like coord. image: [B, out_channels, H', W'], which is added, interpolated bilinearly, with the
        border's values outside (LTE's skip connection).
        """
        require_tensor(cell, "cell")
        weights, biases = self._parameters_for(feat)
        self._check_image(image, feat)
        key = self.coef.weight, self.freq.weight, self.coef.bias, self.freq.bias
        hoist = self._hoisted.keyed(feat, *key)  # type: ignore[arg-type]
        out = decode_queries(feat, coord, cell, weights, biases, self.form, backend=backend, hoist=hoist)
        if image is None:
            return out
        planes = coord.unsqueeze(1) if coord.dim() == 3 else coord
        return out + interpolate(image, planes).view(out.shape).to(out.dtype)

    def _check_image(self, image, feat):
        if image is not None:
            require_tensor(image, "image", dims=(4,), like=feat)
            batch, channels = len(feat), len(_linears(self.imnet)[1][-1])
            fits = tuple(image.shape[:2]) == (batch, channels) and min(image.shape[2:]) > 0
            require(fits, "image", f"have shape [B, C, H, W] with B = {batch} and C = {channels}", shape(image))

    def render(
        self,
        feat: torch.Tensor,
        size: tuple[int, int],
        cell: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        *,
        workspace: int = WORKSPACE,
        backend: str | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> torch.Tensor:
        """feat [B, C, h, w] -> [B, out_channels, H, W], in bands of rows that need at most `workspace` bytes.

        image: as in `forward`. progress: called after each band as progress(finished rows, total rows).
        """
        weights, biases = self._parameters_for(feat)
        self._check_image(image, feat)
        options = {"workspace": workspace, "backend": backend, "progress": progress}
        return render(feat, size, weights, biases, self.form, cell=cell, image=image, **options)  # type: ignore[arg-type]


def in_halves(coef: torch.Tensor, freq: torch.Tensor) -> torch.Tensor:
    """[2 N, ...]: coef [N, ...], then LTE's pairs of frequencies [N, ...], those along y first."""
    return torch.cat((coef, freq[::2], freq[1::2]))


def from_published(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The decoder's entries of a state dict of LTE or LTE+, with LTE's names, shapes and order of frequencies.

    Raises:
        ValueError: an entry is missing.
    """
    names = r"(coef|freq)\.(weight|bias)|phase\.weight|(imnet\.)?layers\.\d+\.(weight|bias)"
    ours = {name: value for name, value in state.items() if re.fullmatch(names, name)}
    plus = any(name.startswith("layers.") for name in ours)
    needed = ["coef.weight", "coef.bias", "freq.weight", "freq.bias", "phase.weight"]
    needed.append(("" if plus else "imnet.") + "layers.0.weight")
    if missing := [name for name in needed if name not in ours]:
        raise ValueError(f"state must have the entries of LTE or LTE+; it has no {', '.join(missing)}")
    if plus:
        for name in ("freq.weight", "freq.bias"):
            ours[name] = torch.stack(ours[name].chunk(2), 1).flatten(0, 1)
        ours = {f"imnet.{k}" if k.startswith("layers.") else k: v for k, v in ours.items()}
        ours = {k: v.flatten(1) if k.startswith("imnet.") and v.dim() == 4 else v for k, v in ours.items()}
    return ours


def _mlp(inputs: Sequence[int], outputs: Sequence[int]) -> nn.Module:
    """LIIF's imnet: `layers`, Linear, ReLU, ..., Linear."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip(inputs, outputs, strict=True):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    imnet = nn.Module()
    imnet.layers = nn.Sequential(*layers[:-1])
    return imnet


def _linears(imnet: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weights and the biases of `imnet.layers`."""
    linears = list(imnet.layers)[::2]
    return [layer.weight for layer in linears], [layer.bias for layer in linears]


class HoistCache:
    """A cache of the last result of `hoist_features`, valid while the feature tensor and the weights are unchanged.

    It is bypassed where a result must not be reused: with gradients, under torch.compile and export, and during CUDA
    graph capture, as a replay reads other features from the same memory.
    """

    def __init__(self):
        self._entry = None

    def keyed(self, *tensors: torch.Tensor) -> Callable[..., torch.Tensor]:
        """The hoisting function for a call with these features, weight and bias (before autocast)."""
        return functools.partial(self._hoist, tensors)

    def _hoist(self, key, feat, weight, bias, form):
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in key)
        if torch.compiler.is_compiling() or tracked or backends.is_capturing(feat.device):
            return hoist_features(feat, weight, bias, form)
        entry = self._entry
        if entry is None or not entry.fits(key, weight.dtype, form):
            hoisted = hoist_features(feat, weight, bias, form)
            drop = functools.partial(_drop, weakref.ref(self))
            entry = self._entry = _Entry(tuple(map(_memory, key)), form, hoisted, weakref.ref(key[0], drop))
        return entry.hoisted

    def __reduce__(self):  # copies and pickles are empty
        return HoistCache, ()


class _Entry(NamedTuple):
    memories: tuple
    form: Form
    hoisted: torch.Tensor
    feat: weakref.ref

    def fits(self, key, dtype, form):
        same = self.form == form and self.hoisted.dtype == dtype and self.feat() is key[0]
        if self.hoisted.is_inference() and not torch.is_inference_mode_enabled():
            return False  # autograd could not save it
        return same and all(map(_unchanged, self.memories, key))


def _memory(tensor):
    """The state by which a change of the tensor is noticed: its values, or on a GPU, where a comparison would
    synchronize, its version. Inference tensors have no version; edits through `.data` or numpy do not change it.
    """
    if tensor.is_inference() or tensor.device.type == "cpu":
        return tensor.detach().clone()
    return weakref.ref(tensor), tensor._version, tensor.data_ptr()


def _unchanged(memory, tensor):
    if isinstance(memory, torch.Tensor):
        return memory.dtype == tensor.dtype and memory.device == tensor.device and torch.equal(memory, tensor)
    reference, version, address = memory
    same = not tensor.is_inference() and reference() is tensor
    return same and version == tensor._version and address == tensor.data_ptr()


def _drop(cache, feat):
    cache = cache()
    if cache is not None and cache._entry is not None and cache._entry.feat is feat:
        cache._entry = None
