"""Short trainings that compare what the paper compares, all variants side by side on one device.

Each variant is a process of `scripts.bench.ablate_detection`, which trains seed after seed. When
the time is up they are stopped, and what has finished is tabled: the seeds that all variants of a
dataset have.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from common.data.dataset import Dataset
from common.data.dataset_writer import DatasetWriter
from common.metrics.openimages import MEAN_AP
from common.metrics.readiness import evaluation_split
from scripts.bench.ablate_detection import table
from scripts.bench.device.report import Report
from scripts.bench.device.sizes import Sizes
from scripts.bench.device.worker import Case

PACKED = Path(".accelerator")  # what `prepare` writes
SEEDS = 3
VARIANTS = ("sibling", "dh", "dh_no_margin", "uniform", "cascade", "cascade4")
LONG_TAIL = ("ce", "eql", "rfs", "eql_rfs")  # on a long-tailed set with masks, where one is packed
_RESERVE = 15.0  # seconds kept for the table
_SHARE = 0.9  # of the device's memory, for all variants together
_TINY = (
    "--config.model.backbone=resnet10",
    "--config.model.norm=group",
    "--config.model.frozen_stages=0",
    "--config.model.fpn_channels=16",
    "--config.model.box_head.width=32",
    "--config.model.box_head.sample.num_samples=8",
    "--config.model.rpn.train_proposals.pre_nms=50",
    "--config.model.rpn.train_proposals.post_nms=50",
    "--config.model.rpn.test_proposals.pre_nms=50",
    "--config.model.rpn.test_proposals.post_nms=50",
    "--config.model.detections.max_candidates=64",
    "--config.data.canvas=(64,64)",
    "--config.data.batch_size=4",
    "--config.evaluation.batch_size=4",
    "--config.optimizer.warmup_steps=1",
    "--config.log.every_steps=1",
    "--epochs=1",
)
_WHOLE = (
    f"--config.model.pretrained={PACKED / 'lite0.safetensors'}",
    "--config.data.batch_size=16",
    "--config.checkpoint.every_steps=100000",
    "--config.checkpoint.keep_epochs=False",
    "--epochs=13",
)


def write_tiny_dataset(folder: Path) -> None:
    """Four training photos and two for validation, with one square each."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    labels = ["a", "b"]
    with DatasetWriter(
        folder / "dataset", "tiny", labels, labels, None, str(folder / "photos")
    ) as writer:
        for i in range(6):
            pixels = rng.integers(90, 130, (64, 64, 3)).astype(np.uint8)
            pixels[16:48, 16:48, i % 2] = 255
            Image.fromarray(pixels).save(folder / "photos" / f"{i}.jpg")
            box = [[0.25, 0.25, 0.75, 0.75]]
            known = {"label_classes": [0, 1], "label_confidences": [1 - i % 2, i % 2]}
            writer.add_image(f"{i}", f"{i}.jpg", (64, 64), box, [i % 2], **known)
        writer.add_split("train", range(4))
        writer.add_split("validation", range(4, 6))


def command(variant: str, dataset: Path, work: Path, options: Sequence[str]) -> list[str]:
    long_tail = variant in LONG_TAIL
    config = "long_tail_lite0" if long_tail else "photos_lite0"
    split = evaluation_split(Dataset.open(dataset), "validation")
    return [
        *(sys.executable, "-m", "scripts.bench.ablate_detection"),
        f"--config=configs/detection/{config}.py",
        f"--config.data.dir={dataset}",
        f"--config.data.eval_split={split}",
        f"--variants={variant}",
        f"--metric={figure(variant)}",
        f"--workdir={work}",
        *options,
    ]


def figure(variant: str) -> str:
    """The official figure by which a variant is compared."""
    return "AP" if variant in LONG_TAIL else MEAN_AP.format(0.5)


def finished(work: Path, variant: str) -> list[float]:
    """The figure of the seeds of a variant that have ended, from the first one on."""
    scores = []
    for seed in range(SEEDS):
        files = list(work.glob(f"{variant}_{seed}/evaluation/*/*_metrics.json"))
        if not files:
            break
        scores.append(json.loads(files[0].read_text())[figure(variant)])
    return scores


def train_variants(report: Report, size: Sizes) -> None:
    deadline = time.monotonic() + flags.FLAGS.seconds - _RESERVE
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        variants: Sequence[str] = flags.FLAGS.variants or VARIANTS
        datasets = {True: PACKED / "long_tail", False: PACKED / "dataset"}
        seeds, options = SEEDS, list(_WHOLE)
        if size.dry:
            variants, seeds, options = variants[:1], 1, list(_TINY)
            write_tiny_dataset(work)
            datasets[False] = work / "dataset"
        environment = os.environ | {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_SHARE / len(variants):.2f}"
        }
        options.append(f"--seeds={seeds}")
        logs = {variant: open(work / f"{variant}.log", "w+") for variant in variants}
        running = [
            subprocess.Popen(
                command(variant, datasets[variant in LONG_TAIL], work / "runs", options),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            for variant, log in logs.items()
        ]
        while time.monotonic() < deadline and any(run.poll() is None for run in running):
            time.sleep(0.2)
        for run in running:
            run.kill()
            run.wait()
        scores = {variant: finished(work / "runs", variant) for variant in variants}
        for variant, log in logs.items():
            log.seek(0)
            last = log.read().strip().splitlines()[-1:]
            report.line(variant, scores=scores[variant], said=" ".join(last))
            log.close()
    report.line("runs", finished=sum(map(len, scores.values())), of=seeds * len(variants))
    for long_tail in (False, True):
        compared = {v: values for v, values in scores.items() if (v in LONG_TAIL) == long_tail}
        if not compared:
            continue
        least = min(map(len, compared.values()))
        if not least:
            raise RuntimeError("no seed has ended for every variant")
        same = {variant: values[:least] for variant, values in compared.items()}
        report.line("table", seeds=least, text=table(same, figure(next(iter(same)))))


CASES = (Case("trainings", 590, train_variants),)
