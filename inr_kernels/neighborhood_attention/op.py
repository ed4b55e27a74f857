"""The op neighborhood_attention in torch: schemas, fakes, autograd, and the table of backends.

qkv: query [B, H, W, heads, dim], key [B, Hk, Wk, heads_k, dim] and value [B, Hk, Wk, heads_v, dim_v], or one
    [B, H, W, 3, heads, dim]; unit stride in dim, any other strides
rpb: [heads, 2 Kh - 1, 2 Kw - 1] or None, in lse's dtype: float32 (float64 for float64)
->  out [B, H, W, heads (1 with mean_heads), dim_v], lse [B, H, W, heads]
"""

import importlib
import importlib.util

import torch

from inr_kernels._core import backends, native
from inr_kernels._core.dispatch import Backend, Op, always
from inr_kernels._core.registration import (
    define,
    fake_gradients,
    forbid_second_derivative,
    only_needed,
    register_autograd,
    schema_results,
)

from . import reference
from .arguments import Arguments, Facts, exact, unpack

_ARGUMENTS = (
    "Tensor[] qkv, Tensor? rpb, int[] kernel_size, int[] dilation, int[] stride, int[] is_causal, float scale,"
    " bool mean_heads, str backend"
)
_MAX_CUDA_DIM, _MAX_CUDA_BACKWARD_DIM = 128, 64
_MAX_CUDA_BIAS = 16  # keys per axis


def _native(a):
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in a.unpack())
    rpb = None if a.rpb is None else a.rpb.contiguous()
    options = a.kernel_size, a.dilation, a.stride, map(bool, a.is_causal)
    axes = list(zip(query.shape[1:-2], key.shape[1:-2], *options, strict=True))
    z, y, x = [_ONE] * (3 - len(axes)) + axes
    problem = native.load()[0].NeighborhoodAttention(
        type=backends.TYPES[query.dtype],
        batch=query.shape[0],
        heads=tuple(t.shape[-2] for t in (query, key, value)),
        dims=(query.shape[-1], value.shape[-1]),
        z=z,
        y=y,
        x=x,
        scale=a.scale,
        mean_heads=a.mean_heads,
        query=_tokens(query),
        key=_tokens(key),
        value=_tokens(value),
        bias=backends.address(rpb),
        threads=torch.get_num_threads(),
    )
    return backends.NativeProblem(problem, query, key, value, rpb)


_ONE = 1, 1, 1, 1, 1, False  # an axis that the tensors do not have


def _tokens(tensor):
    """The tensor's address and its strides except the last, 0 for missing axes; an address of 0 for None."""
    if tensor is None:
        return 0, (0,) * 5
    batch, *axes, heads, _ = tensor.stride()
    return tensor.data_ptr(), (batch, *[0] * (3 - len(axes)), *axes, heads)


def _outputs(a):
    """Uninitialized out and lse."""
    query = a.unpack()[0]
    return query.new_empty(a.out_shape), query.new_empty(query.shape[:-1], dtype=exact(query.dtype))


def _cpu_forward(a):
    out, lse = _outputs(a)
    if out.numel():
        _native(a).forward(out=_tokens(out), lse=lse.data_ptr())
    return out, lse


def _cpu_backward(grad, grad_lse, lse, a, *, needs):
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_lse, lse = grad_lse.contiguous(), lse.contiguous()
    *needs_qkv, needs_rpb = needs
    grads = [t.new_empty(t.shape) if needed else None for t, needed in zip(a.qkv, needs_qkv, strict=True)]
    d_rpb = a.rpb.new_empty(a.rpb.shape) if needs_rpb else None
    if grad.numel():
        _native(a).backward(
            lse=lse.data_ptr(),
            grad_out=_tokens(grad),
            grad_lse=grad_lse.data_ptr(),
            gradients=(*map(_tokens, unpack(grads)), backends.address(d_rpb)),
        )
    elif d_rpb is not None:
        d_rpb.zero_()
    return grads, d_rpb


def why_not_cuda(facts: Facts) -> str:
    """Why the CUDA C++ kernels cannot run: they take half precision and the plain form in two dimensions."""
    if reason := backends.why_not_cuda(facts):
        return reason
    if facts.rank != 2:
        return f"it takes two dimensions; got {facts.rank}"
    if facts.is_cross_scale or facts.mean_heads or len(set(facts.heads)) > 1:
        return "it takes keys and values of the queries' size and heads, without a mean of the heads"
    if facts.value_dim not in (None, facts.dim):
        return f"it takes values of the queries' {facts.dim} channels; got {facts.value_dim}"
    return f"it takes at most {_MAX_CUDA_DIM} channels; got {facts.dim}" if facts.dim > _MAX_CUDA_DIM else ""


def _cuda_forward(a):
    out, lse = _outputs(a)
    if out.numel():
        _native(a).launch("forward_cuda", out.device, out=_tokens(out), lse=lse.data_ptr())
    return out, lse


