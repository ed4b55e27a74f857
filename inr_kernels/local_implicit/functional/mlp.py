"""The public function of multi-layer perceptrons: documentation, argument checks, autocast."""

from collections.abc import Sequence
from typing import Any

import torch

from inr_kernels._core import backends, dispatch
from inr_kernels._core.checks import apply_autocast, require, require_tensor, result_dtype, without_autocast

from .. import op, reference
from ..arguments import ACTIVATIONS, MlpArguments, MlpFacts

MIN_ROWS = 256  # with fewer, packing the weights takes the kernel longer than torch's layers take


def _facts(x: torch.Tensor, weights: Sequence[torch.Tensor] = (), *args: Any, **kwargs: Any) -> MlpFacts:
    """What decides on the backend of a call, of which `explain` may be given x only."""
    return MlpFacts(x.device, result_dtype(x), len(weights))


@op.MLP.public(_facts)
def mlp(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "gelu",
    add: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Applies Linear layers, with an activation between them, to the last dimension; fuses a LayerNorm and a sum.

        h_0 = LayerNorm(x) or x,   h_i = act(W_i h_{i - 1} + b_i),   out = W_n h_{n - 1} + b_n + add

    With one layer it is a Linear. In float32 and float64 on a CPU, without gradients, all layers are computed on a few
    rows at a time, so that no hidden layer is stored; so is half precision, in float32, on CPUs where torch has only
    slow layers for it. Elsewhere, and by default where gradients are needed or x has
    fewer than 256 rows, these are torch's layers: they keep what their backward needs, and read weights as they are.

    Args:
        x: [..., C], any floating-point dtype.
        weights: W_1, ..., W_n, [O_i, O_{i - 1}], in x's dtype, like all tensors (under autocast: any).
        biases: b_1, ..., b_n, [O_i], or None for no bias; None: no biases at all.
        norm_weight: [C], of the LayerNorm; None: there is none.
        norm_bias: [C], of the LayerNorm, or None.
        eps: of the LayerNorm.
        activation: "gelu", exact as torch's default, or "relu".
        add: [..., O_n] or None.
        backend: "cpu": the kernel in C++; "reference" and "triton": torch's layers (there is no Triton kernel); None:
            the first of the op's table that can run, or "reference" for gradients and few rows.

    Returns:
        [..., O_n] in x's dtype (autocast's, under autocast), contiguous.

    Gradients of every order reach all tensors.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape, dtype, device or option that does not fit; the message names the argument.
        RuntimeError: the requested backend cannot run here; the message gives the reason.

    Example:
        >>> import torch
        >>> fc1, fc2, norm = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8), torch.nn.LayerNorm(8)
        >>> x = torch.randn(2, 5, 7, 8)
        >>> weights, biases = [fc1.weight, fc2.weight], [fc1.bias, fc2.bias]
        >>> mlp(x, weights, biases, norm_weight=norm.weight, norm_bias=norm.bias, add=x).shape
        torch.Size([2, 5, 7, 8])
    """
    require_tensor(x, "x")
    weights = _sequence(weights, "weights")
    biases = [None] * len(weights) if biases is None else _sequence(biases, "biases")
    require(activation in ACTIVATIONS, "activation", f"be one of {', '.join(ACTIVATIONS)}", repr(activation))
    require(isinstance(eps, (int, float)) and 0 <= eps <= 1e300, "eps", "be a finite number of at least 0", eps)
    for name, tensors in (("weights", weights), ("biases", biases)):
        for i, tensor in enumerate(tensors):
            if tensor is not None or name == "weights":
                require_tensor(tensor, f"{name}[{i}]")
    others = {"norm_weight": norm_weight, "norm_bias": norm_bias, "add": add}
    for name, tensor in others.items():
        if tensor is not None:
            require_tensor(tensor, name)
    pairs = zip(biases, weights, strict=False)
    biases = [w.new_zeros(w.shape[:1]) if b is None else b for b, w in pairs] + biases[len(weights) :]
    given = [t for t in (x, *weights, *biases, *others.values()) if t is not None]
    requested = dispatch.reference_if_transformed(dispatch.requested_backend(backend), *given)
    x, norm_weight, norm_bias, add, *layers = apply_autocast(x, norm_weight, norm_bias, add, *weights, *biases)
    weights, biases = layers[: len(weights)], layers[len(weights) :]
    arguments = MlpArguments(x, weights, biases, norm_weight, norm_bias, add, activation, float(eps))
    with without_autocast(x):  # already applied
        if requested in ("reference", "triton") or (not requested and _prefers_torch(x, given)):
            arguments.check()  # the op checks its arguments itself
            return reference.mlp(*arguments)
        return op.mlp(*arguments, requested)


def _prefers_torch(x, given):
    """Whether torch's layers are the default. A recorded graph may run with another number of rows."""
    if not backends.is_for_native(x) or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return True
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not recorded and x.dim() > 0 and x.numel() < MIN_ROWS * x.shape[-1]


def _sequence(values, name):
    """A list of tensors as such, or TypeError."""
    if isinstance(values, torch.Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of tensors; got {type(values).__name__}")
    return list(values)
