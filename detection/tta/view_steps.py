"""The compiled steps of test-time augmentation (`detection.tta.test_time`).

Batches, candidates and results stay on the device that holds their photos: no step needs another
device.

Shape legend
  n     photos of a block that lie on one device; b of them in one batch
  V     views: scales, each also mirrored
  P, R  proposals per photo, of one view and merged (P = R)
  D     detections per photo
  K     classes
  S     side of a mask head's map
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, UInt16

from common.geometry import boxes as box_ops
from common.geometry.nms import nms_top
from common.nn.layers.canvas import mirror
from common.training.compiling import announced
from common.training.distributed import DATA_AXIS
from detection.models.faster_rcnn import FasterRCNN, select_detections

# ------------------------------------------------------------------- between photo and canvas


def to_photo(
    boxes: Float[Array, "b *N 4"], image_size: Float[Array, "b 2"], flip: Bool[Array, ""]
) -> Float[Array, "b *N 4"]:
    """Canvas pixels of a view to normalised coordinates of the photo, clipped to it."""
    unit = _over_boxes(box_ops.per_side(image_size), boxes.ndim)
    return _mirror_boxes(jnp.clip(boxes / unit, 0.0, 1.0), flip)


def to_canvas(
    boxes: Float[Array, "b *N 4"], image_size: Float[Array, "b 2"], flip: Bool[Array, ""]
) -> Float[Array, "b *N 4"]:
    """Normalised coordinates of the photo to canvas pixels of a view."""
    unit = _over_boxes(box_ops.per_side(image_size), boxes.ndim)
    return _mirror_boxes(boxes, flip) * unit


def _over_boxes(unit: Float[Array, "b 4"], ndim: int) -> Float[Array, "b ... 4"]:
    return unit.reshape(len(unit), *[1] * (ndim - 2), 4)


def _mirror_boxes(boxes, flip):
    x1, y1, x2, y2 = jnp.split(boxes, 4, axis=-1)
    mirrored = jnp.concatenate([1.0 - x2, y1, 1.0 - x1, y2], axis=-1)
    return jnp.where(flip, mirrored, boxes)


def mirror_masks(masks: UInt16[Array, "b D S S"], flip: Bool[Array, ""]) -> Array:
    """The masks in their boxes, mirrored if `flip`."""
    return jnp.where(flip, masks[..., ::-1], masks)


def _as_seen(batch: dict[str, Array], flip: Bool[Array, ""]) -> dict[str, Array]:
    """The batch, mirrored if `flip`."""
    image = jax.lax.cond(
        flip, mirror, lambda images, widths: images, batch["image"], batch["image_size"][:, 1]
    )
    return {**batch, "image": image}


# ------------------------------------------------------------------- compiled steps


def _on_mesh(function: Callable, mesh: Mesh, in_specs: tuple) -> Callable:
    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=P(DATA_AXIS), check_vma=False
    )
    return jax.jit(sharded)


def _rows_of(chunks: Sequence[Any]) -> Any:
    """Batches put together along the photos."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *chunks)


def _all_views(views: Sequence[Sequence[dict[str, Array]]]) -> dict[str, Array]:
    """Candidates of all views of each photo in one row."""
    rows = [_rows_of(chunks) for chunks in views]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *rows)


@functools.cache
def view_step(
    model: FasterRCNN, mesh: Mesh, method: str | None = None, masks: bool = False
) -> Callable:
    """`(variables, batch, flip) -> boxes`, normalised, with scores and so on.

    They are the detections of `FasterRCNN.detect`, or with `method` "propose_on" the proposals.
    Their masks are made only if `masks`, and lie as in the photo.
    """

    def view(variables, batch, flip):
        options = {"train": False} if method is None else {"method": method}
        results = model.apply(variables, _as_seen(batch, flip), **options)
        boxes = to_photo(results["boxes"], batch["image_size"], flip)
        found = {name: results[name] for name in results if name != "masks"}
        if masks:
            found["masks"] = mirror_masks(results["masks"], flip)
        return {**found, "boxes": boxes, "valid": results["valid"] & box_ops.is_valid(boxes)}

    return _on_mesh(view, mesh, (P(), P(DATA_AXIS), P()))


@functools.cache
def union_step(model: FasterRCNN, mesh: Mesh) -> Callable:
    """`views -> detections`: NMS in each class over the detections of all views."""
    settings = model.settings.detections

    def select(detections):
        index, kept = nms_top(
            detections["boxes"],
            detections["scores"],
            detections["valid"],
            settings.iou_threshold,
            settings.max_detections,
            detections["classes"],
        )
        return {**{name: value[index] for name, value in detections.items()}, "valid": kept}

    return _on_mesh(lambda views: jax.vmap(select)(_all_views(views)), mesh, (P(DATA_AXIS),))


