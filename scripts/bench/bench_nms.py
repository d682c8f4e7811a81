"""Times our NMS against torchvision.ops.batched_nms and checks that both keep the same boxes.

    python -m scripts.bench.bench_nms

Default: 8 images x 2000 boxes x 500 classes, IoU threshold 0.5, in two cases: every box of a random
class, and boxes in groups of 8 around objects of a random class (as a detector sees them). Prints
the ratio of the median times (below 1: ours is faster), measured in turns in one process, and exits
with status 1 when the kept sets differ. torchvision takes one image a call; the scores have no
ties, because its order among equal scores is not defined.
"""

import jax
import numpy as np
from absl import flags

from common.geometry import nms
from common.io.commands import run_main
from scripts.bench.timing import compare


def random_case(
    rng: np.random.Generator, shape: tuple[int, int], num_classes: int, group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores, classes; `group` boxes share an object (centre, size, class) up to noise.

    Sides are log-normal (median 55 pixels) on a canvas of 1000 x 1000 pixels.
    """
    images, boxes = shape
    objects = -(-boxes // group)

    def repeat(array: np.ndarray) -> np.ndarray:
        return np.repeat(array, group, axis=1)[:, :boxes]

    centre = repeat(rng.uniform(0.0, 1000.0, (images, objects, 2)))
    side = repeat(np.exp(rng.normal(4.0, 0.8, (images, objects, 2))))
    classes = repeat(rng.integers(0, num_classes, (images, objects)))
    if group > 1:
        centre = centre + rng.normal(0.0, 0.15, centre.shape) * side
        side = side * np.exp(rng.normal(0.0, 0.2, side.shape))
    corners = np.concatenate([centre - side / 2, centre + side / 2], axis=-1)
    scores = np.stack([rng.permutation(boxes) for _ in range(images)]) / boxes
    return corners.astype(np.float32), scores.astype(np.float32), classes.astype(np.int32)


def define_flags() -> None:
    flags.DEFINE_integer("images", 8, "Images.")
    flags.DEFINE_integer("boxes", 2000, "Boxes per image.")
    flags.DEFINE_integer("classes", 500, "Classes; each box gets a random one.")
    flags.DEFINE_float("iou_threshold", 0.5, "Suppress above this overlap.")
    flags.DEFINE_integer("repeats", 20, "Timed calls of each side.")
    flags.DEFINE_integer("threads", 2, "torch threads (JAX takes the cores it may use).")


def main() -> int:
    import torch
    import torchvision

    torch.set_num_threads(flags.FLAGS.threads)
    rng = np.random.default_rng(0)
    shape = (flags.FLAGS.images, flags.FLAGS.boxes)
    threshold = flags.FLAGS.iou_threshold
    ours = jax.jit(jax.vmap(lambda b, s, v, c: nms.nms_mask(b, s, v, threshold, c)))
    print(
        f"{shape[0]} images x {shape[1]} boxes x {flags.FLAGS.classes} classes, "
        f"IoU {threshold}, {jax.devices()[0].platform}"
    )
    total_differing = 0
    for case, group in (("a random class per box", 1), ("a random class per 8 boxes", 8)):
        boxes, scores, classes = random_case(rng, shape, flags.FLAGS.classes, group)
        arguments = jax.device_put((boxes, scores, np.ones(shape, bool), classes))
        tensors = [
            [torch.from_numpy(a[i]) for a in (boxes, scores, classes)] for i in range(len(boxes))
        ]

        def run_ours(arguments=arguments) -> np.ndarray:
            return np.asarray(ours(*arguments))

        def run_theirs(tensors=tensors) -> np.ndarray:
            keep = np.zeros(shape, bool)
            for i, (b, s, c) in enumerate(tensors):
                keep[i, torchvision.ops.batched_nms(b, s, c, threshold).numpy()] = True
            return keep

        kept = run_ours()
        differing = int(np.sum(kept != run_theirs()))
        total_differing += differing
        print(f"{case}: kept {int(kept.sum())} of {kept.size}; {differing} decisions differ")
        compare("NMS", {"ours": run_ours, "torchvision": run_theirs}, flags.FLAGS.repeats)
    return int(total_differing > 0)


if __name__ == "__main__":
    define_flags()
    run_main(main)
