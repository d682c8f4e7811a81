"""launch_pod.sh against a stand-in for gcloud that runs the hosts' commands on this machine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.bench.pair import tiny_classifier, write_photos
from tests.commands import ROOT, wait_for_lines

SCRIPT = ROOT / "scripts/launch_pod.sh"
POD = ("--name=pod", "--zone=zone-b")
# Of a host: keeps its arguments, then does what the file `does` of its home says.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$HOME/arguments"
echo "line of $POD_TEST"
source "$HOME/does"
"""


class Slice:
    """Hosts with an installed copy, and gcloud and sudo in front of PATH."""

    def __init__(self, folder: Path, hosts: int, python: str = PYTHON):
        self.folder = folder
        self.hosts = [folder / "hosts" / f"{number}" for number in range(hosts)]
        write_program(folder / "bin/sudo", "#!/bin/sh\nexit 1\n")
        (folder / "bin/gcloud").symlink_to(ROOT / "tests/scripts/fake_gcloud")
        for host in self.hosts:
            write_program(host / "openimages-detection/.venv/bin/python", python)
            for name in ("common", "configs", "detection", "scripts"):
                (host / "openimages-detection" / name).symlink_to(ROOT / name)
            (host / "does").write_text("exec sleep 60")
        (folder / "libtpu_lockfile").touch()
        self.environment = {
            "HOSTS": str(folder / "hosts"),
            "HOME": str(folder),
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "LIBTPU_LOCK": str(folder / "libtpu_lockfile"),
            "JAX_PLATFORMS": "cpu",
        }

    def launch(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env=self.environment | variables,
            text=True,
            capture_output=True,
            timeout=120,
        )

    def file(self, name: str, host: int = 0) -> Path:
        return self.hosts[host] / "openimages-detection" / name


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def wait_for(path: Path) -> str:
    for _ in range(400):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} never appeared")


@pytest.fixture
def pod(tmp_path):
    pod = Slice(tmp_path, 2)
    yield pod
    pod.launch("stop", *POD, "--grace=0")


def test_run_reaches_every_host_with_its_flags_untouched(pod):
    flags = ("--config=configs/detection/r50.py", '--config.name=it\'s a $HOME "b"')
    started = pod.launch(
        "run",
        "detection.train",
        *POD,
        "--dataset=gs://b/set",
        f"--workdir={pod.folder}/run",
        "--env=POD_TEST=a b",
        "--",
        *flags,
    )
    assert started.returncode == 0, started.stderr
    for number, host in enumerate(pod.hosts):
        assert f"host {number}: started env POD_TEST=a b" in started.stdout
        assert wait_for(host / "arguments").splitlines() == [
            "-m",
            "detection.train",
            f"--workdir={pod.folder}/run",
            *flags,
            "--config.data.dir=dataset",
        ]
    calls = (pod.folder / "hosts/calls").read_text().splitlines()
    assert calls[0].strip() == "compute tpus tpu-vm ssh pod --worker=all --zone=zone-b"
    # The dataset directory goes to where --config.data.dir looks for it, beside the code.
    copies = (pod.folder / "hosts/copies").read_text().splitlines()
    folders = [host / "openimages-detection" for host in pod.hosts]
    assert sorted(copies) == [f"{folder}: rsync -r gs://b/set dataset" for folder in folders]
    again = pod.launch("run", "detection.train", *POD, "--", *flags)
    assert again.returncode != 0 and "host 1: already runs" in again.stderr
    status = pod.launch("status", *POD).stdout.splitlines()
    assert status[0] == "READY" and any(line.startswith("host 1: running") for line in status)
    stopped = pod.launch("stop", *POD, "--grace=20")
    assert stopped.returncode == 0 and "host 0: stopped 143" in stopped.stdout, stopped
    assert "line of a b" in pod.launch("logs", *POD, "--lines=9").stdout
    for number in range(2):  # copied to the work directory
        (log,) = (pod.folder / f"run/logs/host-{number}").iterdir()
        assert "line of a b" in log.read_text() and "ended with 143" in log.read_text()
    assert not (pod.folder / "libtpu_lockfile").exists()


def test_what_does_not_end_is_killed_and_logs_are_kept(pod):
    for host in pod.hosts:
        (host / "does").write_text("trap '' TERM; echo deaf; while :; do sleep 0.1; done")
    for _ in range(2):
        pod.launch("run", "detection.export", *POD, "--", "--split=test")
        while "deaf" not in pod.launch("logs", *POD).stdout:
            time.sleep(0.1)
        stopped = pod.launch("stop", *POD, "--grace=1")
        assert "host 1: killed after 1 s" in stopped.stdout
        assert "host 1: stopped 137" in stopped.stdout
    assert len(list(pod.file("logs").iterdir())) == 2


