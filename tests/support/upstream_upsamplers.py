"""The attention of NAF and AnyUp, on the functions of upstream_natten.py, and modules that compute something else."""

import torch.nn.functional as F
import upstream_natten
from torch import nn
from upstream_natten import na2d_av, na2d_qk

RECENT = True  # whether this machine has a NATTEN that has only the fused functions


def na2d(query, key, value, kernel_size, dilation, stride, backend=None):
    scale = query.shape[-1] ** -0.5
    return upstream_natten.neighborhood_attention_generic(
        query, key, value, kernel_size, stride, dilation, False, scale
    )


def legacy_attention(q, k, v, kernel_size, dilation, scale=1):
    q, k, v = (t.permute(0, 3, 1, 2, 4) for t in (q, k, v))
    weights = (na2d_qk(q, k, kernel_size=kernel_size, dilation=dilation) * scale).softmax(-1)
    return na2d_av(weights, v, kernel_size=kernel_size, dilation=dilation).permute(0, 2, 3, 1, 4)


def enlarged(x, size):
    return F.interpolate(x, size=size, mode="nearest-exact")


class CrossAttention(nn.Module):
    """NAF's. Subclasses that compute something else override these methods."""

    def __init__(self, dim, num_heads, kernel_size=(5, 3), **kwargs):
        super().__init__()
        self.num_heads, self.kernel_size, self.scale = num_heads, kernel_size, (dim // num_heads) ** -0.5

    def _resize(self, x, size, dtype):
        return enlarged(x, size).unflatten(1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2).to(dtype)

    def prepared(self, q):
        return q

    def finished(self, out, image=None, **kwargs):
        return out

    def forward(self, q, k, v, image=None, return_weights=False, **kwargs):
        size = tuple(q.shape[-2:])
        self.dilation = dilation = (size[0] // k.shape[2], size[1] // k.shape[3])
        q = self.prepared(q).unflatten(1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2)
        k, v = (self._resize(t, size=size, dtype=q.dtype) for t in (k, v))
        if RECENT:
            out = na2d(q, k, v, kernel_size=self.kernel_size, dilation=dilation, stride=1, backend="cutlass-fna")
        else:
            out = legacy_attention(q, k, v, self.kernel_size, dilation, scale=self.scale)
        out = self.finished(out.permute(0, 3, 4, 1, 2).flatten(1, 2), image, **kwargs)
        return (out, dilation) if return_weights else out


class NATTENCrossAttention(nn.Module):
    """AnyUp's."""

    def __init__(self, qk_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj = nn.Conv2d(qk_dim, qk_dim, 1), nn.Conv2d(qk_dim, qk_dim, 1)

    @staticmethod
    def _to_natten(x, heads):
        return x.unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2).contiguous()

    @staticmethod
    def _nearest_resize(x, size):
        return enlarged(x, size)

    def joined(self, out, **kwargs):
        return out.permute(0, 3, 4, 1, 2).mean(dim=1)

    def forward(self, q, k, v, kernel_size, dilation, **kwargs):
        dtype, size = q.dtype, tuple(q.shape[2:])
        q, k = self.q_proj(q), self._nearest_resize(self.k_proj(k), size=size).to(dtype)
        v = self._nearest_resize(v, size=size).to(dtype).permute(0, 2, 3, 1).unsqueeze(-2)
        q, k = (self._to_natten(t, self.num_heads) for t in (q, k))
        v = v.expand(-1, -1, -1, self.num_heads, -1)
        return self.joined(na2d(q, k, v, kernel_size=kernel_size, dilation=dilation, stride=1), **kwargs)


class Normalized(CrossAttention):
    def prepared(self, q):
        return F.normalize(q, dim=1)


class Bilinear(CrossAttention):
    def _resize(self, x, size, dtype):
        x = F.interpolate(x, size=size, mode="bilinear")
        return x.unflatten(1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2).to(dtype)


class Summed(NATTENCrossAttention):
    def joined(self, out):
        return out.permute(0, 3, 4, 1, 2).sum(dim=1)


class Dense(CrossAttention):
    def forward(self, q, k, v, image=None, return_weights=False, **kwargs):
        q, k, v = (t.flatten(2).mT for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).mT


class Guided(CrossAttention):
    def finished(self, out, image=None):
        return out if image is None else out * image.mean(1, keepdim=True)


class Divided(CrossAttention):
    """Computes something else only where it is asked to, as the next."""

    def finished(self, out, image=None, divisor=1):
        return out / divisor


class DividedMean(NATTENCrossAttention):
    def joined(self, out, divisor=1):
        return super().joined(out) / divisor


class OtherArguments(CrossAttention):
    def forward(self, q, k, v, image=None):
        return super().forward(q, k, v, image)


def without_scale():
    model = CrossAttention(8, 2)
    model.scale = None
    return model


DIFFERS = "forward is not cross-scale neighborhood attention: its output differs on random inputs"
UNSUPPORTED = {
    "normalized": (lambda: Normalized(8, 2), DIFFERS),
    "bilinear": (lambda: Bilinear(8, 2), DIFFERS),
    "summed": (lambda: Summed(8, 2), DIFFERS),
    "dense": (lambda: Dense(8, 2), "forward calls none of NATTEN's functions"),
    "other arguments": (lambda: OtherArguments(8, 2), "its forward takes 4 arguments (q, k, v, image=None), not"),
    "guided": (lambda: Guided(8, 2), DIFFERS),
    "scale": (lambda: without_scale(), "scale must be a float; got None"),
    "heads": (lambda: CrossAttention(8, 2.0), "num_heads must be a positive integer; got 2.0"),
}
