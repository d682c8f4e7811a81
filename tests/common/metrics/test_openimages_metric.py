"""The OpenImages metric equals its definition, in every corner of the rules."""

import numpy as np
import pytest

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.errors import UserError
from common.metrics import coverage
from common.metrics.openimages import CLASS_AP, MEAN_AP, evaluate_openimages
from common.tables import Detections, DetectionsWriter
from tests.oracles import openimages as oracle

LABELS = ["/m/a", "/m/b", "/m/c", "/m/d", "/m/e", "/m/f"]
# d has two parents, e is three levels down, x is no class of the list, f stands alone.
HIERARCHY = {
    "LabelName": "/m/root",
    "Subcategory": [
        {"LabelName": "/m/a", "Subcategory": [{"LabelName": "/m/b"}, {"LabelName": "/m/d"}]},
        {
            "LabelName": "/m/c",
            "Subcategory": [
                {
                    "LabelName": "/m/x",
                    "Subcategory": [{"LabelName": "/m/d", "Subcategory": [{"LabelName": "/m/e"}]}],
                }
            ],
        },
    ],
}
FLAT = {"LabelName": "/m/root", "Subcategory": [{"LabelName": label} for label in LABELS]}


def random_images(rng: np.random.Generator) -> dict:
    """Small coordinates on a grid, so that exact IoU 0.5, equal boxes and ties are common."""

    def box():
        x, y = rng.integers(0, 6, 2)
        width, height = rng.integers(1, 4, 2)
        return tuple(float(v) / 8 for v in (x, y, min(x + width, 8), min(y + height, 8)))

    images = {}
    for index in range(rng.integers(1, 7)):
        labels = rng.permutation(LABELS)[: rng.integers(0, 5)]
        boxes = [
            (str(rng.choice(LABELS)), box(), bool(rng.random() < 0.3))
            for _ in range(rng.integers(0, 7))
        ]
        detections = []
        for _ in range(rng.integers(0, 25)):
            place = box()
            if boxes and rng.random() < 0.5:
                place = boxes[rng.integers(len(boxes))][1]
            if rng.random() < 0.05:
                place = (place[0], place[1], place[0], place[3])
            score = float(np.float32(rng.integers(0, 6) / 5))
            detections.append((str(rng.choice(LABELS)), score, place))
        images[f"img{rng.integers(1000):03d}-{index}"] = {
            "boxes": boxes,
            "labels": [(str(label), int(rng.integers(0, 2))) for label in labels],
            "detections": detections,
        }
    return images


def write_dataset(directory, images, hierarchy=HIERARCHY) -> Dataset:
    code = {label: index for index, label in enumerate(LABELS)}
    with DatasetWriter(directory, "test", LABELS, LABELS, hierarchy, "") as writer:
        # Reversed, so that dataset order is not id order.
        rows = [
            writer.add_image(
                image_id,
                f"{image_id}.jpg",
                (10, 10),
                [box for _, box, _ in image["boxes"]],
                [code[label] for label, _, _ in image["boxes"]],
                [GROUP_OF * group for _, _, group in image["boxes"]],
                [code[label] for label, _ in image["labels"]],
                [confidence for _, confidence in image["labels"]],
            )
            for image_id, image in sorted(images.items(), reverse=True)
        ]
        writer.add_split("all", rows)
        writer.add_split("first", rows[:1])
    return Dataset.open(directory)


def in_memory(images) -> Detections:
    code = {label: index for index, label in enumerate(LABELS)}
    image_ids = sorted(images)
    rows = [
        (index, code[label], score, box)
        for index, image_id in enumerate(image_ids)
        for label, score, box in sorted(images[image_id]["detections"], key=lambda d: -d[1])
    ]
    return Detections(
        image_ids=image_ids,
        labels=LABELS,
        image_index=np.array([r[0] for r in rows], np.int32),
        label_index=np.array([r[1] for r in rows], np.int32),
        scores=np.array([r[2] for r in rows], np.float32),
        boxes=np.array([r[3] for r in rows], np.float32).reshape(-1, 4),
        metadata={},
    )


def write_table(path, images, *, shards=1, metadata=None):
    for shard in range(shards):
        with DetectionsWriter(
            path, metadata or {}, process_index=shard, process_count=shards
        ) as writer:
            for image_id in list(images)[shard::shards]:
                rows = images[image_id]["detections"]
                writer.add(
                    image_id, [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]
                )
    return path


