"""The ops local_implicit and local_texture in torch: schemas, fakes, autograd, and the tables of backends.

The op starts from the hoisted first layer, `conv(feat) + b1`, which the functional computes with torch's own
convolution and its gradient; `height` and `band_start` place a band of rows in the whole map.

    hoisted [B, rows, w, N1], y, x [B, R, S] float32 with any strides, cell [B, R, S, 2] float32 or None,
    position_weight [N1, 2 or 4], weights[i] [N(i+2), N(i+1)], biases[i] [N(i+2)]  ->  [B, R, S, out_channels]

local_texture is LTE's decoder: the same but for the first layer, which multiplies coefficients by cosines and sines of
the position. Its schema is the same, with hoisted [B, rows, w, 4 K], position_weight [K, 2] and N1 = 2 K, see
`reference.decode_texture`.

The op mlp has its own file.
"""

import functools

import torch

from inr_kernels._core import backends, native
from inr_kernels._core.dispatch import Backend, Op, always
from inr_kernels._core.registration import (
    define,
    fake_gradients,
    forbid_second_derivative,
    register_autograd,
    schema_results,
)

from .. import reference
from ..arguments import Arguments, Facts, TextureArguments
from .mlp import MLP as MLP
from .mlp import mlp as mlp

_ARGUMENTS = (
    "Tensor hoisted, Tensor y, Tensor x, Tensor? cell, Tensor position_weight, Tensor[] weights, Tensor[] biases,"
    " SymInt height, SymInt band_start, bool local_ensemble, bool ensemble_first, str backend"
)
_REFERENCE_QUERIES = 1 << 14  # queries that the reference decodes at a time
_MAX_CUDA_WIDTH = 256


def _why_not_depth(facts):
    depth, max_depth = len(facts.widths) - 1, native.load()[0].max_depth
    return f"it takes at most {max_depth} layers after the first; got {depth}" if depth > max_depth else ""


def why_not_cpu(facts: Facts) -> str:
    """Why the C++ kernels cannot run: they take CPU tensors, up to a depth."""
    return backends.why_not_cpu(facts) or _why_not_depth(facts)


def why_not_cuda(facts: Facts) -> str:
    """Why the CUDA C++ kernels cannot run: they take half precision, and keep a row's hidden state in registers."""
    if reason := backends.why_not_cuda(facts):
        return reason
    widest = max(facts.widths[:-1], default=0)
    if widest > _MAX_CUDA_WIDTH:
        return f"it takes layers of at most {_MAX_CUDA_WIDTH} channels before the last; got {widest}"
    return _why_not_depth(facts)


@torch.compiler.assume_constant_result
def cpu_has_bfloat16() -> bool:
    """Whether the C++ kernels multiply bfloat16 natively on this processor."""
    library = native.load()[0]
    return library is not None and library.isa() in ("avx512bf16", "amx")


def centres(n: int, device: torch.device) -> torch.Tensor:
    """[n] float32: the pixel centres, computed on the CPU, as another device may round differently."""
    return reference.pixel_centres(n).to(device) if torch.compiler.is_compiling() else _cached_centres(n, device)


@functools.cache  # never evicted: a CUDA graph reads its table by address
def _cached_centres(n, device):
    with torch.inference_mode(False):
        return reference.pixel_centres(n).to(device)


