"""launch_pod.sh against a stand-in for gcloud that runs the hosts' commands on this machine."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/launch_pod.sh"
POD = ("--name=pod", "--zone=zone-b")
# The host's side of `gcloud compute tpus tpu-vm ssh`: its last argument is --command=SCRIPT.
GCLOUD = """#!/usr/bin/env bash
echo "${@:1:$#-1}" >> "$HOME/calls"
if [[ $1 == storage ]]; then echo "$PWD: ${*:2}" >> "$HOME/copies"; exit; fi
command="${*: -1}"
cd "$HOME" && exec bash -c "${command#--command=}"
"""
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$HOME/arguments"
exec sleep 60
"""


@pytest.fixture
def host(tmp_path):
    """A home directory with an installed copy, and gcloud in front of PATH."""
    for path, text in (("bin/gcloud", GCLOUD), ("detection/.venv/bin/python", PYTHON)):
        file = tmp_path / path
        file.parent.mkdir(parents=True)
        file.write_text(text)
        file.chmod(0o755)
    return tmp_path


def launch(home, *arguments):
    environment = {"HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=environment,
        text=True,
        capture_output=True,
        timeout=60,
    )


def wait_for(path: Path) -> str:
    for _ in range(200):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} never appeared")


def test_train_reaches_every_host_with_its_flags_untouched(host):
    flags = ("--config=configs/detection/r50.py", '--config.name=it\'s a $HOME "b"')
    started = launch(
        host, "train", *POD, "--dataset=gs://b/set", "--workdir=gs://b/run", "--", *flags
    )
    assert started.returncode == 0, started.stderr
    try:
        assert wait_for(host / "arguments").splitlines() == [
            "-m",
            "detection.train",
            "--workdir=gs://b/run",
            *flags,
            "--config.data.dir=dataset",
        ]
        calls = (host / "calls").read_text().splitlines()
        assert calls[0] == "compute tpus tpu-vm ssh pod --zone=zone-b --worker=all"
        # The dataset directory goes to where --config.data.dir looks for it, beside the code.
        copies = (host / "copies").read_text().splitlines()
        assert copies == [f"{host}/detection: rsync -r gs://b/set dataset"]
        assert (host / "detection" / "dataset").is_dir()
        again = launch(host, "train", *POD, "--workdir=gs://b/run", "--", *flags)
        assert again.returncode != 0 and "already training" in again.stderr
    finally:
        stopped = launch(host, "stop", *POD)
    assert stopped.returncode == 0, stopped.stderr
    assert not (host / "detection/train.pid").exists()


def test_dry_run_prints_a_command_that_does_the_same(host):
    arguments = ("train", *POD, "--workdir=gs://b/run", "--dry_run", "--", "--config=it's.py")
    printed = launch(host, *arguments)
    assert printed.returncode == 0 and not (host / "calls").exists()
    environment = {"HOME": str(host), "PATH": f"{host}/bin:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", printed.stdout], env=environment, check=True, timeout=60)
    try:
        assert "--config=it's.py" in wait_for(host / "arguments").splitlines()
    finally:
        launch(host, "stop", *POD)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "expected install, train, log or stop"),
        (["train", "--name=pod"], "--name and --zone are required"),
        (["train", *POD, "--", "--config=x"], "--workdir=gs://BUCKET/DIR is required"),
        (["train", *POD, "--workdir=gs://b/run"], "give --config"),
        (["install", *POD], "--repo=GIT_URL is required"),
        (["stop", *POD, "--slice=v3-512"], "unknown or empty flag '--slice=v3-512'"),
        (["stop", "--name=", "--zone=z"], "unknown or empty flag '--name='"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(host, arguments, message):
    result = launch(host, *arguments)
    assert result.returncode == 1 and message in result.stderr
    assert not (host / "calls").exists()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shell_scripts_pass_shellcheck():
    root = SCRIPT.parents[1]
    names = ("bench/accelerator", "launch_pod.sh", "mask_demo", "quickstart", "test", "venv.sh")
    paths = [".ci/run", *(f"scripts/{name}" for name in names)]
    subprocess.run(["shellcheck", "-x", *paths], cwd=root, check=True)
