"""Which photos the page shows, and the photos themselves as small JPEGs.

Shape legend: I images scored, T tables.
"""

import base64
import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from common.data import images, placement
from common.data.dataset import Dataset
from common.report.analysis import TableReport
from common.report.confusion import Confusions
from common.report.scope import Scope

SIDE = 560  # pixels of the longest side
PHOTO_BYTES = 9 << 20  # of all JPEGs together; base64 makes 12 MiB of them
WORST, BEST = 12, 8  # ranks looked at in each table
QUALITIES = (80, 65, 50, 35, 20)


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a picture is shown: 'worst', 'best' or 'confusion', of which table, as what rank."""

    kind: str
    table: int
    rank: int


@dataclasses.dataclass
class Picture:
    """A photo of the page; `data` is a data URI, empty when the photo cannot be read."""

    image: int
    reasons: list[Reason]
    data: str = ""
    width: int = SIDE
    height: int = SIDE


def image_f1(scope: Scope, table: TableReport) -> Float[np.ndarray, " I"]:
    """F1 of each image above the scores, NaN where there was nothing to find and nothing found."""
    total = table.image_found + table.image_wrong + scope.image_counts
    return np.where(total > 0, 2 * table.image_found / np.maximum(total, 1), np.nan)


def choose(
    scope: Scope, tables: Sequence[TableReport], confusions: Confusions, limit: int
) -> tuple[list[Picture], list[Picture | None]]:
    """At most `limit` pictures: about half the best and worst images, then examples of confusions.

    Worst: lowest F1, most errors first. Best: highest F1, most objects first.

    Returns:
      The pictures, and for each pair of `confusions` the one that shows it, or None.
    """
    chosen: dict[int, Picture] = {}

    def add(image: int, reason: Reason, most: int) -> Picture | None:
        if image not in chosen:
            if len(chosen) >= most:
                return None
            chosen[image] = Picture(image, [])
        chosen[image].reasons.append(reason)
        return chosen[image]

    for image, reason in _extremes(scope, tables):
        add(image, reason, -(-limit // 2))
    shown: list[Picture | None] = []
    for rank, examples in enumerate(confusions.examples):
        known = [example for example in examples if example[1] in chosen]
        table, image = (known or examples)[0]
        shown.append(add(image, Reason("confusion", table, rank), limit))
    return list(chosen.values()), shown


def _extremes(scope: Scope, tables: Sequence[TableReport]) -> Iterable[tuple[int, Reason]]:
    """Worst and best images of all tables, first ranks first."""
    ranked = []
    for number, table in enumerate(tables):
        f1 = image_f1(scope, table)
        wrong = table.image_wrong + scope.image_counts - table.image_found
        orders = {
            "worst": np.lexsort((-wrong, f1))[:WORST],
            "best": np.lexsort((-table.image_found, -f1))[:BEST],
        }
        for kind, order in orders.items():
            good = f1[order] > 0 if kind == "best" else f1[order] < 1  # NaN is neither
            ranked += [
                (rank, number, kind, int(scope.images[at])) for rank, at in enumerate(order[good])
            ]
    for rank, number, kind, image in sorted(ranked):
        yield image, Reason(kind, number, rank)


def read_photos(
    dataset: Dataset, pictures: Sequence[Picture], say: Callable[[str], None] = print
) -> None:
    """Fills in the photos; unreadable ones stay empty and are told in one line."""
    budget = PHOTO_BYTES // max(len(pictures), 1)
    failures = []
    for picture in pictures:
        height, width = dataset.image_sizes[picture.image].tolist()
        size = (height, width)
        path = dataset.image_file(picture.image)
        try:
            photo = images.open_photo(images.read_file(path), size)
            side = min(SIDE, max(photo.size))
            geometry = placement.fit(photo.size, (side, side))
            pixels = placement.draw(photo, geometry, geometry.content)
        except images.ImageError as error:
            failures.append(f"{path}: {error}")
            if all(size):
                picture.height, picture.width = placement.fit(size, (SIDE, SIDE)).content
            continue
        picture.height, picture.width = pixels.shape[:2]
        data = _jpeg(Image.fromarray(pixels), budget)
        picture.data = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    if failures:
        say(
            f"note: {len(failures)} of {len(pictures)} photos cannot be read, their boxes are "
            f"drawn on grey; the first: {failures[0]}"
        )


def _jpeg(photo: Image.Image, budget: int) -> bytes:
    """The photo in at most about `budget` bytes: lower quality first, then fewer pixels."""
    while True:
        for quality in QUALITIES:
            buffer = io.BytesIO()
            photo.save(buffer, format="JPEG", quality=quality, optimize=True)
            if buffer.tell() <= budget or max(photo.size) < 64:
                return buffer.getvalue()
        photo = photo.resize((max(photo.width * 2 // 3, 1), max(photo.height * 2 // 3, 1)))