def assert_equal(result, images, hierarchy=HIERARCHY, threshold=0.5, **options):
    mean, aps = oracle.evaluate(images, LABELS, hierarchy, threshold=threshold, **options)
    expected = {CLASS_AP.format(threshold, label): ap for label, ap in aps.items()}
    expected[MEAN_AP.format(threshold)] = mean
    assert result == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("block", range(4))
def test_equals_the_definition_on_random_sets(tmp_path, block):
    for seed in range(block * 60, block * 60 + 60):
        rng = np.random.default_rng(seed)
        images = random_images(rng)
        hierarchy = HIERARCHY if seed % 4 else FLAT
        dataset = write_dataset(tmp_path / f"{seed}", images, hierarchy)
        for options in (
            {},
            {"expand_predictions": True},
            {"image_labels": False, "group_of_weight": 0.0},
            {"expand_truth": False, "group_of_weight": 0.5, "iou_threshold": 0.25},
        ):
            if not any(
                options.get("group_of_weight", 1.0) or not group
                for image in images.values()
                for _, _, group in image["boxes"]
            ):
                with pytest.raises(UserError, match="no ground-truth boxes"):
                    evaluate_openimages(dataset, "all", in_memory(images), **options)
                continue
            result = evaluate_openimages(dataset, "all", in_memory(images), **options)
            assert_equal(
                result,
                images,
                hierarchy,
                threshold=options.get("iou_threshold", 0.5),
                weight=options.get("group_of_weight", 1.0),
                expand_truth=options.get("expand_truth", True),
                expand_detections=options.get("expand_predictions", False),
                use_labels=options.get("image_labels", True),
            )


def test_shards_and_chunks_do_not_change_the_result(tmp_path, monkeypatch):
    images = {}
    for seed in range(12):
        drawn = random_images(np.random.default_rng(seed))
        images |= {f"{seed}-{key}": image for key, image in drawn.items()}
    dataset = write_dataset(tmp_path / "set", images)
    single = write_table(tmp_path / "single.parquet", images)
    folder = write_table(tmp_path / "folder", images, shards=3)
    expected = evaluate_openimages(dataset, "all", single)
    assert_equal(expected, images)
    assert evaluate_openimages(dataset, "all", folder) == expected
    monkeypatch.setattr(coverage, "MAX_IMAGES", 2)
    assert evaluate_openimages(dataset, "all", folder, num_threads=3) == expected


def one_image(boxes=(), labels=(), detections=()):
    return {"im": {"boxes": list(boxes), "labels": list(labels), "detections": list(detections)}}


BOX = (0.0, 0.0, 0.5, 0.5)
OTHER = (0.5, 0.5, 1.0, 1.0)
HALF = (0.0, 0.0, 0.5, 0.25)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        # IoU of exactly one half is enough.
        (one_image([("/m/f", BOX, False)], [], [("/m/f", 0.9, HALF)]), 1.0),
        # A second detection of a taken box is false, though it comes after full recall.
        (
            one_image(
                [("/m/f", BOX, False), ("/m/f", OTHER, False)],
                [],
                [("/m/f", 0.9, BOX), ("/m/f", 0.8, BOX), ("/m/f", 0.7, OTHER)],
            ),
            0.5 + 0.5 * 2 / 3,
        ),
        # A group-of box absorbs any number of detections and counts once.
        (
            one_image(
                [("/m/f", (0.0, 0.0, 1.0, 1.0), True)],
                [],
                [("/m/f", 0.9, BOX), ("/m/f", 0.8, OTHER), ("/m/f", 0.7, HALF)],
            ),
            1.0,
        ),
        # A group-of box without detections is a missed box.
        (one_image([("/m/f", BOX, False), ("/m/f", OTHER, True)], [], [("/m/f", 0.9, BOX)]), 0.5),
        # Nothing found.
        (one_image([("/m/f", BOX, False)]), 0.0),
    ],
)
def test_worked_examples(tmp_path, image, expected):
    dataset = write_dataset(tmp_path / "set", image)
    result = evaluate_openimages(dataset, "all", in_memory(image))
    assert result[CLASS_AP.format(0.5, "/m/f")] == pytest.approx(expected)


