"""How torch knows local_implicit: schemas, fakes, autograd, and the choice of the backend.

The op starts from the hoisted first layer, `conv(feat) + b1` of the functional, so that torch's own convolution
and its gradient serve it; `height` and `band_start` place a band of rows in the whole map.

    hoisted [B, rows, w, N1], y, x [B, R, S] float32 with any strides, cell [B, R, S, 2] float32 or None,
    position_weight [N1, 2 or 4], weights[i] [N(i+2), N(i+1)], biases[i] [N(i+2)]  ->  [B, R, S, out_channels]
"""

import functools
from dataclasses import dataclass

import torch

from inr_kernels._core import backends, dispatch, native
from inr_kernels._core.registration import LIBRARY, define, forbid_second_derivative

from . import reference

_ARGUMENTS = (
    "Tensor hoisted, Tensor y, Tensor x, Tensor? cell, Tensor position_weight, Tensor[] weights, Tensor[] biases,"
    " SymInt height, SymInt band_start, bool local_ensemble, bool ensemble_first, str backend"
)


_REFERENCE_QUERIES = 1 << 14
_WIDEST_ON_CHIP = 256


@dataclass(frozen=True)
class Facts(backends.Facts):
    """With the widths of the layers from the hoisted one on."""

    widths: tuple[int, ...] = ()


def _triton_kernels():
    from . import triton_kernels

    return triton_kernels


why_not_triton = functools.partial(backends.why_not_triton, _triton_kernels)


def why_not_cpu(facts: Facts) -> str:
    """The C++ kernels: CPU tensors; half precision is computed in float32 where the processor lacks it."""
    if reason := backends.why_not_cpu(facts):
        return reason
    depth, most = len(facts.widths) - 1, native.load()[0].max_depth
    return f"it takes at most {most} layers after the first; got {depth}" if depth > most else ""


def why_not_cuda(facts: Facts) -> str:
    """The CUDA C++ kernels: half precision, the hidden state of a row in a warp's registers."""
    if reason := backends.why_not_cuda(facts):
        return reason
    if max(facts.widths[:-1], default=0) > _WIDEST_ON_CHIP:
        return f"it takes layers of at most {_WIDEST_ON_CHIP} channels before the last; got {max(facts.widths[:-1])}"
    depth, most = len(facts.widths) - 1, native.load()[0].max_depth
    return f"it takes at most {most} layers after the first; got {depth}" if depth > most else ""


@torch.compiler.assume_constant_result
def cpu_has_bfloat16() -> bool:
    """Whether the C++ kernels multiply bfloat16 natively on this processor."""
    library = native.load()[0]
    return library is not None and library.isa() == "avx512bf16"


def centres(n: int, device: torch.device):
    """The table of pixel centres, computed on the CPU: a device's own arithmetic may round otherwise."""
    return reference.pixel_centres(n).to(device) if torch.compiler.is_compiling() else _kept_centres(n, device)


@functools.cache  # for good: a CUDA graph reads its table by address
def _kept_centres(n, device):
    with torch.inference_mode(False):
        return reference.pixel_centres(n).to(device)


class _Problem:
    """A native problem with the tensors that its addresses point into."""

    def __init__(
        self,
        hoisted,
        y,
        x,
        cell,
        position_weight,
        weights,
        biases,
        height,
        band_start,
        local_ensemble,
        first,
    ):
        batch, rows, width, channels = hoisted.shape
        hoisted, position_weight = hoisted.contiguous(), position_weight.contiguous()
        weights, biases = [w.contiguous() for w in weights], [b.contiguous() for b in biases]
        # A GPU computes them itself: copies to it would break the capture of a graph.
        on_cpu = hoisted.device.type == "cpu"
        tables = [centres(n, hoisted.device) if on_cpu else None for n in (height, width)]
        self.held = (hoisted, y, x, cell, position_weight, weights, biases, tables)
        self.native = native.load()[0].LocalImplicit(
            type=backends.TYPES[hoisted.dtype],
            queries=tuple(y.shape),
            size=(height, width),
            band=(band_start, rows),
            local_ensemble=local_ensemble,
            ensemble_first=first,
            widths=[channels, *(len(w) for w in weights)],
            y=(y.data_ptr(), y.stride()),
            x=(x.data_ptr(), x.stride()),
            cell=(backends.address(cell), cell.stride() if cell is not None else (0, 0, 0, 0)),
            centre_y=backends.address(tables[0]),
            centre_x=backends.address(tables[1]),
            hoisted=hoisted.data_ptr(),
            position_weight=position_weight.data_ptr(),
            weights=[w.data_ptr() for w in weights],
            biases=[b.data_ptr() for b in biases],
            threads=torch.get_num_threads(),
        )

    def forward(self, out):
        self.native.forward(out.data_ptr())

    def forward_cuda(self, out, wgmma):
        workspace = out.new_empty(self.native.workspace_cuda(), dtype=torch.uint8)
        self.native.forward_cuda(wgmma, out.data_ptr(), workspace.data_ptr(), backends.stream(out.device))

    def backward(self, grad, hoisted, position_weight, weights, biases):
        self.native.backward(
            grad_out=grad.data_ptr(),
            hoisted=backends.address(hoisted),
            position_weight=backends.address(position_weight),
            weights=[w.data_ptr() for w in weights],
            biases=[b.data_ptr() for b in biases],
        )


