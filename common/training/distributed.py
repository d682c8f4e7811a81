"""Processes, the device mesh, and the way between host memory and global arrays.

One 1-D mesh `data` over all devices: parameters are replicated, batches are split along their
first axis. The same code runs on one CPU, on one accelerator and on a pod slice of many hosts.

Shapes: B global batch, b = B / processes the rows of one process.
"""

import atexit
import signal
import socket
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from common.io.commands import one_line
from common.io.endings import on_error, say_error
from common.io.errors import UserError
from common.training import joining
from common.training.cluster import find_cluster
from common.training.team import Team

DATA_AXIS = "data"
_JOIN_SECONDS = 300
_LEAVE_SECONDS = 15  # after all have come to the end; who is not there then was killed
_BARRIER_SECONDS = 1800.0

_team: Team | None = None


def initialize() -> None:
    """Joins the other processes of the run. Call it first, before anything asks for devices.

    They are found by `common.training.cluster`; a process without others is the run alone. From
    then on an error of one process ends all of them (`common.training.team`). Further calls do
    nothing.

    Raises:
      UserError: the environment contradicts itself.
    """
    global _team
    if jax.distributed.is_initialized():
        return
    cluster = find_cluster()
    if cluster is None:
        return
    host = socket.gethostname()
    address, index = cluster.find_place()
    with joining.watched(address, index, cluster.count, host, _JOIN_SECONDS):
        # JAX's own timeout, the later one, aborts without saying who is absent.
        timeout = _JOIN_SECONDS + 30
        jax.distributed.initialize(
            **cluster.arguments,
            initialization_timeout=timeout,
            shutdown_timeout_seconds=_LEAVE_SECONDS,
        )
    # JAX takes SIGTERM for a notice; commands that look for it say so (`preemption.install`).
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    store = jax_distributed.global_state.client
    assert store is not None
    _team = Team(store, jax.process_index(), jax.process_count(), host)
    _team.start()
    on_error(_end_all)
    atexit.register(_team.finish)  # before JAX's own, which waits for `_LEAVE_SECONDS` only


def team() -> Team | None:
    """The processes of the run; None: this one is alone."""
    return _team


def slowest() -> str:
    """Who holds up the others, for the log line; "" where nobody does."""
    return _team.slowest() if _team is not None else ""


def _end_all(error: BaseException) -> None:
    """Ends all processes because of the error that ends this one."""
    assert _team is not None
    # Sums over CPUs that another process does not take part in end with a ValueError of Gloo.
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
        _team.wait_for_cause()
    try:
        if isinstance(error, UserError | OSError | RecursionError | MemoryError):
            say_error(one_line(error))
        else:
            traceback.print_exception(error)
    finally:  # whether or not it could be printed
        _team.fail(one_line(error))


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


def own_part(tree: Any, mesh: Mesh) -> tuple[Any, Mesh]:
    """A mesh of this process's devices, and the replicated arrays on it (`to_local`)."""
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    local_mesh = make_mesh(own)
    return (to_local(tree, local_mesh) if len(own) < mesh.size else tree), local_mesh


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


def same_everywhere(value: int) -> int:
    """What process 0 says (less than 2**31), in all processes."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def barrier(name: str, seconds: float = _BARRIER_SECONDS) -> None:
    """Waits until all processes are here. `name` must be the same in all of them.

    Raises:
      UserError: names the processes that are not here after `seconds`.
    """
    if _team is not None:
        _team.barrier(name, seconds)
