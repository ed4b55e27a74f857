"""The crop strategy: holes with their surroundings."""

import pytest
import torch

from inr_kernels.models import IN2
from inr_kernels.models.common.surroundings import fill_surroundings, surroundings


def holes(height, width, *boxes):
    """A mask [1, 1, H, W] with these holes: (top, bottom, left, right)."""
    mask = torch.zeros(1, 1, height, width)
    for top, bottom, left, right in boxes:
        mask[..., top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([], []),
        ([(40, 50, 40, 60)], [(30, 60, 30, 70)]),
        ([(0, 3, 195, 200)], [(0, 13, 185, 200)]),  # at the border
        ([(0, 100, 0, 200)], [(0, 100, 0, 200)]),
        ([(40, 50, 40, 60), (40, 50, 79, 90)], [(30, 60, 30, 100)]),  # nearer than two margins
        ([(40, 50, 40, 60), (40, 50, 80, 90)], [(30, 60, 30, 100)]),
        ([(40, 50, 40, 60), (40, 50, 81, 90)], [(30, 60, 30, 70), (30, 60, 71, 100)]),
        # Three groups of which a cut through all columns separates none.
        ([(0, 60, 0, 5), (90, 99, 0, 90), (0, 60, 150, 160)], [(0, 70, 0, 15), (0, 70, 140, 170), (80, 100, 0, 100)]),
    ],
)
def test_surroundings(boxes, expected):
    found = surroundings(holes(100, 200, *boxes), margin=10)
    assert [(y.start, y.stop, x.start, x.stop) for y, x in found] == expected


@pytest.mark.parametrize("seed", range(5))
def test_every_hole_is_in_one_part_with_its_margin(seed):
    mask = (torch.rand(1, 1, 90, 120, generator=torch.manual_seed(seed)) < 0.001).float()
    count = torch.zeros_like(mask)
    for y, x in surroundings(mask, margin=5):
        count[..., y, x] += 1
    near = torch.nn.functional.max_pool2d(mask, 11, 1, 5)
    assert count.max() == 1 and (count[near > 0] == 1).all()


@pytest.mark.parametrize("at", [0, 50, 99])
def test_parts_have_the_shortest_side(at):
    ((y, x),) = surroundings(holes(100, 8, (at, at + 1, 3, 4)), margin=2, min_side=9)
    assert y.stop - y.start == 9 and y.start <= at < y.stop and (x.start, x.stop) == (0, 8)


def test_fills_holes_from_their_surroundings():
    model, seen, done = IN2.pretrained(), [], []
    image, mask = torch.rand(1, 3, 60, 90), holes(60, 90, (20, 24, 10, 15), (40, 44, 70, 74))

    def fill(part, part_mask, progress):
        seen.append(part.shape[2:])
        return model.inpaint(part, part_mask, progress=progress)

    out = fill_surroundings(fill, image, mask, 8, model.min_side, lambda *n: done.append(n))
    assert seen == [(20, 21), (20, 20)] and torch.equal(out[mask.expand_as(out) == 0], image[mask.expand_as(out) == 0])
    assert torch.equal(out[..., 12:32, 2:23], model.inpaint(image[..., 12:32, 2:23], mask[..., 12:32, 2:23]))
    shares = [n / total for n, total in done]
    assert shares == sorted(shares) and shares[-1] == 1
    assert torch.equal(fill_surroundings(fill, image, mask * 0, progress=lambda *n: done.append(n)), image)
    assert len(seen) == 2 and done[-1] == (1, 1)
