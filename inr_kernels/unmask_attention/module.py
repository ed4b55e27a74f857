"""UnmaskAttention: the options of unmask attention as a layer; it holds no weights."""

from torch import nn

from .functional import unmask_attention


class UnmaskAttention(nn.Module):
    """`unmask_attention` as a layer: `e = layer(feat, mask)`. Formula, shapes, dtypes and errors stand there.

    Args:
        scale: of the scores; None: 1 / sqrt(C).
        mask_keys: whether holes are no keys either.
        backend: as `unmask_attention`.

    Example:
        >>> import torch
        >>> UnmaskAttention()(torch.randn(1, 8, 5, 7), torch.zeros(1, 1, 5, 7)).shape
        torch.Size([1, 8, 5, 7])
    """

    def __init__(self, *, scale=None, mask_keys=False, backend=None):
        super().__init__()
        self.options = {"scale": scale, "mask_keys": mask_keys, "backend": backend}

    def forward(self, feat, mask):
        """feat [B, C, H, W], mask [B, 1, H, W] -> [B, C, H, W]"""
        return unmask_attention(feat, mask, **self.options)

    def extra_repr(self):
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
