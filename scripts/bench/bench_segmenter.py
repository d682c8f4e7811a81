"""Times our HRNet segmenter against timm's HRNet with the same head in torch, on the CPU.

    python -m scripts.bench.bench_segmenter

Needs torch and timm in the same environment. Equal settings on both sides: HRNet-W18 (its exchange
units enlarge by repetition, as timm's do), the head of HRNetV2, float32, batch norm over the batch
in training, cross-entropy over all pixels, SGD with momentum and weight decay; inference ends with
the foreground's probability of each pixel. Random weights.

Each side is a process of its own; they take turns, so that other load on the machine meets both.
Prints the ratios of the best times and the medians (below 1: ours is faster).
"""

import functools
from collections.abc import Callable

import numpy as np
from absl import flags

from common.io.commands import run_main
from scripts.bench.timing import Side, compare_processes

TASKS = ("train", "inference")
LEARNING_RATE = 1e-3


def example(batch: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Random crops (B, H, W, 3) uint8 and masks (B, H, W)."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (batch, height, width, 3), np.uint8),
        "mask": rng.integers(0, 2, (batch, height, width), np.uint8),
    }


def torch_calls(
    data, backbone: str, threads: int, device: str = "cpu"
) -> dict[str, Callable[[], str]]:
    """Task -> function that runs it once and tells the loss or the mean probability.

    `device`: as of `bench_train_step.torchvision_calls`.
    """
    import timm
    import torch
    from torch import nn
    from torch.nn import functional

    from common.nn.backbones.hrnet import HRNETS

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    width = 15 * HRNETS[backbone].width

    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = timm.create_model(
                backbone, features_only=True, feature_location="", out_indices=(1, 2, 3, 4)
            )
            self.head = nn.Sequential(
                nn.Conv2d(width, width, 1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, 2, 1),
            )

        def forward(self, x):
            size = x.shape[-2:]
            taps = self.trunk(x)
            taps = [functional.interpolate(t, taps[0].shape[-2:], mode="bilinear") for t in taps]
            return functional.interpolate(self.head(torch.cat(taps, 1)), size, mode="bilinear")

    torch.backends.cudnn.benchmark = True
    accelerated = device != "cpu"
    layout = torch.channels_last if accelerated else torch.contiguous_format
    model = Segmenter().to(device).to(memory_format=layout)
    images = torch.from_numpy(data["image"]).to(device)
    masks = torch.from_numpy(data["mask"]).to(device).long()
    mean = torch.tensor([123.675, 116.28, 103.53], device=device)
    std = torch.tensor([58.395, 57.12, 57.375], device=device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4
    )

    def mixed():
        return torch.autocast(device, torch.bfloat16, enabled=accelerated)

    def inputs():
        normal = (images.float() - mean) / std
        return normal.permute(0, 3, 1, 2).contiguous(memory_format=layout)

    def train():
        model.train()
        optimizer.zero_grad()
        with mixed():
            loss = functional.cross_entropy(model(inputs()), masks)
        loss.backward()
        optimizer.step()
        return f"loss {loss.item():.3f}"

    def inference():
        model.eval()
        with torch.no_grad(), mixed():
            return f"mean {model(inputs()).softmax(1)[:, 1].mean().item():.3f}"

    return {"train": train, "inference": inference}


def our_calls(data, backbone: str) -> dict[str, Callable[[], str]]:
    """Like `torch_calls`."""
    import jax

    from common.masks.probability import PROBABILITY_ONE
    from common.training import distributed
    from common.training.optimizer import make_optimizer
    from common.training.step import init_state, make_train_step, variable_shapes
    from configs.segmentation import hrnet_w48_112
    from segmentation.batch_fields import INFERENCE_FIELDS, init_shapes
    from segmentation.inference import Voter, vote_step
    from segmentation.models.segmenter import build
    from segmentation.settings import read_run

    config = hrnet_w48_112.get_config()
    config.model.update(backbone=backbone, upsampling="nearest", dtype="float32")
    settings = read_run(config)
    mesh = distributed.make_mesh(jax.devices()[:1])
    model = build(settings.model, 1, distributed.DATA_AXIS)
    count, height, width = data["mask"].shape
    batch = dict(
        data,
        image_size=np.full((count, 2), (height, width), np.float32),
        image_valid=np.ones(count, bool),
        classes=np.zeros(count, np.int32),
        mask_valid=np.ones(data["mask"].shape, bool),
    )
    shapes = variable_shapes(model, init_shapes())
    tx = make_optimizer(settings.optimizer, shapes["params"])
    replicated = distributed.replicated(mesh)
    state = jax.jit(lambda: init_state(model, tx, 0, init_shapes()), out_shardings=replicated)()
    batch = jax.device_put(batch, distributed.batch_sharded(mesh))
    seen = {name: batch[name] for name in INFERENCE_FIELDS}
    train_step = jax.jit(
        functools.partial(make_train_step(model, tx, mesh), learning_rate=LEARNING_RATE),
        donate_argnums=0,
    )
    predict = vote_step((model,), (Voter(0, False),), True, mesh)

    def train():
        nonlocal state
        state, metrics = train_step(state, batch)
        return f"loss {float(metrics['loss']):.3f}"

    def inference():
        mean = float(np.mean(predict((state.variables,), seen))) / PROBABILITY_ONE
        return f"mean {mean:.3f}"

    return {"train": train, "inference": inference}


def define_flags() -> None:
    flags.DEFINE_integer("rounds", 5, "Turns of each side.")
    flags.DEFINE_integer("batch", 16, "Crops per step.")
    flags.DEFINE_integer("height", 128, "Of the crops, pixels; timm needs multiples of 32.")
    flags.DEFINE_integer("width", 128, "Of the crops, pixels; timm needs multiples of 32.")
    flags.DEFINE_string("backbone", "hrnet_w18", "hrnet_w18, hrnet_w32 or hrnet_w48.")
    flags.DEFINE_integer("threads", 2, "torch threads (JAX takes the cores it may use).")


def main() -> None:
    values = flags.FLAGS
    data = example(values.batch, values.height, values.width)
    sides = (
        Side("timm", torch_calls, (data, values.backbone, values.threads), keep_memory=False),
        Side("ours", our_calls, (data, values.backbone), keep_memory=True),
    )
    title = f"{values.backbone}, {values.batch} crops of {values.height}x{values.width}"
    compare_processes(sides, dict.fromkeys(TASKS, title), values.rounds)


if __name__ == "__main__":
    define_flags()
    run_main(main)
