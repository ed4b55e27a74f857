"""The op unmask_attention in torch: schemas, fakes, autograd, and the table of backends.

feat [B, C, N], weight [B, N] in [0, 1], float64 for float64, else float32
->  out [B, C, N], softmax [B, 2, N] in weight's dtype: a row's highest score (infinity where the weight is 0), and the
    sum of its e^(score - highest)
"""

import torch

from inr_kernels._core import backends, native
from inr_kernels._core.dispatch import Backend, Op, always
from inr_kernels._core.registration import define, forbid_second_derivative, register_autograd

from .. import reference
from ..arguments import Arguments
from . import sdpa

_ARGUMENTS = "Tensor feat, Tensor weight, float scale, bool mask_keys, str backend"
_REFERENCE_SCORES = 1 << 24  # scores that the reference holds at a time


def _native(a):
    feat, weight = a.feat.contiguous(), a.weight.contiguous()
    problem = native.load()[0].UnmaskAttention(
        type=backends.TYPES[feat.dtype],
        size=tuple(feat.shape),
        scale=a.scale,
        mask_keys=a.mask_keys,
        feat=feat.data_ptr(),
        weight=weight.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return backends.NativeProblem(problem, feat, weight)


def _outputs(a):
    """Uninitialized out and softmax."""
    batch, tokens = a.weight.shape
    return a.feat.new_empty(a.feat.shape), a.weight.new_empty(batch, 2, tokens)


def _cpu_forward(a):
    out, softmax = _outputs(a)
    if out.numel():
        _native(a).forward(out=out.data_ptr(), softmax=softmax.data_ptr())
    return out, softmax


def _cpu_backward(grad, out, softmax, a):
    grad, out, softmax = grad.contiguous(), out.contiguous(), softmax.contiguous()
    d_feat = a.feat.new_empty(a.feat.shape)
    if d_feat.numel():
        _native(a).backward(
            out=out.data_ptr(), softmax=softmax.data_ptr(), grad_out=grad.data_ptr(), grad_feat=d_feat.data_ptr()
        )
    return d_feat


def _parts(feat):
    """Slices of the rows whose scores fit into `_REFERENCE_SCORES`: the reference runs in bounded memory."""
    batch, _, tokens = feat.shape
    step = max(1, _REFERENCE_SCORES // (batch * tokens or 1))
    return [slice(begin, begin + step) for begin in range(0, tokens, step)]


def _reference_forward(a):
    out, softmax = _outputs(a)
    for part in _parts(a.feat):
        out[:, :, part], softmax[:, :, part] = reference.unmask_attention(*a, part)
    return out, softmax


def _reference_backward(grad, out, softmax, a):
    d_feat = torch.zeros_like(a.feat, memory_format=torch.contiguous_format)
    for part in _parts(a.feat):

        def run(feat, part=part):
            return reference.unmask_attention(*a._replace(feat=feat), part)[0]

        d_feat += backends.vjp(run, grad[:, :, part], a.feat)[0]
    return d_feat


OP = Op(
    "unmask_attention",
    Arguments,
    {
        "cpu": Backend(backends.why_not_cpu, _cpu_forward, _cpu_backward),
        "reference": Backend(always, _reference_forward, _reference_backward),
        # After the reference, so opt-in where no verdict decides.
        "triton": backends.triton_backend("inr_kernels.unmask_attention.triton_kernels"),
        "sdpa": Backend(sdpa.why_not, sdpa.forward, sdpa.backward, is_vendors=True),
    },
)


def _backward(grad, out, softmax, *args):
    a, backend = OP.select(*args, backward=True)
    a.check_saved(grad, out, softmax)
    return backend.backward(grad, out, softmax, a)


def _backward_fake(grad, out, softmax, feat, *_):
    return feat.new_empty(feat.shape)


unmask_attention = define(f"unmask_attention({_ARGUMENTS}) -> (Tensor, Tensor)", OP.forward, OP.fake(_outputs))
unmask_attention_backward = define(
    f"unmask_attention_backward(Tensor grad, Tensor out, Tensor softmax, {_ARGUMENTS}) -> Tensor",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    feat, weight, *ctx.options = inputs
    ctx.save_for_backward(*output, feat, weight)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    return unmask_attention_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * (1 + len(ctx.options))


register_autograd("unmask_attention", _setup_context, _autograd)
forbid_second_derivative("unmask_attention")
