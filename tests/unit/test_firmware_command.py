"""Commands: exact when read, for one device and one request, never twice, never late, and never one kind for another."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import firmware.envelope
from firmware.command import COMMAND_PAYLOAD_TYPE, Command, decode_command, encode_command, verify_command
from firmware.envelope import open_envelope, sign_envelope
from firmware.errors import (
    EnvelopeError,
    ExpiredError,
    FirmwareError,
    MisdirectedError,
    ReplayError,
    SignatureError,
    StatementError,
)
from firmware.manifest import (
    ORDER_PAYLOAD_TYPE,
    RELEASE_PAYLOAD_TYPE,
    decode_order,
    decode_release,
    encode_order,
    encode_release,
)
from models.protocol import Operation
from tests.unit.firmware_samples import NOW, ORDER, ORDER_KEY, RELEASE, RELEASE_KEY, STRANGER_KEY, TRUSTED

COMMAND = Command("motor-7", "c0" * 16, Operation.ROTATE_CERTIFICATE.value, NOW - 10, NOW + 900, "ab" * 16)


def signed(command: Command = COMMAND, key: Any = ORDER_KEY) -> dict[str, Any]:
    return sign_envelope(encode_command(command), COMMAND_PAYLOAD_TYPE, key)


def verify(envelope: dict[str, Any], device: str = "motor-7", now: int = NOW, **more: Any) -> Any:
    more.setdefault("request_id", COMMAND.request_id)
    return verify_command(envelope, TRUSTED, device, more.pop("finished", frozenset()), now, **more)


def test_a_command_for_this_device_is_accepted_and_moves_the_trusted_time() -> None:
    verified = verify(signed(), latest_known_time=NOW - 1000)
    assert verified.command == COMMAND and verified.operation is Operation.ROTATE_CERTIFICATE
    assert verified.latest_known_time == COMMAND.issued_at


@pytest.mark.parametrize(
    ("envelope", "how", "error"),
    [
        (signed(key=STRANGER_KEY), {}, SignatureError),
        (signed(key=RELEASE_KEY), {}, SignatureError),
        (signed(), {"device": "motor-8"}, MisdirectedError),
        (signed(), {"request_id": "d1" * 16}, MisdirectedError),
        (signed(replace(COMMAND, operation="self-destruct")), {}, MisdirectedError),
        (signed(), {"finished": frozenset({COMMAND.request_id})}, ReplayError),
        (signed(), {"finished": frozenset({COMMAND.nonce})}, ReplayError),
        (signed(), {"now": COMMAND.expires_at}, ExpiredError),
        (signed(), {"now": 0, "latest_known_time": COMMAND.expires_at}, ExpiredError),
        ({**signed(), "payload": signed(replace(COMMAND, device_id="motor-8"))["payload"]}, {}, SignatureError),
        ({}, {}, EnvelopeError),
    ],
)
def test_every_rule_refuses_by_itself(envelope: dict[str, Any], how: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        verify(envelope, **how)


@pytest.mark.parametrize(
    "change",
    [
        {"device_id": "a/b"},
        {"device_id": "#"},
        {"device_id": 7},
        {"request_id": "C0" * 16},
        {"request_id": ""},
        {"operation": "Rotate"},
        {"issued_at": -1},
        {"issued_at": True},
        {"expires_at": NOW - 10},
        {"expires_at": 1.5},
        {"nonce": "x"},
    ],
)
def test_a_command_that_is_not_exact_is_neither_written_nor_read(change: dict[str, Any]) -> None:
    with pytest.raises(StatementError):
        encode_command(replace(COMMAND, **change))


@pytest.mark.parametrize("payload", [b"{}", b"[]", b"", b"{", encode_command(COMMAND)[:-1] + b',"more":1}'])
def test_bytes_with_missing_or_unknown_members_are_no_command(payload: bytes) -> None:
    with pytest.raises(StatementError):
        decode_command(payload)


KINDS: dict[str, tuple[str, bytes, Callable[[bytes], Any]]] = {
    "release": (RELEASE_PAYLOAD_TYPE, encode_release(RELEASE), decode_release),
    "order": (ORDER_PAYLOAD_TYPE, encode_order(ORDER), decode_order),
    "command": (COMMAND_PAYLOAD_TYPE, encode_command(COMMAND), decode_command),
}
ALL_KEYS = (*TRUSTED.release, *TRUSTED.order)
"""Worse than any device: it trusts either key for everything, and still no kind may pass for another."""


@pytest.mark.parametrize("presented", KINDS)
@pytest.mark.parametrize("expected", KINDS)
def test_an_envelope_of_one_kind_is_taken_by_the_verifier_of_that_kind_alone(presented: str, expected: str) -> None:
    payload_type, payload, _ = KINDS[presented]
    envelope = sign_envelope(payload, payload_type, ORDER_KEY)
    if presented == expected:
        assert open_envelope(envelope, KINDS[expected][0], ALL_KEYS) == payload
        return
    with pytest.raises(EnvelopeError):
        open_envelope(envelope, KINDS[expected][0], ALL_KEYS)
    relabelled = {**envelope, "payloadType": KINDS[expected][0]}
    with pytest.raises(SignatureError):
        open_envelope(relabelled, KINDS[expected][0], ALL_KEYS)


@pytest.mark.parametrize("presented", KINDS)
@pytest.mark.parametrize("expected", KINDS)
def test_even_an_envelope_signed_under_the_wrong_type_is_no_statement_of_it(presented: str, expected: str) -> None:
    _, payload, _ = KINDS[presented]
    envelope = sign_envelope(payload, KINDS[expected][0], ORDER_KEY)
    read = KINDS[expected][2]
    if presented == expected:
        read(open_envelope(envelope, KINDS[expected][0], ALL_KEYS))
        return
    with pytest.raises(StatementError):
        read(open_envelope(envelope, KINDS[expected][0], ALL_KEYS))


def test_without_the_type_in_what_is_signed_a_relabelled_envelope_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firmware.envelope.Envelope, "pae", lambda self: bytes(self.payload))
    envelope = sign_envelope(KINDS["order"][1], ORDER_PAYLOAD_TYPE, ORDER_KEY)
    assert open_envelope({**envelope, "payloadType": COMMAND_PAYLOAD_TYPE}, COMMAND_PAYLOAD_TYPE, ALL_KEYS)


def test_a_command_is_refused_as_a_firmware_error() -> None:
    with pytest.raises(FirmwareError, match="it is for device motor-7, this is motor-9"):
        verify(signed(), "motor-9")
