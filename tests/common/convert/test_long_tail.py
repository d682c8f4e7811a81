"""COCO files become a long-tailed LVIS set: deterministic, validation untouched, nothing lost."""

import json

import numpy as np
import pytest

from common.convert.long_tail import thin_classes, write_long_tail
from common.data.dataset import ABSENT
from common.io.errors import UserError
from tests.prepare_data_cli import prepare

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox")


def coco_file(path, seed, first_id, photos=40):
    """Photos with one object of about half the classes each, and a crowd of ants on the first."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image in range(first_id, first_id + photos):
        images.append({"id": image, "file_name": f"{image:06d}.jpg", "height": 100, "width": 200})
        shown = np.flatnonzero(rng.random(len(NAMES)) < 0.5)
        rows = [(int(c), 0) for c in shown] + [(0, 1)] * (image == first_id)
        for category, crowd in rows:
            x, y = rng.integers(0, 50, 2).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category + 1,
                    "bbox": [x, y, 40, 30],
                    "area": 1200.0,
                    "iscrowd": crowd,
                    "segmentation": [[x, y, x + 40, y, x + 40, y + 30, x, y + 30]],
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return content


def test_classes_are_dealt_and_thinned_by_the_seed():
    photos = {c: range(10 * c, 10 * c + 40 - c) for c in range(9)}
    thinned = thin_classes(photos, (3, 9), seed=0)
    assert [thinned.frequency[c] for c in range(9)] == list("fcr") * 3
    for category, letter in thinned.frequency.items():
        low, high = {"f": (40 - category,) * 2, "c": (4, 9), "r": (1, 3)}[letter]
        assert low <= len(thinned.kept[category]) <= high
        assert thinned.kept[category] <= set(photos[category])
    assert thin_classes(photos, (3, 9), seed=0) == thinned
    assert thin_classes(photos, (3, 9), seed=1).kept != thinned.kept
    few = thin_classes({0: [5], 1: [6, 7]}, (3, 9), seed=0)
    assert set(few.frequency.values()) == {"r"} and few.kept[0] == {5}


def test_the_set_is_prepared_and_nothing_is_lost(tmp_path):
    train = coco_file(tmp_path / "instances_train.json", 0, 1)
    validation = coco_file(tmp_path / "instances_val.json", 1, 101)
    files = tmp_path / "instances_train.json", [tmp_path / "instances_val.json"]
    thinned = write_long_tail(*files, tmp_path / "tail", (2, 5), seed=0)
    dataset = prepare(
        "lvis",
        source=str(tmp_path / "tail" / "lvis_*.json"),
        ignore=[str(tmp_path / "tail" / "ignore.json")],
        output=tmp_path / "set",
    )
    assert dataset.meta["frequency"] == [thinned.frequency[c] for c in range(1, 7)]
    counts = {split: 0 for split in dataset.splits}
    for split in dataset.splits:
        for image in dataset.split(split):
            counts[split] += len(dataset.image_boxes(image)[0])
    of_validation = [a for a in validation["annotations"] if not a["iscrowd"]]
    assert counts["val"] == len(of_validation)
    assert dataset.ignore_boxes is not None
    assert counts["train"] + len(dataset.ignore_boxes) == len(train["annotations"])
    for category, kept in thinned.kept.items():
        shown = np.repeat(np.arange(dataset.num_images), np.diff(dataset.box_offsets))
        own = np.intersect1d(shown[dataset.box_classes == category - 1], dataset.split("train"))
        assert {int(dataset.image_id(i)) for i in own} == kept
    # COCO checks every class: what it has not on a photo is absent there.
    image = int(dataset.find_images(["101"])[0])
    classes, confidences = dataset.image_labels(image)
    shown = {a["category_id"] - 1 for a in validation["annotations"] if a["image_id"] == 101}
    assert set(classes[confidences == ABSENT].tolist()) == set(range(6)) - shown


def test_files_without_masks_or_of_one_split_are_refused(tmp_path):
    path = tmp_path / "instances_train.json"
    content = coco_file(path, 0, 1)
    with pytest.raises(UserError, match="found splits train, train, expected different names"):
        write_long_tail(path, [path], tmp_path / "tail", (2, 5), 0)
    for row in content["annotations"]:
        row["segmentation"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no object has a mask, expected some"):
        write_long_tail(path, [], tmp_path / "tail", (2, 5), 0)
