"""detectron2's and mmdetection's detectors, converted, find what their published formulas find."""

import pickle

import numpy as np
import pytest

from common.io.errors import UserError
from common.masks.probability import PROBABILITY_ONE
from common.nn.weights.backbone_weights import read_state_dict
from detection.classifiers.softmax import Softmax
from detection.foreign.conversion import class_names, convert_detector, variables_of
from detection.foreign.family import Options
from detection.models.decoupling_head import DecouplingHead
from tests.detection import foreign_models

torch = pytest.importorskip("torch", reason="optional peer")
pytest.importorskip("torchvision", reason="optional peer")
published = pytest.importorskip("tests.oracles.published_detectors")

CLASSES, CANVAS = 5, (160, 192)
KINDS = {
    "detectron2": published.DETECTRON2_CASCADE,
    "mmdetection 2 or later": published.MMDETECTION_MASK,
    "mmdetection 1": published.MMDETECTION1_CASCADE,
}


def made(family: str, photos):
    """What the published detector finds, and its random weights."""
    weights = published.Weights()
    with torch.no_grad():
        found = published.detect(KINDS[family], weights, photos, CANVAS, CLASSES)
    return found, {name: value.numpy() for name, value in weights.state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_boxes_scores_and_masks_are_those_of_the_formulas(family):
    whole, part = foreign_models.photos()
    # mmdetection 1 leaves boxes outside of a photo a pixel wide, here they are none: it gets a
    # photo that shows no such box.
    photos = [whole[::-1, ::-1] if family == "mmdetection 1" else part]
    expected, state = made(family, photos)
    converted = convert_detector(state)
    assert converted.foreign.family == family
    assert not converted.report.unused and not converted.report.missing
    found = foreign_models.detect(converted, foreign_models.batch(photos))
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours["boxes"]) == len(theirs["boxes"]) > 20
        np.testing.assert_array_equal(ours["classes"], theirs["labels"])
        np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-4)
        np.testing.assert_allclose(ours["boxes"], theirs["boxes"], atol=1e-3)
        masks = ours["masks"] / PROBABILITY_ONE
        assert masks.std() > 0.05
        np.testing.assert_allclose(masks, theirs["masks"], atol=1e-4)


def state_of(family: str):
    """Random weights, made by looking at a photo of one colour."""
    return made(family, [np.full((64, 64, 3), 90, np.uint8)])[1]


def test_what_the_tensors_do_not_say_is_asked_for():
    state = state_of("mmdetection 2 or later")
    converted = convert_detector(state)
    assert converted.settings.model.backbone == "resnet50"
    assert any("--style=caffe" in note for note in converted.foreign.notes)
    caffe = convert_detector(state, Options(style="caffe"))
    assert caffe.settings.model.backbone == "resnet50_caffe" and caffe.foreign.reads_bgr
    np.testing.assert_array_equal(
        caffe.weights["params/backbone/stem/conv/kernel"],
        converted.weights["params/backbone/stem/conv/kernel"][:, :, ::-1],
    )
    with pytest.raises(UserError, match="--classes: found none, expected a CSV file .* 5 classes"):
        class_names(converted.foreign, None)
    assert class_names(converted.foreign, list("abcde")) == list("abcde")


def test_missing_other_and_unknown_tensors_are_named():
    state = state_of("detectron2")
    left_over = convert_detector({**state, "pixel_mean": np.zeros(3, np.float32)})
    assert left_over.report.unused == ["pixel_mean"]
    name = "roi_heads.box_head.1.fc2.bias"
    with pytest.raises(UserError, match=rf"no value for 1 arrays, first .*box_head2/fc2.*{name}"):
        convert_detector({key: value for key, value in state.items() if key != name})
    with pytest.raises(UserError, match=rf"{name}: found shape \(3,\), expected \(64,\) for param"):
        convert_detector({**state, name: np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="found tensors such as 'fc.weight', expected a whole two-"):
        convert_detector({"fc.weight": np.zeros(3, np.float32)})


def test_a_zoo_pickle_is_read_and_nothing_in_it_is_executed(tmp_path):
    state = {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "zoo"}, protocol=2))
    np.testing.assert_array_equal(read_state_dict(path)["fc.weight"], state["fc.weight"])
    path.write_bytes(pickle.dumps({"model": np.random.default_rng}))
    with pytest.raises(UserError, match="x.pkl: refused the global numpy"):
        read_state_dict(path)


