"""Times every ensemble operator beside the ensemble-boxes package, and compares what comes out.

    pip install ensemble-boxes numba
    python -m scripts.bench.bench_ensemble [--images=41620]

Generates the detections tables of several models (default: 5 models x 41,620 images x 40 boxes, 500
classes), reads them as `ensemble.merge` does, and runs each operator over all rows. The package
runs on every `--peer_every`-th image of the same chunks, right after ours, with its inputs made
ready beforehand; its time is scaled to all images by the number of rows. It is single-threaded,
ours takes the cores it may use. Compilation counts for ours, and is printed on its own as well; the
package's (numba) does not count. Writing and reading tables is timed separately.

An image holds objects of popular and rare classes; every model finds most of them, and takes each
for several classes (the same for all models) with lower scores; a few boxes are noise.

Exits with status 1 when more than one group (class of an image) in 10,000 differs. Some may: an
IoU within a rounding error of the threshold (float32 here, float64 there), or equal scores.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from common.io.commands import run_main
from common.tables import DetectionsWriter
from ensemble import inputs
from ensemble.chunks import aligned_chunks
from ensemble.operators import AdjNms, Nms, Nmw, Operator, SoftNms, Voting, WeightedBoxesFusion
from ensemble.operators.groups import Rows, apply_operator
from scripts.bench import generated

_IOU = 0.55
_SIGMA = 0.1  # of soft-NMS, as in the table of the package's README
_CANDIDATES = 4  # classes an object is taken for


def define_flags() -> None:
    flags.DEFINE_integer("images", 41_620, "Images.")
    flags.DEFINE_integer("models", 5, "Models.")
    flags.DEFINE_integer("boxes", 40, "Boxes of one model in one image.")
    flags.DEFINE_integer("classes", 500, "Classes.")
    flags.DEFINE_integer("peer_every", 40, "The package runs on every so many images; 0: never.")


def draw_image(
    rng: np.random.Generator, popularity: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (M, n), scores (M, n) and boxes (M, n, 4) of one image for M models."""
    models, n = flags.FLAGS.models, flags.FLAGS.boxes
    objects = max(n // _CANDIDATES, 1)
    side = np.exp(rng.normal(-1.6, 0.6, (objects, 2))).clip(0.02, 0.9)
    corner = rng.random((objects, 2)) * (1 - side)
    truth = np.concatenate([corner, corner + side], 1)
    candidates = np.searchsorted(popularity, rng.random((objects, _CANDIDATES)))
    confidence = rng.beta(1, 2, (objects, 1)) * 0.4 ** np.arange(_CANDIDATES)

    pick = rng.integers(0, objects * _CANDIDATES, (models, n))
    where, what = np.divmod(pick, _CANDIDATES)
    labels = candidates[where, what]
    size = np.tile(side[where], 2)
    boxes = truth[where] + rng.normal(0, 0.08, (models, n, 4)) * size
    noise = rng.random((models, n)) < 0.1
    labels[noise] = rng.integers(0, flags.FLAGS.classes, noise.sum())
    boxes = boxes.clip(0, 1)
    low = np.minimum(boxes[..., :2], boxes[..., 2:])
    high = np.maximum(boxes[..., 2:], low + 1e-3)
    scores = confidence[where, what] * rng.random((models, n)) ** 0.3 + 1e-3
    corners = np.concatenate([low, high.clip(0, 1.001)], -1)
    return labels, scores.astype(np.float32), corners.astype(np.float32)


def write_tables(folder: Path) -> list[str]:
    """Returns the paths of the generated tables; prints the time taken by the writers alone."""
    rng = np.random.default_rng(0)
    names = np.array(generated.class_labels(flags.FLAGS.classes))
    popularity = np.cumsum(generated.rank_frequencies(rng, flags.FLAGS.classes))
    paths = [folder / f"model{number}.parquet" for number in range(flags.FLAGS.models)]
    seconds = 0.0
    with contextlib.ExitStack() as stack:
        tables = [stack.enter_context(DetectionsWriter(path, {"model": "x"})) for path in paths]
        for number in range(flags.FLAGS.images):
            if number % 10_000 == 0:
                print(f"generating: image {number} of {flags.FLAGS.images}", flush=True)
            labels, scores, boxes = draw_image(rng, popularity)
            start = time.perf_counter()
            for table, *rows in zip(tables, names[labels], scores, boxes, strict=True):
                table.add(generated.image_id(number), *rows)
            seconds += time.perf_counter() - start
        start = time.perf_counter()
    print(f"writing the tables: {seconds + time.perf_counter() - start:.1f} s")
    return [str(path) for path in paths]


def cases(models: int) -> list[tuple[str, Operator, Callable | None]]:
    """Name, our operator, the package's function of lists of boxes, scores and labels."""
    voting = Voting(iou_threshold=_IOU)
    try:
        import ensemble_boxes as peer
    except ImportError:
        print("ensemble-boxes or numba is not installed: timing our operators alone")
        peer = None

    def soft(method: int) -> Callable:
        return lambda *lists: peer.soft_nms(
            *lists, method=method, iou_thr=0.3, sigma=_SIGMA, thresh=1e-3
        )

    pairs = [
        ("nms", Nms(_IOU), lambda *lists: peer.nms(*lists, iou_thr=_IOU)),
        ("soft_nms linear", SoftNms("linear", iou_threshold=0.3), soft(1)),
        ("soft_nms gaussian", SoftNms("gaussian", sigma=_SIGMA), soft(2)),
        ("nmw", Nmw(_IOU), lambda *lists: peer.non_maximum_weighted(*lists, iou_thr=_IOU)),
        (
            "wbf",
            WeightedBoxesFusion((1.0,) * models, _IOU),
            lambda *lists: peer.weighted_boxes_fusion(*lists, iou_thr=_IOU),
        ),
        ("adj_nms", AdjNms(_IOU), None),
        ("voting + adj_nms", voting, None),
    ]
    return [(name, operator, call if peer else None) for name, operator, call in pairs]


def to_lists(rows: Rows, image: np.ndarray) -> Iterator[tuple[list, ...]]:
    """Boxes, scores and labels for each image, a list entry a model, float64.

    Labels are classes, not groups: the package rounds labels to float32 (exact up to 2^24).
    """
    models = flags.FLAGS.models
    labels = rows.group % flags.FLAGS.classes
    order = np.lexsort((rows.model, image))
    edges = np.searchsorted(
        image[order] * models + rows.model[order],
        (np.unique(image)[:, None] * models + np.arange(models)).reshape(-1),
    )
    columns = [
        np.split(np.asarray(a[order], kind), edges[1:])
        for a, kind in ((rows.boxes, np.float64), (rows.scores, np.float64), (labels, np.int64))
    ]
    for first in range(0, len(edges), models):
        boxes, scores, classes = (column[first : first + models] for column in columns)
        yield boxes, scores, classes


def count_differing(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> tuple[int, int]:
    """Groups that differ, and groups, of two results (group, scores, boxes) in any order."""
    ours, theirs = (
        [a[order] for a in side]
        for side in (ours, theirs)
        for order in [np.lexsort((side[2][:, 0], side[1], side[0]))]
    )
    keys = np.unique(np.concatenate([ours[0], theirs[0]]))
    sizes = [
        np.diff(np.searchsorted(side[0], keys), append=len(side[0])) for side in (ours, theirs)
    ]
    same = sizes[0] == sizes[1]
    mine = [a[np.repeat(same, sizes[0])] for a in ours]
    peers = [a[np.repeat(same, sizes[1])] for a in theirs]
    close = np.isclose(mine[1], peers[1], rtol=1e-4, atol=1e-6)
    close &= np.isclose(mine[2], peers[2], rtol=1e-4, atol=1e-5).all(1)
    return int((~same).sum()) + len(np.unique(mine[0][~close])), len(keys)


class Tally:
    """Seconds and differences of one operator, over the chunks."""

    def __init__(self, name: str, operator: Operator, peer: Callable | None):
        self.name, self.operator, self.peer = name, operator, peer
        self.first = self.seconds = self.peer_seconds = 0.0
        self.rows_in = self.rows_out = self.peer_rows = self.differing = self.compared = 0

    def warm_up(self, rows: Rows, lists: list) -> None:
        start = time.perf_counter()
        apply_operator(rows, self.operator)
        middle = time.perf_counter()
        apply_operator(rows, self.operator)
        self.first += max(2 * middle - start - time.perf_counter(), 0.0)
        if self.peer and lists:
            self.peer(*lists[0])  # numba compiles

    def add(self, rows: Rows, sampled: np.ndarray, lists: list) -> None:
        start = time.perf_counter()
        out, source = apply_operator(rows, self.operator)
        self.seconds += time.perf_counter() - start
        self.rows_in, self.rows_out = self.rows_in + len(rows), self.rows_out + len(out)
        if self.peer is None or not lists:
            return
        with contextlib.redirect_stdout(io.StringIO()):
            start = time.perf_counter()
            results = [self.peer(*image) for image in lists]
            self.peer_seconds += time.perf_counter() - start
        self.peer_rows += int(sampled.sum())
        mine = sampled[source]
        # The package returns the scores that soft-NMS was given.
        scores = rows.scores[source] if isinstance(self.operator, SoftNms) else out.scores
        columns = zip(*results, strict=True)
        boxes, peer_scores, labels = (np.concatenate(column) for column in columns)
        classes = flags.FLAGS.classes
        images = np.unique(rows.group[sampled] // classes)
        groups = np.repeat(images, [len(result[2]) for result in results]) * classes + labels
        differing, compared = count_differing(
            (out.group[mine], scores[mine], out.boxes[mine]),
            (groups.astype(np.int64), peer_scores, boxes),
        )
        self.differing, self.compared = self.differing + differing, self.compared + compared

    def line(self) -> str:
        total = self.seconds + self.first
        line = f"{self.name:18s} {total:7.2f} s ({self.first:4.1f} s compiling)"
        line += f"  {self.rows_in} -> {self.rows_out} rows"
        if self.peer_rows:
            peer = self.peer_seconds * self.rows_in / self.peer_rows
            line += f"   ensemble-boxes {peer:8.1f} s   ratio {total / peer:.4f}"
            line += f"   {self.differing} of {self.compared} groups differ"
        return line


def main() -> int:
    every, classes = flags.FLAGS.peer_every, flags.FLAGS.classes
    tallies = [Tally(*case) for case in cases(flags.FLAGS.models)]
    reading = 0.0
    with tempfile.TemporaryDirectory() as folder:
        paths = write_tables(Path(folder))
        start = time.perf_counter()
        tables = inputs.open_tables(paths)
        chunks = aligned_chunks(tables)
        while (chunk := next(chunks, None)) is not None:
            reading += time.perf_counter() - start
            groups = chunk.groups(classes)
            rows = Rows(groups, chunk.scores, chunk.boxes, chunk.models)
            sampled = chunk.images % every == 0 if every else np.zeros(len(rows), bool)
            lists = list(to_lists(rows.take(sampled), chunk.images[sampled]))
            if chunk.first == 0:
                sizes = np.unique(groups, return_counts=True)[1]
                shares = [f"{np.mean(sizes <= n):.0%} up to {n}" for n in (1, 4, 16)]
                print(f"sizes of groups: {', '.join(shares)}, largest {sizes.max()}")
            for tally in tallies:
                if chunk.first == 0:
                    tally.warm_up(rows, lists)
                tally.add(rows, sampled, lists)
            print(f"images {chunk.stop} of {len(tables.image_ids)}", flush=True)
            start = time.perf_counter()
        reading += time.perf_counter() - start
    print(f"reading the tables: {reading:.1f} s")
    if every:
        print(f"ensemble-boxes ran on 1 of {every} images, scaled to all by rows")
    for tally in tallies:
        print(tally.line())
    return int(any(tally.differing > 1e-4 * tally.compared for tally in tallies))


if __name__ == "__main__":
    define_flags()
    run_main(main)
