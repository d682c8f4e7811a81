"""Category relationships: re-scoring and mining equal their brute-force twins."""

import dataclasses
import zipfile

import numpy as np
import pytest

from common.data.dataset import Dataset, DatasetWriter
from common.io.errors import UserError
from common.io.settings import read_settings
from common.tables.hierarchy import ancestors
from ensemble.relations import mining, rules
from ensemble.relations.counts import Relations, read_relations
from tests.oracles import relations as twin

LABELS = ["animal", "dog", "wheel", "bike", "person", "glasses", "toy"]
HIERARCHY = {
    "LabelName": "root",
    "Subcategory": [
        {"LabelName": "animal", "Subcategory": [{"LabelName": "dog"}]},
        # A dog is below two parents that are not above one another.
        {"LabelName": "toy", "Subcategory": [{"LabelName": "dog"}]},
        *({"LabelName": label} for label in LABELS[2:6]),
    ],
}
WHEEL, BIKE, PERSON, GLASSES = 2, 3, 4, 5


def make_relations(both, inside, of=100):
    """Relations with the given shares, each from `of` images or boxes."""
    both, inside = (np.round(np.asarray(share) * of).astype(np.int64) for share in (both, inside))
    many, classes = np.full(both.shape, of), np.full(len(both), of)
    return Relations(LABELS, both, many, inside, many, classes, classes, {})


def draw_rows(rng, images=6, count=60):
    image = np.sort(rng.integers(0, images, count)) * 3
    low = rng.integers(0, 5, (count, 2)) / 8
    boxes = np.concatenate([low, low + rng.integers(0, 4, (count, 2)) / 8], axis=1)
    scores = (rng.integers(0, 11, count) / 8).astype(np.float32)  # ties, and above 1
    return image, rng.integers(0, len(LABELS), count), scores, boxes.astype(np.float32)


@pytest.mark.parametrize("mode", ["top", "scale"])
@pytest.mark.parametrize("joined", [7, 1 << 21])
def test_rescoring_equals_the_loops(monkeypatch, mode, joined):
    """For rows in any order, and however many pairs are looked at together."""
    monkeypatch.setattr(rules, "_MAX_JOINED", joined)
    changed = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        shares = rng.integers(0, 11, (2, len(LABELS), len(LABELS))) / 10
        shares[:, range(len(LABELS)), range(len(LABELS))] = 0
        found = make_relations(*shares)
        settings = rules.RelationSettings(cooccurrence=mode, tau_p=0.6, tau_q=0.8, inside=0.7)
        made = rules.make_rules(found, settings)
        image, classes, scores, boxes = draw_rows(rng)
        order = rng.permutation(len(scores))
        image, classes, scores, boxes = (a[order] for a in (image, classes, scores, boxes))

        raised = rules.raise_by_cooccurrence(made, image, classes, scores)
        expected = twin.cooccurrence(
            image, classes, scores, found.cooccurrence(), mode, 0.6, 0.5, 0.1
        )
        np.testing.assert_allclose(raised, expected, rtol=1e-6)
        result = rules.rescore(made, image, classes, scores, boxes)
        expected = twin.surround(
            image, classes, raised, boxes, found.containment(), 0.8, 0.5, 0.7, 0.1, 0.1
        )
        np.testing.assert_allclose(result, expected, rtol=1e-6)
        changed += (raised != scores).any() and (result != raised).any()
    assert changed > 20


def test_a_guitar_raises_the_best_person_only():
    """The paper's example: a person in 90.7 % of the images with a guitar (here: a bike)."""
    both = np.zeros((7, 7))
    both[PERSON, BIKE] = 0.907
    found = make_relations(both, np.zeros((7, 7)), of=1000)
    boxes = np.tile(np.float32([0, 0, 1, 1]), (4, 1))
    classes = np.array([BIKE, PERSON, PERSON, WHEEL])
    rows = (np.zeros(4, int), classes, np.float32([0.9, 0.4, 0.2, 0.3]))
    top = rules.rescore(rules.make_rules(found), *rows, boxes)
    np.testing.assert_allclose(top, [0.9, 0.9 * 0.907, 0.2, 0.3], rtol=1e-6)
    settings = rules.RelationSettings(cooccurrence="scale")
    scaled = rules.rescore(rules.make_rules(found, settings), *rows, boxes)
    np.testing.assert_allclose(scaled, [0.9, 0.8163, 0.40815, 0.3], rtol=1e-6)
    # As the formula is printed, P(bike | person) is what it takes for P(person | bike).
    printed = rules.RelationSettings(denominator="i")
    assert (rules.rescore(rules.make_rules(found, printed), *rows, boxes) == rows[2]).all()
    # A person seen with less than a certain confidence is none.
    weak = np.float32([0.9, 0.09, 0.05, 0.3])
    assert (rules.rescore(rules.make_rules(found), *rows[:2], weak, boxes) == weak).all()


def test_glasses_gain_on_a_person_and_lose_elsewhere():
    inside = np.zeros((7, 7))
    inside[GLASSES, PERSON] = 0.95
    made = rules.make_rules(make_relations(np.zeros((7, 7)), inside))
    boxes = np.float32([[0, 0, 0.5, 1], [0.1, 0.1, 0.3, 0.2], [0.7, 0.1, 0.9, 0.2], [0.5, 0, 1, 1]])
    classes = np.array([PERSON, GLASSES, GLASSES, PERSON])
    scores = np.float32([0.8, 0.6, 0.4, 0.3])
    result = rules.rescore(made, np.zeros(4, int), classes, scores, boxes)
    # The second person is too unsure to speak for glasses, and its glasses to speak for it.
    np.testing.assert_allclose(result, [0.88, 0.66, 0.36, 0.3], rtol=1e-6)


