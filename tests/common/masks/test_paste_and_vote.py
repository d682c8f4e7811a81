import numpy as np
import pytest

from common.io.errors import UserError
from common.io.settings import read_settings
from common.masks import rle, vote
from common.masks.paste import CropMaps, PixelGrid, box_masks, paste, pixel_window
from common.masks.probability import PROBABILITY_ONE
from configs.segmentation import hrnet_w48_256
from segmentation.settings import InferenceSettings
from tests.oracles import segmentation as oracle


def interpolated(values, window, pixels) -> np.ndarray:
    """Values of maps (V, h, w) at all pixels of a box, (V, H, W)."""
    top, left, bottom, right = pixels.tolist()
    maps = CropMaps(values, values.shape[1:], window)
    grid = PixelGrid.of(maps, range(top, bottom), range(left, right))
    rows, columns = np.mgrid[: bottom - top, : right - left]
    found = grid.interpolate(rows.reshape(-1), columns.reshape(-1))
    return found.reshape(-1, *rows.shape)


@pytest.mark.parametrize("seed", range(6))
def test_pasting_equals_the_twin(seed):
    """Enlarged and shrunk, whole and fractional boxes, at the edges of the photo."""
    rng = np.random.default_rng(seed)
    photo = rng.integers(5, 40, 2)
    limits = photo[[1, 0, 1, 0]]
    window = np.sort(rng.uniform(0, 1, (2, 2)), axis=0).reshape(4) * limits
    window = np.where(rng.random(4) < 0.3, np.round(window), window)
    window[2:] = np.maximum(window[2:], np.minimum(window[:2] + 1.01, limits[2:]))
    window[:2] = np.minimum(window[:2], window[2:] - 1.01)
    window = np.clip(window, 0, limits).astype(np.float32)
    values = rng.random((3, *rng.integers(1, 30, 2)))
    expected = np.stack([oracle.paste(v, window, tuple(photo)) for v in values])
    top, left, bottom, right = pixels = pixel_window(window[None], photo[None])[0]
    found = interpolated(values, window, pixels)
    inside = ~np.isnan(expected[0])
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    assert (top, bottom) == (rows[0], rows[-1] + 1)
    assert (left, right) == (columns[0], columns[-1] + 1)
    np.testing.assert_allclose(found, expected[:, top:bottom, left:right], atol=1e-5)


def test_boxes_without_a_pixel_centre_get_the_pixel_they_lie_in():
    windows = np.array([[3.6, 2.6, 4.4, 2.9], [9.8, 0.0, 10.0, 5.0], [0, 0, 0.1, 0.1]], np.float32)
    found = pixel_window(windows, np.array([[5, 10]] * 3))
    assert found.tolist() == [[2, 4, 3, 5], [0, 9, 5, 10], [0, 0, 1, 1]]
    assert interpolated(np.full((1, 4, 4), 0.7), windows[0], found[0]) == pytest.approx(0.7)


@pytest.mark.parametrize("kind", ["smooth", "noise", "threshold"])
@pytest.mark.parametrize(("rule", "voters"), [("mean", (1,)), ("mean", (1, 1)), ("hard", (3, 1))])
def test_masks_are_those_of_interpolating_every_pixel(rule, voters, kind):
    """Bit for bit, whatever the voters say, with views of different sizes."""
    rng = np.random.default_rng(len(voters))
    weights = [2, 1] if rule == "mean" and len(voters) > 1 else None
    filled = 0
    for number in range(60):
        photo = rng.integers(3, 90, 2)
        window = np.sort(rng.uniform(0, 1, (2, 2)), axis=0).reshape(4) * photo[[1, 0, 1, 0]]
        window = window.astype(np.float32)
        pixels = pixel_window(window[None], photo[None])[0]
        threshold = (0.5, 0.3, 0.0, 0.99)[number % 4]
        at = round(threshold * PROBABILITY_ONE)
        crops = []
        for view in voters:
            content = tuple(rng.integers(1, 50, 2).tolist())
            y, x = (np.linspace(-1, 1, side) for side in content)
            radii = rng.uniform(0.6, 0.8, (view, 1, 1))
            values = 1 / (1 + np.exp(-9 * (radii - np.hypot(y[:, None], x))))
            if kind == "noise":
                values = rng.random(values.shape)
            values = np.round(values * PROBABILITY_ONE)
            if kind == "threshold":
                values = np.clip(at + rng.integers(-3, 4, values.shape), 0, PROBABILITY_ONE)
            canvas = np.pad(values, ((0, 0), (0, 3), (0, 5)), constant_values=PROBABILITY_ONE)
            crops.append(CropMaps(canvas.astype(np.uint16), content, window))
        found = paste(crops, pixels, rule, threshold, weights)
        maps = np.concatenate(
            [oracle.paste_float32(c.values, c.content, c.window, pixels) for c in crops]
        )
        expected = vote.combine(maps, rule, threshold, weights)
        np.testing.assert_array_equal(found, expected)
        filled += 0 < found.mean() < 1
    assert filled > 20


