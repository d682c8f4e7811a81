"""launch_pod.sh run --restarts: what is started again, what is waited for, and what ends it."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.pair import tiny_classifier, write_photos
from tests.commands import wait_for_lines
from tests.pod_slice import COUNTED, POD, SCRIPT, UNTIL_END, Slice


@pytest.fixture
def pod(tmp_path):
    pod = Slice(tmp_path, 2)
    yield pod
    pod.launch("stop", *POD, "--grace=0")


# Host 0 does the first until it was started so often as there are letters, then it ends well.
@pytest.mark.parametrize(
    ("ends", "restarts", "starts", "status", "says"),
    [
        ("exit 75", 2, 2, 0, "ended with 75: starts again, 1 more times"),
        ("kill -9 $$", 2, 2, 0, "lost: starts again"),
        ("exit 1", 2, 1, 1, "failed; scripts/launch_pod.sh logs"),
        ("exit 75", 1, 2, 0, "ended with 75: starts again, 0 more times"),
    ],
)
def test_only_what_may_end_well_is_started_again(pod, ends, restarts, starts, status, says):
    count = COUNTED + '(( $(wc -l < "$HOME/starts") > 1 )) && exit 0; '
    (pod.hosts[0] / "does").write_text(count + ends)
    # The others hear of an error and exit with 1, or miss the process and exit with 75.
    (pod.hosts[1] / "does").write_text(count + f"sleep 0.3; exit {1 if ends == 'exit 1' else 75}")
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
    again = COUNTED + '(( $(wc -l < "$HOME/starts") > 1 )) && exit 0; '
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
    assert "1 of 2 hosts answer: nothing more within 1 s" in ended.stdout
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


def test_hosts_that_lost_their_clone_get_it_again(pod):
    """As after a repair with new disks."""
    pod.gcloud(
        """
          *"git clone"*)
            for host in "$HOSTS"/[0-9]*; do mv "$host/away" "$host/openimages-detection"; done ;;
        """
    )
    for host in pod.hosts:
        (host / "does").write_text(
            COUNTED + '(( $(wc -l < "$HOME/starts") > 1 )) && exit 0; '
            'mv "$HOME/openimages-detection" "$HOME/away"; exit 75'
        )
    ended = pod.launch(
        *("run", "detection.train", *POD, "--restarts=1", "--poll=0", "--grace=1"),
        *("--repo=REPO", "--", "--config=x"),
    )
    assert ended.returncode == 0 and "lost: starts again" in ended.stdout, ended
    assert pod.starts() == [2, 2]


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
