"""The report counts what its definitions say, and its AP is that of the metric."""

import numpy as np
import pytest

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.errors import UserError
from common.metrics.openimages import CLASS_AP, MEAN_AP, evaluate_openimages
from common.report import errors, gains
from common.report.analysis import analyse
from common.report.classes import embed_json, rarity_groups
from common.report.confusion import count_confusions
from common.report.pictures import choose
from common.report.scope import open_scope, table_names
from common.tables import DetectionsReader, DetectionsWriter
from tests.oracles.error_kinds import error_kinds

LABELS = ["/m/a", "/m/b", "/m/c", "/m/d"]


def quiet(_):
    pass


def write_set(path, images, hierarchy=None, labels=LABELS):
    """Images: {id: (objects [(class, box)], verified classes)}; boxes with a fifth value: group."""
    with DatasetWriter(path, "test", labels, labels, hierarchy, "") as writer:
        for image_id, (objects, verified) in images.items():
            present = {class_ for class_, _ in objects}
            writer.add_image(
                image_id,
                f"{image_id}.jpg",
                (100, 100),
                [box[:4] for _, box in objects],
                [class_ for class_, _ in objects],
                [GROUP_OF if len(box) > 4 else 0 for _, box in objects],
                label_classes=verified,
                label_confidences=[int(c in present) for c in verified],
            )
        writer.add_split("val", range(len(images)))
        writer.add_split("train", range(len(images) // 2))
    return Dataset.open(path)


def write_table(path, rows, labels=LABELS):
    """Rows: {image id: [(class, score, box)]}."""
    with DetectionsWriter(path, {"model": "m"}) as writer:
        for image_id, found in rows.items():
            writer.add(
                image_id,
                [labels[class_] for class_, _, _ in found],
                np.array([score for _, score, _ in found], np.float32),
                np.array([box for _, _, box in found], np.float32).reshape(-1, 4),
            )
    return DetectionsReader(path)


def run(dataset, *readers, train_split=None, **options):
    scope = open_scope(
        dataset, "val", readers, train_split=train_split, allow_partial=False, say=quiet
    )
    names = [reader.path.stem for reader in readers]
    tables = [
        analyse(scope, reader, name, say=quiet, **options)
        for reader, name in zip(readers, names, strict=True)
    ]
    return scope, tables


def random_problem(seed):
    """Images with every kind of error, scores all different."""
    rng = np.random.default_rng(seed)
    scores = iter((rng.permutation(4000) + 1) / 4001)

    def box():
        x, y = rng.integers(0, 12, 2)
        width, height = rng.integers(3, 9, 2)
        return tuple(float(v) / 16 for v in (x, y, min(x + width, 16), min(y + height, 16)))

    images, rows = {}, {}
    for number in range(12):
        objects = [(int(rng.integers(4)), box()) for _ in range(rng.integers(0, 5))]
        verified = [c for c in range(4) if rng.random() < 0.7]
        found = []
        for _ in range(rng.integers(0, 25)):
            place = box()
            if objects and rng.random() < 0.7:
                near = objects[rng.integers(len(objects))][1]
                place = np.clip(np.array(near) + rng.integers(-2, 3, 4) / 16, 0, 1)
                place = (*np.minimum(place[:2], place[2:] - 1 / 16), *place[2:])
            if place[0] >= 0 and place[1] >= 0:
                place = tuple(float(v) for v in place)
                found.append((int(rng.integers(4)), float(np.float32(next(scores))), place))
        images[f"i{number:02d}"] = (objects, verified)
        rows[f"i{number:02d}"] = sorted(found, key=lambda row: -row[1])
    return images, rows


@pytest.mark.parametrize("seed", range(4))
def test_kinds_of_errors_equal_their_definition(tmp_path, seed):
    images, rows = random_problem(seed)
    dataset = write_set(tmp_path / "set", images)
    _, (table,) = run(dataset, write_table(tmp_path / "x.parquet", rows), min_score=0.0)
    found = {}
    for image, class_, score, status, target in zip(
        table.judged.images,
        table.judged.classes,
        table.judged.scores,
        table.judged.status,
        table.judged.targets,
        strict=True,
    ):
        number = None if target < 0 else int(target - dataset.box_offsets[image])
        key = (dataset.image_id(image), int(class_), float(score))
        found[key] = (errors.STATUS_NAMES[status], number)
    expected = {}
    for image_id, (objects, verified) in images.items():
        kinds = error_kinds(objects, rows[image_id], verified)
        for (class_, score, _), kind in zip(rows[image_id], kinds, strict=True):
            expected[image_id, class_, score] = kind
    assert found == expected
    assert {kind for kind, _ in expected.values()} == set(errors.STATUS_NAMES) - {"absorbed"}


@pytest.mark.parametrize("seed", range(2))
def test_gains_equal_the_metric_of_a_repaired_table(tmp_path, seed):
    images, rows = random_problem(seed)
    images = {key: (objects, range(4)) for key, (objects, _) in images.items()}
    dataset = write_set(tmp_path / "set", images)
    _, (table,) = run(dataset, write_table(tmp_path / "x.parquet", rows))

    def mean_ap(name, repaired, truth=dataset):
        reader = write_table(tmp_path / f"{name}.parquet", repaired)
        return evaluate_openimages(truth, "val", reader.path, say=quiet)[MEAN_AP.format(0.5)]

    kinds = {key: error_kinds(images[key][0], rows[key], range(4)) for key in rows}
    taken = {(key, number) for key in rows for kind, number in kinds[key] if kind == "correct"}
    for name in ("class", "localisation", "both", "duplicate", "background", "false positives"):
        repaired, revived = {}, set(taken)
        for key in rows:
            repaired[key] = []
            for row, (kind, number) in zip(rows[key], kinds[key], strict=True):
                wrong = kind != "correct" if name == "false positives" else kind == name
                if not wrong:
                    repaired[key].append(row)
                elif name in ("class", "localisation") and (key, number) not in revived:
                    revived.add((key, number))
                    class_, box = images[key][0][number]
                    repaired[key].append((class_, row[1], box))
        gain = mean_ap(name, repaired) - table.official["mAP@0.5"]
        assert table.gains[name] == pytest.approx(gain, abs=1e-12), name

    claimed = {
        (key, number)
        for key in rows
        for kind, number in kinds[key]
        if kind in ("class", "localisation")
    }
    for name, kept in (("missed", taken | claimed), ("false negatives", taken)):
        left = {
            key: ([o for i, o in enumerate(objects) if (key, i) in kept], range(4))
            for key, (objects, _) in images.items()
        }
        aps = evaluate_openimages(
            write_set(tmp_path / name, left), "val", tmp_path / "x.parquet", say=quiet
        )
        values = [v for k, v in aps.items() if "Category" in k]
        full = len({class_ for objects, _ in images.values() for class_, _ in objects})
        gain = (sum(values) + full - len(values)) / full - table.official["mAP@0.5"]
        assert table.gains[name] == pytest.approx(gain, abs=1e-12), name


HIERARCHY = {
    "LabelName": "/m/root",
    "Subcategory": [
        {"LabelName": "/m/a", "Subcategory": [{"LabelName": "/m/b"}, {"LabelName": "/m/c"}]},
        {"LabelName": "/m/d"},
    ],
}
GROUP_IMAGES = {
    "x": ([(1, (0, 0, 0.5, 0.5)), (3, (0.5, 0.5, 1, 1, True))], [0, 1, 2, 3]),
    "y": ([(2, (0, 0, 0.9, 0.9))], [0, 1, 2, 3]),
    "z": ([(1, (0.1, 0.1, 0.2, 0.2))], []),
}
GROUP_ROWS = {
    "x": [(1, 0.9, (0, 0, 0.5, 0.5)), (3, 0.8, (0.6, 0.6, 0.7, 0.7)), (3, 0.7, (0.8, 0.8, 1, 1))],
    "y": [(1, 0.95, (0, 0, 0.9, 0.9)), (2, 0.6, (0, 0, 0.9, 0.88))],
    "z": [],
}


@pytest.mark.parametrize("expand", [False, True])
def test_ap_equals_the_metric_with_hierarchy_and_groups(tmp_path, expand):
    dataset = write_set(tmp_path / "set", GROUP_IMAGES, HIERARCHY)
    reader = write_table(tmp_path / "x.parquet", GROUP_ROWS)
    scope, (table,) = run(dataset, reader, expand_predictions=expand)
    expected = evaluate_openimages(
        dataset, "val", reader.path, expand_predictions=expand, say=quiet
    )
    assert table.official["mAP@0.5"] == expected[MEAN_AP.format(0.5)]
    for index in np.flatnonzero(scope.counts):
        assert table.curves.aps[index] == expected[CLASS_AP.format(0.5, LABELS[index])]
    # b detected on c: a confusion, while its copy for their parent a is right.
    confusions = count_confusions(scope, [table])
    assert confusions.predicted.tolist() == [1] and confusions.actual.tolist() == [2]
    assert confusions.counted.tolist() == [[1]] and confusions.unverified.tolist() == [[0]]
    # b and d's group; with copies for parents two more; z's image has no rows and is missed.
    assert table.image_found.tolist() == ([3, 2, 0] if expand else [2, 1, 0])
    assert scope.image_counts.tolist() == [3, 2, 2]
    assert table.unfound == 7 - table.image_found.sum()


def test_curves_and_the_best_score():
    entries = gains.ScoredEntries(
        classes=np.zeros(5, np.int16),
        scores=np.array([0.9, 0.8, 0.8, 0.4, 0.1], np.float32),
        kinds=np.array([1, 0, 1, 1, 0], np.int8),
        status=np.zeros(5, np.int8),
        repaired=np.full(5, -1, np.int16),
        sizes=np.array([0, 3, 0, 3, 3], np.int8),
    )
    curves = gains.curves(entries, np.array([4.0, 0.0]))
    # Found 1 of 1, 2 of 3, 3 of 4 of the ranks: interpolated 1, 3/4, 3/4, then nothing.
    assert curves.aps[0] == pytest.approx((1 + 0.75 + 0.75) / 4) and np.isnan(curves.aps[1])
    precision = curves.precision[0]
    assert precision[[0, 25, 26, 50, 75, 76]].tolist() == [1, 1, 0.75, 0.75, 0.75, 0]
    assert curves.threshold[0] == np.float32(0.4)  # F1 3/4, against 4/7 above 0.8
    assert curves.pooled_threshold == pytest.approx(0.4)
    # Small: both found. Large: ranks 0.8 wrong, 0.4 right, 0.1 wrong, of one box.
    sizes = gains.size_aps(entries, np.array([[2, 0], [0, 0], [0, 0], [1, 0]], np.float64))
    np.testing.assert_allclose(sizes, [1, np.nan, np.nan, 0.5])


def test_sizes_are_shares_of_the_image_side():
    boxes = np.array([[0, 0, 0.04, 0.04], [0, 0, 0.1, 0.1], [0, 0, 0.2, 0.4], [0, 0, 1, 1]])
    assert gains.size_of(boxes).tolist() == [0, 1, 2, 3]


def test_pictures_are_the_worst_and_best_images_and_examples(tmp_path):
    box, far = (0.0, 0.0, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)
    images = {
        "best": ([(0, box), (1, far)], [0, 1]),
        "good": ([(0, box)], [0, 1]),
        "mixed": ([(0, box), (0, far)], [0, 1]),
        "none": ([], []),
        "worst": ([(0, box), (0, far), (1, far)], [0, 1]),
    }
    rows = {
        "best": [(0, 0.9, box), (1, 0.9, far)],
        "good": [(0, 0.9, box)],
        "mixed": [(0, 0.9, box), (1, 0.9, far)],
        "none": [],
        "worst": [],
    }
    dataset = write_set(tmp_path / "set", images)
    scope, tables = run(dataset, write_table(tmp_path / "x.parquet", rows))
    confusions = count_confusions(scope, tables)
    pictures, shown = choose(scope, tables, confusions, 80)
    ranks = {}
    for picture in pictures:
        for reason in picture.reasons:
            ranks.setdefault(reason.kind, {})[reason.rank] = dataset.image_id(picture.image)
    assert ranks["worst"] == {0: "worst", 1: "mixed"}
    assert ranks["best"] == {0: "best", 1: "good", 2: "mixed"}
    assert [dataset.image_id(picture.image) for picture in shown] == ["mixed"]
    assert len(choose(scope, tables, confusions, 2)[0]) <= 2
    assert choose(scope, tables, confusions, 0) == ([], [None])


def test_rarity_counts_training_boxes_of_child_classes_too(tmp_path):
    dataset = write_set(tmp_path / "set", GROUP_IMAGES, HIERARCHY)
    reader = write_table(tmp_path / "x.parquet", GROUP_ROWS)
    scope, _ = run(dataset, reader, train_split="train")
    assert scope.train_counts.tolist() == [1, 1, 0, 1]  # the train split is image x
    assert [(name, members.tolist()) for name, members in rarity_groups(scope)] == [
        ("fewer than 10", [0, 1, 2, 3])
    ]


def test_tables_without_any_detection_and_without_correct_ones(tmp_path):
    dataset = write_set(tmp_path / "set", GROUP_IMAGES, HIERARCHY)
    empty = write_table(tmp_path / "empty.parquet", {key: [] for key in GROUP_ROWS})
    wrong = {key: [(0, 0.6, (0.9, 0, 1, 0.05))] for key in GROUP_ROWS}
    scope, tables = run(dataset, empty, write_table(tmp_path / "wrong.parquet", wrong))
    for table in tables:
        assert (
            table.official["mAP@0.5"] == 0 and table.image_found.sum() == 0 and table.unfound == 7
        )
    assert tables[1].status_counts[0, errors.BACKGROUND] == 3
    assert len(count_confusions(scope, tables).predicted) == 0


def test_tables_of_different_images_are_refused(tmp_path):
    dataset = write_set(tmp_path / "set", GROUP_IMAGES)
    rows = dict(GROUP_ROWS)
    readers = [write_table(tmp_path / "a.parquet", rows)]
    del rows["z"]
    readers.append(write_table(tmp_path / "b.parquet", rows))
    with pytest.raises(UserError, match="b.parquet: covers 2 images .* compare tables of the same"):
        open_scope(dataset, "val", readers, train_split=None, allow_partial=True, say=quiet)
    with pytest.raises(UserError, match="covers 2 of the 3 images"):
        open_scope(dataset, "val", readers[1:], train_split=None, allow_partial=False, say=quiet)


def test_names_tell_tables_apart():
    assert table_names(["x/a.parquet", "y/b.parquet"]) == ["a", "b"]
    same = ["runs/one/5/val.parquet", "runs/two/5/val.parquet"]
    assert table_names(same) == ["one", "two"]
    with pytest.raises(UserError, match="given twice"):
        table_names(["x/a.parquet", "x/../x/a.parquet"])


def test_embedded_json_cannot_end_its_element():
    assert "<" not in embed_json({"name": "</script><script>"})
