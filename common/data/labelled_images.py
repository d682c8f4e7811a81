"""Photos with one class each: a folder of classes, or a data set of TensorFlow Datasets.

    DIRECTORY/train/CLASS/*.jpg, DIRECTORY/validation/CLASS/*.jpg     (any depth, any photo format)

Both are random access: image i can be read at any time, which is what lets a resumed run go on
exactly.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32

from common.data.images import read_file
from common.io.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class LabelledImages(Protocol):
    """One split."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names in the order of the labels."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> tuple[bytes, int]:
        """Encoded photo and label of an image.

        Raises:
          ImageError: the file cannot be read.
        """

    def name(self, index: int) -> str:
        """What errors call an image."""


@dataclasses.dataclass(frozen=True)
class ClassFolder:
    """Photos in one sub-folder a class; classes and photos in alphabetical order.

    Attributes:
      folder: of the split.
      class_names: names of the sub-folders.
      paths: of the photos, relative to `folder`.
      labels: of the photos.
    """

    folder: Path
    class_names: Sequence[str]
    paths: Sequence[str]
    labels: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[bytes, int]:
        return read_file(self.name(index)), int(self.labels[index])

    def name(self, index: int) -> str:
        return str(self.folder / self.paths[index])


def open_class_folder(directory: str | Path, split: str) -> ClassFolder:
    """Lists the photos of DIRECTORY/SPLIT.

    Raises:
      UserError: no such folder, no classes, or a class without photos.
    """
    folder = Path(directory) / split
    if not folder.is_dir():
        raise UserError(f"{folder}: found no such folder, expected {folder}/CLASS/PHOTO.jpg")
    class_names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not class_names:
        raise UserError(f"{folder}: found no sub-folders, expected one for each class")
    paths, labels = [], []
    for label, name in enumerate(class_names):
        found = sorted(
            os.path.relpath(os.path.join(parent, file), folder)
            for parent, _, files in os.walk(folder / name)
            for file in files
            if file.lower().endswith(_SUFFIXES)
        )
        if not found:
            raise UserError(
                f"{folder / name}: found no photos, expected files such as photo.jpg "
                f"({', '.join(_SUFFIXES)})"
            )
        paths += found
        labels += [label] * len(found)
    return ClassFolder(folder, class_names, paths, np.array(labels, np.int32))


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """A split of TensorFlow Datasets in a file format with random access.

    Attributes:
      title: name and split.
      class_names: of the feature 'label'.
      source: sequence of {'image': encoded photo, 'label': number}.
    """

    title: str
    class_names: Sequence[str]
    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[bytes, int]:
        example = self.source[index]
        return bytes(np.asarray(example["image"]).item()), int(example["label"])

    def name(self, index: int) -> str:
        return f"{self.title} example {index}"


def open_tfds(name: str, split: str, data_dir: str | None = None) -> TfdsImages:
    """Opens a prepared data set, such as 'imagenet2012', whose files are array_record.

    Raises:
      UserError: no such set or split, not prepared, without classes, or in a format without random
        access (says how to convert it).
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"config.data.tfds={name}: TFDS finds no such data set ({first})"
        ) from error
    if not builder.is_prepared():
        raise UserError(
            f"config.data.tfds={name}: not prepared in {builder.data_dir}; prepare it with "
            f"'tfds build {name} --file_format=array_record'"
        )
    found = str(builder.info.file_format.value)
    if found != "array_record":
        raise UserError(
            f"config.data.tfds={name}: prepared as {found}, expected array_record, which has "
            f"random access: 'tfds convert_format --root_data_dir={builder.data_dir} "
            "--out_file_format=array_record' makes a copy"
        )
    if split not in builder.info.splits:
        splits = ", ".join(builder.info.splits)
        raise UserError(f"config.data.tfds={name}: found no split {split!r}, expected {splits}")
    features = builder.info.features
    class_names = "label" in features and getattr(features["label"], "names", None)
    if "image" not in features or not class_names:
        raise UserError(
            f"config.data.tfds={name}: found features {', '.join(features)}, expected image and "
            "label with class names"
        )
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    return TfdsImages(f"{name} {split}", class_names, source)


def open_images(directory: str, tfds_name: str, split: str) -> LabelledImages:
    """The class folder `directory`, or the TFDS set `tfds_name` (in `directory`, if given).

    Raises:
      UserError: neither is given, or as the functions above.
    """
    if tfds_name:
        return open_tfds(tfds_name, split, directory or None)
    if not directory:
        raise UserError(
            "config.data.dir: empty, expected a folder with SPLIT/CLASS/PHOTO.jpg "
            "(--config.data.dir=DIR), or --config.data.tfds=imagenet2012"
        )
    return open_class_folder(directory, split)
