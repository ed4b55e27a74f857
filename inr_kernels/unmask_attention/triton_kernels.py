"""The Triton backend of unmask_attention: kernels, launches, block sizes. Proven in Triton's interpreter; not run on a
GPU.

Tokens come in an order: those that ask (weight != 0) first, then those that only answer; how many there are stays on
the device. A program takes BM tokens of an image and meets the others BN at a time, so no kernel uses atomics.
As Q = w F and K = V = F, one score f_i . f_j serves both of its tokens, in the backward, too.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from inr_kernels._core import backends

# By bytes of an element and channels at most: BM, BN, warps. What is wider spills registers by the kilobyte.
BLOCKS = {2: {64: (64, 32, 8), 128: (32, 32, 4), 256: (32, 32, 8)}, 4: {64: (32, 16, 8)}}


def why_not(facts) -> str:
    """Why the kernels cannot run, "" if they can."""
    if reason := backends.why_not_dot(facts):
        return reason
    widest = max(BLOCKS[facts.dtype.itemsize])
    return f"it takes at most {widest} channels in this dtype; got {facts.channels}" if facts.channels > widest else ""


@triton.jit
def load_tokens(tokens, at, count, channels, C):
    """Rows `at` [n] of tokens [count, C] in the columns channels [BC]; zeros beyond."""
    mask = (at < count)[:, None] & (channels < C)[None, :]
    return tl.load(tokens + at.to(tl.int64)[:, None] * C + channels[None, :], mask=mask, other=0.0)


@triton.jit
def attend(
    out, softmax, tokens, factor, bias, asking, answering, N, C,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, N, C], softmax [B, 2, N] of the first `asking` of tokens [B, N, C]; factor, bias or None [B, N]."""
    image, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BM
    asks, answers = tl.load(asking + image), tl.load(answering + image)
    if first < asks:
        tokens += image * N * C
        rows, channels = first + tl.arange(0, BM), tl.arange(0, BC)
        live = rows < asks
        own = load_tokens(tokens, rows, asks, channels, C)
        scale = tl.load(factor + image * N + rows, mask=live, other=0.0)
        most, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
        sums = tl.zeros([BM, BC], tl.float32)
        for j in range(0, answers, BN):
            columns = j + tl.arange(0, BN)
            others = load_tokens(tokens, columns, answers, channels, C)
            scores = tl.dot(own, tl.trans(others), input_precision=PRECISION) * scale[:, None]
            if bias is not None:
                scores += tl.load(bias + image * N + columns, mask=columns < answers, other=0.0)[None, :]
            scores = tl.where((columns < answers)[None, :], scores, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            keep, weights = tl.exp(most - higher), tl.exp(scores - higher[:, None])
            total = total * keep + tl.sum(weights, 1)
            sums = tl.dot(weights.to(others.dtype), others, sums * keep[:, None], input_precision=PRECISION)
            most = higher
        result = sums / total[:, None]
        at = (image * N + rows)[:, None] * C + channels[None, :]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=live[:, None] & (channels < C)[None, :])
        tl.store(softmax + image * 2 * N + rows, most, mask=live)
        tl.store(softmax + image * 2 * N + N + rows, total, mask=live)


