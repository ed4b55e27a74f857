"""What LIIF's encoders share: they map an image to features of the same size, on tiles if it is large."""

import math

import torch
from torch import nn

from inr_kernels.fourier_unit.module.fused import prefers_conv2d
from inr_kernels.local_implicit.functional import check_workspace

from ..common.masking import check_image
from ..common.progress import Progress, parameters, reporting
from ..common.tiling import map_tiles, pixels_with_halo


class Encoder(nn.Module):
    """An encoder [B, 3, h, w] -> [B, out_dim, h, w] whose receptive field is bounded.

    Attributes:
        out_dim: channels of the features.
        halo: the receptive field to each side, in pixels.
        live_maps: feature maps of a tile in memory at once, copies included.
    """

    out_dim: int
    halo: int
    live_maps: int

    def checked(self, image: torch.Tensor) -> torch.Tensor:
        """The image in the memory format that is fastest; raises unless it is one [B, 3, h, w]."""
        check_image(image, next(self.parameters()).device)
        return image if prefers_conv2d(image) else image.contiguous(memory_format=torch.channels_last)

    @property
    def stages(self) -> list[nn.Module]:
        """Modules that `forward` runs once each, of similar work, for `progress`."""
        raise NotImplementedError

    def tiled(self, image: torch.Tensor, workspace: int, progress: Progress = None) -> torch.Tensor:
        """As `forward`, exact for any size, on tiles that overlap by the receptive field.

        Args:
            image: [B, 3, h, w].
            workspace: bytes of working memory in addition to the features, approximately; a tile is never smaller
                than its overlap.
            progress: called as progress(done, total) after each tile, or after each of `stages` if there is one tile.
        """
        side = self._tile_side(image, workspace)
        if side is None:
            with reporting(lambda: [(stage, parameters(stage)) for stage in self.stages], progress):
                return self(image)
        return map_tiles(self, image, side=side, halo=self.halo, progress=progress)

    def tiled_pixels(self, image: torch.Tensor, workspace: int) -> int:
        """The pixels that `tiled` computes, overlaps included, for an image [B, 3, h, w]."""
        side, (height, width) = self._tile_side(image, workspace), image.shape[2:]
        return len(image) * (height * width if side is None else pixels_with_halo((height, width), side, self.halo))

    def _tile_side(self, image: torch.Tensor, workspace: int) -> int | None:
        """None: the whole image at once."""
        check_workspace(workspace)
        pixel = self.live_maps * self.out_dim * max(4, image.element_size()) * max(1, len(image))
        side = max(math.isqrt(int(workspace // pixel)) - 2 * self.halo, 2 * self.halo)
        return None if max(image.shape[2:]) <= side + 2 * self.halo else side
