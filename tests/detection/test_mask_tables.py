"""Mask tables hold what is painted on photos: at one scale, at several, for given boxes."""

import json

import numpy as np
import pytest

from common.io.errors import Stopped, UserError
from common.masks import rle
from common.tables import DetectionsReader, DetectionsWriter, read_detections
from common.training import distributed, preemption
from detection.evaluate import evaluate_variables
from detection.export import check_flags
from detection.outline import outline_table
from detection.settings import read_run
from detection.tta.test_time import detect_split
from tests import tiny
from tests.detection.colour_detector import LABELS, ColourDetector, write_photos

QUIET = dict(step=3, say=lambda *_, **__: None)


def settings_of(kind="class_specific", max_proposals=0, on_image_error="fatal", **test_time):
    config = tiny.get_config()
    config.data.update(canvas=(64, 96), mask_size=0 if kind == "none" else 16)
    config.data.update(max_proposals=max_proposals, on_image_error=on_image_error)
    config.model.mask_head.kind = kind
    config.evaluation.update(batch_size=2, metric="coco" if kind == "none" else "coco_masks")
    config.test_time.update(long_ratios=(1.0, 1.5), **test_time)
    return read_run(config)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def mesh():
    return distributed.make_mesh()


def assert_painted(table, truth, iou=0.88, rows=3):
    """Every photo has one row a colour, whose mask is the ellipse."""
    found = read_detections(table, LABELS, masks=True)
    assert len(found) == rows * len(truth)
    for row in range(len(found)):
        image, class_ = int(found.image_ids[found.image_index[row]]), found.label_index[row]
        expected = truth[image, class_]
        assert found.mask_sizes[row].tolist() == list(expected.shape)
        mask = rle.decode(found.masks[row], expected.shape)
        overlap = (mask & expected).sum() / (mask | expected).sum()
        assert overlap > iou, (image, LABELS[class_], overlap)
    return found


@pytest.mark.parametrize(
    "test_time", [{}, dict(scales=(64, 96), merge="union"), dict(scales=(64, 96), merge="mean")]
)
def test_masks_are_what_the_photos_show(photos, mesh, tmp_path, test_time):
    dataset, truth = photos
    settings = settings_of(**test_time)
    model = ColourDetector(3, settings.model)
    output = tmp_path / "x.parquet"
    detect_split(settings, model, {}, dataset, "validation", mesh, output, **QUIET)
    assert_painted(output, truth)


def test_each_view_has_a_table_with_its_masks(photos, mesh, tmp_path):
    dataset, truth = photos
    settings = settings_of(scales=(64,), merge="tables")
    model = ColourDetector(3, settings.model)
    detect_split(settings, model, {}, dataset, "validation", mesh, tmp_path, **QUIET)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["scale0064.parquet", "scale0064_flip.parquet"]
    for name in names:
        assert_painted(tmp_path / name, truth)


def test_masks_are_scored(photos, mesh, tmp_path):
    dataset, _ = photos
    settings = settings_of()
    model = ColourDetector(3, settings.model)
    options = dict(split="validation", say=QUIET["say"])
    table = tmp_path / "evaluation" / "validation.parquet"
    for process in range(2):  # an evaluation before, of two processes
        with DetectionsWriter(table, {}, process_index=process, process_count=2) as writer:
            writer.add(f"of process {process}", [], [], np.zeros((0, 4)))
    figures = evaluate_variables(
        settings, model, dataset, mesh, {}, 3, tmp_path / "evaluation", **options
    )
    assert table.is_file()
    assert figures["AP50"] == 1.0 and figures["AP"] > 0.6
    written = json.loads((tmp_path / "evaluation" / "validation_metrics.json").read_text())
    assert written.items() >= figures.items()


def write_boxes(path, dataset, repeats=1, labels=LABELS):
    """The annotated boxes, several times with falling scores; one photo without, one odd box."""
    with DetectionsWriter(path, {"model": "boxes", "split": "validation"}) as writer:
        for image in range(dataset.num_images):
            boxes, classes, _ = dataset.image_boxes(image)
            boxes, classes = np.tile(boxes, (repeats, 1)), np.tile(classes, repeats)
            scores = np.linspace(0.9, 0.5, len(boxes))
            if image == 1:
                boxes, classes, scores = boxes[:0], classes[:0], scores[:0]
            if image == 2:
                boxes = np.concatenate([boxes, [[0.5, 0.5, 0.5, 0.8]]])
                classes, scores = np.append(classes, 0), np.append(scores, 0.1)
            writer.add(dataset.image_id(image), [labels[c] for c in classes], scores, boxes)
    return path


