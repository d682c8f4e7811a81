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
from collections.abc import Callable, Iterator

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
from common.io import run_flags
from common.io.commands import run_main
from common.io.errors import UserError
from common.metrics.ranking import class_average_precisions
from common.nn.weights.backbone_weights import save_backbone_weights
from common.training import command, distributed, hardware
from common.training.compiling import announced, compiled_together
from common.training.loop import Steps, train_loop
from common.training.optimizer import make_optimizer, make_schedule, total_steps, warmup_note
from common.training.preemption import stoppable
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
from common.training.watchdog import MetricsCheck
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

    if note := warmup_note(settings.optimizer, steps_per_epoch):
        say(note, flush=True)
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
    batches = train_batches(
        train_images,
        settings.data,
        seed=settings.seed,
        start_step=start_step,
        num_steps=num_steps - start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

    def measure(step: int, variables: dict, log: RunMetrics) -> dict[str, float]:
        where = f"on {len(eval_images)} images after step {step}"
        if eval_images.verified:
            precisions, always = class_precisions(variables, eval_images, settings, predict, mesh)
            mean = float(np.mean(list(precisions.values()))) if precisions else math.nan
            without = f", without {always} that no photo is known to lack," if always else ""
            say(f"mAP {mean:.4f} of {len(precisions)} classes{without} {where}", flush=True)
            return {MEAN_AP: mean} | {f"AP/{name}": ap for name, ap in precisions.items()}
        top1 = top1_accuracy(variables, eval_images, settings, predict, mesh)
        say(f"top-1 {top1:.4f} {where}", flush=True)
        return {TOP1: top1}

    state, figures = train_loop(
        workdir,
        settings,
        Steps(start_step, num_steps, steps_per_epoch, batch_size),
        state,
        train_step=train_step,
        step_flops=step_flops,
        learning_rate=schedule,
        batches=batches,
        fields=lambda step: first_batch,
        check=MetricsCheck(train_images.name),
        measure=measure,
        measured=settings.data.eval_split,
        checkpoints=checkpoints,
        parts=mesh.size * accumulate,
        mesh=mesh,
        say=say,
    )
    if distributed.is_main_process():
        path = workdir / WEIGHTS
        write_backbone(path, state, settings)
        say(f"wrote {path} (config.model.pretrained of a detector)", flush=True)
    return figures.get(MEAN_AP if eval_images.verified else TOP1, math.nan)


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
    correct = jnp.zeros((), jnp.int32)
    for batch in eval_on_devices(images, settings, mesh):
        correct += jnp.sum(predict(variables, batch)["correct"])
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
    everywhere = jax.jit(lambda tree: tree, out_shardings=distributed.replicated(mesh))
    scores, labels = [], []
    for batch in eval_on_devices(images, settings, mesh):
        found = predict(variables, batch)["scores"]
        whole = everywhere((found, batch["labels"], batch["image_valid"]))
        found, known, valid = distributed.to_host(whole)
        scores.append(found[valid])
        labels.append(known[valid])
    known = np.concatenate(labels)
    values = class_average_precisions(np.concatenate(scores), known)
    always = int(np.count_nonzero((known > 0).any(axis=0) & ~(known < 0).any(axis=0)))
    names = zip(images.class_names, values.tolist(), strict=True)
    return {name: value for name, value in names if not math.isnan(value)}, always


def eval_on_devices(
    images: LabelledImages, settings: PretrainSettings, mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Batches of all images, once each."""
    batches = eval_batches(
        images,
        settings.data,
        batch_size=settings.evaluation.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for batch in stoppable(batches):
        yield distributed.to_global(batch, mesh, batch.keys() - {"image_index"})


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
