"""How torch knows neighborhood_attention: schemas, fakes, autograd, and the choice of the backend.

qkv: query, key, value [B, H, W, heads, dim], or one [B, H, W, 3, heads, dim]; unit stride in dim, any other strides
rpb: [heads, 2 Kh - 1, 2 Kw - 1] or None, as lse in float32 (float64 of float64)
->  out [B, H, W, heads, dim], lse [B, H, W, heads]
"""

import functools
import importlib.util
from dataclasses import dataclass

import torch

from inr_kernels._core import backends, dispatch, native
from inr_kernels._core.registration import LIBRARY, define, forbid_second_derivative

from . import reference

_ARGUMENTS = (
    "Tensor[] qkv, Tensor? rpb, int[] kernel_size, int[] dilation, int[] stride, bool[] is_causal, float scale,"
    " str backend"
)


@dataclass(frozen=True)
class Facts(backends.Facts):
    """What decides whether a backend can run."""

    rpb: bool = False
    scale: float | None = None


def _triton_kernels():
    from . import triton_kernels

    return triton_kernels


why_not_cpu = backends.why_not_cpu
why_not_triton = functools.partial(backends.why_not_triton, _triton_kernels)


def why_not_natten(facts):
    """NATTEN's own kernels: what it takes, where it is installed with them."""
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed (pip install inr-kernels[natten])"
    natten = importlib.import_module("natten")
    if not getattr(natten, "HAS_LIBNATTEN", False):
        return "natten is installed without its kernels"
    if facts.device.type != "cuda":
        return f"NATTEN's kernels take CUDA tensors; these are on {facts.device}"
    if facts.rpb:
        return "NATTEN has no relative position bias since version 0.20"
    return "NATTEN takes a scale of 0 for none" if facts.scale == 0 else ""


def run_natten(query, key, value, rpb, kernel_size, dilation, stride, is_causal, scale):
    """out, lse of NATTEN's na2d, differentiable as far as NATTEN is: not through lse."""
    facts = Facts(query.device, query.dtype, rpb is not None, scale)
    dispatch.OPS["neighborhood_attention"].choose("natten", facts)
    out, lse = importlib.import_module("natten").na2d(
        query,
        key,
        value,
        kernel_size=tuple(kernel_size),
        dilation=tuple(dilation),
        stride=tuple(stride),
        is_causal=tuple(is_causal),
        scale=scale,
        return_lse=True,
    )
    return out, lse.detach()  # NATTEN would ignore its gradient silently


def _natten_backward(*args, **needs):
    raise RuntimeError("NATTEN has its own gradient: pass backend='natten' to the function, not to a compiled graph")


def exact(dtype):
    """The dtype of scores, bias and lse."""
    return torch.promote_types(dtype, torch.float32)


def unpack(qkv):
    """query, key, value of one packed tensor or of three (or of None: a gradient that is not needed)."""
    return qkv[0].unbind(3) if len(qkv) == 1 and qkv[0] is not None else qkv * (3 // len(qkv))


class _Problem:
    """A native problem with the tensors that its addresses point into."""

    def __init__(self, qkv, rpb, kernel_size, dilation, stride, is_causal, scale):
        query, key, value = self.held = [t if t.stride(-1) == 1 else t.contiguous() for t in unpack(qkv)]
        self.rpb = None if rpb is None else rpb.contiguous()
        batch, height, width, heads, dim = query.shape
        axes = zip((height, width), kernel_size, dilation, stride, is_causal, strict=True)
        y, x = map(tuple, axes)
        self.native = native.load()[0].NeighborhoodAttention(
            type=backends.TYPES[query.dtype],
            batch=batch,
            heads=heads,
            dim=dim,
            y=y,
            x=x,
            scale=scale,
            query=_tokens(query),
            key=_tokens(key),
            value=_tokens(value),
            bias=backends.address(self.rpb),
            threads=torch.get_num_threads(),
        )

    def forward(self, out, lse):
        self.native.forward(out=_tokens(out), lse=lse.data_ptr())

    def backward(self, grad, grad_lse, lse, query, key, value, rpb):
        self.native.backward(
            lse=lse.data_ptr(),
            grad_out=_tokens(grad),
            grad_lse=grad_lse.data_ptr(),
            query=_tokens(query),
            key=_tokens(key),
            value=_tokens(value),
            bias=backends.address(rpb),
        )


def _tokens(tensor):
    """The tensor's address and its strides but the last; an address of 0 for None."""
    return (0, (0, 0, 0, 0)) if tensor is None else (tensor.data_ptr(), tensor.stride()[:4])


def _cpu_forward(qkv, *rest):
    query = unpack(qkv)[0]
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=exact(query.dtype))
    if out.numel():
        _Problem(qkv, *rest).forward(out, lse)
    return out, lse


def _cpu_backward(grad, grad_lse, lse, qkv, rpb, *rest, needs):
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_lse, lse = grad_lse.contiguous(), lse.contiguous()
    grads, d_rpb = empty_gradients(qkv, rpb, needs)
    if grad.numel():
        _Problem(qkv, rpb, *rest).backward(grad, grad_lse, lse, *unpack(grads), d_rpb)
    elif d_rpb is not None:
        d_rpb.zero_()
    return grads, d_rpb


def empty_gradients(qkv, rpb, needs):
    """Memory for qkv's gradients and for rpb's, None where not needed."""
    *needs_qkv, needs_rpb = needs
    grads = [t.new_empty(t.shape) if needed else None for t, needed in zip(qkv, needs_qkv, strict=True)]
    return grads, rpb.new_empty(rpb.shape) if needs_rpb else None


