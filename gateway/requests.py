"""From a message's bytes to a request, or to the reason why it is none. Pure.

The client token is found before anything else is judged, so that a rejection can carry it. What cannot be stored
(`\\u0000`, invalid UTF-8, NaN) is refused here, before it can reach PostgreSQL, and so is what two readers could read
differently: a key twice, numbers beyond 64 bits, more depth than anybody needs.
"""

import itertools
import re
from dataclasses import dataclass, field
from typing import Any

import orjson

from domain.configurations import MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH, MAX_VERSION, ConfigReport
from domain.differences import depth_of
from domain.ledger_rows import Report
from domain.strict_json import parse_object, reads_alike
from firmware.command import REQUEST_ID
from gateway.diagnostic_requests import DiagnosticResponse, parse_diagnostic
from gateway.pulse import Pulse, parse_pulse
from gateway.shadow_requests import ShadowError, ShadowRequest, parse_shadow, refuse_shadow, token_of
from models.protocol import (
    MAX_CLIENT_TOKEN_BYTES,
    MAX_REQUEST_BYTES,
    MAX_STATUS_DETAILS,
    MAX_STATUS_VALUE_CHARS,
    CommandStatus,
    ErrorCode,
    ExecutionState,
    RequestTopic,
    Verb,
)

_MAX_INTEGER = 2**53
_DEVICE_STATES = {
    state.value: state
    for state in (
        ExecutionState.IN_PROGRESS,
        ExecutionState.SUCCEEDED,
        ExecutionState.FAILED,
        ExecutionState.REJECTED,
    )
}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BOOT_ID = re.compile(r"[!-~]{1,64}")
_SHADOW_VERBS = frozenset({Verb.SHADOW_GET, Verb.SHADOW_UPDATE, Verb.SHADOW_DELETE})
MAX_REASON_CHARS = 500
MAX_EXTRA = 20
"""Numbers of its own that a heartbeat may carry; the others are dropped."""


@dataclass(slots=True)
class Heartbeat:
    """What a heartbeat says, in the units of the presence table; `device_time` in epoch seconds.

    The last three are its place in a batch (gateway/beats.py); what it says is never changed.
    """

    device_id: str
    device_time: float | None
    uptime: int | None
    free_memory: int | None
    cpu_temperature: float | None
    firmware_version: str | None
    firmware_sha256: str | None
    signal_strength: float | None
    error_count: int | None
    boot_id: str | None
    extra: dict[str, float] | None
    beat_no: int = field(default=0, compare=False)
    """Of those of its device, from 0."""
    round: int = field(default=0, compare=False)
    newest: bool = field(default=True, compare=False)
    """Of its device in its round."""


@dataclass(frozen=True, slots=True)
class CommandResponse:
    """What a device answers to a command."""

    request_id: str
    status: CommandStatus
    reason: str


@dataclass(slots=True)
class Request:
    """A well-formed request. Not to be changed once it waits; not frozen, because one is made for each message."""

    topic: RequestTopic
    token: str | None = None
    details: dict[str, str] | None = None
    report: Report | None = None
    want_state: bool = False
    want_document: bool = False
    heartbeat: Heartbeat | None = None
    config: ConfigReport | None = None
    document_version: int | None = None
    """CONFIG_UPDATE: the version of the shadow document that the device believes to be the current one."""
    response: CommandResponse | None = None
    shadow: ShadowRequest | None = None
    diagnostic: DiagnosticResponse | None = None
    pulse: Pulse | None = None
    duplicate: bool = False
    """The broker says that it may have delivered this before: what has been done already is not done again."""


@dataclass(frozen=True, slots=True)
class BadRequest:
    """Why a message is no request."""

    code: ErrorCode
    message: str
    token: str | None = None
    shadow_code: int = 400
    """The code of the rejection where the request is one to a shadow."""


