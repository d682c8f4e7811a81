"""The mask demo's data: nothing in two splits, every nucleus where it was."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from common.io.errors import UserError
from common.masks import rle
from scripts import mask_demo_data as data


def write_wheel(path, photo, masks):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, array in ((data.PHOTO, photo), (data.MASKS, masks)):
            buffer = io.BytesIO()
            Image.fromarray(array.astype(np.uint16)).save(buffer, format="TIFF")
            wheel.writestr(name, buffer.getvalue())
    return path


@pytest.fixture
def arrays():
    masks = np.zeros((256, 128), int)
    masks[10:30, 20:50] = 1
    masks[86:106, 60:80] = 2  # on a cut between training tiles
    masks[180:200, 100:120] = 3  # on the cut between the splits, at 192
    masks[250:252, 0:3] = 4  # too small
    return 100 * (masks > 0) + np.arange(128), masks


def test_tiles_put_together_are_the_photo_and_its_masks(tmp_path, arrays):
    photo, masks = arrays
    data.build(write_wheel(tmp_path / "x.whl", photo, masks), tmp_path / "coco")
    seen = np.zeros(masks.shape, bool)
    splits = {}
    for split in ("train", "validation"):
        content = json.loads((tmp_path / f"coco/{split}.json").read_text())
        splits[split] = len(content["annotations"])
        for image in content["images"]:
            x, y = (int(part) for part in image["file_name"][:-4].split("_")[1:])
            assert (y >= 192) == (split == "validation")
            with Image.open(tmp_path / "coco/images" / image["file_name"]) as tile:
                assert tile.size == (image["width"], image["height"]) and tile.mode == "L"
            for annotation in content["annotations"]:
                if annotation["image_id"] != image["id"]:
                    continue
                segment = annotation["segmentation"]
                mask = rle.decode(segment["counts"].encode(), tuple(segment["size"]))
                left, top, width, height = annotation["bbox"]
                assert mask[top : top + height, left : left + width].sum() == annotation["area"]
                seen[y : y + image["height"], x : x + image["width"]] |= mask
    assert np.array_equal(seen, (masks > 0) & (masks != 4))
    assert splits == {"train": 4, "validation": 1}


def test_another_wheel_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("other/file.txt", "")
    with pytest.raises(UserError, match="other.whl.*expected the stardist wheel"):
        data.build(tmp_path / "other.whl", tmp_path / "coco")
    with pytest.raises(UserError, match="nothing.whl: cannot be read"):
        data.build(tmp_path / "nothing.whl", tmp_path / "coco")
