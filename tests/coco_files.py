"""COCO files as people have them, converted through the command line."""

import json

from tests.prepare_data_cli import prepare, write_photo

SQUARE = [[30, 10, 90, 10, 90, 40, 30, 40]]


def coco(path, files, annotations=None, *, categories=None, size=(60, 120), ids=None):
    """A COCO file of photos `files`, by default with one box on each."""
    ids = ids or range(1, len(files) + 1)
    sides = {"height": size[0], "width": size[1]} if size else {}
    images = [{"id": i, "file_name": file} | sides for i, file in zip(ids, files, strict=True)]
    if annotations is None:
        annotations = [
            {"id": n, "image_id": i, "category_id": 1, "bbox": [30, 10, 60, 30]}
            for n, i in enumerate(ids, 1)
        ]
    document = {
        "images": images,
        "annotations": annotations,
        "categories": categories or [{"id": 1, "name": "oak"}, {"id": 2, "name": "elm"}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def convert(tmp_path, *arguments, photos=(), kind="coco", **options):
    source = coco(tmp_path / "boxes.json", *arguments) if kind == "coco" else arguments[0]
    for name in photos:
        write_photo(tmp_path / "photos" / name, 60, 120)
    return prepare(
        kind, source=source, images=tmp_path / "photos", output=tmp_path / "set", **options
    )


def found(dataset):
    return {dataset.image_id(i): dataset.image_paths[i].decode() for i in range(dataset.num_images)}