@pytest.mark.parametrize(("per_photo", "scales"), [(8, ()), (2, ()), (2, (64, 96))])
def test_given_boxes_are_outlined(photos, mesh, tmp_path, per_photo, scales):
    """Rows stay; photos with more boxes than go through at a time come several times."""
    dataset, truth = photos
    settings = settings_of(max_proposals=per_photo, scales=scales)
    model = ColourDetector(3, settings.model)
    table = write_boxes(tmp_path / "x.parquet", dataset)
    output = tmp_path / "y.parquet"
    outline_table(settings, model, {}, dataset, table, mesh, output, **QUIET)
    before, after = read_detections(table, LABELS), read_detections(output, LABELS, masks=True)
    for name in ("image_index", "label_index", "scores", "boxes"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert after.image_ids == before.image_ids and after.metadata["model"] == "boxes"
    assert after.metadata["outline"]["step"] == 3
    for row in range(len(after)):
        image, class_ = after.image_index[row], after.label_index[row]
        expected = truth[image, class_]
        mask = rle.decode(after.masks[row], expected.shape)
        if after.scores[row] < 0.2:  # the box without area
            assert not mask.any()
        else:
            assert (mask & expected).sum() / (mask | expected).sum() > 0.88


def test_labels_that_the_model_lacks_are_refused_unless_classes_share_a_mask(
    photos, mesh, tmp_path
):
    dataset, _ = photos
    table = write_boxes(tmp_path / "x.parquet", dataset, labels=["red", "other", "blue"])
    for kind in ("class_specific", "class_agnostic"):
        settings = settings_of(kind)
        model = ColourDetector(3, settings.model)
        call = (settings, model, {}, dataset, table, mesh, tmp_path / f"{kind}.parquet")
        if kind == "class_specific":
            with pytest.raises(UserError, match=r"x\.parquet: row \d+: .*'other'"):
                outline_table(*call, **QUIET)
            assert not (tmp_path / f"{kind}.parquet").exists()
        else:
            outline_table(*call, **QUIET)
            assert DetectionsReader(tmp_path / f"{kind}.parquet").has_masks


def test_outlining_stops_when_it_is_told_to(photos, mesh, tmp_path, monkeypatch):
    dataset, _ = photos
    settings, points = settings_of(), preemption.StopPoints()
    model = ColourDetector(3, settings.model)
    table = write_boxes(tmp_path / "x.parquet", dataset)
    points.ask("SIGTERM at host")
    monkeypatch.setattr(preemption, "_points", points)
    with pytest.raises(Stopped, match="SIGTERM at host"):
        outline_table(settings, model, {}, dataset, table, mesh, tmp_path / "y.parquet", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


@pytest.mark.parametrize("scales", [(), (64,)])
def test_unreadable_photos_have_empty_masks(tmp_path, mesh, scales):
    dataset, _ = write_photos(tmp_path / "photos", num_images=3)
    (tmp_path / "photos" / "2.png").write_bytes(b"no photo")
    table = write_boxes(tmp_path / "x.parquet", dataset)
    settings, said = settings_of(on_image_error="skip", scales=scales), []
    model = ColourDetector(3, settings.model)
    output = tmp_path / "y.parquet"
    options = dict(step=3, say=lambda text, **_: said.append(text))
    outline_table(settings, model, {}, dataset, table, mesh, output, **options)
    found = read_detections(output, masks=True)
    areas = rle.areas(found.masks)
    assert (areas[found.image_index == 0] > 0).all() and not areas[found.image_index == 2].any()
    assert any("1 unreadable photos" in text for text in said)


@pytest.mark.parametrize(
    ("kind", "test_time", "message"),
    [
        ("none", {}, "--proposals: tiny finds boxes by itself"),
        (
            "class_specific",
            dict(scales=(64,), merge="tables"),
            "config.test_time.merge: found 'tables' with --proposals",
        ),
    ],
)
def test_tables_that_cannot_be_outlined_are_refused(kind, test_time, message):
    with pytest.raises(UserError, match=message):
        check_flags(settings_of(kind, **test_time), "x.parquet", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "coco_masks"}, "evaluation.metric: found 'coco_masks'"),
        ({"metric": "voc"}, "config.evaluation.metric"),
        ({"mask_threshold": 1.0}, "mask_threshold"),
    ],
)
def test_evaluations_that_make_no_sense_are_refused(changes, message):
    config = tiny.get_config()
    config.evaluation.update(changes)
    with pytest.raises(UserError, match=message):
        read_run(config)
