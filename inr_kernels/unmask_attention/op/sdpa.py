"""The backend "sdpa" of unmask_attention: torch's own fused attention, for GPUs on which no kernel of ours is proven.

Every row is computed, and those of holes are then replaced by the mean. Without `mask_keys` torch runs its flash
attention; with it the keys' weights are a bias, log w, which its memory-efficient kernel takes. Neither stores N x N
scores. The backward computes the attention again: torch's public function does not return the rows' sums.
"""

import contextlib
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from inr_kernels._core import backends

from ..arguments import Facts

_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]  # never the one that stores the scores
_CHANNELS = 256  # the most that flash attention takes
_ALIGN = 8  # channels of 16 bytes
_LOCK = threading.Lock()


def why_not(facts: Facts) -> str:
    """Why torch's fused attention cannot run, "" if it can."""
    if facts.device.type != "cuda":
        return f"it takes CUDA tensors; these are on {facts.device}"
    if facts.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16; got {str(facts.dtype).removeprefix('torch.')}"
    if facts.channels > _CHANNELS:
        return f"it takes up to {_CHANNELS} channels; got {facts.channels}"
    major, minor = torch.cuda.get_device_capability(facts.device)
    return "" if major >= 8 else f"it needs compute capability 8.0; this GPU has {major}.{minor}"


def _attend(feat, weight, scale, mask_keys):
    """out [B, C, N]; the arguments are the op's (op.py)."""
    hole, channels = (weight == 0)[:, None], feat.shape[1]
    keys, share, bias = feat, torch.ones_like(weight), None
    if mask_keys:
        keys, share = torch.where(hole, 0, feat), weight
        # Without any key the bias is 0, not -inf: the gradient of zeros must not be 0 x NaN.
        logs = torch.where(weight.sum(1, keepdim=True) > 0, weight.log(), 0)
        bias = logs.to(feat.dtype)[:, None, None].expand(-1, 1, feat.shape[2], -1)
    query = torch.where(hole, 0, weight[:, None].to(feat.dtype) * feat)
    query, keys_ = (F.pad(t.mT[:, None], (0, -channels % _ALIGN)).contiguous() for t in (query, keys))
    with sdpa_kernel(_FUSED):
        out = F.scaled_dot_product_attention(query, keys_, keys_, attn_mask=bias, scale=scale)
    total = share.sum(1, keepdim=True)
    mean = (keys.to(weight.dtype) * (share / torch.where(total > 0, total, 1))[:, None]).sum(2, keepdim=True)
    out = torch.where(hole, mean.to(feat.dtype), out[:, 0, :, :channels].mT)
    return torch.where(total[:, None] > 0, out, 0)


def forward(a: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the op's `Arguments`; of the outputs, softmax is NaN: this backward does not need it, others do."""
    out = _attend(*a).contiguous()
    return out, a.weight.new_full((len(out), 2, out.shape[2]), torch.nan)


@contextlib.contextmanager
def _deterministic():
    """Sets torch's deterministic mode, which is one of the process, so that one thread at a time may."""
    with _LOCK:
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def backward(grad: torch.Tensor, out: torch.Tensor, softmax: torch.Tensor, a: Any) -> torch.Tensor:
    """The gradient of feat, by torch's deterministic kernels: by default they add up in any order."""
    with _deterministic():
        (d_feat,) = backends.vjp(lambda feat: _attend(feat, *a[1:]), grad, a.feat)
    return d_feat.contiguous()
