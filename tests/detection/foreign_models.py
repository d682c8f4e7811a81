"""Random detectors of torchvision, photos for them, and how our detectors are run beside them."""

from typing import Any

import jax
import numpy as np

from detection.foreign.conversion import Converted, variables_of
from detection.models.faster_rcnn import build

SIZES = ((160, 192), (128, 176))  # of the photos; the canvas is the larger


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


def batch(given=None) -> dict[str, np.ndarray]:
    """The photos, or given ones, on one canvas."""
    given = list(photos() if given is None else given)
    image = np.zeros((len(given), *SIZES[0], 3), np.uint8)
    for canvas, photo in zip(image, given, strict=True):
        canvas[: photo.shape[0], : photo.shape[1]] = photo
    sizes = np.array([photo.shape[:2] for photo in given], np.float32)
    return {"image": image, "image_size": sizes, "image_valid": np.ones(len(given), bool)}


def torchvision_model(name: str, num_classes: int):
    """A detector with random weights that keep activations in range and scores apart.

    Photos stay as they are, boxes and masks too.
    """
    import torch
    from torchvision.models import detection

    torch.manual_seed(0)
    make = getattr(detection, name)
    model = make(weights=None, weights_backbone=None, num_classes=num_classes + 1).eval()
    stds = {
        "rpn.head.cls_logits": 0.2,
        "roi_heads.box_predictor.cls_score": 0.05,
        "roi_heads.box_predictor.bbox_pred": 0.02,
    }
    with torch.no_grad():
        for name, values in model.state_dict().items():
            randomise(name, values)
            for layer, std in stds.items():
                if name == f"{layer}.weight":
                    values.normal_(0, std)
    model.transform.resize = lambda image, target: (image, target)
    model.transform.postprocess = lambda found, *_: found
    return model


def tiny_torchvision_model(num_classes: int):
    """A detector on a ResNet-10, small enough for tests of commands."""
    import torch
    from torchvision.models import detection, resnet
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    torch.manual_seed(0)
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    stages = {f"layer{i + 1}": str(i) for i in range(4)}
    model = detection.FasterRCNN(
        BackboneWithFPN(body, stages, [64, 128, 256, 512], 16),
        box_head=detection.faster_rcnn.TwoMLPHead(16 * 49, 32),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(32, num_classes + 1),
        min_size=64,
        max_size=64,
    ).eval()
    with torch.no_grad():
        for name, values in model.state_dict().items():
            randomise(name, values)
    return model


def read_photo(path):
    import torch
    from PIL import Image

    return torch.from_numpy(np.asarray(Image.open(path))).permute(2, 0, 1) / 255


def randomise(name: str, values) -> None:
    """Statistics, scales and biases of a torch model; the last norm of a block stays small."""
    if name.endswith("running_mean"):
        values.normal_(0, 0.1)
    elif name.endswith("bn3.weight"):
        values.uniform_(0.2, 0.4)
    elif name.endswith("running_var") or (name.endswith("weight") and values.ndim == 1):
        values.uniform_(0.7, 1.3)
    elif name.endswith(".bias"):
        values.normal_(0, 0.05)


def as_tensors():
    import torch

    return [torch.from_numpy(photo).permute(2, 0, 1) / 255 for photo in photos()]


def detect(converted: Converted, of: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The valid detections of each photo of a batch."""
    model = build(converted.settings.model, converted.foreign.num_classes)
    variables = variables_of(converted.weights)
    run = jax.jit(
        lambda variables, batch: model.apply(variables, batch, train=False),
        compiler_options={"xla_backend_optimization_level": 0},  # it is called once
    )
    found: dict[str, Any] = jax.tree.map(np.asarray, run(variables, of))
    return [
        {name: value[i][valid] for name, value in found.items()}
        for i, valid in enumerate(found["valid"])
    ]
