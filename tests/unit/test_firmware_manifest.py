"""The two statements: canonical when written, exact when read."""

import json
from dataclasses import replace
from typing import Any

import pytest

from firmware.errors import StatementError
from firmware.manifest import (
    MAX_HARDWARE,
    MAX_SECURITY_COUNTER,
    Order,
    ReleaseStatement,
    attempt_key,
    decode_order,
    decode_release,
    encode_order,
    encode_release,
)
from tests.unit.firmware_samples import ORDER, RELEASE

BAD_ORDERS: list[dict[str, Any]] = [
    {"device_id": ""},
    {"device_id": "a/b"},
    {"device_id": "#"},
    {"device_id": "a" * 129},
    {"device_id": "motor-7\n"},
    {"device_id": 7},
    {"device_id": None},
    {"job_id": "motor.1"},
    {"job_id": "a" * 65},
    {"attempt": 0},
    {"attempt": -1},
    {"attempt": True},
    {"attempt": 1.0},
    {"attempt": "1"},
    {"attempt": 1_000_001},
    {"operation": ""},
    {"operation": "Firmware Update"},
    {"release_sha256": "A" * 64},
    {"release_sha256": "a" * 63},
    {"issued_at": -1},
    {"issued_at": 10**15},
    {"expires_at": ORDER.issued_at},
    {"expires_at": 10**15},
    {"nonce": ""},
    {"nonce": "x" * 32},
    {"nonce": "a" * 65},
    {"deltas": ["x"]},
    {"deltas": "a" * 64},
    {"deltas": [["a" * 64]]},
    {"deltas": ["a" * 64] * 65},
    {"deltas": None},
    {"more": 1},
]
BAD_RELEASES: list[dict[str, Any]] = [
    {"product": ""},
    {"product": "../etc"},
    {"version": "1 3"},
    {"version": 1.3},
    {"hardware": []},
    {"hardware": "motor-v1"},
    {"hardware": [""]},
    {"hardware": ["a", "a"]},
    {"hardware": [{}]},
    {"hardware": [["a"]]},
    {"hardware": ["a\u0007"]},
    {"hardware": ["a" * 101]},
    {"hardware": [f"h{n}" for n in range(MAX_HARDWARE + 1)]},
    {"security_counter": -1},
    {"security_counter": MAX_SECURITY_COUNTER + 1},
    {"security_counter": "5"},
    {"sha256": "../../etc/passwd"},
    {"size_bytes": 0},
    {"size_bytes": 2**41},
    {"published_at": -1},
    {"expires_at": RELEASE.published_at},
    {"expires_at": None},
    {"more": 1},
]


def test_statements_are_written_canonically_and_small() -> None:
    assert (
        encode_order(ORDER)
        == json.dumps(json.loads(encode_order(ORDER)), sort_keys=True, separators=(",", ":")).encode()
    )
    assert encode_release(RELEASE).startswith(b'{"expires_at":')
    assert len(encode_order(ORDER)) < 300
    assert len(encode_release(RELEASE)) < 300


def test_optional_fields_are_left_out_or_kept() -> None:
    assert b"expires_at" not in encode_release(replace(RELEASE, expires_at=None))
    assert decode_release(encode_release(replace(RELEASE, expires_at=None))).expires_at is None
    assert b"deltas" not in encode_order(ORDER)
    for deltas in ((), ("ab" * 32,)):
        assert decode_order(encode_order(replace(ORDER, deltas=deltas))).deltas == deltas


@pytest.mark.parametrize("change", BAD_ORDERS, ids=str)
def test_an_order_with_a_wrong_field_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(StatementError, match=f"order: .*{next(iter(change))}|order: an optional value is null"):
        decode_order(json.dumps(json.loads(encode_order(ORDER)) | change).encode())


@pytest.mark.parametrize("change", BAD_RELEASES, ids=lambda change: str(change)[:40])
def test_a_release_with_a_wrong_field_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(StatementError, match=f"release: .*{next(iter(change))}|release: an optional value is null"):
        decode_release(json.dumps(json.loads(encode_release(RELEASE)) | change).encode())


@pytest.mark.parametrize("name", [field for field in Order.__dataclass_fields__ if field != "deltas"])
def test_an_order_without_a_field_is_refused(name: str) -> None:
    fields = json.loads(encode_order(ORDER))
    del fields[name]
    with pytest.raises(StatementError, match=f"missing {name}"):
        decode_order(json.dumps(fields).encode())


@pytest.mark.parametrize("name", [field for field in ReleaseStatement.__dataclass_fields__ if field != "expires_at"])
def test_a_release_without_a_field_is_refused(name: str) -> None:
    fields = json.loads(encode_release(RELEASE))
    del fields[name]
    with pytest.raises(StatementError, match=f"missing {name}"):
        decode_release(json.dumps(fields).encode())


def test_what_no_device_would_accept_is_not_written_either() -> None:
    with pytest.raises(StatementError, match="order: attempt is 0"):
        encode_order(replace(ORDER, attempt=0))
    with pytest.raises(StatementError, match="release: hardware"):
        encode_release(replace(RELEASE, hardware=()))


@pytest.mark.parametrize("payload", [b"[]", b"7", b'"order"', b"null"])
def test_a_statement_that_is_no_object_is_refused(payload: bytes) -> None:
    for decode in (decode_order, decode_release):
        with pytest.raises(StatementError, match="expected an object"):
            decode(payload)


def test_an_attempt_is_named_by_job_and_number() -> None:
    assert ORDER.key == attempt_key("motor-1_3_0", 2) == "motor-1_3_0:2"