@triton.jit
def meet(
    d_tokens, tokens, grads, factor, bias, most, inverse, mean, asking, answering, N, C,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_tokens [B, N, C] float32 of the first `answering` of tokens, grads [B, N, C]; the others [B, N].

    A pair meets once: i asks j (p_ij, its gradient g_i . f_j), and j asks i (p_ji, f_i . g_j). Both share the score;
    what f_j adds to d_i has the coefficient factor_i p_ij (g_i . f_j - mean_i) + factor_j p_ji (f_i . g_j - mean_j).
    """
    image, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BM
    asks, answers = tl.load(asking + image), tl.load(answering + image)
    if first < answers:
        tokens += image * N * C
        grads += image * N * C
        rows, channels = first + tl.arange(0, BM), tl.arange(0, BC)
        here = image * N + rows
        live, asking_rows = rows < answers, rows < asks
        own, own_grad = load_tokens(tokens, rows, answers, channels, C), load_tokens(grads, rows, asks, channels, C)
        own_factor = tl.load(factor + here, mask=asking_rows, other=0.0)[:, None]
        own_most = tl.load(most + here, mask=asking_rows, other=float("inf"))[:, None]
        own_inverse = tl.load(inverse + here, mask=asking_rows, other=0.0)[:, None]
        own_mean = tl.load(mean + here, mask=asking_rows, other=0.0)[:, None]
        if bias is not None:
            own_bias = tl.load(bias + here, mask=live, other=0.0)[:, None]
        sums = tl.zeros([BM, BC], tl.float32)
        for j in range(0, tl.where(first < asks, answers, asks), BN):
            columns = j + tl.arange(0, BN)
            there, answer, ask = image * N + columns, columns < answers, columns < asks
            others = load_tokens(tokens, columns, answers, channels, C)
            products = tl.dot(own, tl.trans(others), input_precision=PRECISION)
            coefficients = tl.zeros([BM, BN], tl.float32)
            if first < asks:
                scores = products * own_factor
                if bias is not None:
                    scores += tl.load(bias + there, mask=answer, other=0.0)[None, :]
                scores = tl.where(answer[None, :], scores - own_most, float("-inf"))
                d = tl.dot(own_grad, tl.trans(others), input_precision=PRECISION) - own_mean
                coefficients += tl.exp(scores) * own_inverse * d * own_factor
            if j < asks:
                other_grads = load_tokens(grads, columns, asks, channels, C)
                other_factor = tl.load(factor + there, mask=ask, other=0.0)[None, :]
                scores = products * other_factor
                if bias is not None:
                    scores += own_bias
                scores -= tl.load(most + there, mask=ask, other=float("inf"))[None, :]
                p = tl.exp(scores) * tl.load(inverse + there, mask=ask, other=0.0)[None, :]
                d = tl.dot(own, tl.trans(other_grads), input_precision=PRECISION)
                d -= tl.load(mean + there, mask=ask, other=0.0)[None, :]
                coefficients += p * d * other_factor
                sums = tl.dot(p.to(other_grads.dtype), other_grads, sums, input_precision=PRECISION)
            sums = tl.dot(coefficients.to(others.dtype), others, sums, input_precision=PRECISION)
        mask = live[:, None] & (channels < C)[None, :]
        tl.store(d_tokens + here[:, None] * C + channels[None, :], sums, mask=mask)


@dataclass
class _Problem:
    """The tokens in order; `order` [B, N] says where each stood."""

    feat: torch.Tensor
    weight: torch.Tensor
    scale: float
    mask_keys: bool

    def __post_init__(self):
        asks = self.weight != 0
        self.order = torch.sort((~asks).to(torch.uint8), dim=1, stable=True).indices
        self.asking = asks.sum(1, dtype=torch.int32)
        tokens = self.feat.shape[2]
        self.answering = self.asking if self.mask_keys else torch.full_like(self.asking, tokens)
        self.tokens = self.ordered(self.feat)
        weight = self.weight.gather(1, self.order)
        self.factor = weight * self.scale
        self.bias = weight.log() if self.mask_keys else None
        self.key_weight = self.weight if self.mask_keys else torch.ones_like(self.weight)

    def ordered(self, planes):
        """[B, C, N] -> [B, N, C] in the order."""
        return planes.gather(2, self.order[:, None].expand_as(planes)).mT.contiguous()

    def placed(self, rows):
        """[B, N, C] in the order -> [B, C, N]."""
        rows = rows.mT
        return torch.empty_like(rows, memory_format=torch.contiguous_format).scatter_(
            2, self.order[:, None].expand_as(rows), rows
        )

    def per_key(self, sums):
        """sums [B, C] over the tokens -> [B, C, 1], shared among the keys; 0 without a key."""
        keys = self.key_weight.sum(1)[:, None]
        return torch.where(keys > 0, sums / keys, 0)[..., None]

    def launch(self, kernel, *tensors):
        """Runs the kernel on (tokens in blocks) x images."""
        batch, tokens, channels = self.tokens.shape
        blocks = BLOCKS[self.tokens.element_size()]
        rows, columns, warps = blocks[min(width for width in blocks if channels <= width)]
        # Three products of TF32 are as exact as one of float32, and run on the tensor cores.
        precision = "tf32x3" if backends.precision() == "ieee" else "tf32"
        with backends.on(self.tokens.device):
            kernel[(triton.cdiv(tokens, rows), batch)](
                *tensors, self.asking, self.answering, tokens, channels, BM=rows, BN=columns,
                BC=max(16, triton.next_power_of_2(channels)), PRECISION=precision, num_warps=warps, num_stages=2,
            )  # fmt: skip


def forward(feat, weight, scale, mask_keys):
    """(out, softmax) of the op's arguments."""
    if not feat.numel():
        return feat.new_empty(feat.shape), weight.new_empty(len(weight), 2, weight.shape[1])
    p = _Problem(feat, weight, scale, mask_keys)
    out, softmax = torch.empty_like(p.tokens), torch.empty(len(feat), 2, feat.shape[2], device=feat.device)
    p.launch(attend, out, softmax, p.tokens, p.factor, p.bias)
    mean = p.per_key((feat.float() * p.key_weight[:, None]).sum(2)).to(feat.dtype)
    asks = weight[:, None] != 0
    softmax = torch.empty_like(softmax).scatter_(2, p.order[:, None].expand_as(softmax), softmax)
    # In place: a tensor of the two numbers would come from the CPU, which a CUDA graph cannot wait for.
    softmax[:, 0].masked_fill_(~asks[:, 0], torch.inf)
    softmax[:, 1].masked_fill_(~asks[:, 0], 1)
    return torch.where(asks, p.placed(out), mean), softmax


def backward(grad, out, softmax, feat, weight, scale, mask_keys):
    """d_feat of the op's arguments."""
    if not feat.numel():
        return torch.zeros_like(feat, memory_format=torch.contiguous_format)
    p = _Problem(feat, weight, scale, mask_keys)
    g, f, asks = grad.float(), feat.float(), weight != 0
    # g . e; as the sum of these two it meets g . f, where a token attends to itself above all, with the same rounding.
    mean = (g * f).sum(1) + (g * (out.float() - f)).sum(1)
    most, inverse, mean = (t.gather(1, p.order) for t in (softmax[:, 0], 1 / softmax[:, 1], mean))
    d_tokens = torch.empty(p.tokens.shape, device=feat.device)
    p.launch(meet, d_tokens, p.tokens, p.ordered(grad), p.factor, p.bias, most, inverse, mean)
    handed = p.per_key((g * ~asks[:, None]).sum(2)) * p.key_weight[:, None]
    met = p.placed(d_tokens)
    if mask_keys:  # a hole meets nobody
        met = torch.where(asks[:, None], met, 0)
    return (met + handed).to(feat.dtype)
