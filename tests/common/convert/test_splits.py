"""Splits have the sizes asked for; stratified ones divide every class alike."""

import numpy as np
import pytest

from common.convert.splits import parse_shares, random_split, stratified_split
from common.io.errors import UserError

SHARES = np.array([0.8, 0.1, 0.1])
IMAGES, CLASSES = 20_000, 200


@pytest.fixture(scope="module")
def pairs():
    """A long tail: the most frequent class is on a third of the images, the rarest on three."""
    rng = np.random.default_rng(0)
    counts = np.geomspace(3, IMAGES / 3, CLASSES).astype(int)
    image = np.concatenate([rng.choice(IMAGES - 500, n, replace=False) for n in counts])
    return image, np.repeat(np.arange(CLASSES), counts)


def _class_counts(pairs, split):
    image, class_ = pairs
    counts = np.zeros((CLASSES, 3), int)
    np.add.at(counts, (class_, split[image]), 1)
    return counts


def test_every_class_divides_like_the_shares(pairs):
    split = stratified_split(*pairs, IMAGES, CLASSES, SHARES, seed=0)
    counts = _class_counts(pairs, split)
    totals = counts.sum(1)
    # Within one and a half images, or a fiftieth of the images of the class.
    assert (
        np.abs(counts - totals[:, None] * SHARES) <= np.maximum(1.5, totals[:, None] / 50)
    ).all()
    assert (counts > 0).all(), "three images are enough for three splits"
    np.testing.assert_allclose(np.bincount(split) / IMAGES, SHARES, atol=0.005)
    chance = _class_counts(pairs, random_split(IMAGES, SHARES, seed=0))
    assert (chance == 0).any(), "which a random split does not give"


def test_the_seed_decides(pairs):
    first, again, other = (stratified_split(*pairs, IMAGES, CLASSES, SHARES, s) for s in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    assert (random_split(99, SHARES, 1) == random_split(99, SHARES, 1)).all()
    assert np.bincount(random_split(101, SHARES, 0)).tolist() == [81, 10, 10]


def test_images_of_no_class_even_out_the_sizes():
    split = stratified_split(np.array([0, 1]), np.array([0, 0]), 100, 1, np.array([0.5, 0.5]), 0)
    assert np.bincount(split).tolist() == [50, 50]
    assert set(split[:2]) == {0, 1}


def test_images_divide_into_as_many_splits_as_are_asked_for():
    shares = np.full(200, 1 / 200)
    image = np.arange(1000)
    for split in (
        random_split(1000, shares, 0),
        stratified_split(image, np.zeros(1000, int), 1000, 1, shares, 0),
    ):
        assert np.bincount(split).tolist() == [5] * 200


@pytest.mark.parametrize("text", ["train", "train=0.8", "train=0.8,train=0.2", "a=1.5", "=1"])
def test_shares_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="--shares"):
        parse_shares(text.split(","))
