"""Merges any number of detections tables into one.

    python -m ensemble.merge --config=configs/ensemble/voting.py --inputs=a.parquet,b.parquet \\
        --output=m.parquet

Chunks of whole images of all tables go through these steps; memory depends on the chunk, not on
the number of images or tables:

1. labels of another vocabulary are mapped, classes outside an expert's list dropped;
2. scores are multiplied by the weights of model and class (`ensemble.class_weights`);
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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import Bool, Float32, Int32, Int64
from ml_collections import config_flags

from common.data.dataset import Dataset
from common.io.commands import run_main
from common.io.errors import UserError
from common.tables import DetectionsWriter
from common.tables.class_mapping import read_class_mapping
from common.tables.hierarchy import ancestors, repeat_with
from common.tables.table import COORDINATE_SLACK, MAX_SCORE
from common.training import distributed
from ensemble import rescoring
from ensemble.class_weights import class_weights, kept_classes, parse_pairs
from ensemble.inputs import Chunk, Tables, aligned_chunks, open_tables, parse_inputs
from ensemble.operators import Operator, make_operator
from ensemble.operators.groups import Rows, apply_operator
from ensemble.relations import rules
from ensemble.tree import binary_tree as tree_lib

EXPANSIONS = ("none", "before", "after")
_KNEE = 1.25  # largest score that is written as it is
_SECONDS = 10.0  # between progress lines


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that the config asks for, read and checked.

    Attributes:
      names: of the tables.
      num_classes: K.
      kept: classes that each table contributes.
      weights: of each table's detections of each class.
      min_score: weighted scores below it are dropped.
      operator: of the groups, when there is no tree.
      tree: searched ensemble, or None.
      expansion: when detections are copied to parent classes, of EXPANSIONS.
      parents: row c marks the ancestors of class c; None without expansion.
      rules: relations between classes, or None.
      rescoring: factors of rare and common classes, or None.
      max_detections: of an image; 0: no limit.
      masks: whether rows have masks.
    """

    names: Sequence[str]
    num_classes: int
    kept: Bool[np.ndarray, "T K"]
    weights: Float32[np.ndarray, "T K"]
    min_score: float
    operator: Operator | None
    tree: tree_lib.Tree | None
    expansion: str
    parents: Bool[np.ndarray, "K K"] | None
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
    output: str | Path,
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
        if path.resolve() == Path(output).resolve():
            raise UserError(f"--output={output}: is one of the inputs, expected another name")
    dataset = Dataset.open(config["dataset"]) if config["dataset"] else None
    tables = open_tables(
        inputs,
        labels=dataset.class_labels if dataset else None,
        coverage=config["coverage"],
        mappings=read_mappings(config["mappings"]),
    )
    plan = make_plan(config, tables, dataset)
    say(
        f"{len(tables.tables)} tables ({', '.join(tables.names)}), {len(tables.image_ids)} images, "
        f"{len(tables.labels)} classes, {tables.num_rows} detections",
        flush=True,
    )
    total = len(tables.image_ids)
    images = range(
        total * process_index // process_count, total * (process_index + 1) // process_count
    )
    counts = {"images": len(images), "read": 0, "written": 0}
    labels = np.array(tables.labels, object)
    progress = _Progress(images, say)
    with DetectionsWriter(
        output,
        _metadata(config, tables, plan),
        process_index=process_index,
        process_count=process_count,
        masks=plan.masks,
    ) as writer:
        chunks = aligned_chunks(tables, rows=config["chunk_rows"], images=images, masks=plan.masks)
        for chunk in _ahead(chunks):
            merged = merge_chunk(plan, chunk)
            _write(writer, tables.image_ids, labels, chunk, merged)
            counts["read"] += len(chunk)
            counts["written"] += len(merged.scores)
            progress.report(chunk.stop, counts)
        progress.report(images.stop, counts, last=True)
    return counts


