"""Pictures of batches show what the model is fed; the histogram counts what the sampler draws."""

import csv

import numpy as np
import pytest
from etils import epath
from PIL import Image

from common.data.input import train_batches
from common.data.plans.plan import class_histogram, train_plan
from common.report.panels import CAPTION
from common.report.photo_drawing import class_colour
from detection.settings import read_run
from scripts import class_histogram as histogram
from scripts import draw_batches as draw
from tests import tiny, tiny_masks
from tests.commands import run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    config = tiny.get_config()
    config.data.dir = str(tiny.write_dataset(folder / "tiny"))
    config.data.sampler = "class_aware"
    config.data.elaborate.update(scale="crop", rotate=True)
    return config


def test_a_picture_a_slot_with_the_boxes_of_the_batch(config, tmp_path):
    settings = read_run(config)
    paths = draw.draw_batches(settings, 3, 2, 6, epath.Path(tmp_path / "pictures"))
    assert len(paths) == 7 and paths[-1].name == "overview.jpg"
    assert [path.name[:11] for path in paths[:6]] == [
        *(f"000003_000{i}" for i in range(4)),
        *(f"000004_000{i}" for i in range(2)),
    ]
    dataset = draw.open_dataset(config.data.dir)
    plan = train_plan(dataset, settings.data, 0)
    batch = next(train_batches(dataset, plan, settings.data, seed=0, start_step=3, num_steps=1))
    scale = 512 // 64
    for slot in range(4):
        picture = np.asarray(Image.open(paths[slot]).convert("RGB")).astype(int)[CAPTION:]
        assert picture.shape == (512, 512, 3)
        for place in np.flatnonzero(batch["gt_valid"][slot]):
            class_ = batch["gt_classes"][slot, place]
            x0, _, x1, y1 = (batch["gt_boxes"][slot, place] * scale).astype(int)
            bottom = picture[min(y1, 510) - 2 : y1 + 3, (x0 + x1) // 2]
            assert np.abs(bottom - class_colour(class_)).max(1).min() < 90


def test_masks_and_captions(tmp_path):
    dataset = draw.open_dataset(str(tiny_masks.write_dataset(tmp_path / "set")))
    config = tiny.get_config()
    config.data.update(dir=str(dataset.directory), mask_size=16, sampler="class_aware")
    config.model.mask_head.kind = "class_agnostic"
    settings = read_run(config)
    plan = train_plan(dataset, settings.data, 0)
    batch = next(train_batches(dataset, plan, settings.data, seed=0, num_steps=1))
    masks = draw.object_masks(batch, 0, (64, 64))
    assert len(masks) == batch["gt_valid"][0].sum()
    for place, mask in enumerate(masks):
        if mask is not None:
            x0, y0, x1, y1 = batch["gt_boxes"][0, place].astype(int)
            share = np.unpackbits(batch["gt_masks"][0, place]).mean()
            assert mask.sum() == mask[y0 : y1 + 2, x0 : x1 + 2].sum()
            assert abs(mask[y0:y1, x0:x1].mean() - share) < 0.15
    name = dataset.class_names[batch["drawn_class"][0]]
    assert draw.caption(batch, 0, plan, dataset).endswith(f"64x48, drawn for {name}")


def test_labels_are_no_boxes_in_the_histogram(config):
    weak = tiny.get_config("weak")
    weak.data.dir = config.data.dir
    dataset = draw.open_dataset(config.data.dir)
    plan = train_plan(dataset, read_run(weak).data, 0)
    of_images = [dataset.image_boxes(i)[1] for i in dataset.split("train")]
    there = histogram.training_set(plan, chunk=4)
    boxes = np.bincount(np.concatenate(of_images), minlength=3)
    assert there.boxes.tolist() == boxes.tolist()
    photos = np.bincount(np.concatenate([np.unique(of) for of in of_images]), minlength=3)
    assert there.images.tolist() == (2 * photos).tolist()  # once with boxes, once with labels
    found = class_histogram(plan, [step for step in range(8) if plan.labels_only(step)])
    assert found.images.any() and not found.boxes.any()


def test_the_histogram_beside_the_training_set(config, tmp_path):
    dataset = draw.open_dataset(config.data.dir)
    plan = train_plan(dataset, read_run(config).data, 0)
    there = histogram.training_set(plan)
    classes = np.concatenate([dataset.image_boxes(i)[1] for i in dataset.split("train")])
    assert there.boxes.tolist() == np.bincount(classes, minlength=3).tolist()
    table = histogram.rows(
        dataset.class_labels, dataset.class_names, there, class_histogram(plan, range(5))
    )
    assert sorted(row[0] for row in table) == sorted(dataset.class_labels)
    assert sum(row[4] for row in table) == 5 * 4
    assert histogram.text(table, 1).splitlines()[2] == "..."
    output = run(
        "scripts.class_histogram",
        f"--config={tiny.__file__}",
        f"--config.data.dir={config.data.dir}",
        "--config.data.sampler=full_class_batch",
        "--steps=7",
        f"--csv={tmp_path / 'x.csv'}",
        f"--output={tmp_path / 'x.svg'}",
    )
    assert "3 of 3 classes have photos; 3 of them were drawn for in every batch" in output
    with open(tmp_path / "x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["absent"] for row in rows] == ["0"] * 3
    assert sum(int(row["drawn"]) for row in rows) == 7 * 4
    assert "full_class_batch" in (tmp_path / "x.svg").read_text()
