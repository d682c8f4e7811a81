"""Views of a photo find the same boxes, and are merged as each way of merging promises."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from common.data.dataset import Dataset, DatasetWriter
from common.io.errors import UserError
from common.tables import read_detections
from common.training import distributed
from detection.evaluate import evaluate_variables
from detection.models.settings import ModelSettings
from detection.settings import read_run
from detection.tta import photo_blocks, test_time
from tests import tiny

BOXES = [(0.1, 0.2, 0.4, 0.6), (0.5, 0.5, 0.9, 0.75), (0.0, 0.3, 0.3, 1.0)]
SIZES = [(64, 96), (96, 64), (64, 96)]  # height, width of the photos


class BrightArea(nn.Module):
    """Stands in for a detector: finds the bright area of a photo, exactly.

    Its score is that of the view: the canvas' share of 1000 pixels, a little less when mirrored,
    which the dark dot in the photo's top left corner tells.
    """

    settings: ModelSettings

    def _area(self, batch):
        bright = batch["image"][..., 0] > 200
        x, y = bright.any(axis=1), bright.any(axis=2)

        def ends(line):
            return line.argmax(axis=1), line.shape[1] - line[:, ::-1].argmax(axis=1)

        (x1, x2), (y1, y2) = ends(x), ends(y)
        boxes = jnp.stack([x1, y1, x2, y2], axis=-1).astype(jnp.float32)
        mirrored = batch["image"][:, 0, 0, 0] > 60
        score = (batch["image"].shape[1] + batch["image"].shape[2]) / 1000 - 0.01 * mirrored
        return boxes, score.astype(jnp.float32), batch["image_valid"]

    def __call__(self, batch, train):
        """The area, and a weaker box half as wide that NMS leaves (IoU 0.5)."""
        boxes, score, valid = self._area(batch)
        half = boxes.at[:, 2].set((boxes[:, 0] + boxes[:, 2]) / 2 - 0.5)
        return {
            "boxes": jnp.stack([boxes, half], axis=1),
            "scores": jnp.stack([score, score / 2], axis=1),
            "classes": jnp.array([[1, 1]]).repeat(len(boxes), axis=0),
            "valid": jnp.stack([valid, valid], axis=1),
        }

    def propose_on(self, batch):
        found = self(batch, train=False)
        return {name: found[name] for name in ("boxes", "scores", "valid")}

    def score_proposals(self, batch, boxes, valid):
        """Class 0 keeps the proposals' boxes; class 1 has them moved down by 4 pixels."""
        _, score, _ = self._area(batch)
        area = jnp.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)
        big = area > 0.9 * area.max(axis=1, keepdims=True)
        scores = jnp.where(big, score[:, None], 0.0)[..., None] * jnp.array([0.0, 1.0, 0.5])
        shifts = jnp.array([[0.0] * 4, [0.0, 4.0, 0.0, 4.0]])
        return {"scores": scores, "boxes": boxes[:, :, None] + shifts}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """Grey photos with one bright area each, and a dark dot in the corner."""
    folder = tmp_path_factory.mktemp("bright")
    with DatasetWriter(folder / "set", "x", ["a", "b"], ["a", "b"], None, str(folder)) as writer:
        for i, (box, (height, width)) in enumerate(zip(BOXES, SIZES, strict=True)):
            pixels = np.full((height, width, 3), 100, np.uint8)
            pixels[:8, :8] = 0
            x1, y1, x2, y2 = np.round(np.array(box) * [width, height, width, height]).astype(int)
            pixels[y1:y2, x1:x2] = 255
            Image.fromarray(pixels).save(folder / f"{i}.png")
            writer.add_image(f"{i}", f"{i}.png", (0, 0))
        writer.add_split("all", range(3))
    return Dataset.open(folder / "set")


def make_config(**test_time_fields) -> ConfigDict:
    config = tiny.get_config()
    config.data.canvas = (96, 96)
    config.evaluation.batch_size = 4
    config.model.detections.update(max_detections=5, max_candidates=20)
    config.test_time = dict(
        scales=(64, 128), long_ratios=(1.5,), max_long=1000, flip=True, merge="union"
    )
    config.test_time.update(test_time_fields)
    return config


def detect(config, dataset, output, mesh=None, split="all"):
    settings = read_run(config)
    model = BrightArea(settings.model)
    mesh = mesh or distributed.make_mesh(jax.devices()[:2])
    test_time.detect_split(
        settings, model, {}, dataset, split, mesh, output, step=1, say=lambda *_, **__: None
    )


def expected_box(i, tolerance_pixels=1.0):
    height, width = SIZES[i]
    return np.array(BOXES[i]), tolerance_pixels / min(height, width)


