"""Peak memory and speed of ensemble.merge at two numbers of images.

    python -m scripts.bench.bench_merge
    python -m scripts.bench.bench_merge --images=100000 --distinct=4    # full size, 4 GiB of disk

Default: 28 tables of 300 boxes an image, 500 classes, once 600 images and once 2400, merged with
configs/ensemble/naive.py. The tables are generated (clusters of boxes around objects that all
models see, in long-tailed classes) in a temporary folder, and each merge runs in a process of its
own. Prints rows per second, peak resident memory and the time of reading alone; exits with status 1
when the larger set needs over 10 % more memory than the smaller.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from common.io.commands import run_main
from common.io.errors import UserError
from common.tables import DetectionsWriter
from configs.ensemble import naive, voting
from ensemble.chunks import aligned_chunks
from ensemble.inputs import open_tables
from ensemble.merge import merge_tables
from scripts.bench import generated
from scripts.bench.timing import peak_mib, run_alone

_GROWTH = 1.1


def measure(inputs: list[str], config: ConfigDict, output: str) -> dict[str, float]:
    """Rows of the tables, seconds of opening, of reading and of merging them, and peaks in MiB."""
    started = time.perf_counter()
    tables = open_tables(inputs)
    opened = time.perf_counter()
    rows = sum(len(chunk) for chunk in aligned_chunks(tables, rows=config.chunk_rows))
    read, reading_peak = time.perf_counter(), peak_mib()
    del tables
    merge_tables(inputs, config, output)
    return {
        "rows": rows,
        "opening": opened - started,
        "reading": read - opened,
        "merging": time.perf_counter() - read,
        "reading_peak": reading_peak,
        "peak": peak_mib(),
    }


def generate(path: Path, images: int, table: int) -> None:
    """Writes a table: objects of long-tailed classes, the same in all tables, 8 boxes at each."""
    rng, shared = np.random.default_rng([1, table]), np.random.default_rng(0)
    boxes, classes = flags.FLAGS.boxes, flags.FLAGS.classes
    labels, objects = np.array(generated.class_labels(classes)), max(boxes // 8, 1)
    with DetectionsWriter(path, {"model": path.stem, "dataset": "generated"}) as writer:
        for number in range(images):
            centre = shared.uniform(0.1, 0.9, (objects, 2))
            side = np.exp(shared.normal(-2.5, 0.7, (objects, 2)))
            label = np.minimum(shared.geometric(0.02, objects), classes) - 1
            owner = rng.integers(0, objects, boxes)
            middle = centre[owner] + rng.normal(0, 0.1, (boxes, 2)) * side[owner]
            half = side[owner] * np.exp(rng.normal(0, 0.15, (boxes, 2))) / 2
            corners = np.clip(np.concatenate([middle - half, middle + half], axis=1), 0, 1)
            scores = rng.beta(0.3, 2.0, boxes).astype(np.float32)
            writer.add(f"image{number:07d}", labels[label[owner]], scores, corners)


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
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"m{number:02d}.parquet" for number in range(options.tables)]
            for number, path in enumerate(paths):
                if options.distinct and number >= options.distinct:
                    os.link(paths[number % options.distinct], path)
                else:
                    generate(path, size, number)
            config = {"naive": naive, "voting": voting}[options.operator].get_config()
            inputs = [str(path) for path in paths]
            figures = run_alone(measure, inputs, config, f"{folder}/out.parquet")
        peaks.append(figures["peak"])
        print(
            f"{options.tables} tables x {size} images x {options.boxes} boxes: "
            f"{figures['rows'] / figures['merging']:.0f} rows/s merged (with reading and writing), "
            f"{figures['rows'] / figures['reading']:.0f} rows/s read alone, "
            f"opened in {figures['opening']:.1f} s, peak {figures['peak']:.0f} MiB "
            f"(reading alone {figures['reading_peak']:.0f} MiB)",
            flush=True,
        )
    growth = peaks[-1] / peaks[0]
    print(f"peak memory with {sizes[-1] / sizes[0]:g} times the images: {growth:.3f} times")
    return int(growth > _GROWTH)


if __name__ == "__main__":
    define_flags()
    run_main(main)
