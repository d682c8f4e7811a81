"""Random detections tables, written and read back, for tests of the exchange formats."""

import numpy as np
from faster_coco_eval import mask as coco_mask

from common.tables import DetectionsReader, DetectionsWriter, read_detections
from common.tables.exchange import ids
from common.tables.exchange.openimages_csv import read_openimages
from common.tables.exchange.spool import Importer

LABELS = ["/m/a", "/m/b", "/m/c"]
CATEGORIES = ids.Categories({"/m/a": 7, "/m/b": 3, "/m/c": 90}, "set")


def draw(seed, count, *, masks=False, top=1.0):
    """Images of several sizes, some without detections: id -> size, arguments of writer.add."""
    rng = np.random.default_rng(seed)
    images = {}
    for number in rng.permutation(np.arange(1, count + 1) * 7).tolist():
        size = rng.integers(1, 60, 2).tolist()
        n = int(rng.integers(0, 5))
        corners = np.sort(rng.random((n, 2, 2)), axis=1).reshape(n, 4).astype(np.float32)
        scores = (rng.integers(1, 9, n) / 8 * top).astype(np.float32)
        content = [[LABELS[c] for c in rng.integers(0, 3, n)], scores, corners]
        if masks:
            pixels = [rng.random(size) < rng.choice([0, 0.1, 0.9, 1]) for _ in range(n)]
            codes = [coco_mask.encode(np.asfortranarray(p, np.uint8))["counts"] for p in pixels]
            content += [codes, np.broadcast_to(size, (n, 2))]
        images[str(number)] = (size, content)
    return images


def write(path, images, *, masks=False):
    with DetectionsWriter(path, {"model": "m"}, masks=masks) as writer:
        for image_id, (_, content) in images.items():
            writer.add(image_id, *content)
    return DetectionsReader(path)


def numbers_of(images):
    return ids.Images(
        {i: int(i) for i in images}, {i: tuple(size) for i, (size, _) in images.items()}, "set"
    )


def table_rows(path, masks=False):
    found = read_detections(path, masks=masks)
    columns = [found.image_index, found.label_index, found.scores, found.boxes]
    columns += [found.masks, found.mask_sizes] if masks else []
    return [
        (found.image_ids[i], found.labels[c], float(s), tuple(b.tolist()), *map(list, extra))
        for i, c, s, b, *extra in zip(*columns, strict=True)
    ]


def read_back(path, output, *, covered=None, masks=False, **options):
    importer = Importer(path, covered, "split 'x'", masks=masks, **options)
    importer.write(read_openimages(path, masks=masks, cover=importer.cover), output, {})
    return output
