"""Merges any number of detections tables into one.

    python -m ensemble.merge --config=configs/ensemble/voting.py --inputs=a.parquet,b.parquet \\
        --output=m.parquet

Chunks of whole images of all tables go through these steps; memory depends on the chunk, not on
the number of images or tables:

1. and 2. rows are prepared: mapped labels, experts, weights (`ensemble.preparation`);
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import Float32, Int32, Int64
from ml_collections import config_flags

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.parallel import prefetch
from common.io.paths import PathLike, resolved
from common.io.progress import Progress
from common.tables import DetectionsWriter
from common.tables.table import COORDINATE_SLACK, MAX_SCORE
from common.training import distributed
from ensemble import rescoring
from ensemble.chunks import Chunk, aligned_chunks
from ensemble.inputs import Tables, parse_inputs
from ensemble.operators import Operator, make_operator
from ensemble.operators.groups import Rows, apply_operator
from ensemble.preparation import Preparation, open_prepared
from ensemble.relations import rules
from ensemble.tree import binary_tree as tree_lib

_KNEE = 1.25  # largest score that is written as it is


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that the config asks for, read and checked.

    Attributes:
      names: of the tables.
      num_classes: K.
      preparation: what is done to the rows before the operator.
      operator: of the groups, when there is no tree.
      tree: searched ensemble, or None.
      rules: relations between classes, or None.
      rescoring: factors of rare and common classes, or None.
      max_detections: of an image; 0: no limit.
      masks: whether rows have masks.
    """

    names: Sequence[str]
    num_classes: int
    preparation: Preparation
    operator: Operator | None
    tree: tree_lib.Tree | None
    rules: rules.Rules | None
    rescoring: rescoring.Rescoring | None
    max_detections: int
    masks: bool


@dataclasses.dataclass(frozen=True)
class Merged:
    """Final rows of a chunk, by image, then score descending.

    Attributes:
      images: (n,) image index.
      labels: (n,) class index.
      scores: (n,) in [0, MAX_SCORE].
      boxes: (n, 4) normalised.
      source: (n,) row of the chunk that each stems from (a fused box: from its best).
    """

    images: Int32[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    boxes: Float32[np.ndarray, "n 4"]
    source: Int64[np.ndarray, " n"] | None


def merge_tables(
    inputs: Sequence[str],
    config: Mapping[str, Any],
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
    dataset = Dataset.open(config["dataset"]) if config["dataset"] else None
    tables, preparation = open_prepared(inputs, config, dataset)
    plan = make_plan(config, tables, preparation)
    say(
        f"{len(tables.tables)} tables ({', '.join(tables.names)}), {len(tables.image_ids)} images, "
        f"{len(tables.labels)} classes, {tables.num_rows} detections",
        flush=True,
    )
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
        chunks = aligned_chunks(tables, rows=config["chunk_rows"], images=images, masks=plan.masks)
        for chunk in prefetch(chunks):
            merged = merge_chunk(plan, chunk)
            _write(writer, tables.image_ids, labels, chunk, merged)
            counts["rows in"] += len(chunk)
            counts["rows out"] += len(merged.scores)
            progress.report(chunk.stop - images.start, counts)
        progress.report(len(images), counts, last=True)
    return {"images": len(images), "read": counts["rows in"], "written": counts["rows out"]}


def make_plan(config: Mapping[str, Any], tables: Tables, preparation: Preparation) -> Plan:
    """Reads the files that the config names and checks its fields.

    Raises:
      UserError: names the field or file.
    """
    for name, low in (("max_detections", 0), ("chunk_rows", 1)):
        if not config[name] >= low:
            raise UserError(f"config.{name}: found {config[name]}, expected {low} or more")
    tree = None
    if config["tree"]:
        tree = tree_lib.load(config["tree"])
        tree_lib.check_models(tree, tables.names)
    if config["masks"]:
        for table in tables.tables:
            if not table.reader.has_masks:
                raise UserError(f"{table.reader.path}: no mask column, but config.masks is set")
        if tree is not None:
            raise UserError("config.masks: a searched tree joins boxes only, expected False")
    settings = dict(config["relations"].items())
    relations_file = settings.pop("file")
    factors = config["rescoring"]
    num_tables = len(tables.tables)
    return Plan(
        names=tables.names,
        num_classes=len(tables.labels),
        preparation=preparation,
        operator=None if tree else make_operator(config["operator"], num_tables),
        tree=tree,
        rules=rules.load_rules(relations_file, tables.labels, settings) if relations_file else None,
        rescoring=rescoring.Rescoring(
            rescoring.read_groups(factors["groups"], tables.labels),
            factors["mode"],
            tuple(float(factors[name]) for name in rescoring.GROUPS),
        )
        if factors["groups"]
        else None,
        max_detections=int(config["max_detections"]),
        masks=bool(config["masks"]),
    )


def merge_chunk(plan: Plan, chunk: Chunk) -> Merged:
    """Steps 1 to 6 for the rows of whole images."""
    source, images, labels, models, scores, boxes = plan.preparation.apply(chunk)
    # Images count from the start of the chunk, which keeps the keys small.
    groups = (images - chunk.first).astype(np.int64) * plan.num_classes + labels
    rows = Rows(groups, scores, boxes, models)
    if plan.tree is not None:
        by_model = {name: rows.take(models == place) for place, name in enumerate(plan.names)}
        fused, source = tree_lib.apply(plan.tree, by_model), None
    else:
        fused, kept = apply_operator(rows, plan.operator)
        source = source[kept]
    images = fused.group // plan.num_classes
    labels = fused.group % plan.num_classes
    scores, boxes = fused.scores, fused.boxes
    if (expanded := plan.preparation.expand_merged(labels)) is not None:
        copies, labels = expanded
        images, scores, boxes = images[copies], scores[copies], boxes[copies]
        source = None if source is None else source[copies]
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
        source=None if source is None else source[best],
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
        masks = ()
        if chunk.masks is not None:
            source = merged.source[rows]
            masks = (chunk.masks[source].tolist(), chunk.mask_sizes[source])
        writer.add(
            image_ids[image],
            labels[merged.labels[rows]],
            merged.scores[rows],
            merged.boxes[rows],
            *masks,
        )
        start = stop


def _metadata(config: Mapping[str, Any], tables: Tables, plan: Plan) -> dict[str, Any]:
    """What the output says of itself; the same in all processes."""
    keys = ("model", "dataset", "split", "step")
    inputs = [
        {"name": table.name, "path": str(table.reader.path)}
        | {key: table.reader.metadata[key] for key in keys if key in table.reader.metadata}
        for table in tables.tables
    ]
    metadata = {"model": config["name"], "config": _plain(config)}
    for key in ("dataset", "split"):
        values = [entry.get(key) for entry in inputs]
        if values[0] is not None and all(value == values[0] for value in values):
            metadata[key] = values[0]
    expanded = tables.expanded or plan.preparation.expansion != "none"
    return {**metadata, "inputs": inputs, "expanded": expanded}


def _plain(config: Any) -> Any:
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return {name: _plain(v) if isinstance(v, Mapping) else v for name, v in config.items()}


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Python file with get_config(arg).")
    flags.DEFINE_list("inputs", None, "Tables, as path or name=path, with commas between them.")
    flags.DEFINE_string("output", None, "Parquet file to write (a folder with many hosts).")
    flags.mark_flags_as_required(["config", "inputs", "output"])


def main():
    distributed.initialize()
    merge_tables(
        flags.FLAGS.inputs,
        flags.FLAGS.config,
        flags.FLAGS.output,
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
