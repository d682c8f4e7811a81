"""NMS, soft-NMS, NMW and WBF equal the ensemble-boxes package, and where they differ on purpose."""

import numpy as np
import pytest

from common.tables import DetectionsWriter, read_detections
from configs.ensemble import naive
from ensemble.merge import merge_tables
from ensemble.operators import Nms, Nmw, SoftNms, WeightedBoxesFusion, groups
from ensemble.operators.groups import Rows, apply_operator

peer = pytest.importorskip("ensemble_boxes", reason="ensemble-boxes (with numba) is not installed")
peer_nms = pytest.importorskip("ensemble_boxes.ensemble_boxes_nms")

MODELS, LABELS, WEIGHTS = 3, 4, (2.0, 1.0, 3.0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """What the tests need; the real size only takes longer."""
    monkeypatch.setattr(groups, "_BLOCK_ENTRIES", 1 << 10)


def draw_image(seed, n=30):
    """Rows of one image; boxes around few objects, all scores different."""
    rng = np.random.default_rng(seed)
    objects = rng.uniform(0.1, 0.6, (5, 2))[rng.integers(0, 5, MODELS * n)]
    corner = objects + rng.normal(0, 0.02, objects.shape)
    boxes = np.clip(np.concatenate([corner, corner + rng.uniform(0.2, 0.3, corner.shape)], 1), 0, 1)
    return Rows(
        group=rng.integers(0, LABELS, MODELS * n),
        scores=np.float32(rng.permutation(MODELS * n) + 1) / 128,
        boxes=np.float32(boxes),
        model=np.repeat(np.arange(MODELS, dtype=np.int32), n),
    )


def lists(rows):
    """Boxes, scores and labels as the package takes them, a list entry a model."""
    by_model = [np.flatnonzero(rows.model == m) for m in range(MODELS)]
    return tuple(
        [np.float64(a[at]) for at in by_model] for a in (rows.boxes, rows.scores, rows.group)
    )


def weighted(rows, factors):
    scores = rows.scores * np.float32(factors)[rows.model]
    return Rows(rows.group, np.float32(scores), rows.boxes, rows.model)


def table(boxes, scores, labels):
    """Rows in an order of their own."""
    out = np.column_stack([labels, scores, boxes])
    return out[np.lexsort(out.T[::-1])]


def assert_same(rows, operator, theirs):
    ours, _ = apply_operator(rows, operator)
    found = table(ours.boxes, ours.scores, ours.group)
    np.testing.assert_allclose(found, table(*theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_nms(threshold):
    for seed in range(2):
        rows = draw_image(seed)
        assert_same(rows, Nms(threshold), peer.nms(*lists(rows), iou_thr=threshold))
        # The package divides its weights by their sum.
        theirs = peer.nms(*lists(rows), iou_thr=threshold, weights=WEIGHTS)
        assert_same(weighted(rows, np.array(WEIGHTS) / 6), Nms(threshold), theirs)


@pytest.mark.parametrize("number, method", [(1, "linear"), (2, "gaussian")])
def test_soft_nms(number, method):
    """The same rows survive with the same lowered scores."""
    for seed in range(2):
        rows = draw_image(seed)
        operator = SoftNms(method, sigma=0.3, iou_threshold=0.4, min_score=0.1)
        ours, source = apply_operator(rows, operator)
        for label in range(LABELS):
            boxes, scores = (np.float64(a[rows.group == label]) for a in (rows.boxes, rows.scores))
            # Permutes and lowers the scores that it is given.
            kept = peer_nms.cpu_soft_nms_float(boxes, scores, 0.4, 0.3, 0.1, number)
            mine = ours.group == label
            np.testing.assert_array_equal(
                np.sort(np.flatnonzero(rows.group == label)[kept]), np.sort(source[mine])
            )
            np.testing.assert_allclose(
                np.sort(scores[scores > 0.1]), np.sort(ours.scores[mine]), rtol=1e-5
            )


def test_soft_nms_of_the_package_returns_the_scores_it_was_given():
    """A fault of the package: it lowers a copy. Ours returns the lowered scores."""
    rows = draw_image(0)
    _, scores, _ = peer.soft_nms(*lists(rows), method=2, sigma=0.3, thresh=0.1)
    assert set(np.float32(scores)) <= set(rows.scores)
    ours, source = apply_operator(rows, SoftNms(sigma=0.3, min_score=0.1))
    np.testing.assert_array_equal(np.sort(rows.scores[source]), np.sort(np.float32(scores)))
    assert (ours.scores < rows.scores[source]).mean() > 0.5


@pytest.mark.parametrize("threshold", [0.4, 0.55])
def test_nmw(threshold):
    for seed in range(2):
        rows = draw_image(seed)
        operator = Nmw(threshold)
        assert_same(rows, operator, peer.non_maximum_weighted(*lists(rows), iou_thr=threshold))
        # The package divides its weights by the greatest.
        theirs = peer.non_maximum_weighted(*lists(rows), iou_thr=threshold, weights=WEIGHTS)
        assert_same(weighted(rows, np.array(WEIGHTS) / 3), operator, theirs)


@pytest.mark.parametrize(
    "confidence, overflow",
    [
        ("avg", False), ("avg", True), ("max", False),
        ("box_and_model_avg", False), ("absent_model_aware_avg", False),
    ],
)  # fmt: skip
def test_wbf(confidence, overflow):
    options = dict(conf_type=confidence, allows_overflow=overflow)
    for seed in range(2):
        rows = draw_image(seed)
        theirs = peer.weighted_boxes_fusion(
            *lists(rows), weights=WEIGHTS, iou_thr=0.5, skip_box_thr=0.0, **options
        )
        operator = WeightedBoxesFusion(WEIGHTS, 0.5, **options)
        assert_same(weighted(rows, WEIGHTS), operator, theirs)


def one_group(boxes, scores):
    n = len(scores)
    return Rows(np.zeros(n, int), np.float32(scores), np.float32(boxes), np.zeros(n, np.int32))


BOX, NEAR = [0.125, 0.125, 0.625, 0.625], [0.125, 0.125, 0.625, 0.6]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    "function, operator",
    [
        (peer.non_maximum_weighted, Nmw()),
        (peer.weighted_boxes_fusion, WeightedBoxesFusion((1.0, 1.0, 1.0))),
    ],
)
def test_the_package_makes_nan_of_zero_scores(function, operator):
    rows = one_group([BOX, NEAR], [0.0, 0.0])
    assert np.isnan(function(*lists(rows))[0]).any()
    ours, _ = apply_operator(rows, operator)
    np.testing.assert_array_equal(ours.boxes, np.float32([BOX]))


def test_nms_of_the_package_goes_backwards_through_equal_scores():
    rows = one_group([BOX, NEAR], [0.5, 0.5])
    np.testing.assert_allclose(peer.nms(*lists(rows))[0], [NEAR], rtol=1e-6)
    np.testing.assert_array_equal(apply_operator(rows, Nms())[0].boxes, np.float32([BOX]))


def test_the_package_clips_and_drops_boxes_on_its_own():
    rows = one_group([[0.5, 0.5, 1.25, 1.0], [0.5, 0.5, 0.5, 1.0]], [0.9, 0.8])
    np.testing.assert_allclose(peer.nms(*lists(rows))[0], [[0.5, 0.5, 1.0, 1.0]])
    np.testing.assert_array_equal(apply_operator(rows, Nms())[0].boxes, rows.boxes)


@pytest.mark.parametrize("function", [peer.non_maximum_weighted, peer.weighted_boxes_fusion])
def test_the_package_rounds_great_labels(function):
    """So a key of image and class is no label for it; groups here may be any integers."""
    rows = one_group([BOX, NEAR], [0.5, 0.4])
    boxes, scores, _ = lists(rows)
    assert function(boxes, scores, [[2**24 + 1] * 2, [], []])[2] == [2**24]
    key = np.full(2, 2**24 + 1)
    ours, _ = apply_operator(Rows(key, rows.scores, rows.boxes, rows.model), Nmw())
    np.testing.assert_array_equal(ours.group, [2**24 + 1])


@pytest.mark.parametrize(
    "confidence", ["avg", "max", "box_and_model_avg", "absent_model_aware_avg"]
)
def test_merging_with_model_weights_weighs_them_once(tmp_path, confidence):
    """`config.weights.models` alone: the scores' factors and what fusion divides by."""
    config = naive.get_config("wbf")
    config.operator.conf_type, config.operator.iou_threshold = confidence, 0.5
    config.weights.models = "m0=2,m1=1,m2=3"
    config.max_detections = 0
    rows = draw_image(3)
    boxes, scores, labels = lists(rows)
    inputs = []
    for model in range(MODELS):
        inputs.append(f"m{model}={tmp_path / str(model)}.parquet")
        with DetectionsWriter(tmp_path / f"{model}.parquet", {}) as writer:
            names = [str(int(label)) for label in labels[model]]
            writer.add("image", names, np.float32(scores[model]), np.float32(boxes[model]))
    merge_tables(inputs, config, tmp_path / "merged.parquet", say=lambda *_, **__: None)
    merged = read_detections(tmp_path / "merged.parquet")
    found = table(merged.boxes, merged.scores, [int(merged.labels[i]) for i in merged.label_index])
    theirs = peer.weighted_boxes_fusion(
        boxes, scores, labels, weights=WEIGHTS, iou_thr=0.5, skip_box_thr=0.0, conf_type=confidence
    )
    np.testing.assert_allclose(found, table(*theirs), rtol=0, atol=3e-7)
