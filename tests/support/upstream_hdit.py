"""HDiT's block around NATTEN's functions, as in k-diffusion, and similar modules that compute something else."""

import torch
import torch.nn.functional as F
from torch import nn

natten = None  # not installed here


class Norm(nn.Module):
    def __init__(self, features, conditions):
        super().__init__()
        self.linear = nn.Linear(conditions, features, bias=False)

    def forward(self, x, cond):
        return F.rms_norm(x, x.shape[-1:]) * (self.linear(cond)[:, None, None, :] + 1)


class Positions(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.register_buffer("freqs", torch.linspace(1, 3, heads * dim // 2).view(heads, dim // 2))

    def forward(self, pos):
        return torch.cat([pos[..., None, i : i + 1] * self.freqs for i in (0, 1)], -1)


def rotated(x, theta):
    a, b = x.chunk(2, -1)
    return torch.cat([a * theta.cos() - b * theta.sin(), b * theta.cos() + a * theta.sin()], -1)


class NeighborhoodSelfAttentionBlock(nn.Module):
    """Subclasses that compute something else override these methods."""

    def __init__(self, d_model=16, d_head=8, cond_features=6, kernel_size=5, dropout=0.0):
        super().__init__()
        self.d_head, self.n_heads, self.kernel_size = d_head, d_model // d_head, kernel_size
        self.norm, self.qkv_proj = Norm(d_model, cond_features), nn.Linear(d_model, 3 * d_model, bias=False)
        self.scale = nn.Parameter(torch.full([self.n_heads], 10.0))
        self.pos_emb, self.dropout = Positions(d_head // 2, self.n_heads), nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def weights(self, attn):
        return attn.softmax(-1)

    def forward(self, x, pos, cond):
        qkv = self.qkv_proj(self.norm(x, cond)).unflatten(-1, (3, self.n_heads, self.d_head))
        q, k, v = qkv.movedim(-3, 0)
        q, k = (F.normalize(t, dim=-1) * self.scale.sqrt()[:, None] for t in (q, k))
        theta = self.pos_emb(pos)
        q, k = rotated(q, theta), rotated(k, theta)
        if natten is None:
            raise ModuleNotFoundError("natten is required for neighborhood attention")
        if natten.has_fused_na():
            out = natten.functional.na2d(q, k, v, self.kernel_size, scale=1.0)
        else:
            q, k, v = (t.movedim(-2, 1) for t in (q, k, v))
            attn = natten.functional.na2d_qk(q, k, self.kernel_size)
            out = natten.functional.na2d_av(self.weights(attn).to(v.dtype), v, self.kernel_size).movedim(1, -2)
        return x + self.out_proj(self.dropout(out.flatten(-2)))


class Sharper(NeighborhoodSelfAttentionBlock):
    def weights(self, attn):
        return (2 * attn).softmax(-1)


def changed(**attributes):
    model = NeighborhoodSelfAttentionBlock()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


class OtherArguments(NeighborhoodSelfAttentionBlock):
    def forward(self, x, pos, cond, mask=None):
        return NeighborhoodSelfAttentionBlock.forward(self, x, pos, cond) if natten is None else x


UNSUPPORTED = {
    "sharper": (Sharper, "forward is not neighborhood attention: its output differs on random inputs"),
    "norm": (lambda: changed(norm=nn.LayerNorm(16)), "its norm has no Linear of the condition"),
    "kernel": (lambda: changed(kernel_size=(3, 3)), "kernel_size must be an integer; got (3, 3)"),
    "other arguments": (OtherArguments, "its forward takes 4 arguments (x, pos, cond, mask=None), not (x, pos, cond)"),
}
