"""The op mlp in torch: schema, fake, autograd, and the table of backends.

x [..., C], weights n x [O_i, O_{i - 1}], biases n x [O_i], norm [C], add [..., O_n]  ->  [..., O_n]

In C++ for float32 and float64 on a CPU, and for half precision where torch is slow; elsewhere torch's layers. The
backward consists of differentiable operations, so there are derivatives of every order.
"""

import functools

import torch
import torch.nn.functional as F

from inr_kernels._core import backends, native
from inr_kernels._core.checks import without_autocast
from inr_kernels._core.dispatch import Backend, Op, always
from inr_kernels._core.registration import define, register_autograd

from .. import reference
from ..arguments import ACTIVATIONS, MlpArguments, MlpFacts


def why_not_native(facts: MlpFacts) -> str:
    """Why the C++ kernel does not take a call, "" if it does."""
    if reason := backends.why_not_float(facts):
        return reason
    most = native.load()[0].max_depth
    return f"it takes at most {most} layers; got {facts.depth}" if facts.depth > most else ""


def _output(a):
    """The uninitialized output."""
    return a.x.new_empty(a.out_shape())


def _native(a):
    if 0 in a.out_shape():
        return _output(a)
    dtype = torch.promote_types(a.x.dtype, torch.float32)
    out = a.x.new_empty(a.out_shape(), dtype=dtype)
    read = functools.partial(backends.readable, dtype=dtype)
    weights, biases = (list(map(read, tensors)) for tensors in (a.weights, a.biases))
    x, norm_weight, norm_bias, add = map(read, (a.x, a.norm_weight, a.norm_bias, a.add))
    native.load()[0].mlp(
        type=backends.TYPES[x.dtype],
        rows=x.numel() // x.shape[-1],
        widths=[x.shape[-1], *map(len, weights)],
        activation=ACTIVATIONS.index(a.activation),
        eps=a.eps,
        x=x.data_ptr(),
        norm_weight=backends.address(norm_weight),
        norm_bias=backends.address(norm_bias),
        weights=[t.data_ptr() for t in weights],
        biases=[t.data_ptr() for t in biases],
        add=backends.address(add),
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out.to(a.x.dtype)


def _reference(a):
    return reference.mlp(*a)


MLP = Op(
    "mlp",
    MlpArguments,
    {
        "cpu": Backend(why_not_native, _native),
        "reference": Backend(always, _reference),
        # torch's layers, so that "triton" can be requested for a whole network.
        "triton": Backend(always, _reference),
    },
    warns=False,  # the reference is torch's own layers
)


mlp = define(
    "mlp(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? norm_weight, Tensor? norm_bias, Tensor? add,"
    " str activation, float eps, str backend) -> Tensor",
    MLP.forward,
    MLP.fake(_output),
)


def _setup_context(ctx, inputs, output):
    x, weights, biases, norm_weight, norm_bias, _, ctx.activation, ctx.eps, _ = inputs
    ctx.depth = len(weights)
    ctx.save_for_backward(x, norm_weight, norm_bias, *weights, *biases)


def _autograd(ctx, grad):
    with without_autocast(grad):
        return *_gradients(ctx, grad, *ctx.needs_input_grad[:6]), None, None, None


def _gradients(ctx, grad, needs_x, needs_weights, needs_biases, needs_norm, needs_norm_bias, needs_add):
    x, norm_weight, norm_bias, *layers = ctx.saved_tensors
    weights, biases = layers[: ctx.depth], layers[ctx.depth :]
    d_x = d_norm = d_norm_bias = None
    d_weights, d_biases = [None] * ctx.depth, [None] * ctx.depth
    d_add = grad if needs_add else None
    inputs, sums = [x], []  # of the layers, computed again
    if norm_weight is not None:
        inputs[0], mean, scale = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, ctx.eps)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        sums.append(F.linear(inputs[-1], weight, bias))
        inputs.append(reference.ACTIVATION[ctx.activation](sums[-1]))
    first = needs_x, needs_norm, needs_norm_bias
    for i in reversed(range(ctx.depth)):
        rows = grad.reshape(-1, grad.shape[-1])
        if needs_weights[i]:
            d_weights[i] = rows.mT @ inputs[i].reshape(-1, inputs[i].shape[-1])
        if needs_biases[i]:
            d_biases[i] = rows.sum(0)
        if i:
            grad = _ACTIVATION_BACKWARD[ctx.activation](grad @ weights[i], sums[i - 1])
    if any(first):
        d_x = grad @ weights[0]
        if norm_weight is not None:
            saved = x, x.shape[-1:], mean, scale, norm_weight, norm_bias
            d_x, d_norm, d_norm_bias = torch.ops.aten.native_layer_norm_backward(d_x, *saved, list(first))
    return d_x if needs_x else None, d_weights, d_biases, d_norm, d_norm_bias, d_add


_ACTIVATION_BACKWARD = {
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "gelu": lambda grad, x: torch.ops.aten.gelu_backward(grad, x),
}

register_autograd("mlp", _setup_context, _autograd)