def test_one_host_is_enough_for_some_commands(pod):
    pod.launch("run", "ensemble.merge", *POD, "--worker=0", "--", "--output=m.parquet")
    assert wait_for(pod.hosts[0] / "arguments")
    assert not (pod.hosts[1] / "arguments").exists()


# Host 0 does the first until it was started so often as there are letters, then it ends well.
@pytest.mark.parametrize(
    ("ends", "restarts", "starts", "status", "says"),
    [
        ("exit 75", 2, 2, 0, "preempted: starts again, 1 more times"),
        ("kill -9 $$", 2, 2, 0, "lost: starts again"),
        ("exit 1", 2, 1, 1, "failed; scripts/launch_pod.sh logs"),
        ("exit 75", 1, 2, 0, "preempted: starts again, 0 more times"),
    ],
)
def test_only_what_may_end_well_is_started_again(pod, ends, restarts, starts, status, says):
    count = 'echo x >> "$HOME/starts"; (( $(wc -l < "$HOME/starts") > 1 )) && exit 0; '
    (pod.hosts[0] / "does").write_text(count + ends)
    # The others hear of a failure and exit with 1.
    (pod.hosts[1] / "does").write_text(count + "sleep 0.3; exit 1")
    ended = pod.launch(
        *("run", "detection.train", *POD, f"--restarts={restarts}", "--poll=1", "--grace=1"),
        *("--", "--config=x"),
    )
    assert ended.returncode == status and says in ended.stdout + ended.stderr, ended
    assert len((pod.hosts[0] / "starts").read_text().splitlines()) == starts


@pytest.mark.parametrize(
    ("ends", "status", "says"),
    [("kill -9 $$", 0, "lost: starts again"), ("exit 1", 1, "failed; scripts/launch_pod.sh logs")],
)
def test_those_who_wait_for_a_process_that_never_joined_are_stopped(pod, ends, status, says):
    again = 'echo x >> "$HOME/starts"; (( $(wc -l < "$HOME/starts") > 1 )) && exit 0; '
    (pod.hosts[0] / "does").write_text(again + "exec sleep 300")
    (pod.hosts[1] / "does").write_text(again + ends)
    ended = pod.launch(
        *("run", "detection.train", *POD, "--restarts=1", "--poll=1", "--patience=2"),
        *("--grace=1", "--", "--config=x"),
    )
    assert ended.returncode == status and says in ended.stdout + ended.stderr, ended
    assert "the others still run: they are stopped" in ended.stdout
    assert "host 0: running" not in pod.launch("status", *POD).stdout


def test_a_slice_that_is_gone_is_created_and_installed_again(pod):
    (pod.folder / "hosts/state").write_text("PREEMPTED")
    (pod.folder / "bin/gcloud").unlink()
    write_program(
        pod.folder / "bin/gcloud",
        f"""#!/usr/bin/env bash
        case "$*" in
          *"tpu-vm create"*)
            echo "$*" >> "$HOSTS/created"
            echo READY > "$HOSTS/state"
            for host in "$HOSTS"/[0-9]*; do mv "$host/away" "$host/openimages-detection"; done
            ;;
          *"git clone"*) echo installed >> "$HOSTS/created" ;;
          *) exec {ROOT}/tests/scripts/fake_gcloud "$@" ;;
        esac
        """,
    )
    for host in pod.hosts:  # the first time its machine goes
        (host / "does").write_text(
            'echo x >> "$HOME/starts"; (( $(wc -l < "$HOME/starts") > 1 )) && exit 0; '
            'mv "$HOME/openimages-detection" "$HOME/away"; exit 75'
        )
    ended = pod.launch(
        *("run", "detection.train", *POD, "--restarts=1", "--poll=1", "--grace=1"),
        *("--type=v4-16", "--spot", "--repo=REPO", "--", "--config=x"),
    )
    assert ended.returncode == 0 and "gone: starts again" in ended.stdout, ended
    created = (pod.folder / "hosts/created").read_text().splitlines()
    assert "tpu-vm create pod --accelerator-type=v4-16 --zone=zone-b --spot" in created[0]
    assert created[1] == "installed"


def test_dry_run_prints_a_command_that_does_the_same(pod):
    arguments = ("run", "detection.train", *POD, "--dry_run", "--", "--config=it's.py")
    printed = pod.launch(*arguments)
    assert printed.returncode == 0 and not (pod.folder / "hosts/calls").exists()
    environment = pod.environment
    subprocess.run(["bash", "-c", printed.stdout], env=environment, check=True, timeout=60)
    assert "--config=it's.py" in wait_for(pod.hosts[0] / "arguments").splitlines()


