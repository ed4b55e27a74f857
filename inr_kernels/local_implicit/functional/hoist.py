"""The form of a decoder, and its first layer hoisted to the feature map."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Form(NamedTuple):
    """The form of a decoder: LIIF's flags, the layer after which the ensemble is formed, and LTE's first layer.

    With `texture`, the first weight is [4 K, C * 9 + 2]: the rows of the map `reference.decode_texture` reads, and in
    the last two columns of the first K rows the weight of the phase.
    """

    feat_unfold: bool = True
    local_ensemble: bool = True
    ensemble_after: str = "last"
    texture: bool = False

    def flags(self) -> dict[str, Any]:
        """The options of `local_implicit_decode`."""
        return {name: value for name, value in self._asdict().items() if name != "texture"}


def feature_columns(channels: int, form: Form) -> int:
    """How many columns of the first weight multiply features."""
    return channels * 9 if form.feat_unfold else channels


def hoist_features(
    feat: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, form: Form, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """Applies the first layer to the features, once per pixel: [B, rows, w, N1], contiguous, in weight's dtype.

    rows: the rows (begin, end) of the map to compute; None: all.
    """
    channels, height = feat.shape[1], feat.shape[2]
    kernel = weight[:, : feature_columns(channels, form)]
    begin, end = rows or (0, height)
    padding: int | tuple[int, int] = 0
    if form.feat_unfold:
        kernel = kernel.reshape(-1, channels, 3, 3)
        above, below = max(begin - 1, 0), min(end + 1, height)
        feat = F.pad(feat[:, :, above:below], (0, 0, above - begin + 1, end + 1 - below))
        padding = (0, 1)
    else:
        feat, kernel = feat[:, :, begin:end], kernel[:, :, None, None]
    if feat.device.type == "cuda" and weight.dtype.itemsize > 2:
        return convolve_as_matmuls(feat.to(weight.dtype), kernel, bias)
    last = torch.channels_last
    hoisted = F.conv2d(
        feat.to(weight.dtype, memory_format=last),
        kernel.contiguous(memory_format=last),
        bias,
        padding=padding,
    )
    return hoisted.permute(0, 2, 3, 1).contiguous()


def convolve_as_matmuls(feat: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Convolves by matrix products, for float32 on a GPU: cuDNN would use TF32 whatever the matmul precision is.

    feat [B, C, rows (+ 2), w], kernel [N1, C, K, K] with K = 3 or 1 -> [B, rows, w, N1].
    """
    side = kernel.shape[-1]
    feat = F.pad(feat.permute(0, 2, 3, 1), (0, 0, side // 2, side // 2))
    rows, cols = feat.shape[1] - side + 1, feat.shape[2] - side + 1
    hoisted = bias
    for dy in range(side):
        for dx in range(side):
            hoisted = hoisted + F.linear(feat[:, dy : dy + rows, dx : dx + cols], kernel[:, :, dy, dx])
    return hoisted
