"""Peak memory and speed of ensemble.merge at two numbers of images.

    python -m scripts.bench.bench_merge
    python -m scripts.bench.bench_merge --images=100000 --distinct=4    # full size, 4 GiB of disk

Default: 28 tables of 300 boxes an image, 500 classes, once 600 images and once 2400, merged with
configs/ensemble/naive.py. The tables are generated (clusters of boxes around objects that all
models see, in long-tailed classes) in a temporary folder, and each merge runs in a process of its
own. Prints rows per second, peak resident memory and the time of reading alone; exits with status 1
when the larger set needs over 10 % more memory than the smaller.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from common.io.commands import run_main
from common.io.errors import UserError
from common.tables import DetectionsReader, DetectionsWriter

_GROWTH = 1.1

# Peak memory of the process that merges, without that of this one.
_MERGE = """
import json, resource, sys, time
from common.io.memory import keep_freed_memory
keep_freed_memory()
from configs.ensemble import naive, voting
from ensemble.inputs import aligned_chunks, open_tables
from ensemble.merge import merge_tables
config = {"naive": naive, "voting": voting}[sys.argv[1]].get_config()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux
started = time.perf_counter()
tables = open_tables(sys.argv[3:])
opened = time.perf_counter()
rows = sum(len(chunk) for chunk in aligned_chunks(tables, rows=config.chunk_rows))
read, reading_peak = time.perf_counter(), peak()
del tables
merge_tables(sys.argv[3:], config, sys.argv[2])
print(json.dumps(dict(rows=rows, opening=opened - started, reading=read - opened,
    merging=time.perf_counter() - read, reading_peak=reading_peak, peak=peak())))
"""


def generate(path: Path, rng: np.random.Generator, shared: np.random.Generator) -> None:
    """Writes one table; `shared` draws the objects, alike for all tables."""
    images, boxes, classes = flags.FLAGS.images, flags.FLAGS.boxes, flags.FLAGS.classes
    labels = np.array([f"/m/{number:03d}" for number in range(classes)], object)
    with DetectionsWriter(path, {"model": path.stem, "dataset": "generated"}) as writer:
        for number in range(int(images[-1])):
            objects = max(boxes // 8, 1)
            centre = shared.uniform(0.1, 0.9, (objects, 2))
            side = np.exp(shared.normal(-2.5, 0.7, (objects, 2)))
            label = np.minimum(shared.geometric(0.02, objects), classes) - 1
            owner = rng.integers(0, objects, boxes)
            middle = centre[owner] + rng.normal(0, 0.1, (boxes, 2)) * side[owner]
            half = side[owner] * np.exp(rng.normal(0, 0.15, (boxes, 2))) / 2
            corners = np.clip(np.concatenate([middle - half, middle + half], axis=1), 0, 1)
            scores = rng.beta(0.3, 2.0, boxes).astype(np.float32)
            writer.add(f"image{number:07d}", labels[label[owner]], scores, corners)


def cut(path: Path, source: Path, images: int) -> None:
    """Writes the first images of a table as a table of its own."""
    reader = DetectionsReader(source)
    labels = [f"/m/{number:03d}" for number in range(flags.FLAGS.classes)]
    names = np.array(labels, object)
    with DetectionsWriter(path, reader.metadata) as writer:
        for chunk in reader.chunks(labels, images=range(images)):
            for rows in chunk.chunks(rows=1):
                image = reader.image_ids[rows.image_index[0]]
                writer.add(image, names[rows.label_index], rows.scores, rows.boxes)


def define_flags() -> None:
    flags.DEFINE_integer("tables", 28, "Models.")
    flags.DEFINE_list("images", ["600", "2400"], "Numbers of images, rising.")
    flags.DEFINE_integer("boxes", 300, "Boxes of each image and model.")
    flags.DEFINE_integer("classes", 500, "Classes.")
    flags.DEFINE_integer("distinct", 0, "Tables generated, the rest are links to them; 0: all.")
    flags.DEFINE_enum("operator", "naive", ["naive", "voting"], "Config to merge with.")


def main() -> int:
    options = flags.FLAGS
    sizes = [int(number) for number in options.images]
    if sizes != sorted(sizes):
        raise UserError(f"--images={','.join(options.images)}: expected rising numbers")
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        full = [Path(folder) / f"m{number:02d}.parquet" for number in range(options.tables)]
        for number, path in enumerate(full):
            if options.distinct and number >= options.distinct:
                os.link(full[number % options.distinct], path)
            else:
                generate(path, np.random.default_rng([1, number]), np.random.default_rng(0))
        print(f"generated in {time.perf_counter() - started:.0f} s", flush=True)
        for size in sizes:
            paths = full
            if size < sizes[-1]:
                paths = [Path(folder) / f"{size}-{path.name}" for path in full]
                for path, source in zip(paths, full, strict=True):
                    cut(path, source, size)
            result = subprocess.run(
                [sys.executable, "-c", _MERGE, options.operator, f"{folder}/out.parquet", *paths],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found = json.loads(result.stdout.splitlines()[-1])
            peaks.append(found["peak"])
            print(
                f"{options.tables} tables x {size} images x {options.boxes} boxes: "
                f"{found['rows'] / found['merging']:.0f} rows/s merged (with reading and writing), "
                f"{found['rows'] / found['reading']:.0f} rows/s read alone, "
                f"opened in {found['opening']:.1f} s, peak {found['peak']:.0f} MiB "
                f"(reading alone {found['reading_peak']:.0f} MiB)",
                flush=True,
            )
    growth = peaks[-1] / peaks[0]
    print(f"peak memory with {sizes[-1] / sizes[0]:g} times the images: {growth:.3f} times")
    return int(growth > _GROWTH)


if __name__ == "__main__":
    define_flags()
    run_main(main)
