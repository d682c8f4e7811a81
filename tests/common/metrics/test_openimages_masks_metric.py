"""The OpenImages mask metric equals its definition, whatever the form of the truth."""

import numpy as np
import pytest
from PIL import Image

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.io.errors import UserError
from common.masks import rle
from common.metrics import coverage
from common.metrics.openimages_masks import CLASS_AP, MEAN_AP, evaluate_openimages_masks
from common.tables import Detections, DetectionsWriter
from tests.oracles import openimages_masks as oracle

LABELS = ["/m/a", "/m/b", "/m/c", "/m/d"]
# b and d lie below a, d also below c.
HIERARCHY = {
    "LabelName": "/m/root",
    "Subcategory": [
        {"LabelName": "/m/a", "Subcategory": [{"LabelName": "/m/b"}, {"LabelName": "/m/d"}]},
        {"LabelName": "/m/c", "Subcategory": [{"LabelName": "/m/d"}]},
    ],
}
AP = CLASS_AP.format(0.5, "/m/b")


def full(box, height, width):
    """Mask that fills a box of whole pixels, and its copy with every second pixel of a row."""
    mask = np.zeros((height, width), bool)
    x0, y0, x1, y1 = (round(v * s) for v, s in zip(box, (width, height) * 2, strict=True))
    mask[y0:y1, x0:x1] = True
    return mask


def random_images(rng):
    """Boxes on a grid of eighths, masks that fill them or parts of them, at several resolutions."""

    def box():
        x, y = rng.integers(0, 6, 2)
        width, height = rng.integers(1, 4, 2)
        return tuple(float(v) / 8 for v in (x, y, min(x + width, 8), min(y + height, 8)))

    def mask(place, size):
        pixels = full(place, *size)
        if rng.random() < 0.5:
            pixels &= rng.random(size) < 0.8
        return pixels

    images = {}
    for index in range(rng.integers(1, 6)):
        frame = ((8, 8), (16, 16), (12, 20))[rng.integers(3)]
        boxes, masks, detections = [], [], []
        for _ in range(rng.integers(0, 7)):
            boxes.append((str(rng.choice(LABELS)), box(), bool(rng.random() < 0.3)))
            size = ((8, 8), (16, 16), (24, 40), (5, 5))[rng.integers(4)]
            chance = rng.random()
            pixels = mask(boxes[-1][1], size) & (chance > 0.1)
            masks.append(None if chance > 0.7 else pixels)
        for _ in range(rng.integers(0, 15)):
            place = box()
            if boxes and rng.random() < 0.7:
                place = boxes[rng.integers(len(boxes))][1]
            score = float(np.float32(rng.integers(0, 6) / 5))
            pixels = mask(place, frame) & (rng.random() > 0.05)
            detections.append((str(rng.choice(LABELS)), score, pixels))
        labels = rng.permutation(LABELS)[: rng.integers(0, 4)]
        images[f"img{rng.integers(100):02d}-{index}"] = {
            "boxes": boxes,
            "masks": masks,
            "labels": [(str(label), int(rng.integers(0, 2))) for label in labels],
            "detections": detections,
        }
    return images


def write_dataset(directory, images, *, png=False, size=(0, 0)) -> Dataset:
    code = {label: index for index, label in enumerate(LABELS)}
    with DatasetWriter(directory, "test", LABELS, LABELS, HIERARCHY, "", has_masks=True) as writer:
        rows = []
        for image_id, image in sorted(images.items(), reverse=True):
            entries = []
            for number, mask in enumerate(image["masks"]):
                if mask is None:
                    entries.append(None)
                elif png:
                    path = directory.with_name(f"{directory.name}-{image_id}-{number}.png")
                    Image.fromarray(np.asarray(mask)).save(path)
                    entries.append({"png": str(path)})
                else:
                    counts = rle.encode([np.asarray(mask)])[0].decode()
                    entries.append({"size": list(mask.shape), "counts": counts})
            rows.append(
                writer.add_image(
                    image_id,
                    f"{image_id}.jpg",
                    size,
                    [box for _, box, _ in image["boxes"]],
                    [code[label] for label, _, _ in image["boxes"]],
                    [GROUP_OF * group for _, _, group in image["boxes"]],
                    [code[label] for label, _ in image["labels"]],
                    [confidence for _, confidence in image["labels"]],
                    masks=entries,
                )
            )
        writer.add_split("all", rows)
    return Dataset.open(directory)


