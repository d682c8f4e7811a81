"""Plans a training on a TPU slice or on GPUs, on a machine without either.

    python -m scripts.plan_pod --config=configs/detection/r50.py --slice=v6e-256 --nocompile
    python -m scripts.plan_pod --config=configs/detection/r50.py --slice=v3-512
    python -m scripts.plan_pod --config=configs/segmentation/hrnet_w48_112.py --images_per_device=16
    python -m scripts.plan_pod --config=configs/detection/lvis_r50.py --slice=v3-8 \\
        --num_classes=1230 --photos=56740

Predicts the time of a step from a roofline (`common.training.pod.roofline`): the share of the peak,
images/s, cores that the input needs, hours of the config's schedule on --photos training photos
(OpenImages' 1.74 million), chip-hours and their --price. With the compiler of the package libtpu it
also compiles the step for the slice and prints memory per device and headroom, traffic between
devices and compile time; it exits with status 1 when the program does not fit the device's memory.
"""

import os

# Before JAX starts: the host computes nothing, and there is no TPU metadata server to ask.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")

import dataclasses
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from common.data import canvases
from common.io.atomic import write_json
from common.io.commands import run_main
from common.io.errors import UserError
from common.nn.layers import norm
from common.training import distributed
from common.training.optimizer import OptimizerSettings, make_optimizer, total_steps
from common.training.pod import flops, roofline, topologies
from common.training.pod.places import Place, find_place
from common.training.step import TrainState, init_state, jit_train_step, variable_shapes
from detection import batch_fields
from detection.models import faster_rcnn, two_stage
from detection.settings import read_run
from segmentation import batch_fields as crop_fields
from segmentation import settings as segmentation_settings
from segmentation.models import segmenter

OPENIMAGES = 1_743_042  # training photos


class Program(NamedTuple):
    """What a product trains: its model, the batches that the model reads, and how it learns."""

    model: nn.Module
    init_batch: dict[str, jax.ShapeDtypeStruct]
    batch: dict[str, jax.ShapeDtypeStruct]
    frozen_pattern: str
    optimizer: OptimizerSettings
    shapes: list[tuple[int, int]]  # height, width of the photos of all programs of the run


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
        canvases.train_shapes(data),
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
    tx = make_optimizer(made.optimizer, shapes["params"], made.frozen_pattern)
    state = jax.eval_shape(lambda: init_state(made.model, tx, config.seed, made.init_batch))
    parameters = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    optimizer = made.optimizer
    jitted = jit_train_step(made.model, tx, mesh, optimizer.accumulate, optimizer.reduce_dtype)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return Step(jitted, state, made.batch, rate, parameters, made)