def random_boxes(rng, count, photo):
    """Boxes of all sizes, some at the borders of the photo, and maps with smooth and hard edges."""
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1).reshape(count, 4)
    corners = np.where(rng.random((count, 4)) < 0.15, np.round(corners), corners)
    boxes = corners * [photo[1], photo[0], photo[1], photo[0]]
    boxes[:, 2:] = np.maximum(boxes[:, 2:], np.minimum(boxes[:, :2] + 0.3, [photo[1], photo[0]]))
    boxes[:, :2] = np.minimum(boxes[:, :2], boxes[:, 2:] - 0.3)
    maps = rng.random((count, 28, 28)) ** rng.choice([0.2, 1.0], (count, 1, 1))
    maps[::3] = maps[::3].round()
    maps[1::3] = (
        np.hypot(*np.mgrid[-1:1:28j, -1:1:28j]) < rng.uniform(0.5, 1.4, (count, 1, 1))[1::3]
    )
    return boxes, np.round(maps * PROBABILITY_ONE).astype(np.uint16)


def test_masks_of_boxes_equal_the_twin_with_zeros_outside():
    rng = np.random.default_rng(0)
    for photo in ((7, 9), (60, 41), (33, 90)):
        boxes, maps = random_boxes(rng, 12, photo)
        found = box_masks(maps, boxes, photo, 0.5)
        for box, values, counts in zip(boxes, maps, found, strict=True):
            ring = np.pad(values / PROBABILITY_ONE, 1)
            cell = (box[2:] - box[:2]) / 28
            window = np.concatenate([box[:2] - cell, box[2:] + cell])
            expected = oracle.paste(ring, window, photo)
            mask, (top, left, bottom, right) = (
                rle.decode(counts, photo),
                pixel_window(box[None], np.array([photo]))[0],
            )
            inside = np.zeros(photo, bool)
            inside[top:bottom, left:right] = True
            assert not mask[~inside].any()
            sure = inside & (abs(expected - 0.5) > 1e-5)
            np.testing.assert_array_equal(mask[sure], expected[sure] > 0.5)


def test_masks_of_boxes_equal_grid_sample():
    """Pixel for pixel where a value is not within rounding of the threshold."""
    torch = pytest.importorskip("torch", reason="compares with torch's grid_sample")
    rng, photo = np.random.default_rng(1), (120, 97)
    boxes, maps = random_boxes(rng, 30, photo)
    y, x = (torch.arange(side, dtype=torch.float64) + 0.5 for side in photo)
    compared = 0
    for box, values, counts in zip(
        torch.from_numpy(boxes), maps, box_masks(maps, boxes, photo, 0.5), strict=True
    ):
        grid_y = (y - box[1]) / (box[3] - box[1]) * 2 - 1
        grid_x = (x - box[0]) / (box[2] - box[0]) * 2 - 1
        grid = torch.stack(torch.broadcast_tensors(grid_x[None], grid_y[:, None]), dim=-1)
        image = torch.from_numpy(values / PROBABILITY_ONE)[None, None]
        whole = torch.nn.functional.grid_sample(image, grid[None], align_corners=False)[0, 0]
        whole, mask = whole.numpy(), rle.decode(counts, photo)
        centres = (y >= box[1])[:, None] & (y < box[3])[:, None] & (x >= box[0]) & (x < box[2])
        if not centres.any():  # a box between the pixels has those that it lies in
            continue
        sure = abs(whole - 0.5) > 1e-6
        np.testing.assert_array_equal(mask[sure], whole[sure] > 0.5)
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("voters", [1, 2, 3, 4])
def test_hard_votes_equal_the_twin(voters):
    rng = np.random.default_rng(voters)
    # Few values, so that draws and means on the threshold happen.
    probabilities = rng.choice([0.25, 0.5, 0.75], (voters, 12, 12)).astype(np.float32)
    found = vote.combine(probabilities, "hard", 0.5)
    if voters > 1:
        np.testing.assert_array_equal(found, oracle.majority(probabilities, 0.5))
    else:
        np.testing.assert_array_equal(found, probabilities[0] > 0.5)


def test_four_voters_that_draw_follow_the_mean():
    sure, doubt = [0.9, 0.9, 0.45, 0.45], [0.55, 0.55, 0.1, 0.1]
    even = [0.75, 0.75, 0.25, 0.25]
    probabilities = np.array([sure, doubt, even], np.float32).T[:, None]
    assert vote.combine(probabilities, "hard", 0.5).tolist() == [[True, False, True]]
    assert vote.combine(probabilities, "mean", 0.5).tolist() == [[True, False, False]]


def test_means_count_each_voter_once():
    """A map may stand for several voters that looked at the same crop."""
    voters = np.array([0.9, 0.2, 0.2], np.float32)[:, None, None]
    together = np.array([0.9, 0.2], np.float32)[:, None, None]
    for threshold in (0.4, 0.45):
        expected = vote.combine(voters, "mean", threshold)
        assert vote.combine(together, "mean", threshold, weights=[1, 2]) == expected


@pytest.mark.parametrize(
    ("rule", "threshold", "field"),
    [("most", 0.5, "vote"), ("mean", 1.0, "threshold"), ("hard", -0.1, "threshold")],
)
def test_rules_that_make_no_sense_are_refused(rule, threshold, field):
    test = hrnet_w48_256.get_config().test
    test.update(vote=rule, threshold=threshold)
    with pytest.raises(UserError, match=f"config.test.{field}"):
        read_settings(InferenceSettings, test, "config.test")
