"""Times prediction beside the compiled step alone, and the start of detection.predict.

    python -m scripts.bench.bench_predict

R50-FPN as in `scripts.bench.bench_train_step` (random weights, 501-way, float32) on JPEGs of
512x512: `detection.load` and its `stream` over the files, against the model on an array that is
there already (as many at a time, and 2, as that bench has), in turns. Then `python -m
detection.predict` on one photo, from start to end: its program comes from the compile cache of the
turns before. Prints seconds a photo (medians) and their ratios, and the seconds of the command.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

from common.data.dataset_writer import flat_hierarchy, write_classes
from common.io.commands import run_main
from common.training import distributed
from common.training.checkpoint import Checkpoints
from common.training.step import init_variables
from detection.batch_fields import init_shapes
from detection.detector import Detector
from detection.inference import compiled_predict_step
from detection.loading import load
from detection.models.faster_rcnn import build
from detection.settings import read_run
from scripts.bench.bench_train_step import our_config, prepared_params
from scripts.bench.timing import time_in_turns


def define_flags() -> None:
    flags.DEFINE_integer("photos", 8, "Photos of a turn.")
    flags.DEFINE_integer("rounds", 3, "Turns of each side.")
    flags.DEFINE_integer("size", 512, "Side of the photos, pixels.")
    flags.DEFINE_integer("classes", 500, "Classes.")


def write_run(folder: Path) -> Path:
    """A work directory with random weights."""
    config = our_config()
    config.data.canvas = (flags.FLAGS.size, flags.FLAGS.size)
    config.model.detections.score_threshold = 0.001  # so that random weights find something
    settings = read_run(config)
    model = build(settings.model, flags.FLAGS.classes)
    variables = jax.jit(lambda: init_variables(model, 0, init_shapes(settings.data)))()
    variables["params"] = prepared_params(variables["params"])
    labels = [f"class{number}" for number in range(flags.FLAGS.classes)]
    workdir = folder / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(settings.to_dict()))
    (workdir / "hierarchy.json").write_text(json.dumps(flat_hierarchy(labels)))
    write_classes(workdir / "classes.csv", labels, labels)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, variables, {}, wait=True)
        checkpoints.close()
    return workdir


def write_photos(folder: Path) -> list[Path]:
    """JPEGs that are neither flat nor noise."""
    rng, size = np.random.default_rng(0), flags.FLAGS.size
    paths = []
    for number in range(flags.FLAGS.photos):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        paths.append(folder / f"{number}.jpg")
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def step_alone(detector: Detector, path: Path, count: int) -> Callable[[], None]:
    """A function that runs the model on a photo that is there, `count` times at a time."""
    size = flags.FLAGS.size
    pixels = np.asarray(Image.open(path))
    batch = {
        "image": np.tile(pixels, (count, 1, 1, 1)),
        "image_size": np.full((count, 2), size, np.float32),
        "image_valid": np.ones(count, bool),
    }
    step = compiled_predict_step(detector.model, detector.mesh)

    def run() -> None:
        for _ in range(-(-flags.FLAGS.photos // count)):
            on_devices = distributed.to_global(batch, detector.mesh)
            distributed.to_host(step(detector.variables, on_devices))

    return run


def main() -> None:
    values = flags.FLAGS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workdir = write_run(folder)
        (folder / "photos").mkdir()
        paths = write_photos(folder / "photos")
        detector = load(workdir)
        found = sum(len(result) for _, result in detector.stream(paths))
        counts = (detector.batch_size, 2)
        alone = [step_alone(detector, paths[0], count) for count in counts]
        sides = [lambda: list(detector.stream(paths)), *alone]
        for call in sides:
            call()
        times = [np.median(t) / len(paths) for t in time_in_turns(sides, values.rounds)]
        print(f"{found / len(paths):.0f} detections a photo; prediction {times[0]:.3f} s a photo")
        for count, step in zip(counts, times[1:], strict=True):
            print(f"the step alone, {count} at a time: {step:.3f} s: {times[0] / step:.3f}x")
        command = [sys.executable, "-m", "detection.predict", f"--workdir={workdir}"]
        command += [f"--images={paths[0]}", f"--output={folder / 'x.parquet'}"]
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(
                f"detection.predict on one photo: {time.perf_counter() - start:.1f} s", flush=True
            )


if __name__ == "__main__":
    define_flags()
    run_main(main)
