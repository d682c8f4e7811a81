"""Times our R50-FPN Faster and Mask R-CNN against torchvision's: a training step, and inference.

    python -m scripts.bench.bench_train_step
    python -m scripts.bench.bench_train_step --masks
    python -m scripts.bench.bench_train_step --peer=plain_head

Equal settings on both sides: batch 2 at 512x512, float32, 501-way head, frozen stem and first
stage, frozen batch norm, the same anchors, 2000 (1000) proposals in training (inference), 512 RoIs
an image, 256 RPN samples an image, SGD with momentum and weight decay, 20 boxes an image, with
--masks filled by ellipses. Random weights, of the same distributions. Needs torch and torchvision
in the same environment. Masks of inference are compared before they are pasted into the photo.

With --peer=plain_head our Decoupling Head is timed against our plain head instead.

Each side is a process of its own; they take turns, so that other load on the machine meets both. A
third process runs torchvision with our memory setting (`common.io.memory`), which shows how much of
the ratio is due to it. Prints the ratios of the best times and the medians (below 1: ours is
faster).
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import flags

from common.io.commands import run_main
from scripts.bench.timing import Side, compare_processes

TASKS = ("train", "inference")
# Damps the residual branches: without statistics to normalise by, random trunks overflow.
LAST_NORM_SCALE = 0.2
CLASSIFIER_STD = 0.3  # spreads the scores, so that inference has detections to select among
LEARNING_RATE = 1e-5
MASK_SIZE = 112


def example(batch: int, size: tuple[int, int], classes: int) -> dict[str, np.ndarray]:
    """Random images (B,H,W,3) uint8 and 20 boxes (B,20,4) an image with classes (B,20)."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.6, (batch, 20, 2))
    high = low + rng.uniform(0.05, 0.4, low.shape)
    sides = np.tile(size[::-1], 2)
    return {
        "image": rng.integers(0, 256, (batch, *size, 3), np.uint8),
        "gt_boxes": (np.concatenate([low, high], -1) * sides).astype(np.float32),
        "gt_classes": rng.integers(0, classes, (batch, 20), np.int32),
    }


def ellipse(
    height: int, width: int, box: Sequence[float] | np.ndarray = (0.0, 0.0, 1.0, 1.0)
) -> np.ndarray:
    """The pixels (height, width) of an image inside the ellipse that fills a box (normalised)."""
    y, x = np.mgrid[:height, :width] + 0.5
    xmin, ymin, xmax, ymax = box
    y = (y / height - (ymin + ymax) / 2) / (ymax - ymin)
    x = (x / width - (xmin + xmax) / 2) / (xmax - xmin)
    return x * x + y * y < 0.25


def torchvision_calls(
    data,
    classes: int,
    threads: int,
    masks: bool = False,
    device: str = "cpu",
    compiled: bool = False,
) -> dict[str, Callable[[], str]]:
    """Task -> function that runs it once; that of inference returns the number of detections.

    On another device than the CPU: channels last, bfloat16 where torch's `autocast` takes it, and
    cuDNN chooses its algorithms by trying them. `compiled`: the trunk goes through torch.compile.
    """
    import torch
    from torchvision.models import resnet50
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops.misc import FrozenBatchNorm2d

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    sides = data["image"].shape[1:3]
    # What `fasterrcnn_resnet50_fpn` builds for pretrained weights: frozen norms, 3 trained stages.
    trunk = _resnet_fpn_extractor(resnet50(norm_layer=FrozenBatchNorm2d), 3)
    kind = MaskRCNN if masks else FasterRCNN
    model = kind(trunk, classes + 1, min_size=min(sides), max_size=max(sides))
    with torch.no_grad():
        for name, buffer in trunk.named_buffers():
            if name.endswith("bn3.weight"):
                buffer.fill_(LAST_NORM_SCALE)
        for layer in (model.roi_heads.box_head.fc6, model.roi_heads.box_head.fc7):  # as ours
            bound = (3 / layer.in_features) ** 0.5
            layer.weight.uniform_(-bound, bound)
        model.roi_heads.box_predictor.cls_score.weight.normal_(std=CLASSIFIER_STD)
    # Masks stay as the network gives them: pasting is measured by bench_paste.
    model.transform.postprocess = lambda found, *_: found
    accelerated = device != "cpu"
    if accelerated:
        model = model.to(device).to(memory_format=torch.channels_last)

    if compiled:
        model.backbone = torch.compile(model.backbone)

    def mixed():
        return torch.autocast(device, torch.bfloat16, enabled=accelerated)

    pixels = torch.from_numpy(data["image"]).to(device)
    images = [x.permute(2, 0, 1).float() / 255 for x in pixels]
    targets = [
        {
            "boxes": torch.from_numpy(b).to(device),
            "labels": torch.from_numpy(c).to(device).long() + 1,
        }
        for b, c in zip(data["gt_boxes"], data["gt_classes"], strict=True)
    ]
    for target, boxes in zip(targets, data["gt_boxes"], strict=True) if masks else ():
        shares = boxes / np.tile(sides[::-1], 2)
        inside = np.stack([ellipse(sides[0], sides[1], box) for box in shares]).astype(np.uint8)
        target["masks"] = torch.from_numpy(inside).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)

    def train():
        model.train()
        optimizer.zero_grad()
        with mixed():
            loss = sum(model(images, targets).values())
        loss.backward()
        optimizer.step()
        if not torch.isfinite(loss):
            raise RuntimeError(f"torchvision: the loss became {loss.item()}")
        return ""

    def inference():
        model.eval()
        with torch.no_grad(), mixed():
            return f"{sum(len(image['boxes']) for image in model(images))} detections"

    return {"train": train, "inference": inference}


