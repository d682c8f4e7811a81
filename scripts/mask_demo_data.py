"""Cuts the cell nuclei photo of the `stardist` wheel into a small COCO data set with masks.

    python -m scripts.mask_demo_data --wheel=stardist-0.9.2-....whl --output=nuclei

The wheel (BSD licence) is read as a zip file and never installed or imported. Its fluorescence
microscope photo of 512x512 pixels comes with the outlines of 125 nuclei. The lower quarter is
validation, the rest training; both are cut into tiles of 128 pixels: no pixel is in both splits.

Writes images/*.png, train.json and validation.json.
"""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from common.io.atomic import atomic_folder
from common.io.commands import run_main
from common.io.errors import UserError
from common.masks import rle
from scripts.quickstart_data import tiles

PHOTO, MASKS = "stardist/data/images/img2d.tif", "stardist/data/images/mask2d.tif"
TILE = 128  # pixels
VALIDATION = 0.25  # of the height
MIN_PIXELS = 20  # a smaller rest of a cut nucleus is left out
STRETCH = (1.0, 99.8)  # percentiles of the photo's values that become black and white


def read_photo(wheel_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Photo (H, W) uint8 and instance numbers (H, W), 0 background.

    Raises:
      UserError: the wheel is missing, broken or another package's.
    """
    try:
        with zipfile.ZipFile(wheel_path) as wheel:
            photo, masks = (
                np.asarray(Image.open(io.BytesIO(wheel.read(name)))) for name in (PHOTO, MASKS)
            )
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel_path}: cannot be read as a wheel ({error})") from error
    except KeyError as error:
        raise UserError(f"{wheel_path}: found no {error}, expected the stardist wheel") from error
    low, high = np.percentile(photo, STRETCH)
    stretched = np.clip((photo - low) / (high - low), 0, 1)
    return (255 * stretched).round().astype(np.uint8), masks.astype(np.int64)


def annotations(masks: np.ndarray, image_id: int, first_id: int) -> list[dict]:
    """COCO annotations of a tile's instances."""
    objects: list[dict] = []
    for number in np.unique(masks[masks > 0]):
        mask = masks == number
        if mask.sum() < MIN_PIXELS:
            continue
        counts = rle.encode([mask])
        xmin, ymin, xmax, ymax = rle.tight_boxes(counts, np.array([mask.shape]))[0].tolist()
        objects.append(
            {
                "id": first_id + len(objects),
                "image_id": image_id,
                "category_id": 1,
                "iscrowd": 0,
                "bbox": [xmin, ymin, xmax - xmin, ymax - ymin],
                "area": int(mask.sum()),
                "segmentation": {"size": list(mask.shape), "counts": counts[0].decode()},
            }
        )
    return objects


def build(wheel: Path, output: Path) -> None:
    """Writes the folder, which appears under its name only when complete.

    Raises:
      UserError: see `read_photo`.
    """
    photo, masks = read_photo(wheel)
    with atomic_folder(output) as folder:
        (folder / "images").mkdir()
        files = {
            name: {"images": [], "annotations": [], "categories": [{"id": 1, "name": "Nucleus"}]}
            for name in ("train", "validation")
        }
        height, width = photo.shape
        for image_id, (split, window) in enumerate(tiles(width, height, TILE, VALIDATION), 1):
            xmin, ymin, xmax, ymax = window
            name = f"nuclei_{xmin:03d}_{ymin:03d}.png"
            Image.fromarray(photo[ymin:ymax, xmin:xmax]).save(folder / "images" / name)
            content = files[split]
            content["images"].append(
                {"id": image_id, "file_name": name, "height": ymax - ymin, "width": xmax - xmin}
            )
            content["annotations"] += annotations(
                masks[ymin:ymax, xmin:xmax], image_id, len(content["annotations"]) + 1
            )
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
            print(
                f"{name}: {len(content['images'])} tiles, {len(content['annotations'])} nuclei",
                flush=True,
            )


def define_flags() -> None:
    flags.DEFINE_string("wheel", None, "Wheel of the stardist package.", required=True)
    flags.DEFINE_string("output", None, "Folder to write.", required=True)


def main():
    build(Path(flags.FLAGS.wheel), Path(flags.FLAGS.output))


if __name__ == "__main__":
    define_flags()
    run_main(main)
