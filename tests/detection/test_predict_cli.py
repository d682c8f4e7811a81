"""detection.predict as users start it: photos in, a table and pictures out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.dataset import Dataset
from common.tables import read_detections
from tests import tiny, tiny_masks
from tests.commands import refusal, run, run_two_processes
from tests.untrained import write_run, write_segmenter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return Dataset.open(tiny_masks.write_dataset(folder / "set", num_images=4))


@pytest.fixture(scope="module")
def workdir(dataset, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", tiny.get_config(), dataset)


@pytest.fixture(scope="module")
def photos(dataset) -> Path:
    folder = Path(dataset.image_root)
    (folder / "broken.jpg").write_bytes(b"no photo")
    return folder


@pytest.fixture(scope="module")
def found(workdir, photos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("output") / "found"
    said = run(
        "detection.predict",
        f"--workdir={workdir}",
        f"--images={photos}",
        f"--output={output}",
        "--pictures",
        "--min_score=0.3",
    )
    assert f"{photos}/broken.jpg: skipped, cannot read the image" in said
    assert "compiling the detector for 1 images of 64x64" in said
    assert "4 photos, 1 unreadable left out" in said and "wrote 4 pictures" in said
    return output


def test_a_folder_becomes_a_table_and_pictures(found, dataset):
    table = read_detections(found / "detections.parquet")
    assert list(table.image_ids) == sorted(Path(dataset.image_file(i)).name for i in range(4))
    assert table.metadata["photo_root"] == f"{dataset.image_root}/" and len(table) > 10
    pictures = sorted((found / "pictures").iterdir())
    assert len(pictures) == 4 and Image.open(pictures[0]).size == (64, 48)


def test_several_processes_share_the_photos(found, workdir, photos, tmp_path):
    run_two_processes(
        "detection.predict",
        f"--workdir={workdir}",
        f"--images={photos}/*.*g",
        f"--output={tmp_path / 'two.parquet'}",
    )
    one, two = (
        read_detections(p) for p in (found / "detections.parquet", tmp_path / "two.parquet")
    )
    assert list(one.image_ids) == list(two.image_ids)
    np.testing.assert_array_equal(one.boxes, two.boxes)
    assert len(list((tmp_path / "two.parquet").iterdir())) == 2


def test_a_segmenter_outlines_what_is_found(found, workdir, photos, dataset, tmp_path):
    segmenter = write_segmenter(tmp_path / "masks", tiny_masks.get_config(), dataset)
    run(
        "detection.predict",
        f"--workdir={workdir}",
        f"--images={photos}",
        f"--output={tmp_path / 'x.parquet'}",
        f"--masks={segmenter}",
        "--pictures",
        "--score_threshold=0.4",
    )
    boxes = read_detections(found / "detections.parquet")
    masks = read_detections(tmp_path / "x.parquet", masks=True)
    np.testing.assert_array_equal(masks.scores, boxes.scores[boxes.scores >= 0.4])
    assert masks.mask_sizes.tolist() == [[48, 64]] * len(masks)
    assert len(list((tmp_path / "x_pictures").iterdir())) == 4


def test_what_is_missing_is_one_line(workdir, photos, tmp_path):
    output = f"--output={tmp_path / 'x'}"
    assert "no such file or folder" in refusal(
        "detection.predict", f"--workdir={workdir}", "--images=nowhere", output
    )
    assert "config.json: no such file" in refusal(
        "detection.predict", f"--workdir={tmp_path / 'no'}", f"--images={photos}", output
    )
