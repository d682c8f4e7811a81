"""Our Mask R-CNN has the losses of torchvision's `maskrcnn_resnet50_fpn` with the same weights."""

import jax
import numpy as np
import pytest

from detection.foreign.conversion import convert_detector, variables_of
from detection.losses.mask import mask_targets
from detection.models.faster_rcnn import build
from detection.models.mask_branch import train_masks
from detection.structures import RoITargets
from tests.detection import foreign_models

torch = pytest.importorskip("torch", reason="optional peer")
pytest.importorskip("torchvision.models.detection", reason="optional peer")

CLASSES, MASK_SIZE = 7, 112


@pytest.fixture(scope="module")
def pair():
    """(torchvision's model, ours, our variables, the batch)."""
    peer = foreign_models.torchvision_model("maskrcnn_resnet50_fpn", CLASSES)
    state = {name: value.numpy() for name, value in peer.state_dict().items()}
    converted = convert_detector(state)
    model = build(converted.settings.model, CLASSES)
    return peer, model, variables_of(converted.weights), foreign_models.batch()


def test_loss_of_given_regions_is_torchvisions(pair):
    """Objects all or nothing of which is foreground: torchvision's targets are else fractions."""
    peer, model, variables, batch = pair
    roi_heads = pytest.importorskip("torchvision.models.detection.roi_heads")
    gt_boxes = np.array([[[10, 10, 90, 70], [60, 40, 150, 120], [5, 60, 60, 110]]] * 2, np.float32)
    gt_classes, solid = np.array([[2, 0, 5], [1, 6, 5]]), np.array([1, 0, 1], np.uint8)
    matched_idx = np.array([[0, 1, 2, 1], [2, 1, 0, 0]])
    matched = np.take_along_axis(gt_boxes, matched_idx[..., None], 1)
    rois = matched + np.random.default_rng(1).uniform(2, 9, matched.shape) * [1, 1, -1, -1]
    rois = rois.astype(np.float32)
    masks = np.zeros((2, 3, *foreign_models.SIZES[0]), np.uint8)
    for j in range(3):
        x1, y1, x2, y2 = gt_boxes[0, j].astype(int)
        masks[:, j, y1:y2, x1:x2] = solid[j]
    with torch.no_grad():
        images, _ = peer.transform(foreign_models.as_tensors())
        boxes = [*map(torch.from_numpy, rois)]
        pooled = peer.roi_heads.mask_roi_pool(
            peer.backbone(images.tensors), boxes, images.image_sizes
        )
        logits = peer.roi_heads.mask_predictor(peer.roi_heads.mask_head(pooled))
        expected = roi_heads.maskrcnn_loss(
            logits,
            boxes,
            [*map(torch.from_numpy, masks)],
            [*map(torch.from_numpy, gt_classes + 1)],
            [*map(torch.from_numpy, matched_idx)],
        )
    labels = np.take_along_axis(gt_classes, matched_idx, 1) + 1
    yes = np.ones(labels.shape, bool)
    targets = RoITargets(rois, labels, matched, yes, ~yes, matched_idx)
    gt_masks = np.broadcast_to(255 * solid[:, None, None], (2, 3, MASK_SIZE, MASK_SIZE // 8))
    batch = {**batch, "gt_masks": gt_masks, "gt_has_mask": np.ones((2, 3), bool)}

    def loss(model, batch, targets):
        masks = model.read(batch, train=False)[-1].masks
        return train_masks(masks, masks.heads[0], targets, batch, None)[0]

    found = jax.jit(lambda v: model.apply(v, batch, targets, method=loss))(variables)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_targets_are_those_of_roi_align_of_the_mask():
    """The bitmap of the photo, bins of many samples: as detectron2 crops it."""
    ops = pytest.importorskip("torchvision.ops")
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:MASK_SIZE, :MASK_SIZE]
    reach = 30 + 12 * np.sin(3 * np.arctan2(y - 60, x - 50))
    mask = (y - 60) ** 2 + (x - 50) ** 2 < reach**2
    gt_box = np.array([40, 24, 40 + MASK_SIZE, 24 + MASK_SIZE], np.float32)  # one cell a pixel
    rois = (gt_box + rng.uniform(-25, 25, (50, 4))).astype(np.float32)
    photo = np.zeros((192, 192), np.float32)
    photo[24 : 24 + MASK_SIZE, 40 : 40 + MASK_SIZE] = mask
    expected = ops.roi_align(
        torch.from_numpy(photo)[None, None], [torch.from_numpy(rois)], 28, aligned=True
    )
    matched = np.broadcast_to(gt_box, (1, 50, 4))
    found = mask_targets(
        np.packbits(mask, axis=1)[None, None], matched, np.zeros((1, 50), int), rois[None], 28
    )
    expected = expected[:, 0].numpy() >= 0.5
    assert 0.1 < expected.mean() < 0.6
    assert (np.asarray(found[0]) == expected).mean() > 0.995
