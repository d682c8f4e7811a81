"""Speed of the input pipeline, in five parts.

    python -m scripts.bench.bench_input --dataset=DIR --part=plan,padding,decoders,batches,emulated

plan      time per global batch on a generated index of OpenImages' size (1.74 M images, 12.2 M
          boxes, 500 classes), building the plan and its memory, and the statistics of the boxes
          that elaborate augmentation needs; needs no dataset
padding   share of the canvases' pixels that is padding, and of the photos that reach the short side
          of the canvas: all photos on the landscape canvas, against canvases of both orientations
decoders  one photo to one canvas: `common.data.images` against the same steps in tf.image, CPU time
          and the ratio; photos of the dataset as they are, and enlarged to the sizes given
batches   images/s of `train_batches` as training sees them, plain and with elaborate augmentation
          (section 5.3), photos as they are and enlarged: OpenImages' usual size is 768x1024
emulated  the same as if with more cores (`--emulate_cores`) and slower storage (`--latency_ms`), by
          one process and by several (`--processes`): decoding and resizing are slept through, all
          that the interpreter does is done (`scripts.bench.emulated_loader`). On few real cores
          that alone is the limit
"""

import dataclasses
import functools
import io
import itertools
import math
import os
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import tensorflow as tf
from absl import flags
from PIL import Image

from common.data import images, placement
from common.data import input as input_module
from common.data.box_shapes import find_box_shapes
from common.data.canvases import is_portrait, orientations
from common.data.dataset import Dataset
from common.data.input import train_batches
from common.data.plans.plan import train_plan
from common.data.settings import DataSettings, ElaborateSettings, Sampler
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.settings import read_settings
from configs.detection import base
from scripts.bench.emulated_loader import EmulatedLoader
from scripts.bench.generated import generated_index
from scripts.bench.timing import peak_mib

_PARTS = ("plan", "padding", "decoders", "batches", "emulated")


def define_flags() -> None:
    flags.DEFINE_string("dataset", "", "dataset directory of scripts.prepare_data")
    flags.DEFINE_string("split", "train", "its split")
    flags.DEFINE_list("part", list(_PARTS), f"what to measure: {', '.join(_PARTS)}")
    flags.DEFINE_list("canvas", ["384x384", "800x1333"], "canvases, SHORTxLONG")
    flags.DEFINE_list(
        "photo", ["as_is", "768x1024", "3000x4000"], "sizes that the photos are enlarged to first"
    )
    flags.DEFINE_integer("batch_size", 8, "images of a batch (part batches)")
    flags.DEFINE_integer("steps", 60, "batches to time (part batches)")
    flags.DEFINE_list(
        "augmentation",
        ["plain", "crop"],
        "plain, crop, resize: data.elaborate.scale (part batches)",
    )
    flags.DEFINE_integer("photos", 64, "photos of each format that are enlarged (part batches)")
    flags.DEFINE_integer("mask_size", 0, "data.mask_size (part batches)")
    flags.DEFINE_integer("threads", 0, "data.num_threads, 0: automatic (part batches)")
    flags.DEFINE_list(
        "processes", ["1"], "data.num_processes, one after the other (parts batches and emulated)"
    )
    flags.DEFINE_integer("emulate_cores", 32, "cores that decode (part emulated)", lower_bound=1)
    flags.DEFINE_float("latency_ms", 0.0, "until a file begins to come (part emulated)")


def main() -> None:
    unknown = set(flags.FLAGS.part) - set(_PARTS)
    if unknown:
        raise UserError(f"--part={','.join(unknown)}: expected some of {','.join(_PARTS)}")
    for name in flags.FLAGS.augmentation:
        if name not in ("plain", "crop", "resize"):
            raise UserError(f"--augmentation={name}: expected plain, crop or resize")
    if "plan" in flags.FLAGS.part:
        bench_plan()
    if set(flags.FLAGS.part) - {"plan"}:
        if not flags.FLAGS.dataset:
            raise UserError("--dataset is empty: expected a dataset directory (or --part=plan)")
        dataset = Dataset.open(flags.FLAGS.dataset)
        if "padding" in flags.FLAGS.part:
            bench_padding(dataset)
        if "decoders" in flags.FLAGS.part:
            bench_decoders(dataset)
        if "batches" in flags.FLAGS.part:
            bench_batches(dataset)
        if "emulated" in flags.FLAGS.part:
            bench_emulated(dataset)


