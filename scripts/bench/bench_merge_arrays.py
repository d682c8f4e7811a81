"""Times `ensemble.merge_arrays` beside ensemble-boxes: image by image, and many images a call.

    pip install ensemble-boxes numba
    python -m scripts.bench.bench_merge_arrays

An image has the boxes of several models (default: 5 models x 200 boxes, 80 classes), drawn as in
`scripts.bench.bench_ensemble`. Both sides get the same arrays and are warm: every image of the
first part has been merged once before its time is taken. Prints milliseconds an image, and ratios
(below 1: ours is faster). The package runs on a part of the images; it takes one image a call.
"""

import functools
import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags

from common.io.commands import run_main
from ensemble.arrays import merge_arrays, merge_batch
from scripts.bench import generated
from scripts.bench.bench_ensemble import draw_image

_IOU = 0.55
_PEER_IMAGES = 20  # of a method, at most


def define_flags() -> None:
    flags.DEFINE_integer("images", 1000, "Images of a call.")
    flags.DEFINE_integer("models", 5, "Models.")
    flags.DEFINE_integer("boxes", 200, "Boxes of one model in one image.")
    flags.DEFINE_integer("classes", 80, "Classes.")
    flags.DEFINE_integer("single", 10, "Images that are merged one by one.")


def cases() -> dict[str, tuple[Callable, dict]]:
    """Method -> the package's function and the options of both."""
    import ensemble_boxes as peer

    return {
        "wbf": (peer.weighted_boxes_fusion, dict(iou_thr=_IOU)),
        "nmw": (peer.non_maximum_weighted, dict(iou_thr=_IOU)),
        "nms": (peer.nms, dict(iou_thr=_IOU)),
        "soft_nms": (peer.soft_nms, dict(iou_thr=_IOU, sigma=0.1)),
    }


def seconds(call: Callable[[], object], rounds: int = 3) -> float:
    """The best of some times."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def each(call: Callable, images: Sequence[Sequence[list]]) -> None:
    """Calls with each image; the package changes lists that it is given."""
    for image in images:
        call(*map(list, image))


def main() -> None:
    values = flags.FLAGS
    rng = np.random.default_rng(0)
    popularity = np.cumsum(generated.rank_frequencies(rng, values.classes))
    images = []
    for _ in range(values.images):
        labels, scores, boxes = draw_image(rng, popularity)
        images.append(([*boxes.astype(np.float64)], [*scores.astype(np.float64)], [*labels]))
    single = images[: values.single]
    peers = images[: min(_PEER_IMAGES, values.images)]
    lists = tuple(zip(*images, strict=True))
    print(f"{values.models} models x {values.boxes} boxes, {values.classes} classes")
    print("milliseconds an image: ours, the package's, and their ratio", flush=True)
    for method, (peer, options) in cases().items():
        one = functools.partial(merge_arrays, method=method, **options)
        together = functools.partial(merge_batch, *lists, method=method, **options)
        package = functools.partial(peer, **options)
        compiling = seconds(functools.partial(each, one, single), rounds=1)
        ours = 1000 * seconds(functools.partial(each, one, single)) / len(single)
        each(package, peers[:1])  # numba compiles
        theirs = 1000 * seconds(functools.partial(each, package, peers), rounds=2) / len(peers)
        together()
        many = 1000 * seconds(together, rounds=2) / len(images)
        print(
            f"{method:10s} one a call: {ours:7.2f} {theirs:8.2f}  {ours / theirs:.2f}"
            f" ({compiling:.1f} s the first {len(single)})"
            f"   {len(images)} a call: {many:.3f}  {many / theirs:.3f} = {theirs / many:.0f} times",
            flush=True,
        )


if __name__ == "__main__":
    define_flags()
    run_main(main)
