"""What the user asks of a conversion, whatever the format of the source."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of scripts.prepare_data that all formats have.

    Attributes:
      output: dataset directory to write.
      images: folder of the photos or an address such as gs://bucket/folder; None = look for them
        where the annotations are.
      image_pattern: path below `images` with {id} in it, taken without looking ('' = look).
      match_photos: 'path' = a photo in another folder than stored is another photo; 'name' = photos
        are known by their names alone.
      splits: JSON file {"name": [ids]} that adds or replaces splits.
      read_sizes: read photo sizes from headers; None = for up to 200,000 photos.
      check_photos: decode every photo once.
      overwrite: replace an existing dataset.
      split: 'random', 'stratified' or 'grouped' divides the images of `pool` anew ('' = do not).
      shares: split name -> share of the images.
      seed: of the division.
      group: expression that finds the group in a photo's path, '' = its folder ('grouped').
      pool: splits to divide, () = all; others stay as they are.
      ignore: files in COCO form whose boxes on the same photos become ignore boxes.
    """

    output: Path
    images: str | None = None
    image_pattern: str = ""
    match_photos: str = "path"
    splits: Path | None = None
    read_sizes: bool | None = None
    check_photos: bool = False
    overwrite: bool = False
    split: str = ""
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    group: str = ""
    pool: Sequence[str] = ()
    ignore: Sequence[str] = ()
