"""Anchors lie where the papers say, in the order in which the RPN head emits its outputs."""

import numpy as np
import pytest

from common.io.errors import UserError
from detection.assign.anchors import cell_anchors, grid_anchors


def test_sizes_of_the_papers_18_anchors():
    cell = cell_anchors(4, scales=(8, 11, 14), ratios=(0.1, 0.5, 1, 2, 4, 8))
    sides = cell[:, 2:] - cell[:, :2]
    assert cell.shape == (18, 4)
    # Squares of 32, 44, 56; ratio 0.1 is 101 x 10, ratio 8 is 11.3 x 90.5.
    np.testing.assert_allclose(sides[6:9], [[32, 32], [44, 44], [56, 56]], rtol=1e-5)
    np.testing.assert_allclose(sides[0], [101.2, 10.12], rtol=1e-3)
    np.testing.assert_allclose(sides[15], [11.31, 90.51], rtol=1e-3)


def test_ratio_conventions_are_transposes_of_each_other():
    tall = cell_anchors(8, (8,), (2.0,), "h/w")
    wide = cell_anchors(8, (8,), (2.0,), "w/h")
    np.testing.assert_allclose(tall, wide[:, [1, 0, 3, 2]])
    assert (tall[0, 3] - tall[0, 1]) > (tall[0, 2] - tall[0, 0])


def test_unknown_convention_is_refused():
    with pytest.raises(UserError, match="ratio_convention"):
        cell_anchors(8, (8,), (2.0,), "area")


@pytest.mark.parametrize("centre", [0.0, 0.5])
def test_grid_order_and_centres(centre):
    (level,) = grid_anchors([(3, 5)], [16], (8.0,), (0.5, 1.0, 2.0), centre=centre)
    level = np.asarray(level).reshape(3, 5, 3, 4)
    middle = (level[..., :2] + level[..., 2:]) / 2
    for row in range(3):
        for column in range(5):
            expected = [(column + centre) * 16, (row + centre) * 16]
            np.testing.assert_allclose(middle[row, column], [expected] * 3, atol=1e-4)


def test_rounded_anchors_on_corners_are_those_of_torchvision():
    rpn = pytest.importorskip("torchvision.models.detection.anchor_utils")
    torch = pytest.importorskip("torch")
    ratios, strides = (0.5, 1.0, 2.0), (4, 8, 16)
    generator = rpn.AnchorGenerator(tuple((8 * s,) for s in strides), (ratios,) * 3)
    images = torch.zeros(1, 3, 64, 96)
    maps = [torch.zeros(1, 1, 64 // s, 96 // s) for s in strides]
    batch = pytest.importorskip("torchvision.models.detection.image_list")
    theirs = generator(batch.ImageList(images, [(64, 96)]), maps)[0].numpy()
    shapes = [(64 // s, 96 // s) for s in strides]
    ours = grid_anchors(shapes, strides, (8.0,), ratios, "h/w", 0.0, True)
    np.testing.assert_array_equal(np.concatenate(ours), theirs)


def test_count_at_1024_with_18_anchors():
    shapes = [(1024 // s, 1024 // s) for s in (4, 8, 16, 32, 64)]
    levels = grid_anchors(shapes, (4, 8, 16, 32, 64), (8, 11, 14), (0.1, 0.5, 1, 2, 4, 8))
    assert sum(len(level) for level in levels) == 1_571_328
