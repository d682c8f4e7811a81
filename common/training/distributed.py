"""Processes, the device mesh, and the way between host memory and global arrays.

One 1-D mesh `data` over all devices: parameters are replicated, batches are split along their
first axis. The same code runs on one CPU, on one accelerator and on a pod slice of many hosts.

Shapes: B global batch, b = B / processes the rows of one process.
"""

import glob
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from common.io.errors import UserError

DATA_AXIS = "data"
LOST_SECONDS = 30  # without a sign of life until a process is taken for lost, and the run ends
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
    """Joins the other processes of the run. Call it first, before anything asks for devices.

    With `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` set, these say who takes part. On Cloud TPU, JAX finds the hosts of the slice
    by itself. Otherwise the run is this process alone. Further calls do nothing.

    Raises:
      UserError: some of the three variables are set but not all, or one is not a valid number.
    """
    if jax.distributed.is_initialized():
        return
    values = {name: os.environ.get(name, "") for name in _VARIABLES}
    if not any(values.values()):
        if _on_cloud_tpu():
            jax.distributed.initialize(
                heartbeat_timeout_seconds=LOST_SECONDS, shutdown_timeout_seconds=LOST_SECONDS
            )
        return
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise UserError(
            f"environment: {', '.join(missing)} not set, expected all or none of "
            f"{', '.join(_VARIABLES)}"
        )
    address, count, index = values.values()
    if ":" not in address:
        raise UserError(f"JAX_COORDINATOR_ADDRESS: found {address!r}, expected host:port")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise UserError(
            f"JAX_PROCESS_ID: found {index!r} of JAX_NUM_PROCESSES={count!r}, expected whole "
            "numbers with 0 <= id < number"
        )
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=int(count),
        process_id=int(index),
        heartbeat_timeout_seconds=LOST_SECONDS,
        shutdown_timeout_seconds=LOST_SECONDS,
    )


def _on_cloud_tpu() -> bool:
    """Whether this is a host of a TPU slice, found without starting a backend."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    if importlib.util.find_spec("libtpu") is None:
        return False
    if "TPU_SKIP_MDS_QUERY" in os.environ and "TPU_WORKER_HOSTNAMES" not in os.environ:
        return False  # one host that was told not to look for others
    return bool(glob.glob("/dev/accel[0-9]*")) or (
        bool(glob.glob("/dev/vfio/[0-9]*")) and "TPU_ACCELERATOR_TYPE" in os.environ
    )


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A 1-D mesh over `devices` (default: all of the run), grouped by process.

    The order makes the rows of a process contiguous, so that row i of the global batch is slot i
    of the plan on any number of hosts. (`jax.make_mesh` may follow the torus instead; for one
    all-reduce over all devices the order does not matter.)
    """
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Equal parts of the first axis on the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def to_global(
    host_batch: Mapping[str, np.ndarray], mesh: Mesh, fields: Iterable[str] | None = None
) -> dict[str, jax.Array]:
    """Makes one global array (B, ...) of the rows (b, ...) that each process holds.

    Process p contributes rows [p b, (p + 1) b). No data crosses between processes.

    Args:
      host_batch: of this process.
      mesh: all devices.
      fields: of the batch that are wanted; None: all.

    Raises:
      UserError: b is not a multiple of this process's devices.
    """
    sharding = batch_sharded(mesh)
    num_local = len(mesh.local_devices)
    chosen = {name: host_batch[name] for name in (host_batch if fields is None else fields)}
    for name, rows in chosen.items():
        if rows.shape[0] % num_local:
            raise UserError(
                f"batch: {name} has {rows.shape[0]} rows for the {num_local} devices of this "
                "process, expected a multiple (choose batch_size as a multiple of the devices)"
            )
    make = jax.make_array_from_process_local_data
    return {name: make(sharding, rows) for name, rows in chosen.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts host values, the same in every process, on all devices."""
    sharding = replicated(mesh)

    def put(value):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda _: value)

    return jax.tree.map(put, tree)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Shapes of the same tree replicated on the mesh: what a checkpoint is restored onto."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def to_local(tree: Any, mesh: Mesh) -> Any:
    """Replicated arrays of the whole run on a mesh of this process's devices, without a copy.

    What is computed from them concerns this process alone: the others need not take part.
    """
    sharding = replicated(mesh)

    def on_own_devices(array: jax.Array) -> jax.Array:
        shards = {shard.device: shard.data for shard in array.addressable_shards}
        parts = [shards[device] for device in mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)

    return jax.tree.map(on_own_devices, tree)


def to_host(tree: Any) -> Any:
    """Fetches global arrays as NumPy: replicated ones whole, split ones this process's rows."""

    def local_rows(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable:
            return np.asarray(array)
        if array.is_fully_replicated:
            return np.asarray(array.addressable_data(0))
        shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
        return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])

    # Starts all transfers before waiting for the first.
    for array in jax.tree.leaves(tree):
        array.copy_to_host_async()
    return jax.tree.map(local_rows, tree)


def sum_over_devices(tree: Any) -> Any:
    """Sum of each array over the mesh; call it inside `jax.shard_map`.

    On TPU and GPU this is one all-reduce. On CPU the parts are gathered and added in device order:
    between processes the all-reduce adds in another order than within one, and two hosts would
    not compute the bits of one.
    """

    def in_device_order(arrays):
        return [jax.lax.all_gather(x, DATA_AXIS).sum(axis=0) for x in arrays]

    leaves, structure = jax.tree.flatten(tree)
    summed = jax.lax.platform_dependent(
        leaves, cpu=in_device_order, default=lambda arrays: jax.lax.psum(arrays, DATA_AXIS)
    )
    return jax.tree.unflatten(structure, summed)


def is_main_process() -> bool:
    """Whether this process writes what the run writes once (logs, config, tables)."""
    return jax.process_index() == 0


def same_everywhere(flag: bool) -> bool:
    """What process 0 says, in all processes."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def barrier(name: str) -> None:
    """Waits until all processes are here. `name` must be the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
