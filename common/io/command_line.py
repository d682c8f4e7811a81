"""The command line of a command: its flags, its config, and what is said when they are wrong.

Everything that a user can type wrong becomes one line: an unknown flag or field, a config file that
is not there or does not run, a value of the wrong type.
"""

import difflib
import importlib.util
import inspect
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from common.io.errors import UserError
from common.io.home import expand_home

_HELP = re.compile(r"--?(h|help|helpshort)$")
_OVERRIDE = re.compile(r"--(?:no)?config\.([^=]+)(?:=.*)?$", re.DOTALL)
_ROOT = Path(__file__).parents[2]
# Reads the config of the work directory that is its argument.
_CONFIG_OF_WORKDIR = _ROOT / "configs" / "of_workdir.py"
_WIDTH = 100


def parse_flags(argv: Sequence[str], *, may_wait: bool = True) -> list[str]:
    """Parses a command line into `flags.FLAGS`; returns the arguments that are no flags.

    A command with an optional --config that is not given takes the one that lies in --workdir; with
    --watch it waits for a training to put it there. Of a config field that is given twice, the
    last value counts.

    Args:
      argv: the command and its arguments.
      may_wait: False: what a config that is still to come has for fields is not looked at.

    Raises:
      UserError: whatever is wrong with it, in one line.
    """
    arguments = _last_overrides(list(argv))
    path = _config_of_workdir(arguments)
    found = path and _exists(path)
    if path and not found and "watch" in flags.FLAGS:
        rest = _parsed([text for text in arguments if not _OVERRIDE.match(text)])
        if flags.FLAGS.watch:
            if not may_wait:
                return rest
            _wait_for_training(path)
            found = True
        flags.FLAGS.unparse_flags()
    if found:
        workdir = path.removesuffix("/config.json")
        arguments.insert(1, f"--config={_CONFIG_OF_WORKDIR}:{workdir}")
    config = _value_of("config", arguments)
    overrides = [match[1] for match in map(_OVERRIDE.match, arguments) if match]
    if "config" in flags.FLAGS and config:
        _check_fields(load_config(config), overrides, config)
    elif "config" in flags.FLAGS and overrides:
        raise UserError(f"--config: missing, the file whose field {overrides[0]} is to be changed")
    return _parsed(arguments)


def _parsed(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown(error.flagname)) from error
    except flags.Error as error:
        raise UserError(_shortened(str(error))) from error


def asks_for_help(argv: Iterable[str]) -> bool:
    """Whether the flags of the command are asked for."""
    return any(_HELP.match(argument) for argument in argv)


def help_text(module: str, doc: str, names: Iterable[str]) -> str:
    """What a command does and all its flags.

    Args:
      module: as typed after `python -m`.
      doc: docstring of it.
      names: of its own flags.
    """
    lines = [inspect.cleandoc(doc), "", f"flags of python -m {module}:"]
    required = {name for group in _required_flags() for name in group}
    for name in sorted(names, key=lambda name: (name not in required, name)):
        flag = flags.FLAGS[name]
        default = "" if flag.default in (None, "", []) else f" (default: {flag.default_as_str})"
        default = " (required)" if name in required else default
        lines.append(f"  --[no]{name}" if flag.boolean else f"  --{name}")
        text = " ".join(f"{flag.help or ''}{default}".split())
        lines += textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if "config" in names:
        lines += ["  --config.FIELD=VALUE", "      Sets a field of the config, such as data.dir."]
    return "\n".join(lines)


def _config_of_workdir(arguments: Sequence[str]) -> str:
    """Where the config lies of a command line that names none; '' where that is not asked for."""
    if "config" not in flags.FLAGS or "workdir" not in flags.FLAGS:
        return ""
    required = any("config" in names for names in _required_flags())
    workdir = expand_home(_value_of("workdir", arguments))
    if required or not workdir or _value_of("config", arguments):
        return ""
    return f"{workdir}/config.json"


def _exists(path: str) -> bool:
    from common.io.paths import is_remote, to_epath  # not before a flag is known to need it

    return to_epath(path).exists() if is_remote(path) else os.path.exists(path)


