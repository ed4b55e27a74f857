"""The arguments of the op neighborhood_attention: their bounds checks, and what decides on the backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import is_positive_int, require, require_match, require_tensor, shape


@dataclass(frozen=True)
class Facts(dispatch.Facts):
    """Device, dtype, whether there is a relative position bias, the scale (None: the default), and the shapes.

    dim, value_dim: a head's width, and that of its values if it is another. heads: of query, key and value.
    is_cross_scale: whether the queries have another size than the keys.
    """

    rpb: bool = False
    scale: float | None = None
    dim: int = 1
    value_dim: int | None = None
    heads: tuple[int, int, int] = (1, 1, 1)
    is_cross_scale: bool = False
    mean_heads: bool = False

    @property
    def form(self) -> str:
        """The width of a head, and what differs from attention within one map of equal heads."""
        value_dim = self.value_dim or self.dim
        traits = {
            f"values {dispatch.up_to(value_dim, 32, 64, 128)}": value_dim != self.dim,
            "shared heads": len(set(self.heads)) > 1 and not self.mean_heads,
            "cross-scale": self.is_cross_scale,
            "mean of heads": self.mean_heads,
        }
        widths = f"head {dispatch.up_to(self.dim, 32, 64, 128)}"
        return ", ".join([widths, *(trait for trait, applies in traits.items() if applies)])


class Arguments(NamedTuple):
    """The op's arguments before `backend`, as its schema orders them (op.py)."""

    qkv: list[torch.Tensor]  # query, key, value as in the public function, or one [B, H, W, 3, heads, dim]
    rpb: torch.Tensor | None  # [heads, 2 Kh - 1, 2 Kw - 1] in `exact` dtype
    kernel_size: Sequence[int]
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
        """[B, H, W, heads, dim_v]; one head with mean_heads."""
        query, _, value = self.unpack()
        return (*query.shape[:3], 1 if self.mean_heads else query.shape[3], value.shape[4])

    def check(self) -> None:
        """Raises unless the options are valid and the tensors fit them, which keeps kernels in bounds."""
        require(len(self.qkv) in (1, 3), "qkv", "be one packed tensor or three", len(self.qkv))
        check_tensors(self.qkv)
        query, key, value = self.unpack()
        for tensor, name in zip(self.qkv[1:], ("key", "value"), strict=False):
            if tensor.dtype != query.dtype:
                require(False, name, f"have query's dtype {query.dtype}", tensor.dtype)
        for pair, name in ((self.kernel_size, "kernel_size"), (self.dilation, "dilation"), (self.stride, "stride")):
            check_pair(pair, name)
        check_causal([bool(value) for value in self.is_causal])
        if any(s > k for s, k in zip(self.stride, self.kernel_size, strict=True)):
            require(False, "stride", f"be at most kernel_size {tuple(self.kernel_size)}", tuple(self.stride))
        size = key.shape[1:3]
        if any(k * d > n for k, d, n in zip(self.kernel_size, self.dilation, size, strict=True)):
            rule = f"be at most {tuple(size)}, the map's size, after multiplication by dilation {tuple(self.dilation)}"
            require(False, "kernel_size", rule, tuple(self.kernel_size))
        sides = zip(query.shape[1:3], size, self.kernel_size, self.is_causal, strict=True)
        if any(queries % keys and (keys != k or causal) for queries, keys, k, causal in sides):
            rule = f"have a height and a width that divide query's {list(query.shape[1:3])}, or equal kernel_size"
            require(False, "key", rule, shape(key))
        if self.mean_heads:
            require(value.shape[3] == 1, "value", "have one head with mean_heads", shape(value))
        if self.rpb is not None:
            expected = (query.shape[3], *(2 * k - 1 for k in self.kernel_size))
            if self.rpb.shape != expected:
                rule = f"have shape {list(expected)}, [heads, 2 Kh - 1, 2 Kw - 1]"
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
) -> Facts:
    """The facts of a call, from its tensors [B, H, W, heads, dim]. dtype: of the computation; None: query's."""
    heads = query.shape[-2], key.shape[-2], value.shape[-2]
    is_cross_scale = query.shape[1:3] != key.shape[1:3]
    widths = query.shape[-1], value.shape[-1]
    return Facts(query.device, dtype or query.dtype, rpb, scale, *widths, heads, is_cross_scale, mean_heads)


def exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, bias and lse: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def unpack(qkv: list[Any]) -> Sequence[Any]:
    """query, key, value of one packed tensor or of three; three times None of [None], a gradient that is not needed."""
    return qkv[0].unbind(3) if len(qkv) == 1 and qkv[0] is not None else qkv * (3 // len(qkv))


def check_tensors(qkv: Sequence[torch.Tensor]) -> None:
    """Raises unless qkv is one packed tensor, or three whose batch, heads and channels fit, on one device."""
    first, name = qkv[0], "query" if len(qkv) == 3 else "qkv"
    require_tensor(first, name, dims=(5,) if len(qkv) == 3 else (6,))
    require(len(qkv) == 3 or first.shape[3] == 3, name, "have shape [B, H, W, 3, heads, dim]", shape(first))
    require(min(first.shape[-2:]) > 0, name, "have at least one head and one channel", shape(first))
    for tensor, name in zip(qkv[1:], ("key", "value"), strict=False):
        require_tensor(tensor, name, dims=(5,), like=first)
        require(min(tensor.shape[-2:]) > 0, name, "have at least one head and one channel", shape(tensor))
        if tensor.shape[0] != first.shape[0] or first.shape[3] % tensor.shape[3]:
            rule = f"have query's batch {first.shape[0]} and a number of heads that divides its {first.shape[3]}"
            require(False, name, rule, shape(tensor))
    if len(qkv) == 3:
        _, key, value = qkv
        if key.shape[4] != first.shape[4]:
            require(False, "key", f"have query's {first.shape[4]} channels", shape(key))
        if value.shape[1:3] != key.shape[1:3]:
            require(False, "value", f"have key's height and width {list(key.shape[1:3])}", shape(value))


def check_pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """Two positive integers, from one or two."""
    values = (value, value) if isinstance(value, int) else value
    fits = isinstance(values, (tuple, list)) and len(values) == 2 and all(map(is_positive_int, values))
    require(fits, name, "be a positive integer or a pair of them", repr(value))
    first, second = values
    return first, second


def check_causal(value: bool | Sequence[bool]) -> tuple[bool, bool]:
    """Two bools, from one or two."""
    values = (value, value) if isinstance(value, bool) else value
    fits = isinstance(values, (tuple, list)) and len(values) == 2 and all(isinstance(v, bool) for v in values)
    require(fits, "is_causal", "be a bool or a pair of them", repr(value))
    first, second = values
    return first, second
