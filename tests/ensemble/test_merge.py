"""Merging tables: the same as merging each image by hand, for any chunks, processes and order."""

import json
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from common.data.dataset import DatasetWriter
from common.io.errors import UserError
from common.tables import DetectionsWriter, read_detections
from common.tables.table import MAX_SCORE
from configs.ensemble import adj_nms, lvis_rs, naive, reweighted, voting
from ensemble.merge import merge_tables, squash
from ensemble.relations.counts import Relations
from ensemble.tree.binary_tree import Leaf, Node, Operators, Tree, save
from tests.commands import ROOT, run_two_processes
from tests.ensemble.tables import LABELS, draw_images, rows_of, write
from tests.oracles import ensembling

BOX = np.array([[0.1, 0.1, 0.5, 0.5]], np.float32)
QUIET = dict(say=lambda *_, **__: None)
CLASS_AP = "OpenImagesDetectionChallenge_PerformanceByCategory/AP@0.5IOU/{}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    for seed, name in enumerate("abc"):
        write(folder / f"{name}.parquet", draw_images(seed), dataset="animals", split="val", step=7)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A cow is a mammal is an animal; ants and bees are insects are animals."""
    labels = [*LABELS, "insect", "animal"]
    tree = {
        "LabelName": "root",
        "Subcategory": [
            {
                "LabelName": "animal",
                "Subcategory": [
                    {"LabelName": "cow"},
                    {"LabelName": "insect", "Subcategory": [{"LabelName": x} for x in labels[:2]]},
                ],
            }
        ],
    }
    path = tmp_path_factory.mktemp("data") / "animals"
    with DatasetWriter(path, "animals", labels, labels, tree, "") as table:
        for number in range(12):
            # One image with a bee, twelve with an ant.
            classes = [0, 1] if number == 0 else [0]
            boxes = [[0.1, 0.1, 0.4, 0.4]] * len(classes)
            table.add_image(f"i{number:03d}", "x.jpg", (10, 10), boxes, classes)
        table.add_split("val", range(12))
    return path


def inputs(folder, names="abc"):
    return [str(folder / f"{name}.parquet") for name in names]


def changed(config, **fields):
    """The config with fields such as rescoring__rare=2."""
    for name, value in fields.items():
        *sections, last = name.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[last] = value
    return config


def by_hand(images_by_model, operator, weights=None, kept=None, limit=300):
    """Merged rows {image: sorted (label, score, box)}; `operator(boxes, scores)` as the oracles."""
    merged = {}
    for image in images_by_model[0]:
        rows = []
        for label in LABELS:
            found = [
                (score * (weights[m][label] if weights else 1), box)
                for m, images in enumerate(images_by_model)
                for name, score, box in zip(*images[image], strict=True)
                if name == label and (kept is None or label in kept[m])
            ]
            if found:
                scores = np.array([score for score, _ in found], np.float32)
                boxes = np.array([box for _, box in found], np.float32)
                rows += [(label, s, tuple(b)) for s, b in operator(boxes, scores).values()]
        merged[image] = sorted(rows, key=lambda row: -row[1])[:limit]
    return merged


def assert_same(path, expected):
    found = {image: [] for image in expected}
    for image, label, score, box in rows_of(path):
        found[image].append((label, score, box))
    for image, rows in expected.items():
        assert [row[0] for row in found[image]] == [row[0] for row in rows]
        np.testing.assert_allclose([r[1] for r in found[image]], [r[1] for r in rows], rtol=1e-5)
        np.testing.assert_allclose(
            np.reshape([r[2] for r in found[image]], (-1, 4)),
            np.reshape([r[2] for r in rows], (-1, 4)),
            atol=1e-6,
        )


def metrics_files(folder, aps):
    paths = []
    for number, values in enumerate(aps):
        path = folder / f"ap{number}.json"
        path.write_text(json.dumps({CLASS_AP.format(k): v for k, v in values.items()}))
        paths.append(str(path))
    return ",".join(paths)


def test_naive(folder, tmp_path):
    counts = merge_tables(inputs(folder), naive.get_config(), tmp_path / "m.parquet", **QUIET)
    images = [draw_images(seed) for seed in range(3)]
    expected = by_hand(images, lambda b, s: ensembling.nms(b, s, 0.5))
    assert_same(tmp_path / "m.parquet", expected)
    assert counts["written"] == sum(map(len, expected.values())) and counts["images"] == 12
    metadata = read_detections(tmp_path / "m.parquet").metadata
    assert metadata["inputs"][1] == {
        "name": "b", "path": str(folder / "b.parquet"), "model": "m", "dataset": "animals",
        "split": "val", "step": 7,
    }  # fmt: skip
    assert metadata["config"] == json.loads(json.dumps(naive.get_config().to_dict()))
    assert metadata["model"] == "naive" and metadata["split"] == "val"
    assert metadata["expanded"] is False


def test_reweighted_voting_with_an_expert(folder, tmp_path):
    aps = [
        {"ant": 0.2, "bee": 0.3, "cow": 0.0},
        {"ant": 0.4, "bee": 0.15, "cow": 0.0},
        {"ant": 0.3},
    ]
    (tmp_path / "expert.csv").write_text("label,name\nant,Ant\n")
    config = changed(
        voting.get_config(),
        weights__metrics=metrics_files(tmp_path, aps),
        weights__models="c=0.5",
        experts=f"c={tmp_path / 'expert.csv'}",
        max_detections=5,
    )
    merge_tables(inputs(folder), config, tmp_path / "m.parquet", **QUIET)
    images = [draw_images(seed) for seed in range(3)]
    weights = [{"ant": 0.5, "bee": 1, "cow": 1}, {"ant": 1, "bee": 0.5, "cow": 1}, {"ant": 0.375}]
    expected = by_hand(
        images,
        lambda b, s: ensembling.voting(b, s, 0.5, 4, 0.05, 0.3, "mean", 0.5),
        weights,
        [LABELS, LABELS, ("ant",)],
        limit=5,
    )
    assert_same(tmp_path / "m.parquet", expected)


def test_neither_chunks_nor_processes_change_the_result(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ensemble.chunks._MIN_ROWS", 1)
    merge_tables(inputs(folder), naive.get_config(), tmp_path / "m.parquet", **QUIET)
    expected = rows_of(tmp_path / "m.parquet")
    config = changed(naive.get_config(), chunk_rows=20)
    merge_tables(inputs(folder), config, tmp_path / "small.parquet", **QUIET)
    assert rows_of(tmp_path / "small.parquet") == expected
    for process in range(3):
        merge_tables(
            inputs(folder), config, tmp_path / "shards",
            process_index=process, process_count=3, **QUIET,
        )  # fmt: skip
    assert rows_of(tmp_path / "shards") == expected


def test_one_table_through_nms_that_drops_nothing_comes_back_unchanged(tmp_path):
    images = {"x": (["ant", "bee"], [0.5, 1.2], BOX.repeat(2, 0)), "y": ([], [], BOX[:0])}
    path = write(tmp_path / "a.parquet", images)
    merge_tables([path], naive.get_config(), tmp_path / "m.parquet", **QUIET)
    assert rows_of(tmp_path / "m.parquet") == rows_of(path)
    assert read_detections(tmp_path / "m.parquet").image_ids == ["x", "y"]


def test_expansion_to_parent_classes(folder, dataset, tmp_path):
    """After the operator: copies of what it made. Before: one list for each parent class."""
    found = {}
    for expansion in ("none", "after", "before"):
        config = changed(naive.get_config(), dataset=str(dataset), expansion=expansion)
        output = tmp_path / f"{expansion}.parquet"
        merge_tables(inputs(folder, "ab"), config, output, **QUIET)
        found[expansion] = rows_of(output)
        assert read_detections(output).metadata["expanded"] is (expansion != "none")
    parents = {"ant": ["insect", "animal"], "bee": ["insect", "animal"], "cow": ["animal"]}
    copies = [
        (image, label, *rest)
        for image, own, *rest in found["none"]
        for label in [own, *parents[own]]
    ]
    assert sorted(found["after"]) == sorted(copies)
    own = {kind: [r for r in found[kind] if r[1] in LABELS] for kind in found}
    assert sorted(own["before"]) == sorted(own["after"])
    # A box of an ant and one of a bee at the same place are one animal.
    images = [draw_images(seed) for seed in range(2)]
    animals = [{i: (["ant"] * len(s), s, b) for i, (_, s, b) in m.items()} for m in images]
    merged = by_hand(animals, lambda b, s: ensembling.nms(b, s, 0.5))
    expected = [(i, pytest.approx(s)) for i, rows in merged.items() for _, s, _ in rows]
    assert [(i, s) for i, label, s, _ in found["before"] if label == "animal"] == expected
    config = changed(naive.get_config(), dataset=str(dataset), expansion="after")
    with pytest.raises(UserError, match=r"after\.parquet is expanded to parent classes already"):
        merge_tables([str(tmp_path / "after.parquet")], config, tmp_path / "x.parquet", **QUIET)
    with pytest.raises(UserError, match="config.expansion: needs the hierarchy"):
        merge_tables(inputs(folder), changed(config, dataset=""), tmp_path / "x.parquet", **QUIET)


def test_rare_classes_are_raised_before_the_cut_but_keep_their_ranking(dataset, tmp_path):
    rng = np.random.default_rng(1)
    boxes = np.concatenate([np.linspace([0, 0], [0.7, 0.7], 8)] * 2, axis=1) + [0, 0, 0.05, 0.05]
    scores = rng.uniform(0.5, 0.9, 8)
    scores[4:] /= 3
    path = write(tmp_path / "a.parquet", {"i000": (["ant"] * 4 + ["bee"] * 4, scores, boxes)})
    plain = changed(naive.get_config(), max_detections=4)
    merge_tables([path], plain, tmp_path / "plain.parquet", **QUIET)
    assert [row[1] for row in rows_of(tmp_path / "plain.parquet")] == ["ant"] * 4
    for mode, rare in (("multiplier", 40.0), ("exponent", 100.0)):
        # The dataset has a bee in one image and ants in twelve: rare and common.
        config = changed(
            lvis_rs.get_config(mode), rescoring__groups=str(dataset), rescoring__rare=rare,
            rescoring__common=1.0, max_detections=4,
        )  # fmt: skip
        merge_tables([path], config, tmp_path / f"{mode}.parquet", **QUIET)
        found = rows_of(tmp_path / f"{mode}.parquet")
        assert [row[1] for row in found] == ["bee"] * 4
        ranked = boxes[4:][np.argsort(-scores[4:])]
        np.testing.assert_allclose([row[3] for row in found], ranked, atol=1e-6)
        assert max(row[2] for row in found) <= 1


def test_relations_change_scores_before_the_cut(tmp_path):
    images = {"x": (["ant", "bee", "cow"], [0.9, 0.2, 0.5], BOX.repeat(3, 0))}
    path = write(tmp_path / "a.parquet", images)
    both = np.array([[0, 90, 0], [90, 0, 0], [0, 0, 0]])
    none, seen = np.zeros((3, 3), np.int64), np.full((3, 3), 100)
    counts = dict(images_both=both, images_known=seen, boxes_inside=none, boxes_known=seen)
    counts.update(images_present=seen[0], images_absent=seen[0])
    Relations(LABELS, meta={}, **counts).write(tmp_path / "r.npz")
    config = changed(
        naive.get_config(), relations__file=str(tmp_path / "r.npz"), relations__surround=False,
        max_detections=2,
    )  # fmt: skip
    merge_tables([path], config, tmp_path / "m.parquet", **QUIET)
    found = rows_of(tmp_path / "m.parquet")
    # A bee is seen with nine ants of ten: 0.9 * 0.9.
    assert [row[1] for row in found] == ["ant", "bee"]
    assert found[1][2] == pytest.approx(0.81)


def test_searched_tree(folder, tmp_path):
    tree = Tree(Node(Node(Leaf("b"), Leaf("a")), Leaf("c"), Operators()), ("a", "b", "c"))
    save(tmp_path / "tree.json", tree)
    config = changed(naive.get_config(), tree=str(tmp_path / "tree.json"))
    merge_tables(inputs(folder), config, tmp_path / "tree.parquet", **QUIET)
    merge_tables(inputs(folder), naive.get_config(), tmp_path / "m.parquet", **QUIET)
    # NMS of NMS is not NMS, but the best of each object is the same.
    best = {}
    for name in ("tree", "m"):
        best[name] = {row[:2]: row[2:] for row in reversed(rows_of(tmp_path / f"{name}.parquet"))}
    assert best["tree"] == best["m"]
    with pytest.raises(UserError, match="tree: its models are a, b, c; missing c"):
        merge_tables(inputs(folder, "ab"), config, tmp_path / "x.parquet", **QUIET)


def test_masks_stay_with_their_boxes(tmp_path):
    boxes = np.array([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.52], [0.6, 0.6, 0.9, 0.9]], np.float32)
    for name, scores in (("a", [0.5, 0.3, 0.4]), ("b", [0.4, 0.6, 0.3])):
        with DetectionsWriter(tmp_path / f"{name}.parquet", {"model": name}, masks=True) as table:
            masks = [f"{name}{i}".encode() for i in range(3)]
            table.add("x", ["ant"] * 3, scores, boxes, masks, np.full((3, 2), 10, np.int32))
    config = changed(voting.get_config(), masks=True)
    merge_tables(inputs(tmp_path, "ab"), config, tmp_path / "m.parquet", **QUIET)
    found = read_detections(tmp_path / "m.parquet", masks=True)
    assert list(found.masks) == [b"b1", b"a2"] and found.mask_sizes.tolist() == [[10, 10]] * 2
    merge_tables(inputs(tmp_path, "ab"), voting.get_config(), tmp_path / "n.parquet", **QUIET)
    with pytest.raises(UserError, match=r"n\.parquet: no mask column, but config.masks is set"):
        merge_tables([str(tmp_path / "n.parquet")], config, tmp_path / "x.parquet", **QUIET)


def test_scores_stay_within_what_tables_hold_and_keep_their_order():
    scores = np.array([0.0, 0.7, 1.2, 1.25, 1.2500002, 1.3, 1.8, 5.0, 100.0], np.float32)
    found = squash(scores)
    np.testing.assert_array_equal(found[:4], scores[:4])
    assert np.all(np.diff(found) >= 0) and len(np.unique(found)) >= 8
    assert found.max() <= MAX_SCORE


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"operator__name": "mean"}, "operator.name 'mean': unknown"),
        (
            {"expansion": "twice"},
            "config.expansion: found 'twice', expected one of 'none', 'before'",
        ),
        ({"coverage": "most"}, "config.coverage: found 'most', expected one of 'same', 'union'"),
        ({"max_detections": -1}, "config.max_detections: found -1, expected 0 or more"),
        ({"tree": "none.json"}, "none.json: cannot read the tree"),
        ({"mappings": "a=x.csv"}, "class map 'x.csv': expected FILE:SOURCE_COLUMN"),
        ({"rescoring__groups": "none.json"}, "none.json: cannot read it"),
        ({"weights__models": "z=1"}, "config.weights.models: no input is called 'z'"),
    ],
)
def test_configs_that_do_not_fit_leave_nothing_behind(folder, tmp_path, fields, message):
    config = changed(naive.get_config(), **fields)
    with pytest.raises(UserError, match=message):
        merge_tables(inputs(folder), config, tmp_path / "m.parquet", **QUIET)
    assert not list(tmp_path.iterdir())


def test_broken_rows_leave_nothing_behind(folder, tmp_path):
    path = tmp_path / "b.parquet"
    path.write_bytes((folder / "b.parquet").read_bytes().replace(b"i000", b"j000"))
    config = changed(naive.get_config(), coverage="union")
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"b\.parquet: (row|damaged)"):
        merge_tables([*inputs(folder, "a"), str(path)], config, tmp_path / "m.parquet", **QUIET)
    assert set(tmp_path.iterdir()) == before
    with pytest.raises(UserError, match="is one of the inputs, expected another name"):
        merge_tables(inputs(folder), config, folder / "a.parquet", **QUIET)


@pytest.mark.parametrize("module", [naive, reweighted, adj_nms, voting, lvis_rs])
def test_configs_take_their_argument(module):
    for arg in (None, {"lvis_rs": "exponent", "naive": "soft_nms"}.get(module.__name__[17:], "1")):
        assert isinstance(module.get_config(arg), ml_collections.ConfigDict)


@pytest.mark.multiprocess
def test_command_line_in_two_processes_writes_two_shards(folder, tmp_path):
    outputs = run_two_processes(
        "ensemble.merge",
        "--config=configs/ensemble/naive.py",
        f"--inputs={','.join(inputs(folder))}",
        f"--output={tmp_path / 'm'}",
        devices=2,
    )
    assert "images 6/6" in outputs[0] and "images" not in outputs[1]
    assert len(list((tmp_path / "m").iterdir())) == 2
    merge_tables(inputs(folder), naive.get_config(), tmp_path / "m.parquet", **QUIET)
    assert rows_of(tmp_path / "m") == rows_of(tmp_path / "m.parquet")


def test_command_line_reports_errors_in_one_line(folder, tmp_path):
    result = subprocess.run(
        [
            sys.executable, "-m", "ensemble.merge", "--config=configs/ensemble/voting.py",
            f"--inputs={','.join(inputs(folder, 'az'))}", f"--output={tmp_path / 'm.parquet'}",
        ],
        cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "z.parquet: no such file or folder" in result.stderr
