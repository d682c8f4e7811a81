"""Where the other processes of a run are: told by variables, or found as JAX finds them.

JAX knows the hosts of a Cloud TPU slice (v2 to v6e and later, one slice or several), of TPUs on
GKE, the tasks of a Slurm step and the ranks of Open MPI.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

from jax._src.clusters import ClusterEnv, cloud_tpu_cluster, k8s_cluster

from common.io.errors import UserError

_PLACE_SECONDS = 300  # for the name of the coordinator's host to be known
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run.

    Attributes:
      kind: who knew them.
      count: of the processes.
      arguments: of `jax.distributed.initialize`.
      find_place: gives the coordinator's host:port and the index of this process.
    """

    kind: str
    count: int
    arguments: dict[str, Any]
    find_place: Callable[[], tuple[str, int]]


def find_cluster() -> Cluster | None:
    """The cluster that this process is part of; None: it is alone.

    Raises:
      UserError: some of the three variables are set but not all, one is not a valid number, or
        they name another number of processes than the TPU slice has hosts.
    """
    told, found = _told(), _found()
    if told is None:
        return found
    if found is not None and found.kind.endswith("tpu") and found.count != told.count:
        raise UserError(
            f"JAX_NUM_PROCESSES: found {told.count}, expected {found.count}, the hosts of this "
            "TPU slice: start the command on every one of them"
        )
    return told


def _told() -> Cluster | None:
    """What JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say."""
    values = {name: os.environ.get(name, "") for name in _VARIABLES}
    if not any(values.values()):
        return None
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
    arguments = dict(coordinator_address=address, num_processes=int(count), process_id=int(index))
    return Cluster("variables", int(count), arguments, lambda: (address, int(index)))


def _found() -> Cluster | None:
    """What JAX's own detection says, found without starting a backend."""
    for kind in ClusterEnv._cluster_types:
        if kind.opt_in_only_method or not _may_be(kind) or not kind.is_env_present():
            continue
        count = kind.get_process_count()
        if count == 1:
            return None
        arguments = {"cluster_detection_method": kind.name or None}
        return Cluster(kind.name, count, arguments, functools.partial(_place, kind))
    return None


def _place(kind: type[ClusterEnv]) -> tuple[str, int]:
    port = os.environ.get("JAX_COORDINATOR_PORT")
    return kind.get_coordinator_address(_PLACE_SECONDS, port), kind.get_process_id()


def _may_be(kind: type[ClusterEnv]) -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if issubclass(kind, cloud_tpu_cluster.BaseTpuCluster):
        return not platforms or "tpu" in platforms.split(",")
    if issubclass(kind, k8s_cluster.K8sCluster):  # of other pods, JAX could tell nothing
        return "JOB_COMPLETION_INDEX" in os.environ
    return True
