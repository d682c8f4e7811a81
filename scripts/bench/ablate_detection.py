"""The paper's changes to the detector, one at a time and with several seeds, on your own photos.

    python -m scripts.bench.ablate_detection --config=configs/detection/photos_lite0.py \\
        --config.data.dir=DIR --config.model.pretrained=lite0.safetensors --workdir=WORK \\
        [--variants=sibling,dh] [--seeds=3] [--epochs=2] [--metric=NAME,NAME]

Trains the config with

    sibling        the plain head
    dh             the Decoupling Head (section 2)
    dh_no_margin   the same without its margin losses (eq. 5 and 6)
    uniform        the plain head on photos drawn evenly instead of by class
    cascade        the standard cascade of three stages
    cascade4       the paper's four (section 5.6)

or, of how photos are augmented (section 5.3; docs/guides/sampling.md),

    flip           mirrored photos only
    elaborate      turned, and cropped around a box of the class that they were drawn for
    resize         the same by the other reading of the paper's scale

or, of the LVIS 2019 solution (configs/detection/long_tail_lite0.py has a set for them),

    ce             softmax cross-entropy
    sigmoid        one binary cross-entropy a class, without background
    eql            equalization loss
    rfs            cross-entropy and repeat factor sampling
    eql_rfs        both

or, of weak supervision (configs/detection/weak_lite0.py on a set of scripts.make_half_labelled),

    half           boxes of half of the photos alone
    half_long      the same in as many steps as the next one has
    half_weak      with image-level labels of the other half, in steps in between
    all            boxes of all photos, in as many steps as the first one

and prints mean and spread (least and largest) of the official mAP@0.5 of each, or of other figures
of WORK/VARIANT_SEED/evaluation, against the first. WORK keeps the runs: the same command goes on
where it stopped, and another --metric asks the same runs. Runs of one variant share a compiled
program (WORK/compiled). Photos of a split that training does not see are scored once, at the end.
"""

import copy
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from common.io import run_flags
from common.io.atomic import write_text
from common.io.commands import run_main
from common.io.errors import UserError
from common.metrics.openimages import MEAN_AP
from configs.detection import base


def plain(config: ConfigDict) -> None:
    config.model.box_head.kind = "two_fc"


def decoupling(config: ConfigDict) -> None:
    config.model.box_head.kind = "decoupling"


def without_margin(config: ConfigDict) -> None:
    decoupling(config)
    config.model.loss_weights.margin_class = config.model.loss_weights.margin_box = 0.0


def uniform(config: ConfigDict) -> None:
    plain(config)
    config.data.sampler = "uniform"


def three_stages(config: ConfigDict) -> None:
    plain(config)
    config.model.stages = base.THREE_STAGES


def four_stages(config: ConfigDict) -> None:
    plain(config)
    config.model.stages = base.FOUR_STAGES


def long_tail(classifier: str, sampler: str) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        config.model.box_head.classifier.kind = classifier
        config.data.sampler = sampler

    return change


def augmentation(scale: str) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        plain(config)
        config.data.scale_jitter = (1.0, 1.0)
        elaborate = base.ELABORATE_OFF if scale == "none" else base.ELABORATE
        config.data.elaborate.update({**elaborate, "scale": scale})

    return change


def supervised(split: str, epochs: float) -> Callable[[ConfigDict], None]:
    """Boxes of a split alone, in so many times the epochs of the config."""

    def change(config: ConfigDict) -> None:
        config.data.sources = (dict(split=split),)
        config.data.label_steps.share = 0.0
        config.model.weak.kind = "none"
        stretch(config.optimizer, epochs)

    return change


def weakly_supervised(config: ConfigDict) -> None:
    if config.model.weak.kind == "none" or not config.data.label_steps.share:
        raise UserError(
            f"--config: {config.name} has no steps of image-level labels, expected one such as "
            "configs/detection/weak_lite0.py"
        )


VARIANTS = {
    "sibling": plain,
    "dh": decoupling,
    "dh_no_margin": without_margin,
    "uniform": uniform,
    "cascade": three_stages,
    "cascade4": four_stages,
    "flip": augmentation("none"),
    "elaborate": augmentation("crop"),
    "resize": augmentation("resize"),
    "ce": long_tail("softmax", "uniform"),
    "sigmoid": long_tail("sigmoid", "uniform"),
    "eql": long_tail("eql", "uniform"),
    "rfs": long_tail("softmax", "repeat_factor"),
    "eql_rfs": long_tail("eql", "repeat_factor"),
    "half": supervised("boxes", 1.0),
    "half_long": supervised("boxes", 2.0),
    "half_weak": weakly_supervised,
    "all": supervised("train", 0.5),
}
_OF_THE_PAPER = 6  # of the variants are of the first paper: those that are run by default


