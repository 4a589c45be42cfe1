"""One JSON object, read so that PostgreSQL can hold it and every parser reads it alike.

Python's own reader takes NaN, a key twice (the last wins), U+0000 and half a surrogate pair; PostgreSQL's jsonb does not.
Each of them is a ValueError here that says what was found and where.

>>> parse_object('{"interval": 5}')
{'interval': 5}

This reader costs some thirty times what orjson does. Where messages are many, orjson reads them, and `reads_alike` says of
nearly all of them that this reader would have read the same.
"""

import json
import re
from math import isfinite
from typing import Any

import orjson

from domain.mistakes import shown

MAX_DEPTH = 20
MAX_INTEGER_DIGITS = 20
"""With the sign; longer numbers are not even turned into integers."""


def parse_object(text: str) -> dict[str, Any]:
    """Parse one object; raises ValueError saying what is wrong, also for any other JSON value."""
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth_of(text) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    try:
        value = _DECODER.decode(text.strip(" \t\r\n"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at position {error.pos + 1}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {shown(value)}")
    if "\\u" in text and _has_unstorable(value):  # decoded UTF-8 has such characters only by way of an escape
        raise ValueError("contains a character that cannot be stored: U+0000, or half of a surrogate pair")
    return value


def reads_alike(payload: bytes, value: Any) -> bool:
    """Whether `parse_object` would surely make the same of `payload` as orjson has (`value`); False: ask it.

    Without an escape each key and each text is two quotation marks, as it was written and as it is written again. So a key
    that stood twice, which orjson drops, shows in their number. Escapes alone bring U+0000 and halves of surrogate pairs.
    Integers beyond 53 bits are left to the exact reader; those beyond 64 have become floats and are found by their length.
    """
    if b"\\" in payload or payload.count(b"{") + payload.count(b"[") > MAX_DEPTH:
        return False
    try:
        again = orjson.dumps(value, option=orjson.OPT_STRICT_INTEGER)
    except orjson.JSONEncodeError:
        return False
    return again == payload or (again.count(b'"') == payload.count(b'"') and not _LONG_NUMBER.search(payload))


_LONG_NUMBER = re.compile(rb"[0-9]{19}")


def _depth_of(text: str) -> int:
    depth = deepest = 0
    in_string = escaped = False
    for char in text:
        if in_string:
            in_string = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            in_string = True
        elif char in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "}]":
            depth -= 1
    return deepest


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {shown(next(key for key in keys if keys.count(key) > 1))} stands twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def _bounded(text: str) -> int:
    if len(text) > MAX_INTEGER_DIGITS or not -(2**63) <= (value := int(text)) < 2**63:
        raise ValueError(f"the number {shown(text)} does not fit 64 bits")
    return value


def _has_unstorable(value: Any) -> bool:
    if isinstance(value, str):
        return any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)
    if isinstance(value, dict):
        return any(_has_unstorable(key) or _has_unstorable(inner) for key, inner in value.items())
    return isinstance(value, list) and any(_has_unstorable(inner) for inner in value)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_no_key_twice, parse_constant=_no_constant, parse_float=_finite, parse_int=_bounded
)
