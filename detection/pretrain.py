"""Trains a backbone as image classifier, on ImageNet or any photos sorted into classes.

    python -m detection.pretrain --config=configs/pretrain/resnet50.py --config.data.dir=DIR
        --workdir=WORK

DIR holds train/CLASS/*.jpg and validation/CLASS/*.jpg; --config.data.tfds=imagenet2012 reads TFDS
instead, --config.data.dataset=DIR photos with verified image-level labels. The same command goes on
from the last checkpoint in --workdir. At the end it reports top-1 accuracy, or the average
precision of each class over its verified photos, and writes WORK/backbone.safetensors, which
detectors take as --config.model.pretrained.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from common.data.labelled_batches import eval_batches, train_batches
from common.data.labelled_images import LabelledImages, open_images
from common.data.settings import LabelledDataSettings
from common.io import activity, run_flags
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.progress import Progress
from common.metrics.ranking import class_average_precisions
from common.nn.weights.backbone_weights import save_backbone_weights
from common.training import command, distributed, hardware, preemption
from common.training.compiling import announced, compiled_together
from common.training.goodput import Goodput
from common.training.optimizer import make_optimizer, make_schedule, total_steps
from common.training.preemption import stoppable
from common.training.profiling import Profiler
from common.training.restore import choose_parts, first_state, open_checkpoints
from common.training.run_metrics import RunMetrics, log_parameter_overview
from common.training.step import (
    TrainState,
    init_state,
    jit_train_step,
    make_predict_step,
    scheduled,
    variable_shapes,
)
from common.training.watchdog import MetricsCheck, StallWatchdog
from detection.models.classifier import Classifier
from detection.models.settings import ClassifierSettings
from detection.settings import PretrainSettings, read_pretrain

# Fields that may change between two starts of one run: they do not change what a step computes.
MAY_DIFFER = (
    "optimizer.accumulate",
    "log",
    "checkpoint",
    "evaluation",
    "data.dir",
    "data.num_processes",
    "data.num_threads",
    "data.prefetch",
    "data.eval_split",
)
WEIGHTS = "backbone.safetensors"
TOP1, MEAN_AP = "top1", "mAP"  # names of figures
_MAX_NAMED = 10  # classes that a line spells out


def pretrain(settings: PretrainSettings, directory: str) -> float:
    """Runs (or finishes) a training; returns the top-1 accuracy, or the mean average precision."""

    mesh, say = command.start(
        data=settings.data.batch_size, evaluation=settings.evaluation.batch_size
    )
    with command.training_workdir(directory, settings.to_dict(), MAY_DIFFER, say) as workdir:
        return pretrain_in(workdir, settings, mesh, say)


def pretrain_in(
    workdir: epath.Path, settings: PretrainSettings, mesh: Mesh, say: Callable
) -> float:
    """The training itself, in a work directory that is its own."""

    # ---------------------------------------------------------------- data
    train_images, eval_images = open_splits(settings.data)
    batch_size = settings.data.batch_size
    steps_per_epoch = -(-len(train_images) // batch_size)
    num_steps = total_steps(settings.optimizer, steps_per_epoch)
    say(
        f"data: {len(train_images)} training and {len(eval_images)} validation images, "
        f"{len(train_images.class_names)} classes, {steps_per_epoch} steps an epoch",
        flush=True,
    )

    if train_images.verified:
        say(f"labels: {without_photos(train_images)}", flush=True)

    # ---------------------------------------------------------------- model and optimiser
    num_classes = len(train_images.class_names)
    first_batch = init_batch(settings.data, num_classes if train_images.verified else 0)
    model = build_model(settings.model, num_classes)
    schedule = make_schedule(
        settings.optimizer, batch_size=batch_size, steps_per_epoch=steps_per_epoch
    )
    shapes = variable_shapes(model, first_batch)
    tx = make_optimizer(settings.optimizer, shapes["params"])
    log_parameter_overview(shapes["params"], say)

    # ---------------------------------------------------------------- state
    checkpoints = open_checkpoints(workdir, settings.checkpoint, steps_per_epoch)
    init = functools.partial(init_state, model, tx, settings.seed, first_batch)
    state, start_step = first_state(checkpoints, init, mesh, say)

    # ---------------------------------------------------------------- loop
    accumulate = choose_parts(
        checkpoints,
        batch_size,
        mesh,
        settings.optimizer.accumulate,
        say,
        whole_batch=settings.model.norm == "sync",
    )
    jitted = jit_train_step(model, tx, mesh, accumulate, settings.optimizer.reduce_dtype)
    step_flops = hardware.step_flops(scheduled(jitted, schedule, mesh), mesh)
    compiled = scheduled(compiled_together(jitted), schedule, mesh)
    train_step = announced(compiled, "training step", say)
    predict = announced(jax.jit(make_predict_step(model, mesh)), "evaluation step", say)
    fields = first_batch.keys()
    batches = train_batches(
        train_images,
        settings.data,
        seed=settings.seed,
        start_step=start_step,
        num_steps=num_steps - start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    extra = {
        "steps_per_epoch": steps_per_epoch,
        "batch_size": batch_size,
        "config": settings.name,
        "parts": mesh.size * accumulate,
        "num_steps": num_steps,
    }
    progress = Progress(
        num_steps,
        batch_size,
        mesh.size,
        steps_per_epoch=steps_per_epoch,
        peak_flops=hardware.peak_flops(mesh.devices.flat[0].device_kind),
    )
    step = start_step
    check = MetricsCheck(train_images.name)

    def save_stopped() -> None:
        if step > start_step:
            check.latest()  # nothing that is not finite is kept
        checkpoints.save(step, state, extra, wait=True)

    with (
        RunMetrics(workdir, start_step) as log,
        Goodput(workdir, start_step) as goodput,
        Profiler(workdir / "profile", settings.log.profile_steps, say) as profiler,
        StallWatchdog.of(settings.log),
        preemption.saving(save_stopped),
        checkpoints,  # an error in the loop does not lose the one that is being written
    ):

        def measure(step: int, variables: dict) -> dict[str, float]:
            where = f"on {len(eval_images)} images after step {step}"
            if eval_images.verified:
                precisions, always = class_precisions(
                    variables, eval_images, settings, predict, mesh
                )
                mean = float(np.mean(list(precisions.values()))) if precisions else math.nan
                without = f", without {always} that no photo is known to lack," if always else ""
                say(f"mAP {mean:.4f} of {len(precisions)} classes{without} {where}", flush=True)
                return {MEAN_AP: mean} | {f"AP/{name}": ap for name, ap in precisions.items()}
            top1 = top1_accuracy(variables, eval_images, settings, predict, mesh)
            say(f"top-1 {top1:.4f} {where}", flush=True)
            return {TOP1: top1}

        def evaluate(step: int, variables: dict) -> dict[str, float]:
            run = functools.partial(measure, step, variables)
            with progress.pause(activity.EVALUATION):
                return log.evaluated(step, settings.data.eval_split, run)

        every = steps_per_epoch * settings.evaluation.every_epochs
        if every and start_step and start_step % every == 0 and start_step != num_steps:
            evaluate(start_step, state.variables)  # unless it was made before the run stopped
        for step, batch in enumerate(progress.timed(batches), start=start_step + 1):
            on_devices = distributed.to_global({name: batch[name] for name in fields}, mesh)
            profiler.before(step)
            state, metrics = train_step(state, on_devices)
            profiler.after(step, metrics)
            progress.step_done(step, step_flops(state, on_devices))
            check.one_behind(step, metrics, batch["image_index"])

            if settings.log.is_due(step, start_step + 1, num_steps):
                figures = check.latest() | {"learning_rate": float(schedule(step - 1))}
                figures |= hardware.device_memory(mesh)
                say(progress.line(step, figures) + distributed.slowest(), flush=True)
                log.write(step, figures | progress.rates(step))
                goodput.write(step)
                checkpoints.check()

            if settings.checkpoint.is_due(step, steps_per_epoch, num_steps):
                check.latest()  # nothing that is not finite is kept
                with progress.pause(activity.CHECKPOINT):
                    checkpoints.save(step, state, extra)

            if every and step % every == 0 and step != num_steps:
                evaluate(step, state.variables)
            preemption.passes()

        with progress.pause(activity.CHECKPOINT):
            checkpoints.close()
        figure = MEAN_AP if eval_images.verified else TOP1
        result = evaluate(num_steps, state.variables).get(figure, math.nan)
    if distributed.is_main_process():
        path = workdir / WEIGHTS
        write_backbone(path, state, settings)
        say(f"wrote {path} (config.model.pretrained of a detector)", flush=True)
    return result


def open_splits(data: LabelledDataSettings) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images.

    Raises:
      UserError: they cannot be opened, or their classes differ.
    """
    train, evaluation = (open_images(data, split) for split in (data.train_split, data.eval_split))
    if list(train.class_names) != list(evaluation.class_names):
        odd = sorted(set(train.class_names) ^ set(evaluation.class_names))
        raise UserError(
            f"{data.tfds or data.dir}: found classes in only one of {data.train_split} and "
            f"{data.eval_split}: {', '.join(odd[:5])}; expected the same in both"
        )
    return train, evaluation


