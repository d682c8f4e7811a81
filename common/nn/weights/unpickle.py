"""Reads torch checkpoints without torch and without executing what a pickle asks for.

Understands the zip files that `torch.save` has written since torch 1.6 and the pickle streams of
before. Only the handful of globals that a state dict needs can be named, and each is a function or
a placeholder of this module: tensors and NumPy arrays are made here, from a fixed table of types
and from bytes that are there. Anything else is refused with an error that names it.
"""

import dataclasses
import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from common.io.archive import Archive
from common.io.errors import UserError
from common.nn.weights.pickle_machine import run_pickle, set_items

_STORAGE_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_ARRAY_DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_torch_checkpoint(path: str | Path, data: bytes | None = None) -> Any:
    """Returns what was saved: nested containers with NumPy arrays in place of tensors.

    Args:
      path: of the file; named in errors.
      data: its content where it does not lie in a file of its own.

    Raises:
      UserError: the file is no torch checkpoint, is truncated, or names a forbidden global.
    """
    stream = io.BytesIO(Path(path).read_bytes() if data is None else data)
    try:
        read = _read_zip if zipfile.is_zipfile(stream) else _read_legacy
        stream.seek(0)
        return read(stream)
    except UserError as error:
        raise UserError(f"{path}: {_one_line(error)}") from error
    except Exception as error:  # A broken pickle can raise nearly anything.
        raise UserError(
            f"{path}: found no readable torch checkpoint ({type(error).__name__}: "
            f"{_one_line(error)}), expected a file written by torch.save"
        ) from error


def read_pickle(path: str | Path) -> Any:
    """Returns nested containers and NumPy arrays of a plain pickle, such as detectron2's `.pkl`.

    Raises:
      UserError: the file is none, is truncated, or names a forbidden global.
    """

    def no_storage(*_):
        raise UserError("found a tensor of torch, expected NumPy arrays")

    try:
        with open(path, "rb") as file:
            return _resolve(_load(file, no_storage), {})
    except UserError as error:
        raise UserError(f"{path}: {_one_line(error)}") from error
    except Exception as error:  # A broken pickle can raise nearly anything.
        raise UserError(
            f"{path}: found no readable pickle ({type(error).__name__}: {_one_line(error)})"
        ) from error


def _one_line(error: Exception) -> str:
    """The text of an error, in which names of the file may stand."""
    return " ".join(str(error).split())[:300]


@dataclasses.dataclass
class _Storage:
    """Flat memory shared by tensors; `values` arrives after the pickle in legacy files."""

    dtype: np.dtype
    size: int
    values: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Strided view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def to_numpy(self) -> np.ndarray:
        values = self.storage.values
        assert values is not None, "storages are filled before tensors are resolved"
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, self.storage.dtype)
        if min((self.offset, *self.shape, *self.strides)) < 0 or (
            self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
            >= len(values)
        ):
            raise UserError(
                f"found a tensor of shape {self.shape} outside its storage of {len(values)} values"
            )
        if math.prod(self.shape) > len(values):
            raise UserError(
                f"found a tensor of shape {self.shape} that repeats a storage of {len(values)} "
                "values, expected at most as many"
            )
        strides = [s * values.itemsize for s in self.strides]
        return np.lib.stride_tricks.as_strided(
            values[self.offset :], self.shape, strides, writeable=False
        )


@dataclasses.dataclass
class _Array:
    """NumPy's array of a pickle; `values` arrives with its state."""

    values: np.ndarray | None = None

    def to_numpy(self) -> np.ndarray:
        if self.values is None:
            raise UserError("found a NumPy array without content")
        return self.values


def _rebuild_tensor(storage, offset, shape, strides, *unused_grad_hooks_metadata) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise UserError("found a tensor without a storage")
    return _Tensor(storage, _integer(offset), _integers(shape), _integers(strides))


def _rebuild_parameter(tensor, *unused_grad_hooks) -> _Tensor:
    return tensor


def _ordered_dict(pairs=()) -> dict[Any, Any]:
    """A dictionary keeps its order; pickles of Python 2 give the items at once."""
    result: dict[Any, Any] = {}
    for pair in pairs:
        set_items(result, list(pair))
    return result


def _encode_latin1(text, encoding) -> bytes:
    """How pickles of protocol 2 carry the bytes of NumPy arrays."""
    if encoding != "latin1" or not isinstance(text, str):
        raise UserError("found _codecs.encode of another kind than text to 'latin1'")
    return text.encode("latin1")


def _array_dtype(code, *unused_align_copy) -> np.dtype:
    if code not in _ARRAY_DTYPES:
        raise UserError(f"refused the NumPy type {code!r:.40}, expected numbers")
    return np.dtype(f"<{code}")


def _scalar(dtype, data) -> Any:
    return _values(dtype, data, ())[()]


def _reconstruct(kind, shape, code) -> _Array:
    if kind is not _ARRAY_TYPE:
        raise UserError("refused a subclass of NumPy's array")
    return _Array()


