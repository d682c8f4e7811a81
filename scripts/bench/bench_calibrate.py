"""Time and memory of ensemble.calibrate at the size of OpenImages' validation set.

    python -m scripts.bench.bench_calibrate [--tables=11] [--images=41620] [--classes=500]

Generates a dataset directory and detections tables as `bench_search` does (not counted;
`--distinct` tables, the others are links to them), then calibrates them in a process of its own and
prints how long reading, counting and fitting the curves took, how long second opinion and recipes,
and the peak of memory.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags
from etils import epath

from common.data.dataset import Dataset
from common.io.commands import run_main
from configs.ensemble import calibrated
from ensemble.calibrate import calibrate_tables
from scripts.bench import bench_search
from scripts.bench.timing import peak_mib, run_alone


def define_flags() -> None:
    flags.DEFINE_integer("tables", 11, "Detections tables.")
    flags.DEFINE_integer("distinct", 3, "Tables generated, the rest are links to them.")
    flags.DEFINE_integer("images", 41_620, "Images.")
    flags.DEFINE_integer("classes", 500, "Classes.")
    flags.DEFINE_float("verified", 0.7, "Share of false detections on classes verified there.")


def measure(folder: str, inputs: list[str]) -> dict[str, float]:
    """Seconds of the curves and of what follows, and the peak in MiB."""
    start = time.perf_counter()
    marks: dict[str, float] = {}

    def say(text: str) -> None:
        if text.startswith("second opinion"):
            marks["curves"] = time.perf_counter() - start
        print(text, flush=True)

    dataset = Dataset.open(f"{folder}/set")
    output = epath.Path(folder) / "cal.json"
    calibrate_tables(inputs, calibrated.get_config(), dataset, "val_a", output, say=say)
    return {**marks, "all": time.perf_counter() - start, "peak": peak_mib()}


def main():
    options = flags.FLAGS
    with tempfile.TemporaryDirectory() as folder:
        wanted, start = options.tables, time.perf_counter()
        options.tables = min(options.distinct, wanted)
        paths = bench_search.generate(Path(folder), np.random.default_rng(0))
        for number in range(len(paths), wanted):
            link = f"{folder}/model{number:02d}.parquet"
            os.link(paths[number % options.distinct], link)
            paths.append(link)
        print(f"generated in {time.perf_counter() - start:.0f} s", flush=True)
        figures = run_alone(measure, folder, paths)
    print(
        f"{wanted} tables x {options.images} images x {options.classes} classes: curves in "
        f"{figures['curves']:.1f} s, opinion and recipes in "
        f"{figures['all'] - figures['curves']:.0f} s, peak {figures['peak'] / 1024:.2f} GiB"
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
