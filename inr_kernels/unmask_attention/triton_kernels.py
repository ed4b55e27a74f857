"""The Triton backend of unmask_attention: kernels, launches and block sizes.

The tokens of an image are sorted: first those with weight != 0, the queries, then those that are only keys. Their
counts stay on the device. A program takes BM tokens of an image and loops over the others, BN at a time, so that no
kernel needs atomics. As Q = w F and K = V = F, one score f_i . f_j serves both directions of a pair of tokens, in the
backward too.

Tested in Triton's interpreter and compiled ahead of time (tests/build/test_compile_only.py); not run on a GPU.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from inr_kernels._core import backends

from .arguments import Facts


class Blocks(NamedTuple):
    """The block sizes of a launch: rows and columns of the scores, warps of a program."""

    BM: int
    BN: int
    warps: int


# By bytes of an element and maximum channels. Wider tokens spill kilobytes of registers. The backward of 64 channels in
# half precision takes 32 rows: with 64 it needs so many registers that a multiprocessor holds one program instead of
# two, or, on sm_90, 13 % more instructions, and Triton 3.6 does not compile it there.
FORWARD_BLOCKS = {
    2: {64: Blocks(64, 32, 8), 128: Blocks(32, 32, 4), 256: Blocks(32, 32, 8)},
    4: {64: Blocks(32, 16, 8)},
}
BACKWARD_BLOCKS = {
    2: {64: Blocks(32, 32, 8), 128: Blocks(32, 32, 4), 256: Blocks(32, 32, 8)},
    4: {64: Blocks(32, 16, 8)},
}


def max_channels(dtype: torch.dtype) -> int:
    """The maximum number of channels."""
    return max(FORWARD_BLOCKS[dtype.itemsize])


def why_not(facts: Facts) -> str:
    """Why the kernels cannot run, "" if they can."""
    if reason := backends.why_not_dot(facts):
        return reason
    widest = max_channels(facts.dtype)
    return f"it takes at most {widest} channels in this dtype; got {facts.channels}" if facts.channels > widest else ""


@triton.jit
def load_tokens(
    tokens,  # [>= count, C] contiguous
    at, count, channels, C,
):  # fmt: skip
    """Rows `at` [n] and columns `channels` [BC] of the first `count` tokens: [n, BC], zeros outside."""
    mask = (at < count)[:, None] & (channels < C)[None, :]
    return tl.load(tokens + at.to(tl.int64)[:, None] * C + channels[None, :], mask=mask, other=0.0)


@triton.jit
def attend(
    out,  # [B, N, C] contiguous; the first `queries` rows of each image are written
    softmax,  # [B, 2, N] float32: maximum and sum, likewise
    tokens,  # [B, N, C] contiguous, sorted
    factor,  # [B, N] float32: weight times scale
    bias,  # [B, N] float32: added to a key's scores; or None
    queries,  # [B] int32: how many tokens are queries
    keys,  # [B] int32: how many tokens are keys
    N, C, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The attention of BM queries, with an online softmax."""
    image, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BM
    n_queries, n_keys = tl.load(queries + image), tl.load(keys + image)
    if first < n_queries:
        tokens += image * N * C
        rows, channels = first + tl.arange(0, BM), tl.arange(0, BC)
        live = rows < n_queries
        own = load_tokens(tokens, rows, n_queries, channels, C)
        scale = tl.load(factor + image * N + rows, mask=live, other=0.0)
        max_logit, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
        sums = tl.zeros([BM, BC], tl.float32)
        for j in range(0, n_keys, BN):
            columns = j + tl.arange(0, BN)
            others = load_tokens(tokens, columns, n_keys, channels, C)
            scores = tl.dot(own, tl.trans(others), input_precision=PRECISION) * scale[:, None]
            if bias is not None:
                scores += tl.load(bias + image * N + columns, mask=columns < n_keys, other=0.0)[None, :]
            scores = tl.where((columns < n_keys)[None, :], scores, float("-inf"))
            new_max = tl.maximum(max_logit, tl.max(scores, 1))
            rescale, weights = tl.exp(max_logit - new_max), tl.exp(scores - new_max[:, None])
            total = total * rescale + tl.sum(weights, 1)
            sums = tl.dot(weights.to(others.dtype), others, sums * rescale[:, None], input_precision=PRECISION)
            max_logit = new_max
        result = sums / total[:, None]
        at = (image * N + rows)[:, None] * C + channels[None, :]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=live[:, None] & (channels < C)[None, :])
        tl.store(softmax + image * 2 * N + rows, max_logit, mask=live)
        tl.store(softmax + image * 2 * N + N + rows, total, mask=live)