def test_a_week_on_a_spot_slice_reads_as_an_operator_would_write_it(pod):
    """Create, install, train with restarts, watch on other hardware, export, delete."""
    pod.folder.joinpath("train.flags").write_text(
        "--name=train-pod\n--zone=us-central2-b\n# preemptible, and waits its turn\n"
        "--type=v4-512\n--spot\n--queued\n--repo=https://example.org/this.git\n"
    )
    run = "--workdir=gs://bucket/run"
    data = "--dataset=gs://bucket/dataset"
    watcher = ("--name=watcher", "--zone=us-central2-b")
    train = f"--flags={pod.folder}/train.flags"
    commands = [
        ("create", train),
        ("install", train),
        ("run", "detection.train", train, run, data, "--restarts=20", "--")
        + ("--config=configs/detection/pod512.py",),
        ("run", "detection.evaluate", *watcher, run, data, "--", "--watch", "--export=best"),
        ("status", train),
        ("logs", train),
        ("stop", train),
        ("run", "detection.export", train, run, data, "--")
        + ("--split=test", "--output=gs://bucket/run/export/test.parquet"),
        ("delete", train),
    ]
    text = ""
    for command in commands:
        printed = pod.launch(*command, "--dry_run") if "--" not in command else None
        if printed is None:
            at = command.index("--")
            printed = pod.launch(*command[:at], "--dry_run", *command[at:])
        assert printed.returncode == 0, printed.stderr
        shown = " ".join(command).replace(f"{pod.folder}/", "")
        text += f"### {shown}\n{printed.stdout}\n"
    assert text == (ROOT / "tests/scripts/pod_v4-512.txt").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "expected create, install, run, status, logs, stop or delete"),
        (["train", *POD], "found 'train'"),
        (["run", "train", *POD, "--", "--config=x"], "a command such as detection.train"),
        (["run", "detection.train", "--name=pod"], "--name and --zone are required"),
        (["run", "detection.train", *POD], "give the flags of detection.train after --"),
        (["run", "detection.train", *POD, "--restarts=x", "--", "-a"], "--restarts: found 'x'"),
        (["create", *POD], "--type is required"),
        (["create", *POD, "--type=v4-8", "--spot", "--reserved"], "expected one of them"),
        (["install", *POD], "--repo=GIT_URL is required"),
        (["stop", *POD, "--slice=v3-512"], "unknown or empty flag '--slice=v3-512'"),
        (["stop", "--name=", "--zone=z"], "unknown or empty flag '--name='"),
        (["stop", *POD, "--", "x"], "stop takes nothing after --"),
        (["stop", "--flags=nowhere"], "--flags: no such file: nowhere"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(pod, arguments, message):
    result = pod.launch(*arguments)
    assert result.returncode == 1 and message in result.stderr.splitlines()[-1]
    assert not (pod.folder / "hosts/calls").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_whose_process_is_killed_is_finished_by_its_restart(tmp_path):
    """Two real processes of a training; losses equal the uninterrupted run's, bit for bit."""
    pod = Slice(tmp_path, 2, f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    write_photos(tmp_path / "photos")
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    variables |= {name: value for name, value in os.environ.items() if name.startswith("JAX_C")}
    flags = [*tiny_classifier(40, 4), f"--config.data.dir={tmp_path}/photos"]

    def run(workdir: Path) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(SCRIPT), "run", "detection.pretrain", *POD, f"--workdir={workdir}"]
            + [
                "--restarts=2",
                "--poll=1",
                "--grace=1",
                "--env=JAX_NUM_CPU_DEVICES=1",
                "--",
                *flags,
            ],
            env=pod.environment | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def losses(workdir: Path) -> list[str]:
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        return [repr(line["loss"]) for line in lines if "loss" in line]

    whole = run(tmp_path / "whole")
    output, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, output
    killed = run(tmp_path / "killed")
    try:
        wait_for_lines(tmp_path / "killed/metrics.jsonl", 12, killed)
        os.kill(int(pod.file(".pod/process", 1).read_text()), signal.SIGKILL)
        output, _ = killed.communicate(timeout=600)
    finally:
        pod.launch("stop", *POD, "--grace=0")
    assert killed.returncode == 0 and "host 1: ended 137" in output, output
    assert "lost: starts again, 1 more times" in output
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 40
    logs = list((tmp_path / "killed/logs/host-1").iterdir())
    assert len(logs) == 2


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shell_scripts_pass_shellcheck():
    names = ("bench/accelerator", "launch_pod.sh", "launch_gke.sh", "mask_demo", "quickstart")
    names += ("test", "venv.sh", "pod/cloud.sh", "pod/restarts.sh", "pod/host.sh")
    paths = [".ci/run", "tests/scripts/fake_gcloud", *(f"scripts/{name}" for name in names)]
    assert subprocess.run(["shellcheck", "-x", *paths], cwd=ROOT).returncode == 0
