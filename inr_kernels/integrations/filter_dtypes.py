"""What the adapters of element-wise filters share: the dtypes of eager code, and which calls fit."""

import torch

from inr_kernels.elementwise_filter import elementwise_filter

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def filtered(x, kernel, **options):
    """`elementwise_filter` in the dtype in which eager code multiplies and sums: CUDA's autocast sums in float32."""
    sums_in_float = x.is_cuda and torch.is_autocast_enabled("cuda")
    dtype = torch.promote_types(x.dtype, kernel.dtype)
    with torch.autocast(x.device.type, enabled=False):
        out = elementwise_filter(x.to(dtype), kernel.to(dtype), **options)
    return out.float() if sums_in_float and dtype.itemsize == 2 else out


def are_filterable(*tensors):
    """Whether these are tensors with elements, of our dtypes, on one device of ours."""
    return all(
        isinstance(t, torch.Tensor)
        and t.dtype in DTYPES
        and t.device == tensors[0].device
        and t.device.type in ("cpu", "cuda")
        and t.numel() > 0
        for t in tensors
    )