def parse_request(topic: RequestTopic, payload: bytes) -> Request | BadRequest:
    """Judge a payload."""
    if len(payload) > MAX_REQUEST_BYTES:
        message = f"{len(payload)} bytes, at most {MAX_REQUEST_BYTES} are accepted"
        if topic.verb in _SHADOW_VERBS:
            message = f"The payload exceeds the maximum size allowed: {message}"
            return BadRequest(ErrorCode.INVALID_REQUEST, message, token_of(payload), 413)
        return BadRequest(ErrorCode.INVALID_REQUEST, message, shadow_code=413)
    try:
        body = orjson.loads(payload) if payload else {}
    except orjson.JSONDecodeError as error:
        if topic.verb in _SHADOW_VERBS:
            code, message = refuse_shadow(payload)
            return BadRequest(ErrorCode.INVALID_JSON, message, shadow_code=code)
        return BadRequest(ErrorCode.INVALID_JSON, f"not JSON: {error}"[:200])
    if not isinstance(body, dict):
        return BadRequest(ErrorCode.INVALID_JSON, f"expected an object, got {type(body).__name__}")
    token = body.get("clientToken")
    if token is not None and (
        not isinstance(token, str) or "\x00" in token or len(token.encode()) > MAX_CLIENT_TOKEN_BYTES
    ):
        return BadRequest(
            ErrorCode.INVALID_REQUEST, f"clientToken: expected text of at most {MAX_CLIENT_TOKEN_BYTES} bytes"
        )
    if not reads_alike(payload, body):
        try:
            body = parse_object(payload.decode())
        except ValueError as error:
            return BadRequest(ErrorCode.INVALID_JSON, str(error)[:300], token)
    try:
        if topic.verb is Verb.HEARTBEAT:
            return Request(topic, heartbeat=_heartbeat(topic.thing, body))
        return _request(topic, token, body, payload)
    except ShadowError as error:
        return BadRequest(ErrorCode.INVALID_REQUEST, str(error)[:300], token, error.code)
    except ValueError as error:
        return BadRequest(ErrorCode.INVALID_REQUEST, str(error)[:300], token)


def _request(topic: RequestTopic, token: str | None, body: dict[str, Any], payload: bytes) -> Request:
    match topic.verb:
        case Verb.UPDATE:
            return _update(topic, token, body)
        case Verb.PULSE:
            return Request(topic, pulse=parse_pulse(body))
        case Verb.GET_PENDING | Verb.START_NEXT | Verb.DESCRIBE:
            return Request(topic, token, details=_details(body))
        case Verb.CONFIG_UPDATE:
            return Request(topic, token, config=_config(body), document_version=_integer(body, "version"))
        case Verb.SHADOW_GET | Verb.SHADOW_UPDATE | Verb.SHADOW_DELETE:
            return Request(topic, token, shadow=parse_shadow(topic, body, payload))
        case Verb.DIAGNOSTIC_RESPONSE:
            return Request(topic, token, diagnostic=parse_diagnostic(body))
        case Verb.COMMAND_RESPONSE:
            return Request(topic, token, response=_response(body))
        case _:
            return Request(topic, token)


def _config(body: dict[str, Any]) -> ConfigReport:
    state = body.get("state")
    if not isinstance(state, dict):
        raise ValueError('state: expected {"reported": {"version": ..., "config": ...}}')
    if "desired" in state:
        raise ShadowError(403, "state.desired: what is wanted is the server's; a device updates state.reported alone")
    reported = state.get("reported")
    if not isinstance(reported, dict) or len(state) != 1:
        raise ValueError("state: expected an object reported, and nothing else")
    if unknown := reported.keys() - {"version", "config"}:
        raise ValueError(f"state.reported: expected version and config, got {min(unknown)!r:.60} as well")
    version, config = reported.get("version"), reported.get("config")
    if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= MAX_VERSION:
        raise ValueError(f"state.reported.version: expected an integer from 0 to {MAX_VERSION}, got {version!r:.40}")
    if "config" not in reported:
        return ConfigReport(version)
    if not isinstance(config, dict):
        raise ValueError(f"state.reported.config: expected an object, got {type(config).__name__}")
    if depth_of(config) > MAX_CONFIG_DEPTH:
        raise ValueError(f"state.reported.config: nested deeper than {MAX_CONFIG_DEPTH} levels")
    if (size := len(orjson.dumps(config))) > MAX_CONFIG_BYTES:
        raise ShadowError(413, f"state.reported.config: {size} bytes, at most {MAX_CONFIG_BYTES} are accepted")
    return ConfigReport(version, config)


def _response(body: dict[str, Any]) -> CommandResponse:
    request_id, status, reason = body.get("requestId"), body.get("status"), body.get("reason") or ""
    if not isinstance(request_id, str) or not REQUEST_ID.fullmatch(request_id):
        raise ValueError(f"requestId: expected 32 hexadecimal digits, got {request_id!r:.80}")
    if not isinstance(status, str) or status not in frozenset(CommandStatus):
        raise ValueError(f"status: expected one of {', '.join(CommandStatus)}, got {status!r:.60}")
    if not isinstance(reason, str) or len(reason) > MAX_REASON_CHARS:
        raise ValueError(f"reason: expected text of at most {MAX_REASON_CHARS} characters")
    return CommandResponse(request_id, CommandStatus(status), reason)