class _Native(backends.NativeProblem):
    """The native problem, with an additional forward for CUDA."""

    def __init__(self, a: Arguments):
        rows, width = a.hoisted.shape[1:3]
        hoisted, position_weight = a.hoisted.contiguous(), a.position_weight.contiguous()
        weights, biases = [w.contiguous() for w in a.weights], [b.contiguous() for b in a.biases]
        # A GPU kernel computes the centres itself: a copy to the GPU would break the capture of a graph.
        on_cpu = hoisted.device.type == "cpu"
        centre_y, centre_x = (centres(n, hoisted.device) if on_cpu else None for n in (a.height, width))
        problem = native.load()[0].LocalImplicit(
            type=backends.TYPES[hoisted.dtype],
            queries=tuple(a.y.shape),
            size=(a.height, width),
            band=(a.band_start, rows),
            local_ensemble=a.local_ensemble,
            ensemble_first=a.ensemble_first,
            texture=a.texture,
            widths=[a.channels, *map(len, weights)],
            y=(a.y.data_ptr(), a.y.stride()),
            x=(a.x.data_ptr(), a.x.stride()),
            cell=(backends.address(a.cell), a.cell.stride() if a.cell is not None else (0, 0, 0, 0)),
            centre_y=backends.address(centre_y),
            centre_x=backends.address(centre_x),
            hoisted=hoisted.data_ptr(),
            position_weight=position_weight.data_ptr(),
            weights=[w.data_ptr() for w in weights],
            biases=[b.data_ptr() for b in biases],
            threads=torch.get_num_threads(),
        )
        super().__init__(problem, a, hoisted, position_weight, weights, biases, centre_y, centre_x)

    def forward_cuda(self, out: torch.Tensor, wgmma: bool) -> None:
        """Runs one of the CUDA kernels."""
        workspace = out.new_empty(self.problem.workspace_cuda(), dtype=torch.uint8)
        self.problem.forward_cuda(wgmma, out.data_ptr(), workspace.data_ptr(), backends.stream(out.device))


def _output(a):
    """The uninitialized output."""
    return a.hoisted.new_empty(a.out_shape())


def _cpu_forward(a):
    dtype = a.hoisted.dtype
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu_has_bfloat16()):
        return _cpu_forward(a.to(torch.float32)).to(dtype)
    out = _output(a)
    if out.numel():
        _Native(a).forward(out.data_ptr())
    return out


def _cpu_backward(grad, a, *, needs_hoisted, needs_weights):
    dtype = a.hoisted.dtype
    if dtype not in (torch.float32, torch.float64):
        grad, a = grad.float(), a.to(torch.float32)
    grad = grad.contiguous()
    empty = grad.new_empty if grad.numel() else grad.new_zeros
    d_hoisted, d_position, d_weights, d_biases = None, None, [], []
    if needs_hoisted:
        d_hoisted = empty(a.hoisted.shape)
    if needs_weights:
        d_position = empty(a.position_weight.shape)
        d_weights, d_biases = ([empty(t.shape) for t in tensors] for tensors in (a.weights, a.biases))
    if grad.numel():
        _Native(a).backward(
            grad_out=grad.data_ptr(),
            hoisted=backends.address(d_hoisted),
            position_weight=backends.address(d_position),
            weights=[d.data_ptr() for d in d_weights],
            biases=[d.data_ptr() for d in d_biases],
        )
    d_hoisted, d_position = (None if d is None else d.to(dtype) for d in (d_hoisted, d_position))
    return d_hoisted, d_position, [d.to(dtype) for d in d_weights], [d.to(dtype) for d in d_biases]


def uses_wgmma(a: Arguments, kernel: str = "") -> bool:
    """Whether the CUDA kernel with wgmma runs, which pads hidden layers to 256 channels, rather than the one with mma.

    kernel: "wgmma" or "mma" to force one of them; "": wgmma on Hopper where there are enough channels.
    """
    fits = len(a.weights) > 1 and max(a.hoisted.shape[-1], *map(len, a.weights[:-1])) > 128
    if kernel == "wgmma" and not fits:
        raise ValueError("kernel 'wgmma' needs a hidden layer and more than 128 channels before the last")
    if kernel:
        return kernel == "wgmma"
    return fits and a.hoisted.is_cuda and torch.cuda.get_device_capability(a.hoisted.device) == (9, 0)


def _cuda_forward(a, kernel=""):
    out = _output(a)
    if out.numel():
        with backends.on(out.device):
            _Native(a).forward_cuda(out, uses_wgmma(a, kernel))
    return out


def _decode(a):
    return (reference.decode_texture if a.texture else reference.decode)(*a)


