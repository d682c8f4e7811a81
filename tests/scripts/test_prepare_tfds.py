"""A TFDS detection set becomes a dataset with the very bytes of its photos."""

import io

import numpy as np
import pytest
from PIL import Image

from common.data.dataset import CROWD, GROUP_OF
from common.io.errors import UserError
from tests.prepare_data_cli import prepare, reasons

tfds = pytest.importorskip("tensorflow_datasets", reason="TFDS is not installed")

HEIGHT, WIDTH = 24, 32


def _photo(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def _examples(split: str):
    yield (
        0,
        {
            "image": io.BytesIO(_photo(1)),
            "image/id": 41 if split == "train" else 51,
            "objects": [
                {
                    "bbox": tfds.features.BBox(0.25, 0.5, 0.75, 1.0),
                    "label": "dog",
                    "is_crowd": True,
                },
                {"bbox": tfds.features.BBox(0.0, 0.0, 1.0, 0.5), "label": "cat", "is_crowd": False},
            ],
        },
    )
    yield (
        1,
        {"image": io.BytesIO(_photo(2)), "image/id": 42 if split == "train" else 52, "objects": []},
    )


class TinyBoxes(tfds.core.GeneratorBasedBuilder):
    """Two photos in each of two splits."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "image/id": np.int64,
                    "objects": tfds.features.Sequence(
                        {
                            "bbox": tfds.features.BBoxFeature(),
                            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                            "is_crowd": np.bool_,
                        }
                    ),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: _examples(split) for split in ("train", "validation")}

    def _generate_examples(self):
        raise NotImplementedError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyBoxes(data_dir=folder).download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return folder


def test_boxes_flags_and_bytes(tmp_path, data_dir):
    dataset = prepare("tfds", source="tiny_boxes", data_dir=data_dir, output=tmp_path / "d")
    assert dataset.class_labels == ["cat", "dog"]
    assert dataset.splits == ["train", "validation"]
    assert dataset.num_images == 4
    first, second = dataset.find_images(["41", "42"])
    assert set(dataset.split("train")) == {first, second}
    boxes, classes, flags = dataset.image_boxes(first)
    np.testing.assert_array_equal(boxes, np.float32([[0.5, 0.25, 1, 0.75], [0, 0, 0.5, 1]]))
    assert classes.tolist() == [1, 0] and flags.tolist() == [CROWD | GROUP_OF, 0]
    assert len(dataset.image_boxes(second)[0]) == 0
    assert dataset.image_sizes.tolist() == [[HEIGHT, WIDTH]] * 4
    with open(dataset.image_file(first), "rb") as file:
        assert file.read() == _photo(1)
    assert dataset.image_file(first).startswith(str(tmp_path / "d" / "images" / "train"))
    assert reasons(dataset) == {}


def test_version_can_be_chosen(tmp_path, data_dir):
    dataset = prepare("tfds", source="tiny_boxes:1.0.0", data_dir=data_dir, output=tmp_path / "d")
    assert dataset.num_images == 4


def test_unknown_and_unprepared_sets_are_named(tmp_path, data_dir):
    with pytest.raises(UserError, match="finds no such data set"):
        prepare("tfds", source="tiny_bowes", data_dir=data_dir, output=tmp_path / "d")
    with pytest.raises(UserError, match="not prepared in"):
        prepare("tfds", source="tiny_boxes", data_dir=tmp_path / "no", output=tmp_path / "d")
    assert list(tmp_path.iterdir()) == []
