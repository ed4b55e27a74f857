"""What local_implicit accepts, and the dtype that it computes in."""

import torch

from inr_kernels._core.checks import require, require_tensor, result_dtype, shape

from .. import op
from .hoist import feature_columns


def settle_dtypes(wish, feat, weights, biases):
    """Weights and biases in the dtype to compute in, and the dtype of the result; features follow by rows.

    The result has feat's dtype, or autocast's. Half precision on a CPU is computed in float32, but for bfloat16
    inference where the processor multiplies it. Coordinates never take part.
    """
    dtype = result_dtype(feat)
    if dtype == feat.dtype and not torch.is_autocast_enabled(feat.device.type):
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            for value, name in ((weight, f"weights[{i}]"), (bias, f"biases[{i}]")):
                require(value.dtype == dtype, name, f"have feat's dtype {dtype}", value.dtype)
    working = dtype
    if feat.device.type == "cpu" and wish in ("", "cpu") and dtype.itemsize == 2:
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (feat, *weights, *biases))
        if tracked or dtype == torch.float16 or not op.cpu_has_bfloat16():
            working = torch.float32
    return [w.to(working) for w in weights], [b.to(working) for b in biases], dtype


def check_decoder(feat, weights, biases, form, *, cell_decode):
    """Features and weights that fit each other and the form."""
    require_tensor(feat, "feat", dims=(4,))
    require(
        min(feat.shape[1:]) > 0,
        "feat",
        "have at least one channel and one pixel, [B, C, h, w]",
        shape(feat),
    )
    after = form.ensemble_after
    require(after in ("last", "first"), "ensemble_after", 'be "last" or "first"', repr(after))
    require(len(weights) >= 2, "weights", "hold at least two Linear weights", len(weights))
    require(
        len(biases) == len(weights),
        "biases",
        f"be as many as the {len(weights)} weights",
        len(biases),
    )
    inputs = feature_columns(feat.shape[1], form) + 2 + (2 if cell_decode and after == "last" else 0)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        for value, name, dims in ((weight, f"weights[{i}]", 2), (bias, f"biases[{i}]", 1)):
            require_tensor(value, name, dims=(dims,), like=feat)
        if i == 1 and cell_decode and after == "first":
            inputs += 2
        why = f" ({_first_columns(feat, form, cell_decode)})" if i == 0 else ""
        require(
            weight.shape[1] == inputs and len(weight) > 0,
            f"weights[{i}]",
            f"have shape [N, {inputs}]{why}, N > 0",
            shape(weight),
        )
        require(len(bias) == len(weight), f"biases[{i}]", f"have shape [{len(weight)}]", shape(bias))
        inputs = len(weight)


def _first_columns(feat, form, cell_decode):
    features = f"{feat.shape[1]} channels" + (" x 9" if form.feat_unfold else "")
    return f"{features} + 2 offsets" + (" + 2 cell" if cell_decode and form.ensemble_after == "last" else "")


def check_queries(feat, coord, cell):
    """coord and cell in float32 and in shape."""
    require_tensor(coord, "coord", dims=(3, 4), like=feat)
    batch = len(feat)
    rule = f"have shape [B, Q, 2] or [B, H, W, 2] with B = feat's {batch}"
    require(coord.shape[-1] == 2 and len(coord) == batch, "coord", rule, shape(coord))
    if cell is not None:
        require_tensor(cell, "cell", dims=(2, coord.dim()), like=feat)
        fits = tuple(cell.shape) == (tuple(coord.shape) if cell.dim() > 2 else (batch, 2))
        require(fits, "cell", f"have shape [B, 2] = [{batch}, 2] or coord's {shape(coord)}", shape(cell))
    for value, name in ((coord, "coord"), (cell, "cell")):
        if value is not None and value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32: half precision picks wrong neighbours; got {value.dtype}")
    return coord.float(), None if cell is None else cell.float()


def check_size(size):
    """(H, W), both positive."""
    try:
        fits = [int(n) == n and n > 0 for n in size] == [True, True]
    except (TypeError, ValueError, OverflowError):
        fits = False
    require(fits, "size", "be two positive integers (H, W)", size)
    return tuple(map(int, size))
