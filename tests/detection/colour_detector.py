"""Stands in for a trained detector with masks: finds what is bright in each colour channel.

It works at any scale and mirrored, so that boxes and masks that come out of inference can be
compared with what is painted on the photos.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from common.data.dataset import Dataset, DatasetWriter
from common.masks import rle
from common.masks.probability import quantise
from detection.models.settings import ModelSettings

LABELS = ["red", "green", "blue"]
SIDE = 28


class ColourDetector(nn.Module):
    """The methods of `detection.models.faster_rcnn.FasterRCNN` that inference calls."""

    num_classes: int
    settings: ModelSettings
    axis_name: str | None = None

    def __call__(self, batch, train: bool) -> dict[str, Any]:
        found = self.propose_on(batch)
        count = self.settings.detections.max_detections
        padding = ((0, 0), (0, count - len(LABELS)))
        classes = jnp.broadcast_to(jnp.arange(len(LABELS)), found["valid"].shape)
        boxes = jnp.pad(found["boxes"], (*padding, (0, 0)))
        classes, scores, valid = (
            jnp.pad(x, padding) for x in (classes, found["scores"], found["valid"])
        )
        masks = self.predict_masks(batch, boxes, classes, valid)
        return dict(boxes=boxes, classes=classes, scores=scores, valid=valid, masks=masks)

    def propose_on(self, batch) -> dict[str, Any]:
        bright = batch["image"] > 127
        (left, right), (top, bottom) = (_ends(bright.any(axis)) for axis in (1, 2))
        boxes = jnp.stack([left, top, right, bottom], axis=-1).astype(jnp.float32)
        valid = bright.any((1, 2)) & batch["image_valid"][:, None]
        return {"boxes": boxes, "scores": 0.9 * valid.astype(jnp.float32), "valid": valid}

    def score_proposals(self, batch, boxes, valid) -> dict[str, Any]:
        own = self.propose_on(batch)["boxes"]  # (B, 3, 4)
        near = (abs(own[:, None] - boxes[:, :, None]) < 2).all(-1)
        scores = jnp.concatenate([0.1 * jnp.ones_like(near[..., :1]), 0.9 * near], axis=-1)
        return {"scores": scores, "boxes": boxes[:, :, None]}

    def predict_masks(self, batch, boxes, classes, valid):
        share = (jnp.arange(SIDE) + 0.5) / SIDE
        image = batch["image"].astype(jnp.float32) / 255

        def one(image, box, class_):
            x, y = box[0] + share * (box[2] - box[0]), box[1] + share * (box[3] - box[1])
            at = jnp.meshgrid(y - 0.5, x - 0.5, indexing="ij")
            return jax.scipy.ndimage.map_coordinates(image[..., class_], at, order=1)

        masks = jax.vmap(jax.vmap(one, (None, 0, 0)))(image, boxes, classes)
        return quantise(jnp.where(valid[..., None, None], masks, 0.0))


def _ends(there):
    """First place and place after the last, (B, 3), where `there` (B, n, 3) holds."""
    return jnp.argmax(there, 1), there.shape[1] - jnp.argmax(there[:, ::-1], 1)


def write_photos(folder, num_images=5) -> tuple[Dataset, np.ndarray]:
    """Photos of an ellipse in each colour, landscape and portrait, and the masks (n, 3) of them."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    truth = np.empty((num_images, 3), object)
    with DatasetWriter(
        folder / "set", "s", LABELS, LABELS, None, str(folder), has_masks=True
    ) as writer:
        for i in range(num_images):
            size = (60, 90) if i % 3 else (90, 60)
            y, x = np.mgrid[: size[0], : size[1]] + 0.5
            pixels, boxes = np.zeros((*size, 3), np.uint8), []
            for c in range(3):
                centre, radii = rng.uniform(20, np.array(size) - 20), rng.uniform(9, 18, 2)
                lean = rng.uniform(-0.5, 0.5)  # so that mirrored ones differ
                across = (x - centre[1]) - lean * (y - centre[0])
                mask = ((y - centre[0]) / radii[0]) ** 2 + (across / radii[1]) ** 2 < 1
                pixels[mask, c] = 255
                rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
                boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                truth[i, c] = mask
            Image.fromarray(pixels).save(folder / f"{i}.png")
            entries = [
                {"size": list(size), "counts": counts.decode()} for counts in rle.encode(truth[i])
            ]
            boxes = np.array(boxes) / [size[1], size[0], size[1], size[0]]
            writer.add_image(f"{i}", f"{i}.png", size, boxes, [0, 1, 2], masks=entries)
        writer.add_split("train", range(num_images))
        writer.add_split("validation", range(num_images))
    return Dataset.open(folder / "set"), truth
