"""Plans a training on a TPU slice or on GPUs, on a machine without either.

    python -m scripts.plan_pod --config=configs/detection/r50.py --slice=v6e-256 --nocompile
    python -m scripts.plan_pod --config=configs/detection/r50.py --slice=v3-512
    python -m scripts.plan_pod --config=configs/segmentation/hrnet_w48_112.py --images_per_device=16
    python -m scripts.plan_pod --config=configs/detection/r50.py --slice=v3-8 --search=batch
    python -m scripts.plan_pod --config=configs/detection/lvis_r50.py --slice=v3-8 \\
        --num_classes=1230 --photos=56740

Predicts the time of a step from a roofline (`common.training.pod.roofline`): the share of the peak,
images/s, cores that the input needs, hours of the config's schedule on --photos training photos
(OpenImages' 1.74 million), chip-hours and their --price. With the compiler of the package libtpu it
also compiles the step for the slice and prints memory per device and headroom, traffic between
devices and compile time; it exits with status 1 when the program does not fit the device's memory.
--search=batch finds the largest batch that does, by a few compilations; --save=FILE keeps the
compiled program.

The batch is the config's, divided by the devices, or --images_per_device of each.
"""

import os

# Before JAX starts: the host computes nothing, and there is no TPU metadata server to ask.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")

import dataclasses
import functools
import math
import time
from fractions import Fraction
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from common.data import canvases
from common.io.atomic import write_json
from common.io.commands import one_line, run_main
from common.io.errors import UserError
from common.nn.layers import norm
from common.training import distributed
from common.training.compiling import compiling
from common.training.optimizer import OptimizerSettings, make_optimizer, total_steps
from common.training.pod import flops, roofline, topologies
from common.training.pod.batch import images_of_device
from common.training.pod.places import Place, find_place
from common.training.pod.plan_report import print_report
from common.training.pod.saved import save_program
from common.training.pod.search import Trial, largest_that_fits
from common.training.step import TrainState, init_state, jit_train_step, variable_shapes
from detection import batch_fields
from detection.models import faster_rcnn, two_stage
from detection.settings import read_run
from segmentation import batch_fields as crop_fields
from segmentation import settings as segmentation_settings
from segmentation.models import segmenter

OPENIMAGES = 1_743_042  # training photos
ADVICE = "try --config.model.remat=True or a smaller canvas"
MOST_IMAGES = 4096  # of a device, beyond which nothing is searched


class Program(NamedTuple):
    """What a product trains: its model, the batches that the model reads, and how it learns."""

    model: nn.Module
    init_batch: dict[str, jax.ShapeDtypeStruct]
    batch: dict[str, jax.ShapeDtypeStruct]
    frozen_pattern: str
    optimizer: OptimizerSettings
    shapes: list[tuple[int, int]]  # height, width of the photos of all programs of the run
    apart_pattern: str | None = None
    label_share: Fraction = Fraction()  # of the run's steps, those of image-level labels alone


def program(
    config: ConfigDict, num_classes: int, batch_size: int, labels_only: bool = False
) -> Program:
    """The program of a config of detection or segmentation, by its `task`.

    Args:
      config: of a run.
      num_classes: of its data.
      batch_size: images of a step.
      labels_only: the steps of image-level labels of a config that has such.

    Raises:
      UserError: another task, a field that is out of range, or no such steps.
    """
    if labels_only and not (config.task == "detection" and config.data.label_steps.share):
        raise UserError(f"--labels_only: {config.name} has no steps of image-level labels")
    if config.task == "segmentation":
        run = segmentation_settings.read_run(config)
        return Program(
            segmenter.build(run.model, num_classes, distributed.DATA_AXIS),
            crop_fields.init_shapes(),
            crop_fields.train_shapes(run.data, batch_size),
            norm.frozen_pattern([], run.model.norm),
            run.optimizer,
            list(run.data.canvases),
        )
    settings = read_run(config)
    data = settings.data.of_label_steps if labels_only else settings.data
    shapes_of = batch_fields.label_shapes if labels_only else batch_fields.train_shapes
    return Program(
        faster_rcnn.build(settings.model, num_classes, distributed.DATA_AXIS),
        batch_fields.init_shapes(settings.data),
        shapes_of(settings.data, batch_size, num_classes),
        two_stage.frozen_pattern(settings.model),
        settings.optimizer,
        canvases.train_canvases(data),
        two_stage.CLIPPED_APART,
        settings.data.label_steps.exact_share,
    )


class Step(NamedTuple):
    """A training step to compile or to count, and what its run is.

    Attributes:
      jitted: takes the next three.
    """

    jitted: jax.stages.Wrapped
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    rate: jax.ShapeDtypeStruct
    parameters: int
    program: Program