# -------------------------------------------------------------------------------------- plan


def bench_plan() -> None:
    """Plans over an index of OpenImages' size with a long-tailed class distribution."""
    index = generated_index(num_images=1_743_042, num_boxes=12_195_144, num_classes=500)
    for sampler in typing.get_args(Sampler):
        before = peak_mib()
        start = time.perf_counter()
        plan = train_plan(index, _settings((800, 1333), sampler=sampler, batch_size=1024), 0)
        built = time.perf_counter() - start
        start = time.perf_counter()
        for step in range(50):
            plan.batch(step * 1000)
        each = (time.perf_counter() - start) / 50
        print(
            f"plan {sampler:16} built in {built:5.2f} s (peak memory +{peak_mib() - before:.0f} "
            f"MiB), batch(1024) {each * 1e3:5.2f} ms",
            flush=True,
        )

    start = time.perf_counter()
    shapes = find_box_shapes(index, index.split("train"), 0)
    print(
        f"shapes of {shapes.counts.sum():,} boxes found in {time.perf_counter() - start:5.2f} s "
        f"(peak memory {peak_mib():.0f} MiB)",
        flush=True,
    )


# -------------------------------------------------------------------------------------- padding


def bench_padding(dataset: Dataset) -> None:
    """Uniform draws of the photos of the split whose size the dataset knows."""
    sizes = np.asarray(dataset.image_sizes[dataset.split(flags.FLAGS.split)])
    sizes = sizes[(sizes > 0).all(axis=1)]
    for text in flags.FLAGS.canvas:
        landscape, portrait = orientations(_size(text))
        upright = is_portrait(sizes)
        for name, canvases in (
            ("one canvas", np.tile(landscape, (len(sizes), 1))),
            ("two orientations", np.where(upright[:, None], portrait, landscape)),
        ):
            ratio = (canvases / sizes).min(axis=1, keepdims=True)
            content = np.floor(sizes * ratio + 0.5)
            shapes = np.array([images.canvas_shape(tuple(c), 32) for c in canvases.tolist()])
            padding = 1 - content.prod(axis=1).sum() / shapes.prod(axis=1).sum()
            full = (content.min(axis=1) >= min(landscape)).mean()
            print(
                f"padding {text:8} {name:16}: {padding:6.1%} of the pixels, {full:6.1%} of "
                f"{len(sizes)} photos ({upright.mean():.1%} portraits) at short side "
                f"{min(landscape)}",
                flush=True,
            )


# -------------------------------------------------------------------------------------- decoders


def bench_decoders(dataset: Dataset) -> None:
    chosen = dataset.split(flags.FLAGS.split)[:24]
    encoded = [images.read_file(dataset.image_file(int(i))) for i in chosen]
    for photo, canvas in itertools.product(flags.FLAGS.photo, flags.FLAGS.canvas):
        jpegs = encoded if photo == "as_is" else [enlarge(data, _size(photo)) for data in encoded]
        height, width = _size(canvas)
        with_pillow = cpu_time(functools.partial(pillow_canvas, (height, width)), jpegs)
        plain = cpu_time(tf_canvas(height, width, antialias=False), jpegs)
        filtered = cpu_time(tf_canvas(height, width, antialias=True), jpegs)
        print(
            f"decoders {photo:>9} -> {canvas:8}: Pillow {with_pillow * 1e3:5.1f} ms of CPU, "
            f"tf.image {plain * 1e3:5.1f} (antialiased {filtered * 1e3:5.1f}), "
            f"ratio {with_pillow / plain:.2f} ({with_pillow / filtered:.2f})",
            flush=True,
        )


