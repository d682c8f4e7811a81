"""~ stands for the home folder wherever a path begins in a flag."""

import pytest

from common.io.home import expand_home


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("~/x", "/h/x"),
        ("a=~/a.parquet,b=~/b.parquet", "a=/h/a.parquet,b=/h/b.parquet"),
        ("~/a,~/b", "/h/a,/h/b"),
        (["~/a", "b"], ["/h/a", "b"]),
        ("gs://bucket/~/x", "gs://bucket/~/x"),
        ("notes~/x", "notes~/x"),
        ("~", "~"),
        (7, 7),
    ],
)
def test_home(monkeypatch, given, expanded):
    monkeypatch.setenv("HOME", "/h")
    assert expand_home(given) == expanded
