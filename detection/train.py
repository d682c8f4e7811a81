"""Trains a detector.

    python -m detection.train --config=configs/detection/r50.py --config.data.dir=DIR --workdir=WORK

The same command goes on from the last checkpoint in --workdir; what it computes then equals an
uninterrupted run bit for bit. On a pod, start it on every host.
"""

import functools
from collections.abc import Callable

import jax
from absl import flags
from etils import epath
from jax.sharding import Mesh

from common.data.canvases import train_canvases
from common.data.dataset import Dataset
from common.data.frequencies import class_frequencies
from common.data.input import train_batches
from common.data.plans.class_index import labelled_classes
from common.data.plans.plan import ignored_flags, train_plan
from common.io import run_flags
from common.io.commands import run_main
from common.nn.weights.backbone_weights import load_backbone_weights
from common.tables.hierarchy import ancestor_lists
from common.training import command, distributed, hardware
from common.training.compiling import (
    announce_canvases,
    announced,
    compiled_ahead,
    compiled_together,
)
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
from common.training.step import TrainState, init_state, jit_train_step, scheduled, variable_shapes
from common.training.watchdog import MetricsCheck
from common.training.workdir import keep_classes
from detection.batch_fields import init_shapes, program_shapes
from detection.evaluate import check_evaluation, evaluate_variables, evaluation_pictures
from detection.fine_tuning import with_trained_detector
from detection.models.faster_rcnn import build
from detection.models.two_stage import CLIPPED_APART, frozen_pattern
from detection.refine import open_proposals
from detection.settings import RunSettings, read_run

# Fields that may change between two starts of one run: they do not change what a step computes.
MAY_DIFFER = (
    "optimizer.accumulate",
    "log",
    "checkpoint",
    "evaluation",
    "test_time",
    "optimizer.num_epochs",
    "optimizer.decay_epochs",
    "data.dir",
    "data.sources.*.dir",
    "data.num_processes",
    "data.num_threads",
    "data.prefetch",
    "data.eval_split",
    "data.proposals",
    "init_from",
    "model.pretrained",
    "model.drop_background_rois",
)


