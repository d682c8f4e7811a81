"""An installed copy has all that the modules read, and the plain install stays one line."""

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
PACKAGES = [pattern.rstrip("*") for pattern in SETUPTOOLS["packages"]["find"]["include"]]


def test_every_folder_with_modules_is_packaged():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert folders == set(PACKAGES)


@pytest.mark.parametrize("package", ["common", "configs", "detection", "ensemble", "segmentation"])
def test_files_beside_modules_are_package_data(package):
    files = [path for path in (ROOT / package).rglob("*.*") if "__pycache__" not in path.parts]
    patterns = [*SETUPTOOLS["package-data"]["*"], "*.py"]
    assert [f for f in files if not any(fnmatch.fnmatch(f.name, p) for p in patterns)] == []


def test_extras_that_the_scripts_install_exist():
    extras = PROJECT["project"]["optional-dependencies"].keys()
    assert {"cpu", "gpu", "tpu", "test", "peers"} <= extras
    for script in (".ci/run", "scripts/test", "scripts/quickstart", "scripts/mask_demo"):
        text = (ROOT / script).read_text(encoding="utf-8")
        for names in re.findall(r"(?:make_venv \S+ |extras\+?=)([\w,]+)", text):
            assert set(names.strip(",").split(",")) <= extras, script
    plain = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in plain if not line.startswith("#")] == ["-e .[cpu]"]


def test_an_environment_is_made_once_for_each_choice_of_extras(tmp_path):
    """make_venv installs again only when pyproject.toml changed."""
    log, python = tmp_path / "log", tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\necho "${{*: -1}}" >> {log}\n')
    python.chmod(0o755)
    (tmp_path / "venv/bin/activate").write_text(f'PATH="{python.parent}:$PATH"\n')
    (tmp_path / "pyproject.toml").write_text("first")

    def make(extras):
        source = f"source {ROOT / 'scripts/venv.sh'}; make_venv {tmp_path / 'venv'} {extras}"
        subprocess.run(["bash", "-euo", "pipefail", "-c", source], cwd=tmp_path, check=True)
        installed = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return installed

    assert make("cpu") == [".[cpu]"] and make("cpu") == []
    assert make("cpu,test,peers") == [".[cpu,test,peers]", "lvis>=0.5.3,<1"]
    (tmp_path / "pyproject.toml").write_text("second")
    assert make("cpu") == [".[cpu]"]
