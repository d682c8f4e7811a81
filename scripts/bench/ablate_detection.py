"""The paper's changes to the detector, one at a time and with several seeds, on your own photos.

    python -m scripts.bench.ablate_detection --dataset=DIR --pretrained=lite0.safetensors \\
        --workdir=WORK [--variants=sibling,dh] [--seeds=3] [--epochs=6] [--batch_size=8]

Trains configs/detection/photos_lite0.py with

    sibling        the plain head
    dh             the Decoupling Head (section 2)
    dh_no_margin   the same without its margin losses (eq. 5 and 6)
    cascade        the standard cascade of three stages
    cascade4       the paper's four (section 5.6)

and prints mean and spread (least and largest) of the official mAP@0.5 of each, against the first.
WORK keeps the runs: the same command goes on where it stopped. Runs of one variant share a compiled
program (WORK/compiled). Photos of a split that training does not see are scored once, at the end.
"""

import json
import statistics
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from common.cli import run_main
from common.errors import UserError
from common.evaluation.openimages import MEAN_AP
from common.training.workdir import write_text
from configs.detection import photos_lite0, r50_cascade, r50_cascade4

NAME = MEAN_AP.format(0.5)


def no_change(config: ConfigDict) -> None:
    del config


def decoupling(config: ConfigDict) -> None:
    config.model.box_head.kind = "decoupling"


def without_margin(config: ConfigDict) -> None:
    decoupling(config)
    config.model.loss_weights.margin_class = config.model.loss_weights.margin_box = 0.0


def three_stages(config: ConfigDict) -> None:
    config.model.stages = r50_cascade.get_config().model.stages


def four_stages(config: ConfigDict) -> None:
    config.model.stages = r50_cascade4.get_config().model.stages


VARIANTS = {
    "sibling": no_change, "dh": decoupling, "dh_no_margin": without_margin,
    "cascade": three_stages, "cascade4": four_stages,
}


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("pretrained", None, "Converted backbone weights.", required=True)
    flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
    flags.DEFINE_list("variants", list(VARIANTS), f"Some of {', '.join(VARIANTS)}.")
    flags.DEFINE_integer("seeds", 3, "Runs of each variant.", lower_bound=1)
    flags.DEFINE_float("epochs", 6.0, "Of each run.", lower_bound=0.01)
    flags.DEFINE_integer("batch_size", 8, "Photos of all devices together.", lower_bound=1)
    flags.DEFINE_string("train_split", "train", "Split to train on.")
    flags.DEFINE_string("eval_split", "validation", "Split to score.")


def run_config(variant: str, seed: int) -> ConfigDict:
    """The config of one run."""
    values = flags.FLAGS
    config = photos_lite0.get_config()
    VARIANTS[variant](config)
    config.name = f"photos_lite0_{variant}"
    config.seed = seed
    config.data.dir = values.dataset
    config.data.train_split, config.data.eval_split = values.train_split, values.eval_split
    config.data.batch_size = values.batch_size
    config.model.pretrained = values.pretrained
    scale = values.epochs / config.optimizer.num_epochs
    config.optimizer.num_epochs = values.epochs
    config.optimizer.decay_epochs = tuple(scale * e for e in config.optimizer.decay_epochs)
    config.optimizer.warmup_steps = round(
        config.optimizer.warmup_steps * scale * 8 / values.batch_size
    )
    config.evaluation.every_epochs = 0
    config.evaluation.batch_size = max(values.batch_size, config.evaluation.batch_size)
    return config


def score(variant: str, seed: int, workdir: Path) -> float:
    """mAP of a run, trained now unless its figure is there."""
    # Here, not above: JAX reads the cache's place when it compiles first.
    from detection.train import train

    folder = workdir / f"{variant}_{seed}"
    file = folder / "score.json"
    if not file.exists():
        results = train(run_config(variant, seed), str(folder))
        write_text(file, json.dumps({NAME: results[NAME]}) + "\n")
    return json.loads(file.read_text())[NAME]


def table(scores: dict[str, list[float]]) -> str:
    """Markdown: mean, least and largest in percent, and the gain over the first variant."""
    first = statistics.mean(next(iter(scores.values())))
    lines = ["| variant | mAP@0.5, mean | least to largest | gain |", "| --- | --- | --- | --- |"]
    for variant, values in scores.items():
        mean = statistics.mean(values)
        lines.append(
            f"| {variant} | {100 * mean:.2f} | {100 * min(values):.2f} to {100 * max(values):.2f} "
            f"| {100 * (mean - first):+.2f} |"
        )
    return "\n".join(lines)


def main(argv):
    del argv
    values = flags.FLAGS
    for name in values.variants:
        if name not in VARIANTS:
            raise UserError(f"--variants: found {name!r}, expected some of {', '.join(VARIANTS)}")
    workdir = Path(values.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    scores: dict[str, list[float]] = {}
    for seed in range(values.seeds):  # round by round: an early end leaves equal numbers of runs
        for variant in values.variants:
            print(f"run {variant}, seed {seed}", flush=True)
            scores.setdefault(variant, []).append(score(variant, seed, workdir))
        print(f"after {seed + 1} of {values.seeds} seeds:\n{table(scores)}", flush=True)
        write_text(workdir / "table.md", table(scores) + "\n")


if __name__ == "__main__":
    define_flags()
    run_main(main)
