"""What becomes of the rows of the tables before an operator or a searched tree sees them.

`ensemble.merge` and `ensemble.search` both open and prepare their tables here, so that a tree is
tuned on the very scores that it is used on:

1. labels of another vocabulary are mapped, images of different coverage brought together;
2. classes outside an expert's list are dropped;
3. with expansion "before", detections are copied to their parent classes;
4. scores become precisions, when the config names a calibration (`ensemble.calibrate`), and its
   second opinion changes them; by its recipe some models are dropped;
5. scores are multiplied by the weights of model and class; those below `min_score` are dropped.

Shape legend: T tables, K classes, n rows of a chunk, m prepared rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from common.data.dataset import Dataset
from common.io.errors import UserError
from common.tables.class_mapping import find_class_mapping
from common.tables.hierarchy import ancestors, repeat_with
from ensemble.calibration import calibration as calibrations
from ensemble.calibration.calibration import Calibration
from ensemble.chunks import Chunk
from ensemble.class_weights import class_weights, kept_classes, parse_pairs
from ensemble.inputs import Tables, open_tables
from ensemble.settings import EnsembleSettings


class PreparedRows(NamedTuple):
    """Rows of a chunk that enter the ensemble, sorted by table, then image.

    Attributes:
      source: row of the chunk that each comes from.
      images: image index.
      labels: class index, of a parent class for a copy.
      models: place of the table among the inputs.
      scores: weighted.
      boxes: normalised.
    """

    source: Int64[np.ndarray, " m"]
    images: Int[np.ndarray, " m"]
    labels: Int[np.ndarray, " m"]
    models: Int[np.ndarray, " m"]
    scores: Float32[np.ndarray, " m"]
    boxes: Float32[np.ndarray, "m 4"]


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The steps before the operator.

    Attributes:
      kept: classes that each table contributes.
      weights: of each table's detections of each class, at most 1.
      min_score: weighted scores below it are dropped.
      expansion: when detections are copied to parent classes, "none", "before" or "after".
      parents: row c marks the ancestors of class c; None without expansion.
      calibration: of the scores; None leaves them as they are.
      chosen: classes that each table contributes by the calibration's recipe; None without it.
    """

    kept: Bool[np.ndarray, "T K"]
    weights: Float32[np.ndarray, "T K"]
    min_score: float = 0.0
    expansion: str = "none"
    parents: Bool[np.ndarray, "K K"] | None = None
    calibration: Calibration | None = None
    chosen: Bool[np.ndarray, "T K"] | None = None

    def apply(self, chunk: Chunk) -> PreparedRows:
        """Steps 2 to 5 for the rows of whole images."""
        source = np.flatnonzero(self.kept[chunk.models, chunk.labels])
        labels = chunk.labels[source]
        if self.expansion == "before" and self.parents is not None:
            copies, labels = repeat_with(labels, self.parents)
            source = source[copies]
        models = chunk.models[source]
        weights = self.weights[models, labels]
        scores = chunk.scores[source]
        if self.calibration is not None:
            scores = self._calibrated(chunk, source, labels, models, scores)
        scores = scores * weights
        used = (weights > 0) & (scores >= self.min_score)
        if self.chosen is not None:
            used &= self.chosen[models, labels]
        if not used.all():
            source, labels, models, scores = source[used], labels[used], models[used], scores[used]
        return PreparedRows(
            source, chunk.images[source], labels, models, scores, chunk.boxes[source]
        )

    def unweighted(self) -> "Preparation":
        """The same rows with the scores of their tables."""
        return dataclasses.replace(self, weights=np.ones_like(self.weights), min_score=0.0)

    def of_prepared(self) -> "Preparation":
        """For rows that were prepared already: what is still to be done."""
        return Preparation(
            kept=np.ones_like(self.kept),
            weights=np.ones_like(self.weights),
            min_score=self.min_score,
            expansion="after" if self.expansion == "after" else "none",
            parents=self.parents,
        )

    def _calibrated(
        self,
        chunk: Chunk,
        source: Int64[np.ndarray, " m"],
        labels: Int[np.ndarray, " m"],
        models: Int[np.ndarray, " m"],
        scores: Float32[np.ndarray, " m"],
    ) -> Float32[np.ndarray, " m"]:
        assert self.calibration is not None
        scores = self.calibration.precisions(models, labels, scores)
        opinion = self.calibration.opinion
        if opinion is None:
            return scores
        return opinion.apply(chunk.images[source], labels, models, scores, chunk.boxes[source])

    def expand_merged(
        self, labels: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]] | None:
        """Rows and classes of the copies of merged detections; None unless expansion is "after"."""
        if self.expansion != "after" or self.parents is None:
            return None
        return repeat_with(labels, self.parents)


