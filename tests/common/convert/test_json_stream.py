"""Streamed JSON holds what json.load finds, whatever the chunk size, and broken files say where."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.convert import json_stream
from common.io.errors import UserError

_SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_VALUE = st.recursive(
    _SCALAR, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


def _collect(path):
    result = {}
    for key, value in json_stream.stream_json(path):
        result.setdefault(key, []).append(value)
    return result


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(st.text(), _VALUE, max_size=5),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_equals_json_load(tmp_path_factory, document, chunk, indent, ascii_only):
    path = tmp_path_factory.mktemp("j") / "x.json"
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    try:
        path.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:  # lone surrogates cannot be written
        return
    expected = {
        key: (value if value else [None]) if isinstance(value, list) else [value]
        for key, value in document.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        assert _collect(path) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cut off"),
        ('{"images": [{"id": 1}, {"id"', "cut off"),
        ('{"images": [{"id": 1}', "cut off"),
        ('{"images": [{"id": 1} {"id": 2}]}', "character 22 .*',' or '\\]' in a list"),
        ('{"images": [{"id": 1x}]}', "character 20"),
        ("[1, 2]", "an object"),
        ("<html>", "an object"),
    ],
)
def test_broken_files_say_where(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=f"x.json: .*{message}"):
        _collect(tmp_path / "x.json")
