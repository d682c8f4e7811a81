"""Which photos and classes a YOLO folder has: data.yaml, or the files of Label Studio and CVAT."""

import os
from pathlib import Path
from typing import Any

import yaml

from common.convert.photos import walk
from common.data.class_list import class_name
from common.data.photo_names import normal, split_extension
from common.io.errors import UserError
from common.io.paths import check_regular

_SPLITS = ("train", "val", "valid", "validation", "test")


def _find_config(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise UserError(f"--source={source}: no such file or folder")
    found = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    named = [path for path in found if path.stem in ("data", "dataset")] or found
    others = [source / name for name in ("classes.txt", "obj.data")]
    named = named or [path for path in others if path.is_file()]
    if len(named) != 1:
        raise UserError(
            f"--source={source}: found {len(named)} files that name classes and splits, expected "
            "one data.yaml (train, val, names), classes.txt or obj.data"
        )
    return named[0]


def read_config(source: Path) -> tuple[Path, dict[str, Any]]:
    """The file that names classes and splits, and what it says, in the fields of data.yaml.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    path = _find_config(source)
    if path.name == "classes.txt":
        return path, {"train": "images", "names": _lines(path)}
    if path.name == "obj.data":
        pairs = dict(line.partition("=")[::2] for line in _lines(path))
        fields = {name.strip(): text.strip() for name, text in pairs.items()}
        names = path.parent / os.path.basename(normal(fields.pop("names", "obj.names")))
        return path, {"train": "", **fields, "val": fields.get("valid"), "names": _lines(names)}
    return path, _read_yaml(path)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text_file(path).splitlines() if line.strip()]


def _read_yaml(path: Path) -> dict[str, Any]:
    check_regular(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    # ValueError: not UTF-8, impossible dates; RecursionError: lists in lists by the thousand.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no valid YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected fields train, val and names")
    return content


def class_names(path: Path, content: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Numbers and names of the classes, by number."""
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    names = names if isinstance(names, dict) else {}
    good = (
        bool(names)
        and all(type(number) is int and 0 <= number < 1 << 31 for number in names)
        and all(isinstance(name, str | int | float) for name in names.values())
        and all(class_name(str(name)) for name in names.values())
    )
    if not good:
        raise UserError(f"{path}: field names: expected a list of class names or number: name")
    count = content.get("nc")
    if type(count) is int and count != len(names):
        raise UserError(f"{path}: field nc: found {count}, and {len(names)} names; which is right?")
    numbers = sorted(names)
    return numbers, [class_name(str(names[number])) for number in numbers]


def split_photos(config: Path, content: dict[str, Any]) -> dict[str, list[Path]]:
    """Absolute paths of the photos of each split."""
    base = config.parent.absolute()
    root = content.get("path") or ""
    bases = [base / root, base] if isinstance(root, str) else [base]
    photos: dict[str, list[Path]] = {}
    for split in _SPLITS:
        places = content.get(split)
        if not places:
            continue
        places = places if isinstance(places, list) else [places]
        if not all(isinstance(place, str) and "\0" not in place for place in places):
            raise UserError(f"{config}: field {split}: expected a path or a list of paths")
        found = [path for place in places for path in _photos_at(config, split, place, bases)]
        if found:
            photos[split] = list(dict.fromkeys(found))
    if not photos:
        raise UserError(
            f"{config}: no photo where {', '.join(_SPLITS)} point (of path {root!r} and {base})"
        )
    return photos


def _photos_at(config: Path, split: str, place: str, bases: list[Path]) -> list[Path]:
    place = normal(place)
    # Exports of Roboflow write ../train/images for what lies beside the file.
    # And those of CVAT data/train.txt, with lines data/obj_train_data/1.jpg.
    texts = (place, place.removeprefix("../"), place.removeprefix("data/"))
    for path in [base / text for text in texts for base in bases]:
        path = Path(os.path.normpath(path))
        if path.is_dir():
            return [path / name for name in walk(path) if split_extension(name)[1]]
        if path.is_file() and path.suffix == ".txt":
            listed = [_listed(path.parent, normal(line)) for line in _lines(path)]
            missing = [photo for photo in listed if not photo.is_file()]
            if missing:
                raise UserError(f"{path}: no photo {missing[0]} ({len(missing)} of {len(listed)})")
            return listed
    print(f"{config}: {split}: {place} is not there, it is left out", flush=True)
    return []


def _listed(folder: Path, line: str) -> Path:
    paths = [Path(os.path.normpath(folder / text)) for text in (line, line.removeprefix("data/"))]
    return next((path for path in paths if path.is_file()), paths[0])


def read_text_file(path: Path) -> str:
    """Text of a small file.

    Raises:
      UserError: it cannot be read, or is not UTF-8.
    """
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
