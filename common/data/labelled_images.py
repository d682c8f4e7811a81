"""Photos to learn classes from: with one class each, or with verified image-level labels.

    DIRECTORY/train/CLASS/*.jpg, DIRECTORY/validation/CLASS/*.jpg     (any depth, any photo format)

or a data set of TensorFlow Datasets have one class a photo. A dataset directory says of some
classes that they are present on a photo, and of some that they are absent. All are random access:
image i can be read at any time, which is what lets a resumed run go on exactly.

Shape legend: n photos, K classes, P pairs (class, photo that shows it).
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int8, Int32, Int64

from common.data.dataset import Dataset
from common.data.images import read_file
from common.data.labels import VerifiedLabels
from common.data.plans.class_index import absent_counts, annotated_classes
from common.data.settings import LabelledDataSettings
from common.data.sources import Source, single_source
from common.io.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class LabelledImages(Protocol):
    """One split."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names in the order of the labels."""

    @property
    def verified(self) -> bool:
        """Whether labels are (K,) int8, 1 present, -1 absent, 0 unknown, instead of one class."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> tuple[bytes, int | Int8[np.ndarray, " K"]]:
        """Encoded photo and label of an image.

        Raises:
          ImageError: the file cannot be read.
        """

    def shown(self) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]]:
        """All pairs of an image and a class that it shows, by image."""

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
    verified = False

    def __len__(self) -> int:
        return len(self.paths)

    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(len(self.labels)), self.labels.astype(np.int64)

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
    verified = False

    def __len__(self) -> int:
        return len(self.source)

    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError("config.data.sampler is 'uniform' with tfds")

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


@dataclasses.dataclass(frozen=True)
class VerifiedImages:
    """Photos of a split of a dataset directory of which some image-level label is known.

    Attributes:
      source: the photos, ascending, and their classes.
      labels: what is known of them; boxes count as present.
    """

    source: Source
    labels: VerifiedLabels
    verified = True

    @property
    def class_names(self) -> Sequence[str]:
        """Names, with the label behind where two classes have the same."""
        dataset = self.source.dataset
        counts = Counter(dataset.class_names)
        pairs = zip(dataset.class_names, dataset.class_labels, strict=True)
        return [name if counts[name] == 1 else f"{name} ({label})" for name, label in pairs]

    def __len__(self) -> int:
        return len(self.source.images)

    def read(self, index: int) -> tuple[bytes, Int8[np.ndarray, " K"]]:
        image = int(self.source.images[index])
        return read_file(self.name(index)), self.labels.of_image(self.source, image)

    def name(self, index: int) -> str:
        return self.source.dataset.image_file(int(self.source.images[index]))

    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        """Labels as annotated: classes that are present by the hierarchy alone do not count."""
        count, keys = self.source.num_classes, []
        for has_boxes in (True, False):
            of = dataclasses.replace(self.source, has_boxes=has_boxes)
            place, classes = annotated_classes(of, self.source.images)
            keys.append(place * count + classes)
        pairs = np.unique(np.concatenate(keys))
        return pairs // count, pairs % count


def open_verified(directory: str, split: str) -> VerifiedImages:
    """The photos of a split of a dataset directory that have an image-level label or a box.

    Of a dataset that is annotated exhaustively all photos: each lacks some class.

    Raises:
      UserError: no dataset, no such split, or no such photo in it; or nothing says that a photo
        lacks a class, so that calling all classes present would be right everywhere.
    """
    dataset = Dataset.open(directory)
    images = np.sort(dataset.split(split))
    labelled = np.zeros(len(images), bool)
    for offsets in (dataset.label_offsets, dataset.box_offsets):
        labelled |= offsets[images + 1] > offsets[images]
    if not labelled.any():
        raise UserError(
            f"{directory}: split {split!r} has no photo with an image-level label or a box, "
            "expected some"
        )
    exhaustive = bool(dataset.meta.get("exhaustive"))
    chosen = images if exhaustive else images[labelled]
    found = VerifiedImages(single_source(dataset, chosen), VerifiedLabels(dataset))
    if not absent_counts(found.source)[1] and not (exhaustive and _lacks_some(found)):
        raise UserError(
            f"{directory}: nothing says of a photo of split {split!r} that a class is absent, so "
            "that 'present' would always be right, expected absent labels too, or a set whose "
            "dataset.json says that it is exhaustive"
        )
    return found


def _lacks_some(images: VerifiedImages) -> bool:
    """Whether any photo is known to lack a class; the first one usually does."""
    source = images.source
    return any((images.labels.of_image(source, i) < 0).any() for i in source.images.tolist())


def open_images(data: LabelledDataSettings, split: str) -> LabelledImages:
    """A split of the dataset directory, the TFDS set or the class folder that the settings name.

    Raises:
      UserError: none is given, or as the functions above.
    """
    if data.dataset:
        return open_verified(data.dataset, split)
    if data.tfds:
        return open_tfds(data.tfds, split, data.dir or None)
    if not data.dir:
        raise UserError(
            "config.data.dir: empty, expected a folder with SPLIT/CLASS/PHOTO.jpg "
            "(--config.data.dir=DIR), --config.data.dataset=DIR or --config.data.tfds=imagenet2012"
        )
    return open_class_folder(data.dir, split)
