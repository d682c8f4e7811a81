"""Trains a detector.

    python -m detection.train --config=configs/detection/r50.py --config.data.dir=DIR --workdir=WORK

The same command goes on from the last checkpoint in --workdir; what it computes then equals an
uninterrupted run bit for bit. On a pod, start it on every host.
"""

import functools

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from common.cli import run_main
from common.data.dataset import GROUP_OF
from common.data.input import train_batches
from common.data.plan import make_plan
from common.errors import UserError
from common.nn.weights import load_backbone_weights
from common.training import distributed
from common.training.checkpoint import Checkpoints
from common.training.metrics import RunMetrics, log_parameter_overview
from common.training.optimizer import (
    make_optimizer,
    make_schedule,
    total_steps,
    trained_mask,
)
from common.training.progress import Progress
from common.training.watchdog import StallWatchdog, check_finite
from common.training.workdir import prepare_workdir
from detection import setup
from detection.evaluate import evaluate_variables
from detection.train_step import TrainState, batch_shapes, init_variables, make_train_step

# Fields that may change between two starts of one run: they do not change what a step computes.
MAY_DIFFER = (
    "log", "checkpoint", "evaluation", "test_time", "optimizer.num_epochs", "data.dir",
    "data.num_threads", "data.prefetch", "data.eval_split", "model.pretrained",
    "model.drop_background_rois",
)


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Runs (or finishes) a training; returns the metrics of the last evaluation."""

    # ---------------------------------------------------------------- devices and work directory
    distributed.initialize()
    mesh = distributed.make_mesh()
    is_main = distributed.is_main_process()
    say = print if is_main else lambda *_, **__: None
    say(
        f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, "
        f"{jax.process_count()} processes", flush=True,
    )
    if config.data.batch_size % mesh.size:
        raise UserError(
            f"config.data.batch_size: found {config.data.batch_size}, expected a multiple of the "
            f"{mesh.size} devices"
        )
    workdir = prepare_workdir(workdir, config, may_differ=MAY_DIFFER)

    # ---------------------------------------------------------------- data
    dataset = setup.open_dataset(config)
    batch_size = config.data.batch_size
    plan = make_plan(
        dataset, config.data.train_split, config.data.sampler, config.seed, batch_size,
        ignore_flags=GROUP_OF if config.data.group_of == "drop" else 0,
        positive_share=config.data.get("positive_share", 0.25),
    )
    steps_per_epoch = plan.steps_per_epoch
    num_steps = total_steps(config.optimizer, steps_per_epoch)
    say(
        f"data: {dataset.directory}, {len(dataset.split(config.data.train_split))} training "
        f"images, {dataset.num_classes} classes, {steps_per_epoch} steps an epoch", flush=True,
    )

    # ---------------------------------------------------------------- model and optimiser
    model = setup.build_model(config, dataset.num_classes)
    schedule = make_schedule(
        config.optimizer, batch_size=batch_size, steps_per_epoch=steps_per_epoch
    )
    shapes = setup.variable_shapes(config, model)
    frozen = setup.frozen_pattern(config)
    tx = make_optimizer(config.optimizer, schedule, shapes["params"], frozen)
    log_parameter_overview(shapes["params"], say, trained_mask(shapes["params"], frozen))

    def init_state():
        variables = init_variables(model, config.seed, setup.init_batch(config))
        params = variables["params"]
        return TrainState(
            jnp.zeros((), jnp.int32), params, variables["batch_stats"], tx.init(params)
        )

    replicated = distributed.replicated(mesh)
    abstract_state = setup.abstract(jax.eval_shape(init_state), mesh)

    # ---------------------------------------------------------------- state
    # In this order: the work directory's newest checkpoint, a pretrained backbone, random values.
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_every_steps=steps_per_epoch if config.checkpoint.keep_epochs else None,
    )
    start_step = checkpoints.latest_step() or 0
    if start_step:
        state, _ = checkpoints.restore(start_step, abstract_state)
        say(f"resuming at step {start_step}", flush=True)
    else:
        state = jax.jit(init_state, out_shardings=replicated)()
        if config.model.pretrained:
            state = with_pretrained_backbone(state, config.model.pretrained, mesh, say)

    # ---------------------------------------------------------------- loop
    step_fn = jax.jit(
        make_train_step(model, tx, mesh, config.seed),
        donate_argnums=0,
        in_shardings=(replicated, distributed.batch_sharded(mesh)),
        out_shardings=replicated,
    )
    evaluate = functools.partial(evaluate_variables, config, model, dataset, mesh, say=say)
    batches = train_batches(
        dataset, plan, config.data, seed=config.seed, start_step=start_step,
        num_steps=num_steps - start_step,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )
    progress = Progress(num_steps, batch_size, mesh.size, steps_per_epoch=steps_per_epoch)
    model_fields = batch_shapes((0, 0), 1, 0, 0).keys()
    extra = {"steps_per_epoch": steps_per_epoch, "batch_size": batch_size, "config": config.name}

    def folder(step):
        return workdir / "evaluation" / f"{step}"

    def save(step):
        check(*checked, dataset)  # never keep a state that has already diverged
        with progress.pause():
            checkpoints.save(step, state, extra)

    with RunMetrics(workdir, start_step) as log, StallWatchdog(config.log.stall_seconds) as stall:
        checked = None  # metrics of the step before, looked at while the device works on this one
        for step in range(start_step + 1, num_steps + 1):
            with progress.data_wait():
                host_batch = next(batches)
            batch = distributed.to_global({k: host_batch[k] for k in model_fields}, mesh)
            state, metrics = step_fn(state, batch)
            progress.step_done(step)
            if checked is not None:
                check(*checked, dataset)
            checked = (metrics, step, host_batch["image_index"])
            stall.beat(step)

            last, epoch_end = step == num_steps, step % steps_per_epoch == 0
            if step % config.log.every_steps == 0 or step == start_step + 1 or last:
                figures = check(*checked, dataset)
                figures["learning_rate"] = float(schedule(step - 1))
                say(progress.line(step, figures), flush=True)
                log.write(step, figures | progress.rates(step))
                checkpoints.check()
            due = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
            if due or last or (epoch_end and config.checkpoint.keep_epochs):
                save(step)
            every = config.evaluation.every_epochs
            if every and epoch_end and (step // steps_per_epoch) % every == 0 and not last:
                with progress.pause():
                    log.write(step, named(evaluate(variables(state), step, folder(step))))
                stall.beat(step)
        checkpoints.close()
        if batches.skipped_images or batches.dropped_boxes:
            say(
                f"data: {batches.skipped_images} unreadable photos skipped, "
                f"{batches.dropped_boxes} boxes beyond config.data.max_boxes", flush=True,
            )
        results = evaluate(variables(state), num_steps, folder(num_steps))
        log.write(num_steps, named(results))
    return results


def variables(state: TrainState) -> dict:
    """What inference needs of a state."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def named(results: dict[str, float]) -> dict[str, float]:
    """Evaluation figures under a heading of their own in the logs."""
    return {f"evaluation/{name}": value for name, value in results.items()}


def check(metrics: dict[str, jax.Array], step: int, image_index, dataset) -> dict[str, float]:
    """Fetches the metrics of a step; stops the run when one is not finite."""
    figures = {name: float(value) for name, value in distributed.to_host(metrics).items()}
    check_finite(figures, step, [dataset.image_id(i) for i in image_index if i >= 0])
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


def main(_):
    train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    setup.define_flags()
    run_main(main)
