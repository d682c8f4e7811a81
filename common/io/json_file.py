"""Small JSON files, with one line for every way to be broken."""

import json
from typing import Any

from common.io.errors import UserError
from common.io.paths import PathLike, local_copy


def read_json(path: PathLike) -> Any:
    """The value that a JSON file holds, local or behind an address such as gs://bucket/name.

    Raises:
      OSError: no such file, or it cannot be read.
      UserError: it is no JSON in UTF-8.
    """
    with local_copy(path) as local:
        return parse_json(local.read_bytes(), path)


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


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