@triton.jit
def attend_backward(
    d_tokens,  # [B, N, C] float32 contiguous; the first `keys` rows of each image are written
    tokens,  # [B, N, C] contiguous, sorted
    grads,  # [B, N, C] contiguous: gradients of the output, sorted likewise
    factor,  # [B, N] float32: weight times scale
    bias,  # [B, N] float32: added to a key's scores; or None
    max_logit,  # [B, N] float32: the softmax's maximum
    inverse,  # [B, N] float32: 1 / the softmax's sum
    mean,  # [B, N] float32: gradient . output
    queries,  # [B] int32: how many tokens are queries
    keys,  # [B] int32: how many tokens are keys
    N, C, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of BM tokens, each as a query and as a key.

    A pair is visited once, for both directions, which share the score f_i . f_j: query i with key j (weight p_ij, whose
    gradient is g_i . f_j), and query j with key i (p_ji, f_i . g_j). f_j contributes to d_i with the coefficient
    factor_i p_ij (g_i . f_j - mean_i) + factor_j p_ji (f_i . g_j - mean_j), and g_j with p_ji.
    """
    image, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BM
    n_queries, n_keys = tl.load(queries + image), tl.load(keys + image)
    if first < n_keys:
        tokens += image * N * C
        grads += image * N * C
        rows, channels = first + tl.arange(0, BM), tl.arange(0, BC)
        here = image * N + rows
        live, is_query = rows < n_keys, rows < n_queries
        own = load_tokens(tokens, rows, n_keys, channels, C)
        own_grad = load_tokens(grads, rows, n_queries, channels, C)
        own_factor = tl.load(factor + here, mask=is_query, other=0.0)[:, None]
        own_max = tl.load(max_logit + here, mask=is_query, other=float("inf"))[:, None]
        own_inverse = tl.load(inverse + here, mask=is_query, other=0.0)[:, None]
        own_mean = tl.load(mean + here, mask=is_query, other=0.0)[:, None]
        if bias is not None:
            own_bias = tl.load(bias + here, mask=live, other=0.0)[:, None]
        sums = tl.zeros([BM, BC], tl.float32)
        for j in range(0, tl.where(first < n_queries, n_keys, n_queries), BN):
            columns = j + tl.arange(0, BN)
            there, other_is_key, other_is_query = image * N + columns, columns < n_keys, columns < n_queries
            others = load_tokens(tokens, columns, n_keys, channels, C)
            products = tl.dot(own, tl.trans(others), input_precision=PRECISION)
            coefficients = tl.zeros([BM, BN], tl.float32)
            if first < n_queries:
                scores = products * own_factor
                if bias is not None:
                    scores += tl.load(bias + there, mask=other_is_key, other=0.0)[None, :]
                scores = tl.where(other_is_key[None, :], scores - own_max, float("-inf"))
                d = tl.dot(own_grad, tl.trans(others), input_precision=PRECISION) - own_mean
                coefficients += tl.exp(scores) * own_inverse * d * own_factor
            if j < n_queries:
                other_grads = load_tokens(grads, columns, n_queries, channels, C)
                other_factor = tl.load(factor + there, mask=other_is_query, other=0.0)[None, :]
                scores = products * other_factor
                if bias is not None:
                    scores += own_bias
                scores -= tl.load(max_logit + there, mask=other_is_query, other=float("inf"))[None, :]
                p = tl.exp(scores) * tl.load(inverse + there, mask=other_is_query, other=0.0)[None, :]
                d = tl.dot(own, tl.trans(other_grads), input_precision=PRECISION)
                d -= tl.load(mean + there, mask=other_is_query, other=0.0)[None, :]
                coefficients += p * d * other_factor
                sums = tl.dot(p.to(other_grads.dtype), other_grads, sums, input_precision=PRECISION)
            sums = tl.dot(coefficients.to(others.dtype), others, sums, input_precision=PRECISION)
        mask = live[:, None] & (channels < C)[None, :]
        tl.store(d_tokens + here[:, None] * C + channels[None, :], sums, mask=mask)


@dataclass
class _Problem:
    """A call's tensors with the queries first; `order` [B, N] holds the original index of each token."""

    feat: torch.Tensor
    weight: torch.Tensor
    scale: float
    mask_keys: bool

    def __post_init__(self):
        is_query = self.weight != 0
        self.order = torch.sort((~is_query).to(torch.uint8), dim=1, stable=True).indices
        self.queries = is_query.sum(1, dtype=torch.int32)
        tokens = self.feat.shape[2]
        self.keys = self.queries if self.mask_keys else torch.full_like(self.queries, tokens)
        self.tokens = self.sort(self.feat)
        weight = self.weight.gather(1, self.order)
        self.factor = weight * self.scale
        self.bias = weight.log() if self.mask_keys else None
        self.key_weight = self.weight if self.mask_keys else torch.ones_like(self.weight)

    def sort(self, planes):
        """[B, C, N] in the original order -> [B, N, C], queries first."""
        return planes.gather(2, self.order[:, None].expand_as(planes)).mT.contiguous()

    def unsort(self, rows):
        """[B, N, C], queries first -> [B, C, N] in the original order."""
        rows = rows.mT
        return torch.empty_like(rows, memory_format=torch.contiguous_format).scatter_(
            2, self.order[:, None].expand_as(rows), rows
        )

    def per_key(self, sums):
        """sums [B, C] over the tokens -> [B, C, 1], divided by the number of keys; 0 without a key."""
        keys = self.key_weight.sum(1)[:, None]
        return torch.where(keys > 0, sums / keys, 0)[..., None]

    def launch(self, kernel, blocks, *tensors):
        """Runs the kernel on (blocks of tokens) x images; blocks: by bytes of an element and maximum channels."""
        _, tokens, channels = self.tokens.shape
        by_channels = blocks[self.tokens.element_size()]
        blocks = by_channels[min(width for width in by_channels if channels <= width)]
        # Three TF32 products are as accurate as one in float32, and run on the tensor cores.
        precision = "tf32x3" if backends.precision() == "ieee" else "tf32"
        with backends.on(self.tokens.device):
            for images, given in backends.launches((*tensors, self.queries, self.keys)):
                kernel[(triton.cdiv(tokens, blocks.BM), images)](
                    *given, tokens, channels, BM=blocks.BM, BN=blocks.BN, BC=max(16, triton.next_power_of_2(channels)),
                    PRECISION=precision, num_warps=blocks.warps, num_stages=2,
                )  # fmt: skip


def forward(
    feat: torch.Tensor, weight: torch.Tensor, scale: float, mask_keys: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """feat [B, C, N], weight [B, N] -> out [B, C, N], softmax [B, 2, N]; see op.py."""
    if not feat.numel():
        return feat.new_empty(feat.shape), weight.new_empty(len(weight), 2, weight.shape[1])
    p = _Problem(feat, weight, scale, mask_keys)
    out, softmax = torch.empty_like(p.tokens), weight.new_empty(len(feat), 2, feat.shape[2])
    p.launch(attend, FORWARD_BLOCKS, out, softmax, p.tokens, p.factor, p.bias)
    weighted = feat.float() * p.key_weight[:, None]
    if mask_keys:
        weighted.masked_fill_(p.key_weight[:, None] == 0, 0)  # NaN and infinity of holes
    mean = p.per_key(weighted.sum(2)).to(feat.dtype)
    is_query = weight[:, None] != 0
    softmax = torch.empty_like(softmax).scatter_(2, p.order[:, None].expand_as(softmax), softmax)
    # In place: a tensor of the two numbers would be copied from the CPU, which a CUDA graph cannot capture.
    softmax[:, 0].masked_fill_(~is_query[:, 0], torch.inf)
    softmax[:, 1].masked_fill_(~is_query[:, 0], 1)
    return torch.where(is_query, p.unsort(out), mean), softmax


def backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    softmax: torch.Tensor,
    feat: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    mask_keys: bool,
) -> torch.Tensor:
    """d_feat [B, C, N]; grad and out [B, C, N], softmax [B, 2, N]."""
    if not feat.numel():
        return torch.zeros_like(feat, memory_format=torch.contiguous_format)
    p = _Problem(feat, weight, scale, mask_keys)
    g, f, is_query = grad.float(), feat.float(), weight != 0
    # g . out, as a sum of two terms: where a token mostly attends to itself, the first cancels the kernel's g . f with
    # the same rounding.
    mean = (g * f).sum(1) + (g * (out.float() - f)).sum(1)
    max_logit, inverse, mean = (t.gather(1, p.order) for t in (softmax[:, 0], 1 / softmax[:, 1], mean))
    d_tokens = feat.new_empty(p.tokens.shape, dtype=torch.float32)
    p.launch(
        attend_backward, BACKWARD_BLOCKS, d_tokens, p.tokens, p.sort(grad), p.factor, p.bias, max_logit, inverse, mean
    )
    from_means = p.per_key((g * ~is_query[:, None]).sum(2)) * p.key_weight[:, None]  # masked rows output the mean
    from_scores = p.unsort(d_tokens)
    if mask_keys:  # masked tokens are neither queries nor keys
        from_scores = torch.where(is_query[:, None], from_scores, 0)
    return (from_scores + from_means).to(feat.dtype)