def pillow_canvas(canvas: tuple[int, int], data: bytes) -> np.ndarray:
    photo = images.open_photo(data)
    return placement.draw(photo, placement.fit(photo.size, canvas), canvas)


def tf_canvas(height: int, width: int, *, antialias: bool) -> Callable[[bytes], np.ndarray]:
    """The same steps in TensorFlow operations."""

    @tf.function(input_signature=[tf.TensorSpec((), tf.string)])
    def draw(data: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_jpeg(data, 3)
        size = tf.cast(tf.shape(image)[:2], tf.float32)
        full = tf.round(size * tf.reduce_min(tf.constant([height, width], tf.float32) / size))
        image = tf.image.resize(image, tf.cast(full, tf.int32), antialias=antialias)
        image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        return tf.image.pad_to_bounding_box(image, 0, 0, height, width)

    return lambda data: draw(data).numpy()


def enlarge(data: bytes, size: tuple[int, int]) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def cpu_time(function: Callable[[bytes], Any], jpegs: list[bytes]) -> float:
    """CPU seconds of one call, all threads together, over at least two seconds."""
    function(jpegs[0])
    calls, start = 0, time.process_time()
    while time.process_time() - start < 2.0:
        function(jpegs[calls % len(jpegs)])
        calls += 1
    return (time.process_time() - start) / calls


# -------------------------------------------------------------------------------------- batches


def bench_batches(dataset: Dataset) -> None:
    """The plain pipeline, and each augmentation of `--augmentation` against it."""
    for photo, canvas, photos in each_size(dataset):
        plain = None
        for name, count in itertools.product(flags.FLAGS.augmentation, flags.FLAGS.processes):
            took = time_batches(photos, _batch_settings(_size(canvas), name, int(count)))
            plain = plain or took.wall
            print(
                f"batches {canvas:8} photos {photo:9} {name:7} {count:>2} processes: "
                f"{1 / took.wall:6.1f} images/s ({plain / took.wall:.2f}x), "
                f"{took.cpu * 1e3:.1f} ms of CPU an image, {took.cpu / took.wall:.1f} cores busy",
                flush=True,
            )


def each_size(dataset: Dataset) -> Iterator[tuple[str, str, Dataset]]:
    """The dataset with photos of each size of `--photo`, for each canvas: both, and the dataset."""
    for photo, canvas in itertools.product(flags.FLAGS.photo, flags.FLAGS.canvas):
        with tempfile.TemporaryDirectory() as folder:
            same = photo == "as_is"
            yield photo, canvas, dataset if same else enlarged(dataset, _size(photo), Path(folder))


class Took(NamedTuple):
    """Seconds of an image: of wall clock, of the CPU in all processes, and in that of the run."""

    wall: float
    cpu: float
    own: float


def time_batches(dataset: Dataset, settings: DataSettings) -> Took:
    """Time of `train_batches`, after some steps that warm it up."""
    plan, warm_up, steps = train_plan(dataset, settings, 0), 5, flags.FLAGS.steps
    # More steps than are timed, so that no process runs out of photos, nor ends.
    total = warm_up + steps + 2 * settings.prefetch + 64
    batches = train_batches(dataset, plan, settings, seed=0, num_steps=total)
    for _ in range(warm_up):
        next(batches)
    before = _clocks()
    for _ in range(steps):
        next(batches)
    count = steps * settings.batch_size
    return Took(*((after - start) / count for after, start in zip(_clocks(), before, strict=True)))


def _clocks() -> tuple[float, float, float]:
    """Seconds of wall clock, CPU of this process and those that it started, and of this alone."""
    own = total = time.process_time()
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), total, own


def _batch_settings(canvas: tuple[int, int], augmentation: str, processes: int) -> DataSettings:
    settings = _settings(
        canvas,
        train_split=flags.FLAGS.split,
        batch_size=flags.FLAGS.batch_size,
        mask_size=flags.FLAGS.mask_size,
        num_processes=processes,
        num_threads=flags.FLAGS.threads,
    )
    if augmentation == "plain":
        return settings
    elaborate = {**base.ELABORATE, "scale": augmentation}
    return dataclasses.replace(
        settings, elaborate=read_settings(ElaborateSettings, elaborate, "--augmentation")
    )


