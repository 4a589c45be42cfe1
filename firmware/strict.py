"""One strict reading of JSON, for bytes whose signature already holds.

Python's `json` takes duplicate keys (the last wins), NaN, `\\u0000`, lone surrogates, integers of any length and
UTF-16; another parser may read the same signed bytes differently, or PostgreSQL may refuse what Python took. Here each
of them is an error (RFC 8259 section 4 and 8, RFC 7493 "I-JSON").

>>> parse_strict(b'{"attempt":1}', max_bytes=100)
{'attempt': 1}
"""

import json
import math
import re
from typing import Any, Never

from firmware.errors import StatementError

MAX_DEPTH = 6
MAX_INTEGER = 2**53 - 1
"""I-JSON's bound: beyond it parsers differ."""

_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_BOM = b"\xef\xbb\xbf"


def parse_strict(data: bytes, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> Any:
    """Parse JSON in the one reading that every parser shares; raises StatementError for anything else.

    Args:
        data: UTF-8, without a byte order mark.
        max_bytes: longer data is refused unread.
        max_depth: deepest nesting of arrays and objects.
    """
    if len(data) > max_bytes:
        raise StatementError(f"cannot read JSON: {len(data)} bytes, at most {max_bytes} expected")
    _check_depth(data, max_depth)
    try:
        text = data.decode("utf-8")
        if data.startswith(_BOM):
            raise StatementError("cannot read JSON: it starts with a byte order mark")
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise StatementError(f"cannot read JSON: {error}") from error
    if b"\\" in data:  # without an escape, UTF-8 that decoded holds neither NUL nor surrogates inside a JSON string
        _check_strings(value)
    return value


def _check_depth(data: bytes, max_depth: int) -> None:
    if data.count(b"[") + data.count(b"{") <= max_depth:
        return
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(data):
        first = token[0][:1]
        if first in b"[{":
            depth += 1
            if depth > max_depth:
                raise StatementError(f"cannot read JSON: nested deeper than {max_depth}")
        elif first in b"]}":
            depth -= 1


def _check_strings(value: Any) -> None:
    if isinstance(value, str):
        if _UNSTORABLE.search(value):
            raise StatementError("cannot read JSON: a string holds U+0000 or a lone surrogate")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key)
            _check_strings(item)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise StatementError(f"cannot read JSON: the key {twice[:64]!r} stands there twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 17 or not -MAX_INTEGER <= (number := int(digits)) <= MAX_INTEGER:
        raise StatementError(f"cannot read JSON: the integer {digits[:20]} is beyond 2**53 - 1")
    return number


def _float(digits: str) -> float:
    if len(digits) > 40 or not math.isfinite(number := float(digits)):
        raise StatementError(f"cannot read JSON: the number {digits[:20]} is out of range")
    return number


def _constant(name: str) -> Never:
    raise StatementError(f"cannot read JSON: {name} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant, strict=True
)
