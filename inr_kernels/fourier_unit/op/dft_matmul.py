"""Transforms for a GPU: those of small maps are matrix products, for which a size need not be a power of two.

The transform of the rows is one matrix product by torch. That of the columns is a unit's product on the spectrum, with
the rows of one channel's map as "channels", and cosines and sines as the weight. Larger maps use torch's FFT, in
float32.
"""

from collections.abc import Callable, Sequence

import torch

from inr_kernels._core import backends

from .. import reference

LONGEST = 64  # sides up to which the transform is a product; not measured


def _computed(height, width, device):
    """Of both directions: the rows' matrices [W, 2 W'] and [2 W', W], the columns' [2 H, 2 H] and their inverse."""
    like = torch.zeros((), dtype=torch.float64, device=device)
    cos, sin = reference.dft_factors(width, width // 2 + 1, like)
    times = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    times[0] = 1
    if width % 2 == 0:
        times[-1] = 1
    rows = torch.stack((cos, -sin), 2).flatten(1)
    rows_back = (torch.stack((cos, -sin), 2) * times[:, None]).flatten(1).T
    cos, sin = reference.dft_factors(height, height, like)
    columns = torch.stack((torch.stack((cos, sin), 2), torch.stack((-sin, cos), 2)), 1).flatten(2).flatten(0, 1)
    return tuple(t.float().contiguous() for t in (rows, rows_back, columns, columns.T))


_factors = backends.TensorCache(_computed, 32)


def transform(product: Callable[..., torch.Tensor], x: torch.Tensor, norm: str) -> torch.Tensor:
    """x [B, C, H, W] float32 -> its half spectrum [B, C, H, W // 2 + 1], complex."""
    height, width = x.shape[2:]
    if max(height, width) > LONGEST:
        return torch.fft.rfftn(x, dim=(-2, -1), norm=norm)
    rows, _, columns, _ = _factors(height, width, x.device)
    z = torch.view_as_complex((x @ (rows * reference.norm_factor(height * width, norm, False))).unflatten(3, (-1, 2)))
    return product(z.flatten(0, 1).unsqueeze(2), columns, None, False, 1).view(z.shape)


def inverse(product: Callable[..., torch.Tensor], z: torch.Tensor, size: Sequence[int], norm: str) -> torch.Tensor:
    """The image [B, C, H, W] of a half spectrum that need not be Hermitian, with numpy's irfft2."""
    height, width = size
    if max(height, width) > LONGEST:
        return reference.inverse(z, size, norm)
    _, rows, _, columns = _factors(height, width, z.device)
    z = product(z.flatten(0, 1).unsqueeze(2), columns, None, False, 1).view(z.shape)
    return torch.view_as_real(z).flatten(3) @ (rows * reference.norm_factor(height * width, norm, True))
