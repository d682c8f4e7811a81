"""Hosts of a TPU slice on this machine, folders, and a gcloud that runs there what it is given."""

import os
import subprocess
import time
from pathlib import Path

from tests.commands import ROOT

SCRIPT = ROOT / "scripts/launch_pod.sh"
POD = ("--name=pod", "--zone=zone-b")
# Of a host: keeps its arguments, then does what the file `does` of its home says.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$HOME/arguments"
echo "line of $POD_TEST"
source "$HOME/does"
"""
# What hosts do: count their starts, and run until the file `end` is among the hosts.
COUNTED = 'echo x >> "$HOME/starts"; '
UNTIL_END = COUNTED + 'while [[ ! -e "$HOSTS/end" ]]; do sleep 0.1; done'


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
        """How often each host has started a command that counts that (`COUNTED`).

        Waits for the first start: a launcher may end before a slow machine has come so far.
        """
        return [len(wait_for(host / "starts").splitlines()) for host in self.hosts]

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