def in_memory(images, metadata=None) -> Detections:
    code = {label: index for index, label in enumerate(LABELS)}
    image_ids = sorted(images)
    rows = [
        (index, code[label], score, mask)
        for index, image_id in enumerate(image_ids)
        for label, score, mask in sorted(images[image_id]["detections"], key=lambda d: -d[1])
    ]
    return Detections(
        image_ids=image_ids,
        labels=LABELS,
        image_index=np.array([r[0] for r in rows], np.int32),
        label_index=np.array([r[1] for r in rows], np.int32),
        scores=np.array([r[2] for r in rows], np.float32),
        boxes=np.tile(np.float32([0, 0, 1, 1]), (len(rows), 1)),  # plays no part
        metadata=metadata or {},
        masks=np.array([*rle.encode([r[3] for r in rows]), None], object)[:-1],
        mask_sizes=np.array([r[3].shape for r in rows], np.int32).reshape(-1, 2),
    )


def as_lists(images):
    return {
        image_id: {
            **image,
            "masks": [None if m is None else m.tolist() for m in image["masks"]],
            "detections": [(label, score, m.tolist()) for label, score, m in image["detections"]],
        }
        for image_id, image in images.items()
    }


@pytest.mark.parametrize("block", range(2))
def test_equals_the_definition_on_random_sets(tmp_path, block):
    scored = 0
    for seed in range(block * 30, block * 30 + 30):
        images = random_images(np.random.default_rng(seed))
        dataset = write_dataset(tmp_path / f"{seed}", images, png=seed % 10 == 0)
        for options in (
            {},
            {"expand_predictions": True},
            {"image_labels": False, "group_of_weight": 0.0},
            {"expand_truth": False, "group_of_weight": 0.5, "iou_threshold": 0.25},
        ):
            threshold = options.get("iou_threshold", 0.5)
            mean, aps = oracle.evaluate(
                as_lists(images),
                LABELS,
                HIERARCHY,
                threshold=threshold,
                weight=options.get("group_of_weight", 1.0),
                expand_truth=options.get("expand_truth", True),
                expand_detections=options.get("expand_predictions", False),
                use_labels=options.get("image_labels", True),
            )
            if mean is None:
                with pytest.raises(UserError, match="split 'all' has no ground-truth masks"):
                    evaluate_openimages_masks(dataset, "all", in_memory(images), **options)
                continue
            expected = {CLASS_AP.format(threshold, label): ap for label, ap in aps.items()}
            expected[MEAN_AP.format(threshold)] = mean
            result = evaluate_openimages_masks(dataset, "all", in_memory(images), **options)
            assert result == pytest.approx(expected, abs=1e-12)
            scored += any(0 < ap < 1 for ap in aps.values())
    assert scored > 40  # cases that tell right from wrong


def write_table(path, images):
    with DetectionsWriter(path, {}, masks=True) as writer:
        for image_id, image in images.items():
            rows = image["detections"]
            writer.add(
                image_id,
                [r[0] for r in rows],
                [r[1] for r in rows],
                np.tile([0, 0, 1, 1], (len(rows), 1)),
                rle.encode([r[2] for r in rows]),
                np.array([r[2].shape for r in rows], np.int32).reshape(-1, 2),
            )
    return path


def test_chunks_and_threads_do_not_change_the_result(tmp_path, monkeypatch):
    images = {}
    for seed in range(8):
        drawn = random_images(np.random.default_rng(seed))
        images |= {f"{seed}-{key}": image for key, image in drawn.items()}
    dataset = write_dataset(tmp_path / "set", images)
    table = write_table(tmp_path / "x.parquet", images)
    expected = evaluate_openimages_masks(dataset, "all", in_memory(images))
    assert evaluate_openimages_masks(dataset, "all", table) == expected
    monkeypatch.setattr(coverage, "_MASK_ROWS", 5)
    assert evaluate_openimages_masks(dataset, "all", table, num_threads=3) == expected


BOX, OTHER = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)


def one_image(objects, detections):
    """Objects (box, mask, group-of) and detections (score, mask) of class b."""
    return {
        "im": {
            "boxes": [("/m/b", box, group) for box, _, group in objects],
            "masks": [mask for _, mask, _ in objects],
            "labels": [],
            "detections": [("/m/b", score, mask) for score, mask in detections],
        }
    }


def half(mask, share=2):
    result = mask.copy()
    result[:, ::share] = False
    return result