def _wait_for_training(path: str) -> None:
    """Waits until a training has written its config, as the flags of --watch say.

    Raises:
      UserError: not within --timeout.
    """
    timeout, since = flags.FLAGS.timeout, time.monotonic()
    print(f"{path}: waiting for the training to begin", flush=True)
    while not _exists(path):
        if timeout and time.monotonic() - since > timeout:
            raise UserError(f"{path}: no such file within {timeout:g} s")
        time.sleep(flags.FLAGS.poll_seconds)


def _required_flags() -> Iterable[Sequence[str]]:
    """Names that absl's validators of required flags are about."""
    for name in flags.FLAGS:
        for validator in flags.FLAGS[name].validators:
            if validator.message.endswith("must have a value other than None."):
                yield validator.get_flags_names()


def _last_overrides(arguments: list[str]) -> list[str]:
    """Leaves of each overridden field its last value: tuples would be joined otherwise."""
    last: dict[str, int] = {}
    for place, argument in enumerate(arguments):
        if match := _OVERRIDE.match(argument):
            last[match[1]] = place
    kept = []
    for place, argument in enumerate(arguments):
        match = _OVERRIDE.match(argument)
        if not match or last[match[1]] == place:
            kept.append(argument)
    return kept


def _value_of(flag: str, arguments: Sequence[str]) -> str:
    """The last value of a flag on a command line that is not parsed yet, or ''."""
    value = ""
    for place, argument in enumerate(arguments):
        name, equals, rest = argument.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            value = rest if equals else "".join(arguments[place + 1 : place + 2])
    return value


def load_config(text: str) -> Any:
    """The config of FILE[:ARG].

    Raises:
      UserError: no such file, or it does not give a config.
    """
    path, _, argument = text.partition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        known = [str(p.relative_to(_ROOT)) for p in sorted(_ROOT.glob("configs/*/*.py"))]
        close = difflib.get_close_matches(path, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ", expected a Python file of configs/"
        raise UserError(f"--config={text}: {path} is {found}{hint}")
    where = str(file.parent.absolute())
    sys.path.insert(0, where)  # a config may import its neighbours
    try:
        spec = importlib.util.spec_from_file_location("config_to_check", file)
        if spec is None or spec.loader is None:
            raise UserError(f"--config={text}: expected a Python file (.py)")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={text}: {path} has no function get_config(arg)")
        return module.get_config(argument) if ":" in text else module.get_config()
    except UserError:
        raise
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}"
        raise UserError(f"--config={text}: no valid Python ({error.msg}; {place})") from error
    except Exception as error:  # whatever a user's file does
        what = f"argument {argument!r}" if argument else "get_config"
        raise UserError(
            f"--config={text}: {what} refused ({type(error).__name__}: {_shortened(str(error))})"
        ) from error
    finally:
        sys.path.remove(where)


def _check_fields(config: Any, overrides: Iterable[str], text: str) -> None:
    """Raises UserError for the first overridden field that the config does not have."""
    for field in overrides:
        node, path = config, "config"
        for name in re.sub(r"\[\d+\]", "", field).split("."):
            if not hasattr(node, "keys"):
                raise UserError(f"--config.{field}: {path} is a value, it has no fields")
            if name not in node:
                close = difflib.get_close_matches(name, list(node), 1)
                hint = f"; did you mean {close[0]}?" if close else f", {path} has {_some(node)}"
                raise UserError(f"--config.{field}: no such field in {text}{hint}")
            node, path = node[name], f"{path}.{name}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, list(flags.FLAGS), 1)
    hint = f"; did you mean --{close[0]}?" if close else ", --help shows those that there are"
    return f"--{name}: no such flag{hint}"


def _shortened(text: str) -> str:
    """A message of absl as ours: `flag --x=None: Flag --x must have ...` is `--x: missing`."""
    missing = re.match(r"flag --(\w+)=None: Flag --\w+ must have a value", text)
    if missing:
        return f"--{missing[1]}: missing"
    return " ".join(text.removeprefix("flag ").split())
