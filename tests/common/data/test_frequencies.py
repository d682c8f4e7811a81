"""Class frequencies and repeat factors: LVIS' denominators, several sources, canvases."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset import CROWD, Dataset, DatasetWriter
from common.data.frequencies import class_frequencies, repeat_factors
from common.data.plans.plan import train_plan
from common.data.settings import SourceSettings
from common.data.sources import open_sources
from common.io.errors import UserError
from tests.common.data.factories import data_settings

RUN = ["cat", "dog", "fox", "owl"]


def write(directory: Path, labels, photos, size=lambda i: (4, 4)) -> Path:
    """`photos`: classes of the boxes of each."""
    with DatasetWriter(directory, directory.name, labels, labels, None) as writer:
        for i, classes in enumerate(photos):
            boxes = np.tile([0.1, 0.1, 0.5, 0.5], (len(classes), 1))
            writer.add_image(f"{directory.name}{i}", f"{i}.jpg", size(i), boxes, classes)
        writer.add_split("train", range(len(photos)))
    return directory


def test_shares_are_of_photos_with_annotations(tmp_path):
    directory = tmp_path / "x"
    with DatasetWriter(directory, "x", RUN, RUN, None) as writer:
        for i, classes in enumerate([[0, 0, 1], [0], [], [1], [0], []]):
            boxes = np.tile([0.1, 0.1, 0.5, 0.5], (len(classes), 1))
            flags = [CROWD] * len(classes) if i == 3 else [0] * len(classes)
            writer.add_image(f"{i}", f"{i}.jpg", (4, 4), boxes, classes, flags)
        writer.add_split("train", range(6))
    sources = open_sources(Dataset.open(directory), data_settings())
    found = class_frequencies(sources, CROWD)
    assert found.images == (3, 1, 0, 0)
    np.testing.assert_allclose(found.shares, [1.0, 1 / 3, 0, 0])
    assert found.summary(0.5) == (
        "3 of 4 classes are on less than 0.5 of the annotated photos, 2 on none"
    )
    with_crowds = class_frequencies(sources)
    assert with_crowds.images == (3, 2, 0, 0)
    np.testing.assert_allclose(with_crowds.shares, [0.75, 0.5, 0, 0])
    factors = repeat_factors(sources[0], with_crowds, 0.98)
    np.testing.assert_allclose(factors, [1.4, np.sqrt(0.98 / 0.75), 1, 1.4, factors[1], 1])


@pytest.fixture
def two_sources(tmp_path):
    """100 photos of the run's classes, and 60 of a set that knows two of them."""
    run = write(
        tmp_path / "run",
        RUN,
        [[0] if i >= 4 else [0, 2] if i else [1] for i in range(100)],
        size=lambda i: (6, 4) if i % 5 == 0 else (4, 6),
    )
    other = write(tmp_path / "other", ["owl", "cow", "dog"], [[0, 1]] * 50 + [[2]] * 9 + [[1]])
    sources = (
        SourceSettings(dir=str(run), share=3.0),
        SourceSettings(dir=str(other), share=1.0, others="unknown"),
    )
    return Dataset.open(run), data_settings(
        sources=sources, sampler="repeat_factor", repeat_threshold=0.2, batch_size=8, canvas=(4, 6)
    )


def test_a_class_counts_where_its_source_knows_it(two_sources):
    sources = open_sources(*two_sources)
    found = class_frequencies(sources)
    assert found.images == (99, 10, 3, 50)
    # The other set's photo of a cow alone has no class of the run; it knows nothing of cats.
    np.testing.assert_allclose(found.shares, [0.99, 10 / 159, 0.03, 50 / 159])
    dog, fox = np.sqrt(0.2 * 159 / 10), np.sqrt(0.2 / 0.03)
    own = repeat_factors(sources[0], found, 0.2)
    np.testing.assert_allclose(own, [dog, fox, fox, fox, *[1.0] * 96])
    np.testing.assert_allclose(
        repeat_factors(sources[1], found, 0.2), [1.0] * 50 + [dog] * 9 + [1.0]
    )


def test_shares_of_sources_and_orientations_hold_beside_the_factors(two_sources):
    dataset, settings = two_sources
    plan = train_plan(dataset, settings, seed=1)
    steps, counts, places = 1000, np.zeros(160), np.zeros(2)
    portrait = 0
    for step in range(steps):
        images, _, sources = plan.batch(step)
        counts += np.bincount(images + 100 * sources, minlength=160)
        places += np.bincount(sources, minlength=2)
        height, width = plan.canvas(step)
        portrait += height > width
    np.testing.assert_allclose(places / places.sum(), [0.75, 0.25], atol=0.003)
    factors = repeat_factors(plan.sources[0], class_frequencies(plan.sources), 0.2)
    np.testing.assert_allclose(
        counts[:100] / counts[:100].sum(), factors / factors.sum(), atol=3e-3
    )
    assert portrait / steps == pytest.approx(0.75 * factors[::5].sum() / factors.sum(), abs=0.003)


def test_counts_of_lvis_by_hand(tmp_path):
    """The rule on 2,000 photos: below the threshold strictly, the rest as frequent."""
    photos = [[0]] * 2000
    photos[:2] = [[0, 1]] * 2
    photos[2:3] = [[2]]
    directory = write(tmp_path / "x", RUN, [*photos, *[[]] * 7])
    (source,) = open_sources(Dataset.open(directory), data_settings())
    found = class_frequencies([source])
    assert json.dumps(found.shares) == json.dumps([1999 / 2000, 0.001, 0.0005, 0.0])
    factors = repeat_factors(source, found, 0.001)
    assert set(factors) == {1.0, np.sqrt(2)} and factors[2] == np.sqrt(2)


def test_sources_of_labels_alone_have_no_frequencies():
    with pytest.raises(UserError, match=r"config\.data\.sources: none has boxes"):
        class_frequencies(())