# -------------------------------------------------------------------------------------- emulated


def bench_emulated(dataset: Dataset) -> None:
    """Images/s on more cores than there are, as far as the interpreters on these let them."""
    cores, latency = flags.FLAGS.emulate_cores, flags.FLAGS.latency_ms / 1e3
    for photo, canvas, photos in each_size(dataset):
        seconds = draw_seconds(photos, _size(canvas))
        for name, count in itertools.product(flags.FLAGS.augmentation, flags.FLAGS.processes):
            # So many that all cores work while the others wait for the storage.
            threads = cores + math.ceil(cores * latency / seconds)
            settings = dataclasses.replace(
                _batch_settings(_size(canvas), name, int(count)), num_threads=threads
            )
            loader = functools.partial(
                EmulatedLoader,
                cores=math.ceil(cores / int(count)),
                latency=latency,
                draw_seconds=seconds,
            )
            with mock.patch.object(input_module, "TrainingLoader", loader):
                took = time_batches(photos, settings)
            print(
                f"emulated {canvas:8} photos {photo:9} {name:7} {count:>2} processes: "
                f"{1 / took.wall:6.1f} images/s of {cores / seconds:.0f} that {cores} cores decode "
                f"and resize ({seconds * 1e3:.1f} ms), latency {latency * 1e3:g} ms; "
                f"{took.cpu * 1e3:.2f} ms of CPU an image beside that, {took.own * 1e3:.2f} in the "
                f"process of the run, {took.cpu / took.wall:.2f} cores busy",
                flush=True,
            )


def draw_seconds(dataset: Dataset, canvas: tuple[int, int]) -> float:
    """CPU seconds that decoding and resizing a photo take, and nothing else does."""
    chosen = dataset.split(flags.FLAGS.split)[:24]
    jpegs = [images.read_file(dataset.image_file(int(index))) for index in chosen]

    def draw(data: bytes) -> Any:
        photo = images.open_photo(data)
        geometry = placement.fit(photo.size, canvas)
        pixels = images.decode(photo, geometry.full)
        return images.resample(pixels, (0.0, 0.0, 1.0, 1.0), geometry.content)

    return cpu_time(draw, jpegs)


def enlarged(dataset: Dataset, size: tuple[int, int], folder: Path) -> Dataset:
    """The dataset with its photos enlarged to a size, each in its own orientation.

    Only `--photos` photos of the split are; all others of it show one of them.
    """
    members = dataset.split(flags.FLAGS.split)
    portrait = is_portrait(dataset.image_sizes[members])
    sizes, paths = np.array(dataset.image_sizes), np.array(dataset.image_paths, dtype=object)
    for upright in (False, True):
        chosen = members[portrait == upright]
        shape = size[::-1] if upright else size
        names = []
        for index in chosen[: flags.FLAGS.photos].tolist():
            names.append(f"{index}.jpg")
            data = images.read_file(dataset.image_file(index))
            (folder / names[-1]).write_bytes(enlarge(data, shape))
        sizes[chosen] = shape
        paths[chosen] = [names[place % len(names)].encode() for place in range(len(chosen))]
    meta = dataset.meta | {"image_root": str(folder)}
    return dataclasses.replace(dataset, image_sizes=sizes, image_paths=paths, meta=meta)


def _settings(canvas: tuple[int, int], **changes: Any) -> DataSettings:
    settings = read_settings(DataSettings, base.get_config().data, "config.data")
    return dataclasses.replace(settings, canvas=canvas, **changes)


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split("x"))
    except ValueError as error:
        raise UserError(f"size {text!r}: expected HEIGHTxWIDTH, e.g. 800x1333") from error
    return height, width


if __name__ == "__main__":
    define_flags()
    run_main(main)
