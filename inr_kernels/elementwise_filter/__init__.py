"""Element-wise filtering: every output value has its own kernel."""

from .functional import elementwise_filter, pixelwise_reconstruct
from .module import ElementwiseFilter

__all__ = ["ElementwiseFilter", "elementwise_filter", "pixelwise_reconstruct"]
