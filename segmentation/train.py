"""Trains a segmenter: what of a box is its object.

    python -m segmentation.train --config=configs/segmentation/hrnet_w48_256.py
        --config.data.dir=DIR --workdir=WORK

The same command goes on from the last checkpoint in --workdir; what it computes then equals an
uninterrupted run bit for bit. On a pod, start it on every host.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh

from common.data.dataset import Dataset
from common.io import run_flags
from common.io.commands import run_main
from common.nn.layers import norm
from common.training import command, hardware
from common.training.compiling import announce_canvases, announced, compiled_together
from common.training.distributed import DATA_AXIS
from common.training.loop import Steps, train_loop
from common.training.optimizer import (
    make_optimizer,
    make_schedule,
    total_steps,
    trained_mask,
    warmup_note,
)
from common.training.restore import choose_parts, first_state, open_checkpoints
from common.training.run_metrics import RunMetrics, log_parameter_overview
from common.training.step import init_state, jit_train_step, scheduled, variable_shapes
from common.training.watchdog import MetricsCheck
from common.training.workdir import keep_classes
from segmentation.batch_fields import init_shapes
from segmentation.crops.batches import train_batches
from segmentation.crops.plan import make_plan
from segmentation.evaluate import check_evaluation, evaluate_variables
from segmentation.models.segmenter import build
from segmentation.pretrained import with_pretrained
from segmentation.settings import RunSettings, read_run

# Fields that may change between two starts of one run: they do not change what a step computes.
MAY_DIFFER = (
    "optimizer.accumulate",
    "log",
    "checkpoint",
    "evaluation",
    "test",
    "data.dir",
    "data.num_processes",
    "data.num_threads",
    "data.prefetch",
    "data.eval_split",
    "model.pretrained",
)


def train(settings: RunSettings, directory: str) -> dict[str, float]:
    """Runs (or finishes) a training; returns the figures of the last evaluation."""

    command.check_weights(settings.model.pretrained)
    mesh, say = command.start(data=settings.data.batch_size)
    dataset = command.open_dataset(settings.data.dir)
    settings = check_evaluation(settings, dataset, say)  # refused now rather than after training
    config = settings.to_dict()
    with command.training_workdir(directory, config, MAY_DIFFER, say) as workdir:
        return train_in(workdir, settings, dataset, mesh, say)


def train_in(
    workdir: epath.Path, settings: RunSettings, dataset: Dataset, mesh: Mesh, say: Callable
) -> dict[str, float]:
    """The training itself, in a work directory that is its own."""

    # ---------------------------------------------------------------- data
    dataset = keep_classes(workdir, dataset)
    plan = make_plan(dataset, settings.data, settings.seed)
    steps_per_epoch = plan.steps_per_epoch
    num_steps = total_steps(settings.optimizer, steps_per_epoch)
    say(
        f"data: {dataset.directory}, {plan.num_instances} instances with masks in "
        f"{settings.data.train_split}, {dataset.num_classes} classes, {steps_per_epoch} steps "
        "an epoch",
        flush=True,
    )
    if note := warmup_note(settings.optimizer, steps_per_epoch):
        say(note, flush=True)

    # ---------------------------------------------------------------- model and optimiser
    model = build(settings.model, dataset.num_classes, DATA_AXIS)
    schedule = make_schedule(
        settings.optimizer, batch_size=settings.data.batch_size, steps_per_epoch=steps_per_epoch
    )

    shapes = variable_shapes(model, init_shapes())
    frozen = norm.frozen_pattern([], settings.model.norm)
    tx = make_optimizer(settings.optimizer, shapes["params"], frozen)
    log_parameter_overview(shapes["params"], say, trained_mask(shapes["params"], frozen))

    # ---------------------------------------------------------------- state
    # In this order: the work directory's newest checkpoint, pretrained weights, random values.
    checkpoints = open_checkpoints(workdir, settings.checkpoint, steps_per_epoch)
    init = functools.partial(init_state, model, tx, settings.seed, init_shapes())
    state, start_step = first_state(checkpoints, init, mesh, say)
    if not start_step and settings.model.pretrained:
        state = with_pretrained(state, settings.model.pretrained, mesh, say)

    # ---------------------------------------------------------------- loop
    announce_canvases(settings.data.canvases, say)
    accumulate = choose_parts(
        checkpoints,
        settings.data.batch_size,
        mesh,
        settings.optimizer.accumulate,
        say,
        whole_batch=settings.model.norm == "sync",
    )
    jitted = jit_train_step(model, tx, mesh, accumulate, settings.optimizer.reduce_dtype)
    step_flops = hardware.step_flops(scheduled(jitted, schedule, mesh), mesh)
    compiled = scheduled(compiled_together(jitted), schedule, mesh)
    train_step = announced(compiled, "training step", say)
    fields = tuple(init_shapes())
    batches = train_batches(
        dataset,
        plan,
        settings.data,
        start_step=start_step,
        num_steps=num_steps - start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

    def measure(step: int, variables: dict, log: RunMetrics) -> dict[str, float]:
        folder = workdir / "evaluation" / f"{step}"
        return evaluate_variables(settings, model, dataset, mesh, variables, step, folder, say=say)

    _, figures = train_loop(
        workdir,
        settings,
        Steps(start_step, num_steps, steps_per_epoch, settings.data.batch_size),
        state,
        train_step=train_step,
        step_flops=step_flops,
        learning_rate=schedule,
        batches=batches,
        fields=lambda step: fields,
        check=MetricsCheck(functools.partial(instance_name, dataset)),
        index="instance_index",
        measure=measure,
        measured=f"{settings.data.eval_split} masks",
        checkpoints=checkpoints,
        parts=mesh.size * accumulate,
        mesh=mesh,
        say=say,
    )
    return figures


def instance_name(dataset: Dataset, row: int) -> str:
    """Photo and number of the box of a row of `dataset.boxes`."""
    image = int(np.searchsorted(dataset.box_offsets, row, "right")) - 1
    return f"{dataset.image_id(image)} box {row - int(dataset.box_offsets[image])}"


def main():
    train(read_run(run_flags.training_config()), flags.FLAGS.workdir)


if __name__ == "__main__":
    run_flags.define_flags()
    run_main(main)
