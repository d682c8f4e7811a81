"""Rows of a split in memory, scored as if each image had never been seen.

Calibration and second opinion of an image come from the other folds, so what is merged here scores
as new images would. Recipes are compared on it (`recipes`). Of a large split some images are drawn.

Shape legend: n rows, I images of the tables, T tables, K classes, F folds.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from common.data.dataset import Dataset
from common.metrics import official
from common.metrics.names import Metric
from common.tables import Detections
from ensemble.calibration import opinion
from ensemble.calibration.calibration import Recipe, apply_curves, best_models
from ensemble.calibration.counting import JudgedChunk
from ensemble.calibration.fit import Fitted
from ensemble.chunks import Chunk
from ensemble.inputs import Tables
from ensemble.merge import Plan, merge_chunk
from ensemble.operators import make_operator

ROWS, MASK_ROWS = 600_000, 100_000


def sampled_images(
    tables: Tables, folds: Int[np.ndarray, " I"], limit: int, seed: int
) -> Bool[np.ndarray, " I"]:
    """Images of the split whose rows are kept: all, or as many as have about `limit` rows."""
    inside = folds >= 0
    share = limit * len(folds) / max(tables.num_rows, 1) / max(inside.sum(), 1)
    if share >= 1:
        return inside
    drawn = np.random.default_rng([seed, 1]).random(len(folds)) < share
    return inside & drawn


class Sample:
    """Collects the prepared rows of the sampled images."""

    def __init__(self, images: Bool[np.ndarray, " I"]):
        self.images = images
        self._parts: list[dict[str, np.ndarray]] = []

    def add(self, part: JudgedChunk) -> None:
        prepared, chunk = part.prepared, part.chunk
        targets = np.full(len(prepared.scores), np.nan)
        targets[part.judged.rows] = part.judged.targets
        own = np.flatnonzero(self.images[prepared.images])
        rows = dict(
            models=prepared.models[own],
            images=prepared.images[own],
            labels=prepared.labels[own],
            scores=prepared.scores[own],
            boxes=prepared.boxes[own],
            targets=targets[own],
            folds=part.folds[own],
        )
        if chunk.masks is not None and chunk.mask_sizes is not None:
            source = prepared.source[own]
            rows.update(masks=chunk.masks[source], mask_sizes=chunk.mask_sizes[source])
        self._parts.append(rows)

    def rows(self) -> dict[str, np.ndarray]:
        """All rows by table, then image."""
        names = self._parts[0].keys()
        rows = {name: np.concatenate([part[name] for part in self._parts]) for name in names}
        order = np.lexsort((rows["images"], rows["models"]))
        return {name: array[order] for name, array in rows.items()}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Rows of the sample with scores from the other folds.

    Attributes:
      dataset: truth.
      split: of it.
      metric: by which recipes are compared.
      plan: of merging, whose method a recipe replaces.
      tables: names and images.
      rows: of `Sample.rows`.
      images: places of the sampled images among the tables', rising.
      image_folds: fold of each of these.
      precisions: calibrated scores.
      opinions: scores by the second opinion.
      ranks: of each table in each class, by the folds but one.
    """

    dataset: Dataset
    split: str
    metric: Metric
    plan: Plan
    tables: Tables
    rows: dict[str, np.ndarray]
    images: Int[np.ndarray, " i"]
    image_folds: Int[np.ndarray, " i"]
    precisions: Float32[np.ndarray, " n"]
    opinions: Float32[np.ndarray, " n"]
    ranks: Float[np.ndarray, "F T K"]

    def score(self, recipe: Recipe, fold: int | None = None) -> float:
        """Figure of what a recipe makes of the rows, or of those of one fold."""
        figures = official.evaluate(
            self.metric,
            self.dataset,
            self.split,
            self.merged(recipe, fold),
            allow_partial=True,
            say=lambda _: None,
        )
        return next(iter(official.headline(self.metric, figures).values()))

    def merged(self, recipe: Recipe, fold: int | None = None) -> Detections:
        """What a recipe makes of the rows, as a table."""
        names = self.tables.names
        member = np.array([name in recipe.models for name in names])
        contributes = np.stack([best_models(ranks, member, recipe.best) for ranks in self.ranks])
        models, labels, folds = (self.rows[key] for key in ("models", "labels", "folds"))
        used = contributes[folds, models, labels]
        images = self.images
        if fold is not None:
            used &= folds == fold
            images = images[self.image_folds == fold]
        scores = self.opinions if recipe.opinion else self.precisions
        if len(recipe.models) == 1 and not recipe.opinion:
            # One curve for all folds changes no ranking; five would, a little.
            scores = self.rows["scores"]
        used = np.flatnonzero(used)
        chunk = Chunk(
            first=0,
            stop=len(images),
            images=np.searchsorted(images, self.rows["images"][used]).astype(np.int32),
            labels=labels[used].astype(np.int32),
            scores=scores[used],
            boxes=self.rows["boxes"][used],
            models=models[used].astype(np.int32),
            masks=self.rows["masks"][used] if "masks" in self.rows else None,
            mask_sizes=self.rows["mask_sizes"][used] if "masks" in self.rows else None,
        )
        method = make_operator(recipe.operator, member.astype(float).tolist())
        found = merge_chunk(dataclasses.replace(self.plan, method=method), chunk)
        return Detections(
            image_ids=[self.tables.image_ids[image] for image in images.tolist()],
            labels=self.dataset.class_labels,
            image_index=found.images,
            label_index=found.labels,
            scores=found.scores,
            boxes=found.boxes,
            metadata={},
            masks=found.masks,
            mask_sizes=found.mask_sizes,
        )


def held_out_scores(
    rows: dict[str, np.ndarray], fitted: Sequence[Fitted], say: Callable[[str], None]
) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"], opinion.Opinion]:
    """Calibrated scores and those of the second opinion, each from the other folds, and the opinion
    that all folds make."""
    models, labels, folds = rows["models"], rows["labels"], rows["folds"]
    num_folds = len(fitted[0].held)
    precisions = np.array(rows["scores"], np.float32)
    for fold in range(num_folds):
        own = np.flatnonzero(folds == fold)
        of_fold = [table.held[fold] for table in fitted]
        precisions[own] = apply_curves(of_fold, models[own], labels[own], rows["scores"][own])
    size = opinion.num_features(len(fitted))
    say(f"second opinion: {size} features of {len(models)} detections")
    table = opinion.features(rows["images"], labels, models, precisions, rows["boxes"], len(fitted))
    known = np.isfinite(rows["targets"])
    opinions = np.zeros(len(models), np.float32)

    def fit(chosen: np.ndarray) -> np.ndarray:
        return opinion.fit(table[chosen], models[chosen], rows["targets"][chosen], len(fitted))

    for fold in range(num_folds):
        weights = fit(known & (folds != fold))
        own = folds == fold
        opinions[own] = opinion.predict(weights, table[own], models[own], precisions[own])
    return precisions, opinions, opinion.Opinion(fit(known))
