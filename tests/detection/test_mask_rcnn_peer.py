"""Our Mask R-CNN is torchvision's `maskrcnn_resnet50_fpn` with the same random weights."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from common.masks.probability import PROBABILITY_ONE
from common.nn.weights.backbone_weights import convert_state_dict
from configs.detection import r50
from detection.batch_fields import init_shapes
from detection.losses.mask import mask_targets
from detection.models.faster_rcnn import build
from detection.models.mask_branch import train_masks
from detection.settings import read_run
from detection.structures import RoITargets

torch = pytest.importorskip("torch", reason="optional peer")
detection = pytest.importorskip("torchvision.models.detection", reason="optional peer")

CLASSES, MASK_SIZE = 7, 112
SIZES = ((160, 192), (128, 176))  # of the photos; the canvas is the larger
STRIDES = (4, 8, 16, 32, 64)


def photos():
    """Smooth shades with bright shapes and noise, uint8."""
    rng = np.random.default_rng(0)
    for height, width in SIZES:
        y, x = np.mgrid[:height, :width]
        image = 120 + 60 * np.sin(y / 17)[..., None] * np.cos(x[..., None] / (11, 23, 31))
        for _ in range(12):
            centre, reach = rng.uniform(0, (height, width)), rng.uniform(6, 40, 2)
            inside = (abs(y - centre[0]) < reach[0]) & (abs(x - centre[1]) < reach[1])
            image[inside] = rng.uniform(0, 255, 3)
        yield np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def torchvision_model():
    """With random weights that keep activations in range and scores apart."""
    torch.manual_seed(0)
    model = detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1
    ).eval()
    stds = {"rpn.head.cls_logits": 0.2, "roi_heads.box_predictor.cls_score": 0.05}
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if name.endswith("running_mean"):
                values.normal_(0, 0.1)
            elif name.endswith(("running_var", "bn1.weight", "bn2.weight", "downsample.1.weight")):
                values.uniform_(0.7, 1.3)
            elif name.endswith("bn3.weight"):
                values.uniform_(0.2, 0.4)
            elif name.endswith(".bias"):
                values.normal_(0, 0.05)
            for layer, std in stds.items():
                if name == f"{layer}.weight":
                    values.normal_(0, std)
    # Photos stay as they are, boxes and masks too. Our anchors are not rounded to whole pixels.
    model.transform.resize = lambda image, target: (image, target)
    model.transform.postprocess = lambda found, *_: found
    ratios = torch.tensor([0.5, 1.0, 2.0])
    half = torch.stack([-(ratios**-0.5), -(ratios**0.5), ratios**-0.5, ratios**0.5], 1) / 2
    model.rpn.anchor_generator.cell_anchors = [8 * stride * half for stride in STRIDES]
    return model


def our_values(state):
    """Our parameters and statistics of torchvision's state dict."""
    state = {name: value.numpy() for name, value in state.items()}
    prefix = "backbone.body."
    trunk = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    flat = {}
    for path, value in convert_state_dict(trunk, "resnet50")[0].items():
        collection, name = path.split("/", 1)
        flat[f"{collection}/backbone/{name}"] = value

    def layer(path, name, change):
        flat[f"params/{path}/kernel"] = change(state[f"{name}.weight"])
        flat[f"params/{path}/bias"] = state[f"{name}.bias"]

    def convolution(kernel):
        return kernel.transpose(2, 3, 1, 0)

    for i in range(4):
        layer(f"neck/lateral{i + 2}", f"backbone.fpn.inner_blocks.{i}.0", convolution)
        layer(f"neck/output{i + 2}", f"backbone.fpn.layer_blocks.{i}.0", convolution)
        layer(f"mask_head/conv{i + 1}", f"roi_heads.mask_head.{i}.0", convolution)
    layer("rpn_head/conv", "rpn.head.conv.0.0", convolution)
    layer("rpn_head/objectness", "rpn.head.cls_logits", convolution)
    layer("rpn_head/deltas", "rpn.head.bbox_pred", convolution)

    def channels_last(kernel):
        return kernel.reshape(-1, 256, 7, 7).transpose(2, 3, 1, 0).reshape(256 * 49, -1)

    layer("box_head/fc1", "roi_heads.box_head.fc6", channels_last)
    layer("box_head/fc2", "roi_heads.box_head.fc7", np.transpose)
    layer("box_head/classifier", "roi_heads.box_predictor.cls_score", np.transpose)
    layer("box_head/regressor", "roi_heads.box_predictor.bbox_pred", np.transpose)
    predictor = "roi_heads.mask_predictor"
    layer("mask_head/deconv", f"{predictor}.conv5_mask", lambda w: w.transpose(2, 3, 0, 1))
    layer("mask_head/predictor", f"{predictor}.mask_fcn_logits", lambda w: w[:, :, 0, 0].T)
    # Of background we have neither boxes nor masks.
    for name, count in (("box_head/regressor", 4), ("mask_head/predictor", 1)):
        for leaf in ("kernel", "bias"):
            path = f"params/{name}/{leaf}"
            flat[path] = flat[path][..., count:]
    return traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def pair():
    """(torchvision's model, ours, our variables, the batch)."""
    config = r50.get_config()
    config.data.mask_size = MASK_SIZE
    config.model.dtype = "float32"
    config.model.anchors.centre = 0.0
    config.model.box_head.aligned = False
    config.model.mask_head.kind = "class_specific"
    config.model.detections.update(score_threshold=0.05, max_detections=100)
    settings = read_run(config)
    model = build(settings.model, CLASSES)
    peer = torchvision_model()
    variables = our_values(peer.state_dict())
    shapes = jax.eval_shape(
        lambda: model.init(
            dict.fromkeys(("params", "sampling", "dropout"), jax.random.key(0)),
            {n: np.zeros(s.shape, s.dtype) for n, s in init_shapes(settings.data).items()},
            True,
        )
    )
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    image = np.zeros((2, *SIZES[0], 3), np.uint8)
    for canvas, photo in zip(image, photos(), strict=True):
        canvas[: photo.shape[0], : photo.shape[1]] = photo
    sizes, valid = np.array(SIZES, np.float32), np.ones(2, bool)
    return peer, model, variables, {"image": image, "image_size": sizes, "image_valid": valid}


def as_tensors():
    return [torch.from_numpy(photo).permute(2, 0, 1) / 255 for photo in photos()]


def test_boxes_scores_and_masks_are_torchvisions(pair):
    peer, model, variables, batch = pair
    with torch.no_grad():
        expected = peer(as_tensors())
    found = jax.jit(lambda v, b: model.apply(v, b, train=False))(variables, batch)
    for i, theirs in enumerate(expected):
        theirs = {name: value.numpy() for name, value in theirs.items()}
        valid = np.asarray(found["valid"][i])
        assert valid.sum() == len(theirs["boxes"]) > 20
        ours = {name: np.asarray(value[i])[valid] for name, value in found.items()}
        np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-5)
        np.testing.assert_array_equal(ours["classes"] + 1, theirs["labels"])
        np.testing.assert_allclose(ours["boxes"], theirs["boxes"], atol=1e-2)
        masks = ours["masks"] / PROBABILITY_ONE
        assert masks.std() > 0.1
        np.testing.assert_allclose(masks, theirs["masks"][:, 0], atol=1e-4)


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
    masks = np.zeros((2, 3, *SIZES[0]), np.uint8)
    for j in range(3):
        x1, y1, x2, y2 = gt_boxes[0, j].astype(int)
        masks[:, j, y1:y2, x1:x2] = solid[j]
    with torch.no_grad():
        images, _ = peer.transform(as_tensors())
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
