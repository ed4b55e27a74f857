"""LocalImplicitDecoder: what holds the weights, and the hoisted map of the last feature tensor."""

import functools
import weakref
from typing import NamedTuple

import torch
from torch import nn

from inr_kernels._core import backends

from .functional import WORKSPACE, Form, decode_queries, hoist_features, render


class LocalImplicitDecoder(nn.Module):
    """LIIF's decoder as a layer: `rgb = decoder(feat, coord, cell)`, `image = decoder.render(feat, (H, W))`.

    Formula, shapes, dtypes and errors: `local_implicit_decode`. The state dict has LIIF's keys,
    `imnet.layers.{0,2,...}.{weight,bias}`, and nothing else. Without gradients, the hoisted first layer is kept
    for the next call on the same feature tensor (callers that go through a picture in chunks pay for it once)
    and dropped when the features or the weights change. (On a CPU they are compared by value. On a GPU by version:
    an edit in place through `.data` goes unseen there, one under torch.no_grad() does not.)

    Args:
        in_channels: C of the features.
        out_channels: of the picture.
        hidden: widths of the hidden layers, at least one.
        feat_unfold, local_ensemble, cell_decode: LIIF's flags.
        ensemble_after: "last" (LIIF) or "first" (the "split" INRB of IN2).

    Example:
        >>> decoder = LocalImplicitDecoder(8, hidden=(32, 32))
        >>> decoder.render(torch.randn(1, 8, 6, 7), (15, 20)).shape
        torch.Size([1, 3, 15, 20])
    """

    def __init__(
        self,
        in_channels,
        out_channels=3,
        hidden=(256, 256, 256, 256),
        feat_unfold=True,
        local_ensemble=True,
        cell_decode=True,
        ensemble_after="last",
    ):
        super().__init__()
        widths = [*hidden, out_channels]
        if not hidden or min(in_channels, *widths) < 1:
            raise ValueError(
                f"in_channels, hidden and out_channels must be positive, hidden not empty; "
                f"got {in_channels}, {tuple(hidden)}, {out_channels}"
            )
        if ensemble_after not in ("last", "first"):
            raise ValueError(f'ensemble_after must be "last" or "first"; got {ensemble_after!r}')
        self.form = Form(feat_unfold, local_ensemble, ensemble_after)
        self.cell_decode = cell_decode
        inputs = [in_channels * 9 if feat_unfold else in_channels, *hidden]
        inputs[0] += 2
        if cell_decode:
            inputs[1 if ensemble_after == "first" else 0] += 2
        layers = []
        for n_in, n_out in zip(inputs, widths, strict=True):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.imnet = nn.Module()
        self.imnet.layers = nn.Sequential(*layers[:-1])
        self._hoisted = HoistCache()

    def _linears(self):
        linears = list(self.imnet.layers)[::2]
        return [layer.weight for layer in linears], [layer.bias for layer in linears]

    def forward(self, feat, coord, cell=None, *, backend=None):
        """feat [B, C, h, w], coord [B, Q, 2] or [B, H, W, 2], cell [B, 2] or like coord -> [B, ..., out_channels]."""
        if self.cell_decode and cell is None:
            raise ValueError("cell must be given for a decoder with cell_decode=True; got None")
        cell = cell if self.cell_decode else None  # as LIIF, which ignores it then
        weights, biases = self._linears()
        hoist = self._hoisted.keyed(feat, weights[0], biases[0])
        return decode_queries(feat, coord, cell, weights, biases, self.form, backend=backend, hoist=hoist)

    def render(self, feat, size, cell=None, *, workspace=WORKSPACE, backend=None, progress=None):
        """feat [B, C, h, w] -> [B, out_channels, H, W], in bands that need at most `workspace` bytes.

        progress: called after each band as progress(rows done, rows in all).
        """
        return render(
            feat,
            size,
            *self._linears(),
            self.form,
            cell_decode=self.cell_decode,
            cell=cell,
            workspace=workspace,
            backend=backend,
            progress=progress,
        )

    def extra_repr(self):
        flags = ", ".join(f"{name}={value!r}" for name, value in self.form._asdict().items())
        return f"{flags}, cell_decode={self.cell_decode}"


class HoistCache:
    """`hoist_features` that remembers its last result, for as long as feature tensor and weights stay unchanged.

    It steps aside where a result may not be reused: with gradients, under torch.compile and export, and while a CUDA
    graph is captured, whose replays are to see other features in the same memory.
    """

    def __init__(self):
        self._entry = None

    def keyed(self, *tensors):
        """The hoisting function for a call on these features, weight and bias (as they are before autocast)."""
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

    def __reduce__(self):  # neither pickled nor copied
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
    """What tells whether a tensor has changed: its values, or on a GPU, where to compare them would wait for it,
    its version. Inference tensors have none; edits through `.data` or numpy leave no trace in it.
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
