"""Experts: lowest classes, three views of what is taken for them, images that are safe to use."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from common.data.dataset import GROUP_OF, Dataset, DatasetWriter
from common.data.subset import write_subset
from common.io.errors import UserError
from common.metrics.confusion import confusion_matrix
from common.tables import Detections
from common.tables.hierarchy import restrict, siblings
from common.training.checkpoint import Checkpoints
from detection.classifiers.softmax import Softmax
from detection.experts import selection
from detection.models.decoupling_head import DecouplingHead

LABELS = ["bear", "brown bear", "cat", "torch", "flashlight", "mammal", "house"]
BEAR, BROWN, CAT, TORCH, FLASHLIGHT, MAMMAL, HOUSE = range(7)
HIERARCHY = {
    "LabelName": "root",
    "Subcategory": [
        {
            "LabelName": "mammal",
            "Subcategory": [
                {"LabelName": "bear", "Subcategory": [{"LabelName": "brown bear"}]},
                {"LabelName": "cat"},
            ],
        },
        {
            "LabelName": "light",  # no class
            "Subcategory": [{"LabelName": "torch"}, {"LabelName": "flashlight"}],
        },
        {"LabelName": "house"},
    ],
}
# Boxes (class, flags), and image-level labels (class, confidence).
IMAGES = [
    ([(BEAR, 0), (CAT, 0)], []),
    ([(CAT, 0)], [(BEAR, 0)]),
    ([(CAT, 0)], []),  # mammal is present, bear is not verified
    ([(CAT, 0), (BROWN, 0)], []),  # there is a bear
    ([(CAT, 0)], [(BEAR, 1)]),  # there is one without a box
    ([(HOUSE, 0)], [(BEAR, 0)]),
    ([(TORCH, 0), (FLASHLIGHT, GROUP_OF)], []),
    ([], []),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experts") / "set"
    with DatasetWriter(
        directory, "set", LABELS, LABELS, HIERARCHY, "photos", has_ignore=True
    ) as writer:
        for i, (boxes, labels) in enumerate(IMAGES):
            classes, flags = [c for c, _ in boxes], [f for _, f in boxes]
            corners = [[0, 0, 0.5 + 0.25 * k, 1] for k in range(len(boxes))]
            writer.add_image(
                f"i{i}",
                f"{i}.jpg",
                (4, 4),
                np.reshape(corners, (-1, 4)),
                classes,
                flags,
                [c for c, _ in labels],
                [p for _, p in labels],
                ignore=[[0, 0, 0.5, 0.5]] if i == 4 else (),
            )
        writer.add_split("train", range(len(IMAGES)))
        writer.add_split("few", [6, 3])
    return Dataset.open(directory)


def test_lowest_classes_have_images():
    aps = {"bear": 0.5, "cat": 0.1, "torch": 0.0, "flashlight": 0.0, "mammal": 0.0}
    images = np.array([9, 9, 9, 9, 3, 0, 9])
    assert selection.lowest_classes(aps, LABELS, images, 1).tolist() == [FLASHLIGHT]
    assert selection.lowest_classes(aps, LABELS, images, 3).tolist() == [CAT, TORCH, FLASHLIGHT]
    with pytest.raises(UserError, match="4 classes have an AP and training images"):
        selection.lowest_classes(aps, LABELS, images, 5)


def test_siblings_share_a_parent_that_is_not_the_root():
    matrix = siblings(HIERARCHY, LABELS)
    pairs = {tuple(sorted(map(int, pair))) for pair in np.argwhere(matrix)}
    # The parent of torch and flashlight is no class.
    assert pairs == {(BEAR, CAT), (TORCH, FLASHLIGHT)}
    labels = ["brown bear", "cat", "torch"]
    assert restrict(HIERARCHY, labels)["Subcategory"] == [{"LabelName": label} for label in labels]
    nested = restrict(HIERARCHY, ["mammal", "brown bear"])["Subcategory"]
    assert nested == [{"LabelName": "mammal", "Subcategory": [{"LabelName": "brown bear"}]}]


def test_confusion_counts_what_a_detection_lies_on(dataset):
    """Ancestors and descendants are right, group-of boxes and empty places count for nothing."""
    rows = [
        # image, label, score, box
        (0, BEAR, 0.9, [0, 0, 0.5, 1]),  # right
        (0, TORCH, 0.8, [0, 0, 0.75, 1]),  # on the cat
        (0, TORCH, 0.05, [0, 0, 0.75, 1]),  # too unsure
        (1, MAMMAL, 0.7, [0, 0, 0.5, 1]),  # a cat is one
        (1, FLASHLIGHT, 0.6, [0.6, 0, 1, 1]),  # on nothing
        (3, BEAR, 0.9, [0, 0, 0.75, 1]),  # the brown bear; the cat overlaps as well
        (6, BEAR, 0.9, [0, 0, 0.45, 1]),  # on the torch
    ]
    detections = Detections(
        image_ids=[f"i{i}" for i in range(len(IMAGES))],
        labels=LABELS,
        image_index=np.array([row[0] for row in rows], np.int32),
        label_index=np.array([row[1] for row in rows], np.int32),
        scores=np.array([row[2] for row in rows], np.float32),
        boxes=np.array([row[3] for row in rows], np.float32),
        metadata={},
    )
    counts = confusion_matrix(dataset, "train", detections)
    expected = np.zeros((7, 7), int)
    expected[BEAR, BEAR] = 2
    expected[MAMMAL, MAMMAL] = expected[CAT, TORCH] = expected[TORCH, BEAR] = 1
    np.testing.assert_array_equal(counts, expected)
    shares = selection.confused_classes(counts, np.array([BEAR, TORCH]), min_count=1)
    # A third of the bears lies on torches; and that is all that is detected on torches.
    assert shares[0, TORCH] == pytest.approx(1 / 3)
    assert shares[1, BEAR] == 1 and shares[1, CAT] == 1
    assert selection.confused_classes(counts, np.array([TORCH]), min_count=2).max() == 0


def test_cosine_is_that_of_the_weights_without_background(tmp_path):
    kernel = np.array([[9.0, 1, 0, 1], [9.0, 0, 2, 1]], np.float32)  # (features, background + 3)
    state = {
        "params": {"box_head": {"classifier": {"kernel": kernel, "bias": np.ones(4, np.float32)}}},
        "batch_stats": {},
    }
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(5, state, {}, wait=True)
    checkpoints.close()
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"params/box_head/classifier/kernel": kernel}, file)
    for path in (tmp_path, file):
        weights = selection.read_classifier(path, "abc")
        np.testing.assert_array_equal(weights, kernel[:, 1:].T)
    # A run without a column of background says so in its config.
    (tmp_path / "config.json").write_text(
        '{"model": {"box_head": {"classifier": {"kind": "eql"}}}}'
    )
    np.testing.assert_array_equal(selection.read_classifier(tmp_path, "abcd"), kernel.T)
    cosine = selection.cosine_similarity(weights, np.array([2]))
    np.testing.assert_allclose(cosine, [[0.5**0.5, 0.5**0.5, 1]])
    with pytest.raises(UserError, match=r"has shape \(2, 4\), expected \(features, 501\)"):
        selection.read_classifier(file, [str(i) for i in range(500)])
    with pytest.raises(UserError, match="0 arrays are called head, expected one"):
        selection.read_classifier(file, "abc", name="head")
    with pytest.raises(UserError, match="nothing.safetensors: no readable weights"):
        selection.read_classifier(tmp_path / "nothing.safetensors", "abc")


def test_a_classifier_is_read_by_label_where_the_model_has_labels(tmp_path):
    kernel = np.float32(np.arange(8).reshape(2, 4))
    file = tmp_path / "x.safetensors"
    weights = {"params/box_head/classifier/kernel": kernel}
    safetensors.numpy.save_file(weights, file, {"labels": json.dumps(["c", "a", "b"])})
    found = selection.read_classifier(file, ["a", "b", "c"])
    np.testing.assert_array_equal(found, kernel[:, [2, 3, 1]].T)
    with pytest.raises(UserError, match="the model has no class 'd' \\(1 of the dataset's 2"):
        selection.read_classifier(file, ["a", "d"])


def test_classifiers_of_a_weak_head_do_not_count(tmp_path):
    kernel = np.float32(np.arange(8).reshape(2, 4))
    weights = {
        "params/box_head/classifier/kernel": kernel,
        "params/weak_head/classifier/kernel": -kernel,
    }
    safetensors.numpy.save_file(weights, tmp_path / "x.safetensors")
    found = selection.read_classifier(tmp_path / "x.safetensors", "abc")
    np.testing.assert_array_equal(found, kernel[:, 1:].T)


@pytest.mark.parametrize("name", [selection.CLASSIFIER, "sibling/classifier/kernel"])
def test_a_decoupling_head_gives_the_classifier_of_its_class_branch(tmp_path, name):
    """Its sibling head only trains beside it; it can be asked for by name."""
    head = DecouplingHead(Softmax(3), width=4)
    boxes = jnp.zeros((1, 2, 4))
    params = head.init(
        jax.random.key(0), lambda rois, offsets=None: jnp.ones((2, 7, 7, 3)), boxes, True
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(
        1, {"params": {"box_head": params["params"]}, "batch_stats": {}}, {}, wait=True
    )
    checkpoints.close()
    weights = selection.read_classifier(tmp_path, "abc", name=name)
    scope = params["params"]["sibling"] if "sibling" in name else params["params"]
    np.testing.assert_array_equal(weights, scope["classifier"]["kernel"][:, 1:].T)


def confusable(dataset, **pairs):
    strength = np.zeros((len(pairs), 7), bool)
    for row, (_, others) in enumerate(pairs.items()):
        strength[row, others] = True
    positive = np.array([LABELS.index(label) for label in pairs])
    return positive, selection.negative_classes(dataset, positive, strength)


def test_negative_images_cannot_hold_the_class(dataset):
    # Relatives of bear are never background to it.
    positive, pairs = confusable(dataset, bear=[BEAR, BROWN, CAT, MAMMAL, HOUSE])
    assert np.flatnonzero(pairs[0]).tolist() == [CAT, HOUSE]
    images = dataset.split("train")
    found = selection.select_images(dataset, images, positive, pairs)
    assert found.positive.tolist() == [0]
    assert found.negative.tolist() == [1, 5]
    assert found.dropped == {
        "positive class without box": 2,
        "unverified below a present parent": 1,
    }
    # Nothing speaks for a cat on the torch photo, but nobody looked for one either.
    positive, pairs = confusable(dataset, cat=[TORCH])
    assert selection.select_images(dataset, images, positive, pairs).negative.tolist() == [6]
    strict = selection.select_images(dataset, images, positive, pairs, require_verified=True)
    assert strict.negative.tolist() == [] and strict.dropped["not verified absent"] == 1


def test_relatives_of_a_class_are_ignored_where_it_is_trained(dataset, tmp_path):
    """A brown bear is a bear, whose box it has not; other ignore boxes stay."""
    relatives = selection.relatives(dataset, np.array([BEAR]))
    assert relatives.tolist() == [BROWN, MAMMAL]
    splits = {"train": np.arange(len(IMAGES))}
    write_subset(dataset, tmp_path / "out", "out", np.array([BEAR, CAT]), splits, ignored=relatives)
    small = Dataset.open(tmp_path / "out")
    brown = dataset.image_boxes(3)[0][1]
    np.testing.assert_array_equal(
        small.image_ignore_boxes(3), [*dataset.image_ignore_boxes(3), brown]
    )
    assert small.image_boxes(3)[1].tolist() == [1]
    for image in (0, 4, 6):
        np.testing.assert_array_equal(
            small.image_ignore_boxes(image), dataset.image_ignore_boxes(image)
        )


def test_subset_keeps_images_and_drops_foreign_boxes(dataset, tmp_path):
    """Boxes of other classes become background; labels keep only the classes that are left."""
    splits = {"train": np.array([0, 1, 4, 5]), "few": dataset.split("few")}
    write_subset(dataset, tmp_path / "out", "out", np.array([CAT, BEAR]), splits)
    small = Dataset.open(tmp_path / "out")
    assert small.class_labels == ["cat", "bear"]
    assert [small.image_id(i) for i in small.split("train")] == ["i0", "i1", "i4", "i5"]
    assert [small.image_id(i) for i in small.split("few")] == ["i6", "i3"]
    by_id = {small.image_id(i): i for i in range(small.num_images)}
    boxes, classes, _ = small.image_boxes(by_id["i0"])
    assert classes.tolist() == [1, 0]
    np.testing.assert_array_equal(boxes, dataset.image_boxes(0)[0])
    assert small.image_boxes(by_id["i3"])[1].tolist() == [0]
    assert len(small.image_boxes(by_id["i5"])[0]) == 0
    labels, confidences = small.image_labels(by_id["i4"])
    assert (labels.tolist(), confidences.tolist()) == ([1], [1])
    assert small.image_ignore_boxes(by_id["i4"]).tolist() == [[0, 0, 0.5, 0.5]]
    assert len(small.image_ignore_boxes(by_id["i5"])) == 0
    assert small.image_file(by_id["i6"]) == str(Path("photos/6.jpg").absolute())
