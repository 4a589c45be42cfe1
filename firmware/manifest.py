"""The two signed statements: what may run (release), and which device does what until when (order).

Statements are flat JSON objects in canonical form: sorted keys, no white space, UTF-8. Reading is strict: an unknown or
missing key, a value of another type or out of range is refused. A field that an old device must not ignore therefore
comes with a new payload type. Times are integer epoch seconds, sizes bytes.

>>> order = Order("motor-7", "motor-1_3_0", 1, "firmware-update", "a" * 64, 1000, 2000, "b" * 32)
>>> decode_order(encode_order(order)) == order
True
"""

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import orjson

from firmware.envelope import MAX_PAYLOAD_BYTES
from firmware.errors import StatementError
from firmware.strict import MAX_DEPTH, parse_strict
from models.ids import JOB_ID, PRODUCT_NAME, SHA256, THING_NAME, VERSION

RELEASE_PAYLOAD_TYPE = "application/vnd.tidegate.release.v1+json"
ORDER_PAYLOAD_TYPE = "application/vnd.tidegate.order.v1+json"

FIRMWARE_UPDATE = "firmware-update"
"""The operation of an order, and of the job document, that installs a release."""

MAX_HARDWARE = 64
MAX_SECURITY_COUNTER = 2**32 - 1
"""MCUboot's range of the counter."""
MAX_IMAGE_BYTES = 2**40
MAX_ATTEMPT = 1_000_000
MAX_DELTAS = 64
LAST_SECOND = 253_402_300_799
"""9999-12-31T23:59:59Z."""

_HARDWARE = re.compile(r"[^\x00-\x1f\x7f]{1,100}")
OPERATION = re.compile(r"[a-z][a-z0-9-]{0,39}")
NONCE = re.compile(r"[0-9a-f]{16,64}")