def test_only_the_best_10000_of_a_class_in_an_image_are_looked_at(tmp_path):
    wrong = [("/m/f", 0.9, OTHER)] * 9_999
    for extra, expected in (([], 1 / 10_000), ([("/m/f", 0.9, OTHER)], 0.0)):
        detections = [*wrong, *extra, ("/m/f", 0.1, BOX)]
        image = one_image([("/m/f", BOX, False)], [], detections)
        dataset = write_dataset(tmp_path / f"{expected}", image)
        result = evaluate_openimages(dataset, "all", in_memory(image))
        assert result[MEAN_AP.format(0.5)] == pytest.approx(expected)


def test_detections_count_only_for_verified_classes(tmp_path):
    truth = {"boxes": [("/m/f", BOX, False)], "labels": [], "detections": [("/m/f", 0.5, BOX)]}
    wrong = [("/m/f", 0.9, BOX)]
    for labels, expected in (
        ([], 1.0),  # not verified: not judged
        ([("/m/f", 0)], 0.5),  # verified absent: a false positive
        ([("/m/f", 1)], 0.5),  # verified present, no box: a false positive too
    ):
        images = {"a": truth, "b": {"boxes": [], "labels": labels, "detections": wrong}}
        dataset = write_dataset(tmp_path / f"{labels}".replace("/", "-"), images)
        result = evaluate_openimages(dataset, "all", in_memory(images))
        assert result[MEAN_AP.format(0.5)] == pytest.approx(expected)


def test_absence_of_a_parent_judges_its_children(tmp_path):
    images = {
        "a": {"boxes": [("/m/e", BOX, False)], "labels": [], "detections": [("/m/e", 0.5, BOX)]},
        "b": {"boxes": [], "labels": [("/m/c", 0)], "detections": [("/m/e", 0.9, BOX)]},
    }
    dataset = write_dataset(tmp_path / "set", images)
    result = evaluate_openimages(dataset, "all", in_memory(images))
    assert result[CLASS_AP.format(0.5, "/m/e")] == pytest.approx(0.5)
    assert result[CLASS_AP.format(0.5, "/m/c")] == 0.0  # expanded truth, unexpanded predictions


def test_a_table_marked_expanded_is_not_expanded_again(tmp_path):
    images = one_image([("/m/b", BOX, False)], [], [("/m/b", 0.9, BOX), ("/m/a", 0.8, OTHER)])
    dataset = write_dataset(tmp_path / "set", images)
    marked = write_table(tmp_path / "marked.parquet", images, metadata={"expanded": True})
    plain = write_table(tmp_path / "plain.parquet", images)
    parent = CLASS_AP.format(0.5, "/m/a")
    assert evaluate_openimages(dataset, "all", marked, expand_predictions=True)[parent] == 0.0
    assert evaluate_openimages(dataset, "all", plain, expand_predictions=True)[parent] == 1.0


def test_refuses_tables_that_do_not_fit_the_split(tmp_path):
    images = random_images(np.random.default_rng(5))
    dataset = write_dataset(tmp_path / "set", images)
    first, *others = sorted(images, reverse=True)
    part = write_table(tmp_path / "part.parquet", {first: images[first]})
    with pytest.raises(UserError, match="covers 1 of the .*--allow_partial"):
        evaluate_openimages(dataset, "all", part)
    notes = []
    scored = evaluate_openimages(dataset, "all", part, allow_partial=True, say=notes.append)
    assert "only the covered images" in notes[0]
    assert_equal(scored, {first: images[first]})
    rest = write_table(tmp_path / "rest.parquet", {key: images[key] for key in others})
    with pytest.raises(UserError, match="none of its"):
        evaluate_openimages(dataset, "first", rest)
    more = write_table(tmp_path / "more.parquet", images)
    notes.clear()
    assert_equal(
        evaluate_openimages(dataset, "first", more, say=notes.append), {first: images[first]}
    )
    assert "left out" in notes[0]


def test_refuses_an_unknown_label(tmp_path):
    images = one_image([("/m/a", BOX, False)], [], [("/m/zebra", 0.9, BOX)])
    dataset = write_dataset(tmp_path / "set", one_image([("/m/a", BOX, False)]))
    table = write_table(tmp_path / "x.parquet", images)
    with pytest.raises(UserError, match="row 0: '/m/zebra' is not among the dataset's classes"):
        evaluate_openimages(dataset, "all", table)
