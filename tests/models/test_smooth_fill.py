"""The smooth fill of missing pixels."""

import pytest
import torch

from inr_kernels.models.common.smooth import smooth_fill

SIZES = [(1, 1), (1, 9), (7, 2), (16, 16), (13, 30)]


def example(size, share=0.4):
    """A random image, a mask, and the image without the masked pixels."""
    image, mask = torch.rand(2, 3, *size), (torch.rand(2, 1, *size) < share).float()
    return image, mask, image * (1 - mask)


@pytest.mark.parametrize("size", SIZES)
def test_keeps_known_pixels(size):
    image, mask, known = example(size)
    out = smooth_fill(known, mask)
    assert torch.equal(out[(mask == 0).expand_as(out)], image[(mask == 0).expand_as(out)])
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_constants_continue(dtype):
    mask = torch.zeros(2, 1, 37, 50, dtype=dtype)
    mask[0, :, 3:30, 2:45] = 1
    mask[1, :, 1:] = 1
    out = smooth_fill(0.25 * (1 - mask).expand(-1, 3, -1, -1), mask)
    assert out.dtype == dtype
    torch.testing.assert_close(out, torch.full_like(out, 0.25))


def test_ramps_continue():
    """A linear image is harmonic; a fill with the mean colour would be off by 0.14."""
    ramp = torch.linspace(0, 1, 48).expand(1, 3, 40, 48)
    mask = torch.zeros(1, 1, 40, 48)
    mask[..., 10:30, 12:36] = 1
    assert (smooth_fill(ramp * (1 - mask), mask) - ramp).abs().max() < 0.05


def test_an_image_without_known_pixels_becomes_grey():
    out = smooth_fill(torch.zeros(1, 3, 9, 14), torch.ones(1, 1, 9, 14))
    torch.testing.assert_close(out, torch.full_like(out, 0.5))


def test_images_of_a_batch_are_independent():
    _, mask, known = example((11, 17))
    both = smooth_fill(known, mask)
    torch.testing.assert_close(
        both, torch.cat([smooth_fill(*pair) for pair in zip(known.split(1), mask.split(1), strict=True)])
    )


def test_a_soft_mask_blends_with_the_surroundings():
    """At mask 0.5 the fill has half the pixel's own colour and half its neighbours'."""
    image = torch.zeros(1, 3, 9, 9)
    image[..., 4, 4] = 1
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., 4, 4] = 0.5
    out = smooth_fill(image * (1 - mask), mask)
    assert 0.5 < out[0, 0, 4, 4] < 0.6 and out.sum() == out[..., 4, 4].sum()