def _cast(args, dtype):
    hoisted, y, x, cell, position_weight, weights, biases, *rest = args
    weights, biases = [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    return hoisted.to(dtype), y, x, cell, position_weight.to(dtype), weights, biases, *rest


def _cpu_forward(*args):
    hoisted, y = args[0], args[1]
    dtype = hoisted.dtype
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu_has_bfloat16()):
        return _cpu_forward(*_cast(args, torch.float32)).to(dtype)
    out = hoisted.new_empty(*y.shape, len(args[5][-1]))
    if out.numel():
        _Problem(*args).forward(out)
    return out


cuda_kernel = ""  # a benchmark's wish: "mma" or "wgmma"


def uses_wgmma(hoisted, weights) -> bool:
    """Which CUDA kernel runs: wgmma's on Hopper where it has what to multiply, hidden layers padded to 256 channels."""
    fits = len(weights) > 1 and max(hoisted.shape[-1], *map(len, weights[:-1])) > 128
    if cuda_kernel == "wgmma" and not fits:
        raise ValueError("wgmma wants a hidden layer and more than 128 channels before the last")
    if cuda_kernel:
        return cuda_kernel == "wgmma"
    return fits and hoisted.is_cuda and torch.cuda.get_device_capability(hoisted.device) == (9, 0)


def _cuda_forward(*args):
    hoisted, y = args[0], args[1]
    out = hoisted.new_empty(*y.shape, len(args[5][-1]))
    if out.numel():
        with backends.on(out.device):
            _Problem(*args).forward_cuda(out, uses_wgmma(hoisted, args[5]))
    return out


def _cpu_backward(grad, *args, needs_hoisted, needs_weights):
    dtype = args[0].dtype
    if dtype not in (torch.float32, torch.float64):
        args = _cast(args, torch.float32)
        grad = grad.float()
    hoisted, position_weight, weights, biases = args[0], args[4], args[5], args[6]
    grad = grad.contiguous()
    d_hoisted = torch.empty_like(hoisted, memory_format=torch.contiguous_format) if needs_hoisted else None
    d_position, d_weights, d_biases = None, [], []
    if needs_weights:
        empty = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
        d_position, d_weights, d_biases = (
            empty(position_weight),
            [*map(empty, weights)],
            [*map(empty, biases)],
        )
    if grad.numel():
        _Problem(*args).backward(grad, d_hoisted, d_position, d_weights, d_biases)
    else:
        for g in filter(lambda g: g is not None, [d_hoisted, d_position, *d_weights, *d_biases]):
            g.zero_()
    to = functools.partial(torch.Tensor.to, dtype=dtype)
    return (
        to(d_hoisted) if needs_hoisted else None,
        to(d_position) if needs_weights else None,
        [*map(to, d_weights)],
        [*map(to, d_biases)],
    )