def test_each_view_has_a_table_and_all_find_the_same_boxes(dataset, tmp_path):
    detect(make_config(merge="tables"), dataset, tmp_path / "views")
    names = ["scale0064", "scale0064_flip", "scale0128", "scale0128_flip"]
    assert sorted(p.name for p in (tmp_path / "views").iterdir()) == [f"{n}.parquet" for n in names]
    for name in names:
        table = read_detections(tmp_path / "views" / f"{name}.parquet")
        assert table.metadata["view"] == name and list(table.image_ids) == ["0", "1", "2"]
        sides = 64 + 96 if "64" in name else 128 + 192
        np.testing.assert_allclose(
            table.scores[::2], sides / 1000 - 0.01 * ("flip" in name), atol=1e-6
        )
        for i in range(3):
            box, tolerance = expected_box(i)
            np.testing.assert_allclose(table.boxes[2 * i], box, atol=tolerance)


def test_union_keeps_the_best_view_of_overlapping_boxes(dataset, tmp_path):
    detect(make_config(), dataset, tmp_path / "x.parquet")
    table = read_detections(tmp_path / "x.parquet")
    # Of four views: the area once; the half-wide box once from plain and once from mirrored views,
    # which see the halves of the other side.
    np.testing.assert_allclose(table.scores.reshape(3, 3), [[0.32, 0.16, 0.155]] * 3, atol=1e-6)
    for i in range(3):
        box, tolerance = expected_box(i)
        np.testing.assert_allclose(table.boxes[3 * i], box, atol=tolerance)


def test_mean_averages_boxes_and_scores_of_all_views(dataset, tmp_path):
    detect(make_config(merge="mean"), dataset, tmp_path / "x.parquet")
    table = read_detections(tmp_path / "x.parquet")
    score = np.mean([0.16, 0.15, 0.32, 0.31])
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)  # one a class; the small proposals score 0
        np.testing.assert_allclose(table.scores[rows], [score, score / 2], rtol=1e-5)
        assert [table.labels[k] for k in table.label_index[rows]] == ["a", "b"]
        box, tolerance = expected_box(i)
        np.testing.assert_allclose(table.boxes[rows][0], box, atol=tolerance)
        # 4 pixels of the canvas are another share of the photo at each scale: their mean counts.
        heights = [64, 128] if i != 1 else [96, 192]
        shift = np.mean([4 / height for height in heights])
        moved = table.boxes[rows][1] - table.boxes[rows][0]
        bottom = min(shift, 1 - box[3]) if i != 2 else 0
        np.testing.assert_allclose(moved, [0, shift, 0, bottom], atol=1e-5)


def test_one_view_on_the_same_canvas_is_the_plain_export(dataset, tmp_path):
    config = make_config(scales=(96,), long_ratios=(1.0,), flip=False)
    detect(config, dataset, tmp_path / "view.parquet")
    config.test_time.scales = ()
    detect(config, dataset, tmp_path / "plain.parquet")
    view, plain = (read_detections(tmp_path / f"{name}.parquet") for name in ("view", "plain"))
    assert len(plain) == 6 and list(view.image_ids) == list(plain.image_ids)
    for field in ("scores", "boxes", "label_index", "image_index"):
        np.testing.assert_allclose(
            getattr(view, field), getattr(plain, field), atol=1e-6, err_msg=field
        )


@pytest.mark.parametrize(
    ("count", "limit", "sizes"),
    [(4, 9, [4]), (4, 3, [2, 2]), (4, 0, [1] * 4), (6, 4, [3, 3]), (1, 5, [1])],
)
def test_large_canvases_take_fewer_photos_at_a_time(count, limit, sizes):
    rows = photo_blocks.batch_rows(count, 3, limit)
    assert [len(part) for part in rows] == [3 * size for size in sizes]
    assert sorted(np.concatenate(rows)) == list(range(3 * count))
    # Device d of a batch holds photos that it also has in the block.
    owners = [part.reshape(3, -1) // count for part in rows]
    assert all((owner == np.arange(3)[:, None]).all() for owner in owners)


@pytest.mark.parametrize(
    ("field", "value"),
    [("scales", (64, 64)), ("long_ratios", (2.0, 1.5)), ("max_long", 100), ("merge", "median")],
)
def test_fields_out_of_range_are_named(dataset, tmp_path, field, value):
    with pytest.raises(UserError, match=rf"config\.test_time\.{field}: found"):
        detect(make_config(**{field: value}), dataset, tmp_path / "x.parquet")
    assert list(tmp_path.iterdir()) == []


def test_tables_of_views_cannot_be_scored_before_they_are_merged(tmp_path):
    with pytest.raises(UserError, match="expected 'union' or 'mean' to score"):
        evaluate_variables(
            read_run(make_config(merge="tables")),
            None,
            None,
            None,
            {},
            1,
            tmp_path,
            split="all",
            test_time=True,
        )
