"""Random masks: their kinds, shares and repeatability."""

import cv2
import numpy
import pytest
import torch

from inr_kernels.models.data import images, masks


def drawn(kind, size=(256, 256), count=8):
    return [masks.draw(kind, *size, numpy.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("kind", [*masks.KINDS, "strokes:5-10", "noise:50"])
def test_a_state_gives_a_mask(kind):
    first, second = drawn(kind, (200, 280), 3), drawn(kind, (200, 280), 3)
    assert all(mask.dtype == bool and mask.shape == (200, 280) for mask in first)
    assert all(numpy.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not numpy.array_equal(first[0], other) for other in first[1:])


@pytest.mark.parametrize("kind", [*masks.KINDS])
def test_tiny_masks(kind):
    assert [mask.shape for size in ((5, 3), (1, 1)) for mask in drawn(kind, size, 1)] == [(5, 3), (1, 1)]


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        *(("strokes", 0.2, 0.3), ("strokes:15", 0.15, 0.17), ("strokes:5-10.5", 0.05, 0.105)),
        *(("noise", 0.08, 0.92), ("noise:50", 0.48, 0.52)),
        *(("thin", 0, 0.5), ("medium", 0, 0.5), ("thick", 0, 0.5), ("box", 0.01, 1)),
    ],
)
def test_shares(kind, low, high):
    shares = [mask.mean() for mask in drawn(kind)]
    assert low < min(shares) <= max(shares) <= high


def test_boxes_keep_the_margin():
    for mask in drawn("box"):
        inner = mask[10:-10, 10:-10]
        assert inner.sum() == mask.sum() and inner.any(1).sum() >= 30


def test_lama_has_parameters_for_two_sizes():
    """At 512 pixels a thick line has up to 254 pixels across, at 256 up to 104."""
    small, large = (masks.TESTS["thick"][side] for side in (256, 512))
    rng = numpy.random.default_rng
    assert numpy.array_equal(masks._test("thick", 362, 900, rng(3)), drawn_of(small, 362, 900, rng(3)))
    assert numpy.array_equal(masks._test("thick", 363, 900, rng(3)), drawn_of(large, 363, 900, rng(3)))


def drawn_of(mix, height, width, rng):
    while (mask := masks._mixed(mix, height, width, rng)).mean() > masks.LARGEST:
        pass
    return mask


@pytest.mark.parametrize("thickness", [5, 12, 104])
@pytest.mark.parametrize("end", [(130, 110), (60, 120), (140, 75)])
def test_segments_are_those_of_opencv(thickness, end):
    """LaMa draws with OpenCV. The outlines differ by at most a pixel."""
    mask, expected = numpy.zeros((180, 200), bool), numpy.zeros((180, 200), numpy.uint8)
    masks._segment(mask, (60, 70), end, thickness)
    cv2.line(expected, (60, 70), end, 1, thickness)
    wrong = (mask != expected).astype(numpy.uint8)
    assert not cv2.erode(wrong, numpy.ones((2, 2), numpy.uint8)).any()
    assert abs(mask.sum() / expected.sum() - 1) < 0.06


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("dots", "be one of thin, medium, thick, mixed, box, strokes, noise; got 'dots'"),
        ("thin:10", "have a range only after strokes or noise; got 'thin:10'"),
        *((f"strokes:{text}", "be like strokes:20-30 or strokes:15, in percent") for text in ("a", "30-20", "1-2-3")),
        *((f"noise:{text}", "be like noise:20-30 or noise:15, in percent") for text in ("101", "-5", "..", "nan")),
    ],
)
def test_unknown_kinds(kind, rule):
    with pytest.raises(ValueError, match=f"kind must {rule}"):
        masks.draw(kind, 8, 8, numpy.random.default_rng(0))


def test_sides_are_positive():
    with pytest.raises(ValueError, match="height and width must be positive; got 8 and 0"):
        masks.draw("thin", 8, 0, numpy.random.default_rng(0))


def test_a_mask_from_a_picture():
    colour = torch.tensor([0.4, 0.5, 1, 1]).view(1, 1, 2, 2)
    alpha = torch.tensor([1, 1, 0.4, 0.6]).view(1, 1, 2, 2)
    assert masks.from_picture(images.Picture(colour)).flatten().tolist() == [0, 1, 1, 1]
    assert masks.from_picture(images.Picture(colour, alpha)).flatten().tolist() == [0, 1, 0, 1]
