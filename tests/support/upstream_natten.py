"""Neighborhood attention as in NATTEN's versions and transformers, and similar modules that compute something else."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels.integrations.class_swap import CANNOT_RUN
from inr_kernels.neighborhood_attention.reference import window

RUNS = True  # whether this machine has the kernels


class NotInstalled(BaseException):
    """Not an Exception, as in transformers."""


def pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def windows(size, kernel_size, dilation, is_causal=False, stride=1):
    """Rows and columns [H, W, Kh, Kw] of the keys in each window, and which of them are not masked."""
    if not RUNS:
        raise NotInstalled("NATTEN has no kernel here")
    axes = list(zip(size, *map(pair, (kernel_size, dilation, stride, is_causal)), strict=True))
    if any(k * d > length for length, k, d, *_ in axes):
        raise ValueError(f"a window of {kernel_size} with dilation {dilation} does not fit into {tuple(size)}")
    (rows, rows_seen), (cols, cols_seen) = (window(*axis) for axis in axes)
    return rows[:, None, :, None], cols[None, :, None, :], rows_seen[:, None, :, None] & cols_seen[None, :, None, :]


def scores(query, key, kernel_size, dilation, is_causal=False, rpb=None, stride=1):
    """[B, heads, H, W, dim] -> [B, heads, H, W, Kh Kw]."""
    size = query.shape[2:4]
    rows, cols, seen = windows(size, kernel_size, dilation, is_causal, stride)
    out = torch.einsum("bhyxd,bhyxijd->bhyxij", query, key[:, :, rows, cols])
    if rpb is not None:
        (d_y, d_x), (k_y, k_x) = pair(dilation), pair(kernel_size)
        y, x = torch.arange(size[0])[:, None, None, None], torch.arange(size[1])[None, :, None, None]
        out = out + rpb[:, (rows - y) // d_y + k_y - 1, (cols - x) // d_x + k_x - 1]
    return out.masked_fill(~seen, -math.inf).flatten(4)


def natten2dqkrpb(query, key, rpb, *form):
    form = form if len(form) == 2 else ((rpb.shape[1] + 1) // 2, *form)
    return scores(query, key, *form, rpb=rpb)


def na2d_qk_with_bias(query, key, bias, kernel_size, dilation):
    return scores(query, key, kernel_size, dilation, rpb=bias)


def na2d_qk(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None):
    return scores(query, key, kernel_size, dilation, is_causal, rpb)


def na2d_av(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False, stride=1):
    rows, cols, _ = windows(value.shape[2:4], kernel_size, dilation, is_causal, stride)
    return torch.einsum("bhyxt,bhyxtd->bhyxd", attn, value[:, :, rows, cols].flatten(4, 5))


def natten2dav(attn, value, *form):
    return na2d_av(attn, value, *(form if len(form) == 2 else (math.isqrt(attn.shape[-1]), *form)))


def neighborhood_attention_generic(query, key, value, kernel_size, stride, dilation, is_causal, scale, rpb=None):
    query, key, value = (t.permute(0, 3, 1, 2, 4) for t in (query, key, value))
    attn = scores(query * scale, key, kernel_size, dilation, is_causal, rpb, stride).softmax(-1)
    return na2d_av(attn, value, kernel_size, dilation, None, is_causal, stride).permute(0, 2, 3, 1, 4)


def na2d(query, key, value, kernel_size, dilation, is_causal, rpb, scale):
    return neighborhood_attention_generic(query, key, value, kernel_size, 1, dilation, is_causal, scale, rpb)


def is_fna_enabled():
    return False


class Packed(nn.Module):
    """Shared by all of NATTEN's versions."""

    def __init__(self, dim, num_heads, qkv_bias=True, qk_scale=None, proj_drop=0.0):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)

    def heads_first(self, x):
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(3, 0, 4, 1, 2, 5)

    def add_bias(self, enabled):
        shape = self.num_heads, *(2 * k - 1 for k in pair(self.kernel_size))
        self.register_parameter("rpb", nn.Parameter(0.5 * torch.randn(shape)) if enabled else None)

    def finish(self, out):
        return self.proj_drop(self.proj(out.permute(0, 2, 3, 1, 4).flatten(3)))