def _cuda_backward(grad, grad_lse, lse, a, *, needs):
    """By Triton for wide heads, and for the bias gradient of wide windows, which a warp sums in shared memory."""
    *needs_qkv, needs_rpb = needs
    query, key, value = a.unpack()
    is_wide = query.shape[-1] > _MAX_CUDA_BACKWARD_DIM or (needs_rpb and max(a.kernel_size) > _MAX_CUDA_BIAS)
    if is_wide or not grad.numel():
        return _TRITON.backward(grad, grad_lse, lse, a, needs=needs)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_lse, lse = grad_lse.contiguous(), lse.contiguous()
    grads = [t.new_empty(t.shape) if needed else None for t, needed in zip(a.qkv, needs_qkv, strict=True)]
    d_query, d_key, d_value = unpack(grads)
    if (d_key is None) != (d_value is None):  # the kernel writes both
        d_key, d_value = (t.new_empty(t.shape) if d is None else d for d, t in ((d_key, key), (d_value, value)))
    problem, delta = _native(a), torch.empty_like(lse)
    shares = lse.new_empty(problem.problem.tiles_cuda(), *a.rpb.shape) if needs_rpb else None
    problem.launch(
        "backward_cuda",
        grad.device,
        lse=lse.data_ptr(),
        grad_out=_tokens(grad),
        grad_lse=grad_lse.data_ptr(),
        gradients=(*map(_tokens, (d_query, d_key, d_value)), backends.address(shares)),
        delta=delta.data_ptr(),
    )
    return grads, None if shares is None else shares.sum(0)


def run_reference(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """out, lse of the reference, differentiable."""
    query, key, value = a.unpack()
    return reference.neighborhood_attention(query, key, value, *a[1:])


def _reference_backward(grad, grad_lse, lse, a, *, needs):
    def run(qkv, rpb):
        return run_reference(a._replace(qkv=qkv, rpb=rpb))

    grads, d_rpb = backends.vjp(run, (grad, grad_lse), list(a.qkv), a.rpb)
    *grads, d_rpb = only_needed([*grads, d_rpb], needs)
    return grads, d_rpb


def _why_not_natten(facts):
    """Why NATTEN's own kernels cannot run: they must be installed, and take CUDA tensors without a bias."""
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed (pip install inr-kernels[natten])"
    natten = importlib.import_module("natten")
    if getattr(natten, "IS_INR_KERNELS", False):
        return "natten is this package's own module here (install_as_natten)"
    if not getattr(natten, "HAS_LIBNATTEN", False):
        return "natten is installed without its kernels"
    if facts.device.type != "cuda":
        return f"NATTEN's kernels take CUDA tensors; these are on {facts.device}"
    if facts.rpb:
        return "NATTEN has no relative position bias since version 0.20"
    if facts.is_cross_scale or facts.mean_heads or facts.heads[1] != facts.heads[2]:
        return "NATTEN's keys and values have the queries' size and the same heads"
    return "NATTEN treats scale=0 as the default scale" if facts.scale == 0 else ""


def run_natten(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """out, lse of NATTEN's na1d, na2d or na3d, differentiable as far as NATTEN is: not through lse."""
    OP.choose("natten", a.facts())
    out, lse = getattr(importlib.import_module("natten"), f"na{len(a.kernel_size)}d")(
        *a.unpack(),
        kernel_size=tuple(a.kernel_size),
        dilation=tuple(a.dilation),
        stride=tuple(a.stride),
        is_causal=tuple(map(bool, a.is_causal)),
        scale=a.scale,
        return_lse=True,
    )
    return out, lse.detach()  # NATTEN would ignore its gradient silently


def _natten_backward(*args, **needs):
    raise RuntimeError("NATTEN has its own gradient: pass backend='natten' to the function, not to a compiled graph")


_TRITON = backends.triton_backend(f"{__package__}.triton_kernels")


def cuda_backend() -> Backend:
    """The CUDA C++ kernels; the backward of some calls is Triton's (`_cuda_backward`)."""
    return Backend(why_not_cuda, _cuda_forward, _cuda_backward)


OP = Op(
    "neighborhood_attention",
    Arguments,
    {
        "cpu": Backend(backends.why_not_cpu, _cpu_forward, _cpu_backward),
        "reference": Backend(always, run_reference, _reference_backward),
        # After the reference, so opt-in where no verdict decides.
        "triton": _TRITON,
        "cuda": cuda_backend(),
        "natten": Backend(_why_not_natten, run_natten, _natten_backward, is_proven=False),
    },
)


def _backward(grad, grad_lse, lse, *args):
    *args, needs = args
    a, backend = OP.select(*args, backward=True)
    a.check_saved(grad, grad_lse, lse, needs)
    return schema_results(backend.backward(grad, grad_lse, lse, a, needs=needs), like=grad)


def _backward_fake(grad, grad_lse, lse, qkv, rpb, *rest):
    *_, needs = rest
    *grads, d_rpb = fake_gradients([*qkv, lse if rpb is None else rpb], needs, like=grad)
    return grads, d_rpb


neighborhood_attention = define(
    f"neighborhood_attention({_ARGUMENTS}) -> (Tensor, Tensor)",
    OP.forward,
    OP.fake(_outputs),
)
neighborhood_attention_backward = define(
    f"neighborhood_attention_backward(Tensor grad, Tensor grad_lse, Tensor lse, {_ARGUMENTS}, bool[] needs)"
    " -> (Tensor[], Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    qkv, rpb, *ctx.options = inputs
    ctx.save_for_backward(output[1], *qkv, *([] if rpb is None else [rpb]))
    ctx.tensors = len(qkv)


def _autograd(ctx, grad, grad_lse):
    lse, *saved = ctx.saved_tensors
    qkv, rpb = saved[: ctx.tensors], saved[ctx.tensors] if len(saved) > ctx.tensors else None
    needs = torch.utils._pytree.tree_leaves(list(ctx.needs_input_grad[:2]))
    grads, d_rpb = neighborhood_attention_backward(grad, grad_lse, lse, qkv, rpb, *ctx.options, needs)
    *grads, d_rpb = only_needed([*grads, d_rpb], needs)
    return grads, d_rpb, *[None] * len(ctx.options)


register_autograd("neighborhood_attention", _setup_context, _autograd)
forbid_second_derivative("neighborhood_attention")
