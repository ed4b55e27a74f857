"""The product of a weight with a spectrum, by the C++ kernel."""

from typing import Any

import torch

from inr_kernels._core import backends, native


class NativeProduct:
    """The C++ kernel with its weight and options.

    Args:
        weight: [2 O, 2 C / groups], multiplies the real and imaginary parts.
        shift: [2 O] or None, is added; then, if relu, the ReLU is applied.
        prepared: the packed weight, if there is one.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        shift: torch.Tensor | None,
        relu: bool,
        groups: int,
        prepared: torch.Tensor | None = None,
    ):
        self._sizes = groups, weight.shape[1] // 2, len(weight) // (2 * groups)  # complex channels of a group
        # Referenced while the kernel may read them.
        self._weight = weight.contiguous() if prepared is None else None
        self._prepared, self._shift = prepared, shift if shift is None else shift.contiguous()
        self._options = {
            "weight": backends.address(self._weight),
            "prepared": backends.address(prepared),
            "shift": backends.address(self._shift),
            "type": backends.TYPES[weight.dtype],
            "relu": relu,
        }

    @staticmethod
    def constant(weight: torch.Tensor, shift: torch.Tensor | None, relu: bool, groups: int) -> "NativeProduct":
        """The same for many calls: the weight is packed, and the shift copied, here."""
        weight = weight.contiguous()
        options: dict[str, Any] = {"type": backends.TYPES[weight.dtype], "threads": torch.get_num_threads()}
        options |= {"size": NativeProduct(weight, None, relu, groups)._sizes, "weight": weight.data_ptr()}
        prepare = native.load()[0].prepare_spectrum_product
        prepared = torch.empty(prepare(prepared=0, **options), dtype=weight.dtype, device=weight.device)
        prepare(prepared=prepared.data_ptr(), **options)
        return NativeProduct(weight, shift if shift is None else shift.clone(), relu, groups, prepared)

    def __call__(self, z: torch.Tensor, add_input: bool = False) -> torch.Tensor:
        """The product with z, complex [B, C, H, W'] -> [B, O, H, W']; add_input: adds z to it, if O = C."""
        batch, _, height, width = z.shape
        groups, _, outputs = self._sizes
        z = z.contiguous()
        out = z.new_empty(batch, groups * outputs, height, width)
        native.load()[0].spectrum_product(
            **self._options,
            size=(batch, *self._sizes, height * width),
            x=z.data_ptr(),
            add_input=add_input,
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
        )
        return out


def native_product(
    z: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None, relu: bool, groups: int
) -> torch.Tensor:
    """`Steps.product` of the backend "cpu"."""
    return NativeProduct(weight, shift, relu, groups)(z)