WHOLE, THERE = full(BOX, 8, 8), full(OTHER, 8, 8)


@pytest.mark.parametrize(
    ("objects", "detections", "expected"),
    [
        # Exactly one half of the pixels is enough; the box is the same.
        ([(BOX, WHOLE, False)], [(0.9, half(WHOLE))], 1.0),
        # Masks decide, not boxes.
        ([(BOX, WHOLE, False)], [(0.9, half(WHOLE) & half(WHOLE.T).T)], 0.0),
        # A box without mask is nothing to find, and what finds it is no error, once.
        ([(BOX, WHOLE, False), (OTHER, None, False)], [(0.9, THERE), (0.8, WHOLE)], 1.0),
        (
            [(BOX, WHOLE, False), (OTHER, None, False)],
            [(0.9, THERE), (0.85, THERE), (0.8, WHOLE)],
            0.5,
        ),
        # A group-of box without mask takes any number.
        (
            [(BOX, WHOLE, False), (OTHER, None, True)],
            [(0.9, THERE), (0.85, THERE), (0.8, WHOLE)],
            1.0,
        ),
        # An empty mask is none.
        (
            [(BOX, WHOLE, False), (OTHER, np.zeros((8, 8), bool), False)],
            [(0.9, THERE), (0.8, WHOLE)],
            1.0,
        ),
        # A group-of mask absorbs and counts as one.
        ([(BOX, WHOLE, True)], [(0.9, half(WHOLE)), (0.8, WHOLE)], 1.0),
        # A detection without pixels is no detection.
        ([(BOX, WHOLE, False)], [(0.9, WHOLE & False), (0.8, WHOLE)], 1.0),
        # The truth is brought to the frame of the detections: 8x8 from 3x3 and from 64x64.
        ([(BOX, np.kron(WHOLE, np.ones((8, 8), bool)), False)], [(0.9, WHOLE)], 1.0),
        ([((0, 0, 1, 1), np.ones((3, 3), bool), False)], [(0.9, np.ones((8, 8), bool))], 1.0),
        # What vanishes there is still to be found.
        ([(BOX, np.eye(1, 900, dtype=bool).reshape(30, 30), False)], [(0.9, WHOLE)], 0.0),
    ],
)
def test_worked_examples(tmp_path, objects, detections, expected):
    images = one_image(objects, detections)
    dataset = write_dataset(tmp_path / "set", images)
    result = evaluate_openimages_masks(dataset, "all", in_memory(images))
    assert result[AP] == pytest.approx(expected)


def test_objects_in_images_without_detections_are_missed(tmp_path):
    images = one_image([(BOX, WHOLE, False)], [(0.9, WHOLE)])
    images["other"] = {**images["im"], "detections": []}
    dataset = write_dataset(tmp_path / "set", images)
    assert evaluate_openimages_masks(dataset, "all", in_memory(images))[AP] == 0.5


def test_refuses_masks_that_cannot_be_compared(tmp_path):
    images = one_image([(BOX, WHOLE, False)], [(0.9, WHOLE), (0.8, np.ones((8, 9), bool))])
    dataset = write_dataset(tmp_path / "set", images, size=(100, 100))

    def refused(detections, message):
        with pytest.raises(UserError, match=message):
            evaluate_openimages_masks(dataset, "all", detections)

    refused(in_memory(images), "image 'im' has masks of 8x8 and of 8x9 .*expected one size")
    tall = one_image([], [(0.9, np.ones((16, 8), bool))])
    refused(in_memory(tall), "image 'im' has masks of 16x8 .* expected the shape of the photo")
    good = in_memory(one_image([], [(0.9, WHOLE)]))
    good.masks[0] += b"1"
    refused(good, "image 'im': mask runs cover")
    boxes = tmp_path / "boxes.parquet"
    with DetectionsWriter(boxes, {}) as writer:
        writer.add("im", ["/m/b"], [0.5], [[0, 0, 1, 1]])
    refused(boxes, "boxes.parquet: no mask column")
    with DatasetWriter(tmp_path / "plain", "p", LABELS, LABELS, HIERARCHY) as writer:
        writer.add_split("all", [writer.add_image("im", "im.jpg", (8, 8), [BOX], [1])])
    with pytest.raises(UserError, match="the dataset has no masks"):
        evaluate_openimages_masks(Dataset.open(tmp_path / "plain"), "all", in_memory(images))
