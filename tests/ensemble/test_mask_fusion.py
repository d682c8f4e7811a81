"""Averaged masks: the pixels that most of a cluster's masks have, weighed by score."""

import numpy as np
import pytest

from common.io.errors import UserError
from common.masks import rle
from common.tables import DetectionsWriter, read_detections
from configs.ensemble import naive
from ensemble.mask_fusion import find_clusters, mask_nms, mean_masks
from ensemble.merge import merge_tables
from ensemble.operators import Nms
from ensemble.operators.groups import Rows, apply_operator
from tests.oracles import boxes as oracle

QUIET = dict(say=lambda *_, **__: None)


def random_rows(seed, count=120, groups=5):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 3, (count, 2)) * 0.3 + rng.normal(0, 0.03, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.2, 0.3, (count, 2))], 1).astype(np.float32)
    scores = rng.choice([0.1, 0.3, 0.5, 0.9], count).astype(np.float32)
    return Rows(rng.integers(0, groups, count), scores, boxes, np.zeros(count, np.int32))


@pytest.mark.parametrize("seed", range(3))
def test_rows_belong_to_the_merged_row_they_overlap_most(seed):
    rows = random_rows(seed)
    merged, source = apply_operator(rows, Nms(0.4))
    found = find_clusters(rows, merged, source, 0.4)
    for row in range(len(rows)):
        candidates = np.flatnonzero(merged.group == rows.group[row])
        overlaps = oracle.pairwise(oracle.iou, rows.boxes[row][None], merged.boxes[candidates])[0]
        expected = candidates[np.argmax(overlaps)] if overlaps.max() > 0.4 else -1
        assert found[row] == expected
    # NMS keeps nothing apart from what it suppressed: every row has a cluster.
    assert (found >= 0).all() and (found[source] == np.arange(len(source))).all()


def test_the_row_that_a_merged_one_stems_from_belongs_to_it():
    boxes = np.array([[0, 0, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]], np.float32)
    rows = Rows(np.zeros(2, int), np.array([0.9, 0.8], np.float32), boxes, np.zeros(2, np.int32))
    moved = Rows(rows.group[:1], rows.scores[:1], boxes[1:], rows.model[:1])
    assert find_clusters(rows, moved, np.array([0]), 0.5).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_means_are_those_of_the_pixels(seed):
    rng = np.random.default_rng(seed)
    size, count = (9, 7), 60
    masks = rng.random((count, *size)) < rng.choice([0.0, 0.5, 0.9, 1.0], (count, 1, 1))
    weights = rng.choice([0.25, 0.5, 1.0], count)
    cluster = rng.integers(-1, 12, count)
    clusters = np.unique(cluster[cluster >= 0])
    cluster = np.where(cluster >= 0, np.searchsorted(clusters, cluster), -1)
    best = np.array([np.flatnonzero(cluster == c)[0] for c in range(len(clusters))])
    counts = np.array(rle.encode(masks), object)
    found = mean_masks(counts, np.full((count, 2), size), weights, cluster, best)
    for c, text in enumerate(found):
        rows = cluster == c
        mean = np.einsum("n,nhw->hw", weights[rows], masks[rows])
        # Equal weights are exact binary fractions: half is half.
        expected = mean > weights[rows].sum() / 2
        np.testing.assert_array_equal(rle.decode(text, size), expected)


def test_masks_of_other_sizes_are_brought_to_that_of_the_best():
    small, large = np.zeros((4, 6), bool), np.zeros((8, 12), bool)
    small[1:3, 2:5] = large[:5] = True
    counts = np.array([rle.encode([m])[0] for m in (small, large, large)], object)
    sizes = np.array([[4, 6], [8, 12], [8, 12]])
    zero = np.zeros(3, int)
    (alone,) = mean_masks(counts, sizes, np.array([0.9, 0.1, 0.1]), zero, np.array([0]))
    assert alone == counts[0]
    (outvoted,) = mean_masks(counts, sizes, np.array([0.3, 0.2, 0.2]), zero, np.array([0]))
    expected = np.zeros((4, 6), bool)
    expected[:2] = True  # a pixel at whose centre a border lies is in the later one
    found = rle.decode(outvoted, (4, 6))
    np.testing.assert_array_equal(found[:2], expected[:2])
    assert not found[3].any()