class Version21(Packed):
    """Windows of 1, 2 or 3 dimensions; only fused functions."""

    def __init__(self, embed_dim, num_heads, kernel_size, stride=1, dilation=1, is_causal=False, **options):
        super().__init__(embed_dim, num_heads, **options)
        self.embed_dim, self.kernel_size, self.stride = embed_dim, pair(kernel_size), pair(stride)
        self.dilation, self.is_causal = pair(dilation), pair(is_causal)

    def forward(self, x):
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"expected {self.embed_dim} channels")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).movedim(-3, 0)
        form = {name: getattr(self, name) for name in ("kernel_size", "stride", "dilation", "is_causal", "scale")}
        return self.proj_drop(self.proj(neighborhood_attention_generic(*qkv, **form).flatten(-2)))


class Version17(Packed):
    """Fused or in two halves, chosen by a global switch."""

    def __init__(
        self, dim, num_heads, kernel_size, dilation=1, is_causal=False, rel_pos_bias=False, attn_drop=0.0, **options
    ):
        super().__init__(dim, num_heads, **options)
        self.kernel_size, self.dilation, self.is_causal = pair(kernel_size), pair(dilation), pair(is_causal)
        self.add_bias(rel_pos_bias)
        self.attn_drop_rate, self.attn_drop = attn_drop, nn.Dropout(attn_drop)

    def forward(self, x):
        form = {"kernel_size": self.kernel_size, "dilation": self.dilation, "is_causal": self.is_causal}
        if is_fna_enabled():
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
            return self.proj_drop(self.proj(na2d(q, k, v, **form, rpb=self.rpb, scale=self.scale).flatten(3)))
        q, k, v = self.heads_first(x)
        attn = self.attn_drop(na2d_qk(q * self.scale, k, **form, rpb=self.rpb).softmax(-1))
        return self.finish(na2d_av(attn, v, **form))


class Version15(Packed):
    """Pads small maps."""

    def __init__(self, dim, num_heads, kernel_size, dilation=1, bias=True, attn_drop=0.0, **options):
        super().__init__(dim, num_heads, **options)
        self.kernel_size, self.dilation, self.window_size = kernel_size, dilation, kernel_size * dilation
        self.add_bias(bias)
        self.attn_drop = nn.Dropout(attn_drop)

    def padded(self, x):
        below, right = (max(0, self.window_size - n) for n in x.shape[1:3])
        return F.pad(x, (0, 0, 0, right, 0, below))

    def forward(self, x):
        q, k, v = self.heads_first(self.padded(x))
        attn = na2d_qk_with_bias(q * self.scale, k, self.rpb, self.kernel_size, self.dilation)
        out = na2d_av(self.attn_drop(attn.softmax(-1)), v, self.kernel_size, self.dilation)
        return self.finish(out[:, :, : x.shape[1], : x.shape[2]])


class Version146(Version15):
    def forward(self, x):
        q, k, v = self.heads_first(self.padded(x))
        attn = natten2dqkrpb(q * self.scale, k, self.rpb, self.kernel_size, self.dilation)
        out = natten2dav(self.attn_drop(attn.softmax(-1)), v, self.kernel_size, self.dilation)
        return self.finish(out[:, :, : x.shape[1], : x.shape[2]])


class Version142(Version15):
    """The functions derive the window size from their arguments."""

    def forward(self, x):
        q, k, v = self.heads_first(self.padded(x))
        attn = natten2dqkrpb(q * self.scale, k, self.rpb, self.dilation)
        out = natten2dav(self.attn_drop(attn.softmax(-1)), v, self.dilation)
        return self.finish(out[:, :, : x.shape[1], : x.shape[2]])