def _reference_forward(hoisted, y, x, cell, position_weight, weights, biases, *rest):
    """Some thousand queries at a time: this, too, is to run in bounded memory."""
    batch, rows, cols = y.shape
    out = hoisted.new_empty(batch, rows, cols, len(weights[-1]))
    some_rows = max(1, _REFERENCE_QUERIES // max(1, batch * cols))
    some_cols = max(1, _REFERENCE_QUERIES // max(1, batch))
    for row in range(0, rows, some_rows):
        for col in range(0, cols, some_cols):
            part = slice(None), slice(row, row + some_rows), slice(col, col + some_cols)
            queries = y[part], x[part], None if cell is None else cell[part]
            out[part] = reference.decode(hoisted, *queries, position_weight, weights, biases, *rest)
    return out


def _reference_backward(grad, *args, needs_hoisted, needs_weights):
    hoisted, y, x, cell, position_weight, weights, biases, *rest = args

    def decode(hoisted, position_weight, weights, biases):
        return reference.decode(hoisted, y, x, cell, position_weight, weights, biases, *rest)

    # Below autograd, where ops run, only torch.func still differentiates.
    _, backward = torch.func.vjp(decode, hoisted, position_weight, list(weights), list(biases))
    grads = backward(grad)
    return grads[0] if needs_hoisted else None, *(grads[1:] if needs_weights else (None, [], []))


_TRITON = backends.triton_runner(_triton_kernels)
_RUNNERS = {
    "cpu": (_cpu_forward, _cpu_backward),
    "triton": _TRITON,
    "cuda": (_cuda_forward, _TRITON[1]),
    "reference": (_reference_forward, _reference_backward),
}


def _choose(hoisted, weights, backend):
    facts = Facts(hoisted.device, hoisted.dtype, (hoisted.shape[-1], *(len(w) for w in weights)))
    return _RUNNERS[dispatch.OPS["local_implicit"].choose(dispatch.wished(backend), facts)]


def _check(hoisted, y, x, cell, position_weight, weights, biases, height, band_start, _, ensemble_first, grad=None):
    """What the kernels rely on for their memory's sake; the functional's errors are the ones that explain."""
    batch, rows, width, inputs = hoisted.shape
    with_cell = 2 if cell is not None else 0
    expected = [(position_weight, (inputs, 2 + (0 if ensemble_first else with_cell)), hoisted.dtype)]
    inputs += with_cell if ensemble_first else 0
    for weight, bias in zip(weights, biases, strict=True):
        expected += [
            (weight, (len(weight), inputs), hoisted.dtype),
            (bias, (len(weight),), hoisted.dtype),
        ]
        inputs = len(weight)
    expected += [(t, (batch, *y.shape[1:]), torch.float32) for t in (y, x)]
    expected += [(cell, (*y.shape, 2), torch.float32)] if with_cell else []
    expected += [(grad, (*y.shape, inputs), hoisted.dtype)] if grad is not None else []
    for tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != hoisted.device:
            got = f"{list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
            raise ValueError(f"expected {list(shape)}, {dtype} on {hoisted.device}; got {got}")
    if y.dim() != 3 or not weights or not (rows and width) or not 0 <= band_start <= height - rows:
        raise ValueError(
            f"queries must be [B, R, S] and rows [{band_start}, {band_start + rows}) lie in the map's {height}"
        )


def _forward(*args):
    *problem, backend = args
    _check(*problem)
    return _choose(problem[0], problem[5], backend)[0](*problem)


def _forward_fake(hoisted, y, x, cell, position_weight, weights, biases, *_):
    return hoisted.new_empty(*y.shape, weights[-1].shape[0])


def _backward(grad, *args):
    *problem, backend, needs_hoisted, needs_weights = args
    _check(*problem, grad=grad)
    grads = _choose(problem[0], problem[5], backend)[1](
        grad, *problem, needs_hoisted=needs_hoisted, needs_weights=needs_weights
    )
    none = grad.new_empty(0)  # a schema has no optional results
    return (
        none if grads[0] is None else grads[0],
        none.clone() if grads[1] is None else grads[1],
        *grads[2:],
    )


def _backward_fake(grad, hoisted, y, x, cell, position_weight, weights, biases, *rest):
    *_, needs_hoisted, needs_weights = rest
    empty = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    return (
        empty(hoisted) if needs_hoisted else grad.new_empty(0),
        empty(position_weight) if needs_weights else grad.new_empty(0),
        [empty(w) for w in weights] if needs_weights else [],
        [empty(b) for b in biases] if needs_weights else [],
    )


local_implicit = define(f"local_implicit({_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
local_implicit_backward = define(
    f"local_implicit_backward(Tensor grad, {_ARGUMENTS}, bool needs_hoisted, bool needs_weights)"
    " -> (Tensor, Tensor, Tensor[], Tensor[])",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    hoisted, y, x, cell, position_weight, weights, biases, *ctx.rest = inputs
    ctx.has_cell, ctx.depth = cell is not None, len(weights)
    ctx.save_for_backward(hoisted, y, x, position_weight, *weights, *biases, *([cell] if ctx.has_cell else []))


def _autograd(ctx, grad):
    hoisted, y, x, position_weight, *lists = ctx.saved_tensors
    weights, biases = lists[: ctx.depth], lists[ctx.depth : 2 * ctx.depth]
    cell = lists[-1] if ctx.has_cell else None
    flags = torch.utils._pytree.tree_leaves([ctx.needs_input_grad[4], *ctx.needs_input_grad[5:7]])
    needs = ctx.needs_input_grad[0], any(flags)
    d_hoisted, d_position, d_weights, d_biases = local_implicit_backward(
        grad, hoisted, y, x, cell, position_weight, weights, biases, *ctx.rest, *needs
    )
    return (
        d_hoisted if needs[0] else None,
        *(None, None, None),
        *((d_position, d_weights, d_biases) if needs[1] else (None, [None] * ctx.depth, [None] * ctx.depth)),
        *(None,) * len(ctx.rest),
    )


torch.library.register_autograd("inr_kernels::local_implicit", _autograd, setup_context=_setup_context, lib=LIBRARY)
forbid_second_derivative("local_implicit")