def _reference_forward(a):
    """Decodes `_REFERENCE_QUERIES` queries at a time: the reference runs in bounded memory."""
    batch, rows, cols = a.y.shape
    out = _output(a)
    row_step = max(1, _REFERENCE_QUERIES // max(1, batch * cols))
    col_step = max(1, _REFERENCE_QUERIES // max(1, batch))
    for row in range(0, rows, row_step):
        for col in range(0, cols, col_step):
            part = slice(None), slice(row, row + row_step), slice(col, col + col_step)
            cell = None if a.cell is None else a.cell[part]
            out[part] = _decode(a._replace(y=a.y[part], x=a.x[part], cell=cell))
    return out


def _reference_backward(grad, a, *, needs_hoisted, needs_weights):
    def run(hoisted, position_weight, weights, biases):
        changes = {"hoisted": hoisted, "position_weight": position_weight, "weights": weights, "biases": biases}
        return _decode(a._replace(**changes))

    d_hoisted, d_position, d_weights, d_biases = backends.vjp(
        run, grad, a.hoisted, a.position_weight, list(a.weights), list(a.biases)
    )
    d_hoisted = d_hoisted if needs_hoisted else None
    return (d_hoisted, d_position, d_weights, d_biases) if needs_weights else (d_hoisted, None, [], [])


_TRITON = backends.triton_backend("inr_kernels.local_implicit.triton_kernels")


def cuda_backend(kernel: str = "") -> Backend:
    """The CUDA C++ kernels; their backward is Triton's. kernel: "wgmma" or "mma" to force one (`uses_wgmma`)."""
    return Backend(why_not_cuda, functools.partial(_cuda_forward, kernel=kernel), _TRITON.backward)


_SHARED = {
    "cpu": Backend(why_not_cpu, _cpu_forward, _cpu_backward),
    "reference": Backend(always, _reference_forward, _reference_backward),
    # After the reference, so opt-in where no verdict decides.
    "triton": _TRITON,
}
OP = Op("local_implicit", Arguments, _SHARED | {"cuda": cuda_backend()})
TEXTURE = Op("local_texture", TextureArguments, dict(_SHARED))


def _register(op):
    """Registers the op in torch; returns it."""

    def backward(grad, *args):
        *args, needs_hoisted, needs_weights = args
        a, backend = op.select(*args, backward=True)
        a.check_gradient(grad)
        grads = backend.backward(grad, a, needs_hoisted=needs_hoisted, needs_weights=needs_weights)
        return schema_results(grads, like=grad)

    forward = define(f"{op.name}({_ARGUMENTS}) -> Tensor", op.forward, op.fake(_output))
    backward_op = define(
        f"{op.name}_backward(Tensor grad, {_ARGUMENTS}, bool needs_hoisted, bool needs_weights)"
        " -> (Tensor, Tensor, Tensor[], Tensor[])",
        backward,
        _backward_fake,
    )
    register_autograd(op.name, _setup_context, functools.partial(_autograd, backward_op))
    forbid_second_derivative(op.name)
    return forward


def _backward_fake(grad, *args):
    *arguments, _, needs_hoisted, needs_weights = args
    a = Arguments(*arguments)
    needs = needs_hoisted, needs_weights
    lists = ([t.new_empty(t.shape) for t in ts] if needs_weights else [] for ts in (a.weights, a.biases))
    return *fake_gradients((a.hoisted, a.position_weight), needs, like=grad), *lists


def _setup_context(ctx, inputs, output):
    hoisted, y, x, cell, position_weight, weights, biases, *ctx.options = inputs
    ctx.has_cell, ctx.depth = cell is not None, len(weights)
    ctx.save_for_backward(hoisted, y, x, position_weight, *weights, *biases, *([cell] if ctx.has_cell else []))


def _autograd(backward, ctx, grad):
    hoisted, y, x, position_weight, *lists = ctx.saved_tensors
    weights, biases = lists[: ctx.depth], lists[ctx.depth : 2 * ctx.depth]
    cell = lists[-1] if ctx.has_cell else None
    needs_hoisted, _, _, _, *needs_parameters = ctx.needs_input_grad[:7]
    needs_weights = any(torch.utils._pytree.tree_leaves(needs_parameters))
    d_hoisted, *d_parameters = backward(
        grad, hoisted, y, x, cell, position_weight, weights, biases, *ctx.options, needs_hoisted, needs_weights
    )
    if not needs_weights:
        d_parameters = None, [None] * ctx.depth, [None] * ctx.depth
    return d_hoisted if needs_hoisted else None, None, None, None, *d_parameters, *[None] * len(ctx.options)


local_implicit = _register(OP)
local_texture = _register(TEXTURE)