def _build(target: Any, state: Any) -> None:
    """Takes the state that a pickle sets on NumPy's types and arrays.

    Raises:
      UserError: anything but little-endian numbers, with all their bytes, in an array.
    """
    if isinstance(target, np.dtype):
        # Version, byte order, and nothing of what makes a type a compound one or one of objects.
        if state[:2] not in ((3, "<"), (3, "|")) or state[2:] != (None, None, None, -1, -1, 0):
            raise UserError("refused the state of a NumPy type, expected little-endian numbers")
        return
    if not isinstance(target, _Array) or not isinstance(state, tuple) or len(state) != 5:
        raise UserError(f"refused to set the state of {type(target).__name__}")
    _, shape, dtype, is_fortran, data = state
    shape = _integers(shape)
    target.values = _values(dtype, data, shape[::-1] if is_fortran is True else shape)
    if is_fortran is True:
        target.values = target.values.T


def _values(dtype: Any, data: Any, shape: tuple[int, ...]) -> np.ndarray:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes):
        raise UserError("found NumPy values without a type or without bytes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise UserError(f"found {len(data)} bytes, expected an array of shape {shape}, {dtype}")
    return np.frombuffer(data, dtype).reshape(shape)


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list):
        raise UserError(f"found {type(values).__name__}, expected a shape")
    return tuple(map(_integer, values))


def _integer(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise UserError(f"found {value!r:.40}, expected a size")
    return value


_ARRAY_TYPE = object()
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "ndarray"): _ARRAY_TYPE,
    ("numpy", "dtype"): _array_dtype,
    **{
        (f"numpy.{core}.multiarray", name): function
        for core in ("core", "_core")
        for name, function in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    },
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
}


def _load(stream: BinaryIO, load_storage: Callable[..., _Storage]) -> Any:
    def load_persistent(pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
            raise UserError("found a persistent object of another kind than a tensor storage")
        _, storage_type, key, _, size, *rest = pid
        if not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise UserError("found a storage without type or name")
        return load_storage(storage_type.dtype, key, _integer(size), *rest)

    return run_pickle(stream, _NAMES, load_persistent, _build)


def _read_zip(stream: BinaryIO) -> Any:
    archive = Archive(stream)
    pickles = [name for name in archive.names if f"/{name}".endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"found {len(pickles)} data.pkl in the zip file, expected one")
    root = pickles[0].removesuffix("data.pkl")
    order = archive.read(root + "byteorder") if root + "byteorder" in archive.names else b"little"
    if order != b"little":
        raise UserError(f"found byte order {order[:20]!r}, expected b'little'")
    storages: dict[str, _Storage] = {}

    def load_storage(dtype, key, size):
        if key not in storages:
            name = f"{root}data/{key}"
            _check_size(key, size, archive.size(name) // dtype.itemsize)
            storages[key] = _Storage(dtype, size, np.frombuffer(archive.read(name), dtype))
        return storages[key]

    return _resolve(_load(io.BytesIO(archive.read(pickles[0])), load_storage), {})


def _read_legacy(stream: BinaryIO) -> Any:
    storages: dict[Any, _Storage] = {}

    def load_storage(dtype, key, size, view=None):
        if view is not None:
            raise UserError("found a storage that views another one, expected whole storages")
        return storages.setdefault(key, _Storage(dtype, size))

    def load():
        return _load(stream, load_storage)

    if load() != _LEGACY_MAGIC:
        raise UserError("found no torch signature, expected a file written by torch.save")
    if (protocol := load()) != _LEGACY_PROTOCOL:
        raise UserError(f"found torch file protocol {protocol}, expected {_LEGACY_PROTOCOL}")
    if not load().get("little_endian", True):
        raise UserError("found big-endian data, expected little-endian")
    saved = load()
    for key in load():  # storages follow in the order of this list: count, then values
        storage = storages[key]
        (size,) = struct.unpack("<q", stream.read(8))
        _check_size(key, storage.size, size)
        values = stream.read(size * storage.dtype.itemsize)
        _check_size(key, size, len(values) // storage.dtype.itemsize)
        storage.values = np.frombuffer(values, storage.dtype)
    return _resolve(saved, {})


def _check_size(key, expected: int, found: int) -> None:
    if found != expected:
        raise UserError(f"truncated: storage {key} has {found} values, expected {expected}")


def _resolve(saved: Any, done: dict[int, Any]) -> Any:
    """Replaces tensors by arrays in nested containers; `done` has the containers met before."""
    if isinstance(saved, _Tensor | _Array):
        return saved.to_numpy()
    if id(saved) in done:
        return done[id(saved)]
    if isinstance(saved, dict):
        result: Any = done.setdefault(id(saved), {})
        result |= {key: _resolve(value, done) for key, value in saved.items()}
        return result
    if isinstance(saved, list | tuple):
        result = done.setdefault(id(saved), [])
        result += [_resolve(value, done) for value in saved]
        return result
    return saved
