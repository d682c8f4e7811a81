"""Times RoIAlign, forward and forward with backward, against torchvision's MultiScaleRoIAlign.

    python -m scripts.bench.bench_roi_align [--methods=default,gather]

Default: 2 images of 512 x 512 (P2 128 x 128 to P5 16 x 16), 256 channels, 512 RoIs per image with
sides of 16 to 400 pixels, 7 x 7 bins of 2 x 2 samples, float32. Prints the ratios of the median
times (below 1: ours is faster), measured in turns in one process, and exits with status 1 when
values or feature gradients differ by more than 0.001. Both sides take their natural memory layout
(ours channels last); `aligned` is False because MultiScaleRoIAlign knows nothing else.
"""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from common.geometry import roi_align
from common.io.commands import run_main
from scripts.bench.timing import compare

_STRIDES = (4, 8, 16, 32)
_TOLERANCE = 1e-3  # sums of some hundred float32 products, in another order


def random_rois(rng: np.random.Generator, images: int, rois: int, size: int) -> np.ndarray:
    """(images, rois, 4): log-uniform sides of 16 to 400 pixels, aspect ratios around 1, clipped."""
    centre = rng.uniform(0.0, size, (images, rois, 2))
    side = np.exp(rng.uniform(np.log(16.0), np.log(400.0), (images, rois, 1)))
    root_ratio = np.exp(rng.normal(0.0, 0.25, (images, rois, 1)))
    half = np.concatenate([side * root_ratio, side / root_ratio], -1) / 2
    corners = np.concatenate([centre - half, centre + half], -1)
    return np.clip(corners, 0.0, size).astype(np.float32)


def define_flags() -> None:
    flags.DEFINE_list("methods", ["default"], "Forms of RoIAlign, 'default' or its METHODS.")
    flags.DEFINE_integer("images", 2, "Images.")
    flags.DEFINE_integer("size", 512, "Side of the images, pixels; a multiple of 32.")
    flags.DEFINE_integer("channels", 256, "Feature channels.")
    flags.DEFINE_integer("rois", 512, "RoIs per image.")
    flags.DEFINE_integer("runs", 7, "Timed calls of each side.")
    flags.DEFINE_integer("torch_threads", 2, "torch threads.")


def main() -> int:
    import torch
    import torchvision

    torch.set_num_threads(flags.FLAGS.torch_threads)
    rng = np.random.default_rng(0)
    images, size = flags.FLAGS.images, flags.FLAGS.size
    channels, rois = flags.FLAGS.channels, flags.FLAGS.rois
    features = tuple(
        rng.normal(size=(images, size // s, size // s, channels)).astype(np.float32)
        for s in _STRIDES
    )
    boxes = random_rois(rng, images, rois, size)
    gradient = rng.normal(size=(images, rois, 7, 7, channels)).astype(np.float32)
    levels = np.bincount(
        np.asarray(roi_align.assign_levels(jnp.asarray(boxes))).ravel(), minlength=6
    )[2:]
    print(f"{images} images, {size} pixels, RoIs on P2..P5 {levels}, {jax.devices()[0].platform}")

    pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    maps = OrderedDict(
        (str(i), torch.from_numpy(f.transpose(0, 3, 1, 2).copy()).requires_grad_())
        for i, f in enumerate(features)
    )
    torch_boxes = [torch.from_numpy(image_boxes) for image_boxes in boxes]
    flat_gradient = gradient.reshape(-1, 7, 7, channels).transpose(0, 3, 1, 2)
    torch_gradient = torch.from_numpy(flat_gradient.copy())

    def torch_forward():
        with torch.no_grad():
            return pool(maps, torch_boxes, [(size, size)] * images)

    def torch_both():
        for feature in maps.values():
            feature.grad = None
        output = pool(maps, torch_boxes, [(size, size)] * images)
        output.backward(torch_gradient)
        return output

    expected = torch_both().detach().numpy().transpose(0, 2, 3, 1)
    grads = [torch.as_tensor(feature.grad).numpy() for feature in maps.values()]
    expected_gradients = [grad.transpose(0, 2, 3, 1) for grad in grads]
    arguments = jax.device_put((features, boxes))
    device_gradient = jax.device_put(gradient)
    worst = 0.0
    for name in flags.FLAGS.methods:
        method = None if name == "default" else name

        def crop(features, boxes, method=method):
            return roi_align.roi_align(features, boxes, _STRIDES, aligned=False, method=method)

        def crop_and_gradients(features, boxes, gradient, crop=crop):
            output, transpose = jax.vjp(lambda maps: crop(maps, boxes), features)
            return output, transpose(gradient)[0]

        forward, both = jax.jit(crop), jax.jit(crop_and_gradients)
        output, gradients = both(*arguments, device_gradient)
        errors = [np.abs(np.asarray(output).reshape(expected.shape) - expected).max()]
        errors += [
            np.abs(np.asarray(ours) - theirs).max()
            for ours, theirs in zip(gradients, expected_gradients, strict=True)
        ]
        worst = max(worst, *errors)
        print(
            f"{name}: largest difference, values {errors[0]:.1e}, gradients {max(errors[1:]):.1e}"
        )

        def run_forward(forward=forward):
            jax.block_until_ready(forward(*arguments))

        def run_both(both=both):
            jax.block_until_ready(both(*arguments, device_gradient))

        for title, ours, theirs in (
            ("forward", run_forward, torch_forward),
            ("forward + backward", run_both, torch_both),
        ):
            compare(title, {"ours": ours, "torchvision": theirs}, flags.FLAGS.runs)
    return int(worst > _TOLERANCE)


if __name__ == "__main__":
    define_flags()
    run_main(main)
