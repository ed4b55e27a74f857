"""Element-wise filtering: every output value has a kernel of its own."""

from .functional import elementwise_filter, pixelwise_reconstruct
from .module import ElementwiseFilter

__all__ = ["ElementwiseFilter", "elementwise_filter", "pixelwise_reconstruct"]
