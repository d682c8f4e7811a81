"""Run-length kernels beside pycocotools'.

    python -m scripts.bench.bench_rle [--masks=100] [--repeats=15]

Random blobs of the size of objects on photos of 480x640 and 768x1024. Times are per mask (IoU: per
pair) in microseconds, the best of the repeats, in turns. `rows` are masks as NumPy has them,
row by row, which pycocotools wants turned first; `columns` are in Fortran order already. Checks
that the results are equal.
"""

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from common.io.commands import run_main
from common.io.errors import UserError
from common.masks import rle
from scripts.bench.timing import time_in_turns


def random_blobs(rng: np.random.Generator, number: int, size: tuple[int, int]) -> np.ndarray:
    """(number, H, W) bool, polygons of 24 corners with a radius of 3 to 30 % of the short side."""
    height, width = size
    masks = []
    for _ in range(number):
        image = Image.new("1", (width, height))
        centre = rng.uniform(0.1, 0.9, 2) * (width, height)
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        radii = rng.uniform(0.03, 0.3) * min(size) * rng.uniform(0.7, 1.3, 24)
        points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        ImageDraw.Draw(image).polygon([tuple(p) for p in points.tolist()], fill=1)
        masks.append(np.asarray(image))
    return np.stack(masks)


def define_flags() -> None:
    flags.DEFINE_integer("masks", 100, "Masks at a time.")
    flags.DEFINE_integer("repeats", 15, "Repeats.")


def main():
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise UserError("pip install pycocotools to compare with it") from error
    for size in ((480, 640), (768, 1024)):
        compare(coco, size)


def compare(coco, size: tuple[int, int]) -> None:
    number = flags.FLAGS.masks
    masks = random_blobs(np.random.default_rng(0), number, size)
    turned = np.asfortranarray(masks.transpose(1, 2, 0)).view(np.uint8)
    columns = turned.transpose(2, 0, 1).view(bool)  # each in Fortran order
    theirs = coco.encode(turned)
    ours = rle.encode(masks)
    assert ours == [mask["counts"] for mask in theirs]
    assert (rle.decode_all(ours, size) == masks).all()
    assert np.array_equal(rle.iou(ours, ours, size), coco.iou(theirs, theirs, [0] * number))
    for both in (False, True):
        assert rle.merge(ours, size, intersect=both) == coco.merge(theirs, both)["counts"]
    sizes = np.tile(size, (number, 1))
    windows, corners = [], rle.tight_boxes(ours, sizes)
    for mask, (x0, y0, x1, y1) in zip(masks, corners.tolist(), strict=True):
        windows.append(mask[y0:y1, x0:x1].copy())
    pasted = np.zeros((*size, number), np.uint8, order="F")

    def paste():
        pasted[:] = 0
        for i, (x0, y0, x1, y1) in enumerate(corners.tolist()):
            pasted[y0:y1, x0:x1, i] = windows[i]
        return coco.encode(pasted)

    places = corners[:, [1, 0]]
    assert rle.encode_windows(windows, places, sizes) == [mask["counts"] for mask in paste()]
    rows = masks.view(np.uint8)
    cases = {
        "encode, rows": (
            lambda: rle.encode(masks),
            lambda: coco.encode(np.asfortranarray(rows.transpose(1, 2, 0))),
        ),
        "encode, columns": (lambda: rle.encode(columns), lambda: coco.encode(turned)),
        "encode windows": (lambda: rle.encode_windows(windows, places, sizes), paste),
        "decode": (lambda: rle.decode_all(ours, size), lambda: coco.decode(theirs)),
        "decode one": (
            lambda: [rle.decode(counts, size) for counts in ours],
            lambda: [coco.decode(mask) for mask in theirs],
        ),
        "iou": (lambda: rle.iou(ours, ours, size), lambda: coco.iou(theirs, theirs, [0] * number)),
        "merge": (lambda: rle.merge(ours, size), lambda: coco.merge(theirs)),
        "tight boxes": (lambda: rle.tight_boxes(ours, sizes), lambda: coco.toBbox(theirs)),
        "areas": (lambda: rle.areas(ours), lambda: coco.area(theirs)),
    }
    length = np.mean([len(counts) for counts in ours])
    print(f"{number} masks of {size[0]}x{size[1]}, {length:.0f} characters each")
    print(f"{'':18}{'ours us':>10}{'pycocotools us':>16}{'ratio':>8}")
    for name, calls in cases.items():
        for call in calls:
            call()
        mine, other = (t.min() for t in time_in_turns(calls, flags.FLAGS.repeats))
        per = 1e6 / (number**2 if name == "iou" else number)
        print(f"{name:18}{mine * per:10.2f}{other * per:16.2f}{mine / other:8.2f}", flush=True)


if __name__ == "__main__":
    define_flags()
    run_main(main)