@dataclass(frozen=True, slots=True)
class ReleaseStatement:
    """What may run. `security_counter` is not the version: it grows only when older releases must never run again."""

    product: str
    version: str
    hardware: tuple[str, ...]
    security_counter: int
    sha256: str
    size_bytes: int
    published_at: int
    expires_at: int | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What one device is to do, once. `release_sha256` is the sha256 of the release envelope's payload bytes.

    `deltas`: sha256 of the deltas that may be used for it, so that only bytes named by a signature reach a decoder;
    None leaves the choice to the (unsigned) job document, where each is still bounded and its result verified.
    """

    device_id: str
    job_id: str
    attempt: int
    operation: str
    release_sha256: str
    issued_at: int
    expires_at: int
    nonce: str
    deltas: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        """Names the attempt: see `attempt_key`."""
        return attempt_key(self.job_id, self.attempt)


def attempt_key(job_id: str, attempt: int) -> str:
    """Name of one attempt of one job on a device, as kept in `DeviceFacts.finished_orders`: `<job id>:<attempt>`."""
    return f"{job_id}:{attempt}"


def last_attempt(finished: AbstractSet[str], job_id: str) -> int:
    """The last attempt of a job that has ended, by the attempt keys in `finished`; 0 when none has."""
    prefix = attempt_key(job_id, 0)[:-1]
    attempts = (entry[len(prefix) :] for entry in finished if entry.startswith(prefix))
    return max((int(attempt) for attempt in attempts if attempt.isdecimal()), default=0)


def encode_release(statement: ReleaseStatement) -> bytes:
    """Canonical bytes to be signed. Raises StatementError for a statement that no device would accept."""
    _check_release(statement)
    fields: dict[str, Any] = {name: getattr(statement, name) for name in _RELEASE_FIELDS}
    if statement.expires_at is not None:
        fields["expires_at"] = statement.expires_at
    return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)


def decode_release(payload: bytes) -> ReleaseStatement:
    """The statement in verified bytes. Raises StatementError."""
    fields = read_fields(payload, "release", _RELEASE_FIELDS, frozenset({"expires_at"}))
    statement = ReleaseStatement(**{**fields, "hardware": _texts(fields["hardware"], "release", "hardware")})
    _check_release(statement)
    return statement


def encode_order(order: Order) -> bytes:
    """Canonical bytes to be signed. Raises StatementError for an order that no device would accept."""
    _check_order(order)
    fields: dict[str, Any] = {
        "attempt": order.attempt,
        "device_id": order.device_id,
        "expires_at": order.expires_at,
        "issued_at": order.issued_at,
        "job_id": order.job_id,
        "nonce": order.nonce,
        "operation": order.operation,
        "release_sha256": order.release_sha256,
    }
    if order.deltas is not None:
        fields["deltas"] = order.deltas
    return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)


def decode_order(payload: bytes) -> Order:
    """The order in verified bytes. Raises StatementError."""
    fields = read_fields(payload, "order", _ORDER_FIELDS, frozenset({"deltas"}))
    if "deltas" in fields:
        fields["deltas"] = _texts(fields["deltas"], "order", "deltas")
    order = Order(**fields)
    _check_order(order)
    return order


_RELEASE_FIELDS = frozenset(
    {"product", "version", "hardware", "security_counter", "sha256", "size_bytes", "published_at"}
)
_ORDER_FIELDS = frozenset(
    {"device_id", "job_id", "attempt", "operation", "release_sha256", "issued_at", "expires_at", "nonce"}
)


def _check_release(statement: ReleaseStatement) -> None:
    check_text(statement.product, PRODUCT_NAME, "release", "product")
    check_text(statement.version, VERSION, "release", "version")
    for name in statement.hardware:
        check_text(name, _HARDWARE, "release", "hardware")
    if not 1 <= len(statement.hardware) <= MAX_HARDWARE or len(set(statement.hardware)) != len(statement.hardware):
        raise StatementError(f"release: hardware must name 1 to {MAX_HARDWARE} kinds, each once")
    check_integer(statement.security_counter, 0, MAX_SECURITY_COUNTER, "release", "security_counter")
    check_text(statement.sha256, SHA256, "release", "sha256")
    check_integer(statement.size_bytes, 1, MAX_IMAGE_BYTES, "release", "size_bytes")
    check_integer(statement.published_at, 0, LAST_SECOND, "release", "published_at")
    if statement.expires_at is not None:
        check_integer(statement.expires_at, statement.published_at + 1, LAST_SECOND, "release", "expires_at")


def _check_order(order: Order) -> None:
    check_text(order.device_id, THING_NAME, "order", "device_id")
    check_text(order.job_id, JOB_ID, "order", "job_id")
    check_integer(order.attempt, 1, MAX_ATTEMPT, "order", "attempt")
    check_text(order.operation, OPERATION, "order", "operation")
    check_text(order.release_sha256, SHA256, "order", "release_sha256")
    check_integer(order.issued_at, 0, LAST_SECOND, "order", "issued_at")
    check_integer(order.expires_at, order.issued_at + 1, LAST_SECOND, "order", "expires_at")
    check_text(order.nonce, NONCE, "order", "nonce")
    if order.deltas is not None:
        if len(order.deltas) > MAX_DELTAS:
            raise StatementError(f"order: {len(order.deltas)} deltas, at most {MAX_DELTAS} expected")
        for sha256 in order.deltas:
            check_text(sha256, SHA256, "order", "deltas")


def read_fields(
    payload: bytes,
    what: str,
    required: frozenset[str],
    optional: frozenset[str] = frozenset(),
    *,
    max_bytes: int = MAX_PAYLOAD_BYTES,
    max_depth: int = MAX_DEPTH,
) -> dict[str, Any]:
    """The members of a statement, exactly these. Raises StatementError naming what is missing or unknown."""
    fields = parse_strict(payload, max_bytes=max_bytes, max_depth=max_depth)
    if not isinstance(fields, dict):
        raise StatementError(f"{what}: expected an object, found {type(fields).__name__}")
    missing, unknown = required - fields.keys(), fields.keys() - required - optional
    if missing or unknown:
        raise StatementError(f"{what}: missing {_names(missing)}, unknown {_names(unknown)}")
    if any(fields[name] is None for name in optional & fields.keys()):
        raise StatementError(f"{what}: an optional value is null; it has to be left out")
    return fields


def _names(names: AbstractSet[str]) -> str:
    return ", ".join(sorted(names))[:200] or "nothing"


def _texts(value: Any, what: str, name: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise StatementError(f"{what}: {name} must be a list")
    return tuple(value)


def check_text(value: object, pattern: re.Pattern[str], what: str, name: str) -> None:
    """Raise StatementError for what is no text of this form."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise StatementError(f"{what}: {name} is {value!r:.80}, expected text of the form {pattern.pattern}")


def check_integer(value: object, least: int, most: int, what: str, name: str) -> None:
    """Raise StatementError for what is no integer of this range."""
    if type(value) is not int or not least <= value <= most:
        raise StatementError(f"{what}: {name} is {value!r:.40}, expected an integer from {least} to {most}")
