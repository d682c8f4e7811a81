"""Merges any number of detections tables into one.

    python -m ensemble.merge --config=configs/ensemble/voting.py --inputs=a.parquet,b.parquet \\
        --output=m.parquet

Chunks of whole images of all tables go through these steps; memory depends on the chunk, not on
the number of images or tables:

1. and 2. rows are prepared: mapped labels, experts, calibrated scores, weights
   (`ensemble.preparation`);
3. the operator, or a searched tree, makes one list of each (image, class);
4. detections are copied to parent classes, when the config says so;
5. relations between classes, then the factors of rare and common classes, change the scores;
6. the best `max_detections` of each image are written.

Weights and factors never exceed 1: they are divided by the largest, which changes no ranking. Votes
can still raise scores above what tables may hold; `squash` then maps what lies above 1.25 into
(1.25, 1.5), increasing throughout, so that no ranking changes. Scores of detectors (at most 1) stay
below 1.2 in the paper's voting and are written as they are.

With several processes (`common.training.distributed`) each writes the shard of its part of the
images; the output is then a folder. The devices of a process share its chunks.

Shape legend: T tables, K classes, n rows of a chunk.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import Float32, Int32
from ml_collections import ConfigDict, config_flags

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.parallel import prefetch
from common.io.paths import PathLike, resolved
from common.io.progress import Progress
from common.io.settings import read_settings
from common.tables import DetectionsWriter
from common.tables.table import COORDINATE_SLACK, MAX_SCORE
from common.training import distributed
from ensemble import mask_fusion, rescoring
from ensemble.chunks import Chunk, aligned_chunks
from ensemble.class_weights import model_weights
from ensemble.inputs import Tables, parse_inputs
from ensemble.operators import Operator, make_operator
from ensemble.operators.groups import Rows, apply_operator
from ensemble.preparation import Preparation, open_prepared
from ensemble.relations import rules
from ensemble.results_files import as_results, as_tables
from ensemble.settings import EnsembleSettings
from ensemble.tree import binary_tree as tree_lib

_KNEE = 1.25  # largest score that is written as it is


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that the config asks for, read and checked.

    Attributes:
      names: of the tables.
      num_classes: K.
      preparation: what is done to the rows before the operator.
      method: operator, or searched tree, that makes one list of each (image, class).
      rules: relations between classes, or None.
      rescoring: factors of rare and common classes, or None.
      max_detections: of an image; 0: no limit.
      masks: whether rows have masks.
      mask_rule: which masks merged rows get, see `ensemble.mask_fusion`.
      mask_match: whether boxes or masks overlap.
    """

    names: Sequence[str]
    num_classes: int
    preparation: Preparation
    method: Operator | tree_lib.Tree
    rules: rules.Rules | None
    rescoring: rescoring.Rescoring | None
    max_detections: int
    masks: bool
    mask_rule: str
    mask_match: str


