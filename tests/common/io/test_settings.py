"""Configs become typed settings, and every wrong field is refused by its name."""

import dataclasses
from typing import Literal

import ml_collections
import pytest

from common.io.errors import UserError
from common.io.settings import check, read_settings


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    sides: tuple[int, int]

    def __post_init__(self):
        check(self.rate > 0, "rate", self.rate, "more than 0")


@dataclasses.dataclass(frozen=True)
class Outer:
    kind: Literal["a", "b"]
    inner: Inner
    scales: tuple[float, ...] = ()
    limit: int | None = None
    flip: bool = True


def config(**changes) -> ml_collections.ConfigDict:
    fields = {"kind": "a", "inner": {"rate": 1, "sides": [3, 4]}} | changes
    return ml_collections.ConfigDict(fields)


def test_values_are_converted_and_hashable():
    found = read_settings(Outer, config(scales=[1, 2.5], limit=3, flip=False))
    assert found == Outer("a", Inner(1.0, (3, 4)), (1.0, 2.5), 3, False)
    assert isinstance(found.inner.rate, float) and isinstance(hash(found), int)
    assert read_settings(Outer, config()) == Outer("a", Inner(1.0, (3, 4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "c"}, "config.kind: found 'c', expected one of 'a', 'b'"),
        ({"limit": 1.5}, "config.limit: found 1.5, expected a whole number or None"),
        ({"limit": True}, "config.limit: found True, expected a whole number or None"),
        ({"flip": 1}, "config.flip: found 1, expected True or False"),
        ({"scales": 3}, "config.scales: found 3, expected tuple[float, ...]"),
        ({"scales": ["x"]}, "config.scales[0]: found 'x', expected a number"),
        ({"scales": [1.0, float("inf")]}, "config.scales[1]: found inf, expected a number"),
        ({"inner": 3}, "config.inner: found 3, expected fields (rate, sides)"),
        ({"inner": {"rate": 1}}, "config.inner.sides: missing"),
        ({"inner": {"rate": 0, "sides": (1, 2)}}, "config.inner.rate: found 0.0, expected more"),
        ({"inner": {"rate": 1, "sides": (1,)}}, "config.inner.sides: found (1,), expected tuple"),
        ({"limt": 1}, "config.limt: no such field; did you mean limit?"),
    ],
)
def test_wrong_fields_are_named(changes, message):
    with pytest.raises(UserError) as error:
        read_settings(Outer, config(**changes))
    assert str(error.value).startswith(message)
