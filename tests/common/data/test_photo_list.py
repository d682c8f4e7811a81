"""Files, folders, patterns and lists become photos with paths below one folder."""

import pytest

from common.data.photo_list import find_photos
from common.io.errors import UserError
from tests.remote import use_fake_store

FILES = ["a.jpg", "b/c.PNG", "b/d/e.webp", "b/notes.md", "b/.hidden.jpg", ".thumbs/f.jpg"]


@pytest.fixture
def folder(tmp_path):
    for name in FILES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("", ["a.jpg", "b/c.PNG", "b/d/e.webp"]),
        ("/b", ["c.PNG", "d/e.webp"]),
        ("/**/*.webp", ["b/d/e.webp"]),
        ("/b/*", ["c.PNG"]),
        ("/*.jpg", ["a.jpg"]),
        ("/[ab].jpg", ["a.jpg"]),
        ("/b/notes.md", ["notes.md"]),  # a file that is named is taken as it is
    ],
)
def test_names_are_paths_below_the_folder_that_is_named(folder, value, names):
    photos = find_photos([f"{folder}{value}"])
    assert photos.names == names
    assert all((folder.__class__(file)).is_file() for file in photos.files)


def test_several_values_and_lists_share_a_folder(folder, monkeypatch):
    photos = find_photos([f"{folder}/a.jpg,{folder}/b/*.PNG", f"{folder}/b/d", f"{folder}/a.jpg"])
    assert photos.root == f"{folder}/" and photos.names == ["a.jpg", "b/c.PNG", "b/d/e.webp"]
    (folder / "list.txt").write_text(f"a.jpg\n\n{folder}/b/c.PNG\n")
    monkeypatch.chdir(folder)
    assert find_photos(["list.txt"]).names == ["a.jpg", "b/c.PNG"]


def test_a_name_with_commas_and_brackets_is_a_file_if_there_is_one(folder):
    (folder / "one, two [3].jpg").touch()
    assert find_photos([f"{folder}/one, two [3].jpg"]).names == ["one, two [3].jpg"]


def test_other_files_are_counted_and_no_photos_are_an_error(folder):
    assert find_photos([f"{folder}"]).left_out == 1
    for value, text in (
        ("/*.md", "found nothing, expected photos"),
        ("/b/*.md", r"found 1 files, expected photos \(\.jpg"),
        ("/nowhere", "no such file or folder"),
        ("/no.txt", "cannot read this list"),
    ):
        with pytest.raises(UserError, match=text):
            find_photos([f"{folder}{value}"])


def test_addresses_are_listed_as_folders_are(folder, monkeypatch):
    use_fake_store(monkeypatch, folder.parent)
    assert find_photos(["gs://photos"]).files == [
        f"gs://photos/{name}" for name in ("a.jpg", "b/c.PNG", "b/d/e.webp")
    ]
    assert find_photos(["gs://photos/b/*"]).names == ["c.PNG"]
    assert find_photos(["gs://photos/**/*.webp"]).files == ["gs://photos/b/d/e.webp"]
    assert find_photos(["gs://photos/b/c.PNG"]).root == "gs://photos/b/"
    with pytest.raises(UserError, match="expected one kind of storage"):
        find_photos([f"{folder}/a.jpg", "gs://photos/a.jpg"])
