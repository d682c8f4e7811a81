"""Class mappings: columns by header, one label to several by rule, detections renamed."""

import csv

import numpy as np
import pytest

from common.io.errors import UserError
from common.tables import Detections
from common.tables.class_mapping import (
    SHIPPED,
    SHIPPED_PAIRS,
    find_class_mapping,
    map_detections,
    read_class_mapping,
)

TABLE = """\ufeffmid,coco_name,note,objects365
/m/car,car,sure,Car
/m/mug,cup,sure,
/m/glass,cup,guess,Cup
/m/cup,cup,guess,Cup
/m/ant,,sure,
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "mapping.csv"
    path.write_text(TABLE, encoding="utf-8")
    return path


def test_any_two_columns_make_a_mapping(path):
    assert read_class_mapping(path, "mid", "coco_name").targets == {
        "/m/car": ["car"],
        "/m/mug": ["cup"],
        "/m/glass": ["cup"],
        "/m/cup": ["cup"],
    }
    first = read_class_mapping(path, "coco_name", "mid", rule="first")
    assert first.targets == {"car": ["/m/car"], "cup": ["/m/mug"]}
    every = read_class_mapping(path, "coco_name", "mid", rule="all")
    assert every.targets["cup"] == ["/m/mug", "/m/glass", "/m/cup"]
    assert every.target_labels == ["/m/car", "/m/mug", "/m/glass", "/m/cup"]
    sure = read_class_mapping(path, "coco_name", "mid", where={"note": "sure"})
    assert sure.targets == {"car": ["/m/car"], "cup": ["/m/mug"]}


def test_bad_mappings_are_named(path, tmp_path):
    expected = "line 4: coco_name 'cup' is mapped to '/m/glass', and to '/m/mug' in line 3"
    with pytest.raises(UserError, match=expected):
        read_class_mapping(path, "coco_name", "mid")
    with pytest.raises(UserError, match="no column 'lvis', found mid, coco_name"):
        read_class_mapping(path, "lvis", "mid")
    with pytest.raises(UserError, match="no row with mid and objects365 and note = 'never'"):
        read_class_mapping(path, "mid", "objects365", where={"note": "never"})
    with pytest.raises(UserError, match="cannot read the class mapping"):
        read_class_mapping(tmp_path / "nothing.csv", "a", "b")
    path.write_text(TABLE + "/m/bus,bus\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 7: 2 fields, expected 4"):
        read_class_mapping(path, "mid", "coco_name")


def test_detections_are_renamed_in_order(path):
    mapping = read_class_mapping(path, "coco_name", "mid", rule="all")
    detections = Detections(
        image_ids=["a", "b"],
        labels=["dog", "cup", "car"],
        image_index=np.array([0, 0, 1, 1], np.int32),
        label_index=np.array([1, 0, 2, 1], np.int32),
        scores=np.array([0.9, 0.8, 0.7, 0.6], np.float32),
        boxes=np.arange(16, dtype=np.float32).reshape(4, 4) / 16,
        metadata={},
    )
    labels = ["/m/cup", "/m/glass", "/m/mug", "/m/car", "/m/ant"]
    mapped = map_detections(detections, mapping, labels)
    assert [labels[i] for i in mapped.label_index] == [
        "/m/mug",
        "/m/glass",
        "/m/cup",
        "/m/car",
        "/m/mug",
        "/m/glass",
        "/m/cup",
    ]
    assert mapped.image_index.tolist() == [0, 0, 0, 1, 1, 1, 1]
    np.testing.assert_array_equal(mapped.boxes, detections.boxes[[0, 0, 0, 2, 3, 3, 3]])
    assert len(map_detections(detections.take(slice(1, 2)), mapping, labels)) == 0


@pytest.mark.parametrize(
    ("name", "classes", "example"),
    [
        ("coco_to_openimages", 72, ("mouse", "/m/020lf")),
        ("objects365_to_openimages", 202, ("Mouse", "/m/020lf")),
        ("objects365_to_coco", 76, ("Dinning Table", "dining table")),
        ("lvis_to_coco", 80, ("ant", None)),
        ("lvis_to_openimages", 271, ("airplane", "/m/0cmf2")),
        ("openimages_to_coco", 72, ("/m/0k4j", "car")),
    ],
)
def test_shipped_maps(name, classes, example):
    """Every MID is one of the 500, and no class has two meanings."""
    targets = find_class_mapping(name).targets
    assert len(targets) == classes
    assert targets.get(example[0]) == (None if example[1] is None else [example[1]])
    with open(SHIPPED / "openimages.csv", encoding="utf-8") as file:
        mids = [row["openimages"] for row in csv.DictReader(file)]
    assert len(set(mids)) == len(mids) == 500
    if name.endswith("openimages"):
        assert {label for group in targets.values() for label in group} <= set(mids)


@pytest.mark.parametrize("name", ["lvis_to_objects365", "objects365_to_lvis", "coco_to_coco", "x"])
def test_pairs_that_are_not_shipped_are_refused_with_those_that_are(name):
    with pytest.raises(UserError, match=f"class map '{name}': expected .*objects365_to_coco"):
        find_class_mapping(name)


def test_every_shipped_pair_is_there_in_both_directions():
    for table, others in SHIPPED_PAIRS.items():
        for other in others:
            for name in (f"{table}_to_{other}", f"{other}_to_{table}"):
                assert find_class_mapping(name, rule="all").targets


def test_an_address_that_no_storage_serves_is_refused():
    with pytest.raises(UserError, match="https://x/map.csv: found an address of an unknown kind"):
        find_class_mapping("https://x/map.csv:coco:openimages")


def test_rows_of_shipped_tables_are_unique():
    for path in SHIPPED.glob("*.csv"):
        with open(path, encoding="utf-8") as file:
            labels = [row[path.stem] for row in csv.DictReader(file)]
        assert len(set(labels)) == len(labels), path
