"""The arguments of the op unmask_attention: their bounds checks, and what decides on the backend."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import require_match, require_tensor


@dataclass(frozen=True)
class Facts(dispatch.Facts):
    """Device, dtype and the number of channels."""

    channels: int = 1

    @property
    def form(self) -> str:
        """The number of channels."""
        return f"channels {dispatch.up_to(self.channels, 64, 128, 256)}"


class Arguments(NamedTuple):
    """The op's arguments before `backend`, as its schema orders them (op.py)."""

    feat: torch.Tensor  # [B, C, N]
    weight: torch.Tensor  # [B, N] in [0, 1], in `statistics_dtype`
    scale: float
    mask_keys: bool

    def facts(self) -> Facts:
        """What decides on the backend."""
        return Facts(self.feat.device, self.feat.dtype, self.feat.shape[1])

    def check(self) -> None:
        """Raises unless weight fits feat, which keeps kernels in bounds."""
        require_tensor(self.feat, "feat", dims=(3,))
        batch, _, tokens = self.feat.shape
        require_match(self.weight, "weight", (batch, tokens), statistics_dtype(self.feat.dtype), self.feat.device)

    def check_saved(self, grad: torch.Tensor, out: torch.Tensor, softmax: torch.Tensor) -> None:
        """Raises unless the output's gradient and the saved outputs fit feat."""
        batch, _, tokens = self.feat.shape
        for tensor, name in ((grad, "grad"), (out, "out")):
            require_match(tensor, name, self.feat.shape, self.feat.dtype, self.feat.device)
        require_match(softmax, "softmax", (batch, 2, tokens), self.weight.dtype, self.feat.device)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weight and softmax for a feat of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
