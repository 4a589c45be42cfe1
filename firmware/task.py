"""The fourth signed statement: what a fleet job has one device do (restart, config-sync, diagnostic, custom).

A task carries its payload inside what is signed. A device carries out what it reads there and nothing that stands beside
it in the job document, so that no two readings of one document can differ, and nobody on the way can change a word.
It is for one device, one job, one attempt, and for a time. It has a payload type of its own: no order, command or
release can be presented as a task, nor a task as one of them. Encoding and reading are as strict as in
firmware.manifest; the payload is strict JSON (firmware.strict), at most MAX_TASK_DEPTH deep.

>>> task = Task("motor-7", "_restart-berlin", 1, "custom", {"say": ["hi"]}, 1000, 1900, "b" * 32)
>>> decode_task(encode_task(task)) == task
True
"""

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, fields
from typing import Any

import orjson

from firmware.envelope import EnvelopeSigner, open_envelope
from firmware.errors import ExpiredError, MisdirectedError, ReplayError, StatementError
from firmware.keys import TrustedKeys
from firmware.manifest import (
    LAST_SECOND,
    MAX_ATTEMPT,
    NONCE,
    OPERATION,
    attempt_key,
    check_integer,
    check_text,
    last_attempt,
    read_fields,
)
from models.ids import JOB_ID, THING_NAME
from models.protocol import MAX_DOCUMENT_BYTES, MAX_DOCUMENT_DEPTH, JobOperation

TASK_PAYLOAD_TYPE = "application/vnd.tidegate.task.v1+json"
MAX_TASK_BYTES = MAX_DOCUMENT_BYTES + 1024
"""The payload, and what says whom it is for: in base64 it fits a job document of 32 KiB beside the payload itself."""
MAX_TASK_DEPTH = MAX_DOCUMENT_DEPTH + 1
TASK_OPERATIONS = frozenset(JobOperation) - {JobOperation.FIRMWARE_UPDATE}
"""What a task can order. Firmware needs an order and a release (firmware.verify), and never comes as a task."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one device is to do, once. Times are epoch seconds; `payload` is what the operation needs, {} for restart."""

    device_id: str
    job_id: str
    attempt: int
    operation: str
    payload: dict[str, Any]
    issued_at: int
    expires_at: int
    nonce: str

    @property
    def key(self) -> str:
        """Names the attempt: see `firmware.manifest.attempt_key`."""
        return attempt_key(self.job_id, self.attempt)


@dataclass(frozen=True, slots=True)
class VerifiedTask:
    """A task that may be carried out. `latest_known_time`: the new value of what the device keeps under this name."""

    task: Task
    operation: JobOperation
    latest_known_time: int


def task_signer(order_key: Any) -> EnvelopeSigner:
    """Signs encoded tasks with the order key, up to their own bound."""
    return EnvelopeSigner(order_key, TASK_PAYLOAD_TYPE, max_bytes=MAX_TASK_BYTES)


def encode_task(task: Task) -> bytes:
    """Canonical bytes to be signed. Raises StatementError for a task that no device would accept."""
    _check(task)
    try:
        payload = orjson.dumps(asdict(task), option=orjson.OPT_SORT_KEYS)
    except (TypeError, ValueError) as error:
        raise StatementError(f"task: its payload is not JSON: {error}") from error
    if decode_task(payload) != task:
        raise StatementError("task: its payload is not read back as it was written (NaN, or other than JSON's types)")
    return payload


def decode_task(payload: bytes) -> Task:
    """The task in verified bytes. Raises StatementError."""
    task = Task(**read_fields(payload, "task", _FIELDS, max_bytes=MAX_TASK_BYTES, max_depth=MAX_TASK_DEPTH))
    _check(task)
    return task


def verify_task(
    envelope: Mapping[str, Any],
    keys: TrustedKeys,
    device_id: str,
    finished: Set[str],
    now: int,
    *,
    job_id: str,
    attempt: int,
    latest_known_time: int = 0,
) -> VerifiedTask:
    """The task in `envelope`, if this device may carry it out.

    Args:
        envelope: `order` of a job document (docs/protocol.md), as parsed from JSON; it is not changed.
        keys: the keys the device was made with.
        device_id: who it is.
        finished: attempt keys (`Task.key`) and nonces of tasks that have ended on it, however; to be kept through
            power cuts. With an attempt, the earlier ones of its job have ended too.
        now: the device's clock, in epoch seconds; it may be wrong.
        job_id: the execution under which the document came.
        attempt: that execution's number.
        latest_known_time: the latest moment the device has seen signed; the time used is never before it.

    Raises:
        FirmwareError: the first rule that did not hold.
    """
    task = decode_task(open_envelope(envelope, TASK_PAYLOAD_TYPE, keys.order, max_bytes=MAX_TASK_BYTES))
    if task.device_id != device_id:
        raise MisdirectedError(f"refused the task: it is for device {task.device_id}, this is {device_id}")
    if task.job_id != job_id:
        raise MisdirectedError(f"refused the task: it is for job {task.job_id}, it came with job {job_id!r:.70}")
    if task.attempt != attempt:
        raise MisdirectedError(f"refused the task: it is for attempt {task.attempt}, it came with attempt {attempt}")
    if task.operation not in TASK_OPERATIONS:
        raise MisdirectedError(
            f"refused the task: it is to {task.operation}, expected one of {', '.join(sorted(TASK_OPERATIONS))}"
        )
    if task.nonce in finished or task.attempt <= last_attempt(finished, job_id):
        raise ReplayError(f"refused the task: attempt {attempt} of job {job_id}, or a later one, has ended here")
    latest = max(latest_known_time, task.issued_at)
    if max(now, latest) >= task.expires_at:
        raise ExpiredError(f"refused the task: it was valid until {task.expires_at}, it is {max(now, latest)}")
    return VerifiedTask(task, JobOperation(task.operation), latest)


_FIELDS = frozenset(field.name for field in fields(Task))


def _check(task: Task) -> None:
    check_text(task.device_id, THING_NAME, "task", "device_id")
    check_text(task.job_id, JOB_ID, "task", "job_id")
    check_integer(task.attempt, 1, MAX_ATTEMPT, "task", "attempt")
    check_text(task.operation, OPERATION, "task", "operation")
    if not isinstance(task.payload, dict):
        raise StatementError(f"task: payload is {type(task.payload).__name__}, expected an object")
    check_integer(task.issued_at, 0, LAST_SECOND, "task", "issued_at")
    check_integer(task.expires_at, task.issued_at + 1, LAST_SECOND, "task", "expires_at")
    check_text(task.nonce, NONCE, "task", "nonce")
