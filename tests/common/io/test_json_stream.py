"""Streamed lists hold what json.load finds, whatever the chunk size, and broken files say where."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.io import json_stream
from common.io.errors import UserError

_NUMBER = st.integers(1 - 2**63, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
_TEXT = st.text(st.characters(codec="utf-8"))
_VALUE = st.recursive(
    st.none() | st.booleans() | _NUMBER | _TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(_TEXT, inner),
    max_leaves=8,
)


def _exact(value):
    """Text that tells 1 from 1.0 and -0.0 from 0.0."""
    return json.dumps(value)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(_VALUE, max_size=5),
    st.lists(_VALUE, max_size=5),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_equals_json_load(tmp_path_factory, first, second, chunk, indent, ascii_only):
    path = tmp_path_factory.mktemp("j") / "x.json"
    document = {"info": {"a": [1]}, "a": first, "other": [[2]], "b": second}
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=ascii_only), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        found = list(json_stream.stream_lists(path, ("b", "a")))
    assert _exact(found) == _exact([("b", v) for v in second] + [("a", v) for v in first])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cut off"),
        ('{"images": [{"id": 1}, {"id"', "ends at byte 28, it is cut off"),
        ('{"images": [{"id": 1}', "cut off"),
        ('{"images": [{"id": 1} {"id": 2}]}', "byte 23 .*',' or '\\]'"),
        ('{"images": [\n{"id": 1x}]}', "byte 22 .*invalid char"),
        ('{"images": [NaN]}', "byte 13 "),
        ('{"images": [123456789012345678901234567890]}', "integer overflow"),
        ("[1, 2]", "an object"),
        ("<html>", "byte 1 "),
        ('{"images": {"1": 2}}', "expected a list under 'images'"),
        ('{"pictures": [], "info": {"a": 1}}', "no 'images'; found pictures, info"),
    ],
)
def test_broken_files_say_where(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=f"x.json: .*{message}") as error:
        list(json_stream.stream_lists(tmp_path / "x.json", ("images",)))
    assert "\n" not in str(error.value)


def test_place_of_an_error_behind_the_first_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "_CHUNK", 64)
    text = json.dumps([{"name": "ä" * 10}] * 40, ensure_ascii=False)
    broken = text.encode()[:700] + b"]" + text.encode()[700:]
    (tmp_path / "x.json").write_bytes(broken)
    with pytest.raises(UserError, match="byte 70[0-3] "):
        list(json_stream.stream_list(tmp_path / "x.json"))


def test_lists_may_be_empty_null_or_missing_where_that_is_allowed(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [], "b": null, "c": [1]}')
    found = list(json_stream.stream_lists(path, ("a", "b", "c", "d"), optional=("d",)))
    assert found == [("c", 1)]


def test_compressed_files_and_byte_order_marks(tmp_path):
    with gzip.open(tmp_path / "x.json.gz", "wt", encoding="utf-8-sig") as file:
        file.write("[1, 2.5]")
    assert list(json_stream.stream_list(tmp_path / "x.json.gz")) == [1, 2.5]


def test_an_error_is_one_line_that_can_be_printed_whatever_is_in_it():
    error = UserError("x.json: no field 'a\nb\ud800', found\tc\x1b")
    assert str(error) == "x.json: no field 'a b\\ud800', found c\\x1b"


def _depth(text):
    """Greatest depth of a JSON text, character by character."""
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        else:
            depth += (character in "[{") - (character in "]}")
            deepest = max(deepest, depth)
    return deepest


@settings(deadline=None, max_examples=200)
@given(st.lists(_VALUE | st.text('[]{}\\"a'), max_size=6), st.integers(1, 9))
def test_depth_is_that_outside_of_strings_in_pieces_of_any_size(value, size):
    text = json.dumps(value)
    nesting, data = json_stream._Nesting(), text.encode()
    found = [nesting.deepest(data[i : i + size]) for i in range(0, len(data), size)]
    assert max(found) == _depth(text)


def test_lists_without_end_in_one_another_are_refused_before_they_cost_memory(tmp_path):
    """The path to each takes as many characters as there are lists around it: 9 GB for 60 kB."""
    path = tmp_path / "x.json"
    path.write_text('{"images": [{"id": 1, "a": ' + "[" * 60_000)
    with pytest.raises(UserError, match="nested more than 200 deep between the bytes 0 and 60,0"):
        list(json_stream.stream_lists(path, ["images"]))
    path.write_text('[{"a": ' + "[" * 150 + "]" * 150 + "}]")
    assert len(list(json_stream.stream_list(path))) == 1


def test_half_a_pair_of_surrogates_is_one_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"file_name": "\\udcff\\udcfe.jpg"}]')
    with pytest.raises(UserError, match="x.json: found an escape that is no character"):
        list(json_stream.stream_list(path))
