"""Small JSON files, with one line for every way to be broken."""

import json
import unicodedata
from typing import Any

from common.io.errors import UserError
from common.io.paths import PathLike, check_regular, local_copy


def read_json(path: PathLike) -> Any:
    """The value that a JSON file holds, local or behind an address such as gs://bucket/name.

    Raises:
      OSError: no such file, or it cannot be read.
      UserError: it is no JSON in UTF-8.
    """
    check_regular(path)
    with local_copy(path) as local:
        return parse_json(local.read_bytes(), path)


def read_object(path: PathLike) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object.

    Raises:
      OSError: no such file, or it cannot be read.
      UserError: it is no JSON in UTF-8, or no object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def parse_json(text: bytes | str, where: object) -> Any:
    """The value of a JSON text.

    Args:
      text: the text, in UTF-8 if it is bytes; a byte order mark is passed over.
      where: name of the file or field, for messages.

    Raises:
      UserError: it is no JSON: NaN and infinite numbers are none, nor is a text that has half of a
        pair of surrogates or is nested thousands of times.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(decoded, parse_constant=_refuse)
        if "\\u" in decoded.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a pair has no encoding
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error})") from error
    except ValueError as error:
        raise UserError(f"{where}: no valid JSON ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise UserError(f"{where}: no usable JSON, it is nested too deep") from error
    return value


def text_id(value: Any) -> str:
    """An id as text: 3, 3.0 and "3" are the same, composed letters too; 3.5 and null are none.

    Raises:
      ValueError, TypeError, OverflowError: no id.
    """
    if isinstance(value, str):
        if not value.strip() or not value.isprintable():  # half of a pair of surrogates is not
            raise ValueError(f"id {value!r:.40}")
        return unicodedata.normalize("NFC", value.strip())
    return str(whole(value))


def whole(value: Any) -> int:
    """A number or a size; 3.0 counts, 3.5 and truths do not.

    Raises:
      ValueError, TypeError, OverflowError: no whole number of 64 bits.
    """
    if isinstance(value, bool) or int(value) != value or abs(value) >= 1 << 63:
        raise ValueError(f"{value!r:.40} is no whole number")
    return int(value)


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
