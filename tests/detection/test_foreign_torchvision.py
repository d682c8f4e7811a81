"""torchvision's detectors, converted, find what they find there, and go back bit for bit."""

import numpy as np
import pytest

from common.io.errors import UserError
from common.masks.probability import PROBABILITY_ONE
from common.nn.weights.backbone_weights import read_state_dict
from configs.detection import r50_dh
from detection.foreign.coco import CATEGORIES
from detection.foreign.conversion import class_names, convert_detector
from detection.foreign.family import Options
from detection.foreign.to_torchvision import save_state, to_torchvision
from detection.settings import read_run
from tests.detection import foreign_models

torch = pytest.importorskip("torch", reason="optional peer")
pytest.importorskip("torchvision", reason="optional peer")

CLASSES = 7


def arrays(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "name",
    ["maskrcnn_resnet50_fpn", pytest.param("maskrcnn_resnet50_fpn_v2", marks=pytest.mark.slow)],
)
def test_boxes_scores_and_masks_are_torchvisions(name):
    peer = foreign_models.torchvision_model(name, CLASSES)
    converted = convert_detector(arrays(peer))
    left = [name for name in converted.report.unused if "num_batches_tracked" not in name]
    assert not left and not converted.report.missing
    with torch.no_grad():
        expected = peer(foreign_models.as_tensors())
    for ours, theirs in zip(
        foreign_models.detect(converted, foreign_models.batch()), expected, strict=True
    ):
        theirs = {name: value.numpy() for name, value in theirs.items()}
        assert len(ours["boxes"]) == len(theirs["boxes"]) > 20
        np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-5)
        np.testing.assert_array_equal(ours["classes"] + 1, theirs["labels"])
        np.testing.assert_allclose(ours["boxes"], theirs["boxes"], atol=1e-3)
        masks = ours["masks"] / PROBABILITY_ONE
        assert masks.std() > 0.1
        np.testing.assert_allclose(masks, theirs["masks"][:, 0], atol=1e-4)


def released(model):
    """The same detector with 91 outputs whose unused ones are nothing, and names of before 0.13."""
    state = arrays(model)
    places = [0, *CATEGORIES][: CLASSES + 1]
    for layer, width in (("cls_score", 1), ("bbox_pred", 4)):
        for leaf in ("weight", "bias"):
            name = f"roi_heads.box_predictor.{layer}.{leaf}"
            value = np.full((91, width, *state[name].shape[1:]), -30.0, np.float32)
            value[places] = state[name].reshape(-1, width, *state[name].shape[1:])
            state[name] = value.reshape(91 * width, *state[name].shape[1:])
    state = {name: value for name, value in state.items() if "num_batches" not in name}
    return {name.replace("rpn.head.conv.0.0", "rpn.head.conv"): v for name, v in state.items()}


def test_of_91_outputs_the_80_classes_are_taken_and_an_epsilon_of_0():
    peer = foreign_models.torchvision_model("fasterrcnn_resnet50_fpn", CLASSES)
    converted, plain = convert_detector(released(peer)), convert_detector(arrays(peer))
    assert class_names(converted.foreign, None) == list(CATEGORIES.values())
    assert "outputs of 10 ids" in converted.foreign.notes[0]
    assert "norm epsilon 0" in converted.foreign.notes[1]
    for layer, width in (("classifier", 1), ("regressor", 4)):
        path = f"params/box_head/{layer}/bias"
        count = (CLASSES + (layer == "classifier")) * width
        np.testing.assert_array_equal(converted.weights[path][:count], plain.weights[path])
    path = "batch_stats/backbone/stem/norm/var"
    np.testing.assert_allclose(converted.weights[path] + 1e-5, plain.weights[path], rtol=1e-6)
    whole = convert_detector(released(peer), Options(norm_epsilon=1e-5, num_classes=90))
    assert whole.foreign.num_classes == 90
    np.testing.assert_array_equal(whole.weights[path], plain.weights[path])


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"])
def test_there_and_back_every_bit_stays_and_torchvision_takes_it(name, tmp_path):
    peer = foreign_models.torchvision_model(name, CLASSES)
    converted = convert_detector(arrays(peer))
    state, notes = to_torchvision(converted.settings, CLASSES, converted.weights)
    assert not notes
    save_state(tmp_path / "x.pth", state)
    again = convert_detector(read_state_dict(tmp_path / "x.pth"))
    assert again.weights.keys() == converted.weights.keys()
    for path, value in converted.weights.items():
        np.testing.assert_array_equal(again.weights[path], value)
    peer.load_state_dict(torch.load(tmp_path / "x.pth"))  # strict: no name is missing or unknown
    theirs = arrays(peer)
    for name, value in state.items():
        np.testing.assert_array_equal(theirs[name], value)


def test_what_torchvision_lacks_is_named():
    settings = read_run(r50_dh.get_config())
    with pytest.raises(UserError, match="model.box_head.kind: found 'decoupling', expected 'two_f"):
        to_torchvision(settings, 3, {})
    with pytest.raises(UserError, match="--output=x.npz: expected a name that ends with .safetens"):
        save_state("x.npz", {})