def make_step(
    config: ConfigDict,
    mesh: Mesh,
    num_classes: int,
    images_per_device: int,
    labels_only: bool = False,
) -> Step:
    """The step on a mesh of any devices, which need not be there."""
    batch_size = images_per_device * mesh.size
    made = program(config, num_classes, batch_size, labels_only)
    shapes = variable_shapes(made.model, made.init_batch)
    tx = make_optimizer(made.optimizer, shapes["params"], made.frozen_pattern, made.apart_pattern)
    state = jax.eval_shape(lambda: init_state(made.model, tx, config.seed, made.init_batch))
    parameters = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    optimizer = made.optimizer
    jitted = jit_train_step(made.model, tx, mesh, optimizer.accumulate, optimizer.reduce_dtype)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return Step(jitted, state, made.batch, rate, parameters, made)


class DoesNotFit(UserError):
    """The compiler found no way to keep a program within a device's memory."""


class CompiledStep(NamedTuple):
    """A compiled training step, and what is known of it as plain values (bytes, seconds)."""

    images_per_device: int
    report: dict[str, Any]
    executable: jax.stages.Compiled
    mesh: Mesh


def compile_train_step(
    config: ConfigDict,
    where: Place,
    num_classes: int,
    images_per_device: int,
    labels_only: bool = False,
) -> CompiledStep:
    """Compiles the step and asks for its memory and traffic.

    Raises:
      DoesNotFit: by far.
    """
    mesh = distributed.make_mesh(topologies.slice_devices(where))
    step = make_step(config, mesh, num_classes, images_per_device, labels_only)
    start = time.perf_counter()
    lowered = step.jitted.lower(step.state, step.batch, step.rate)
    try:
        with compiling(f"training step for {images_per_device} images a device", print):
            executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(
            f"{config.name} with {images_per_device} images a device: {one_line(error)}: {ADVICE}"
        ) from error
    seconds = time.perf_counter() - start
    text = topologies.hlo_text(executable)
    traffic = (
        topologies.asked_collectives(lowered.as_text())
        if text is None
        else topologies.collectives(text)
    )
    report = {
        "hbm_bytes": int(where.rates.gib * topologies.GIB),
        "memory_bytes": topologies.memory(executable),
        "collectives": [dataclasses.asdict(c) for c in traffic],
        "collectives_of": "compiled" if text is not None else "lowered",
        "compile_seconds": seconds,
    }
    return CompiledStep(images_per_device, report, executable, mesh)


