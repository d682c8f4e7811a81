"""Converts a generated OpenImages training set of full size, then opens the result.

    python -m scripts.bench.bench_prepare --workdir=/tmp/bench_prepare

The set has 1,743,042 images, 12,195,144 boxes and 500 classes, as the Challenge 2019 training files
have, rows of an image not always together, and 1,000 broken rows. Prints time and peak
resident memory of the conversion against the limits of 10 minutes and 3 GiB, and time and heap of
opening the index against 1 s and 200 MiB. Takes about 1.6 GB of disk.
"""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from absl import flags

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from scripts.bench import generated
from scripts.bench.timing import run_alone

_CLASSES = 500
_BROKEN = 1_000
_BLOCK = 500_000


def open_dataset(directory: Path) -> dict[str, float]:
    """Seconds and heap (resident memory that is no file's, MiB) of opening a dataset directory."""
    before, start = _anonymous_mib(), time.perf_counter()
    dataset = Dataset.open(directory)
    seconds = time.perf_counter() - start
    dataset.image_boxes(dataset.num_images // 2)
    heap = _anonymous_mib() - before
    return {
        "seconds": seconds,
        "heap": heap,
        "images": dataset.num_images,
        "boxes": len(dataset.boxes),
    }


def _anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder for the files.", required=True)
    flags.DEFINE_integer("num_images", 1_743_042, "Images of the set.")
    flags.DEFINE_integer("num_boxes", 12_195_144, "Boxes of the set.")
    flags.DEFINE_bool("keep", False, "Leave the files there.")


def main() -> None:
    workdir = Path(flags.FLAGS.workdir)
    source, output = workdir / "source", workdir / "dataset"
    if output.exists():
        raise UserError(f"{output} exists: choose another --workdir")
    start = time.perf_counter()
    generate(source, flags.FLAGS.num_images, flags.FLAGS.num_boxes)
    size = sum(path.stat().st_size for path in source.iterdir()) / 1e9
    print(f"generated {size:.2f} GB in {time.perf_counter() - start:.0f} s", flush=True)

    start = time.perf_counter()
    command = [sys.executable, "-m", "scripts.prepare_data", "openimages"]
    subprocess.run([*command, f"--source={source}", f"--output={output}"], check=True)
    seconds = time.perf_counter() - start
    # Kilobytes on Linux; the largest of the children, and there was only this one.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"conversion: {seconds:.0f} s = {seconds / 600:.2f}x of 10 minutes")
    print(f"peak resident memory: {peak:.2f} GiB = {peak / 3:.2f}x of 3 GiB")

    opened = run_alone(open_dataset, output)
    print(f"open: {opened['seconds']:.3f} s of 1 s, heap {opened['heap']:.1f} of 200 MiB")
    expected = (flags.FLAGS.num_images, flags.FLAGS.num_boxes - _BROKEN)
    if (opened["images"], opened["boxes"]) != expected:
        raise UserError(f"found {opened['images']}, {opened['boxes']}; expected {expected}")
    if not flags.FLAGS.keep:
        shutil.rmtree(source)
        shutil.rmtree(output)


def generate(folder: Path, num_images: int, num_boxes: int) -> None:
    """Writes train boxes, image labels (two an image) and classes under the official names."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    labels = np.array([f"/m/0{i:05x}" for i in range(_CLASSES)], dtype=object)
    lines = (f"{label},Class {i}\n" for i, label in enumerate(labels))
    (folder / "challenge-2019-classes-description-500.csv").write_text("".join(lines))
    # Every image at least once; each tenth row swapped with a far one, so that rows are scattered.
    image = np.sort(
        np.concatenate([np.arange(num_images), rng.integers(0, num_images, num_boxes - num_images)])
    )
    far = rng.choice(num_boxes, num_boxes // 10, replace=False)
    image[far] = image[rng.permutation(far)]
    broken = rng.choice(num_boxes, _BROKEN, replace=False)
    label_table, id_of = pa.array(labels), pa.array(map(generated.image_id, range(num_images)))
    path = folder / "challenge-2019-train-detection-bbox.csv"
    names = ["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf"]
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none")
    with open(path, "wb") as file:
        file.write((",".join(names) + "\n").encode())
        for start in range(0, num_boxes, _BLOCK):
            rows = image[start : start + _BLOCK]
            low = rng.uniform(0, 0.8, (len(rows), 2))
            high = low + rng.uniform(0.01, 0.2, (len(rows), 2))
            bad = broken[(broken >= start) & (broken < start + _BLOCK)] - start
            high[bad] = low[bad]  # zero area
            table = pa.table(
                [
                    id_of.take(pa.array(rows)),
                    label_table.take(pa.array(rng.integers(0, _CLASSES, len(rows)))),
                    *(np.round(x, 6) for x in (low[:, 0], high[:, 0], low[:, 1], high[:, 1])),
                    rng.random(len(rows)) < 0.05,
                ],
                names,
            )
            table = table.set_column(6, "IsGroupOf", table["IsGroupOf"].cast(pa.int8()))
            pyarrow.csv.write_csv(table, file, options)
    _generate_labels(folder, rng, id_of, label_table, num_images)


def _generate_labels(folder, rng, id_of, label_table, num_images: int) -> None:
    image = np.repeat(np.arange(num_images), 2)
    first = rng.integers(0, _CLASSES, num_images)
    classes = np.stack([first, (first + 1) % _CLASSES], 1).reshape(-1)
    table = pa.table(
        {
            "ImageID": id_of.take(pa.array(image)),
            "LabelName": label_table.take(pa.array(classes)),
            "Confidence": pa.array(np.tile(np.array([1, 0], np.int8), num_images)),
        }
    )
    options = pyarrow.csv.WriteOptions(quoting_style="none")
    path = folder / "challenge-2019-train-detection-human-imagelabels.csv"
    pyarrow.csv.write_csv(table, path, options)


if __name__ == "__main__":
    define_flags()
    run_main(main)
