"""The third signed statement: what a device is to do with its identity (rotate its certificate, wipe its credentials).

A command is signed by the order key when the device asks for it, for this device alone, for one request, and for minutes.
It has a payload type of its own, so that neither an order nor a release can be presented as a command, nor a command as
one of them. Encoding and reading are as strict as in firmware.manifest.

>>> command = Command("motor-7", "a" * 32, "rotate-certificate", 1000, 1900, "b" * 32)
>>> decode_command(encode_command(command)) == command
True
"""

import re
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, fields
from typing import Any

import orjson

from firmware.envelope import open_envelope
from firmware.errors import ExpiredError, MisdirectedError, ReplayError
from firmware.keys import TrustedKeys
from firmware.manifest import LAST_SECOND, NONCE, OPERATION, check_integer, check_text, read_fields
from models.ids import THING_NAME
from models.protocol import Operation

COMMAND_PAYLOAD_TYPE = "application/vnd.tidegate.command.v1+json"

REQUEST_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Command:
    """What one device is to do, once. Times are epoch seconds."""

    device_id: str
    request_id: str
    operation: str
    issued_at: int
    expires_at: int
    nonce: str


@dataclass(frozen=True, slots=True)
class VerifiedCommand:
    """A command that may be carried out. `latest_known_time`: the new value of what the device keeps under this name."""

    command: Command
    operation: Operation
    latest_known_time: int


def encode_command(command: Command) -> bytes:
    """Canonical bytes to be signed. Raises StatementError for a command that no device would accept."""
    _check(command)
    return orjson.dumps(asdict(command), option=orjson.OPT_SORT_KEYS)


def decode_command(payload: bytes) -> Command:
    """The command in verified bytes. Raises StatementError."""
    command = Command(**read_fields(payload, "command", _FIELDS))
    _check(command)
    return command


def verify_command(
    envelope: Mapping[str, Any],
    keys: TrustedKeys,
    device_id: str,
    finished: Set[str],
    now: int,
    *,
    request_id: str,
    latest_known_time: int = 0,
) -> VerifiedCommand:
    """The command in `envelope`, if this device may carry it out.

    Args:
        envelope: `order` of a command request (docs/protocol.md), as parsed from JSON; it is not changed.
        keys: the keys the device was made with.
        device_id: who it is.
        finished: request ids and nonces of commands that have ended on it, however; to be kept through power cuts.
        now: the device's clock, in epoch seconds; it may be wrong.
        request_id: the one beside the envelope, to which the device will answer.
        latest_known_time: the latest moment the device has seen signed; the time used is never before it.

    Raises:
        FirmwareError: the first rule that did not hold.
    """
    command = decode_command(open_envelope(envelope, COMMAND_PAYLOAD_TYPE, keys.order))
    if command.device_id != device_id:
        raise MisdirectedError(f"refused the command: it is for device {command.device_id}, this is {device_id}")
    if command.request_id != request_id:
        raise MisdirectedError(
            f"refused the command: it is for request {command.request_id}, it came with {request_id!r:.64}"
        )
    if command.operation not in frozenset(Operation):
        raise MisdirectedError(
            f"refused the command: it is to {command.operation}, expected one of {', '.join(Operation)}"
        )
    if command.request_id in finished or command.nonce in finished:
        raise ReplayError(f"refused the command: request {command.request_id} has ended here")
    latest = max(latest_known_time, command.issued_at)
    if max(now, latest) >= command.expires_at:
        raise ExpiredError(f"refused the command: it was valid until {command.expires_at}, it is {max(now, latest)}")
    return VerifiedCommand(command, Operation(command.operation), latest)


_FIELDS = frozenset(field.name for field in fields(Command))


def _check(command: Command) -> None:
    check_text(command.device_id, THING_NAME, "command", "device_id")
    check_text(command.request_id, REQUEST_ID, "command", "request_id")
    check_text(command.operation, OPERATION, "command", "operation")
    check_integer(command.issued_at, 0, LAST_SECOND, "command", "issued_at")
    check_integer(command.expires_at, command.issued_at + 1, LAST_SECOND, "command", "expires_at")
    check_text(command.nonce, NONCE, "command", "nonce")
