"""LocalImplicitDecoder: LIIF's decoder as a layer, with a cache of the hoisted first layer."""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from inr_kernels._core import backends
from inr_kernels._core.checks import require, require_input

from .functional import WORKSPACE, Form, decode_queries, hoist_features, render
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
        layers = []
        for n_in, n_out in zip(inputs, (*hidden, out_channels), strict=True):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.imnet = nn.Module()
        self.imnet.layers = nn.Sequential(*layers[:-1])
        self._hoisted = HoistCache()

    def _parameters_for(self, feat: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Weights and biases; raises unless feat fits them."""
        layers: Any = self.imnet.layers
        linears = list(layers)[::2]
        require_input(feat, "feat", self.in_channels, linears[0].weight)
        return [layer.weight for layer in linears], [layer.bias for layer in linears]

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
        flags = ", ".join(f"{name}={value!r}" for name, value in self.form._asdict().items())
        return f"{flags}, cell_decode={self.cell_decode}"


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
