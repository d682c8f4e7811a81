"""Compiles a training step for a TPU slice, on a machine without TPU, and reports on it.

    pip install libtpu
    python -m scripts.plan_pod --config=configs/detection/r50.py --slice=v3-512
    python -m scripts.plan_pod --config=configs/segmentation/hrnet_w48_112.py --images_per_device=16
    python -m scripts.plan_pod --config=configs/detection/lvis_r50.py --slice=v3-8 \\
        --num_classes=1230 --photos=56740

Prints memory per device and headroom, FLOPs per image, about how long the config's schedule takes
on --photos training photos (OpenImages' 1.74 million), traffic between devices and compile time.
Exits with status 1 when the program does not fit the device's memory.
"""

import os

# Before JAX starts: the host computes nothing, and there is no TPU metadata server to ask.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")

import dataclasses
import time
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags

from common.data import canvases
from common.io.atomic import write_json
from common.io.commands import run_main
from common.io.errors import UserError
from common.nn.layers import norm
from common.training import distributed
from common.training.optimizer import OptimizerSettings, make_optimizer, total_steps
from common.training.pod import flops, topologies
from common.training.step import init_state, jit_train_step, variable_shapes
from detection import batch_fields
from detection.models import faster_rcnn, two_stage
from detection.settings import read_run
from segmentation import batch_fields as crop_fields
from segmentation import settings as segmentation_settings
from segmentation.models import segmenter

OPENIMAGES = 1_743_042  # training photos
# Share of the slice's peak that a run is thought to reach. The images/s that MLPerf published of
# Mask R-CNN (v0.7 on v3, v1.0 on v4), at the FLOPs counted here, make a quarter to a third.
UTILISATION = 0.25


class Program(NamedTuple):
    """What a product trains: its model, the batches that the model reads, and how it learns."""

    model: nn.Module
    init_batch: dict[str, jax.ShapeDtypeStruct]
    batch: dict[str, jax.ShapeDtypeStruct]
    frozen_pattern: str
    optimizer: OptimizerSettings
    shapes: list[tuple[int, int]]  # height, width of the photos of all programs of the run


def program(config: ConfigDict, num_classes: int, batch_size: int) -> Program:
    """The program of a config of detection or segmentation, by its `task`.

    Raises:
      UserError: another task, or a field that is out of range.
    """
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
    return Program(
        faster_rcnn.build(settings.model, num_classes, distributed.DATA_AXIS),
        batch_fields.init_shapes(settings.data),
        batch_fields.train_shapes(settings.data, batch_size, num_classes),
        two_stage.frozen_pattern(settings.model),
        settings.optimizer,
        canvases.train_shapes(settings.data),
    )


def compile_train_step(
    config: ConfigDict,
    slice_name: str,
    num_classes: int,
    images_per_device: int,
    photos: int = OPENIMAGES,
) -> dict:
    """Compiles the step and returns the report as plain values (bytes, seconds, counts)."""
    slice_, devices = topologies.slice_devices(slice_name)
    mesh = distributed.make_mesh(devices)
    batch_size = images_per_device * mesh.size
    steps_per_epoch = max(photos // batch_size, 1)
    model, init_batch, batch, frozen, optimizer, images = program(config, num_classes, batch_size)
    shapes = variable_shapes(model, init_batch)
    tx = make_optimizer(optimizer, shapes["params"], frozen)
    state = jax.eval_shape(lambda: init_state(model, tx, config.seed, init_batch))
    step = jit_train_step(model, tx, mesh, optimizer.accumulate)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    start = time.perf_counter()
    compiled = step.lower(state, batch, rate).compile()
    seconds = time.perf_counter() - start
    traffic = topologies.traffic(compiled)
    step_flops = flops.count(step, state, batch, rate)
    steps = total_steps(optimizer, steps_per_epoch)
    return {
        "config": config.name,
        "slice": slice_name,
        "devices": mesh.size,
        "images_per_device": images_per_device,
        "global_batch": batch_size,
        "canvas": list(batch["image"].shape[1:3]),
        "canvases": [list(shape) for shape in images],
        "num_classes": num_classes,
        "parameters": sum(x.size for x in jax.tree.leaves(shapes["params"])),
        "hbm_bytes": int(slice_.hbm_gib * topologies.GIB),
        "memory_bytes": topologies.memory(compiled),
        "flops_per_image": step_flops / images_per_device,
        "steps": steps,
        "hours": steps * step_flops / (slice_.tflops * 1e12 * UTILISATION) / 3600,
        "collectives": None if traffic is None else [dataclasses.asdict(c) for c in traffic],
        "compile_seconds": seconds,
    }


def print_report(report: dict) -> None:
    """The report as a page for people."""
    height, width = report["canvas"]
    print(
        f"{report['config']} on {report['slice']}: {report['devices']} devices x "
        f"{report['images_per_device']} images of {height}x{width}, {report['num_classes']} "
        f"classes, {report['parameters'] / 1e6:.1f} M parameters"
    )
    names = ", ".join(f"{h}x{w}" for h, w in report["canvases"])
    print(f"  programs of the run: {names}; the figures are those of {height}x{width}")
    for name, size in report["memory_bytes"].items():
        print(f"  memory {name:<12}{size / topologies.GIB:8.3f} GiB per device")
    headroom = report["hbm_bytes"] - report["memory_bytes"]["total"]
    print(
        f"  memory {'headroom':<12}{headroom / topologies.GIB:8.3f} GiB under "
        f"{report['hbm_bytes'] / topologies.GIB:.0f} GiB"
    )
    print(
        f"  compute {report['flops_per_image'] / 1e12:.3f} TFLOP per image; {report['steps']} "
        f"steps in about {report['hours']:.1f} h, at {UTILISATION:.0%} of the slice's peak"
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
    flags.DEFINE_string("slice", "v3-512", "TPU slice; a wrong name lists those that are known.")
    flags.DEFINE_integer("num_classes", 500, "Classes of the data set.")
    flags.DEFINE_integer("images_per_device", 2, "Images (or crops) of one device.")
    flags.DEFINE_integer("photos", OPENIMAGES, "Training photos.", lower_bound=1)
    flags.DEFINE_string("json", None, "Also write the report here.")


def main() -> None:
    report = compile_train_step(
        flags.FLAGS.config,
        flags.FLAGS.slice,
        flags.FLAGS.num_classes,
        flags.FLAGS.images_per_device,
        flags.FLAGS.photos,
    )
    print_report(report)
    if flags.FLAGS.json:
        write_json(flags.FLAGS.json, report)
    if report["memory_bytes"]["total"] > report["hbm_bytes"]:
        raise UserError(
            f"{report['config']} needs {report['memory_bytes']['total'] / topologies.GIB:.2f} GiB "
            f"per device of {flags.FLAGS.slice}, expected at most "
            f"{report['hbm_bytes'] / topologies.GIB:.0f} GiB: try --config.model.remat=True or a "
            "smaller canvas"
        )


if __name__ == "__main__":
    define_flags()
    run_main(main)
