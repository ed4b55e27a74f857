"""DEAR's training loss and its queries."""

import torch
from torch.nn import functional as F


def dear_loss(
    rgb: torch.Tensor, target: torch.Tensor, reconstruction: torch.Tensor | None, image: torch.Tensor
) -> torch.Tensor:
    """L1 of the queried colours + 0.01 L1 of the reconstructed input (eq. 10).

    Args:
        rgb, target: colours of the queries, or images, of one shape.
        reconstruction: [B, 3, H, W], of `DEAR.reconstruct`; None, for a network without `pim`: L1 of the colours alone.
        image: [B, 3, H, W], the input without missing pixels.

    Source: Zhang, Guo et al., SuperInpaint: Learning Detail-Enhanced Attentional Implicit Representation for
    Super-resolutional Image Inpainting, 2023.
    """
    loss = F.l1_loss(rgb, target)
    return loss if reconstruction is None else loss + 0.01 * F.l1_loss(reconstruction, image)


def sample_queries(
    image: torch.Tensor, count: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws random pixels of an image [B, 3, H, W] as queries.

    Returns:
        coord [B, count, 2], (y, x) in [-1, 1]; cell [B, 2], the size of a pixel; rgb [B, count, 3], their colours.
    """
    batch, _, height, width = image.shape
    draws = torch.rand(batch, count, 2, generator=generator, dtype=torch.float32, device="cpu").to(image.device)
    size = draws.new_tensor([height, width])
    pixels = (draws * size).long()
    rgb = image[torch.arange(batch, dtype=torch.long, device=image.device)[:, None], :, pixels[..., 0], pixels[..., 1]]
    return (2 * pixels + 1) / size - 1, (2 / size).expand(batch, 2), rgb