def test_no_rows_and_pairs_with_little_behind_them():
    both = np.zeros((7, 7))
    both[PERSON, BIKE] = 1
    few = make_relations(both, both, of=9)
    made = rules.make_rules(few)
    none, boxes = np.zeros(0, int), np.zeros((0, 4), np.float32)
    assert len(rules.rescore(made, none, none, boxes[:, 0], boxes)) == 0
    assert made.expected.counts.sum() == made.outer.counts.sum() == 0
    kept = rules.make_rules(few, rules.RelationSettings(min_images=9, min_boxes=9))
    assert kept.expected.counts.sum() == kept.outer.counts.sum() == 1


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("relations") / "set"
    rng = np.random.default_rng(3)
    with DatasetWriter(directory, "set", LABELS, LABELS, HIERARCHY) as writer:
        for i in range(60):
            count = rng.integers(0, 9)
            low = rng.integers(0, 4, (count, 2)) / 8
            boxes = np.concatenate([low, low + rng.integers(0, 5, (count, 2)) / 8], axis=1)
            classes = rng.integers(0, 6, count)
            labels = rng.choice(7, 2, replace=False)
            labels = [c for c in labels if c not in classes]
            confidences = rng.integers(0, 2, len(labels))
            writer.add_image(f"{i}", f"{i}.jpg", (8, 8), boxes, classes, None, labels, confidences)
        writer.add_split("train", rng.permutation(60)[:50])
    return Dataset.open(directory)


@pytest.mark.parametrize("exhaustive", [False, True])
def test_mining_equals_the_loops(dataset, monkeypatch, exhaustive):
    """However the images are cut into slabs."""
    parents = ancestors(dataset.hierarchy, dataset.class_labels)
    expected = twin.mine(dataset, "train", parents, 0.9, exhaustive)
    for slab, joined in ((1 << 15, 1 << 20), (4, 5)):
        monkeypatch.setattr(mining, "SLAB", slab)
        monkeypatch.setattr(mining, "_MAX_JOINED", joined)
        found = mining.mine_relations(dataset, "train", exhaustive=exhaustive)
        for name, counts in expected.items():
            np.testing.assert_array_equal(getattr(found, name), counts, name)
    assert found.images_both[0, 6] == 0, "animal and toy share the dog"
    assert found.images_both.sum() > 50 and found.boxes_inside.sum() > 10


def test_a_class_that_is_never_found_absent_has_no_rule():
    """It is verified only where it is present, so that its P would be 1 whatever is true."""
    found = make_relations(np.full((7, 7), 1.0), np.full((7, 7), 1.0))
    found = dataclasses.replace(found, images_absent=np.array([100, 100, 5, 100, 100, 100, 100]))
    assert (found.cooccurrence(min_images=6)[WHEEL] == 0).all()
    assert (found.containment(6)[:, WHEEL] == 0).all()
    assert found.cooccurrence(min_images=5)[WHEEL, BIKE] == 1


def test_files_come_back_for_any_order_of_classes(dataset, tmp_path):
    found = mining.mine_relations(dataset, "train")
    found.write(tmp_path / "x.npz")
    again = read_relations(tmp_path / "x.npz")
    np.testing.assert_array_equal(again.boxes_known, found.boxes_known)
    assert again.meta["split"] == "train"
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    labels = ["unknown", *LABELS[::-1]]
    other = again.reordered(labels)
    np.testing.assert_array_equal(other.images_both[1:, 1:], found.images_both[::-1, ::-1])
    assert other.images_known[0].sum() == other.images_known[:, 0].sum() == 0
    np.testing.assert_array_equal(other.images_absent[1:], found.images_absent[::-1])


def test_bad_files_and_fields_are_named(tmp_path):
    make_relations(np.zeros((7, 7)), np.zeros((7, 7))).write(tmp_path / "good.npz")
    data = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("cut", "other", "text"):
        with pytest.raises(UserError, match=f"{name}.npz: no readable relations"):
            rules.load_rules(tmp_path / f"{name}.npz", LABELS)
    with pytest.raises(UserError, match="no such file"):
        rules.load_rules(tmp_path / "nowhere.npz", LABELS)
    with pytest.raises(UserError, match="knows none of the 1 classes"):
        rules.load_rules(tmp_path / "good.npz", ["/m/x"])
    with pytest.raises(UserError, match="relations.tau: no such field; did you mean tau_"):
        read_settings(rules.RelationSettings, {"tau": 1}, "config.relations")
    for field, value in {"cooccurrence": "all", "tau_p": 1.5, "gain": -1, "min_images": 0}.items():
        with pytest.raises(UserError, match=f"relations.{field}: "):
            read_settings(rules.RelationSettings, {field: value}, "config.relations")


def npz(path, **arrays):
    """A file whose arrays are given as the bytes of their members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return path


def test_relations_made_to_fill_memory_are_refused(tmp_path):
    def array(shape, dtype="<i8", data=b""):
        header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
        return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data

    for content, message in (
        (array((1 << 43,)), "expected int64 of shape"),
        (array((1,), "|O", bytes(8)), "expected object of shape"),
        (b"\x93NUMPY\x01\x00\x05\x00" + b"[" * 5, "found no header of an array"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_relations(npz(tmp_path / "x.npz", header=content))
        assert "\n" not in str(caught.value)
