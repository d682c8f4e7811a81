"""Typed, frozen settings out of a config, whose fields are read and checked once, at the start.

    @dataclasses.dataclass(frozen=True)
    class CheckpointSettings:
        every_steps: int
        keep_last: int

        def __post_init__(self):
            check(self.keep_last >= 1, "keep_last", self.keep_last, "at least 1")

    settings = read_settings(CheckpointSettings, config.checkpoint, "config.checkpoint")

The annotations say what a field may hold: int, float, bool, str, another settings class, a tuple of
these (`tuple[float, ...]`, `tuple[int, int]`), `Literal[...]`, a union, or `Any`. A whole number is
taken where a float is wanted, infinite numbers and NaN, which JSON does not have, are not; lists
become tuples, so that settings are hashable.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict, FrozenConfigDict

from common.io.errors import UserError

Settings = TypeVar("Settings")


class FieldError(UserError):
    """A value that a field cannot have; `read_settings` puts the path of the config before it."""


def check(holds: bool, field: str, found: Any, expected: str) -> None:
    """Called by `__post_init__` of settings.

    Raises:
      FieldError: `holds` is false.
    """
    if not holds:
        raise FieldError(f"{field}: found {found!r}, expected {expected}")


def read_settings(cls: type[Settings], config: Any, path: str = "config") -> Settings:
    """Makes the frozen dataclass `cls` of a config.

    Args:
      cls: frozen dataclass; a field with a default may be absent from the config.
      config: ConfigDict or mapping with the fields of `cls`.
      path: of `config`, for errors.

    Raises:
      UserError: a field that is missing, unknown, of the wrong type or out of range, by its name.
    """
    if not isinstance(config, ConfigDict | FrozenConfigDict | Mapping):
        raise UserError(f"{path}: found {config!r}, expected fields ({_names(cls)})")
    wanted = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(config) - set(wanted))
    if unknown:
        close = difflib.get_close_matches(unknown[0], wanted, 1)
        hint = f"; did you mean {close[0]}?" if close else f", expected {_names(cls)}"
        raise UserError(f"{path}.{unknown[0]}: no such field{hint}")
    types_of = typing.get_type_hints(cls)
    values = {}
    for name, field in wanted.items():
        if name in config:
            values[name] = _read(types_of[name], config[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{path}.{name}: missing")
    try:
        return cls(**values)
    except FieldError as error:
        raise UserError(f"{path}.{error}") from error


def _names(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _read(wanted: Any, value: Any, path: str) -> Any:
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in options:
            if dataclasses.is_dataclass(option) and isinstance(value, ConfigDict | Mapping):
                return _read(option, value, path)
            try:
                return _read(option, value, path)
            except UserError:
                continue
    elif origin is typing.Literal:
        if value in options:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            if options[-1:] == (Ellipsis,):
                options = options[:1] * len(value)
            if len(value) == len(options):
                pairs = enumerate(zip(options, value, strict=True))
                return tuple(_read(option, item, f"{path}[{i}]") for i, (option, item) in pairs)
    elif isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
        return read_settings(wanted, value, path)
    elif wanted is type(None):
        if value is None:
            return value
    elif wanted is float:
        finite = isinstance(value, int | float) and math.isfinite(value)  # as JSON has numbers
        if finite and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool):
        return value
    raise UserError(f"{path}: found {value!r}, expected {_describe(wanted)}")


def _describe(wanted: Any) -> str:
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, options))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in options)
    if origin is tuple:
        return str(wanted).removeprefix("typing.")
    if wanted is type(None):
        return "None"
    return {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}.get(
        wanted, wanted.__name__
    )
