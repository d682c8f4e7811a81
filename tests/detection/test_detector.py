"""A detector as a function of photos gives what detection.export writes of them."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import detection
from common.data.dataset import Dataset, DatasetWriter
from common.data.model_classes import ModelClasses
from common.data.photo_list import find_photos
from common.data.table_photos import table_dataset
from common.io.errors import UserError
from common.masks import rle
from common.nn.weights.fine_tuning import save_trained_model
from common.report.table_pictures import draw_table
from common.tables import DetectionsReader, read_detections
from common.training import distributed
from common.training.workdir import read_config
from detection import predict
from detection.detector import Detector, find_classes
from detection.fine_tuning import trained_in
from detection.loading import open_detector
from detection.settings import read_run
from detection.tta.test_time import detect_split
from tests import tiny
from tests.detection import colour_detector
from tests.untrained import write_run

SIZES = [(60, 80), (80, 60), (60, 80), (50, 90), (90, 50)]  # height, width


def quiet(*_, **__):
    pass


def get_config():
    config = tiny.get_config()
    config.data.canvas = (48, 64)
    return config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    labels, names = ["/m/a", "/m/b", "/m/c"], ["Apple", "Bird", "Cat"]
    with DatasetWriter(folder / "set", "x", labels, names, None, str(folder)) as writer:
        for i, (height, width) in enumerate(SIZES):
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            writer.add_image(f"{i}", f"{i}.png", (height, width))
        writer.add_split("validation", range(len(SIZES)))
    return Dataset.open(folder / "set")


@pytest.fixture(scope="module")
def paths(dataset) -> list[str]:
    return [dataset.image_file(i) for i in range(dataset.num_images)]


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", get_config(), dataset)


@pytest.fixture(scope="module")
def detector(run) -> Detector:
    return detection.load(run, say=quiet)


@pytest.fixture(scope="module")
def exported(run, dataset, tmp_path_factory):
    """The rows of detection.export, image by image."""
    settings, mesh = read_run(get_config()), distributed.make_mesh()
    opened = open_detector(str(run), None, None, mesh, say=quiet)
    table = tmp_path_factory.mktemp("tables") / "x.parquet"
    given = (settings, opened.model, opened.variables, dataset, "validation", mesh, table)
    detect_split(*given, step=1, say=quiet)
    rows = read_detections(table, dataset.class_labels)
    return [rows.take(rows.image_index == i) for i in range(len(SIZES))]


def test_results_are_the_rows_of_export(detector, paths, exported):
    results = detector(paths)
    for result, rows, (height, width) in zip(results, exported, SIZES, strict=True):
        assert len(rows) > 3 and result.size == (height, width)
        np.testing.assert_array_equal(result.scores, rows.scores)
        np.testing.assert_array_equal(result.labels, rows.label_index)
        pixels = rows.boxes * np.array([width, height, width, height], np.float32)
        np.testing.assert_array_equal(result.boxes, pixels)
        assert result.boxes.dtype == np.float32 and result.masks is None
        assert result.names == [["Apple", "Bird", "Cat"][i] for i in rows.label_index]


def test_files_arrays_and_pillow_images_are_the_same_photo(detector, paths):
    (from_file,) = detector(paths[3:4])
    image = Image.open(paths[3])
    for photo in (np.asarray(image), image):
        result = detector(photo)
        np.testing.assert_array_equal(result.boxes, from_file.boxes)
        np.testing.assert_array_equal(result.scores, from_file.scores)
    assert image.size == (90, 50)  # as it was


def test_only_what_is_asked_for_comes(detector, paths):
    everything = detector(paths[0])
    middle = float(np.median(everything.scores))
    some = detector(paths[0], score_threshold=middle, classes=["bird", "/m/c"])
    wanted = (everything.scores >= np.float32(middle)) & (everything.labels > 0)
    np.testing.assert_array_equal(some.boxes, everything.boxes[wanted])
    assert 0 < len(some) < len(everything) and set(some.names) <= {"Bird", "Cat"}
    np.testing.assert_array_equal(
        everything.above(middle).scores, everything.scores[everything.scores >= middle]
    )
    with pytest.raises(UserError, match="'birt' is none of the model's; did you mean bird"):
        detector(paths[0], classes=["birt"])
    assert find_classes(detector.classes, ()) is None


def test_a_photo_that_cannot_be_read_is_named(detector, paths, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no photo")
    with pytest.raises(UserError, match="broken.jpg: cannot read the image"):
        detector([paths[0], broken])
    found = dict(detector.stream([broken, *paths[:2], tmp_path / "nowhere.png"]))
    assert sorted(found) == [1, 2]
    assert "broken.jpg: skipped" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"found an array \(4, 5\) of float64, expected \(H, W, 3\)"
    ):
        detector(np.zeros((4, 5)))
    assert detector([]) == []


def test_a_result_is_drawn_and_handed_on(detector, paths):
    result = detector(paths[0])
    picture = result.draw(min_score=0.0, side=40)
    assert picture.size == (40, 30)
    assert result.draw(min_score=1.0).size == (80, 60)
    given = result.to_supervision()
    assert given["xyxy"].shape == (len(result), 4) and given["class_id"].dtype == int
    assert list(given["data"]["class_name"]) == result.names and given["mask"] is None
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["width"] == 80 and plain["detections"][0]["name"] == result.names[0]


def test_supervision_takes_a_result(detector, paths):
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    result = detector(paths[0])
    detections = supervision.Detections(**result.to_supervision())
    assert len(detections) == len(result) and list(detections["class_name"]) == result.names


def test_a_weights_file_is_the_same_detector(run, detector, paths, tmp_path):
    trained = trained_in(str(run))
    save_trained_model(tmp_path / "old.safetensors", trained)
    with pytest.raises(UserError, match="holds no config"):
        detection.load(tmp_path / "old.safetensors")
    path = tmp_path / "x.safetensors"
    save_trained_model(path, dataclasses.replace(trained, config=read_config(run)))
    loaded = detection.load(path, say=quiet)
    assert loaded.classes.names == detector.classes.names
    np.testing.assert_array_equal(loaded(paths[0]).boxes, detector(paths[0]).boxes)
    other = get_config()
    other.model.fpn_channels = 8
    with pytest.raises(UserError, match=r"x.safetensors: params/.*: found .*, expected"):
        detection.load(path, config=other)


def test_what_is_no_detector_is_one_line(tmp_path):
    with pytest.raises(UserError, match="config.json: no such file, expected the work directory"):
        detection.load(tmp_path)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        detection.lode  # noqa: B018


def test_importing_the_package_imports_no_model():
    code = "import detection, sys; assert 'jax' not in sys.modules and 'flax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ------------------------------------------------------------------ the table of predict


def test_the_table_of_predict_has_the_rows_of_export(detector, dataset, exported, tmp_path):
    photos = find_photos([f"{dataset.image_root}/*.png"])
    said = []
    predict.detect(
        detector, photos, tmp_path / "x.parquet", say=lambda text, **_: said.append(text)
    )
    assert said[-1] == f"wrote {tmp_path}/x.parquet: 5 photos, {sum(map(len, exported))} detections"
    table = read_detections(tmp_path / "x.parquet", dataset.class_labels)
    assert list(table.image_ids) == [f"{i}.png" for i in range(5)]
    for i, rows in enumerate(exported):
        found = table.take(table.image_index == i)
        for field in ("scores", "boxes", "label_index"):
            np.testing.assert_array_equal(getattr(found, field), getattr(rows, field))
    opened = table_dataset(DetectionsReader(tmp_path / "x.parquet"))
    assert opened.image_file(3) == dataset.image_file(3)
    assert opened.find_images(["2.png", "7.png"]).tolist() == [2, -1]

    draw_table(tmp_path / "x.parquet", tmp_path / "pictures", 0.0, 64, quiet)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [f"{i}.png.jpg" for i in range(5)]
    assert Image.open(tmp_path / "pictures" / "1.png.jpg").size == (48, 64)


# ------------------------------------------------------------------------------- masks and views


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return colour_detector.write_photos(tmp_path_factory.mktemp("colours") / "photos")


def colour_model(dataset, **test_time) -> Detector:
    config = get_config()
    config.data.mask_size = 112
    config.model.mask_head.kind = "class_agnostic"
    config.data.canvas = (60, 90)
    config.data.pad_multiple = 1
    config.test_time.update(test_time)
    settings = read_run(config)
    model = colour_detector.ColourDetector(3, settings.model)
    classes = ModelClasses("", dataset.class_labels, dataset.class_names, dataset.hierarchy)
    return Detector(settings, classes, model, {}, distributed.make_mesh(jax.devices()[:1]))


@pytest.mark.parametrize(
    "views", [{}, dict(scales=(60, 120), long_ratios=(1.5,), flip=True, merge="mean")]
)
def test_masks_are_those_of_the_objects(colours, views):
    """In one view and in several."""
    dataset, truth = colours
    detector = colour_model(dataset, **views)
    results = detector([dataset.image_file(i) for i in range(dataset.num_images)])
    for result, masks in zip(results, truth, strict=True):
        found = result.masks
        assert found.shape == (3, *result.size)
        for label, mask in zip(result.labels, found, strict=True):
            overlap = (mask & masks[label]).sum() / (mask | masks[label]).sum()
            assert overlap > 0.85
        assert rle.decode(result.mask_counts[0], result.size).any()
        assert result.draw().size == result.size[::-1]
        assert result.to_dict()["detections"][0]["mask"]["size"] == list(result.size)


def test_tables_of_views_are_no_result(run):
    config = get_config()
    config.test_time.update(scales=(64,), merge="tables")
    with pytest.raises(UserError, match="expected 'union' or 'mean'"):
        detection.load(run, config=config, say=quiet)