def define_flags() -> None:
    run_flags.define_flags()
    flags.DEFINE_list("variants", list(VARIANTS)[:_OF_THE_PAPER], f"Some of {', '.join(VARIANTS)}.")
    flags.DEFINE_integer("seeds", 3, "Runs of each variant.", lower_bound=1)
    flags.DEFINE_float(
        "epochs", None, "Shorten or lengthen the config's schedule to these.", lower_bound=0.01
    )
    flags.DEFINE_list("metric", [MEAN_AP.format(0.5)], "Figure or figures to compare.")


def run_config(
    base: ConfigDict, variant: str, seed: int, epochs: float | None = None
) -> ConfigDict:
    """The config of one run; with `epochs` its whole schedule is stretched to them."""
    config = copy.deepcopy(base)
    if epochs:
        scale = epochs / config.optimizer.num_epochs
        stretch(config.optimizer, scale)
        config.optimizer.warmup_steps = round(scale * config.optimizer.warmup_steps)
        mining = config.model.weak.mining
        mining.start_steps = round(scale * mining.start_steps)
        mining.ramp_steps = round(scale * mining.ramp_steps)
    VARIANTS[variant](config)
    config.name = f"{config.name}_{variant}"
    config.seed = seed
    config.evaluation.every_epochs = 0
    return config


def stretch(optimizer: ConfigDict, scale: float) -> None:
    """Multiplies all epochs of a schedule."""
    optimizer.num_epochs *= scale
    optimizer.decay_epochs = tuple(scale * epoch for epoch in optimizer.decay_epochs)
    optimizer.warmup_epochs *= scale


def score(config: ConfigDict, folder: Path, metrics: Sequence[str]) -> list[float]:
    """Figures of a run, trained now unless it is there.

    Raises:
      UserError: the run has no such figure.
    """
    if not (files := list(folder.glob("evaluation/*/*_metrics.json"))):
        # Here, not above: JAX reads the cache's place when it compiles first.
        from detection.settings import read_run
        from detection.train import train

        train(read_run(config), str(folder))
        files = list(folder.glob("evaluation/*/*_metrics.json"))
    (file,) = files
    figures = json.loads(file.read_text())
    for metric in metrics:
        if metric not in figures:
            example = next(iter(figures))
            raise UserError(f"{file}: found no {metric!r}, expected a name such as {example!r}")
    return [figures[metric] for metric in metrics]


def table(scores: dict[str, list[float]], metric: str = "variant") -> str:
    """Markdown: mean, least and largest in percent, and the gain over the first variant.

    Args:
      scores: variant -> the figure of each of its runs.
      metric: head of the first column.
    """
    first = statistics.mean(next(iter(scores.values())))
    lines = [f"| {metric} | mean | least to largest | gain |", "| --- | --- | --- | --- |"]
    for variant, values in scores.items():
        mean = statistics.mean(values)
        lines.append(
            f"| {variant} | {100 * mean:.2f} | {100 * min(values):.2f} to {100 * max(values):.2f} "
            f"| {100 * (mean - first):+.2f} |"
        )
    return "\n".join(lines)


def tables(scores: dict[str, list[list[float]]], metrics: Sequence[str]) -> str:
    """A table of each of the figures that the runs have, one below the other."""
    columns = [
        {variant: [run[place] for run in runs] for variant, runs in scores.items()}
        for place in range(len(metrics))
    ]
    return "\n\n".join(map(table, columns, metrics))


def main():
    values = flags.FLAGS
    for name in values.variants:
        if name not in VARIANTS:
            raise UserError(f"--variants: found {name!r}, expected some of {', '.join(VARIANTS)}")
    workdir = Path(values.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    scores: dict[str, list[list[float]]] = {}
    for seed in range(values.seeds):  # round by round: an early end leaves equal numbers of runs
        for variant in values.variants:
            print(f"run {variant}, seed {seed}", flush=True)
            config = run_config(values.config, variant, seed, values.epochs)
            figures = score(config, workdir / f"{variant}_{seed}", values.metric)
            scores.setdefault(variant, []).append(figures)
        text = tables(scores, values.metric)
        print(f"after {seed + 1} of {values.seeds} seeds:\n{text}", flush=True)
        write_text(workdir / "table.md", text + "\n")


if __name__ == "__main__":
    define_flags()
    run_main(main)