def make_plan(config: Mapping[str, Any], tables: Tables, dataset: Dataset | None) -> Plan:
    """Reads the files that the config names and checks its fields.

    Raises:
      UserError: names the field or file.
    """
    expansion = config["expansion"]
    if expansion not in EXPANSIONS:
        raise UserError(
            f"config.expansion: found {expansion!r}, expected one of {', '.join(EXPANSIONS)}"
        )
    if expansion != "none":
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
    for name, low in (("max_detections", 0), ("chunk_rows", 1), ("min_score", 0.0)):
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
        kept=kept_classes(tables.names, tables.labels, config["experts"]),
        weights=class_weights(tables.names, tables.labels, config["weights"]),
        min_score=float(config["min_score"]),
        operator=None if tree else make_operator(config["operator"], num_tables),
        tree=tree,
        expansion=expansion,
        parents=None if expansion == "none" else ancestors(dataset.hierarchy, tables.labels),
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
    source = np.flatnonzero(plan.kept[chunk.models, chunk.labels])
    labels = chunk.labels[source]
    if plan.expansion == "before":
        copies, labels = repeat_with(labels, plan.parents)
        source = source[copies]
    models = chunk.models[source]
    weights = plan.weights[models, labels]
    scores = chunk.scores[source] * weights
    used = (weights > 0) & (scores >= plan.min_score)
    if not used.all():
        source, labels, models, scores = source[used], labels[used], models[used], scores[used]
    # Images count from the start of the chunk: keys stay small.
    groups = (chunk.images[source] - chunk.first).astype(np.int64) * plan.num_classes + labels
    rows = Rows(groups, scores, chunk.boxes[source], models)
    if plan.tree is not None:
        by_model = {name: rows.take(models == place) for place, name in enumerate(plan.names)}
        fused, source = tree_lib.apply(plan.tree, by_model), None
    else:
        fused, kept = apply_operator(rows, plan.operator)
        source = source[kept]
    images = fused.group // plan.num_classes
    labels = fused.group % plan.num_classes
    scores, boxes = fused.scores, fused.boxes
    if plan.expansion == "after":
        copies, labels = repeat_with(labels, plan.parents)
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


def read_mappings(config: Any) -> dict[str, Mapping[str, Sequence[str]]]:
    """Class mappings by model from `name=FILE:SOURCE_COLUMN:TARGET_COLUMN[:RULE]` pairs."""
    mappings = {}
    for name, text in parse_pairs(config, "config.mappings").items():
        parts = text.split(":")
        if len(parts) not in (3, 4):
            raise UserError(
                f"config.mappings: {name} has {text!r}, expected FILE:SOURCE_COLUMN:TARGET_COLUMN "
                "and for several targets :all or :first"
            )
        mapping = read_class_mapping(*parts[:3], rule=parts[3] if len(parts) > 3 else "error")
        mappings[name] = mapping.targets
    return mappings


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
    expanded = tables.expanded or plan.expansion != "none"
    return {**metadata, "inputs": inputs, "expanded": expanded}


def _plain(config: Any) -> Any:
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return {name: _plain(v) if isinstance(v, Mapping) else v for name, v in config.items()}


def _ahead(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same chunks; the next one is read while the caller works on one."""
    iterator = iter(chunks)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, iterator, None)
        while (chunk := pending.result()) is not None:
            pending = pool.submit(next, iterator, None)
            yield chunk


class _Progress:
    """Lines such as `images 1200/41620  rows in 600000, out 240000  images/s 310  left 0:02:10`."""

    def __init__(self, images: range, say: Callable):
        self._images, self._say = images, say
        self._start = self._last = time.monotonic()

    def report(self, stop: int, counts: Mapping[str, int], last: bool = False) -> None:
        now = time.monotonic()
        if not last and (now - self._last < _SECONDS or stop == self._images.stop):
            return
        self._last = now
        done, total = stop - self._images.start, len(self._images)
        rate = done / max(now - self._start, 1e-9)
        left = "" if last else f"  left {_clock((total - done) / max(rate, 1e-9))}"
        self._say(
            f"images {done}/{total}  rows in {counts['read']}, out {counts['written']}  "
            f"images/s {rate:.0f}{left}",
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


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
