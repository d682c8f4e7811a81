"""~ in flags and configs: a shell replaces it only at the beginning of a word, not in --a=~/x."""

import os
import re
from typing import Any

from absl import flags

_HOME = re.compile(r"(?<![^,=])~(?=/)")


def expand_home_in_flags() -> None:
    """Puts the home folder for ~/ in all flags and fields of configs."""
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if hasattr(value, "copy_and_resolve_references"):  # a ConfigDict
            _expand_fields(value)
        elif (expanded := expand_home(value)) != value:
            flags.FLAGS[name].value = expanded


def expand_home(value: Any) -> Any:
    """A text, or texts in a list, with the home folder for ~/; other values as they are.

    It may begin the text, or a part of it behind a comma or an equals sign: a=~/a.parquet,b=~/b.
    """
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    if not isinstance(value, str) or "~/" not in value:
        return value
    return _HOME.sub(lambda _: os.path.expanduser("~"), value)


def _expand_fields(config: Any) -> None:
    for name, value in config.items():
        if hasattr(value, "items"):
            _expand_fields(value)
        elif (expanded := expand_home(value)) != value:
            config[name] = expanded
