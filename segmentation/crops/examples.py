"""One slot of a batch: the crop of an instance and its mask. NumPy and Pillow only.

Shape legend: H, W canvas.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from common.data import images
from common.data.batches import Example, Fields
from common.data.dataset import Dataset
from common.data.photo_errors import PhotoErrors
from common.masks.dataset_masks import MaskError, MaskReader
from segmentation.crops.windows import Augmentation, CropSize, Windows, clip_boxes, windows_of


@dataclasses.dataclass(frozen=True)
class CropSlot:
    """What is to be put into one place of a batch.

    Attributes:
      canvas: height, width.
      row: of `dataset.boxes`, -1 for padding.
      image: index of its photo.
      class_: its class.
      box: (4,) normalised.
      jittered: whether the box is to be moved.
      deviation: of the angle, in radians.
      draws: (8,) random numbers of the crop; None cuts the box as it is.
    """

    canvas: tuple[int, int]
    row: int = -1
    image: int = -1
    class_: int = 0
    box: Float[np.ndarray, " 4"] | None = None
    jittered: bool = False
    deviation: float = 0.0
    draws: Float[np.ndarray, " 8"] | None = None


class CropLoader:
    """Makes examples of slots; threads may share it.

    Attributes:
      photo_errors: counts what was left out because a photo or mask could not be read.
    """

    def __init__(self, dataset: Dataset, how: Augmentation | CropSize, on_image_error: str):
        """`how`: the augmentation of slots with draws, or the size of crops cut as they are."""
        self.photo_errors = PhotoErrors(on_image_error)
        self._dataset = dataset
        self._how = how
        self._masks = MaskReader(dataset)

    def fields(self, slot: CropSlot) -> Fields:
        """Shape and type of each field of an example."""
        return {
            "image": ((*slot.canvas, 3), np.uint8),
            "image_size": ((2,), np.float32),
            "image_valid": ((), np.bool_),
            "mask": (slot.canvas, np.uint8),
            "mask_valid": (slot.canvas, np.bool_),
            "classes": ((), np.int32),
            "instance_index": ((), np.int64),
        }

    def load(self, slot: CropSlot, example: Example) -> None:
        """Writes the example of a slot; without content when photo or mask are broken and may be
        skipped.

        Raises:
          UserError: photo or mask cannot be read and the config says 'fatal', or most cannot.
        """
        example["instance_index"][()] = slot.row
        example["classes"][()] = slot.class_
        if slot.row < 0:
            return
        self.photo_errors.count()
        try:
            photo = open_photo(self._dataset, slot.image)
            windows = self._windows(slot, photo.size).on_canvas(slot.canvas)
            cut = windows.cut(0, photo.size)
            image = cut.image(images.decode(photo, cut.photo_size, cut.area))
            cut = windows.cut(0, photo.size, enlarge_first=True)
            mask = cut.mask(self._masks.window(slot.row, cut.area, cut.area_size))
        except images.ImageError as error:
            self.photo_errors.skip(self._dataset.image_file(slot.image), error)
        except MaskError as error:
            self.photo_errors.skip(self._dataset.image_file(slot.image), error, "mask")
        else:
            height, width = image.shape[:2]
            example["image"][:height, :width] = image
            example["mask"][:height, :width] = mask
            example["mask_valid"][:height, :width] = cut.inside()
            example["image_size"][:] = height, width
            example["image_valid"][()] = True

    def _windows(self, slot: CropSlot, photo_size: tuple[int, int]) -> Windows:
        box, size = np.asarray(slot.box)[None], np.array(photo_size)[None]
        if isinstance(self._how, CropSize):
            return windows_of(clip_boxes(box, size), self._how)
        assert slot.draws is not None, "augmented crops need random numbers"
        return self._how.windows(
            box, size, np.array([slot.jittered]), np.array([slot.deviation]), slot.draws[None]
        )


def open_photo(dataset: Dataset, index: int) -> images.Photo:
    """Reads a photo of the dataset and its header.

    Raises:
      ImageError: it cannot be read.
    """
    data = images.read_file(dataset.image_file(index))
    return images.open_photo(data, tuple(dataset.image_sizes[index].tolist()))
