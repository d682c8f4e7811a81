"""Pools of classes that are easily confused: each is drawn from the photos of all of its pool.

"We expand the training samples of these confusing classes by mixing some similar classes" (paper
section 5.9). A file names the pools, one class a row:

    pool,label
    torch,/m/07dd4
    torch,/m/01kb5b

Other columns are for people. The paper's five pairs are shipped as `openimages`.

Shape legend: K classes of the run or of those with images, P pairs (class, image).
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

import common.tables
from common.data.plans.streams import ClassImages
from common.io.errors import UserError
from common.io.paths import local_copy

SHIPPED = Path(common.tables.__file__).parent / "class_pools"


def class_pools(labels: Sequence[str], pools: str) -> Int32[np.ndarray, " K"]:
    """The pool of each class, by the least index of its classes; most are alone.

    Args:
      labels: of the run.
      pools: a file as above, the name of a shipped one, or '' for none.

    Raises:
      UserError: no such file, a label that the run does not have or that is in two pools.
    """
    result = np.arange(len(labels), dtype=np.int32)
    if not pools:
        return result
    place = {label: number for number, label in enumerate(labels)}
    first: dict[str, int] = {}
    pool_of: dict[str, str] = {}
    for number, pool, label in _rows(pools):
        where = f"{pools}: row {number}, column label"
        if label not in place:
            raise UserError(
                f"{where}: found {label!r}, expected a class of the run, {_some(labels)}"
            )
        if pool_of.setdefault(label, pool) != pool:
            raise UserError(f"{where}: found {label!r} in pools {pool_of[label]!r} and {pool!r}")
        first[pool] = min(first.get(pool, place[label]), place[label])
    for label, pool in pool_of.items():
        result[place[label]] = first[pool]
    return result


def pooled_images(
    classes: Int32[np.ndarray, " K"], images: ClassImages, pools: Int32[np.ndarray, " N"]
) -> ClassImages:
    """The images of classes, each those of all of its pool, once.

    Args:
      classes: those with images.
      images: of each of them.
      pools: of all classes of the run, `class_pools`.
    """
    members: list[Int64[np.ndarray, " P"]] = np.split(images.members, images.offsets[1:-1])
    for pool in np.unique(pools[np.bincount(pools, minlength=len(pools))[pools] > 1]):
        rows = np.flatnonzero(pools[classes] == pool)
        if len(rows) > 1:
            together = np.unique(np.concatenate([members[row] for row in rows]))
            for row in rows:
                members[row] = together
    offsets = np.cumsum([0, *map(len, members)]).astype(np.int64)
    return ClassImages(offsets, np.concatenate(members).astype(np.int32))


def _rows(pools: str) -> list[tuple[int, str, str]]:
    """Row number, pool and label of each class."""
    source = SHIPPED / f"{pools}.csv" if pools.isidentifier() else pools
    try:
        with local_copy(source) as path, open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [(i, row.get("pool"), row.get("label")) for i, row in enumerate(reader, start=2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.csv")))
        raise UserError(
            f"config.data.pools: found {pools!r}, expected a file or a shipped one ({shipped}); "
            f"{error}"
        ) from error
    for number, pool, label in rows:
        if not (pool and label):
            raise UserError(
                f"{pools}: row {number}: found pool {pool!r}, label {label!r}, expected both"
            )
    return [(number, str(pool), str(label)) for number, pool, label in rows]


def _some(labels: Sequence[str]) -> str:
    return f"such as {', '.join(map(repr, labels[:3]))}"
