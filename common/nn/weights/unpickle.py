"""Reads torch checkpoints without torch and without executing what a pickle asks for.

Understands the zip files that `torch.save` has written since torch 1.6 and the pickle streams of
before. Only the handful of globals that a state dict needs can be named; anything else is refused
with an error that names it.
"""

import collections
import dataclasses
import importlib
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common.io.errors import UserError

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
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # A broken pickle can raise nearly anything.
        raise UserError(
            f"{path}: found no readable torch checkpoint ({type(error).__name__}: {error}), "
            "expected a file written by torch.save"
        ) from error


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
        strides = [s * values.itemsize for s in self.strides]
        view = np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides)
        return view.copy()


def _rebuild_tensor(storage, offset, shape, strides, *unused_grad_hooks_metadata) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise UserError("found a tensor without a storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor, *unused_grad_hooks) -> _Tensor:
    return tensor


def _allowed_globals() -> dict[tuple[str, str], Any]:
    multiarray = importlib.import_module("numpy._core.multiarray")  # private: no types
    reconstruct, scalar = (getattr(multiarray, name) for name in ("_reconstruct", "scalar"))
    allowed = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("_codecs", "encode"): _encode_latin1,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed[module, "_reconstruct"] = reconstruct
        allowed[module, "scalar"] = scalar
    for name, dtype in _STORAGE_DTYPES.items():
        allowed["torch", name] = _StorageType(dtype)
    return allowed


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 carry the bytes of NumPy arrays."""
    if encoding != "latin1":
        raise UserError(f"found _codecs.encode to {encoding!r}, expected 'latin1'")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream, load_storage: Callable[..., _Storage]):
        super().__init__(stream, encoding="utf-8")
        self._load_storage = load_storage
        self._allowed = _allowed_globals()

    def find_class(self, module, name):
        if (module, name) not in self._allowed:
            raise UserError(
                f"refused the global {module}.{name}, expected a plain state dict of tensors "
                "(re-save the weights alone, e.g. torch.save(model.state_dict(), ...))"
            )
        return self._allowed[module, name]

    def persistent_load(self, pid):
        kind, storage_type, key, _, size, *rest = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise UserError(f"found a persistent object {pid!r:.80}, expected a tensor storage")
        return self._load_storage(storage_type.dtype, str(key), int(size), *rest)


def _read_zip(stream) -> Any:
    with zipfile.ZipFile(stream) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"found {len(pickles)} data.pkl in the zip file, expected one")
        root = pickles[0].removesuffix("data.pkl")
        order = archive.read(root + "byteorder") if root + "byteorder" in names else b"little"
        if order != b"little":
            raise UserError(f"found byte order {order!r}, expected b'little'")
        storages = {}

        def load_storage(dtype, key, size):
            if key not in storages:
                values = np.frombuffer(archive.read(f"{root}data/{key}"), dtype)
                _check_size(key, size, len(values))
                storages[key] = _Storage(dtype, size, values)
            return storages[key]

        saved = _Unpickler(io.BytesIO(archive.read(pickles[0])), load_storage).load()
        return _resolve(saved)


def _read_legacy(stream) -> Any:
    storages: dict[Any, _Storage] = {}

    def load_storage(dtype, key, size, view=None):
        if view is not None:
            raise UserError("found a storage that views another one, expected whole storages")
        return storages.setdefault(key, _Storage(dtype, size))

    def load():
        return _Unpickler(stream, load_storage).load()

    if load() != _LEGACY_MAGIC:
        raise UserError("found no torch signature, expected a file written by torch.save")
    if (protocol := load()) != _LEGACY_PROTOCOL:
        raise UserError(f"found torch file protocol {protocol}, expected {_LEGACY_PROTOCOL}")
    if not load().get("little_endian", True):
        raise UserError("found big-endian data, expected little-endian")
    saved = load()
    for key in load():  # storages follow in the order of this list: count, then values
        storage = storages[str(key)]
        (size,) = struct.unpack("<q", stream.read(8))
        _check_size(key, storage.size, size)
        values = stream.read(size * storage.dtype.itemsize)
        _check_size(key, size, len(values) // storage.dtype.itemsize)
        storage.values = np.frombuffer(values, storage.dtype)
    return _resolve(saved)


def _check_size(key, expected: int, found: int) -> None:
    if found != expected:
        raise UserError(f"truncated: storage {key} has {found} values, expected {expected}")


def _resolve(saved: Any) -> Any:
    """Replaces tensors by arrays in nested containers."""
    if isinstance(saved, _Tensor):
        return saved.to_numpy()
    if isinstance(saved, dict):
        return {key: _resolve(value) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return [_resolve(value) for value in saved]
    return saved