@dataclasses.dataclass(frozen=True)
class Merged:
    """Final rows of a chunk, by image, then score descending.

    Attributes:
      images: (n,) image index.
      labels: (n,) class index.
      scores: (n,) in [0, MAX_SCORE].
      boxes: (n, 4) normalised.
      masks: (n,) COCO RLE counts, or None.
      mask_sizes: (n, 2) height and width, or None.
    """

    images: Int32[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    boxes: Float32[np.ndarray, "n 4"]
    masks: np.ndarray | None = None
    mask_sizes: Int32[np.ndarray, "n 2"] | None = None


def merge_tables(
    inputs: Sequence[str],
    config: ConfigDict,
    output: PathLike,
    *,
    process_index: int = 0,
    process_count: int = 1,
    say: Callable = print,
) -> dict[str, int]:
    """Merges tables as the config says and writes the output by atomic rename.

    Args:
      inputs: paths or `name=path`, any number.
      config: such as `configs.ensemble.voting.get_config()`.
      output: Parquet file; with several processes the folder of the shards.
      process_index: of this host.
      process_count: number of hosts.
      say: where progress lines go.

    Returns:
      images, rows read (of kept labels) and rows written, of this process.

    Raises:
      UserError: tables that do not belong together, broken rows, or a config that does not fit.
    """
    for path in parse_inputs(inputs)[0]:
        if resolved(path) == resolved(output):
            raise UserError(f"--output={output}: is one of the inputs, expected another name")
    settings = read_settings(EnsembleSettings, config)
    dataset = Dataset.open(settings.dataset) if settings.dataset else None
    tables, preparation = open_prepared(inputs, settings, dataset)
    plan = make_plan(settings, tables, preparation)
    say(
        f"{len(tables.tables)} tables ({', '.join(tables.names)}), {len(tables.image_ids)} images, "
        f"{len(tables.labels)} classes, {tables.num_rows} detections",
        flush=True,
    )
    if not plan.masks and any(table.reader.has_masks for table in tables.tables):
        say("note: masks of the tables are left out, --config.masks=True keeps them", flush=True)
    total = len(tables.image_ids)
    images = range(
        total * process_index // process_count, total * (process_index + 1) // process_count
    )
    counts = {"rows in": 0, "rows out": 0}
    labels = np.array(tables.labels, object)
    progress = Progress(len(images), what="images", say=say)
    with DetectionsWriter(
        output,
        _metadata(config, tables, plan),
        process_index=process_index,
        process_count=process_count,
        masks=plan.masks,
    ) as writer:
        chunks = aligned_chunks(tables, rows=settings.chunk_rows, images=images, masks=plan.masks)
        for chunk in prefetch(chunks):
            merged = merge_chunk(plan, chunk)
            _write(writer, tables.image_ids, labels, chunk, merged)
            counts["rows in"] += len(chunk)
            counts["rows out"] += len(merged.scores)
            progress.report(chunk.stop - images.start, counts)
        progress.report(len(images), counts, last=True)
    return {"images": len(images), "read": counts["rows in"], "written": counts["rows out"]}


def make_plan(settings: EnsembleSettings, tables: Tables, preparation: Preparation) -> Plan:
    """Reads the files that the config names.

    Raises:
      UserError: names the field or file.
    """
    method: Operator | tree_lib.Tree
    if settings.tree:
        method = tree_lib.load(settings.tree)
        tree_lib.check_models(method, tables.names)
    else:
        operator, weights = settings.operator, model_weights(tables.names, settings.weights)
        if preparation.chosen is not None and preparation.calibration is not None:
            operator = preparation.calibration.recipe.operator
            weights = weights * preparation.chosen.any(axis=1)
        method = make_operator(operator, weights.tolist())
    if settings.masks:
        for table in tables.tables:
            if not table.reader.has_masks:
                raise UserError(f"{table.reader.path}: no mask column, but config.masks is set")
        if settings.tree:
            raise UserError("config.masks: a searched tree joins boxes only, expected False")
    relations, factors = settings.relations, settings.rescoring
    return Plan(
        names=tables.names,
        num_classes=len(tables.labels),
        preparation=preparation,
        method=method,
        rules=None
        if not relations.file
        else rules.load_rules(relations.file, tables.labels, relations),
        rescoring=rescoring.Rescoring(
            rescoring.read_groups(factors.groups, tables.labels),
            factors.mode,
            (factors.rare, factors.common, factors.frequent),
        )
        if factors.groups
        else None,
        max_detections=settings.max_detections,
        masks=settings.masks,
        mask_rule=settings.mask_rule,
        mask_match=settings.mask_match,
    )


def merge_chunk(plan: Plan, chunk: Chunk) -> Merged:
    """Steps 1 to 6 for the rows of whole images."""
    prepared = plan.preparation.apply(chunk)
    # Images count from the start of the chunk, which keeps the keys small.
    groups = (prepared.images - chunk.first).astype(np.int64) * plan.num_classes + prepared.labels
    rows = Rows(groups, prepared.scores, prepared.boxes, prepared.models)
    masks = sizes = None
    if isinstance(plan.method, tree_lib.Tree):
        places = enumerate(plan.names)
        by_model = {name: rows.take(rows.model == place) for place, name in places}
        fused = tree_lib.apply(plan.method, by_model)
    elif chunk.masks is not None and chunk.mask_sizes is not None:
        fused, masks, sizes = mask_fusion.merge_rows(
            rows,
            plan.method,
            chunk.masks[prepared.source],
            chunk.mask_sizes[prepared.source],
            rule=plan.mask_rule,
            match=plan.mask_match,
        )
    else:
        fused, _ = apply_operator(rows, plan.method)
    images = fused.group // plan.num_classes
    labels = fused.group % plan.num_classes
    scores, boxes = fused.scores, fused.boxes
    if (expanded := plan.preparation.expand_merged(labels)) is not None:
        copies, labels = expanded
        images, scores, boxes = images[copies], scores[copies], boxes[copies]
        if masks is not None and sizes is not None:
            masks, sizes = masks[copies], sizes[copies]
    if plan.rules is not None:
        scores = rules.rescore(plan.rules, images, labels, scores, boxes)
    if plan.rescoring is not None:
        scores = plan.rescoring.apply(labels, scores)
    best = rescoring.best_rows(images, scores, plan.max_detections)
    return Merged(
        images=(images[best] + chunk.first).astype(np.int32),
        labels=labels[best].astype(np.int32),
        scores=squash(scores[best]),
        boxes=_tidy(boxes[best]),
        masks=None if masks is None else masks[best],
        mask_sizes=None if sizes is None else sizes[best],
    )


def squash(scores: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Scores as tables may hold them: the same up to 1.25, larger ones increasing towards 1.5."""
    above = np.maximum(scores - np.float32(_KNEE), 0)
    room = np.float32(MAX_SCORE - _KNEE)
    return np.where(scores > _KNEE, _KNEE + room * (above / (above + room)), scores).astype(
        np.float32
    )


def _tidy(boxes: Float32[np.ndarray, "n 4"]) -> Float32[np.ndarray, "n 4"]:
    """Takes the rounding of averages away: boxes stay in the range of their sources, upright."""
    boxes = np.clip(boxes, -COORDINATE_SLACK, 1 + COORDINATE_SLACK)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
    return boxes


def _write(
    writer: DetectionsWriter,
    image_ids: Sequence[str],
    labels: np.ndarray,
    chunk: Chunk,
    merged: Merged,
) -> None:
    ends = np.searchsorted(merged.images, np.arange(chunk.first, chunk.stop), "right")
    start = 0
    for image, stop in zip(range(chunk.first, chunk.stop), ends.tolist(), strict=True):
        rows = slice(start, stop)
        masks: tuple[Any, ...] = ()
        if merged.masks is not None and merged.mask_sizes is not None:
            masks = (merged.masks[rows].tolist(), merged.mask_sizes[rows])
        writer.add(
            image_ids[image],
            labels[merged.labels[rows]],
            merged.scores[rows],
            merged.boxes[rows],
            *masks,
        )
        start = stop


def _metadata(config: ConfigDict, tables: Tables, plan: Plan) -> dict[str, Any]:
    """What the output says of itself; the same in all processes."""
    keys = ("model", "dataset", "split", "step")
    inputs = [
        {"name": table.name, "path": str(table.reader.path)}
        | {key: table.reader.metadata[key] for key in keys if key in table.reader.metadata}
        for table in tables.tables
    ]
    metadata = {"model": config.name, "config": config.to_dict()}
    for key in ("dataset", "split"):
        values = [entry.get(key) for entry in inputs]
        if values[0] is not None and all(value == values[0] for value in values):
            metadata[key] = values[0]
    expanded = tables.expanded or plan.preparation.expansion != "none"
    return {**metadata, "inputs": inputs, "expanded": expanded}


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Python file with get_config(arg).")
    flags.DEFINE_list(
        "inputs",
        None,
        "Tables or COCO results (.json, with --config.dataset), as path or name=path, with commas "
        "between them.",
    )
    flags.DEFINE_string(
        "output", None, "Parquet file to write (a folder with many hosts), or COCO results (.json)."
    )
    flags.mark_flags_as_required(["config", "inputs", "output"])


def main():
    distributed.initialize()
    config, output = flags.FLAGS.config, flags.FLAGS.output
    with (
        as_tables(flags.FLAGS.inputs, config.dataset, masks=config.masks) as inputs,
        as_results(output, config.dataset) as table,
    ):
        if table != output and jax.process_count() > 1:
            raise UserError(f"--output={output}: several processes write a folder of tables")
        merge_tables(
            inputs,
            config,
            table,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            say=print if distributed.is_main_process() else lambda *_, **__: None,
        )
    distributed.barrier("merge")
    if distributed.is_main_process():
        print(f"wrote {flags.FLAGS.output}", flush=True)


if __name__ == "__main__":
    define_flags()
    run_main(main)
