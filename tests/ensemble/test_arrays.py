"""Merging in memory: the functions of ensemble-boxes with their arguments, many images at once."""

import subprocess
import sys

import numpy as np
import pytest

import ensemble
from common.io.errors import UserError

MODELS = 3
METHODS = ("nms", "soft_nms", "linear_soft_nms", "wbf", "nmw", "adj_nms", "voting")


def draw_image(seed, n=25, labels=4):
    """Lists of one image, some boxes reach beyond it, some are inverted."""
    rng = np.random.default_rng(seed)
    objects = rng.uniform(0.1, 0.6, (5, 2))[rng.integers(0, 5, MODELS * n)]
    corner = objects + rng.normal(0, 0.02, objects.shape)
    boxes = np.concatenate([corner, corner + rng.uniform(0.2, 0.3, corner.shape)], 1)
    boxes[0, 2], boxes[1, 0] = 1.2, -0.1
    boxes[2] = boxes[2, [2, 1, 0, 3]]
    boxes[n, 2] = boxes[n, 0]  # no area
    scores = rng.uniform(0.01, 1.0, MODELS * n)
    classes = rng.integers(0, labels, MODELS * n)
    return tuple([a[m::MODELS] for m in range(MODELS)] for a in (boxes, scores, classes))


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("ensemble_boxes", reason="ensemble-boxes is not installed")


def assert_same(ours, theirs, rtol=2e-5):
    """Same boxes in the same order."""
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=rtol, atol=2e-6)


@pytest.mark.filterwarnings("ignore:X.|Y.|Zero area")
@pytest.mark.parametrize("weights", [None, (2.0, 1.0, 3.0)])
@pytest.mark.parametrize("skip", [0.0, 0.3])
def test_fusion_equals_the_package(peer, weights, skip):
    for seed in range(3):
        given = draw_image(seed)
        for conf_type in ("avg", "max", "box_and_model_avg", "absent_model_aware_avg"):
            options = dict(weights=weights, iou_thr=0.5, skip_box_thr=skip, conf_type=conf_type)
            theirs = peer.weighted_boxes_fusion(*given, **options)
            assert_same(ensemble.merge_arrays(*given, **options), theirs)
        options = dict(weights=weights, iou_thr=0.5, skip_box_thr=skip)
        theirs = peer.non_maximum_weighted(*given, **options)
        assert_same(ensemble.merge_arrays(*given, method="nmw", **options), theirs)


@pytest.mark.parametrize("weights", [None, (2.0, 1.0, 3.0)])
def test_suppression_equals_the_package(peer, weights):
    for seed in range(3):
        given = draw_image(seed)
        copies = [list(part) for part in given]  # the package changes the scores that it is given
        theirs = peer.nms(*copies, weights=weights, iou_thr=0.4)
        assert_same(ensemble.merge_arrays(*given, weights, method="nms", iou_thr=0.4), theirs)
        # The package returns the scores that it was given, ours the lowered ones: the same boxes.
        for name, number in (("soft_nms", 2), ("linear_soft_nms", 1)):
            options = dict(iou_thr=0.4, sigma=0.3, thresh=0.05)
            copies = [list(part) for part in given]
            theirs = peer.soft_nms(*copies, method=number, weights=weights, **options)
            ours = ensemble.merge_arrays(*given, weights, method=name, **options)
            for mine, other in zip(_sorted(ours), _sorted(theirs), strict=True):
                np.testing.assert_allclose(mine, other, atol=1e-6)


def _sorted(result):
    """Labels and boxes, without scores, in an order of their own."""
    boxes, _, labels = result
    table = np.column_stack([labels, boxes])
    return table[np.lexsort(table.T[::-1])]


@pytest.mark.parametrize("method", METHODS)
def test_many_images_are_merged_as_one_by_one(method):
    images = [draw_image(seed, n) for seed, n in enumerate((25, 1, 9))]
    images.insert(1, ([np.zeros((0, 4))] * MODELS, [[]] * MODELS, [[]] * MODELS))
    together = ensemble.merge_batch(*zip(*images, strict=True), method=method)
    assert len(together) == 4 and len(together[1][0]) == 0
    for given, found in zip(images, together, strict=True):
        if len(given[1][0]):
            assert_same(found, ensemble.merge_arrays(*given, method=method), rtol=1e-6)


def test_image_numbers_and_labels_come_back_as_they_were():
    box = [[0.1, 0.1, 0.5, 0.5]]
    boxes, scores, labels, images = ensemble.merge_arrays(
        [box * 2, box], [[0.5, 0.4], [0.9]], [["cat", "dog"], ["cat"]], images_list=[[7, 3], [7]]
    )
    assert images.tolist() == [3, 7] and labels.tolist() == ["dog", "cat"]
    np.testing.assert_allclose(scores, [0.2, 0.7], rtol=1e-6)
    assert boxes.dtype == scores.dtype == np.float32


def test_wrong_arguments_are_named():
    one = ([[[0, 0, 1, 1]]], [[0.5]], [[0]])
    for change, text in (
        (dict(method="wfb"), "method 'wfb': unknown, expected one of nms"),
        (dict(iou_thr=2.0), "operator.iou_threshold 2.0: expected a number from 0 to 1"),
        (dict(power=2.0), "wbf has no such setting"),
        (dict(weights=[1, 2]), "expected 1 numbers of at least 0"),
        (dict(images_list=[[1, 2]]), r"images_list: found \[2\] entries, expected \[1\]"),
    ):
        with pytest.raises(UserError, match=text):
            ensemble.merge_arrays(*one, **change)
    with pytest.raises(UserError, match="negative scores"):
        ensemble.merge_arrays(one[0], [[-1.0]], one[2])
    with pytest.raises(UserError, match="no models"):
        ensemble.merge_arrays([], [], [])
    assert ensemble.merge_batch([], [], []) == []
    nothing = ensemble.merge_arrays([np.zeros((0, 4))], [[]], [[]])
    assert [len(part) for part in nothing] == [0, 0, 0]


def test_importing_the_package_imports_no_jax():
    code = "import ensemble, sys; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
