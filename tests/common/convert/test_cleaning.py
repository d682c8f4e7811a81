"""Cleaning equals its brute-force twin; whole-set mix-ups are recognised and real data is not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.convert.cleaning import check_class_ids, check_layout, check_pixels, clean_boxes
from common.convert.report import Report
from common.io.errors import UserError
from tests.oracles.cleaning import clean_rows

_COORDINATE = st.sampled_from([-0.5, -0.0, 0.0, 0.25, 0.5, 1.0, 1.5, float("nan"), float("inf")])
_ROW = st.tuples(
    st.integers(0, 2), st.integers(-1, 2), st.tuples(*[_COORDINATE] * 4), st.integers(0, 1)
)


@settings(deadline=None, max_examples=300)
@given(st.lists(_ROW, max_size=40))
def test_cleaning_equals_the_brute_force_twin(rows):
    table = {
        "image": np.array([row[0] for row in rows], np.int32),
        "class": np.array([row[1] for row in rows], np.int32),
        "box": np.array([row[2] for row in rows], np.float32).reshape(-1, 4),
        "flags": np.array([row[3] for row in rows], np.uint8),
        "file": np.zeros(len(rows), np.int32),
        "row": np.arange(len(rows), dtype=np.int64),
    }
    report = Report()
    result = clean_boxes(table, ["file.csv"], report)
    kept, reasons = clean_rows(rows)
    found = list(
        zip(
            result["image"].tolist(),
            result["class"].tolist(),
            [tuple(box) for box in result["box"].tolist()],
            result["flags"].tolist(),
            strict=True,
        )
    )
    assert found == kept
    assert {entry["reason"]: entry["count"] for entry in report.as_json()} == reasons


def _corners(rng, count=200):
    low = rng.uniform(0, 0.8, (count, 2))
    return np.concatenate([low, low + rng.uniform(0.01, 0.2, (count, 2))], 1)


def test_layout_mix_ups_are_recognised():
    rng = np.random.default_rng(0)
    size = np.tile([[300.0, 400.0]], (200, 1))
    corners = _corners(rng)
    pixels = corners * [400, 300, 400, 300]
    xywh = np.concatenate([pixels[:, :2], pixels[:, 2:] - pixels[:, :2]], 1)
    check_layout(corners, "f", "c")
    check_pixels(pixels, size, "f", corners=True)
    check_pixels(xywh, size, "f", corners=False)
    with pytest.raises(UserError, match="look like pixels"):
        check_layout(pixels, "f", "c")
    with pytest.raises(UserError, match="look like x, y, width, height"):
        check_layout(xywh / [400, 300, 400, 300], "f", "c")
    with pytest.raises(UserError, match="look like xmin, ymin, xmax, ymax"):
        check_pixels(pixels, size, "f", corners=False)
    with pytest.raises(UserError, match="look normalised"):
        check_pixels(corners, size, "f", corners=False)
    with pytest.raises(UserError, match="width and height"):
        check_pixels(xywh, size / 4, "f", corners=False)
    with pytest.raises(UserError, match="look normalised"):
        check_pixels(corners, size, "f", corners=True)
    with pytest.raises(UserError, match="look like x, y, width, height"):
        check_pixels(xywh, size, "f", corners=True)
    with pytest.raises(UserError, match="width and height"):
        check_pixels(pixels, size / 4, "f", corners=True)


def texts(*ids):
    return [str(i) for i in ids]


def test_class_ids_off_by_one_are_recognised():
    known = texts(*range(1, 11))
    check_class_ids(texts(1, 5, 10), known, "f")
    check_class_ids(texts(1, 5, 10, 99), known, "f")  # a stray id: dropped and counted later
    with pytest.raises(UserError, match=r"off by one: 0 not.*\+1"):
        check_class_ids(texts(*range(10)), known, "f")
    with pytest.raises(UserError, match=r"off by one: 10 not.*-1"):
        check_class_ids(texts(*range(1, 11)), texts(*range(10)), "f")
    with pytest.raises(UserError, match="none of the category ids"):
        check_class_ids(texts(50, 70), known, "f")