@pytest.mark.parametrize("operator", ["nms", "wbf", "voting", "soft_nms"])
def test_merged_tables_have_mean_masks_on_demand(tmp_path, operator):
    boxes = np.array([[0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]], np.float32)
    size, parts = (20, 20), []
    for name, top, score in (("a", 2, 0.9), ("b", 3, 0.5), ("c", 3, 0.6)):
        masks = np.zeros((2, *size), bool)
        masks[0, top:10, 2:10] = masks[1, 12:18, 12:18] = True
        parts.append(masks)
        with DetectionsWriter(tmp_path / f"{name}.parquet", {"model": name}, masks=True) as writer:
            sizes = np.full((2, 2), size)
            writer.add("x", ["ant"] * 2, [score, 0.4], boxes, rle.encode(masks), sizes)
            writer.add_empty("y")
    inputs = [f"{n}={tmp_path / n}.parquet" for n in "abc"]
    config = naive.get_config(operator)
    config.masks = True
    merge_tables(inputs, config, tmp_path / "best.parquet", **QUIET)
    config.mask_rule = "mean"
    merge_tables(inputs, config, tmp_path / "mean.parquet", **QUIET)
    best, mean = (read_detections(tmp_path / f"{n}.parquet", masks=True) for n in ("best", "mean"))
    np.testing.assert_array_equal(best.boxes, mean.boxes)
    np.testing.assert_array_equal(rle.decode(best.masks[0], size), parts[0][0])
    # b and c outweigh a; where nothing is suppressed each row keeps its own.
    expected = parts[0][0] if operator == "soft_nms" else parts[1][0]
    np.testing.assert_array_equal(rle.decode(mean.masks[0], size), expected)
    assert {bytes(text) for text in mean.masks[mean.scores == mean.scores.min()]} <= {
        *rle.encode(parts[0]),
        *rle.encode(parts[1]),
    }


@pytest.mark.parametrize("seed", range(3))
def test_nms_by_masks_equals_brute_force_on_pixels(seed):
    rng = np.random.default_rng(seed)
    rows, size = random_rows(seed, count=60, groups=4), (12, 10)
    masks = rng.random((60, *size)) < rng.choice([0.2, 0.8, 0.9], (60, 1, 1))
    counts = np.array(rle.encode(masks), object)
    kept, cluster = mask_nms(rows, counts, np.full((60, 2), size), 0.5)
    expected = {}
    for row in sorted(range(60), key=lambda row: (rows.group[row], -rows.scores[row], row)):
        for leader in expected:
            if rows.group[leader] == rows.group[row]:
                both, either = masks[leader] & masks[row], masks[leader] | masks[row]
                if both.sum() > 0.5 * either.sum():
                    expected[leader].append(row)
                    break
        else:
            expected[row] = [row]
    assert kept.tolist() == list(expected)
    for place, members in enumerate(expected.values()):
        assert np.flatnonzero(cluster == place).tolist() == sorted(members)


def test_tables_merge_by_the_overlap_of_masks(tmp_path):
    """Two crossing bars share most of their boxes and few pixels."""
    size = (20, 20)
    masks = np.zeros((3, *size), bool)
    masks[0][np.eye(20, dtype=bool)] = masks[1][np.eye(20, dtype=bool)[::-1]] = True
    masks[2] = masks[0]
    whole = np.array([[0, 0, 1, 1]], np.float32)
    for name, mask, score in zip("abc", masks, (0.9, 0.8, 0.7), strict=True):
        with DetectionsWriter(tmp_path / f"{name}.parquet", {}, masks=True) as writer:
            writer.add("x", ["ant"], [score], whole, rle.encode(mask[None]), np.array([size]))
    config = naive.get_config()
    config.masks, config.mask_rule = True, "mean"
    found = []
    for match in ("boxes", "masks"):
        config.mask_match = match
        inputs = [str(tmp_path / f"{n}.parquet") for n in "abc"]
        merge_tables(inputs, config, tmp_path / "m.parquet", **QUIET)
        found.append(read_detections(tmp_path / "m.parquet", masks=True))
    np.testing.assert_allclose(found[0].scores, [0.9])
    np.testing.assert_allclose(found[1].scores, [0.9, 0.8])
    np.testing.assert_array_equal(rle.decode(found[1].masks[1], size), masks[1])
    config.operator = {"name": "voting"}
    with pytest.raises(UserError, match="operator.name: found 'voting', expected 'nms'"):
        merge_tables(inputs, config, tmp_path / "m.parquet", **QUIET)


def test_masks_that_are_left_out_are_said_to_be(tmp_path):
    with DetectionsWriter(tmp_path / "a.parquet", {}, masks=True) as writer:
        mask = rle.encode(np.ones((1, 4, 4), bool))
        writer.add("x", ["ant"], [0.5], np.array([[0, 0, 1, 1]]), mask, np.array([(4, 4)]))
    config, said = naive.get_config(), []
    given = ([str(tmp_path / "a.parquet")], config, tmp_path / "m.parquet")
    merge_tables(*given, say=lambda text, **_: said.append(text))
    assert "note: masks of the tables are left out, --config.masks=True keeps them" in said
    config.mask_rule = "mean"
    with pytest.raises(UserError, match="masks: found False, expected True for mask_rule='mean'"):
        merge_tables(*given, **QUIET)
