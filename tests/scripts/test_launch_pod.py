"""launch_pod.sh against a stand-in for gcloud that runs the hosts' commands on this machine."""

import shutil
import subprocess
import time

import pytest

from tests.commands import ROOT
from tests.pod_slice import POD, Slice, wait_for


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


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shell_scripts_pass_shellcheck():
    names = ("bench/accelerator", "launch_pod.sh", "launch_gke.sh", "mask_demo", "quickstart")
    names += ("test", "venv.sh", "pod/cloud.sh", "pod/restarts.sh", "pod/host.sh")
    paths = [".ci/run", "tests/scripts/fake_gcloud", *(f"scripts/{name}" for name in names)]
    assert subprocess.run(["shellcheck", "-x", *paths], cwd=ROOT).returncode == 0
