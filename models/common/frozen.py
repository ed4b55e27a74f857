"""Copies of networks for gradients of their features: constant weights, and activations within a bound of memory."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

M = TypeVar("M", bound=nn.Module)


def frozen_copy(network: M) -> M:
    """Copies a network in eval mode, whose parameters share the memory of the network's and require no gradients.

    The network itself does not change, not even for the time of a call, so an error or an interrupt leaves nothing to
    restore. Parameters that were made in inference mode, which autograd refuses, are copied.
    """
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(_usable(parameter), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = _usable(buffer)
    return copy.deepcopy(network, memo).eval()


def _usable(tensor):
    return tensor.clone() if tensor.is_inference() else tensor.detach()


class Recomputed(nn.Module):
    """Calls a stage of a network; if active, recomputes its activations in the backward instead of keeping them.

    Attributes:
        active: whether it is recomputed. Only its input is kept then.
        measures: whether calls measure `kept` and `kept_if_active`.
        kept: bytes that the last call kept for the backward.
        kept_if_active: bytes of its input.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.active = self.measures = False
        self.kept = self.kept_if_active = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        if self.active and torch.is_grad_enabled():
            return checkpoint(self.module, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        if not self.measures:
            return self.module(*args, **kwargs)
        with measured(self.module) as storages:
            out = self.module(*args, **kwargs)
        inputs = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        self.kept, self.kept_if_active = sum(storages.values()), sum(t.untyped_storage().nbytes() for t in inputs)
        return out


@contextlib.contextmanager
def measured(module: nn.Module) -> Iterator[dict[int, int]]:
    """Collects the memory that autograd keeps for the block, {address: bytes}, without the module's own tensors.

    What a measuring `Recomputed` inside keeps is counted there, not here.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


class InBands(nn.Module):
    """Applies a chain of convolutions to bands of rows, so that its working memory is that of one band.

    The backward goes through the bands, too. The result is the chain's, up to the rounding of convolutions of another
    size.

    Args:
        chain: takes a map [B, C, H, W], returns a map or a tuple of maps of ceil(scale H) rows.
        scale: rows of the output for one of the input: n or 1 / n.
        halo: rows around a band that the chain sees, too. What it computes for them is discarded. A multiple of n if
            scale is 1 / n.
        bytes_per_pixel: memory that the chain needs for a pixel of its input, with gradients.
        workspace: bytes for a band without its halo; a band has at least `min_rows` rows.
        min_rows: see workspace; the rows of a band are a multiple of it. A multiple of n if scale is 1 / n.
    """

    def __init__(self, chain: nn.Module, scale: float, halo: int, bytes_per_pixel: int, workspace: int, min_rows: int):
        super().__init__()
        self.chain, self.scale, self.halo, self.min_rows = chain, scale, halo, min_rows
        self.bytes_per_pixel, self.workspace = bytes_per_pixel, workspace

    def forward(self, x: torch.Tensor) -> Any:
        """[B, C, H, W] -> the chain's output."""
        out = _Bands.apply(self, x)
        return out if len(out) > 1 else out[0]

    def bands(self, height: int, width: int) -> Iterator[tuple[slice, slice]]:
        """Yields the rows of a map of that size that each band sees, and which rows of its output are the result."""
        rows = self.workspace // (self.bytes_per_pixel * width) // self.min_rows * self.min_rows or self.min_rows
        for top in range(0, height, rows):
            bottom, first = top + rows, max(top - self.halo, 0)
            last = None if bottom >= height else round((bottom - first) * self.scale)
            yield slice(first, bottom + self.halo), slice(round((top - first) * self.scale), last)

    def run(self, x: torch.Tensor, result: slice) -> tuple[torch.Tensor, ...]:
        """The chain's outputs for the rows of a band with its halo, without the halo's."""
        out = self.chain(x)
        return tuple(part[:, :, result] for part in (out if isinstance(out, tuple) else (out,)))


class _Bands(torch.autograd.Function):
    """`InBands.forward`, differentiable once."""

    @staticmethod
    def forward(ctx: Any, module: InBands, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.bands, parts, differentiable = [], [], ctx.needs_input_grad[1]
        for seen, result in module.bands(*x.shape[2:]):
            band = x[:, :, seen].detach().requires_grad_(differentiable)
            with torch.set_grad_enabled(differentiable):
                out = module.run(band, result)
            parts.append([part.detach() for part in out])
            if differentiable:
                ctx.bands.append((seen, band, out))
        ctx.save_for_backward(x)  # the bands are views of it
        return tuple(torch.cat(rows, 2) for rows in zip(*parts, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        (x,), done = ctx.saved_tensors, 0
        d_x = torch.zeros_like(x)
        for seen, band, out in ctx.bands:
            rows = slice(done, done + out[0].shape[2])
            done = rows.stop
            d_x[:, :, seen] += torch.autograd.grad(out, band, [grad[:, :, rows] for grad in grads])[0]
        return None, d_x
