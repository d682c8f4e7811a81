"""detectron2's and mmdetection's two-stage detectors in plain PyTorch, by their published formulas.

Names, shapes and arithmetic are written down here from the projects' documentation and sources, and
not taken from the code under test. Weights are made at random when a name is first asked for.

Boxes of mmdetection 1 end at their last pixel (x2 = x1 + width - 1), all others are half-open.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torchvision import ops

STRIDES = (4, 8, 16, 32, 64)
CHANNELS, WIDTH = 32, 64  # of pyramid and mask head, of dense layers


class Weights:
    """Random tensors by name."""

    def __init__(self, seed: int = 0):
        self.state: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, name: str, shape: tuple[int, ...], std: float = 0.0) -> torch.Tensor:
        if name not in self.state:
            noise = torch.randn(shape, generator=self._generator)
            self.state[name] = noise * (std or 1 / math.sqrt(math.prod(shape[1:])))
        return self.state[name]

    def kernel(self, name: str, shape: tuple[int, ...], apply, spread: float) -> torch.Tensor:
        """What gives outputs with a standard deviation of `spread` where it is first applied."""
        is_new = name not in self.state
        kernel = self(name, shape)
        if is_new:
            self.state[name] = kernel * (spread / apply(kernel).std())
        return self.state[name]

    def norm(self, x: torch.Tensor, name: str, scale: float = 1.0) -> torch.Tensor:
        """Batch norm with statistics that stay."""
        channels = (x.shape[1],)
        for leaf, start, spread in (
            ("weight", scale, 0.1 * scale),
            ("bias", 0.0, 0.05),
            ("running_mean", 0.0, 0.1),
            ("running_var", 1.0, 0.1),
        ):
            full = f"{name}.{leaf}"
            if full not in self.state:
                noise = torch.randn(channels, generator=self._generator)
                self.state[full] = start + spread * noise
        leaves = (self.state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var"))
        mean, var = (value[:, None, None] for value in leaves)
        weight, bias = (self.state[f"{name}.{leaf}"][:, None, None] for leaf in ("weight", "bias"))
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    def layer(self, x, name: str, outputs: int, side: int = 0, spread: float = 1.0, **options):
        """Dense layer (side 0) or convolution, with bias."""
        window = (side, side) if side else ()
        apply = (
            functools.partial(F.conv2d, x, **options) if side else functools.partial(F.linear, x)
        )
        shape = (outputs, x.shape[1], *window)
        kernel = self.kernel(f"{name}.weight", shape, apply, spread)
        return apply(kernel, bias=self(f"{name}.bias", (outputs,), 0.05))


@dataclasses.dataclass(frozen=True)
class Published:
    """A framework's detector: names and conventions.

    Attributes:
      block: names of convolution and norm number 1, 2, 3 (0: of the shortcut) of a block.
      stem: names of the first convolution and its norm.
      names: of all other layers; {i} is a level or layer from 0, {s} a stage from 0.
      mean, std: of pixels, in the order in which they are read.
      is_bgr: pixels are blue, green, red.
      stride_first: strides lie in the first 1x1 convolution of a block.
      is_legacy: the conventions of mmdetection 1.
      stds: of deltas, by stage.
      average_logits: of the stages; else of probabilities.
      mask_stages: mask heads.
      class_agnostic: one box for all classes.
    """

    block: Callable[[int, int, int], tuple[str, str]]
    stem: tuple[str, str]
    names: dict[str, str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    is_bgr: bool
    stride_first: bool
    is_legacy: bool
    stds: tuple[tuple[float, ...], ...]
    average_logits: bool
    mask_stages: int
    class_agnostic: bool

    def name(self, layer: str, i: int = 0, s: int = 0) -> str:
        return self.names[layer].format(i=i, i1=i + 1, i2=i + 2, s=s)


def _mmdetection_block(stage: int, block: int, number: int) -> tuple[str, str]:
    root = f"backbone.layer{stage + 1}.{block}."
    if number == 0:
        return f"{root}downsample.0", f"{root}downsample.1"
    return f"{root}conv{number}", f"{root}bn{number}"


def _detectron2_block(stage: int, block: int, number: int) -> tuple[str, str]:
    layer = f"conv{number}" if number else "shortcut"
    name = f"backbone.bottom_up.res{stage + 2}.{block}.{layer}"
    return name, f"{name}.norm"


DETECTRON2_CASCADE = Published(
    block=_detectron2_block,
    stem=("backbone.bottom_up.stem.conv1", "backbone.bottom_up.stem.conv1.norm"),
    names={
        "lateral": "backbone.fpn_lateral{i2}",
        "output": "backbone.fpn_output{i2}",
        "rpn": "proposal_generator.rpn_head.conv",
        "objectness": "proposal_generator.rpn_head.objectness_logits",
        "deltas": "proposal_generator.rpn_head.anchor_deltas",
        "fc": "roi_heads.box_head.{s}.fc{i1}",
        "classifier": "roi_heads.box_predictor.{s}.cls_score",
        "regressor": "roi_heads.box_predictor.{s}.bbox_pred",
        "mask_conv": "roi_heads.mask_head.mask_fcn{i1}",
        "deconv": "roi_heads.mask_head.deconv",
        "mask": "roi_heads.mask_head.predictor",
    },
    mean=(103.53, 116.28, 123.675),
    std=(1.0, 1.0, 1.0),
    is_bgr=True,
    stride_first=True,
    is_legacy=False,
    stds=(
        (1 / 10, 1 / 10, 1 / 5, 1 / 5),
        (1 / 20, 1 / 20, 1 / 10, 1 / 10),
        (1 / 30, 1 / 30, 1 / 15, 1 / 15),
    ),
    average_logits=False,
    mask_stages=1,
    class_agnostic=True,
)
_MMDETECTION_NAMES = {
    "lateral": "neck.lateral_convs.{i}.conv",
    "output": "neck.fpn_convs.{i}.conv",
    "rpn": "rpn_head.rpn_conv",
    "objectness": "rpn_head.rpn_cls",
    "deltas": "rpn_head.rpn_reg",
}
MMDETECTION_MASK = Published(
    block=_mmdetection_block,
    stem=("backbone.conv1", "backbone.bn1"),
    names={
        **_MMDETECTION_NAMES,
        "fc": "roi_head.bbox_head.shared_fcs.{i}",
        "classifier": "roi_head.bbox_head.fc_cls",
        "regressor": "roi_head.bbox_head.fc_reg",
        "mask_conv": "roi_head.mask_head.convs.{i}.conv",
        "deconv": "roi_head.mask_head.upsample",
        "mask": "roi_head.mask_head.conv_logits",
    },
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    is_bgr=False,
    stride_first=False,
    is_legacy=False,
    stds=((0.1, 0.1, 0.2, 0.2),),
    average_logits=True,
    mask_stages=1,
    class_agnostic=False,
)
MMDETECTION1_CASCADE = dataclasses.replace(
    MMDETECTION_MASK,
    names={
        **_MMDETECTION_NAMES,
        "fc": "bbox_head.{s}.shared_fcs.{i}",
        "classifier": "bbox_head.{s}.fc_cls",
        "regressor": "bbox_head.{s}.fc_reg",
        "mask_conv": "mask_head.{s}.convs.{i}.conv",
        "deconv": "mask_head.{s}.upsample",
        "mask": "mask_head.{s}.conv_logits",
    },
    is_legacy=True,
    stds=((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)),
    mask_stages=3,
    class_agnostic=True,
)


def detect(
    kind: Published, weights: Weights, photos, canvas: tuple[int, int], num_classes: int
) -> list[dict[str, torch.Tensor]]:
    """Boxes, scores, labels from 0 and masks (n, 28, 28) of each photo, (h, w, 3) uint8 RGB."""
    images = torch.zeros(len(photos), 3, *canvas)
    for image, photo in zip(images, photos, strict=True):
        pixels = torch.from_numpy(photo.copy()).float().permute(2, 0, 1)
        pixels = pixels.flip(0) if kind.is_bgr else pixels
        mean, std = (torch.tensor(x)[:, None, None] for x in (kind.mean, kind.std))
        image[:, : photo.shape[0], : photo.shape[1]] = (pixels - mean) / std
    levels = pyramid(kind, weights, backbone(kind, weights, images))
    results = []
    for i, photo in enumerate(photos):
        features = [level[i : i + 1] for level in levels]
        size = photo.shape[:2]
        proposals = propose(kind, weights, features, size)
        results.append(second_stage(kind, weights, features, proposals, size, num_classes))
    return results


def backbone(kind: Published, weights: Weights, x: torch.Tensor) -> list[torch.Tensor]:
    """ResNet-50."""

    def conv(x, names, outputs, side, stride, scale=1.0):
        apply = functools.partial(F.conv2d, x, stride=stride, padding=side // 2)
        shape = (outputs, x.shape[1], side, side)
        y = apply(weights.kernel(f"{names[0]}.weight", shape, apply, 1.0))
        return weights.norm(y, names[1], scale)

    x = F.max_pool2d(F.relu(conv(x, kind.stem, 64, 7, 2)), 3, 2, 1)
    taps = []
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            names = [kind.block(stage, block, number) for number in range(4)]
            first, second = (stride, 1) if kind.stride_first else (1, stride)
            y = F.relu(conv(x, names[1], width, 1, first))
            y = F.relu(conv(y, names[2], width, 3, second))
            y = conv(y, names[3], 4 * width, 1, 1, 0.3)
            x = F.relu(y + (x if block else conv(x, names[0], 4 * width, 1, stride)))
        taps.append(x)
    return taps


def pyramid(kind: Published, weights: Weights, taps: list[torch.Tensor]) -> list[torch.Tensor]:
    merged = [
        weights.layer(tap, kind.name("lateral", i), CHANNELS, 1) for i, tap in enumerate(taps)
    ]
    for i in (2, 1, 0):
        merged[i] = merged[i] + F.interpolate(merged[i + 1], scale_factor=2, mode="nearest")
    levels = [
        weights.layer(x, kind.name("output", i), CHANNELS, 3, padding=1)
        for i, x in enumerate(merged)
    ]
    return [*levels, F.max_pool2d(levels[-1], 1, 2)]


def decode(kind: Published, deltas: torch.Tensor, boxes: torch.Tensor, stds, size) -> torch.Tensor:
    """Boxes (n, 4) moved by deltas (n, 4), inside the photo."""
    dx, dy, dw, dh = (deltas * torch.tensor(stds)).unbind(-1)
    extra = 1.0 if kind.is_legacy else 0.0
    width, height = boxes[:, 2] - boxes[:, 0] + extra, boxes[:, 3] - boxes[:, 1] + extra
    if kind.is_legacy:
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    else:
        x, y = boxes[:, 0] + width / 2, boxes[:, 1] + height / 2
    x, y = x + dx * width, y + dy * height
    limit = math.log(1000 / 16)
    width, height = width * dw.clamp(max=limit).exp(), height * dh.clamp(max=limit).exp()
    shift = extra / 2
    corners = [x - width / 2 + shift, y - height / 2 + shift]
    corners += [x + width / 2 - shift, y + height / 2 - shift]
    limits = (size[1] - extra, size[0] - extra) * 2
    return torch.stack([c.clamp(0, m) for c, m in zip(corners, limits, strict=True)], -1)


def half_open(kind: Published, boxes: torch.Tensor) -> torch.Tensor:
    return boxes + torch.tensor([0.0, 0.0, 1.0, 1.0]) if kind.is_legacy else boxes


def anchors(kind: Published, stride: int, rows: int, columns: int) -> torch.Tensor:
    """(rows * columns * 3, 4)."""
    side, ratios = 8.0 * stride, torch.tensor([0.5, 1.0, 2.0])
    height, width = side * ratios.sqrt(), side / ratios.sqrt()
    if kind.is_legacy:
        middle = (stride - 1) / 2
        cell = [middle - (width - 1) / 2, middle - (height - 1) / 2]
        cell += [middle + (width - 1) / 2, middle + (height - 1) / 2]
        cell = torch.stack(cell, -1).round()
    else:
        cell = torch.stack([-width, -height, width, height], -1) / 2
    y, x = torch.meshgrid(
        torch.arange(rows) * stride, torch.arange(columns) * stride, indexing="ij"
    )
    shifts = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
    return (shifts + cell).reshape(-1, 4)


def propose(kind: Published, weights: Weights, features, size) -> torch.Tensor:
    boxes, scores, levels = [], [], []
    for i, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        x = F.relu(weights.layer(feature, kind.name("rpn"), CHANNELS, 3, padding=1))
        logits = weights.layer(x, kind.name("objectness"), 3, 1, 1.0)
        deltas = weights.layer(x, kind.name("deltas"), 12, 1, 0.2)
        logits = logits[0].permute(1, 2, 0).reshape(-1)
        deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4)
        top, index = logits.topk(min(1000, len(logits)))
        level = anchors(kind, stride, *feature.shape[2:])[index]
        boxes.append(decode(kind, deltas[index], level, (1.0,) * 4, size))
        scores.append(top)
        levels.append(torch.full_like(index, i))
    boxes, scores, levels = map(torch.cat, (boxes, scores, levels))
    regions = half_open(kind, boxes)
    there = (regions[:, 2] > regions[:, 0]) & (regions[:, 3] > regions[:, 1])
    boxes, scores, levels, regions = (x[there] for x in (boxes, scores, levels, regions))
    return boxes[ops.batched_nms(regions, scores, levels, 0.7)[:1000]]


def pool(kind: Published, features, boxes: torch.Tensor, side: int) -> torch.Tensor:
    regions = half_open(kind, boxes)
    area = (regions[:, 2:] - regions[:, :2]).clamp(min=0).prod(-1)
    level = (4 + torch.log2(area.sqrt() / 224 + 1e-8)).floor().clamp(2, 5).long() - 2
    pooled = torch.zeros(len(boxes), CHANNELS, side, side)
    for i, feature in enumerate(features[:4]):
        chosen = level == i
        pooled[chosen] = ops.roi_align(
            feature,
            [regions[chosen]],
            side,
            1 / STRIDES[i],
            sampling_ratio=2 if kind.is_legacy else 0,
            aligned=not kind.is_legacy,
        )
    return pooled


def second_stage(kind: Published, weights: Weights, features, boxes, size, num_classes: int):
    """Of one photo: background is first in mmdetection 1, else last."""
    logits = []
    extra = int(kind.is_legacy)  # outputs of background for boxes and masks
    for s, stds in enumerate(kind.stds):
        x = pool(kind, features, boxes, 7).flatten(1)
        for i in range(2):
            x = F.relu(weights.layer(x, kind.name("fc", i, s), WIDTH))
        logits.append(weights.layer(x, kind.name("classifier", s=s), num_classes + 1, spread=1.5))
        outputs = 4 if kind.class_agnostic else 4 * (num_classes + extra)
        deltas = weights.layer(x, kind.name("regressor", s=s), outputs, spread=0.5)
        deltas = deltas.reshape(len(boxes), -1, 4)
        moved = [decode(kind, d, boxes, stds, size) for d in deltas.unbind(1)]
        boxes = moved[0]  # the same for all classes, where there is another stage
    if kind.average_logits:
        probabilities = (sum(logits) / len(logits)).softmax(-1)
    else:
        probabilities = sum(x.softmax(-1) for x in logits) / len(logits)
    probabilities = probabilities[:, 1:] if kind.is_legacy else probabilities[:, :-1]
    boxes = torch.stack(moved, 1)
    boxes = boxes.expand(-1, num_classes, -1) if kind.class_agnostic else boxes[:, extra:]
    row, label = (probabilities > 0.05).nonzero(as_tuple=True)
    scores, boxes = probabilities[row, label], boxes[row, label]
    keep = ops.batched_nms(half_open(kind, boxes), scores, label, 0.5)[:100]
    boxes, scores, label = boxes[keep], scores[keep], label[keep]
    pooled, masks = pool(kind, features, boxes, 14), 0.0
    for s in range(kind.mask_stages):
        x = pooled
        for i in range(4):
            x = F.relu(weights.layer(x, kind.name("mask_conv", i, s), CHANNELS, 3, padding=1))
        name = kind.name("deconv", s=s)
        kernel = weights(f"{name}.weight", (CHANNELS, CHANNELS, 2, 2))
        x = F.conv_transpose2d(x, kernel, weights(f"{name}.bias", (CHANNELS,), 0.05), stride=2)
        x = weights.layer(F.relu(x), kind.name("mask", s=s), num_classes + extra, 1, 1.5)
        masks = masks + x[torch.arange(len(x)), label + extra].sigmoid() / kind.mask_stages
    return {"boxes": half_open(kind, boxes), "scores": scores, "labels": label, "masks": masks}
