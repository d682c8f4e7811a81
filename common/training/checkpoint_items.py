"""What is in a checkpoint on disk: states as nested dictionaries, and reading them with orbax.

On disk an item is a plain nested dictionary of arrays by path, so that it can be read without the
code that wrote it.
"""

import json
import logging
import traceback
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

MODEL_FIELDS = ("params", "batch_stats")
CHECKSUMS = "checksums"  # in the JSON beside the arrays


def path_name(path: tuple) -> str:
    """The path of a leaf as one string, `params/backbone/stem/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def to_nested_dict(tree: Any) -> dict[str, Any]:
    """Any pytree as nested dictionaries by path; parts without arrays vanish."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = path_name(path).split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf if hasattr(leaf, "shape") else np.asarray(leaf)
    return nested


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a nested dictionary by their `path_name`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def split_fields(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What evaluation needs of a state (params, batch_stats), and the rest."""
    model = {field: state[field] for field in MODEL_FIELDS if field in state}
    return model, {field: value for field, value in state.items() if field not in model}


def describe(leaf: Any) -> str:
    """Type and shape of an array for an error message; None is "nothing"."""
    if leaf is None:
        return "nothing"
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def checksums(items: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """CRC-32 of the bytes of arrays, by item and path: `model/params/backbone/stem/kernel`.

    An array of which this process holds only a part has none.
    """
    return {
        f"{item}/{name}": zlib.crc32(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)
        for item, tree in items.items()
        for name, leaf in flatten(tree).items()
        if (host := _whole(leaf)) is not None
    }


def text_checksum(extra: Mapping[str, Any]) -> int:
    """CRC-32 of what JSON keeps of `extra`."""
    return zlib.crc32(json.dumps(extra, sort_keys=True).encode())


def _whole(leaf: Any) -> np.ndarray | None:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(leaf.addressable_data(0)) if leaf.is_fully_replicated else None


def refuse_changed(saved: Mapping[str, int], items: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares arrays that were read with the checksums of what was saved.

    Raises:
      ValueError: naming the arrays that changed on disk.
    """
    found = checksums(items)
    changed = [name for name, value in found.items() if saved.get(name, value) != value]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ValueError(f"{changed[0]}{more}: not the values that were saved")


def _checkpointer(alone: bool = False) -> ocp.Checkpointer:
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            model=ocp.StandardCheckpointHandler(),
            training=ocp.StandardCheckpointHandler(),
            extra=ocp.JsonCheckpointHandler(),
        ),
        multiprocessing_options=options if alone else ocp.options.MultiprocessingOptions(),
    )


def saved_arrays(path: epath.Path, items: tuple[str, ...]) -> dict[str, Any]:
    """Shapes and dtypes of what a checkpoint holds, per item a nested dictionary."""
    with _checkpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
    trees = {item: dict(metadata.items()).get(item) for item in items}
    for item, tree in trees.items():
        if tree is None and (item == "model" or (path / item).exists()):
            raise ValueError(f"no metadata of {item}")
    return {
        item: {}
        if tree is None
        else jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(tree.tree))
        for item, tree in trees.items()
    }


def read_items(
    path: epath.Path, wanted: Mapping[str, Any], *, alone: bool = False
) -> dict[str, Any]:
    """Reads the arrays of nested dictionaries of abstract arrays, and `extra`.

    Args:
      path: of the checkpoint.
      wanted: abstract arrays by item and path.
      alone: no other process reads them now; otherwise all wait for one another.

    Raises:
      ValueError: an array is not what was saved; other errors of orbax for other damage.
    """

    def template(leaf):
        if getattr(leaf, "sharding", None) is None:
            return np.empty(leaf.shape, leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    arguments = {
        item: ocp.args.StandardRestore(jax.tree.map(template, tree))
        for item, tree in wanted.items()
        if tree
    }
    with _checkpointer(alone) as checkpointer:
        restored = checkpointer.restore(
            path, args=ocp.args.Composite(extra=ocp.args.JsonRestore(), **arguments)
        )
    read = {item: restored[item] if item in arguments else {} for item in wanted}
    extra = dict(restored["extra"])
    saved = dict(extra.pop(CHECKSUMS, {}))
    if saved.pop("extra", None) not in (None, text_checksum(extra)):
        raise ValueError("extra: not the values that were saved")
    refuse_changed(saved, read)
    return {**read, "extra": extra}


class _OrbaxTracebackFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or record.exc_info is True:
            return True
        frames = traceback.extract_tb(record.exc_info[2])
        return not any("orbax" in frame.filename for frame in frames)


def silence_orbax_tracebacks() -> None:
    """Orbax logs each failure with its traceback and raises it too; the second one is ours."""
    logger = logging.getLogger("absl")
    if not any(isinstance(f, _OrbaxTracebackFilter) for f in logger.filters):
        logger.addFilter(_OrbaxTracebackFilter())
