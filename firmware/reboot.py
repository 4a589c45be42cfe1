"""The fourth signed statement: one device may reboot, once, now. It is what a reboot's `confirmationToken` holds.

There is nothing to guess: the token is an envelope signed by the order key, bound to the device, the request and the
delay, valid for five minutes at most, with a nonce of 128 bits or more. It has a payload type of its own, so that no
other statement can be presented as one. The device keeps no secret to compare with: checking a signature against a
public key takes as long for a near miss as for noise, and would tell nothing if it did not.

>>> order = RebootOrder("motor-7", "a" * 32, "reboot", 10, 1000, 1300, "b" * 32)
>>> decode_reboot(encode_reboot(order)) == order
True
"""

import re
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, fields
from typing import Any

import orjson

from firmware.command import REQUEST_ID
from firmware.envelope import EnvelopeSigner, open_envelope
from firmware.errors import EnvelopeError, ExpiredError, MisdirectedError, ReplayError, StatementError
from firmware.keys import TrustedKeys
from firmware.manifest import LAST_SECOND, OPERATION, check_integer, check_text, read_fields
from firmware.strict import parse_strict
from models.ids import THING_NAME

REBOOT_PAYLOAD_TYPE = "application/vnd.tidegate.reboot.v1+json"
REBOOT = "reboot"
MAX_LIFETIME_SECONDS = 300
MAX_DELAY_SECONDS = 3600
"""Longer than anybody waits for a reboot; an order that lies on a device for days would surprise everybody."""
MAX_TOKEN_BYTES = 4096
NONCE = re.compile(r"[0-9a-f]{32,64}")
"""128 bits at least."""


@dataclass(frozen=True, slots=True)
class RebootOrder:
    """Times are epoch seconds."""

    device_id: str
    request_id: str
    operation: str
    delay_seconds: int
    issued_at: int
    expires_at: int
    nonce: str


@dataclass(frozen=True, slots=True)
class VerifiedReboot:
    """A reboot that may be carried out. `latest_known_time`: the new value of what the device keeps under this name."""

    order: RebootOrder
    latest_known_time: int


def encode_reboot(order: RebootOrder) -> bytes:
    """Canonical bytes to be signed. Raises StatementError for an order that no device would accept."""
    _check(order)
    return orjson.dumps(asdict(order), option=orjson.OPT_SORT_KEYS)


def decode_reboot(payload: bytes) -> RebootOrder:
    """The order in verified bytes. Raises StatementError."""
    order = RebootOrder(**read_fields(payload, "reboot order", _FIELDS))
    _check(order)
    return order


def reboot_token(order: RebootOrder, signer: EnvelopeSigner) -> str:
    """The `confirmationToken`: the envelope as compact JSON text."""
    return orjson.dumps(signer.sign(encode_reboot(order))).decode()


def verify_reboot(
    token: object,
    keys: TrustedKeys,
    device_id: str,
    used: Set[str],
    now: int,
    *,
    request_id: str,
    delay_seconds: int,
    latest_known_time: int = 0,
) -> VerifiedReboot:
    """The order in `token`, if this device may reboot by it.

    Args:
        token: `confirmationToken` as it came.
        keys: the keys the device was made with.
        device_id: who it is.
        used: request ids and nonces by which it has rebooted; to be kept through power cuts.
        now: the device's clock, in epoch seconds; it may be wrong.
        request_id: the one beside the token.
        delay_seconds: the one beside the token.
        latest_known_time: the latest moment the device has seen signed; the time used is never before it.

    Raises:
        FirmwareError: the first rule that did not hold.
    """
    if not isinstance(token, str):
        raise EnvelopeError("refused the reboot: confirmationToken: expected a signed order as text")
    envelope: Any = parse_strict(token.encode("utf-8", "surrogatepass"), max_bytes=MAX_TOKEN_BYTES)
    if not isinstance(envelope, Mapping):
        raise EnvelopeError("refused the reboot: confirmationToken: expected a signed order")
    order = decode_reboot(open_envelope(envelope, REBOOT_PAYLOAD_TYPE, keys.order))
    if order.device_id != device_id:
        raise MisdirectedError(f"refused the reboot: it is for device {order.device_id}, this is {device_id}")
    if order.request_id != request_id:
        raise MisdirectedError(
            f"refused the reboot: it is for request {order.request_id}, it came with {request_id!r:.64}"
        )
    if order.delay_seconds != delay_seconds:
        raise MisdirectedError(
            f"refused the reboot: it is after {order.delay_seconds} s, it came with {delay_seconds!r:.20}"
        )
    if order.request_id in used or order.nonce in used:
        raise ReplayError(f"refused the reboot: request {order.request_id} has been used here")
    latest = max(latest_known_time, order.issued_at)
    if max(now, latest) >= order.expires_at:
        raise ExpiredError(f"refused the reboot: it was valid until {order.expires_at}, it is {max(now, latest)}")
    return VerifiedReboot(order, latest)


_FIELDS = frozenset(field.name for field in fields(RebootOrder))


def _check(order: RebootOrder) -> None:
    what = "reboot order"
    check_text(order.device_id, THING_NAME, what, "device_id")
    check_text(order.request_id, REQUEST_ID, what, "request_id")
    check_text(order.operation, OPERATION, what, "operation")
    if order.operation != REBOOT:
        raise StatementError(f"cannot accept the {what}: operation: expected {REBOOT}, found {order.operation:.40}")
    check_integer(order.delay_seconds, 0, MAX_DELAY_SECONDS, what, "delay_seconds")
    check_integer(order.issued_at, 0, LAST_SECOND, what, "issued_at")
    check_integer(order.expires_at, order.issued_at + 1, order.issued_at + MAX_LIFETIME_SECONDS, what, "expires_at")
    check_text(order.nonce, NONCE, what, "nonce")
