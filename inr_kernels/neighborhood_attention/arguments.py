"""The arguments of the op neighborhood_attention: their bounds checks, and what decides on the backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import is_positive_int, require, require_match, require_tensor, shape

# By rank.
AXES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}
KERNEL_SIZES = {1: ("K",), 2: ("Kh", "Kw"), 3: ("Kd", "Kh", "Kw")}
ALTERNATIVES = {1: "", 2: " or a pair of them", 3: " or three of them"}


@dataclass(frozen=True)
class Facts(dispatch.Facts):
    """Device, dtype, whether there is a relative position bias, the scale (None: the default), and the shapes.

    dim, value_dim: a head's width, and that of its values if it is another. heads: of query, key and value.
    is_cross_scale: whether the queries have another size than the keys. rank: the number of axes, 1 to 3.
    """

    rpb: bool = False
    scale: float | None = None
    dim: int = 1
    value_dim: int | None = None
    heads: tuple[int, int, int] = (1, 1, 1)
    is_cross_scale: bool = False
    mean_heads: bool = False
    rank: int = 2

    @property
    def form(self) -> str:
        """The width of a head, and what differs from attention within one map of equal heads."""
        value_dim = self.value_dim or self.dim
        traits = {
            f"values {dispatch.up_to(value_dim, 32, 64, 128)}": value_dim != self.dim,
            "shared heads": len(set(self.heads)) > 1 and not self.mean_heads,
            "cross-scale": self.is_cross_scale,
            "mean of heads": self.mean_heads,
            "3-D": self.rank == 3,
        }
        widths = f"head {dispatch.up_to(self.dim, 32, 64, 128)}"
        return ", ".join([widths, *(trait for trait, applies in traits.items() if applies)])


class Arguments(NamedTuple):
    """The op's arguments before `backend`, as its schema orders them (op.py); of 1, 2 or 3 axes, the rank."""

    qkv: list[torch.Tensor]  # query, key, value as in the public functions, or one [B, ..., 3, heads, dim]
    rpb: torch.Tensor | None  # [heads, 2 K - 1 of each axis] in `exact` dtype
    kernel_size: Sequence[int]  # one for each axis, as the next three
    dilation: Sequence[int]
    stride: Sequence[int]
    is_causal: Sequence[int]  # 0 or 1: torch.jit.trace takes no list of bools
    scale: float
    mean_heads: bool

    def facts(self) -> Facts:
        """What decides on the backend."""
        query, key, value = self.unpack()
        return shape_facts(query, key, value, self.rpb is not None, self.scale, self.mean_heads)

    def unpack(self) -> Sequence[torch.Tensor]:
        """query, key and value."""
        return unpack(self.qkv)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[B, ..., heads, dim_v]; one head with mean_heads."""
        query, _, value = self.unpack()
        return (*query.shape[:-2], 1 if self.mean_heads else query.shape[-2], value.shape[-1])

    def check(self) -> None:
        """Raises unless the options are valid and the tensors fit them, which keeps kernels in bounds."""
        require(len(self.qkv) in (1, 3), "qkv", "be one packed tensor or three", len(self.qkv))
        rank = min(max(self.qkv[0].dim() - (3 if len(self.qkv) == 3 else 4), 1), 3)
        check_tensors(self.qkv, rank)
        query, key, value = self.unpack()
        for tensor, name in zip(self.qkv[1:], ("key", "value"), strict=False):
            if tensor.dtype != query.dtype:
                require(False, name, f"have query's dtype {query.dtype}", tensor.dtype)
        for pair, name in ((self.kernel_size, "kernel_size"), (self.dilation, "dilation"), (self.stride, "stride")):
            check_axes(pair, name, rank)
        check_causal([bool(value) for value in self.is_causal], rank)
        if any(s > k for s, k in zip(self.stride, self.kernel_size, strict=True)):
            require(False, "stride", f"be at most kernel_size {tuple(self.kernel_size)}", tuple(self.stride))
        size = key.shape[1:-2]
        if any(k * d > n for k, d, n in zip(self.kernel_size, self.dilation, size, strict=True)):
            rule = f"be at most {tuple(size)}, the map's size, after multiplication by dilation {tuple(self.dilation)}"
            require(False, "kernel_size", rule, tuple(self.kernel_size))
        if rank == 3:
            if query.shape[1:-2] != size:
                require(False, "key", f"have query's size {list(query.shape[1:-2])} in three dimensions", shape(key))
            require(not self.mean_heads, "mean_heads", "be False in three dimensions", self.mean_heads)
        sides = zip(query.shape[1:-2], size, self.kernel_size, self.is_causal, strict=True)
        if any(queries % keys and (keys != k or causal) for queries, keys, k, causal in sides):
            sizes = "a height and a width that divide" if rank == 2 else "a length that divides"
            rule = f"have {sizes} query's {list(query.shape[1:-2])}, or equal kernel_size"
            require(False, "key", rule, shape(key))
        if self.mean_heads:
            require(value.shape[-2] == 1, "value", "have one head with mean_heads", shape(value))
        if self.rpb is not None:
            expected = (query.shape[-2], *(2 * k - 1 for k in self.kernel_size))
            if self.rpb.shape != expected:
                axes = "".join(f", 2 {name} - 1" for name in KERNEL_SIZES[rank])
                rule = f"have shape {list(expected)}, [heads{axes}]"
                require(False, "rpb", rule, shape(self.rpb))
            require_match(self.rpb, "rpb", expected, exact(query.dtype), query.device)

    def check_saved(self, grad: torch.Tensor, grad_lse: torch.Tensor, lse: torch.Tensor, needs: Sequence[bool]) -> None:
        """Raises unless the outputs' gradients and the saved lse fit, and there is one need per gradient."""
        query = self.unpack()[0]
        require_match(grad, "grad", self.out_shape, query.dtype, query.device)
        for tensor, name in ((grad_lse, "grad_lse"), (lse, "lse")):
            require_match(tensor, name, query.shape[:-1], exact(query.dtype), query.device)
        require(len(needs) == len(self.qkv) + 1, "needs", f"have {len(self.qkv) + 1} values", needs)
        require(not needs[-1] or self.rpb is not None, "needs", "end with False if rpb is None", needs)


