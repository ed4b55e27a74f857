"""ElementwiseFilter: the options of a filter as a layer; it holds no weights."""

from torch import nn

from .functional import elementwise_filter


class ElementwiseFilter(nn.Module):
    """`elementwise_filter` as a layer: `y = layer(x, kernel)`. Formula, shapes, dtypes and errors stand there.

    Args:
        kernel_size: K or (kh, kw), odd.
        options: every keyword of `elementwise_filter` but log_window.
        log_window: [kh, kw] or None; a buffer, so that it follows the module's device.

    Example:
        >>> import torch
        >>> high_pass = ElementwiseFilter(3, normalize="taps", alpha=1.0, gamma=-1.0)
        >>> high_pass(torch.randn(1, 4, 6, 7), torch.randn(1, 4 * 9, 6, 7)).shape
        torch.Size([1, 4, 6, 7])
    """

    def __init__(self, kernel_size, *, log_window=None, **options):
        super().__init__()
        self.kernel_size, self.options = kernel_size, options
        unknown = options.keys() - elementwise_filter.__kwdefaults__.keys()
        if unknown:
            raise TypeError(f"options must be keywords of elementwise_filter; got {', '.join(sorted(unknown))}")
        self.register_buffer("log_window", log_window, persistent=False)

    def forward(self, x, kernel):
        """x [B, C, H, W], kernel [B, groups K², Ho, Wo] -> [B, C, Ho, Wo], or a stack over dilations."""
        return elementwise_filter(x, kernel, kernel_size=self.kernel_size, log_window=self.log_window, **self.options)

    def extra_repr(self):
        return ", ".join([repr(self.kernel_size), *(f"{name}={value!r}" for name, value in self.options.items())])