def _update(topic: RequestTopic, token: str | None, body: dict[str, Any]) -> Request:
    status = _DEVICE_STATES.get(str(body.get("status")))
    if status is None:
        raise ValueError(f"status: expected one of {', '.join(_DEVICE_STATES)}, got {body.get('status')!r:.60}")
    report = Report(
        status, _details(body), _integer(body, "expectedVersion", lenient=True), _integer(body, "executionNumber", True)
    )
    return Request(
        topic,
        token,
        report=report,
        want_state=body.get("includeJobExecutionState") is True,
        want_document=body.get("includeJobDocument") is True,
    )


def _details(body: dict[str, Any]) -> dict[str, str] | None:
    details = body.get("statusDetails")
    if details is None:
        return None
    if not isinstance(details, dict) or len(details) > MAX_STATUS_DETAILS:
        raise ValueError(f"statusDetails: expected an object of at most {MAX_STATUS_DETAILS} pairs")
    for key, value in details.items():
        if not isinstance(value, str) or len(value) > MAX_STATUS_VALUE_CHARS or len(key) > 128:
            raise ValueError(f"statusDetails.{key:.40}: expected text of at most {MAX_STATUS_VALUE_CHARS} characters")
        if "\x00" in value or "\x00" in key:
            raise ValueError(f"statusDetails.{key!r:.40}: the character U+0000 is not accepted")
    return details


def _integer(body: dict[str, Any], name: str, lenient: bool = False) -> int | None:
    """An integer; `lenient` also takes one written as text, as AWS's first SDK sends it."""
    value = body.get(name)
    if value is None:
        return None
    if lenient and isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{name}: expected an integer, got {value!r:.40}")
    return value


_KNOWN = {
    "deviceId",
    "timestamp",
    "uptime",
    "freeMemory",
    "cpuTemperature",
    "firmwareVersion",
    "firmwareSha256",
    "networkSignalStrength",
    "errorCount",
    "bootId",
    "clientToken",
}


def _heartbeat(thing: str, body: dict[str, Any]) -> Heartbeat:
    if body.get("deviceId", thing) != thing:
        raise ValueError(f"deviceId: expected {thing}, as the topic says, got {body['deviceId']!r:.60}")
    timestamp = _number(body, "timestamp")
    version, sha256, boot_id = body.get("firmwareVersion"), body.get("firmwareSha256"), body.get("bootId")
    if version is not None and (not isinstance(version, str) or len(version) > 50):
        raise ValueError(f"firmwareVersion: expected text of at most 50 characters, got {version!r:.60}")
    if sha256 is not None and (not isinstance(sha256, str) or not _SHA256.fullmatch(sha256)):
        raise ValueError(f"firmwareSha256: expected 64 hexadecimal digits, got {sha256!r:.80}")
    if boot_id is not None and (not isinstance(boot_id, str) or not _BOOT_ID.fullmatch(boot_id)):
        raise ValueError(f"bootId: expected 1 to 64 printable characters without a blank, got {boot_id!r:.80}")
    return Heartbeat(
        device_id=thing,
        device_time=None if timestamp is None or not 0 <= timestamp < 4e12 else timestamp / 1000,
        uptime=_whole(body, "uptime"),
        free_memory=_whole(body, "freeMemory"),
        cpu_temperature=_number(body, "cpuTemperature"),
        firmware_version=version,
        firmware_sha256=sha256,
        signal_strength=_number(body, "networkSignalStrength"),
        error_count=_whole(body, "errorCount"),
        boot_id=boot_id,
        extra=None if body.keys() <= _KNOWN else _extra(body),
    )


def _extra(body: dict[str, Any]) -> dict[str, float] | None:
    """Numbers beyond those that are known."""
    found = ((key, value) for key, value in body.items() if key not in _KNOWN and _is_number(value))
    return dict(itertools.islice(found, MAX_EXTRA)) or None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_INTEGER


def _number(body: dict[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if (type(value) is float or type(value) is int) and -_MAX_INTEGER < value < _MAX_INTEGER:
        return float(value)
    raise ValueError(f"{name}: expected a number, got {value!r:.40}")


def _whole(body: dict[str, Any], name: str) -> int | None:
    value = body.get(name)
    if type(value) is int and -_MAX_INTEGER < value < _MAX_INTEGER:
        return value
    return None if (number := _number(body, name)) is None else int(number)
