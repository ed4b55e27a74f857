"""How torch knows unmask_attention: schemas, fakes, autograd, and the choice of the backend.

feat [B, C, N], weight [B, N] in [0, 1], float64 for float64, else float32
->  out [B, C, N], softmax [B, 2, N] as weight: a row's highest score, infinity where the weight is 0, and the sum of
    its e^(score - highest)
"""

import functools
from dataclasses import dataclass

import torch

from inr_kernels._core import backends, dispatch, native
from inr_kernels._core.registration import LIBRARY, define, forbid_second_derivative

from . import reference

_ARGUMENTS = "Tensor feat, Tensor weight, float scale, bool mask_keys, str backend"
_REFERENCE_SCORES = 1 << 24


@dataclass(frozen=True)
class Facts(backends.Facts):
    """With the number of channels."""

    channels: int = 1


def _triton_kernels():
    from . import triton_kernels

    return triton_kernels


why_not_cpu = backends.why_not_cpu
why_not_triton = functools.partial(backends.why_not_triton, _triton_kernels)


def _native(feat, weight, scale, mask_keys):
    """The native problem; feat and weight must be contiguous and outlive it."""
    return native.load()[0].UnmaskAttention(
        type=backends.TYPES[feat.dtype],
        size=tuple(feat.shape),
        scale=scale,
        mask_keys=mask_keys,
        feat=feat.data_ptr(),
        weight=weight.data_ptr(),
        threads=torch.get_num_threads(),
    )


def _cpu_forward(feat, weight, *form):
    feat, weight = feat.contiguous(), weight.contiguous()
    out, softmax = torch.empty_like(feat), weight.new_empty(len(weight), 2, weight.shape[1])
    if out.numel():
        _native(feat, weight, *form).forward(out=out.data_ptr(), softmax=softmax.data_ptr())
    return out, softmax


def _cpu_backward(grad, feat, weight, out, softmax, *form):
    grad, feat, weight, out, softmax = (t.contiguous() for t in (grad, feat, weight, out, softmax))
    d_feat = torch.empty_like(feat)
    if feat.numel():
        problem = _native(feat, weight, *form)
        problem.backward(
            out=out.data_ptr(), softmax=softmax.data_ptr(), grad_out=grad.data_ptr(), grad_feat=d_feat.data_ptr()
        )
    return d_feat


def _parts(feat):
    """Slices of the rows, so many that their scores fit: this, too, is to run in bounded memory."""
    tokens = feat.shape[2]
    step = max(1, _REFERENCE_SCORES // (len(feat) * tokens or 1))
    return [slice(begin, begin + step) for begin in range(0, tokens, step)]


def _reference_forward(feat, weight, *form):
    out = torch.empty_like(feat, memory_format=torch.contiguous_format)
    softmax = weight.new_empty(len(weight), 2, weight.shape[1])
    for part in _parts(feat):
        out[:, :, part], softmax[:, :, part] = reference.unmask_attention(feat, weight, *form, part)
    return out, softmax


def _reference_backward(grad, feat, weight, out, softmax, *form):
    # Below autograd, where ops run, only torch.func still differentiates.
    total = torch.zeros_like(feat, memory_format=torch.contiguous_format)
    for part in _parts(feat):
        attend = functools.partial(_reference_part, weight=weight, form=form, part=part)
        total += torch.func.vjp(attend, feat)[1](grad[:, :, part])[0]
    return total


def _reference_part(feat, weight, form, part):
    return reference.unmask_attention(feat, weight, *form, part)[0]


_RUNNERS = {
    "cpu": (_cpu_forward, _cpu_backward),
    "triton": backends.triton_runner(_triton_kernels),
    "reference": (_reference_forward, _reference_backward),
}


def _choose(feat, backend):
    facts = Facts(feat.device, feat.dtype, feat.shape[1])
    return _RUNNERS[dispatch.OPS["unmask_attention"].choose(dispatch.wished(backend), facts)]


def _check(feat, weight, *others):
    """What the kernels rely on for their memory's sake; the functional's errors are the ones that explain."""
    dtype = torch.float64 if feat.dtype == torch.float64 else torch.float32
    expected = [(weight, (len(feat), feat.shape[2]), dtype)]
    if others:
        grad, out, softmax = others
        expected += [(t, feat.shape, feat.dtype) for t in (grad, out)]
        expected += [(softmax, (len(feat), 2, feat.shape[2]), dtype)]
    for tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != feat.device:
            got = f"{list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
            raise ValueError(f"expected {list(shape)}, {dtype} on {feat.device}; got {got}")


def _forward(feat, weight, scale, mask_keys, backend):
    _check(feat, weight)
    return _choose(feat, backend)[0](feat, weight, scale, mask_keys)


def _forward_fake(feat, weight, *_):
    return feat.new_empty(feat.shape), weight.new_empty(len(weight), 2, weight.shape[1])


def _backward(grad, feat, weight, out, softmax, scale, mask_keys, backend):
    _check(feat, weight, grad, out, softmax)
    return _choose(feat, backend)[1](grad, feat, weight, out, softmax, scale, mask_keys)


def _backward_fake(grad, feat, *_):
    return feat.new_empty(feat.shape)


unmask_attention = define(f"unmask_attention({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
unmask_attention_backward = define(
    "unmask_attention_backward(Tensor grad, Tensor feat, Tensor weight, Tensor out, Tensor softmax, float scale,"
    " bool mask_keys, str backend) -> Tensor",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    feat, weight, *ctx.form = inputs
    ctx.save_for_backward(feat, weight, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    feat, weight, out, softmax = ctx.saved_tensors
    return unmask_attention_backward(grad, feat, weight, out, softmax, *ctx.form), *[None] * (1 + len(ctx.form))


torch.library.register_autograd("inr_kernels::unmask_attention", _autograd, setup_context=_setup_context, lib=LIBRARY)
forbid_second_derivative("unmask_attention")