def open_prepared(
    inputs: Sequence[str], settings: EnsembleSettings, dataset: Dataset | None
) -> tuple[Tables, Preparation]:
    """Opens the tables of an ensemble and reads what their preparation needs.

    Args:
      inputs: paths or `name=path`.
      settings: of the ensemble.
      dataset: gives the order of the classes and the hierarchy; None takes the tables' labels.

    Raises:
      UserError: names the table, field or file.
    """
    tables = open_tables(
        inputs,
        labels=dataset.class_labels if dataset else None,
        coverage=settings.coverage,
        mappings=read_mappings(settings.mappings),
    )
    parents = None
    if settings.expansion != "none":
        if dataset is None:
            raise UserError(
                "config.expansion: needs the hierarchy, set --config.dataset=DIR (a dataset "
                "directory written by scripts.prepare_data)"
            )
        if tables.expanded:
            raise UserError(
                f"config.expansion: {tables.tables[0].reader.path} is expanded to parent classes "
                "already, expected 'none'"
            )
        parents = ancestors(dataset.hierarchy, tables.labels)
    calibration, chosen = _read_calibration(settings, tables)
    return tables, Preparation(
        kept=kept_classes(tables.names, tables.labels, settings.experts),
        weights=class_weights(tables.names, tables.labels, settings.weights),
        min_score=settings.min_score,
        expansion=settings.expansion,
        parents=parents,
        calibration=calibration,
        chosen=chosen,
    )


def _read_calibration(
    settings: EnsembleSettings, tables: Tables
) -> tuple[Calibration | None, Bool[np.ndarray, "T K"] | None]:
    """Calibration for these tables, and what they contribute where its recipe is asked for."""
    by_recipe = settings.operator["name"] == calibrations.RECIPE and not settings.tree
    if not settings.calibration:
        if by_recipe:
            raise UserError(
                f"config.operator.name: {calibrations.RECIPE!r} needs --config.calibration=FILE, "
                "written by ensemble.calibrate"
            )
        return None, None
    found = calibrations.load(settings.calibration)
    if not (found.recipe.opinion if by_recipe else settings.opinion):
        found = dataclasses.replace(found, opinion=None)
    if by_recipe or found.opinion is not None:
        needed = found.recipe.models if found.opinion is None else found.names
        missing = [name for name in needed if name not in tables.names]
        if missing:
            what = "recipe" if by_recipe else "second opinion (--config.opinion=False: without)"
            raise UserError(
                f"{settings.calibration}: its {what} needs the tables {', '.join(needed)}, "
                f"--inputs lacks {missing[0]!r} (tables are given as name=path)"
            )
    found = found.arranged(tables.names, tables.labels, settings.calibration)
    return found, found.kept() if by_recipe else None


def read_mappings(config: Any) -> dict[str, Mapping[str, Sequence[str]]]:
    """Class mappings by model from `name=MAP` pairs (`class_mapping.find_class_mapping`)."""
    pairs = parse_pairs(config, "config.mappings")
    return {name: find_class_mapping(text).targets for name, text in pairs.items()}
