"""The JobSet that launch_gke.sh prints."""

import os
import subprocess

import pytest
import yaml

from tests.commands import ROOT

RUN = ("run", "detection.train", "--name=job", "--image=registry/detection", "--workdir=gs://b/run")
TYPE = ("--type=v5p", "--topology=4x4x8", "--dry_run")


def launch(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts/launch_gke.sh"), *arguments]
    environment = os.environ | variables
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60)


def test_slices_hosts_and_flags_reach_the_job_set():
    flags = ("--config=configs/detection/pod512.py", '--config.name=it\'s "a" \\ b')
    printed = launch(
        *RUN, *TYPE, "--num-slices=2", "--restarts=3", "--spot", "--env=A=b c", "--", *flags
    )
    assert printed.returncode == 0, printed.stderr
    job_set = yaml.safe_load(printed.stdout)
    # An error (exit status 1) fails the whole; all else, such as 75 and evictions, is restarted.
    assert job_set["spec"]["failurePolicy"] == {
        "maxRestarts": 3,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    (job,) = job_set["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 4 * 4 * 8 // 4
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and spec["backoffLimit"] == 0
    assert rule["onExitCodes"] == {"containerName": "main", "operator": "In", "values": [1]}
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["containers"][0]["name"] == "main"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["args"] == ["detection.train", "--workdir=gs://b/run", *flags]
    assert container["env"] == [
        {"name": "JAX_COMPILATION_CACHE_DIR", "value": "gs://b/run/programs"},
        {"name": "A", "value": "b c"},
    ]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}


def test_a_name_that_is_taken_is_refused(tmp_path):
    """kubectl apply would answer "unchanged" to a job that has ended, and start nothing."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        '#!/bin/sh\n[ "$*" = "create -f -" ] || exit 9\n'
        '[ ! -e "$MADE" ] || { echo "Error from server (AlreadyExists): job" >&2; exit 1; }\n'
        'cat > "$MADE"; echo "jobset/job created"\n'
    )
    kubectl.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MADE": str(tmp_path / "made")}
    command = (*RUN, *TYPE[:2], "--", "--config=x")
    first, second = (launch(*command, **variables) for _ in range(2))
    assert first.returncode == 0 and first.stdout == "jobset/job created\n", first
    assert yaml.safe_load((tmp_path / "made").read_text())["kind"] == "JobSet"
    assert second.returncode == 1 and "delete --name=job first" in second.stderr, second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected run, status, logs or delete"),
        (["run", "train"], "a command such as detection.train"),
        ([*RUN[:-1], *TYPE], "--workdir is required"),
        ([*RUN, "--type=v3", "--topology=4x4"], "--type: found 'v3'"),
        ([*RUN, "--type=v4", "--topology=4"], "--topology: found '4'"),
        ([*RUN, "--type=v4", "--topology=1x1x1"], "expected a multiple of 4 chips"),
        ([*RUN, "--slices=2"], "unknown or empty flag '--slices=2'"),
        (["status", "--name=A_b"], "--name: found 'A_b'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message):
    result = launch(*arguments)
    assert result.returncode == 1 and message in result.stderr.splitlines()[-1]


def test_the_image_runs_any_module_with_all_packages():
    text = (ROOT / "Dockerfile").read_text()
    for package in ("common", "configs", "detection", "ensemble", "scripts", "segmentation"):
        assert f"COPY {package} {package}\n" in text
    assert 'ENTRYPOINT ["python", "-m"]' in text
