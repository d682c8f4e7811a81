"""Boxes made from instance masks, of classes that are boxed as groups."""

import numpy as np
import pytest

from common.data.dataset import GROUP_OF
from common.io.errors import UserError
from tests.prepare_data_cli import openimages_source, prepare, reasons, write_photo


def _boxes(dataset, image_id):
    (index,) = dataset.find_images([image_id])
    boxes, classes, flags = dataset.image_boxes(index)
    return boxes.tolist(), [dataset.class_labels[c] for c in classes], flags.tolist()


MASKS = "challenge-2019-train-segmentation-masks.csv"
MASK_HEADER = (
    "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks\n"
)


def _grapes(folder):
    """Class a is boxed as groups on x, c has one box that a mask is of."""
    rows = ["x,/m/a,0,1,0,1,1", "y,/m/a,0,1,0,1,1", "y,/m/b,0,1,0,1,0", "y,/m/c,0.5,1,0.5,1,0"]
    source = openimages_source(folder, rows, classes="/m/a,Grape\n/m/b,Cat\n/m/c,Dog\n")
    write_photo(source / "masks" / "1.png", 4, 4)
    masks = [
        "1.png,x,/m/a,1,0.1,0.5,0.1,0.5,,",
        "2.png,x,/m/a,2,0.2,0.6,0.2,0.6,,",  # whose PNG is not there: a box all the same
        "3.png,y,/m/c,3,0.5,1,0.5,1,,",  # a box of this mask is there
        "4.png,y,/m/c,4,0,0.5,0,0.5,,",
        "5.png,other,/m/a,5,0,0.5,0,0.5,,",
    ]
    (source / MASKS).write_text(MASK_HEADER + "\n".join(masks) + "\n")
    return source


@pytest.mark.parametrize("wanted", ["grape", "/m/a", "0.9"])
def test_instance_masks_become_boxes_of_classes_that_are_boxed_as_groups(tmp_path, capsys, wanted):
    source = _grapes(tmp_path / "s")
    dataset = prepare("openimages", source=source, output=tmp_path / "d", boxes_from_masks=[wanted])
    boxes, labels, flags = _boxes(dataset, "x")
    np.testing.assert_allclose(boxes, [[0, 0, 1, 1], [0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.6, 0.6]])
    assert labels == ["/m/a"] * 3 and flags == [GROUP_OF, 0, 0]
    assert dataset.image_masks(0)[1] is not None
    assert _boxes(dataset, "y")[1] == ["/m/a", "/m/b", "/m/c"]  # no class that was not asked for
    assert dataset.meta["boxes_from_masks"] == {"/m/a": 2}
    assert "2 of Grape, of whose 2 boxes 2 are of groups" in capsys.readouterr().out
    assert reasons(dataset)["box from an instance mask"] == 2
    plain = prepare("openimages", source=source, output=tmp_path / "plain")
    assert _boxes(plain, "x")[1] == ["/m/a"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["plum"], "--boxes_from_masks: found no such class, 'plum', expected labels or names"),
        (["cat"], "--boxes_from_masks: found no instance mask without a box of 'Cat', expected"),
        (["1.5"], "--boxes_from_masks=1.5: expected a share above 0, at most 1"),
    ],
)
def test_classes_without_masks_are_refused(tmp_path, wanted, message):
    source = _grapes(tmp_path / "s")
    with pytest.raises(UserError, match=message):
        prepare("openimages", source=source, output=tmp_path / "d", boxes_from_masks=wanted)
