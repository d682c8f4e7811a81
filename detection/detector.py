"""A trained detector as a function of photos.

    result = detector("photo.jpg")            # or an array, a Pillow image, a list of any of them
    print(result.boxes, result.scores, result.names)
    result.draw().save("found.jpg")

`detection.load` makes one, `detection.predict` runs it over many files. The programs are those of
`detection.export`.

Shape legend: B photos of a block, D detections of each, K classes.
"""

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from common.data import images
from common.data.model_classes import ModelClasses
from common.data.photo_errors import PhotoErrors
from common.io.errors import UserError
from common.io.paths import PathLike
from detection.models.faster_rcnn import FasterRCNN
from detection.result import Result
from detection.settings import RunSettings
from detection.tta.engine import BatchDetections, Keep, detect_blocks, make_engine
from detection.tta.photo_blocks import make_layout, open_views

PhotoLike = PathLike | bytes | np.ndarray | Image.Image


class Detector:
    """Finds objects on photos.

    Attributes:
      settings: of its run.
      classes: labels and names of its classes.
      step: of its checkpoint; None of a weights file.
      model, variables, mesh: what runs, on which devices.
      batch_size: photos that go through at a time, at most.
    """

    def __init__(
        self,
        settings: RunSettings,
        classes: ModelClasses,
        model: FasterRCNN,
        variables: dict,
        mesh: Mesh,
        *,
        step: int | None = None,
        batch_size: int = 0,
        say: Callable = print,
    ):
        """Compiles nothing before the first photo.

        Args:
          settings: of the run.
          classes: of the model.
          model: as trained.
          variables: {'params', 'batch_stats'} on the mesh.
          mesh: devices of this process.
          step: of the checkpoint.
          batch_size: photos at a time; 0: one for each CPU device, elsewhere
            `evaluation.batch_size` of the config. Fewer photos go in smaller batches, which have
            programs of their own.
          say: where lines go.
        """
        self.settings, self.classes, self.step = settings, classes, step
        self.model, self.variables, self.mesh, self._say = model, variables, mesh, say
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        wanted = batch_size or (mesh.size if on_cpu else settings.evaluation.batch_size)
        self.batch_size = -(-wanted // mesh.size) * mesh.size

    @overload
    def __call__(self, photos: PhotoLike, **options: Any) -> Result: ...

    @overload
    def __call__(self, photos: Sequence[PhotoLike], **options: Any) -> list[Result]: ...

    def __call__(self, photos: Any, **options: Any) -> Any:
        """What is on a photo, or on each of a list.

        Args:
          photos: path or gs:// address of a file, or its content (bytes), which is turned as its
            EXIF tag says; array (H, W, 3) uint8, RGB; Pillow image, as its pixels lie; or a list of
            such.
          **options: `score_threshold` and `classes` of `stream`.

        Raises:
          UserError: a photo that cannot be read.
        """
        single = isinstance(photos, str | os.PathLike | bytes | np.ndarray | Image.Image)
        photos = [photos] if single else list(photos)
        results: list[Result | None] = [None] * len(photos)
        for place, result in self.stream(photos, errors=_Refusing("fatal"), **options):
            results[place] = result
        return results[0] if single else results

    def stream(
        self,
        photos: Sequence[PhotoLike],
        *,
        score_threshold: float | None = None,
        classes: Sequence[str] = (),
        errors: PhotoErrors | None = None,
    ) -> Iterator[tuple[int, Result]]:
        """Yields place and result of each photo as they come, memory for a few of them.

        Args:
          photos: as for a call.
          score_threshold: weaker detections are left out; None: those below that of the config.
          classes: labels or names that are wanted; (): all.
          errors: what becomes of photos that cannot be read; None: they are named and left out.

        Raises:
          UserError: an unknown class, or as `errors` says.
        """
        errors = errors or PhotoErrors("skip", tolerant=True)
        keep = self._keep(score_threshold, find_classes(self.classes, classes))
        given = _GivenPhotos(photos)
        devices = self.mesh.size
        needed = devices * (1 << max(-(-len(photos) // devices) - 1, 0).bit_length())
        evaluation = dataclasses.replace(
            self.settings.evaluation, batch_size=min(self.batch_size, needed)
        )
        # A call is too short for processes that load photos.
        data = dataclasses.replace(self.settings.data, num_processes=1)
        settings = dataclasses.replace(self.settings, evaluation=evaluation, data=data)
        layout = make_layout(settings, devices, devices)
        engine = make_engine(settings, self.model, self.variables, self.mesh, layout, self._say)
        batches = open_views(settings, given, np.arange(len(photos)), layout, errors)
        for block in detect_blocks(settings, engine, batches, keep):
            (rows,) = block.tables
            for found in rows:
                name = given.name(found.image)
                yield found.image, Result.of(found, self.classes, name, given.opener(found.image))

    def _keep(self, score_threshold: float | None, wanted: np.ndarray | None) -> Keep | None:
        if score_threshold is None and wanted is None:
            return None

        def keep(detections: BatchDetections) -> np.ndarray:
            kept = detections["scores"] >= np.float32(score_threshold or 0.0)
            return kept if wanted is None else kept & np.isin(detections["classes"], wanted)

        return keep

    def __repr__(self) -> str:
        short, long = self.settings.data.canvas
        return (
            f"Detector({self.settings.name}, step {self.step}, {self.classes.count} classes, "
            f"canvas {short}x{long})"
        )


def find_classes(classes: ModelClasses, wanted: Sequence[str]) -> np.ndarray | None:
    """Class numbers of labels or names, ascending; None where nothing is asked for.

    Raises:
      UserError: the model has no such class.
    """
    if not wanted:
        return None
    numbers: dict[str, list[int]] = {}
    for number, texts in enumerate(zip(classes.labels, classes.names, strict=True)):
        for text in dict.fromkeys(text.casefold() for text in texts):
            numbers.setdefault(text, []).append(number)
    found = set()
    for text in wanted:
        if text.casefold() not in numbers:
            close = difflib.get_close_matches(text.casefold(), numbers, 1)
            known = ", ".join(classes.names[:10]) + (", ..." if classes.count > 10 else "")
            hint = f"did you mean {close[0]}?" if close else f"it has {known}"
            raise UserError(f"classes: {text!r} is none of the model's; {hint}")
        found.update(numbers[text.casefold()])
    return np.array(sorted(found))


class _GivenPhotos:
    """`common.data.views.Photos` of files, their contents, and images in memory."""

    def __init__(self, photos: Sequence[PhotoLike]):
        self._photos = photos

    def name(self, index: int) -> str:
        photo = self._photos[index]
        return os.fspath(photo) if isinstance(photo, str | os.PathLike) else f"photo {index}"

    def read(self, index: int) -> Callable[[], images.Photo]:
        photo = self._photos[index]
        if isinstance(photo, str | os.PathLike):
            photo = images.read_file(os.fspath(photo))
        if isinstance(photo, bytes):
            return functools.partial(images.open_photo, photo)
        return functools.partial(_as_is, images.photo_of_pixels(_as_image(photo)))

    def opener(self, index: int) -> Callable[[], images.Photo]:
        """Reads the photo only when it is called."""
        return lambda: self.read(index)()


def _as_is(photo: images.Photo) -> images.Photo:
    return photo


def _as_image(photo: Any) -> Image.Image:
    if isinstance(photo, Image.Image):
        return photo
    pixels = np.asarray(photo)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise UserError(
            f"photos: found an array {pixels.shape} of {pixels.dtype}, expected (H, W, 3) of "
            "uint8, red, green and blue"
        )
    return Image.fromarray(pixels)


class _Refusing(PhotoErrors):
    """Ends a call at the first photo that cannot be read."""

    def skip(self, path: str, error: UserError, what: str = "image") -> None:
        raise UserError(f"{path}: cannot read the {what}: {error}") from error