def tsd_state(side: int = 7) -> dict[str, np.ndarray]:
    """mmdetection 1's detector with the box head of TSD's release, random."""
    weights = published.Weights()
    kind = published.MMDETECTION1_CASCADE
    with torch.no_grad():
        images = torch.ones(1, 3, 64, 64)
        levels = published.pyramid(kind, weights, published.backbone(kind, weights, images))
        published.propose(kind, weights, levels, (64, 64))
    inputs, width = published.CHANNELS * side * side, published.WIDTH
    for name, shape in {
        "shared_fc.0": (256, inputs),
        "delta_c.0": (256, 256),
        "delta_c.2": (2 * side * side, 256),
        "delta_r.0": (256, 256),
        "delta_r.2": (2, 256),
        **{f"{tower}_fcs.0": (width, inputs) for tower in ("shared", "TSD_pc", "TSD_pr")},
        **{f"{tower}_fcs.1": (width, width) for tower in ("shared", "TSD_pc", "TSD_pr")},
        **{f"{prefix}fc_cls": (CLASSES + 1, width) for prefix in ("", "TSD_")},
        **{f"{prefix}fc_reg": (4 * (CLASSES + 1), width) for prefix in ("", "TSD_")},
    }.items():
        weights(f"bbox_head.{name}.weight", shape)
        weights(f"bbox_head.{name}.bias", shape[:1], 0.1)
    return {name: value.numpy() for name, value in weights.state.items()}


def test_the_head_of_tsd_computes_what_the_release_computes():
    state = tsd_state()
    converted = convert_detector(state)
    assert converted.foreign.family == "TSD" and not converted.report.unused
    assert converted.settings.model.box_head.kind == "decoupling"
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, published.CHANNELS, 7, 7)).astype(np.float32)
    boxes = np.array([[[4, 6, 40, 30], [10, 10, 20, 44], [0, 3, 60, 60]]], np.float32)
    pooled = features.transpose(0, 2, 3, 1)[None]
    head = DecouplingHead(Softmax(CLASSES), published.WIDTH, offset_init="release")
    params = variables_of(converted.weights)["params"]["box_head"]
    found = head.apply({"params": params}, lambda *_: pooled, boxes, False)

    def dense(x, name):
        return x @ state[f"bbox_head.{name}.weight"].T + state[f"bbox_head.{name}.bias"]

    def relu(x):
        return np.maximum(x, 0)

    flat = features.reshape(3, -1)
    shared = relu(dense(flat, "shared_fc.0"))
    move = 0.1 * dense(relu(dense(shared, "delta_r.0")), "delta_r.2")
    size = boxes[0, :, 2:] - boxes[0, :, :2]
    np.testing.assert_allclose(found.references[0], boxes[0] + np.tile(move * size, 2), atol=1e-3)
    towers = {}
    for tower in ("TSD_pc", "TSD_pr"):
        towers[tower] = relu(dense(relu(dense(flat, f"{tower}_fcs.0")), f"{tower}_fcs.1"))
    np.testing.assert_allclose(
        found.logits[0], dense(towers["TSD_pc"], "TSD_fc_cls"), rtol=1e-4, atol=1e-3
    )
    deltas = dense(towers["TSD_pr"], "TSD_fc_reg").reshape(3, CLASSES + 1, 4)[:, 1:]
    np.testing.assert_allclose(found.deltas[0], deltas, rtol=1e-4, atol=1e-3)