def shape_facts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: bool,
    scale: float | None,
    mean_heads: bool,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
) -> Facts:
    """The facts of a call, from its tensors [B, ..., heads, dim].

    dtype: of the computation; None: query's. rank: of the windows; None: query's.
    """
    heads = query.shape[-2], key.shape[-2], value.shape[-2]
    is_cross_scale = query.shape[1:-2] != key.shape[1:-2]
    widths, rank = (query.shape[-1], value.shape[-1]), rank or query.dim() - 3
    return Facts(query.device, dtype or query.dtype, rpb, scale, *widths, heads, is_cross_scale, mean_heads, rank)


def exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, bias and lse: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def unpack(qkv: list[Any]) -> Sequence[Any]:
    """query, key, value of one packed tensor or of three; three times None of [None], a gradient that is not needed."""
    return qkv[0].unbind(-3) if len(qkv) == 1 and qkv[0] is not None else qkv * (3 // len(qkv))


def check_tensors(qkv: Sequence[torch.Tensor], rank: int) -> None:
    """Raises unless qkv is one packed tensor, or three whose batch, heads and channels fit, on one device."""
    first, name = qkv[0], "query" if len(qkv) == 3 else "qkv"
    require_tensor(first, name, dims=(rank + 3,) if len(qkv) == 3 else (rank + 4,))
    packed = f"have shape [B, {', '.join(AXES[rank])}, 3, heads, dim]"
    require(len(qkv) == 3 or first.shape[-3] == 3, name, packed, shape(first))
    require(min(first.shape[-2:]) > 0, name, "have at least one head and one channel", shape(first))
    for tensor, name in zip(qkv[1:], ("key", "value"), strict=False):
        require_tensor(tensor, name, dims=(rank + 3,), like=first)
        require(min(tensor.shape[-2:]) > 0, name, "have at least one head and one channel", shape(tensor))
        if tensor.shape[0] != first.shape[0] or first.shape[-2] % tensor.shape[-2]:
            rule = f"have query's batch {first.shape[0]} and a number of heads that divides its {first.shape[-2]}"
            require(False, name, rule, shape(tensor))
    if len(qkv) == 3:
        _, key, value = qkv
        if key.shape[-1] != first.shape[-1]:
            require(False, "key", f"have query's {first.shape[-1]} channels", shape(key))
        if value.shape[1:-2] != key.shape[1:-2]:
            sides = ("length", "height and width", "depth, height and width")[rank - 1]
            require(False, "value", f"have key's {sides} {list(key.shape[1:-2])}", shape(value))


def check_axes(value: int | Sequence[int], name: str, rank: int) -> tuple[int, ...]:
    """A positive integer for each of the axes, from one or from as many."""
    values = (value,) * rank if isinstance(value, int) else value
    fits = isinstance(values, (tuple, list)) and len(values) == rank and all(map(is_positive_int, values))
    require(fits, name, f"be a positive integer{ALTERNATIVES[rank]}", repr(value))
    return tuple(values)


def check_causal(value: bool | Sequence[bool], rank: int) -> tuple[bool, ...]:
    """A bool for each of the axes, from one or from as many."""
    values = (value,) * rank if isinstance(value, bool) else value
    fits = isinstance(values, (tuple, list)) and len(values) == rank and all(isinstance(v, bool) for v in values)
    require(fits, "is_causal", f"be a bool{ALTERNATIVES[rank]}", repr(value))
    return tuple(values)


def window(
    length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """NATTEN's rule on one axis: the keys in the window of each query.

    Returns:
        keys: [length, kernel_size], the position of every key of every query.
        seen: the same shape, False for the taps that a causal window excludes.
    """
    query = torch.arange(length, dtype=torch.long, device=device)
    residue, i = query % dilation, query // dilation
    n = (length - residue + dilation - 1) // dilation  # tokens of the query's residue class
    group = i // stride * stride
    if is_causal:
        start = (torch.minimum(group + stride - 1, n - 1) - kernel_size + 1).clamp(min=0)
        end = i + 1
    else:
        lead = torch.minimum(group + stride // 2, n - 1)
        start = torch.minimum((lead - kernel_size // 2).clamp(min=0), n - kernel_size)
        end = start + kernel_size
    taps = start[:, None] + torch.arange(kernel_size, dtype=torch.long, device=device)
    seen = taps < end[:, None]
    return residue[:, None] + dilation * torch.where(seen, taps, start[:, None]), seen
