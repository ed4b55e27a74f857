"""Dtypes of the filter adapters: which arguments are supported, and in which dtype eager code would compute."""

from typing import Any

import torch

from inr_kernels.elementwise_filter import elementwise_filter

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def filter_as_eager(x: torch.Tensor, kernel: torch.Tensor, **options: Any) -> torch.Tensor:
    """`elementwise_filter` with the output dtype of eager code, which under CUDA's autocast sums in float32."""
    sums_in_float = x.is_cuda and torch.is_autocast_enabled("cuda")
    dtype = torch.promote_types(x.dtype, kernel.dtype)
    with torch.autocast(x.device.type, enabled=False):
        out = elementwise_filter(x.to(dtype), kernel.to(dtype), **options)
    return out.float() if sums_in_float and dtype.itemsize == 2 else out


def are_supported(*tensors: Any) -> bool:
    """Whether all are non-empty floating-point tensors on one device, a CPU or a GPU."""
    return all(
        isinstance(t, torch.Tensor)
        and t.dtype in DTYPES
        and t.device == tensors[0].device
        and t.device.type in ("cpu", "cuda")
        and t.numel() > 0
        for t in tensors
    )