@functools.cache
def join_step(model: FasterRCNN, mesh: Mesh) -> Callable:
    """`views -> {'boxes': (n,R,4) normalised, 'valid': (n,R)}`: NMS over all views' proposals."""
    nms_iou = model.settings.rpn.test_proposals.nms_iou

    def join(views):
        limit = views[0][0]["boxes"].shape[1]

        def select(boxes, scores, valid):
            index, kept = nms_top(boxes, scores, valid, nms_iou, limit)
            return {"boxes": jnp.where(kept[:, None], boxes[index], 0.0), "valid": kept}

        return jax.vmap(select)(**_all_views(views))

    return _on_mesh(join, mesh, (P(DATA_AXIS),))


@functools.cache
def score_step(model: FasterRCNN, mesh: Mesh) -> Callable:
    """`(variables, batch, flip, proposals, number) -> {'scores', 'boxes' normalised}`.

    `number` says which b of the device's n photos the batch has.
    """

    def score(variables, batch, flip, proposals, number):
        count = batch["image"].shape[0]
        boxes, valid = (
            jax.lax.dynamic_slice_in_dim(proposals[name], number * count, count)
            for name in ("boxes", "valid")
        )
        results = model.apply(
            variables,
            _as_seen(batch, flip),
            to_canvas(boxes, batch["image_size"], flip),
            valid,
            method="score_proposals",
        )
        return {
            "scores": results["scores"],
            "boxes": to_photo(results["boxes"], batch["image_size"], flip),
        }

    return _on_mesh(score, mesh, (P(), P(DATA_AXIS), P(), P(DATA_AXIS), P()))


@functools.cache
def sum_step(mesh: Mesh) -> Callable:
    """`(total or None, batches of a view) -> total` over the views so far."""

    def add(total, chunks):
        rows = _rows_of(chunks)
        return rows if total is None else jax.tree.map(jnp.add, total, rows)

    return _on_mesh(add, mesh, (P(DATA_AXIS), P(DATA_AXIS)))


@functools.cache
def average_step(model: FasterRCNN, mesh: Mesh) -> Callable:
    """`(total, valid, number of views) -> detections`: element-wise means, then NMS by class."""

    def average(total, valid, num_views):
        mean = jax.tree.map(lambda x: x / num_views, total)
        return select_detections(mean["boxes"], mean["scores"], valid, model.settings)

    return _on_mesh(average, mesh, (P(DATA_AXIS), P(DATA_AXIS), P()))


@functools.cache
def mask_step(model: FasterRCNN, mesh: Mesh) -> Callable:
    """`(variables, batch, flip, detections, number) -> {'masks': uint32 (b,D,S,S)}` of a view.

    The masks are those of the detections of the block's photos, as they lie in the photo; `number`
    says which b of the device's n photos the batch has.
    """

    def outline(variables, batch, flip, detections, number):
        count = batch["image"].shape[0]
        boxes, classes, valid = (
            jax.lax.dynamic_slice_in_dim(detections[name], number * count, count)
            for name in ("boxes", "classes", "valid")
        )
        masks = model.apply(
            variables,
            _as_seen(batch, flip),
            to_canvas(boxes, batch["image_size"], flip),
            classes,
            valid,
            method="predict_masks",
        )
        return {"masks": mirror_masks(masks, flip).astype(jnp.uint32)}

    return _on_mesh(outline, mesh, (P(), P(DATA_AXIS), P(), P(DATA_AXIS), P()))


@functools.cache
def mean_masks_step(mesh: Mesh) -> Callable:
    """`(sum over views, number of views) -> uint16 (n,D,S,S)`: the mean of the views' maps."""

    def average(total, num_views):
        return jnp.round(total["masks"] / num_views).astype(jnp.uint16)

    return _on_mesh(average, mesh, (P(DATA_AXIS), P()))


def mean_masks(
    model: FasterRCNN,
    mesh: Mesh,
    variables: dict,
    batches: Sequence[Sequence[dict[str, Array]]],
    detections: dict[str, Array],
    views: Sequence[tuple[int, bool]],
    say: Callable = print,
) -> UInt16[Array, "n D S S"]:
    """The maps of the detections of a block: the mean over all views.

    Args:
      model: with a mask head.
      mesh: of the arrays.
      variables: of the model.
      batches: of each scale, those of the block in order.
      detections: boxes (n,D,4) normalised, classes and valid (n,D).
      views: (scale, mirrored?) of each.
      say: where it is said what compiles.
    """
    outline, add = announced(mask_step(model, mesh), "mask head", say), sum_step(mesh)
    given = {name: detections[name] for name in ("boxes", "classes", "valid")}
    total = None
    for scale, flip in views:
        numbered = enumerate(batches[scale])
        chunks = [outline(variables, batch, flip, given, np.int32(i)) for i, batch in numbered]
        total = add(total, chunks)
    return mean_masks_step(mesh)(total, np.float32(len(views)))