def _reference_forward(qkv, *rest):
    return reference.neighborhood_attention(*unpack(qkv), *rest)


def _reference_backward(grad, grad_lse, lse, qkv, rpb, *rest, needs):
    # Below autograd, where ops run, only torch.func still differentiates.
    _, backward = torch.func.vjp(lambda qkv, rpb: _reference_forward(qkv, rpb, *rest), list(qkv), rpb)
    grads, d_rpb = backward((grad, grad_lse))
    return grads, d_rpb


_RUNNERS = {
    "cpu": (_cpu_forward, _cpu_backward),
    "triton": backends.triton_runner(_triton_kernels),
    "reference": (_reference_forward, _reference_backward),
    "natten": (lambda qkv, *rest: run_natten(*unpack(qkv), *rest), _natten_backward),
}


def _choose(query, rpb, scale, backend):
    facts = Facts(query.device, query.dtype, rpb is not None, scale)
    return _RUNNERS[dispatch.OPS["neighborhood_attention"].choose(dispatch.wished(backend), facts)]


def _check(qkv, rpb, kernel_size, dilation, stride, is_causal, scale):
    """What the kernels rely on for their memory's sake; the functional's errors are the ones that explain."""
    packed = len(qkv) == 1
    if len(qkv) not in (1, 3) or qkv[0].dim() != 5 + packed or (packed and qkv[0].shape[3] != 3):
        raise ValueError(f"expected one [B, H, W, 3, heads, dim] or three of 5 dimensions; got {len(qkv)}")
    query = qkv[0]
    heads = query.shape[-2]
    expected = [(t, query.shape, query.dtype) for t in qkv]
    shape = [heads, *(2 * k - 1 for k in kernel_size)]
    expected += [] if rpb is None else [(rpb, shape, exact(query.dtype))]
    for t, shape, dtype in expected:
        if (list(t.shape), t.dtype, t.device) != (list(shape), dtype, query.device):
            got = f"{list(t.shape)}, {t.dtype} on {t.device}"
            raise ValueError(f"expected {list(shape)}, {dtype} on {query.device}; got {got}")
    options = [*zip(query.shape[1:3], kernel_size, dilation, stride, strict=True)]
    if len(options) != 2 or len(is_causal) != 2 or min(heads, query.shape[-1]) < 1:
        raise ValueError(f"options out of range: {kernel_size}, {dilation}, {stride}, {is_causal}")
    for length, k, d, s in options:
        if min(k, d, s) < 1 or s > k or k * d > length:
            raise ValueError(f"options out of range: kernel_size {k}, dilation {d}, stride {s} on {length}")


def _forward(*args):
    *problem, backend = args
    _check(*problem)
    return _choose(problem[0][0], problem[1], problem[-1], backend)[0](*problem)


def _forward_fake(qkv, *_):
    query = unpack(qkv)[0]
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=exact(query.dtype))


def _backward(grad, grad_lse, lse, *args):
    *problem, backend, needs = args
    _check(*problem)
    qkv, rpb = problem[:2]
    query = unpack(qkv)[0]
    expected = [(grad, query.shape, query.dtype), *((t, query.shape[:-1], exact(query.dtype)) for t in (grad_lse, lse))]
    for t, shape, dtype in expected:
        if t.shape != shape or t.dtype != dtype:
            raise ValueError(f"expected gradients and lse of the output's shape; got {list(t.shape)}, {t.dtype}")
    if len(needs) != len(qkv) + 1 or (needs[-1] and rpb is None):
        raise ValueError(f"expected a need for each tensor; got {needs}")
    grads, d_rpb = _choose(query, rpb, problem[-1], backend)[1](grad, grad_lse, lse, *problem, needs=needs)
    # A schema has no optional results.
    grads = [g.contiguous() if needed else grad.new_empty(0) for g, needed in zip(grads, needs[:-1], strict=True)]
    return grads, d_rpb.contiguous() if needs[-1] else grad.new_empty(0)


def _backward_fake(grad, grad_lse, lse, qkv, rpb, *rest):
    needs = rest[-1]
    grads, d_rpb = empty_gradients(qkv, rpb, needs)
    return [grad.new_empty(0) if g is None else g for g in grads], grad.new_empty(0) if d_rpb is None else d_rpb


neighborhood_attention = define(
    f"neighborhood_attention({_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
neighborhood_attention_backward = define(
    f"neighborhood_attention_backward(Tensor grad, Tensor grad_lse, Tensor lse, {_ARGUMENTS}, bool[] needs)"
    " -> (Tensor[], Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    qkv, rpb, *ctx.rest = inputs
    ctx.save_for_backward(output[1], *qkv, *([] if rpb is None else [rpb]))
    ctx.tensors = len(qkv)


def _autograd(ctx, grad, grad_lse):
    lse, *saved = ctx.saved_tensors
    qkv, rpb = saved[: ctx.tensors], saved[ctx.tensors] if len(saved) > ctx.tensors else None
    needs = torch.utils._pytree.tree_leaves(list(ctx.needs_input_grad[:2]))
    grads, d_rpb = neighborhood_attention_backward(grad, grad_lse, lse, qkv, rpb, *ctx.rest, needs)
    grads = [g if needed else None for g, needed in zip(grads, needs[:-1], strict=True)]
    return grads, d_rpb if needs[-1] else None, *[None] * len(ctx.rest)


torch.library.register_autograd(
    "inr_kernels::neighborhood_attention", _autograd, setup_context=_setup_context, lib=LIBRARY
)
forbid_second_derivative("neighborhood_attention")
