"""Neighborhood attention: the contract, the checks, autocast."""

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import require, require_tensor, result_dtype, shape

from . import op, reference


def neighborhood_attention_2d(
    query,
    key,
    value,
    kernel_size,
    *,
    dilation=1,
    stride=1,
    is_causal=False,
    rpb=None,
    scale=None,
    return_lse=False,
    backend=None,
):
    """Attention of every pixel to a window of Kh x Kw pixels around it, with NATTEN's window rule.

        s_it  = scale <query_i, key_t> + rpb[h, (t_y - i_y) / d_y + Kh - 1, (t_x - i_x) / d_x + Kw - 1],  t in window(i)
        out_i = sum_t exp(s_it - lse_i) value_t,    lse_i = log sum_t exp(s_it)

    The window is the product of one per axis. On an axis of length L, query i attends inside its residue class
    i mod d, of n = ceil((L - i mod d) / d) pixels, where it has position j = i // d:

        start = clamp(min(j // s * s + s // 2, n - 1) - K // 2, 0, n - K),   end = start + K

    So every query sees K pixels, at the edges too: the window moves inwards, nothing is padded. Queries of a group of
    s (stride) share a window; s = K is blocked attention. On a causal axis: lead = min(j // s * s + s - 1, n - 1),
    start = max(lead - K + 1, 0), end = j + 1.

    Args:
        query, key, value: [B, H, W, heads, dim], one dtype: float32, float64, bfloat16 or float16 (half precision
            accumulates in float32), any strides; a copy is made only where the last one is not 1.
        kernel_size: K or (Kh, Kw), from 1 up, even ones too; of even K, half lie before the query, the query being
            the first of the other half.
        dilation: d or (d_y, d_x). kernel_size x dilation must fit into H x W.
        stride: s or (s_y, s_x), at most kernel_size.
        is_causal: whether an axis looks only back; one bool or two.
        rpb: relative position bias [heads, 2 Kh - 1, 2 Kw - 1] or None; any dtype, added in float32 (float64).
        scale: of the scores; None: dim ** -0.5. 0.0 is zero.
        return_lse: whether to return lse too.
        backend: "reference", "cpu", "triton"; "natten" runs NATTEN's own kernels, where they are installed, to compare
            (no rpb, no gradient through lse); None: the fastest that can run (see `inr_kernels.explain`).

    Returns:
        out [B, H, W, heads, dim] in query's dtype (autocast's, under autocast); with return_lse (out, lse), lse
        [B, H, W, heads] in float32 (float64 of float64), natural logarithm.

    Gradients reach query, key, value and rpb, through out and lse, only those asked for, deterministically: no
    atomics, every key gathers from the queries that see it. Nothing but the inputs and lse is kept for them. Second
    derivatives come through `backend="reference"`, as do torch.func and forward-mode differentiation.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape, dtype, device or option that does not fit; the message names the argument.
        RuntimeError: the wished backend cannot run here, and why.

    Source: Hassani et al., Neighborhood Attention Transformer, CVPR 2023; Hassani and Shi, Dilated Neighborhood
    Attention Transformer, 2022; stride and causal axes: Hassani et al., Generalized Neighborhood Attention, 2025.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 12, 9, 2, 16)
        >>> neighborhood_attention_2d(q, k, v, 5, dilation=(2, 1)).shape
        torch.Size([1, 12, 9, 2, 16])
    """
    require_tensor(query, "query", dims=(5,))
    for tensor, name in ((key, "key"), (value, "value")):
        require_tensor(tensor, name, dims=(5,), like=query)
        require(tensor.shape == query.shape, name, f"have query's shape {shape(query)}", shape(tensor))
    form = kernel_size, dilation, stride, is_causal, rpb, scale
    return _attend([query, key, value], ("query", "key", "value"), *form, return_lse, backend)


def neighborhood_attention_2d_packed(
    qkv,
    kernel_size,
    *,
    dilation=1,
    stride=1,
    is_causal=False,
    rpb=None,
    scale=None,
    return_lse=False,
    backend=None,
):
    """`neighborhood_attention_2d` of query, key and value in one tensor, as a Linear layer leaves them.

    Formula, errors and gradients stand there. Nothing is copied: the kernels read qkv, and write its gradient, by
    strides.

    Args:
        qkv: [B, H, W, 3, heads, dim].
        kernel_size, dilation, stride, is_causal, rpb, scale, return_lse, backend: as there.

    Returns:
        [B, H, W, heads, dim], or (out, lse).

    Example:
        >>> import torch
        >>> qkv = torch.nn.Linear(32, 96)(torch.randn(1, 12, 9, 32)).view(1, 12, 9, 3, 2, 16)
        >>> neighborhood_attention_2d_packed(qkv, 7).shape
        torch.Size([1, 12, 9, 2, 16])
    """
    require_tensor(qkv, "qkv", dims=(6,))
    require(qkv.shape[3] == 3, "qkv", "have shape [B, H, W, 3, heads, dim]", shape(qkv))
    return _attend([qkv], ("qkv",), kernel_size, dilation, stride, is_causal, rpb, scale, return_lse, backend)


