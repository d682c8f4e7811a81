"""Machines as JAX finds them, mocked: TPU slices of all kinds, GKE, Slurm, Open MPI."""

import pytest
from jax._src.clusters import cloud_tpu_cluster

from common.io.errors import UserError
from common.training import cluster

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID JAX_PLATFORMS TPU_SKIP_MDS_QUERY "
    "TPU_WORKER_HOSTNAMES TPU_PROCESS_ADDRESSES TPU_WORKER_ID MEGASCALE_NUM_SLICES "
    "MEGASCALE_SLICE_ID MEGASCALE_COORDINATOR_ADDRESS SLURM_JOB_ID SLURM_STEP_NODELIST "
    "SLURM_NTASKS SLURM_PROCID SLURM_LOCALID OMPI_MCA_orte_hnp_uri OMPI_COMM_WORLD_SIZE "
    "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_LOCAL_RANK KUBERNETES_SERVICE_HOST JOB_COMPLETION_INDEX"
).split()
OLD_ENDPOINTS = ",".join(f"w{i}:{i}:10.0.0.{i}" for i in range(64))
SLURM = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="n[1-2]", SLURM_PROCID="1", SLURM_LOCALID="0")


def tpu_vm(hosts: int, slices: int = 1) -> dict[str, str]:
    """The metadata of a host of a Cloud TPU slice."""
    environment = f"ACCELERATOR_TYPE: 'x'\nMEGASCALE_NUM_SLICES: '{slices}'"
    return {
        "agent-worker-number": "0",
        "worker-network-endpoints": ",".join(f"10.0.0.{i}" for i in range(hosts)),
        "tpu-env": environment if slices > 1 else "ACCELERATOR_TYPE: 'x'",
    }


MACHINES = {
    # name: (TPU chips are there, metadata, variables, kind and number of processes)
    "laptop": (False, None, {}, None),
    "v3-512": (True, tpu_vm(64) | {"worker-network-endpoints": OLD_ENDPOINTS}, {}, ("gcetpu", 64)),
    "v4-512": (True, tpu_vm(64), {}, ("gcetpu", 64)),
    "v5e-256": (True, tpu_vm(64), {}, ("gcetpu", 64)),
    "v5e-8": (True, tpu_vm(1), {}, None),
    "v5p-128": (True, tpu_vm(16), {}, ("gcetpu", 16)),
    "v6e-64": (True, tpu_vm(16), {}, ("gcetpu", 16)),
    "v6e-64 x 2 slices": (True, tpu_vm(16, slices=2), {}, ("gcetpu", 32)),
    "v4 host told to stay alone": (True, tpu_vm(64), {"TPU_SKIP_MDS_QUERY": "1"}, None),
    "v4 host, on its CPU": (True, tpu_vm(64), {"JAX_PLATFORMS": "cpu"}, None),
    "GKE v5e": (
        True,
        None,
        {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2", "TPU_SKIP_MDS_QUERY": "1"},
        ("gketpu", 4),
    ),
    "GKE, one host": (
        True,
        None,
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        None,
    ),
    "Slurm, 2 tasks": (False, None, SLURM | {"SLURM_NTASKS": "2"}, ("slurm", 2)),
    "Slurm, 1 task": (False, None, SLURM | {"SLURM_NTASKS": "1"}, None),
    "Open MPI": (
        False,
        None,
        {
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_RANK": "1",
        },
        ("ompi", 4),
    ),
    "a notebook in Kubernetes": (False, None, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
}


@pytest.fixture
def machine(monkeypatch):
    def become(chips, metadata, variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", chips)
        known = metadata or {}

        def get_metadata(key):
            return (known[key], 200) if key in known else ("", 404)

        monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get_metadata)

    return become


@pytest.mark.parametrize("name", MACHINES)
def test_processes_are_found_on_every_machine(machine, name):
    chips, metadata, variables, expected = MACHINES[name]
    machine(chips, metadata, variables)
    found = cluster.find_cluster()
    assert (found and (found.kind, found.count)) == expected
    if found:
        assert found.arguments == {"cluster_detection_method": found.kind}


def test_variables_say_who_takes_part(machine):
    told = dict(zip(cluster._VARIABLES, ("host:1", "2", "1"), strict=True))
    machine(False, None, told)
    found = cluster.find_cluster()
    assert found.count == 2
    assert found.arguments == dict(coordinator_address="host:1", num_processes=2, process_id=1)
    assert found.find_place() == ("host:1", 1)


def test_fewer_processes_than_the_slice_has_hosts_are_refused(machine):
    told = dict(zip(cluster._VARIABLES, ("host:1", "2", "1"), strict=True))
    machine(True, tpu_vm(16), told)
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES: found 2, expected 16, the hosts"):
        cluster.find_cluster()
