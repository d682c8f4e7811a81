"""Speed of export's last step: from probability maps to run lengths, beside the plain way.

First of the maps of crops (segmentation.export), then of those of mask heads (detection.export).

    python -m scripts.bench.bench_paste [--boxes=192] [--repeats=5]

Random boxes of photos of 768x1024, small (an area of 6 % of the photo) and large (36 %), each with
a blob whose outline the voters see a little differently. One voter looks at crops of 256, four in
three views (256 and its mirrored crop, 112, 250) vote on each pixel. Mask heads have maps of 28x28.
The plain way interpolates every pixel of every map, in one thread, as `tests.oracles` writes it.
Checks that the masks are equal (of mask heads but for pixels within rounding of the threshold). The
hours are those of 10 million boxes, 100 each on the challenge's 99,999 photos.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from common.io.commands import run_main
from common.io.memory import keep_freed_memory
from common.io.parallel import map_ordered
from common.masks import rle, vote
from common.masks.paste import PASTING_THREADS, box_masks, pixel_window
from common.masks.probability import PROBABILITY_ONE
from configs.segmentation import hrnet_w48_112, hrnet_w48_200_300, hrnet_w48_256
from scripts.bench.timing import time_in_turns
from segmentation.crops.batches import BoxBatch
from segmentation.crops.windows import choose_canvas, clip_boxes, windows_of
from segmentation.export import block_masks
from segmentation.settings import read_run

PHOTO = (768, 1024)
_THRESHOLD = 0.5
_BLOCK = 32  # boxes
# Config and voters of each view.
VIEWS = {
    "one voter": [(hrnet_w48_256, 1)],
    "four voters, three views": [(hrnet_w48_256, 2), (hrnet_w48_112, 1), (hrnet_w48_200_300, 1)],
}

Block = tuple[list[BoxBatch], list[jax.Array]]


def define_flags() -> None:
    flags.DEFINE_integer("boxes", 192, "Boxes at a time.")
    flags.DEFINE_integer("repeats", 5, "Repeats.")


def main():
    keep_freed_memory()
    number = flags.FLAGS.boxes
    for size, sides in (("small", (0.1, 0.4)), ("large", (0.4, 0.8))):
        for name, views in VIEWS.items():
            blocks = random_blocks(np.random.default_rng(0), number, sides, views)
            rule: vote.Rule = "mean" if len(views) == 1 else "hard"
            weights = [1] * sum(voters for _, voters in views)
            ours = functools.partial(block_masks, weights=weights, rule=rule, threshold=_THRESHOLD)
            calls = [
                lambda ours=ours, blocks=blocks: [
                    counts
                    for _, found, _ in map_ordered(
                        ours, blocks, threads=PASTING_THREADS, ahead=PASTING_THREADS
                    )
                    for counts in found
                ],
                lambda ours=ours, blocks=blocks: [c for b in blocks for c in ours(b)[1]],
                lambda rule=rule, blocks=blocks: [c for b in blocks for c in plain(b, rule)],
            ]
            assert calls[0]() == calls[1]() == calls[2]()
            threads, one, every = (
                1e3 * t.min() / number for t in time_in_turns(calls, flags.FLAGS.repeats)
            )
            print(
                f"{size} boxes, {name}: {threads:.2f} ms a box ({threads * 1e7 / 3.6e6:.1f} h), in "
                f"one thread {one:.2f} ms ({one * 1e7 / 3.6e6:.1f} h), every pixel in one thread "
                f"{every:.2f} ms ({every * 1e7 / 3.6e6:.1f} h)",
                flush=True,
            )
        photos = random_photos(np.random.default_rng(0), number, sides)
        paste_photo = functools.partial(head_masks, paste=box_masks)
        calls = [
            lambda photos=photos, paste=paste_photo: [
                counts
                for found in map_ordered(
                    paste, photos, threads=PASTING_THREADS, ahead=PASTING_THREADS
                )
                for counts in found
            ],
            lambda photos=photos, paste=paste_photo: [c for p in photos for c in paste(p)],
            lambda photos=photos: [c for p in photos for c in head_masks(p, paste=plain_boxes)],
        ]
        assert calls[0]() == calls[1]()
        same = np.mean([a == b for a, b in zip(calls[0](), calls[2](), strict=True)])
        assert same > 0.97, same  # but for pixels within rounding of the threshold
        threads, one, every = (
            1e3 * t.min() / number for t in time_in_turns(calls, flags.FLAGS.repeats)
        )
        print(
            f"{size} boxes, mask head: {threads:.3f} ms a box, in one thread {one:.3f} ms, every "
            f"pixel in one thread {every:.3f} ms",
            flush=True,
        )


Photo = tuple[np.ndarray, np.ndarray]  # maps (n, 28, 28) and boxes (n, 4) in pixels


def random_photos(rng: np.random.Generator, number: int, sides: tuple[float, float]) -> list[Photo]:
    """Blobs in the boxes of photos, _BLOCK a photo, `number` in all."""
    shares = rng.uniform(*sides, (number, 2))
    corners = rng.random((number, 2)) * (1 - shares)
    boxes = np.concatenate([corners, corners + shares], axis=1) * np.tile(PHOTO[::-1], 2)
    y, x = np.linspace(-1, 1, 28)[:, None], np.linspace(-1, 1, 28)
    angle, radius = np.arctan2(y, x), np.hypot(y, x)
    shapes = rng.normal(0, 0.1, (number, 6, 1, 1))
    outlines = 0.8 + sum(shapes[:, k - 1] * np.cos(k * angle + k) for k in range(1, 7))
    maps = np.round(PROBABILITY_ONE / (1 + np.exp(-12 * (outlines - radius)))).astype(np.uint16)
    starts = range(0, number, _BLOCK)
    return [(maps[s : s + _BLOCK], boxes[s : s + _BLOCK]) for s in starts]


def head_masks(photo: Photo, paste: Callable) -> list[bytes]:
    return paste(*photo, PHOTO, _THRESHOLD)


def plain_boxes(
    maps: np.ndarray, boxes: np.ndarray, size: tuple[int, int], threshold: float
) -> list[bytes]:
    """Interpolates every pixel of every box, between zeros outside."""
    from tests.oracles import segmentation as oracle

    pixels = pixel_window(boxes, np.tile(size, (len(boxes), 1)))
    cells = (boxes[:, 2:] - boxes[:, :2]) / 28
    windows = np.concatenate([boxes[:, :2] - cells, boxes[:, 2:] + cells], axis=1)
    masks = [
        oracle.paste_float32(np.pad(values, 1)[None], (30, 30), window, box_pixels)[0] > threshold
        for values, window, box_pixels in zip(maps, windows, pixels, strict=True)
    ]
    return rle.encode_windows(masks, pixels[:, :2], np.tile(size, (len(boxes), 1)))


def random_blocks(
    rng: np.random.Generator, number: int, sides: tuple[float, float], views: list
) -> list[Block]:
    """Blocks of random boxes with sides of this range of the photo's, and their maps."""
    shares = rng.uniform(*sides, (number, 2))
    corners = rng.random((number, 2)) * (1 - shares)
    boxes = np.concatenate([corners, corners + shares], axis=1)
    shapes = rng.normal(0, 0.1, (number, 6))  # of the outline, by angular frequency
    return [
        random_block(rng, boxes[first : first + _BLOCK], shapes[first : first + _BLOCK], views)
        for first in range(0, number, _BLOCK)
    ]