def _attend(qkv, names, kernel_size, dilation, stride, is_causal, rpb, scale, return_lse, backend):
    """Checks, settles dtypes and backend, and runs. qkv: one packed tensor or three; names: theirs, for errors."""
    query = op.unpack(qkv)[0]
    form = check_form(query, names[0], kernel_size, dilation, stride, is_causal)
    check_rpb(rpb, query, form[0])
    if scale is None:
        scale = query.shape[-1] ** -0.5
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    require(number, "scale", "be a number or None", repr(scale))
    dtype = result_dtype(query)
    if dtype == query.dtype and not torch.is_autocast_enabled(query.device.type):
        for tensor, name in zip(qkv, names, strict=True):
            require(tensor.dtype == dtype, name, f"have query's dtype {dtype}", tensor.dtype)
    wish = dispatch.settle_wish(dispatch.wished(backend), *qkv, *([] if rpb is None else [rpb]))
    with torch.autocast(query.device.type, enabled=False):  # the dtypes are settled
        qkv = [t.to(dtype) for t in qkv]
        rpb = None if rpb is None else rpb.to(op.exact(dtype))
        if wish == "reference":
            out, lse = reference.neighborhood_attention(*op.unpack(qkv), rpb, *form, float(scale))
        elif wish == "natten":
            out, lse = op.run_natten(*op.unpack(qkv), rpb, *form, float(scale))
        else:
            out, lse = op.neighborhood_attention(qkv, rpb, *form, float(scale), wish)
    return (out, lse) if return_lse else out


def check_pair(value, name):
    """Two positive integers of one or two."""
    values = (value, value) if isinstance(value, int) else value
    fits = isinstance(values, (tuple, list)) and len(values) == 2
    fits = fits and all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)
    require(fits, name, "be a positive integer or a pair of them", repr(value))
    return tuple(values)


def check_form(query, name, kernel_size, dilation, stride, is_causal):
    """(kernel_size, dilation, stride, is_causal), each a pair, that fit query [B, H, W, heads, dim]."""
    require(min(query.shape[3:]) > 0, name, "have at least one head and one channel", shape(query))
    kernel_size = check_pair(kernel_size, "kernel_size")
    dilation, stride = check_pair(dilation, "dilation"), check_pair(stride, "stride")
    causal = (is_causal, is_causal) if isinstance(is_causal, bool) else is_causal
    fits = isinstance(causal, (tuple, list)) and len(causal) == 2 and all(isinstance(c, bool) for c in causal)
    require(fits, "is_causal", "be a bool or a pair of them", repr(is_causal))
    short = all(s <= k for s, k in zip(stride, kernel_size, strict=True))
    require(short, "stride", f"be at most kernel_size {kernel_size}", stride)
    size = tuple(query.shape[1:3])
    fits = all(k * d <= n for k, d, n in zip(kernel_size, dilation, size, strict=True))
    rule = f"be at most {size}, the map's size, after multiplication by dilation {dilation}"
    require(fits, "kernel_size", rule, kernel_size)
    return kernel_size, dilation, stride, tuple(causal)


def check_rpb(rpb, query, kernel_size):
    """None, or a bias for query's heads."""
    if rpb is None:
        return
    require_tensor(rpb, "rpb", dims=(3,), like=query)
    expected = [query.shape[3], *(2 * k - 1 for k in kernel_size)]
    require(shape(rpb) == expected, "rpb", f"have shape {expected}, [heads, 2 Kh - 1, 2 Kw - 1]", shape(rpb))


def _facts(query=None, *args, rpb=None, scale=None, **kwargs):
    """What `explain` needs to know of a call, of query or of qkv."""
    if query is None:
        return op.Facts(torch.device("cpu"), torch.float32)
    return op.Facts(query.device, result_dtype(query), rpb is not None, scale)


dispatch.register(
    dispatch.Op(
        name="neighborhood_attention",
        function=neighborhood_attention_2d,
        facts=_facts,
        backends={
            "cpu": op.why_not_cpu,
            "reference": lambda facts: "",
            # Only at a wish: Triton until the test suite has passed on a GPU, NATTEN to compare with.
            "triton": op.why_not_triton,
            "natten": op.why_not_natten,
        },
    )
)
