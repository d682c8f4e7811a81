"""Compiled programs in a file: made on any machine, loaded on the devices that they were made for.

The file is a zip of

    program.json    versions of the compiler, devices, shapes of the arguments, and what is known
    program.bin     the executable
    program.txt     its HLO text, where jaxlib can read it

The executable is a pickle, which may run code: load only what you made.
"""

import importlib.metadata
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable

from common.io.archive import Archive
from common.io.atomic import atomic_file
from common.io.errors import UserError
from common.io.json_file import parse_json
from common.io.paths import PathLike, local_copy
from common.training.pod.topologies import hlo_text

_COMPILERS = ("jax", "jaxlib", "libtpu")
_FIELDS = {"versions", "devices", "arguments", "results", "about"}  # of program.json


class SavedProgram(NamedTuple):
    """A program that is ready to run.

    Attributes:
      call: takes the leaves of the arguments, arrays on the devices, and returns those of the
        results.
      arguments: shapes of the leaves with their shardings.
      names: of the leaves.
      about: what `save_program` was told.
    """

    call: Callable[..., Sequence[jax.Array]]
    arguments: list[jax.ShapeDtypeStruct]
    names: list[str]
    about: dict[str, Any]


def save_program(
    path: PathLike, compiled: jax.stages.Compiled, devices: Sequence[jax.Device], about: Any
) -> None:
    """Writes a compiled program.

    Args:
      path: of the file, local or gs://.
      compiled: takes positional arguments only.
      devices: that it was compiled for, in the order of its mesh.
      about: values that JSON can hold.

    Raises:
      UserError: the file cannot be written, or the program depends on this process.
    """
    try:
        executable, _, _ = serialize_executable.serialize(compiled)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"{path}: this program cannot be saved ({error})") from error
    named = jax.tree_util.tree_leaves_with_path(compiled.args_info[0])
    record = {
        "versions": _versions(devices[0].platform),
        "devices": _described(devices),
        "arguments": [jax.tree_util.keystr(where) for where, _ in named],
        "results": len(jax.tree.leaves(compiled.output_shardings)),
        "about": about,
    }
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr("program.json", json.dumps(record, indent=1))
        archive.writestr("program.bin", executable)
        if (text := hlo_text(compiled)) is not None:
            archive.writestr("program.txt", text, zipfile.ZIP_DEFLATED)


def load_program(path: PathLike, devices: Sequence[jax.Device]) -> SavedProgram:
    """Reads a program; the processes of a run do so together.

    Args:
      path: written by `save_program`.
      devices: of the run, in the order of its mesh.

    Raises:
      UserError: no such file, or one of other versions or devices.
    """
    with local_copy(path) as local, local.open("rb") as file:
        try:
            archive = Archive(file)
            record = parse_json(archive.read("program.json"), "program.json")
            executable = archive.read("program.bin")
            if not isinstance(record, dict) or not record.keys() >= _FIELDS:
                raise UserError("program.json is another one")
        except UserError as error:
            raise UserError(f"{path}: {error}, expected a program of plan_pod --save") from error
    _check(path, record, devices)
    # The results' own tree is one of classes, which the file does not hold.
    leaves = jax.tree.structure((tuple(record["arguments"]), {}))
    results = jax.tree.structure((0,) * record["results"])
    try:
        call = serialize_executable.deserialize_and_load(
            executable, leaves, results, devices[0].client, list(devices)
        )
    except (jax.errors.JaxRuntimeError, pickle.UnpicklingError, KeyError) as error:
        raise UserError(f"{path}: the devices refuse the program ({error})") from error
    shapes, shardings = call.args_info[0], call.input_shardings[0]
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x, sharding in zip(shapes, shardings, strict=True)
    ]
    return SavedProgram(call, arguments, record["arguments"], record["about"])


def _check(path: PathLike, record: dict[str, Any], devices: Sequence[jax.Device]) -> None:
    expected, found = record["devices"], _described(devices)
    if expected != found:
        a, b = (f"{d['count']} x {d['kind']}" for d in (expected, found))
        raise UserError(f"{path}: made for {a}, found {b if a != b else 'another arrangement'}")
    versions = _versions(devices[0].platform)
    for name, version in record["versions"].items():
        if versions[name] != version:
            raise UserError(
                f"{path}: made by {name} {version}, found {versions[name]}: install the one, or "
                "compile again with the other"
            )


def _versions(platform: str) -> dict[str, str]:
    found = {}
    for name in _COMPILERS if platform == "tpu" else _COMPILERS[:2]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _described(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """What must be the same where the program runs."""

    def position(device: jax.Device) -> list[int]:
        if not hasattr(device, "coords"):
            return [device.id]
        return [*device.coords, device.core_on_chip, getattr(device, "slice_index", 0)]

    positions = [position(device) for device in devices]
    return {"kind": devices[0].device_kind, "count": len(devices), "positions": positions}
