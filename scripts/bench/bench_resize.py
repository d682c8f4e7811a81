"""Resizing photos: Pillow's RGB, as the batches have it, against other ways, in time and pixels.

    python -m scripts.bench.bench_resize --sizes=768x1024:800x1067,1500x2000:800x1067

CPU milliseconds of one thread (the median), how many values differ from those of Pillow's RGB, and
by how much. OpenCV's ways are measured where it is installed.
"""

import functools
import statistics
import time
from collections.abc import Callable

import numpy as np
from absl import flags
from PIL import Image

from common.io.commands import run_main
from common.io.errors import UserError

_BILINEAR = Image.Resampling.BILINEAR


def define_flags() -> None:
    flags.DEFINE_list(
        "sizes", ["768x1024:800x1067", "1500x2000:800x1067"], "HEIGHTxWIDTH before:after"
    )
    flags.DEFINE_integer("rounds", 15, "calls of each", lower_bound=1)


def main() -> None:
    for text in flags.FLAGS.sizes:
        try:
            before, after = (tuple(map(int, part.split("x"))) for part in text.split(":"))
            (height, width), (new_height, new_width) = before, after
        except ValueError as error:
            raise UserError(
                f"--sizes={text}: expected HEIGHTxWIDTH:HEIGHTxWIDTH, such as 768x1024:800x1067"
            ) from error
        # Smooth, with some noise, as photos are.
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3)).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), _BILINEAR), np.int16)
        noisy = np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
        compare(Image.fromarray(noisy), (new_width, new_height), text)


def compare(image: Image.Image, size: tuple[int, int], title: str) -> None:
    expected = np.asarray(pillow(image, size)).astype(np.int16)
    for name, resize in ways(image).items():
        result = np.asarray(resize(size))[..., :3].astype(np.int16)
        off = np.abs(result - expected)
        times = []
        for _ in range(flags.FLAGS.rounds):
            start = time.thread_time()
            resize(size)
            times.append(time.thread_time() - start)
        print(
            f"{title} {name:20}: {statistics.median(times) * 1e3:5.1f} ms, {(off > 0).mean():6.1%} "
            f"differ, by {off.max()} at most",
            flush=True,
        )


def pillow(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, _BILINEAR, reducing_gap=3.0)


def ways(image: Image.Image) -> dict[str, Callable]:
    """Functions of width, height."""
    found: dict[str, Callable] = {
        "Pillow RGB": functools.partial(pillow, image),
        "Pillow RGBX": functools.partial(pillow, image.convert("RGBX")),
        "Pillow by channel": lambda size: Image.merge(
            "RGB", [pillow(channel, size) for channel in image.split()]
        ),
    }
    try:
        import cv2
    except ImportError:
        return found
    pixels = np.asarray(image)
    for name in ("INTER_LINEAR", "INTER_LINEAR_EXACT", "INTER_AREA"):
        found[f"OpenCV {name}"] = functools.partial(_opencv, cv2, pixels, getattr(cv2, name))
    return found


def _opencv(cv2, pixels: np.ndarray, method: int, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(pixels, size, interpolation=method)


if __name__ == "__main__":
    define_flags()
    run_main(main)
