"""The readers that `tests.fuzzing` looks at, each with a small whole input."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from safetensors import numpy as safetensors_numpy

from common.data.dataset import Dataset, DatasetWriter
from common.io.errors import UserError
from common.masks import rle
from common.masks.dataset_masks import MaskReader
from common.nn.weights.backbone_weights import read_state_dict
from common.tables import DetectionsReader, DetectionsWriter, read_detections
from common.tables.exchange import ids
from common.tables.exchange.openimages_csv import read_openimages, write_openimages
from common.tables.exchange.results_json import read_results
from common.tables.exchange.rows import Outgoing
from common.tables.exchange.spool import Importer
from ensemble.calibration import calibration as calibrations
from ensemble.calibration.curves import IDENTITY, ClassCurves, Curve
from ensemble.calibration.opinion import Opinion, num_features
from ensemble.relations.counts import Relations, read_relations
from ensemble.tree import binary_tree
from scripts import prepare_data
from tests.common.nn import test_weights
from tests.prepare_data_cli import openimages_source, write_photo

Reader = tuple[Callable[[Path], object], list[Path]]
SIZE = (40, 60)
SQUARE = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]
RUNS = {"size": list(SIZE), "counts": [400, 1000, 1000]}


def _prepare(format_name: str, folder: Path, **values: object) -> None:
    """Converts `folder` in this process, and opens what came of it."""
    if "source" not in flags.FLAGS:
        prepare_data.define_flags()
        flags.FLAGS(["fuzz", "--source=-", "--output=-"])
    output = folder.parent / "out"
    values = {"source": folder, "images": folder, "splits": None} | values
    settings = {name: None if v is None else str(v) for name, v in values.items()}
    for name, value in settings.items():
        flags.FLAGS[name].value = value
    flags.FLAGS["output"].value = str(output)
    flags.FLAGS["overwrite"].value = True
    prepare_data.main(format_name)
    _walk(Dataset.open(output))


def _walk(dataset: Dataset) -> None:
    for name in dataset.splits:
        for image in dataset.split(name).tolist():
            dataset.image_boxes(image)
            dataset.image_labels(image)
            dataset.image_file(image)


def _coco_content(lvis: bool) -> dict[str, object]:
    images = [
        {"id": n, "file_name": f"{n}.jpg", "height": SIZE[0], "width": SIZE[1]} for n in (1, 2)
    ]
    if lvis:
        images = [i | {"neg_category_ids": [2], "not_exhaustive_category_ids": [1]} for i in images]
    annotations = [
        {
            "id": n,
            "image_id": 1 + n % 2,
            "category_id": 1,
            "bbox": [10, 10, 20, 20.5],
            "area": 400.0,
            "iscrowd": 0,
            "segmentation": mask,
        }
        for n, mask in enumerate((SQUARE, RUNS, SQUARE))
    ]
    letter = {"frequency": "r"} if lvis else {}
    categories = [{"id": n, "name": name} | letter for n, name in ((1, "oak"), (2, "elm"))]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco(folder: Path, name: str = "coco") -> Reader:
    path = folder / "lvis_v1_train.json"
    path.write_text(json.dumps(_coco_content(name == "lvis")))
    splits = folder.parent / "splits.json"
    for number in (1, 2):
        write_photo(folder / f"{number}.jpg", *SIZE)
    splits.write_text('{"a": [1], "b": ["2.jpg"]}')

    def read(folder: Path) -> None:
        _prepare(name, folder, source=path, splits=splits)

    return read, [path, path, splits]


def lvis(folder: Path) -> Reader:
    return coco(folder, "lvis")


def openimages(folder: Path) -> Reader:
    rows = ["a,/m/a,0.1,0.5,0.2,0.6,0", "b,/m/c,0.1,0.5,0.2,0.6,1", "b,/m/a,0.1,0.5,0.2,0.9,0"]
    openimages_source(folder, rows, labels=["a,/m/a,1", "b,/m/b,0"])
    tree = {"LabelName": "/m/0", "Subcategory": [{"LabelName": f"/m/{c}"} for c in "abc"]}
    (folder / "challenge-2019-label500-hierarchy.json").write_text(json.dumps(tree))
    return lambda folder: _prepare("openimages", folder, images=None), sorted(folder.iterdir())


def voc(folder: Path) -> Reader:
    paths = [folder / "a.xml", folder / "b.xml", folder / "ImageSets" / "Main" / "train.txt"]
    for path in paths[:2]:
        path.write_text(
            f'<?xml version="1.0" encoding="utf-8"?><annotation><filename>{path.stem}.jpg'
            "</filename><size><width>60</width><height>40</height></size><object><name>oak</name><bndbox>"
            "<xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>35.5</ymax></bndbox></object><object>"
            "<name>elm</name><polygon><x1>1</x1><y1>2</y1><x2>3</x2><y2>4</y2><x3>9</x3><y3>9</y3>"
            "</polygon></object></annotation>"
        )
        write_photo(folder / f"{path.stem}.jpg", *SIZE)
    paths[2].parent.mkdir(parents=True)
    paths[2].write_text("a\nb.jpg\n")
    return lambda folder: _prepare("voc", folder), paths


def yolo(folder: Path) -> Reader:
    (folder / "data.yaml").write_text("train: images\nval: list.txt\nnames: {0: oak, 1: elm}\n")
    (folder / "labels").mkdir()
    (folder / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.9 0.1 0.9 0.9\n")
    (folder / "list.txt").write_text("images/b.jpg\n")
    for name in "ab":
        write_photo(folder / "images" / f"{name}.jpg", *SIZE)
    seeds = [folder / "data.yaml", folder / "labels" / "a.txt", folder / "list.txt"]
    return lambda folder: _prepare("yolo", folder, source=folder / "data.yaml", images=None), seeds


def cvat(folder: Path) -> Reader:
    path = folder / "annotations.xml"
    path.write_text(
        "<annotations><label><name>oak</name></label><image id='0' name='a.jpg' width='60' "
        "height='40'><box label='oak' xtl='1' ytl='2' xbr='30.5' ybr='35' rotation='10'/><polygon "
        "label='oak' points='1,2;3,4;9,9'/></image></annotations>"
    )
    write_photo(folder / "a.jpg", *SIZE)
    return lambda folder: _prepare("cvat", folder, source=path), [path]


def label_studio(folder: Path) -> Reader:
    path = folder / "x.json"
    box = {"x": 1, "y": 2, "width": 30, "height": 5.5, "rotation": 3, "rectanglelabels": ["oak"]}
    polygon = {"points": [[1, 2], [3, 4], [9, 9]], "polygonlabels": ["elm"]}
    size = {"original_width": 60, "original_height": 40}
    results = [
        {"type": kind, "value": value, **size}
        for kind, value in (("rectanglelabels", box), ("polygonlabels", polygon))
    ]
    task = {"data": {"image": "/data/upload/1/a.jpg"}, "annotations": [{"result": results}]}
    path.write_text(json.dumps([task]))
    write_photo(folder / "a.jpg", *SIZE)
    return lambda folder: _prepare("label_studio", folder, source=path), [path]


def dataset(folder: Path) -> Reader:
    path = folder / "d"
    extra = {"category_ids": [1, 2], "exhaustive": True}
    with DatasetWriter(
        path, "x", ["a", "b"], ["A", "B"], None, has_masks=True, has_areas=True, has_ignore=True,
        extra=extra,
    ) as writer:  # fmt: skip
        for number in range(3):
            masks = [SQUARE, RUNS]
            boxes = [[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.9, 0.9]]
            arguments = ([0, 1], [0, 32], [1], [0], masks, [0.1, 0.2], [[0, 0, 1, 1]])
            writer.add_image(f"im{number}", f"{number}.jpg", SIZE, boxes, *arguments)
        writer.add_split("train", [0, 1, 2])

    def read(folder: Path) -> None:
        opened = Dataset.open(folder / "d")
        _walk(opened)
        masks = MaskReader(opened)
        for row in range(len(opened.boxes)):
            if masks.has_mask(np.array([row]))[0]:
                masks.rle(row, SIZE)
                masks.window(row, (0.1, 0.1, 0.9, 0.9), (8, 8))
        for image in range(opened.num_images):
            opened.image_masks(image)
            opened.image_ignore_boxes(image)

    return read, [p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "report.json"]


def _counts() -> bytes:
    return rle.encode_runs(RUNS["counts"])


def _table(path: Path, *, masks: bool) -> DetectionsReader:
    with DetectionsWriter(path, {"model": "m"}, masks=masks) as writer:
        for name in ("1", "2"):
            boxes = np.array([[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.9, 0.9]], np.float32)
            extra = ([_counts()] * 2, np.array([SIZE] * 2, np.int32)) if masks else ()
            writer.add(name, ["oak", "elm"], np.array([0.9, 0.8], np.float32), boxes, *extra)
    return DetectionsReader(path)


def parquet(folder: Path) -> Reader:
    path = folder / "x.parquet"
    _table(path, masks=True)

    def read(folder: Path) -> None:
        found = read_detections(path, masks=True)
        DetectionsReader(path).files[0].labels()
        if (broken := rle.find_broken(*found.mask_columns())) is not None:
            raise UserError(broken[1])
        rle.areas(found.masks)
        rle.decode_all(found.masks.tolist(), SIZE)

    return read, [path]


def _numbers() -> tuple[ids.Images, ids.Categories]:
    sizes = {"1": SIZE, "2": SIZE}
    return ids.Images({"1": 1, "2": 2}, sizes, "set"), ids.Categories({"oak": 1, "elm": 2}, "set")


def results(folder: Path) -> Reader:
    path = folder / "x.json"
    rows = [
        {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3.5, 4], "score": 0.5},
        {"image_id": "2", "category_id": 2, "segmentation": RUNS, "score": 0.25},
        {
            "image_id": 1,
            "category_id": 1,
            "score": 1,
            "segmentation": {"size": list(SIZE), "counts": _counts().decode()},
        },
    ]
    path.write_text(json.dumps(rows))

    def read(folder: Path) -> None:
        Importer(path).write(read_results(path, *_numbers(), masks=False), folder / "x.parquet", {})

    return read, [path]


def submission(folder: Path) -> Reader:
    reader = _table(folder / "x.parquet", masks=True)
    sizes = {"1": SIZE, "2": SIZE}
    for offline in (False, True):
        write_openimages(
            Outgoing(reader, masks=True), folder / f"{offline}.csv", offline=offline, sizes=sizes
        )
    write_openimages(Outgoing(reader), folder / "boxes.csv")
    paths = sorted(folder.glob("*.csv"))

    def read(folder: Path) -> None:
        for path in paths:
            masks = path.name != "boxes.csv"
            importer = Importer(path, masks=masks)
            rows = read_openimages(path, masks=masks, cover=importer.cover)
            importer.write(rows, folder / "y.parquet", {})

    return read, paths


def identities(folder: Path) -> Reader:
    (folder / "a.json").write_text(json.dumps(_coco_content(False)))
    (folder / "images.csv").write_text("image_id,id,height,width\na,1,40,60\nb,2,40,60\n")
    (folder / "labels.csv").write_text("label,id\noak,1\nelm,2\n")

    def read(folder: Path) -> None:
        for image_id in ("id", "file_stem"):
            ids.read_annotations(folder / "a.json", image_id)
        ids.read_image_csv(folder / "images.csv")
        ids.read_category_csv(folder / "labels.csv")

    return read, sorted(folder.iterdir())


def run_lengths(folder: Path) -> Reader:
    path = folder / "x"
    path.write_bytes(struct.pack("<ii", *SIZE) + _counts())

    def read(folder: Path) -> None:
        data = path.read_bytes()
        size = struct.unpack("<ii", data[:8].ljust(8, b"\0"))
        if (broken := rle.find_broken([data[8:]], [size])) is not None:
            raise UserError(broken[1])
        area = int(rle.areas([data[8:]])[0])
        if not 0 <= area <= size[0] * size[1]:
            raise AssertionError(f"area {area} of {size}")
        rle.tight_boxes([data[8:]], [size])
        rle.resize([data[8:]], size, SIZE)

    return read, [path]


def torch_zip(folder: Path, legacy: bool = False) -> Reader:
    path = folder / "x.pth"
    path.write_bytes(test_weights.torch_file(test_weights.ARRAYS, legacy))
    return lambda folder: read_state_dict(path), [path]


def torch_legacy(folder: Path) -> Reader:
    return torch_zip(folder, legacy=True)


def safetensors(folder: Path) -> Reader:
    path = folder / "x.safetensors"
    path.write_bytes(safetensors_numpy.save(test_weights.ARRAYS, {"labels": '["a"]'}))
    return lambda folder: read_state_dict(path), [path]


def relations(folder: Path) -> Reader:
    path = folder / "x.npz"
    pair, single = np.arange(4).reshape(2, 2), np.arange(2)
    Relations(["a", "b"], pair, pair, pair, pair, single, single, {"split": "x"}).write(path)
    return lambda folder: read_relations(path), [path]


def tree(folder: Path) -> Reader:
    path = folder / "x.json"
    node = binary_tree.Node(binary_tree.Leaf("a"), binary_tree.Leaf("b"), binary_tree.Operators())
    binary_tree.save(path, binary_tree.Tree(root=node, models=("a", "b")))
    return lambda folder: (binary_tree.load(path), binary_tree.read_notes(path)), [path]


def calibration(folder: Path) -> Reader:
    path = folder / "x.json"
    curve = Curve("isotonic", np.array([0.2, 0.6]), np.array([0.1, 0.5]))
    fitted = [ClassCurves(curve, np.array([0.5, 0.0])), ClassCurves(IDENTITY, np.zeros(2))]
    found = calibrations.Calibration(
        names=("a", "b"),
        labels=("cat", "dog"),
        curves=fitted,
        ranks=np.full((2, 2), 0.5),
        opinion=Opinion(np.ones((2, num_features(2)))),
        recipe=calibrations.Recipe(("a", "b"), 1, True, {"name": "nms"}),
    )
    calibrations.save(path, found, "coco", {})
    return lambda folder: calibrations.load(path), [path]


def photos(folder: Path) -> Reader:
    from common.data import images, placement

    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "gif": "GIF"}
    for extension in kinds:
        write_photo(folder / f"x.{extension}", *SIZE)

    def read(folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            photo = images.open_photo(images.read_file(str(path)))
            if photo.size[0] * photo.size[1] < 1 << 22:  # more is memory, not a defect
                placement.draw_content(photo, placement.fit(photo.size, (32, 32)))

    return read, sorted(folder.iterdir())


READERS: dict[str, Callable[[Path], Reader]] = {
    function.__name__: function
    for function in (
        *(
            coco,
            lvis,
            openimages,
            voc,
            yolo,
            cvat,
            label_studio,
            dataset,
            parquet,
            results,
            submission,
            identities,
        ),
        *(run_lengths, torch_zip, torch_legacy, safetensors, relations, tree, calibration, photos),
    )
}
