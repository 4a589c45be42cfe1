"""What a fleet job may put into its document: JSON in the one reading that every parser shares, small, and not deep.

A device reads it strictly (firmware.strict), so whatever it would refuse is refused here, before anything is signed,
with the place where it stands.

>>> document_problem({"volume": 3, "tones": [1.5, "a"]}) is None
True
>>> document_problem({"tones": [float("inf")]})
'tones[0]: inf is not JSON'
"""

import math
import re
from typing import Any

import orjson

from models.protocol import MAX_DOCUMENT_BYTES, MAX_DOCUMENT_DEPTH

MAX_INTEGER = 2**53 - 1
"""I-JSON's bound (RFC 7493): beyond it parsers differ."""
RESERVED_KEYS = ("operation", "order")
"""Of the job document itself."""

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def document_problem(document: dict[str, Any], reserved: tuple[str, ...] = RESERVED_KEYS) -> str | None:
    """Why no device could be given this document, or with nothing `reserved` this configuration; None when it can."""
    taken = [key for key in reserved if key in document]
    if taken:
        return f"{taken[0]}: the job document has a member of this name already; call yours otherwise"
    problem = _problem(document, "", 1)
    if problem is not None:
        return problem
    size = len(orjson.dumps(document))
    if size > MAX_DOCUMENT_BYTES:
        return (
            f"{size} bytes as JSON, at most {MAX_DOCUMENT_BYTES} expected; put what is large where devices can fetch it"
        )
    return None


def _problem(value: Any, where: str, depth: int) -> str | None:
    match value:
        case None | bool():
            return None
        case str():
            return (
                f"{where or 'it'}: U+0000 or half of a surrogate pair in a text" if _UNSTORABLE.search(value) else None
            )
        case int():
            return None if abs(value) <= MAX_INTEGER else f"{where}: the integer {value!r:.24} is beyond 2**53 - 1"
        case float():
            if not math.isfinite(value):
                return f"{where}: {value} is not JSON"
            # PostgreSQL writes its digits out: it comes back as an integer, which no signed statement may hold.
            return None if abs(value) <= MAX_INTEGER else f"{where}: the number {value!r} is beyond 2**53 - 1"
        case dict() | list():
            return _problem_inside(value, where, depth)
    return f"{where}: {type(value).__name__} is not JSON; write it as a text in quotes"


def _problem_inside(value: dict[Any, Any] | list[Any], where: str, depth: int) -> str | None:
    if depth > MAX_DOCUMENT_DEPTH:
        return f"{where:.100}: nested deeper than {MAX_DOCUMENT_DEPTH} levels"
    if isinstance(value, list):
        entries = ((f"{where}[{number}]", item) for number, item in enumerate(value))
        return next(filter(None, (_problem(item, place, depth + 1) for place, item in entries)), None)
    for key, item in value.items():
        if not isinstance(key, str):
            return f"{where or 'it'}: the key {key!r:.40} is not a text; write it in quotes"
        if _UNSTORABLE.search(key):
            return f"{where or 'it'}: U+0000 or half of a surrogate pair in a key"
        problem = _problem(item, f"{where}.{key}" if where else key, depth + 1)
        if problem is not None:
            return problem
    return None