def search_batch(
    config: ConfigDict,
    where: Place,
    num_classes: int,
    images_per_device: int,
    labels_only: bool = False,
) -> tuple[CompiledStep, list[dict[str, Any]]]:
    """The step of the largest batch that fits a device, and what was tried.

    Args:
      config, where, num_classes, labels_only: as of `compile_train_step`.
      images_per_device: with which the search begins.

    Raises:
      UserError: not even one image fits, or one for each part of `accumulate`.
    """
    limit, unit = int(where.rates.gib * topologies.GIB), config.optimizer.accumulate
    fitting: list[CompiledStep] = []

    def measure(size: int) -> Trial:
        try:
            step = compile_train_step(config, where, num_classes, unit * size, labels_only)
        except DoesNotFit:
            return Trial(size, None)
        needed = step.report["memory_bytes"]
        trial = Trial(size, needed["total"], needed["arguments"] + needed["code"])
        if trial.fits(limit) and not (fitting and fitting[0].images_per_device > unit * size):
            fitting[:] = [step]
        return trial

    what = "images a device" if unit == 1 else f"times {unit} images a device"
    say = functools.partial(print, f"search ({what}):", flush=True)
    start = max(images_per_device // unit, 1)
    trials = largest_that_fits(measure, limit, start, MOST_IMAGES // unit, say)
    if not fitting:
        raise UserError(
            f"{config.name}: found no batch that fits {where.rates.gib:g} GiB, not even {unit} "
            f"images a device: {ADVICE}"
        )
    tried = [
        {"images_per_device": unit * t.size, "bytes": t.bytes, "fits": t.fits(limit)}
        for t in trials
    ]
    return fitting[0], tried


def plan(
    config: ConfigDict,
    name: str,
    num_classes: int,
    images_per_device: int,
    photos: int,
    labels_only: bool = False,
) -> tuple[dict[str, Any], list[flops.Operation]]:
    """What can be said without a compiler, and the operations of a step on one device."""
    where = find_place(name)
    mesh = distributed.make_mesh(jax.devices()[:1])
    step = make_step(config, mesh, num_classes, images_per_device, labels_only)
    platform = "cuda" if where.is_gpu else "tpu"
    arguments = (step.state, step.batch, step.rate)
    found = roofline.merged(flops.operations(step.jitted, *arguments, platform=platform))
    batch_size = images_per_device * where.devices
    others = step.program.label_share
    epoch = math.ceil(math.ceil(photos / batch_size) / (1 - others))  # of the photos with boxes
    steps_of_run = total_steps(step.program.optimizer, epoch)
    steps = round(steps_of_run * (others if labels_only else 1 - others))
    summed_bytes = step.parameters * jnp.dtype(step.program.optimizer.reduce_dtype).itemsize
    bound = roofline.step_seconds(found, summed_bytes, where)
    step_flops = sum(op.flops for op in found)
    high, likely, low = (sum(bound.values()) / share for share in roofline.REACHED)
    peak = where.rates.tflops * 1e12
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step.state))
    report = {
        "config": config.name,
        "slice": name,
        "devices": where.devices,
        "chips": where.chips,
        "hosts": where.hosts,
        "images_per_device": images_per_device,
        "global_batch": batch_size,
        "canvas": list(step.batch["image"].shape[1:3]),
        "canvases": [list(shape) for shape in step.program.shapes],
        "num_classes": num_classes,
        "parameters": step.parameters,
        "flops_per_image": step_flops / images_per_device,
        "bound_seconds": bound,
        "step_seconds": [low, high],
        "mfu": [step_flops / seconds / peak for seconds in (high, low)],
        "images_per_second": [batch_size / seconds for seconds in (high, low)],
        "steps": steps,
        "steps_of_run": steps_of_run,
        "hours": steps * likely / 3600,
        "checkpoint_bytes": state_bytes,
    }
    return report, found


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Python file with get_config(arg).")
    flags.mark_flag_as_required("config")
    text = "KIND-SIZE[xSLICES], such as v3-512 or v6e-256x2, or GPUs such as h100-8x4."
    flags.DEFINE_string("slice", "v3-512", text)
    flags.DEFINE_bool("compile", True, "Also compile the program, which takes minutes.")
    flags.DEFINE_integer("num_classes", 500, "Classes of the data set.")
    text = "Images (or crops) of one device. Default: its share of config.data.batch_size, else 2."
    flags.DEFINE_integer("images_per_device", None, text, lower_bound=1)
    text = "Finds the largest number of images of a device that fits, from --images_per_device on."
    flags.DEFINE_enum("search", None, ["batch"], text)
    flags.DEFINE_string("save", None, "Also write the compiled program here, local or gs://.")
    flags.DEFINE_integer("photos", OPENIMAGES, "Training photos of the schedule.", lower_bound=1)
    flags.DEFINE_bool("labels_only", False, "The step of image-level labels of such a config.")
    flags.DEFINE_float("images_per_core", 74.0, "Photos that one core of a host reads in a second.")
    flags.DEFINE_float("storage_rate", 0.25, "GB/s at which checkpoints are written; assumed.")
    flags.DEFINE_float("price", 0.0, "Of a chip-hour.")
    flags.DEFINE_string("json", None, "Also write the report here.")


def check_flags() -> None:
    """Refuses what only a compiled program could answer.

    Raises:
      UserError: names the flag.
    """
    values = flags.FLAGS
    for name in ("search", "save"):
        if getattr(values, name) and not values.compile:
            raise UserError(
                f"--{name}: found --nocompile, expected the compiler: the roofline knows neither "
                "the memory nor the program of a step"
            )


def main() -> None:
    values = flags.FLAGS
    check_flags()
    where = find_place(values.slice)
    if values.compile:
        topologies.topology(where)  # refused before anything is traced
    config, labels_only = values.config, values.labels_only
    asked = values.images_per_device
    images, note = images_of_device(config.data.batch_size, where.devices, asked)
    if note and not values.search:
        print(note)
    step: CompiledStep | None = None
    tried: list[dict[str, Any]] = []
    if values.search:
        step, tried = search_batch(config, where, values.num_classes, images, labels_only)
        images = step.images_per_device
    sizes = (values.num_classes, images)
    report, found = plan(config, values.slice, *sizes, values.photos, labels_only)
    report |= {name: values[name].value for name in ("images_per_core", "storage_rate", "price")}
    if values.compile:
        step = step or compile_train_step(config, where, *sizes, labels_only)
        report |= step.report
    if tried:
        report["search"] = tried
    print_report(report)
    if values.json:
        write_json(values.json, report | {"operations": [list(op) for op in found]})
    if step is None:
        return
    if values.save:
        save_program(values.save, step.executable, list(step.mesh.devices.flat), report)
        print(f"  program in {values.save}: scripts.bench.run_program runs it on such a slice")
    if report["memory_bytes"]["total"] > report["hbm_bytes"]:
        raise UserError(
            f"{report['config']} needs {report['memory_bytes']['total'] / topologies.GIB:.2f} GiB "
            f"per device of {values.slice}, expected at most "
            f"{report['hbm_bytes'] / topologies.GIB:.0f} GiB: {ADVICE}"
        )


if __name__ == "__main__":
    define_flags()
    run_main(main)
