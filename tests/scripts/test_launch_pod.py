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


COUNTED = 'echo x >> "$HOME/starts"; '
UNTIL_END = COUNTED + 'while [[ ! -e "$HOSTS/end" ]]; do sleep 0.1; done'  # of all hosts


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

    def gcloud(self, cases: str) -> None:
        """Puts other answers of gcloud before the usual ones; `nth NAME` counts its own calls."""
        (self.folder / "bin/gcloud").unlink()
        write_program(
            self.folder / "bin/gcloud",
            f"""#!/usr/bin/env bash
            fake={ROOT}/tests/scripts/fake_gcloud
            nth() {{ echo x >> "$HOSTS/$1"; wc -l < "$HOSTS/$1"; }}
            case "$*" in
              {cases}
              *) exec "$fake" "$@" ;;
            esac
            """,
        )

    def starts(self) -> list[int]:
        """How often each host has started a command that counts that (`COUNTED`)."""
        return [len((host / "starts").read_text().splitlines()) for host in self.hosts]

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
    assert calls[0].startswith("compute tpus tpu-vm ssh pod --worker=all --zone=zone-b --ssh-flag=")
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
    """Neither a cloud without slices nor an installation that fails costs a restart."""
    (pod.folder / "hosts/state").write_text("PREEMPTED")
    pod.gcloud(
        """
          *"tpu-vm create"*)
            echo "$*" >> "$HOSTS/created"
            (($(nth creations) > 2)) || { echo "No more capacity" >&2; exit 1; }
            echo READY > "$HOSTS/state"
            for host in "$HOSTS"/[0-9]*; do mv "$host/away" "$host/openimages-detection"; done
            ;;
          *"git clone"*) echo installed >> "$HOSTS/created"; (($(nth installations) > 1)) ;;
        """
    )
    for host in pod.hosts:  # the first time its machine goes
        (host / "does").write_text(
            COUNTED + '(( $(wc -l < "$HOME/starts") > 1 )) && exit 0; '
            'mv "$HOME/openimages-detection" "$HOME/away"; exit 75'
        )
    ended = pod.launch(
        *("run", "detection.train", *POD, "--restarts=1", "--poll=0", "--grace=1"),
        *("--type=v4-16", "--spot", "--repo=REPO", "--", "--config=x"),
    )
    assert ended.returncode == 0 and "gone: starts again" in ended.stdout, ended
    created = (pod.folder / "hosts/created").read_text().splitlines()
    assert "tpu-vm create pod --accelerator-type=v4-16 --zone=zone-b --spot" in created[0]
    assert created[1:3] == created[:1] * 2 and created[3:] == ["installed"] * 2


@pytest.mark.parametrize(
    ("describe", "status", "says"),
    [
        ("echo ERROR: login >&2; exit 1", 0, "0 of 2 hosts answer: ERROR: login"),
        ("echo READY", 0, "0 of 2 hosts answer: no route"),
        ("echo REPAIRING", 0, "pod is REPAIRING"),
        ("echo DELETING", 1, "pod was deleted"),
        ("echo ERROR: NOT_FOUND: pod >&2; exit 1", 1, "pod was deleted"),
    ],
)
def test_a_run_that_cannot_be_seen_is_left_alone(pod, describe, status, says):
    """The operator's network or login, a repair, a deletion: nothing is stopped or created."""
    pod.gcloud(
        f"""
          *"host.sh status"*)
            looks=$(nth looks)
            if ((1 < looks && looks < 9)); then echo no route >&2; exit 1; fi
            ((looks < 9)) || touch "$HOSTS/end"
            exec "$fake" "$@"
            ;;
          *describe*) {describe} ;;
        """
    )
    for host in pod.hosts:
        (host / "does").write_text(UNTIL_END)
    ended = pod.launch(
        *("run", "detection.train", *POD, "--restarts=1", "--poll=0", "--grace=1"),
        *("--type=v4-16", "--repo=REPO", "--", "--config=x"),
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == status and said.count(says) == 1, ended
    assert ("all hosts answer again" in said) == (status == 0)
    assert pod.starts() == [1, 1] and "host.sh stop" not in said and "starts again" not in said
    calls = (pod.folder / "hosts/calls").read_text()
    assert "create" not in calls and "delete" not in calls


def test_a_frozen_host_keeps_nobody_waiting(pod):
    pod.gcloud(
        """
          *"host.sh status"*)
            looks=$(nth looks)
            if ((looks == 2)); then "$fake" "${@:1:4}" --worker=0 "${@:5}"; sleep 60; fi
            ((looks == 1)) || touch "$HOSTS/end"
            exec "$fake" "$@"
            ;;
        """
    )
    for host in pod.hosts:
        (host / "does").write_text(UNTIL_END)
    ended = pod.launch(
        *("run", "detection.train", *POD, "--restarts=1", "--poll=1", "--answer_within=1"),
        *("--", "--config=x"),
    )
    assert ended.returncode == 0, ended
    assert "1 of 2 hosts answer: nothing else within 1 s" in ended.stdout
    assert pod.starts() == [1, 1]


def test_a_launcher_takes_up_what_another_one_began(pod):
    for host in pod.hosts:
        (host / "does").write_text(UNTIL_END)
    run = ("run", "detection.train", *POD, "--env=POD_TEST=a b")
    assert pod.launch(*run, "--", "--config=x").returncode == 0
    watched = (*run, "--restarts=1", "--poll=1", "--")
    refused = pod.launch(*watched, "--config=xy")
    assert refused.returncode == 1 and "the hosts run another command" in refused.stderr, refused
    pod.gcloud(
        """*"host.sh status"*) (($(nth looks) < 2)) || touch "$HOSTS/end"; exec "$fake" "$@" ;;"""
    )
    ended = pod.launch(*watched, "--config=x")
    assert ended.returncode == 0, ended
    assert "runs on all 2 hosts: it is watched from here" in ended.stdout
    assert pod.starts() == [1, 1] and "started" not in ended.stdout


def test_a_start_that_not_all_hosts_make_is_tried_again_and_costs_one_restart(pod):
    pod.gcloud(
        """
          *"host.sh start"*)
            if (($(nth starts) < 3)); then
              "$fake" "${@:1:4}" --worker=0 "${@:5}"
              echo "no connection to worker 1" >&2
              exit 1
            fi
            exec "$fake" "$@"
            ;;
        """
    )
    for host in pod.hosts:
        (host / "does").write_text(COUNTED + "sleep 0.5")
    run = ("run", "detection.train", *POD, "--poll=0", "--grace=1")
    ended = pod.launch(*run, "--restarts=1", "--", "--config=x")
    assert ended.returncode == 0 and pod.starts()[1] == 1, ended
    assert ended.stdout.count("host 0: started") == 3
    assert "lost: starts again, 0 more times" in ended.stdout
    (pod.folder / "hosts/starts").unlink()
    ended = pod.launch(*run, "--", "--config=x")
    assert ended.returncode == 1 and "did not start on all hosts" in ended.stderr


def test_what_had_ended_can_be_stopped_too(pod):
    """So that a launcher that has not looked yet does not start it again."""
    for host in pod.hosts:
        (host / "does").write_text("exit 75")
    pod.launch("run", "detection.train", *POD, "--", "--config=x")
    for host in range(2):
        wait_for(pod.file(".pod/exit", host))
    assert "host 1: stopped 75" in pod.launch("stop", *POD).stdout
    assert "host 0: stopped 75" in pod.launch("status", *POD).stdout


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
