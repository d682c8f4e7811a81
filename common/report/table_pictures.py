"""Pictures of the photos of a detections table that says where they lie."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import numpy as np
from etils import epath

from common.data.table_photos import CLASS_NAMES, PHOTO_ROOT
from common.io.parallel import map_ordered
from common.io.progress import Progress
from common.report.photo_drawing import Drawing, draw_boxes, drawing_of, open_photo, save_jpeg
from common.tables import Detections, DetectionsReader

MAX_DRAWN = 100  # boxes on a picture
_ROWS = 1 << 14  # of the table in memory at once


def draw_table(
    table: epath.Path, folder: epath.Path, min_score: float, side: int, say: Callable = print
) -> None:
    """Writes a picture of each photo, found or not, under its id.

    Args:
      table: of `detection.predict`.
      folder: to write into.
      min_score: weaker detections are not drawn.
      side: pixels of the longest side, at most.
      say: where lines go.
    """
    reader = DetectionsReader(table)
    root, labels = reader.metadata[PHOTO_ROOT], reader.metadata["classes"]
    names = dict(zip(labels, reader.metadata[CLASS_NAMES], strict=True))
    drawn = 0

    def draw(photo: tuple[str, Detections | None]) -> int:
        image_id, rows = photo
        drawing = Drawing(np.zeros((0, 4)), [], []) if rows is None else drawing_of(rows, names)
        picture = draw_boxes(open_photo(root + image_id, (0, 0), side, enlarge=False), drawing)
        path = folder / picture_name(image_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_jpeg(picture, path)
        return len(drawing.boxes)

    total = len(reader.image_ids)
    progress = Progress(total, what="draw", unit="photos", say=say)
    for number, count in enumerate(map_ordered(draw, _photos(reader, labels, min_score)), start=1):
        drawn += count
        progress.report(number)
    say(f"wrote {total} pictures into {folder}: {drawn} detections of {min_score:g} and more")


def picture_name(image_id: str) -> str:
    """Relative path of a photo's picture."""
    is_jpeg = PurePosixPath(image_id).suffix.lower() in (".jpg", ".jpeg")
    return image_id if is_jpeg else f"{image_id}.jpg"


def _photos(
    reader: DetectionsReader, labels: list[str], min_score: float
) -> Iterator[tuple[str, Detections | None]]:
    """Id of each photo and its best rows, None where it has none at all."""
    following = 0
    for chunk in reader.chunks(labels, masks=reader.has_masks, rows=_ROWS):
        last = int(chunk.image_index[-1]) + 1
        bounds = np.searchsorted(chunk.image_index, np.arange(following, last + 1)).tolist()
        for image, (start, stop) in enumerate(itertools.pairwise(bounds), start=following):
            rows = np.arange(start, stop)[chunk.scores[start:stop] >= min_score]
            yield reader.image_ids[image], chunk.take(rows[:MAX_DRAWN])
        following = last
    for image_id in reader.image_ids[following:]:
        yield image_id, None