def random_block(rng, boxes: np.ndarray, shapes: np.ndarray, views: list) -> Block:
    photo_sizes = np.tile(np.array(PHOTO, np.int32), (len(boxes), 1))
    pixels = clip_boxes(boxes, photo_sizes)
    batches, maps = [], []
    for number, (module, voters) in enumerate(views):
        test = read_run(module.get_config()).test
        canvases = np.array(test.canvases)
        windows = windows_of(pixels, test.crop)
        canvas = canvases.max(axis=0)
        content = windows.on_canvas(canvases[choose_canvas(windows.content, canvases)]).content
        values = np.zeros((len(boxes), voters, *canvas), np.uint16)
        for box, (height, width) in enumerate(content.tolist()):
            y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
            angle, radius = np.arctan2(y, x), np.hypot(y, x)
            for voter in range(voters):
                shape = shapes[box] + rng.normal(0, 0.02, 6)
                outline = 0.8 + sum(s * np.cos(k * angle + k) for k, s in enumerate(shape, 1))
                probability = 1 / (1 + np.exp(-12 * (outline - radius)))
                values[box, voter, :height, :width] = np.round(probability * PROBABILITY_ONE)
        batches.append(
            BoxBatch(
                view=number,
                rows=np.arange(len(boxes)),
                image_index=np.zeros(len(boxes), np.int64),
                image=np.zeros((len(boxes), 1, 1, 3), np.uint8),
                image_size=content.astype(np.float32),
                image_valid=np.ones(len(boxes), bool),
                window=pixels.astype(np.float32),
                photo_size=photo_sizes,
            )
        )
        maps.append(jax.numpy.asarray(values))
    return batches, maps


def plain(block: Block, rule: vote.Rule) -> list[bytes]:
    """Interpolates every pixel of every map."""
    from tests.oracles import segmentation as oracle

    batches, maps = block
    pixels = pixel_window(batches[0].window, batches[0].photo_size)
    masks = []
    for slot in range(len(pixels)):
        values = [
            oracle.paste_float32(
                np.asarray(m)[slot], b.image_size[slot].astype(int), b.window[slot], pixels[slot]
            )
            for b, m in zip(batches, maps, strict=True)
        ]
        masks.append(vote.combine(np.concatenate(values), rule, _THRESHOLD))
    return rle.encode_windows(masks, pixels[:, :2], batches[0].photo_size)


if __name__ == "__main__":
    define_flags()
    run_main(main)
