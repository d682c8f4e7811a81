"""Pools of confusable classes: each class is drawn from the photos of all of its pool."""

import numpy as np
import pytest

from common.data.dataset import Dataset, DatasetWriter
from common.data.plans.plan import train_plan
from common.data.plans.pools import SHIPPED, class_pools
from common.io.errors import UserError
from common.tables.class_mapping import SHIPPED as CLASS_MAPS
from tests.common.data.factories import data_settings

LABELS = ["torch", "lamp", "flashlight", "sword"]


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """Photo i shows class i % 3; nobody has a sword but in image labels."""
    with DatasetWriter(tmp_path / "set", "s", LABELS, LABELS, None, str(tmp_path)) as writer:
        for i in range(9):
            writer.add_image(
                f"{i}", f"{i}.jpg", (60, 60), np.array([[0.1, 0.1, 0.5, 0.5]]), [i % 3], [0],
                label_classes=[3], label_confidences=[1],
            )  # fmt: skip
        writer.add_split("train", range(9))
    return Dataset.open(tmp_path / "set")


def pool_file(tmp_path, *rows):
    path = tmp_path / "pools.csv"
    path.write_text("\n".join(["pool,label,note", *rows]) + "\n")
    return str(path)


def drawn_images(dataset, pools):
    data = data_settings(sampler="class_aware", batch_size=30, pools=pools)
    drawn = train_plan(dataset, data, 0).batch(0)
    return {LABELS[c]: set(drawn.images[drawn.classes == c].tolist()) for c in range(4)}


def test_a_class_is_drawn_from_the_photos_of_its_pool(dataset, tmp_path):
    plain = drawn_images(dataset, "")
    assert plain == {"torch": {0, 3, 6}, "lamp": {1, 4, 7}, "flashlight": {2, 5, 8}, "sword": set()}
    # A class with labels but no photo of it is not drawn, alone or in a pool.
    pools = pool_file(tmp_path, "t,torch,", "t,flashlight,", "s,sword,", "s,lamp,")
    pooled = drawn_images(dataset, pools)
    assert pooled["torch"] == pooled["flashlight"] == {0, 2, 3, 5, 6, 8}
    assert pooled["lamp"] == plain["lamp"] and pooled["sword"] == set()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["t,torch,", "t,candle,"],
            r"pools.csv: row 3, column label: found 'candle', expected a c",
        ),
        (["t,torch,", "u,torch,"], r"row 3, column label: found 'torch' in pools 't' and 'u'"),
        (["t,,"], r"pools.csv: row 2: found pool 't', label '', expected both"),
    ],
)
def test_wrong_pools_are_refused_by_row(dataset, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        drawn_images(dataset, pool_file(tmp_path, *rows))


def test_files_that_are_not_there_are_refused_with_those_that_are(dataset):
    with pytest.raises(UserError, match=r"config.data.pools: found 'nothing', .*\(openimages\)"):
        drawn_images(dataset, "nothing")


def test_the_shipped_pools_are_of_classes_of_the_challenge():
    rows = (CLASS_MAPS / "openimages.csv").read_text().splitlines()[1:]
    labels = [row.split(",")[0] for row in rows]
    pools = class_pools(labels, "openimages")
    assert (np.bincount(pools) == 2).sum() == 5 and (np.bincount(pools) <= 2).all()
    names = dict(row.split(",", 1) for row in rows)
    for row in (SHIPPED / "openimages.csv").read_text().splitlines()[1:]:
        _, label, name = row.split(",")
        assert names[label] == name