def compile_train_step(
    config: ConfigDict,
    where: Place,
    num_classes: int,
    images_per_device: int,
    labels_only: bool = False,
) -> dict[str, Any]:
    """Compiles the step and reports its memory and traffic as plain values (bytes, seconds)."""
    mesh = distributed.make_mesh(topologies.slice_devices(where))
    step = make_step(config, mesh, num_classes, images_per_device, labels_only)
    start = time.perf_counter()
    compiled = step.jitted.lower(step.state, step.batch, step.rate).compile()
    seconds = time.perf_counter() - start
    traffic = topologies.traffic(compiled)
    return {
        "hbm_bytes": int(where.rates.gib * topologies.GIB),
        "memory_bytes": topologies.memory(compiled),
        "collectives": None if traffic is None else [dataclasses.asdict(c) for c in traffic],
        "compile_seconds": seconds,
    }


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
    steps = total_steps(step.program.optimizer, max(photos // batch_size, 1))
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
        "hours": steps * likely / 3600,
        "checkpoint_bytes": state_bytes,
    }
    return report, found


def print_report(report: dict[str, Any]) -> None:
    """The report as a page for people."""
    height, width = report["canvas"]
    print(
        f"{report['config']} on {report['slice']}: {report['devices']} devices x "
        f"{report['images_per_device']} images of {height}x{width}, {report['num_classes']} "
        f"classes, {report['parameters'] / 1e6:.1f} M parameters"
    )
    names = ", ".join(f"{h}x{w}" for h, w in report["canvases"])
    print(f"  programs of the run: {names}; the figures are those of {height}x{width}")
    print_prediction(report)
    if "memory_bytes" in report:
        print_program(report)


def print_prediction(report: dict[str, Any]) -> None:
    """Times, which are computed and not measured."""

    def span(values, unit: str = "") -> str:
        return f"{values[0]:.3g} to {values[1]:.3g}{unit}"

    bound, (low, high) = report["bound_seconds"], report["step_seconds"]
    parts = sorted(bound.items(), key=lambda item: -item[1])
    print(f"  compute {report['flops_per_image'] / 1e12:.3f} TFLOP per image")
    print(f"  step at best {1000 * sum(bound.values()):.1f} ms by the roofline")
    for name, seconds in parts:
        print(f"    {name:<30}{1000 * seconds:8.2f} ms")
    print(
        f"  step expected {span((1000 * low, 1000 * high), ' ms')}: "
        f"{span([100 * x for x in report['mfu']], ' %')} of the peak, "
        f"{span(report['images_per_second'])} images/s"
    )
    per_host = [rate / report["hosts"] for rate in report["images_per_second"]]
    cores = [rate / flags.FLAGS.images_per_core for rate in per_host]
    print(
        f"  input {span(per_host)} images/s a host: {span(cores)} cores at "
        f"{flags.FLAGS.images_per_core:g} images/s each (scripts.bench.bench_input measures it)"
    )
    size = report["checkpoint_bytes"] / 1e9
    print(
        f"  checkpoint {size:.2f} GB: {size / flags.FLAGS.storage_rate:.1f} s at "
        f"{flags.FLAGS.storage_rate:g} GB/s, beside the steps"
    )
    hours = [report["steps"] * seconds / 3600 for seconds in (low, high)]
    chip_hours = [report["chips"] * h for h in hours]
    cost = f", cost {span([flags.FLAGS.price * h for h in chip_hours])}"
    print(
        f"  schedule {report['steps']} steps: {span(hours, ' h')}, {span(chip_hours)} chip-hours"
        f"{cost if flags.FLAGS.price else ''}"
    )


def print_program(report: dict[str, Any]) -> None:
    """What the compiled program needs."""
    for name, size in report["memory_bytes"].items():
        print(f"  memory {name:<12}{size / topologies.GIB:8.3f} GiB per device")
    headroom = report["hbm_bytes"] - report["memory_bytes"]["total"]
    print(
        f"  memory {'headroom':<12}{headroom / topologies.GIB:8.3f} GiB under "
        f"{report['hbm_bytes'] / topologies.GIB:.0f} GiB"
    )
    if report["collectives"] is None:
        print("  traffic unknown: this jaxlib cannot read the program that libtpu compiled")
    for c in report["collectives"] or ():
        print(
            f"  traffic {c['kind']} {c['dtype']}: {c['count']} arrays, {c['bytes'] / 1e6:.3f} MB, "
            f"largest {c['largest']}"
        )
    print(f"  compiled in {report['compile_seconds']:.0f} s")


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Python file with get_config(arg).")
    flags.mark_flag_as_required("config")
    text = "KIND-SIZE[xSLICES], such as v3-512 or v6e-256x2, or GPUs such as h100-8x4."
    flags.DEFINE_string("slice", "v3-512", text)
    flags.DEFINE_bool("compile", True, "Also compile the program, which takes minutes.")
    flags.DEFINE_integer("num_classes", 500, "Classes of the data set.")
    flags.DEFINE_integer("images_per_device", 2, "Images (or crops) of one device.")
    flags.DEFINE_integer("photos", OPENIMAGES, "Training photos of the schedule.", lower_bound=1)
    flags.DEFINE_bool("labels_only", False, "The step of image-level labels of such a config.")
    flags.DEFINE_float("images_per_core", 74.0, "Photos that one core of a host reads in a second.")
    flags.DEFINE_float("storage_rate", 0.25, "GB/s at which checkpoints are written; assumed.")
    flags.DEFINE_float("price", 0.0, "Of a chip-hour.")
    flags.DEFINE_string("json", None, "Also write the report here.")


def main() -> None:
    values = flags.FLAGS
    where = find_place(values.slice)
    if values.compile:
        topologies.topology(where)  # refused before anything is traced
    sizes = (values.num_classes, values.images_per_device)
    labels_only = values.labels_only
    report, found = plan(values.config, values.slice, *sizes, values.photos, labels_only)
    if values.compile:
        report |= compile_train_step(values.config, where, *sizes, labels_only)
    print_report(report)
    if values.json:
        write_json(values.json, report | {"operations": [list(op) for op in found]})
    if values.compile and report["memory_bytes"]["total"] > report["hbm_bytes"]:
        raise UserError(
            f"{report['config']} needs {report['memory_bytes']['total'] / topologies.GIB:.2f} GiB "
            f"per device of {values.slice}, expected at most "
            f"{report['hbm_bytes'] / topologies.GIB:.0f} GiB: try --config.model.remat=True or a "
            "smaller canvas"
        )


if __name__ == "__main__":
    define_flags()
    run_main(main)
