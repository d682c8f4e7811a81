"""The JobSet that launch_gke.sh prints."""

import subprocess

import pytest
import yaml

from tests.commands import ROOT

RUN = ("run", "detection.train", "--name=job", "--image=registry/detection", "--workdir=gs://b/run")
TYPE = ("--type=v5p", "--topology=4x4x8", "--dry_run")


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts/launch_gke.sh"), *arguments]
    return subprocess.run(command, text=True, capture_output=True, timeout=60)


def test_slices_hosts_and_flags_reach_the_job_set():
    flags = ("--config=configs/detection/pod512.py", '--config.name=it\'s "a" \\ b')
    printed = launch(
        *RUN, *TYPE, "--num-slices=2", "--restarts=3", "--spot", "--env=A=b c", "--", *flags
    )
    assert printed.returncode == 0, printed.stderr
    job_set = yaml.safe_load(printed.stdout)
    assert job_set["spec"]["failurePolicy"] == {"maxRestarts": 3}
    (job,) = job_set["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 4 * 4 * 8 // 4
    pod = spec["template"]["spec"]
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