def our_config(head: str = "two_fc", masks: bool = False):
    """`configs/detection/r50.py` with torchvision's settings; `head`: kind of the box head."""
    from configs.detection import r50

    config = r50.get_config()
    config.model.dtype = "float32"
    config.model.anchors.centre = 0.0
    config.model.box_head.aligned = False
    config.model.box_head.kind = head
    config.model.detections = dict(
        score_threshold=0.05, iou_threshold=0.5, max_candidates=4096, max_detections=100
    )
    config.optimizer.clip_norm = 0.0
    if masks:
        config.data.mask_size = MASK_SIZE
        config.model.mask_head.kind = "class_specific"
    return config


def prepared_params(params: Mapping) -> Mapping:
    """Random parameters that neither overflow nor find nothing."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import path_aware_map

    def prepared(path, value):
        if path[-2:] == ("norm3", "scale"):
            return jnp.full_like(value, LAST_NORM_SCALE)
        if path[-2:] == ("classifier", "kernel"):
            return CLASSIFIER_STD * jax.random.normal(jax.random.key(1), value.shape)
        return value

    return path_aware_map(prepared, params)


def our_calls(
    data, classes: int, head: str = "two_fc", masks: bool = False
) -> dict[str, Callable[[], str]]:
    """Like `torchvision_calls`."""
    import jax

    from common.training import distributed
    from common.training.optimizer import make_optimizer
    from common.training.step import init_state, init_variables, make_predict_step, make_train_step
    from detection.models.faster_rcnn import build
    from detection.models.two_stage import frozen_pattern
    from detection.settings import read_run

    settings = read_run(our_config(head, masks))
    mesh = distributed.make_mesh(jax.devices()[:1])
    model = build(settings.model, classes, distributed.DATA_AXIS)
    batch_size, size = data["image"].shape[:2]
    batch = dict(
        data,
        image_size=np.full((batch_size, 2), size, np.float32),
        image_valid=np.ones(batch_size, bool),
        gt_valid=np.ones(data["gt_classes"].shape, bool),
    )
    if masks:
        mask = np.packbits(ellipse(MASK_SIZE, MASK_SIZE), axis=1)
        shape = (*batch["gt_classes"].shape, *mask.shape)
        batch |= dict(gt_masks=np.broadcast_to(mask, shape), gt_has_mask=batch["gt_valid"])
    variables = jax.jit(lambda: init_variables(model, 0, batch))()

    params = prepared_params(variables["params"])
    tx = make_optimizer(settings.optimizer, params, frozen_pattern(settings.model))
    state = jax.jit(lambda: init_state(model, tx, 0, batch))()
    state = state.replace(params=params)
    state = jax.device_put(state, distributed.replicated(mesh))
    batch = jax.device_put(batch, distributed.batch_sharded(mesh))
    train_step = jax.jit(
        functools.partial(make_train_step(model, tx, mesh), learning_rate=LEARNING_RATE),
        donate_argnums=0,
    )
    predict_step = jax.jit(make_predict_step(model, mesh))

    def train():
        nonlocal state
        state, metrics = train_step(state, batch)
        if not np.isfinite(metrics["loss"]):
            raise RuntimeError(f"ours: the loss became {metrics['loss']}")
        return ""

    def inference():
        detections = predict_step(state.variables, batch)
        return f"{int(detections['valid'].sum())} detections"

    return {"train": train, "inference": inference}


def define_flags() -> None:
    flags.DEFINE_enum("peer", "torchvision", ("torchvision", "plain_head"), "Compare with.")
    flags.DEFINE_boolean("masks", False, "Whether the models have mask heads.")
    flags.DEFINE_integer("rounds", 5, "Turns of each side.")
    flags.DEFINE_integer("size", 512, "Side of the images, pixels.")
    flags.DEFINE_integer("batch", 2, "Images per step.")
    flags.DEFINE_integer("classes", 500, "Classes without background.")
    flags.DEFINE_integer("threads", 2, "torch threads (JAX takes the cores it may use).")


def main() -> None:
    values = flags.FLAGS
    data = example(values.batch, (values.size, values.size), values.classes)
    ours = (data, values.classes)
    if values.peer == "torchvision":
        theirs = (torchvision_calls, (*ours, values.threads, values.masks))
        sides: tuple[Side, ...] = (
            Side("torchvision", *theirs, keep_memory=False),
            Side("torchvision, memory kept", *theirs, keep_memory=True),
            Side("ours", our_calls, (*ours, "two_fc", values.masks), keep_memory=True),
        )
    else:
        sides = tuple(
            Side(name, our_calls, (*ours, head, values.masks), keep_memory=True)
            for name, head in (("plain head", "two_fc"), ("Decoupling Head", "decoupling"))
        )
    title = f"{values.batch} images of {values.size}x{values.size}"
    compare_processes(sides, dict.fromkeys(TASKS, title), values.rounds)


if __name__ == "__main__":
    define_flags()
    run_main(main)
