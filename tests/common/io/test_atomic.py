import json
import os
import platform
import subprocess

import pytest
from etils import epath

from common.io.atomic import atomic_file, atomic_folder, open_atomic, write_json, write_text
from common.io.errors import UserError
from common.io.paths import is_remote, local_copy
from tests.remote import use_fake_store


@pytest.fixture(params=["local", "remote"])
def root(request, tmp_path, monkeypatch):
    """A local folder, or a gs:// address that a fake store serves."""
    if request.param == "local":
        return str(tmp_path / "out")
    use_fake_store(monkeypatch, tmp_path / "store")
    return "gs://bucket/out"


def names(root):
    return sorted(path.name for path in epath.Path(root).iterdir())


def test_a_text_replaces_the_file_before_and_makes_folders(root):
    write_text(f"{root}/deep/a.txt", "one")
    write_text(f"{root}/deep/a.txt", "zwölf")
    assert epath.Path(f"{root}/deep/a.txt").read_text() == "zwölf"
    assert names(f"{root}/deep") == ["a.txt"]


def test_an_error_leaves_the_old_file_and_no_temporary_one(root):
    write_text(f"{root}/a.txt", "old")
    with pytest.raises(KeyError), open_atomic(f"{root}/a.txt") as file:
        file.write("half")
        raise KeyError
    assert epath.Path(f"{root}/a.txt").read_text() == "old"
    assert names(root) == ["a.txt"]


def test_nothing_is_seen_under_the_name_before_the_end(root):
    with open_atomic(f"{root}/a.bin", "wb") as file:
        file.write(b"12")
        assert not epath.Path(f"{root}/a.bin").exists()
    assert epath.Path(f"{root}/a.bin").read_bytes() == b"12"


def test_open_takes_the_options_of_the_builtin(root):
    with open_atomic(f"{root}/a.csv", newline="") as file:
        file.write("a\r\n")
    assert epath.Path(f"{root}/a.csv").read_bytes() == b"a\r\n"


def test_failures_of_the_file_system_name_the_output(root):
    write_text(f"{root}/a", "a file")
    with pytest.raises(UserError, match="a/b: cannot write"):
        write_text(f"{root}/a/b", "")
    with pytest.raises(UserError, match="is a folder, expected the name of a file"):
        write_text(root, "")
    with pytest.raises(UserError, match="c: cannot write .*No space"), atomic_file(f"{root}/c"):
        raise OSError(28, "No space left on device")


def test_writers_of_one_path_do_not_disturb_each_other(root):
    with open_atomic(f"{root}/a.txt") as first, open_atomic(f"{root}/a.txt") as second:
        first.write("first")
        second.write("second")
    assert epath.Path(f"{root}/a.txt").read_text() == "first"  # the last to end
    with atomic_folder(f"{root}/d") as one, atomic_folder(f"{root}/d") as two:
        (one / "one.txt").write_text("one")
        (two / "two.txt").write_text("two")
    assert names(f"{root}/d") == ["one.txt"]
    assert names(root) == ["a.txt", "d"]


def test_outputs_at_an_address_that_no_storage_serves_are_refused():
    with pytest.raises(UserError, match="https://x/a.txt: found an address of an unknown kind"):
        write_text("https://x/a.txt", "")
    with pytest.raises(UserError, match="found an address"), atomic_folder("https://x/d"):
        pass


def test_json_writes_null_for_numbers_that_are_not_finite(root):
    write_json(f"{root}/a.json", {"map": float("nan"), "aps": [0.5, float("inf")]})
    assert json.loads(epath.Path(f"{root}/a.json").read_text()) == {"map": None, "aps": [0.5, None]}


def test_a_folder_takes_the_place_of_the_one_before(root):
    for text in ("one", "two"):
        with atomic_folder(f"{root}/d") as folder:
            (folder / f"{text}.txt").write_text(text)
    assert names(f"{root}/d") == ["two.txt"]
    with pytest.raises(KeyError), atomic_folder(f"{root}/d") as folder:
        (folder / "three.txt").write_text("three")
        raise KeyError
    assert names(root) == ["d"] and names(f"{root}/d") == ["two.txt"]


def test_a_local_copy_has_the_content_and_goes_away(root):
    write_text(f"{root}/a.txt", "content")
    with local_copy(f"{root}/a.txt") as path:
        assert path.read_text() == "content"
    assert os.path.exists(path) == (not is_remote(root))


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    killed = subprocess.Popen(["true"])
    killed.wait()
    host = platform.node()
    left = [f"x.json.tmp-{host}-{killed.pid}-0123abcd{end}" for end in ("", "-rows", "-scratch")]
    others = [
        f"x.json.tmp-{host}-{os.getppid()}-0123abcd",  # of a process that runs
        f"x.json.tmp-{host}2-{killed.pid}-0123abcd",  # of another machine
        f"y.json.tmp-{host}-{killed.pid}-0123abcd",  # of another output
        "x.json.tmp-notes",
    ]
    for name in (*left[:2], *others):
        (tmp_path / name).write_text("")
    (tmp_path / left[2] / "deep").mkdir(parents=True)
    write_text(tmp_path / "x.json", "new")
    assert sorted(os.listdir(tmp_path)) == sorted(["x.json", *others])


def test_a_folder_moved_aside_by_a_run_that_was_killed_then_comes_back(tmp_path):
    killed = subprocess.Popen(["true"])
    killed.wait()
    for number in range(2):  # the second time a new folder is there
        aside = tmp_path / f"d.old-{platform.node()}-{killed.pid}-0123abc{number}"
        aside.mkdir()
        (aside / "a").write_text("before")
        with pytest.raises(RuntimeError), atomic_folder(tmp_path / "d"):
            raise RuntimeError
        assert os.listdir(tmp_path) == ["d"]
        assert (tmp_path / "d" / "a").read_text() == ("before", "now")[number]
        (tmp_path / "d" / "a").write_text("now")