def without_photos(images: LabelledImages) -> str:
    """A line about the classes that no photo shows."""
    shown = np.unique(images.shown()[1])
    missing = [name for i, name in enumerate(images.class_names) if i not in set(shown.tolist())]
    more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
    return f"{len(shown)} classes have training photos" + (
        f", none have {', '.join(missing[:_MAX_NAMED])}{more}" if missing else ""
    )


def build_model(model: ClassifierSettings, num_classes: int) -> Classifier:
    """The classifier as it runs on each device of the mesh."""
    return Classifier(
        num_classes,
        model.backbone,
        norm=model.norm,
        remat=model.remat,
        drop_path_rate=model.drop_path_rate,
        dropout_rate=model.dropout_rate,
        label_smoothing=model.label_smoothing,
        dtype=jnp.dtype(model.dtype),
        axis_name=distributed.DATA_AXIS,
    )


def init_batch(
    data: LabelledDataSettings, num_verified: int = 0
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch that parameters can be made with; `num_verified`: classes of verified labels."""
    size = max(data.image_size, 64)  # below, NASNet's last cells would have no pixel
    labels = {"label": jax.ShapeDtypeStruct((1,), jnp.int32)}
    if num_verified:
        labels = {"labels": jax.ShapeDtypeStruct((1, num_verified), jnp.int8)}
    return {
        "image": jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8),
        **labels,
        "image_valid": jax.ShapeDtypeStruct((1,), jnp.bool_),
    }


def top1_accuracy(
    variables: dict,
    images: LabelledImages,
    settings: PretrainSettings,
    predict: Callable,
    mesh: Mesh,
) -> float:
    """Share of `images` whose highest logit is that of their class; collective."""
    batches = eval_batches(
        images,
        settings.data,
        batch_size=settings.evaluation.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    correct = jnp.zeros((), jnp.int32)
    for batch in stoppable(batches):
        del batch["image_index"]
        correct += jnp.sum(predict(variables, distributed.to_global(batch, mesh))["correct"])
    return int(correct) / len(images)


def class_precisions(
    variables: dict,
    images: LabelledImages,
    settings: PretrainSettings,
    predict: Callable,
    mesh: Mesh,
) -> tuple[dict[str, float], int]:
    """Average precision of each class that some photo shows and some photo lacks, by name, and how
    many classes some show and none is known to lack; collective."""
    batches = eval_batches(
        images,
        settings.data,
        batch_size=settings.evaluation.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    everywhere = jax.jit(lambda tree: tree, out_shardings=distributed.replicated(mesh))
    scores, labels = [], []
    for batch in stoppable(batches):
        del batch["image_index"]
        on_devices = distributed.to_global(batch, mesh)
        found = predict(variables, on_devices)["scores"]
        whole = everywhere((found, on_devices["labels"], on_devices["image_valid"]))
        found, known, valid = distributed.to_host(whole)
        scores.append(found[valid])
        labels.append(known[valid])
    known = np.concatenate(labels)
    values = class_average_precisions(np.concatenate(scores), known)
    always = int(np.count_nonzero((known > 0).any(axis=0) & ~(known < 0).any(axis=0)))
    names = zip(images.class_names, values.tolist(), strict=True)
    return {name: value for name, value in names if not math.isnan(value)}, always


def write_backbone(path: epath.Path, state: TrainState, settings: PretrainSettings) -> None:
    """The trunk's weights as `scripts.convert_weights` writes them."""
    trunk = {"params": state.params["backbone"]}
    if "backbone" in state.batch_stats:  # group norm has none
        trunk["batch_stats"] = state.batch_stats["backbone"]
    flat = traverse_util.flatten_dict(distributed.to_host(trunk), sep="/")
    weights = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    save_backbone_weights(path, weights, settings.model.backbone, f"{settings.name} (pretrain)")


def main() -> None:
    pretrain(read_pretrain(run_flags.training_config()), flags.FLAGS.workdir)


if __name__ == "__main__":
    run_flags.define_flags()
    run_main(main)
