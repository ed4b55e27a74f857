"""ElementwiseFilter: an element-wise filter as a layer without weights."""

from typing import Any

import torch
from torch import nn

from .functional import elementwise_filter


class ElementwiseFilter(nn.Module):
    """Applies `elementwise_filter`, y = α x + β box(x) + γ (kernel ⊛ x): `y = layer(x, kernel)`.

    The formula in full, shapes, dtypes and errors are those of the function. The layer has no weights.

    Args:
        kernel_size: K or (kh, kw), odd.
        log_window: [kh, kw], added to the logits, or None; a buffer, so that it moves with the module.
        options: the other keywords of `elementwise_filter`. TypeError for an unknown one.

    Example:
        >>> import torch
        >>> high_pass = ElementwiseFilter(3, normalize="taps", alpha=1.0, gamma=-1.0)
        >>> high_pass(torch.randn(1, 4, 6, 7), torch.randn(1, 4 * 9, 6, 7)).shape
        torch.Size([1, 4, 6, 7])
    """

    log_window: torch.Tensor | None

    def __init__(self, kernel_size: int | tuple[int, int], *, log_window: torch.Tensor | None = None, **options: Any):
        super().__init__()
        self.kernel_size, self.options = kernel_size, options
        unknown = options.keys() - set(elementwise_filter.__kwdefaults__ or ())
        if unknown:
            raise TypeError(f"options must be keywords of elementwise_filter; got {', '.join(sorted(unknown))}")
        self.register_buffer("log_window", log_window, persistent=False)

    def forward(self, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W], kernel [B, groups K², Ho, Wo] -> [B, C, Ho, Wo], or a stack over dilations."""
        return elementwise_filter(x, kernel, kernel_size=self.kernel_size, log_window=self.log_window, **self.options)

    def extra_repr(self) -> str:
        """The options, for print."""
        return ", ".join([repr(self.kernel_size), *(f"{name}={value!r}" for name, value in self.options.items())])