def train(settings: RunSettings, directory: str) -> dict[str, float]:
    """Runs (or finishes) a training; returns the metrics of the last evaluation."""
    command.check_weights(settings.model.pretrained, settings.init_from)
    mesh, say = command.start(data=settings.data.batch_size)
    dataset = command.open_dataset(settings.data.directory)
    settings.check_classes(dataset.num_classes)
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
    batch_size = settings.data.batch_size
    plan = train_plan(dataset, settings.data, settings.seed)
    steps_per_epoch = plan.steps_per_epoch
    num_steps = total_steps(settings.optimizer, steps_per_epoch)
    say(
        f"data: {dataset.directory}, {sum(len(s.images) for s in plan.sources)} training images, "
        f"{dataset.num_classes} classes, {steps_per_epoch} steps an epoch",
        flush=True,
    )
    if not plan.boxed_images:
        learned = "nothing but background is" if plan.box_sources else "no box is"
        say(f"note: no training image has a box: {learned} learned", flush=True)
    notes = warmup_note(settings.optimizer, steps_per_epoch), settings.mining_note(steps_per_epoch)
    for note in filter(None, notes):
        say(note, flush=True)
    for source in plan.sources if settings.data.sources else ():
        say(f"source: {source.summary}", flush=True)
        if source.mapped_names:
            say(f"  its classes in the run: {', '.join(source.mapped_names)}", flush=True)
    for source in plan.label_sources:
        say(f"labels: {labelled_classes(source, dataset.class_names)}", flush=True)
    proposals = open_proposals(settings, dataset, say)  # None: the model makes its own

    # ---------------------------------------------------------------- model and optimiser
    frequencies = None
    if settings.model.box_head.classifier.needs_frequencies:
        frequencies = class_frequencies(plan.box_sources, ignored_flags(settings.data))
        say(f"classes: {frequencies.summary(settings.model.box_head.classifier.eql.threshold)}")
    ancestors = None
    if settings.model.needs_ancestors:
        ancestors = ancestor_lists(dataset.hierarchy, dataset.class_labels)
    model = build(settings.model, dataset.num_classes, DATA_AXIS, frequencies, ancestors)
    schedule = make_schedule(
        settings.optimizer, batch_size=batch_size, steps_per_epoch=steps_per_epoch
    )
    shapes = variable_shapes(model, init_shapes(settings.data))
    frozen = frozen_pattern(settings.model)
    tx = make_optimizer(settings.optimizer, shapes["params"], frozen, CLIPPED_APART)
    log_parameter_overview(shapes["params"], say, trained_mask(shapes["params"], frozen))

    # ---------------------------------------------------------------- state
    # In this order: the work directory's newest checkpoint, a trained detector, a pretrained
    # backbone, random values.
    checkpoints = open_checkpoints(workdir, settings.checkpoint, steps_per_epoch)
    init = functools.partial(init_state, model, tx, settings.seed, init_shapes(settings.data))
    state, start_step = first_state(checkpoints, init, mesh, say)
    if not start_step and settings.model.pretrained:
        state = with_pretrained_backbone(state, settings.model.pretrained, mesh, say)
    if not start_step and settings.init_from:
        state = with_trained_detector(state, settings.init_from, dataset.class_labels, mesh, say)

    # ---------------------------------------------------------------- loop
    accumulate = choose_parts(
        checkpoints,
        batch_size,
        mesh,
        settings.optimizer.accumulate,
        say,
        whole_batch=settings.model.needs_whole_batch,
    )
    jitted = jit_train_step(model, tx, mesh, accumulate, settings.optimizer.reduce_dtype)
    step_flops = hardware.step_flops(scheduled(jitted, schedule, mesh), mesh)
    programs = program_shapes(settings.data, batch_size, dataset.num_classes)
    if settings.data.label_steps.share:  # the first step of the other kind is not to wait
        compiled = compiled_ahead(jitted, state, programs, "training step", say)
        train_step = scheduled(compiled, schedule, mesh)
    else:
        announce_canvases(train_canvases(settings.data), say)
        compiled = scheduled(compiled_together(jitted), schedule, mesh)
        train_step = announced(compiled, "training step", say)
    box_fields, label_fields = programs[0].keys(), programs[-1].keys()
    batches = train_batches(
        dataset,
        plan,
        settings.data,
        seed=settings.seed,
        start_step=start_step,
        num_steps=num_steps - start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        proposals=proposals,
    )

    def measure(step: int, variables: dict, log: RunMetrics) -> dict[str, float]:
        folder = workdir / "evaluation" / f"{step}"
        figures = evaluate_variables(
            settings, model, dataset, mesh, variables, step, folder, say=say
        )
        if figures and settings.evaluation.num_pictures:
            log.pictures(step, lambda: evaluation_pictures(settings, dataset, folder))
        return figures

    _, figures = train_loop(
        workdir,
        settings,
        Steps(start_step, num_steps, steps_per_epoch, batch_size),
        state,
        train_step=train_step,
        step_flops=step_flops,
        learning_rate=schedule,
        batches=batches,
        fields=lambda step: label_fields if plan.labels_only(step) else box_fields,
        check=MetricsCheck(plan.image_name),
        measure=measure,
        measured=f"{settings.data.eval_split} {settings.evaluation.metric}",
        checkpoints=checkpoints,
        parts=mesh.size * accumulate,
        mesh=mesh,
        say=say,
    )
    return figures


def with_pretrained_backbone(state: TrainState, path: str, mesh, say) -> TrainState:
    """Replaces the backbone's random parameters and statistics by those of a converted file.

    A decoupled backbone is a trunk and two branches (`backbone_class`, `backbone_box`): each branch
    starts from the same weights.
    """
    params, batch_stats = dict(state.params), dict(state.batch_stats)
    names = [name for name in params if name.startswith("backbone")]
    for branch in [name for name in names if name != "backbone"] or ["backbone"]:
        parts = ["backbone", branch] if branch != "backbone" else [branch]
        whole = {
            field: {k: v for part in parts for k, v in tree.get(part, {}).items()}
            for field, tree in (("params", params), ("batch_stats", batch_stats))
        }
        loaded, report = load_backbone_weights(path, distributed.to_host(whole))
        say(f"pretrained: {branch}: {path}: {report}", flush=True)
        loaded = distributed.replicate(loaded, mesh)
        for part in parts:
            params[part] = {k: loaded["params"][k] for k in params[part]}
            if part in batch_stats:
                batch_stats[part] = {k: loaded["batch_stats"][k] for k in batch_stats[part]}
    return state.replace(params=params, batch_stats=batch_stats)


def main() -> None:
    train(read_run(run_flags.training_config()), flags.FLAGS.workdir)


if __name__ == "__main__":
    run_flags.define_flags()
    run_main(main)
