"""The Triton backend of local_implicit and local_texture: its limits, launches and block sizes.

In half precision, up to a width of 256, one kernel takes a query from its coordinates to its colours and the hidden
state stays in registers. In float32, or wider, the state does not fit the registers: runs of queries pass through a
bounded workspace, and their hidden layers through torch's own matrix products.

Tested in Triton's interpreter and compiled ahead of time (tests/build/test_compile_only.py); not run on a GPU.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton

from inr_kernels._core import backends

from . import kernels
from .first_layer import Axis, Queries

WIDEST = 256  # maximum width of hidden layers in registers; wider ones, and float32's, pass through the workspace
WORKSPACE = 64 << 20  # bytes of hidden states and their gradients that the backward keeps at a time
SPLITS = 8  # partial sums of a weight's gradient: fixed, so that the order of summation is the same on every device
why_not = backends.why_not_dot


class Config(NamedTuple):
    """Block sizes: rows of a program, channels of a chunk, threads in warps."""

    rows: int
    chunk: int
    warps: int


def config(widest: int, itemsize: int, capability: tuple[int, int], first: bool) -> Config:
    """The block sizes for hidden layers up to `widest`."""
    chunk = min(64, max(16, triton.next_power_of_2(widest)))
    if itemsize == 2 and capability[0] == 9 and 128 < widest <= 256 and not first:
        chunk = 128  # 96 KB of shared memory, a wider wgmma; with the ensemble first it spills
    width = triton.cdiv(widest, chunk) * chunk
    rows = 64 if itemsize == 4 or width > 256 else 128
    return Config(rows, chunk, 8)


def fused(widest: int, itemsize: int) -> bool:
    """Whether the hidden state fits the registers; in float32, or wider, the compiler spills kilobytes of it."""
    return itemsize == 2 and widest <= WIDEST


class _Problem:
    """A call's tensors in the layouts that the kernels read, and its launches."""

    def __init__(
        self, hoisted, y, x, cell, position_weight, weights, biases, height, band_start, local_ensemble, first
    ):
        self.hoisted, self.y, self.x, self.cell = hoisted.contiguous(), y, x, cell
        self.batch, self.band_rows, self.width, channels = hoisted.shape
        self.texture = len(position_weight) != channels  # local_texture: 4 K channels, a row for each of K phases
        self.channels = channels // 2 if self.texture else channels
        self.height, self.band_start = height, band_start
        self.ensemble, self.first = local_ensemble, first
        self.neighbours = 4 if local_ensemble else 1
        self.per_query = 1 if first else self.neighbours
        self.out, self.depth = len(weights[-1]), len(weights) - 1
        widths = [self.channels, *map(len, weights[:-1])]
        self.config = config(max(widths), hoisted.element_size(), capability(hoisted.device), first)
        self.fused = fused(max(widths), hoisted.element_size())
        self.W = triton.cdiv(max(widths), self.config.chunk) * self.config.chunk
        self.BO = min(64, max(16, triton.next_power_of_2(self.out)))
        self.OP = triton.cdiv(self.out, self.BO) * self.BO
        self.columns = 4 if self.texture else position_weight.shape[1]  # inputs of the first layer
        self.late_cell = first and cell is not None
        self.widths = [*widths, self.out]
        self._pack(position_weight, weights, biases)

    def _pack(self, position_weight, weights, biases):
        """Copies all parameters, zero-padded, into two buffers with two calls."""
        W, L, P = self.W, self.depth, max(self.W, self.OP)
        self.P = P
        matrices = self.hoisted.new_zeros(L * W + self.OP, W)
        self.hidden, self.last = matrices[: L * W].view(L, W, W), matrices[L * W :]
        vectors = self.hoisted.new_zeros((L + 1) * 3 * P + 4 * W, dtype=torch.float32)
        self.affine, self.position = vectors[: -4 * W].view(L + 1, 3, P), vectors[-4 * W :].view(4, W)
        torch._foreach_copy_(
            [m[: self.widths[i + 1], : self.widths[i]] for i, m in enumerate([*self.hidden, self.last])],
            [w[:, :n] for w, n in zip(weights, self.widths[:-1], strict=True)],
        )
        to = [self.position[: position_weight.shape[1], : len(position_weight)]]
        to += [self.affine[i, 0, : len(b)] for i, b in enumerate(biases)]
        source = [position_weight.T, *biases]
        if self.late_cell:
            to.append(self.affine[0, 1:, : self.widths[1]])
            source.append(weights[0][:, -2:].T)
        torch._foreach_copy_(to, source)

    def queries(self, begin, end):
        no = (0, 0, 0, 0)
        return Queries(
            self.y,
            self.x,
            self.cell,
            self.y.stride(),
            self.x.stride(),
            self.cell.stride() if self.cell is not None else no,
            self.y.shape[1],
            self.y.shape[2],
            begin,
            end,
            self._axis(self.height),
            self._axis(self.width),
            self.band_start,
            self.band_rows,
        )

    def _axis(self, n):
        # Computed in double precision and rounded once, as a kernel's argument, as PyTorch rounds its scalars.
        radius, eps = 2 / n / 2, 1e-6
        low, high = (-radius + eps, radius + eps) if self.ensemble else (0.0, 0.0)
        return Axis(n, low, high, -1 + 2 / (2 * n), 2 * (2 / (2 * n)))

    def longest_run(self, states):
        """The number of queries that fit the workspace with `states` states of each row, a multiple of every block."""
        row = (states * self.W + self.OP + 16) * self.hoisted.element_size()
        columns = self.W + 16 if self.first else self.W + 2 * self.channels if self.texture else 0
        sample = columns * self.hoisted.element_size() + 40  # 40: the sort
        return max(1, WORKSPACE // (self.per_query * row + self.neighbours * sample) // 128) * 128

    def _launch(self, kernel, begin, end, *args, **forms):
        grid = (triton.cdiv((end - begin) * self.per_query, self.config.rows),)
        kernel[grid](
            *args,
            self.queries(begin, end),
            self.depth,
            **forms,
            FUSED=self.fused,
            N_OUT=self.out,
            W=self.W,
            C=self.config.chunk,
            BO=self.BO,
            M=self.config.rows,
            COLUMNS=self.columns,
            LATE_CELL=self.late_cell,
            ENSEMBLE=self.ensemble,
            FIRST=self.first,
            TEXTURE=self.texture,
            PRECISION=backends.precision(),
            num_warps=self.config.warps,
            num_stages=1,
            enable_fp_fusion=False,
        )

    def _decode(self, out, final, states, begin, end):
        tensors = self.hoisted, self.position, self.hidden, self.last, self.affine
        self._launch(kernels.decode, begin, end, out, final, states, *tensors, N1=self.channels, P=self.P)

    def decode(self, out, begin, end):
        """Writes the colours of the queries [begin, end)."""
        if self.fused:
            return self._decode(out, None, None, begin, end)
        shape = (end - begin) * self.per_query, self.W
        a, b = self.hoisted.new_empty(1, *shape), self.hoisted.new_empty(shape)
        self._decode(None, None, a, begin, end)
        a = a[0]
        for layer in range(self.depth):
            a, b = self._hidden_layer(layer, a, b, begin, end), a
        self._decode(out, a, None, begin, end)

    def states(self, states, begin, end):
        """Writes the inputs of all Linears after the first: [L + 1, rows, W]."""
        self._decode(None, None, states, begin, end)
        for layer in range(0 if self.fused else self.depth):
            self._hidden_layer(layer, states[layer], states[layer + 1], begin, end)

    def _hidden_layer(self, layer, state, out, begin, end):
        affine = self.affine[layer, :, : self.W].to(state.dtype)
        torch.addmm(affine[0], state, self.hidden[layer].T, out=out)
        if self.late_cell and layer == 0:
            i, (_, R, S) = torch.arange(begin, end, dtype=torch.long, device=state.device), self.y.shape
            cell_y, cell_x = self.cell[i // S // R, i // S % R, i % S].unbind(-1)
            cell = torch.stack((cell_y * self.height, cell_x * self.width), -1)
            out.addmm_(cell.to(state.dtype), affine[1:])
        return out.relu_()

    def backpropagate(self, grad, run, begin, end):
        pixels = None if self.first else run.pixels
        self._launch(
            kernels.backpropagate,
            begin,
            end,
            run.last_gradients,
            run.gradients,
            run.extras,
            pixels,
            grad,
            run.states,
            self.hidden,
            self.last,
        )
        for layer in reversed(range(0 if self.fused else self.depth)):
            torch.mm(run.gradients[layer + 1], self.hidden[layer], out=run.gradients[layer])
            if layer or not (self.first or self.texture):  # the blend and a texture have no ReLU
                run.gradients[layer].masked_fill_(run.states[layer] <= 0, 0)
        if self.first:
            outputs = run.sample_gradients, run.sample_extras, run.pixels
            self._first_layer_backward(kernels.blend_backward, run, begin, end, *outputs, LATE_CELL=self.late_cell)
        if self.texture:
            outputs = run.sample_gradients, run.phase_gradients
            self._first_layer_backward(kernels.texture_backward, run, begin, end, *outputs)

    def _first_layer_backward(self, kernel, run, begin, end, *outputs, **forms):
        kernel[(triton.cdiv((end - begin) * self.per_query, 64),)](
            *outputs,
            run.gradients[0],
            self.hoisted,
            self.position,
            self.queries(begin, end),
            N1=self.channels,
            W=self.W,
            C=min(32, self.config.chunk),
            M=64,
            **forms,
            ENSEMBLE=self.ensemble,
            num_warps=4,
            enable_fp_fusion=False,
        )


class _Run:
    """The buffers between the backward of a run of queries and the sums of its gradients."""

    def __init__(self, p, queries):
        rows, samples, L, W = queries * p.per_query, queries * p.neighbours, p.depth, p.W
        empty = p.hoisted.new_empty
        self.states, self.gradients = empty(L + 1, rows, W), empty(L + 1, rows, W)
        self.last_gradients, self.extras = empty(1, rows, p.OP), empty(rows, 16)
        self.sample_gradients = empty(samples, W) if p.first else empty(rows, 2 * p.channels) if p.texture else None
        self.phase_gradients = p.hoisted.new_zeros(rows, W) if p.texture else None
        self.sample_extras = empty(samples, 16) if p.first else None
        self.pixels = empty(samples, dtype=torch.int32)

    def of_map(self):
        """The gradients of the map for every query and neighbour."""
        return self.gradients[0] if self.sample_gradients is None else self.sample_gradients

    def of_position(self):
        """The factors of the position weight's gradient for every query and neighbour: [samples, W], [samples, 16]."""
        if self.phase_gradients is not None:
            return self.phase_gradients, self.extras
        return self.of_map(), self.extras if self.sample_extras is None else self.sample_extras


class _Sums:
    """The weights' gradients: partial sums in float32, [SPLITS, levels, outputs, inputs]."""

    def __init__(self, p):
        self.p = p
        zeros = functools.partial(p.hoisted.new_zeros, dtype=torch.float32)
        self.hidden, self.hidden_extras = (zeros(SPLITS, p.depth, p.W, k) for k in (p.W, 16))
        self.last, self.last_extras = (zeros(SPLITS, 1, p.OP, k) for k in (p.W, 16))
        self.position = zeros(SPLITS, 1, p.W, 16)

    def add(self, run):
        if self.p.depth:
            self._add(self.hidden, run.gradients[1:], run.states[:-1])
            self._add(self.hidden_extras, run.gradients[1:], run.extras)
        self._add(self.last, run.last_gradients, run.states[-1])
        self._add(self.last_extras, run.last_gradients, run.extras)
        self._add(self.position, *run.of_position())

    def _add(self, sums, left, right):
        _, levels, N, K = sums.shape
        BN, BK = min(64, N & -N), min(64, K & -K)
        kernels.add_products[N // BN * (K // BK), SPLITS, levels](
            sums,
            left,
            right,
            left.stride(0) if left.dim() == 3 else 0,
            right.stride(0) if right.dim() == 3 else 0,
            right.shape[-2],
            N=N,
            K=K,
            BN=BN,
            BK=BK,
            BR=32,
            SPLITS=SPLITS,
            PRECISION=backends.precision(),
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=False,
        )

    def results(self):
        """d_position_weight, d_weights, d_biases in the dtype of the arguments."""
        p, to = self.p, functools.partial(torch.Tensor.to, dtype=self.p.hoisted.dtype)
        weights = [*self.hidden.sum(0), *self.last.sum(0)]
        extras = [*self.hidden_extras.sum(0), *self.last_extras.sum(0)]
        weights = [w[:n, :k] for w, n, k in zip(weights, p.widths[1:], p.widths[:-1], strict=True)]
        biases = [e[:n, 4] for e, n in zip(extras, p.widths[1:], strict=True)]
        if p.late_cell:
            weights[0] = torch.cat([weights[0], extras[0][: p.widths[1], 2:4]], 1)
        position = self.position.sum(0)[0]
        position = position[: p.channels // 2, 2:4] if p.texture else position[: p.channels, : p.columns]
        return to(position).contiguous(), [to(w).contiguous() for w in weights], [to(b).contiguous() for b in biases]


def _add_to_map(d_map, run, p):
    gradients, channels = run.of_map(), p.hoisted.shape[-1]
    pixels, order = torch.sort(run.pixels, stable=True)
    ends = torch.searchsorted(pixels, pixels, right=True)
    BN, W = min(256, triton.next_power_of_2(channels)), gradients.shape[-1]
    kernels.add_segments[len(pixels), triton.cdiv(channels, BN)](
        d_map, gradients, pixels, order, ends, N1=channels, W=W, BN=BN, BR=8, num_warps=1, enable_fp_fusion=False
    )


def forward(*args: Any) -> torch.Tensor:
    """Takes the op's arguments (op.py), returns [B, R, S, out_channels]."""
    p = _Problem(*args)
    out = p.hoisted.new_empty(*p.y.shape, p.out)
    if out.numel():
        with backends.on(out.device):
            total, longest = out.numel() // p.out, p.longest_run(states=2)
            for begin in range(0, total, total if p.fused else longest):
                p.decode(out, begin, total if p.fused else min(begin + longest, total))
    return out


def backward(
    grad: torch.Tensor, *args: Any, needs_hoisted: bool, needs_weights: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor], list[torch.Tensor]]:
    """Takes the output's gradient and the op's arguments (op.py).

    Returns (d_hoisted or None, d_position_weight or None, [d_weights], [d_biases]). Runs of queries, as many at a time
    as fit WORKSPACE, recompute their states, propagate the gradient back, and add to the sums.
    """
    p = _Problem(*args)
    grad = grad.contiguous()
    with backends.on(grad.device):
        sums = _Sums(p)
        d_map = grad.new_zeros(p.hoisted.shape, dtype=torch.float32)
        total = p.y.numel()
        longest = p.longest_run(states=2 * (p.depth + 1))
        for begin in range(0, total, longest):
            end = min(begin + longest, total)
            run = _Run(p, end - begin)
            p.states(run.states, begin, end)
            p.backpropagate(grad, run, begin, end)
            if needs_weights:
                sums.add(run)
            if needs_hoisted:
                _add_to_map(d_map, run, p)
        d_hoisted = d_map.to(grad.dtype) if needs_hoisted else None
        return d_hoisted, *(sums.results() if needs_weights else (None, [], []))


def capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; that of sm_80 in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
