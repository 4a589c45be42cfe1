"""State records as bytes: canonical JSON under a checksum, so that a torn one is recognised and never half believed.

>>> decode_record(encode_record("boot", {"active": "a"}), "boot")
{'active': 'a'}
"""

import hashlib
from typing import Any

import orjson

from agent.errors import RecordError

_DIGEST_CHARS = 32


def encode_record(kind: str, fields: dict[str, Any]) -> bytes:
    """`<checksum> <json>` in one line."""
    body = orjson.dumps({"kind": kind, **fields}, option=orjson.OPT_SORT_KEYS)
    return _digest(body) + b" " + body + b"\n"


def decode_record(data: bytes, kind: str) -> dict[str, Any]:
    """The fields of a record. Raises RecordError for bytes that are not exactly what `encode_record` made."""
    digest, body = data[:_DIGEST_CHARS], data[_DIGEST_CHARS + 1 : -1]
    if data[-1:] != b"\n" or digest != _digest(body):
        raise RecordError(f"cannot read the {kind} record: {len(data)} bytes whose checksum does not hold")
    fields: dict[str, Any] = orjson.loads(body)
    if fields.pop("kind", None) != kind:
        raise RecordError(f"cannot read the {kind} record: it is of another kind")
    return fields


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:_DIGEST_CHARS].encode()