class Dinat(nn.Module):
    """The attention of transformers."""

    def __init__(self, dim, num_heads, kernel_size, dilation=1, qkv_bias=True, drop=0.0):
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = num_heads, dim // num_heads, dim
        self.kernel_size, self.dilation = kernel_size, dilation
        self.rpb = nn.Parameter(0.5 * torch.randn(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.dropout = nn.Dropout(drop)

    def heads(self, x):
        return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).permute(0, 3, 1, 2, 4)

    def forward(self, hidden_states, output_attentions=False):
        q, k, v = (self.heads(layer(hidden_states)) for layer in (self.query, self.key, self.value))
        q = q / math.sqrt(self.attention_head_size)
        attn = natten2dqkrpb(q, k, self.rpb, self.kernel_size, self.dilation)
        attn = self.dropout(attn.softmax(-1))
        out = natten2dav(attn, v, self.kernel_size, self.dilation).permute(0, 2, 3, 1, 4)
        out = out.reshape(*out.shape[:3], self.all_head_size)
        return (out, attn) if output_attentions else (out,)


class Nat(Dinat):
    """Without dilation."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        del self.dilation

    def forward(self, hidden_states, output_attentions=False):
        q, k, v = (self.heads(layer(hidden_states)) for layer in (self.query, self.key, self.value))
        attn = natten2dqkrpb(q / math.sqrt(self.attention_head_size), k, self.rpb, self.kernel_size, 1)
        attn = self.dropout(attn.softmax(-1))
        out = natten2dav(attn, v, self.kernel_size, 1).permute(0, 2, 3, 1, 4).flatten(3)
        return (out, attn) if output_attentions else (out,)


class Network(nn.Module):
    """A small DiNAT: pairs of a dense and a dilated layer."""

    def __init__(self, attention, channels=8, depth=4, **options):
        super().__init__()
        self.embed = nn.Conv2d(3, channels, 3, 2, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(depth))
        self.layers = nn.ModuleList(attention(channels, 2, 3, dilation=1 + i % 2, **options) for i in range(depth))
        self.head = nn.Linear(channels, 5)

    def forward(self, image):
        x = self.embed(image).permute(0, 2, 3, 1)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            out = layer(norm(x))
            x = x + (out[0] if isinstance(out, tuple) else out)
        return self.head(x.mean((1, 2)))


# ---- modules that must not be accelerated ----


class Grouped(Version21):
    """Fewer keys than queries."""

    def __init__(self):
        super().__init__(8, 4, 3)
        self.qkv = nn.Linear(8, 16)


class LearnedScale(Version21):
    def __init__(self):
        super().__init__(8, 2, 3)
        del self.scale
        self.scale = nn.Parameter(torch.ones(1))


class PlusInput(Version15):
    def forward(self, x):
        return super().forward(x) + x


class WithGate(Version15):
    def __init__(self):
        super().__init__(8, 2, 3)
        self.gate = nn.Parameter(torch.ones(8))

    def padded(self, x):
        return super().padded(x) * self.gate


class Replicated(Version15):
    """Pads a small map by replication, not by zeros."""

    def padded(self, x):
        below, right = (max(0, self.window_size - n) for n in x.shape[1:3])
        return F.pad(x.movedim(3, 1), (0, right, 0, below), mode="replicate").movedim(1, 3)


class Sharper(Version17):
    def forward(self, x):
        form = {"kernel_size": self.kernel_size, "dilation": self.dilation}
        q, k, v = self.heads_first(x)
        attn = (2 * na2d_qk(q * self.scale, k, **form, rpb=self.rpb)).softmax(-1)
        return self.finish(na2d_av(attn, v, **form))


class Undilated(Version17):
    def forward(self, x):
        q, k, v = self.heads_first(x)
        attn = na2d_qk(q * self.scale, k, kernel_size=self.kernel_size, rpb=self.rpb).softmax(-1)
        return self.finish(na2d_av(attn, v, kernel_size=self.kernel_size))


class SmallerSum(Version17):
    """Uses a smaller window for the values than for the keys."""

    def forward(self, x):
        q, k, v = self.heads_first(x)
        attn = na2d_qk(q * self.scale, k, kernel_size=self.kernel_size, rpb=self.rpb).softmax(-1)
        return self.finish(na2d_av(attn, v, kernel_size=self.kernel_size[0] - 2))


class OtherWhenFused(Version17):
    def forward(self, x):
        return self.proj(x) if is_fna_enabled() else Version17.forward(self, x)


class Detached(Version21):
    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).movedim(-3, 0)
        qkv = qkv[0], qkv[1].detach(), qkv[2]
        form = {name: getattr(self, name) for name in ("kernel_size", "stride", "dilation", "is_causal", "scale")}
        return self.proj_drop(self.proj(neighborhood_attention_generic(*qkv, **form).flatten(-2)))


class StoresInput(Version15):
    """Stores its padded input."""

    def padded(self, x):
        self.last = super().padded(x)
        return self.last


class NoOutputDropout(Version15):
    def finish(self, out):
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(3))


class ReturnsPair(Version15):
    def finish(self, out):
        return super().finish(out), None


class WithMask(Version15):
    def forward(self, x, mask=None):
        return super().forward(x)


class CallsInHelper(Version15):
    """Calls NATTEN's functions outside of forward, where the shims do not replace them."""

    def forward(self, x):
        return self.attend(x)

    def attend(self, x):
        return Version15.forward(self, x)


class Transposed(Dinat):
    """As in transformers since 4.54: rows and heads are in another order than the functions expect."""

    def heads(self, x):
        return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)


