"""What a device is told to do, signed for it alone: the job document with its order, and commands.

All of a firmware document but the order is the same for every device of a job that runs the same image, so it is rendered
once per (job, base image) and spliced in as bytes. Of every other operation the document is `operation`, the members of
the payload, and `order`, a task (firmware/task.py) that carries the payload once more inside what is signed:

    restart      {}                                       success shows `bootId`, another one than before
    config-sync  {"configVersion": 7}                     success shows `configVersion`; the device gets the text itself
    diagnostic   {"requests": [{"requestId", "type"}]}    answers go to devices/<thing>/diagnostics/response
    custom       the specification's `document`
"""

import hashlib
import secrets
from base64 import b64decode
from dataclasses import dataclass
from typing import Any

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from psycopg import AsyncConnection

from domain.admission import questions_of
from domain.ledger_rows import ExecutionRow, JobRow
from firmware.command import COMMAND_PAYLOAD_TYPE, Command, encode_command
from firmware.envelope import EnvelopeSigner
from firmware.manifest import ORDER_PAYLOAD_TYPE, Order, encode_order
from firmware.task import Task, encode_task, task_signer
from models.protocol import JobOperation
from store.commands import PendingCommand

COMMAND_LIFETIME_SECONDS = 900
"""A command is signed when the device asks, to be carried out at once; the rest is room for a clock that is off."""


@dataclass(frozen=True, slots=True)
class _Template:
    operation: str
    release_sha256: str
    """Of the release envelope's payload: what the order refers to."""
    common: bytes
    """The document's members but `order` and `deltas`, without the closing brace."""
    deltas: dict[str, tuple[str, bytes]]
    """By base image: the delta's sha256, and the `deltas` array as JSON."""


@dataclass(frozen=True, slots=True)
class _TaskTemplate:
    operation: JobOperation
    payload: dict[str, Any]
    """What all devices of the job are given alike."""


class Documents:
    """Templates by job, kept for the life of the gateway: a job's document never changes once its waves open."""

    def __init__(self, artifact_url: str, order_key: Ed25519PrivateKey, order_lifetime_seconds: int) -> None:
        self._base_url = artifact_url.rstrip("/")
        self._signer = EnvelopeSigner(order_key, ORDER_PAYLOAD_TYPE)
        self._task_signer = task_signer(order_key)
        self._command_signer = EnvelopeSigner(order_key, COMMAND_PAYLOAD_TYPE)
        self._lifetime = order_lifetime_seconds
        self._templates: dict[int, _Template | _TaskTemplate] = {}

    async def ensure(self, connection: AsyncConnection, job_nos: list[int]) -> None:
        """Load the templates of these jobs that are not known yet."""
        missing = [job_no for job_no in job_nos if job_no not in self._templates]
        if not missing:
            return
        cursor = await connection.execute(
            "SELECT job_no, document FROM jobs WHERE job_no = ANY(%s) AND document IS NOT NULL", (missing,)
        )
        for job_no, document in await cursor.fetchall():
            self._templates[job_no] = self._template(document)

    def has(self, job_no: int) -> bool:
        """Whether the job's document is known: without it nothing can be started."""
        return job_no in self._templates

    def render(self, execution: ExecutionRow, job: JobRow, now: int) -> orjson.Fragment:
        """The document for one device and attempt, as JSON, signed now."""
        template = self._templates[execution.job_no]
        if isinstance(template, _TaskTemplate):
            return self._render_task(template, execution, job, now)
        return self._render_update(template, execution, job.job_id, now)

    def _render_task(self, template: _TaskTemplate, execution: ExecutionRow, job: JobRow, now: int) -> orjson.Fragment:
        payload = {**template.payload, **_own_payload(template.operation, execution, job)}
        task = Task(
            device_id=execution.device_id,
            job_id=job.job_id,
            attempt=execution.execution_number,
            operation=template.operation.value,
            payload=payload,
            issued_at=now,
            expires_at=now + self._lifetime,
            nonce=secrets.token_hex(16),
        )
        order = self._task_signer.sign(encode_task(task))
        return orjson.Fragment(orjson.dumps({"operation": template.operation.value, **payload, "order": order}))

    def _render_update(self, template: _Template, execution: ExecutionRow, job_id: str, now: int) -> orjson.Fragment:
        delta = template.deltas.get(execution.base_sha256 or "")
        order = Order(
            device_id=execution.device_id,
            job_id=job_id,
            attempt=execution.execution_number,
            operation=template.operation,
            release_sha256=template.release_sha256,
            issued_at=now,
            expires_at=now + self._lifetime,
            nonce=secrets.token_hex(16),
            deltas=(delta[0],) if delta else (),
        )
        envelope = orjson.dumps(self._signer.sign(encode_order(order)))
        deltas = delta[1] if delta else b"[]"
        return orjson.Fragment(b'%b,"deltas":%b,"order":%b}' % (template.common, deltas, envelope))

    def preview(self, execution: ExecutionRow) -> orjson.Fragment:
        """The document without an order: what waits for the device, on which it cannot act yet."""
        template = self._templates[execution.job_no]
        if isinstance(template, _TaskTemplate):
            return orjson.Fragment(orjson.dumps({"operation": template.operation.value, **template.payload}))
        return orjson.Fragment(template.common + b"}")

    def sign_command(self, pending: PendingCommand, now: int) -> dict[str, Any]:
        """The DSSE envelope of a command, signed now; valid as long as the command is wanted, and for minutes at most."""
        command = Command(
            device_id=pending.device_id,
            request_id=pending.request_id,
            operation=pending.operation,
            issued_at=now,
            expires_at=max(now + 1, min(int(pending.expires_at), now + COMMAND_LIFETIME_SECONDS)),
            nonce=secrets.token_hex(16),
        )
        return self._command_signer.sign(encode_command(command))

    def _template(self, document: dict[str, Any]) -> _Template | _TaskTemplate:
        if document["operation"] != JobOperation.FIRMWARE_UPDATE:
            return _TaskTemplate(JobOperation(document["operation"]), document["payload"])
        common = {
            "operation": document["operation"],
            "version": document["version"],
            "release": document["release"],
            "full": {**document["full"], "url": self._url(document["full"]["sha256"]), "compression": None},
        }
        deltas = {
            delta["base_sha256"]: (delta["sha256"], orjson.dumps([self._delta(delta)])) for delta in document["deltas"]
        }
        payload = b64decode(document["release"]["payload"])
        return _Template(document["operation"], hashlib.sha256(payload).hexdigest(), orjson.dumps(common)[:-1], deltas)

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {
            "base_sha256": delta["base_sha256"],
            "url": self._url(delta["sha256"]),
            "sha256": delta["sha256"],
            "size": delta["size_bytes"],
            "codec": delta["codec"],
        }

    def _url(self, sha256: str) -> str:
        return f"{self._base_url}/artifacts/{sha256}"


def _own_payload(operation: JobOperation, execution: ExecutionRow, job: JobRow) -> dict[str, Any]:
    """What this device alone is given."""
    match operation:
        case JobOperation.CONFIG_SYNC:
            return {"configVersion": execution.wanted_config or 0}
        case JobOperation.DIAGNOSTIC:
            return {"requests": [{"requestId": q.request_id, "type": q.type} for q in questions_of(job, execution)]}
        case _:
            return {}
