"""The command itself: exit status, one line on errors, nothing half-written, repeatable output."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.io.errors import UserError
from tests.prepare_data_cli import openimages_source, prepare, write_photo

ROOT = Path(__file__).parents[2]
ROWS = ["x,/m/a,0.1,0.2,0.1,0.2,0", "y,/m/c,0.1,0.2,0.1,0.2,0", "x,/m/a,0.1,0.1,0.1,0.2,0"]


def _run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "scripts.prepare_data", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_prints_what_was_done_and_what_was_dropped(tmp_path):
    source = openimages_source(tmp_path / "s", ROWS)
    result = _run("openimages", f"--source={source}", f"--output={tmp_path / 'd'}")
    assert result.returncode == 0, result.stderr
    assert "2 images (train 2), 2 boxes of 2 of 3 classes" in result.stdout
    assert "dropped          1  zero area" in result.stdout


def test_a_users_error_is_one_line_and_status_1(tmp_path):
    result = _run("openimages", f"--source={tmp_path}", f"--output={tmp_path / 'd'}")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_formats_are_refused(tmp_path):
    result = _run("kitti", f"--source={tmp_path}", f"--output={tmp_path / 'd'}")
    assert result.returncode == 1
    assert "found kitti, expected one of openimages, coco" in result.stderr


def test_existing_output_is_kept_unless_told_otherwise(tmp_path):
    source = openimages_source(tmp_path / "s", ROWS)
    prepare("openimages", source=source, output=tmp_path / "d")
    with pytest.raises(UserError, match="exists: .*--overwrite"):
        prepare("openimages", source=source, output=tmp_path / "d")
    openimages_source(source, ROWS[:1])
    assert (
        prepare("openimages", source=source, output=tmp_path / "d", overwrite=True).num_images == 1
    )
    # A failure while overwriting leaves the old one.
    openimages_source(source, ["x,/m/a,0.1"])
    with pytest.raises(UserError):
        prepare("openimages", source=source, output=tmp_path / "d", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "s"]
    assert (tmp_path / "d" / "dataset.json").is_file()


def test_the_same_input_gives_the_same_bytes(tmp_path):
    source = openimages_source(tmp_path / "s", ROWS, labels=["y,/m/a,0"])
    folders = [tmp_path / "d1", tmp_path / "d2"]
    for folder in folders:
        prepare("openimages", source=source, output=folder)
    files = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders
    ]
    assert files[0] == files[1]


def test_an_output_that_holds_the_photos_is_refused(tmp_path):
    """Replacing it, with --overwrite, would remove them."""
    source = openimages_source(tmp_path / "source", ["a,/m/a,0.1,0.5,0.2,0.6,0"])
    prepare("openimages", source=source, output=tmp_path / "d")
    write_photo(tmp_path / "d" / "photos" / "a.jpg", 40, 60)
    with pytest.raises(UserError, match=r"--output=.*/d: --images=.*photos lies in it"):
        prepare(
            "openimages",
            source=source,
            images=tmp_path / "d" / "photos",
            output=tmp_path / "d",
            overwrite=True,
        )
    assert (tmp_path / "d" / "photos" / "a.jpg").exists()