class ReturnsTensor(Dinat):
    def forward(self, hidden_states, output_attentions=False):
        q, k, v = (self.heads(layer(hidden_states)) for layer in (self.query, self.key, self.value))
        attn = natten2dqkrpb(q / math.sqrt(self.attention_head_size), k, self.rpb, self.kernel_size, self.dilation)
        out = natten2dav(attn.softmax(-1), v, self.kernel_size, self.dilation)
        return out.permute(0, 2, 3, 1, 4).flatten(3)


class OtherDropout(nn.Dropout):
    """For example dropout of whole tokens."""


def changed(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


DIFFERENT = "forward is not neighborhood attention: "
# Name: (how to build a module that must not be accelerated, part of the logged reason).
UNSUPPORTED = {
    "one dimension": (lambda: changed(Version21(8, 2, 3), kernel_size=(3,)), "kernel_size must be a positive integer"),
    "three dimensions": (lambda: changed(Version21(8, 2, 3), kernel_size=(3, 3, 3)), "kernel_size must be a positive"),
    "dilation of the map": (lambda: changed(Version142(8, 2, 3), dilation=None), "dilation must be a positive integer"),
    "grouped heads": (Grouped, "qkv is not a Linear from 8 (heads x width) to 24"),
    "scale learned": (LearnedScale, "scale is not a number"),
    "another bias": (lambda: changed(Version15(8, 2, 3), rpb=nn.Parameter(torch.zeros(2, 3, 3))), "rpb does not have"),
    "dropout of its own": (lambda: changed(Version15(8, 2, 3), attn_drop=OtherDropout()), "attn_drop is not a Dropout"),
    "plus input": (lambda: PlusInput(8, 2, 3), DIFFERENT + "its output differs"),
    "gate": (WithGate, CANNOT_RUN),
    "padding": (lambda: Replicated(8, 2, 3), DIFFERENT + "its output differs"),
    "sharper": (lambda: Sharper(8, 2, 3), DIFFERENT + "its output differs"),
    "undilated": (lambda: Undilated(8, 2, 3, dilation=3), DIFFERENT + "its output differs"),
    "smaller sum": (lambda: SmallerSum(8, 2, 5), DIFFERENT + "its output differs"),
    "another when fused": (lambda: OtherWhenFused(8, 2, 3), DIFFERENT + "its output differs"),
    "detached": (lambda: Detached(8, 2, 3), DIFFERENT + "its gradients differ"),
    "stores input": (lambda: StoresInput(8, 2, 3), DIFFERENT + "it sets attributes"),
    "no output dropout": (lambda: NoOutputDropout(8, 2, 3), DIFFERENT + "its output differs"),
    "returns a pair": (lambda: ReturnsPair(8, 2, 3), "forward must return a Tensor; got tuple"),
    "returns a tensor": (lambda: ReturnsTensor(8, 2, 3), "forward must return a tuple; got Tensor"),
    "mask": (lambda: WithMask(8, 2, 3), "its forward takes 2 arguments (x, mask=None), not (x)"),
    "patched": (lambda: changed(Version21(8, 2, 3), forward=lambda x: x), "forward is patched on the object"),
    "transposed": (lambda: Transposed(8, 2, 3), CANNOT_RUN),
}
