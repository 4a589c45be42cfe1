"""Questions to devices, and their answers.

A question is a row from the moment it is asked. An answer counts only from the device that was asked, and only while
the question is open; whoever waits for it is told in the transaction that records it (store/waits.py).

```python
opened = await open_question(connection, AskDeviceInput(device_id="motor-7", request_id=..., type="ping", actor="alice"))
```
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from psycopg import AsyncConnection
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from models.diagnostics import (
    AskDeviceInput,
    BootSeen,
    DiagnosticState,
    DiagnosticView,
    EndedQuestion,
    EndQuestionInput,
    LookAtBootInput,
    OpenedQuestion,
)
from models.errors import ConflictError, NotFoundError
from models.identity import DeviceHappening
from models.protocol import DiagnosticType
from store.alerts import raise_alert
from store.audit import append_audit
from store.engine import Database
from store.lifecycle import refuse, standing
from store.waits import CHANNEL as OUTBOX
from store.waits import expect, forget

REBOOT_CHANNEL = "tidegate_reboots"
"""NOTIFY channel: a reboot is to be ordered; the payload is its request id. The gateway signs it, for it has the key."""

REBOOT_RULE = "reboot-refused"
"""Alert: a device was given an order to reboot that did not hold."""

STRANGE_REFUSALS = 5
"""Refusals that nobody ordered and that are audited, of one device in 15 minutes: an honest one locks after as many."""

_LATELY = """
SELECT EXISTS (SELECT FROM devices WHERE device_id = %(device)s), count(*) FROM (
    SELECT FROM audit_events WHERE subject_kind = 'device' AND subject = %(device)s
    AND action = 'device.reboot-refused' AND at > now() - interval '15 minutes' LIMIT %(most)s
) AS lately
"""

_OPEN = """
INSERT INTO diagnostics (request_id, device_id, type, parameters, state, requested_by, job_no, execution_number, expires_at)
VALUES (%(request_id)s, %(device_id)s, %(type)s, %(parameters)s, 'requested', %(actor)s, %(job_no)s,
        %(execution_number)s, now() + make_interval(secs => %(seconds)s))
ON CONFLICT (request_id) DO NOTHING
"""

_ANSWER = """
WITH over AS (
    UPDATE diagnostics d SET state = CASE WHEN n.error IS NULL THEN 'answered' ELSE 'failed' END,
           answer = n.answer, error = n.error, answered_at = clock_timestamp()
    FROM jsonb_to_recordset(%(answers)s::jsonb) AS n(request_id text, device_id text, answer jsonb, error text)
    WHERE d.request_id = n.request_id AND d.device_id = n.device_id
      AND d.state = 'requested' AND d.expires_at > clock_timestamp()
    RETURNING d.request_id, d.device_id, d.type, d.error, d.state
), waiting AS (
    DELETE FROM device_waits w USING over o
    WHERE w.device_id = o.device_id AND w.event = 'diagnosed'
      AND w.workflow_id = 'diagnose:' || o.device_id || '/' || o.request_id
    RETURNING w.workflow_id, o.device_id, o.request_id, o.state
), sent AS (
    INSERT INTO workflow_outbox (workflow_id, event)
    SELECT workflow_id, jsonb_build_object('device_id', device_id, 'happening', 'diagnosed',
               'at', to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
               'detail', jsonb_build_object('request_id', request_id, 'state', state))
    FROM waiting RETURNING 1
), told AS (
    SELECT pg_notify(%(channel)s, '') FROM sent LIMIT 1
)
SELECT o.request_id, o.device_id, o.type, o.error, (SELECT count(*) FROM told) FROM over o
"""
"""The wait of that very question alone ends: others of the same device wait for answers of their own."""

_COLUMNS = """
request_id, device_id, type, parameters, state, requested_by, job_no, execution_number, created_at, expires_at,
answered_at, answer, error
"""

_TIME_OUT = """
UPDATE diagnostics SET state = 'timed-out', error = %s WHERE request_id = %s AND state = 'requested'
"""

_LAST_HEARD = """
SELECT p.last_heartbeat, round(extract(epoch FROM now() - p.last_heartbeat)), p.offline_since IS NOT NULL
FROM presence p WHERE p.device_id = %s
"""

_BOOTED = """
SELECT extract(epoch FROM p.last_heartbeat - d.answered_at)::float8 FROM diagnostics d
JOIN presence p USING (device_id)
WHERE d.request_id = %(request_id)s AND d.state = 'answered' AND p.last_heartbeat > d.answered_at
  AND CASE WHEN p.boot_id IS NOT NULL THEN p.boot_id IS DISTINCT FROM %(boot_id)s
           ELSE p.uptime < extract(epoch FROM p.last_heartbeat - d.answered_at) END
"""
"""A device that names no boots is believed by its uptime."""


@dataclass(frozen=True, slots=True)
class DiagnosticAnswer:
    """What a device says to a question."""

    device_id: str
    request_id: str
    answer: Mapping[str, Any] | None = None
    error: str | None = None
    refused_order: bool = False
    """It refused an order to reboot, whether anybody of ours has sent one or not."""


async def open_question(connection: AsyncConnection, asked: AskDeviceInput) -> OpenedQuestion:
    """Ask, and wait for the answer. Idempotent by the request id.

    Raises NotFoundError, RefusedError (a device that is not heard), ConflictError (the id is another question's).
    """
    found = await standing(connection, asked.device_id, lock=True)
    refuse(None if found.is_heard else f"cannot ask {asked.device_id}: nothing that it says is used")
    made = await connection.execute(
        _OPEN,
        {
            **asked.model_dump(include={"request_id", "device_id", "actor", "job_no", "execution_number"}),
            "type": asked.type.value,
            "parameters": Jsonb(asked.parameters),
            "seconds": asked.limit.total_seconds(),
        },
    )
    if made.rowcount and asked.type is DiagnosticType.REBOOT:
        details = {"request_id": asked.request_id, **asked.parameters}
        await append_audit(
            connection, asked.actor, "device.reboot-ordered", "device", asked.device_id, asked.reason, details
        )
    cursor = await connection.execute(
        "SELECT d.state, d.expires_at, p.boot_id, d.device_id, d.type FROM diagnostics d "
        "LEFT JOIN presence p USING (device_id) WHERE d.request_id = %s",
        (asked.request_id,),
    )
    row = await cursor.fetchone()
    if row is None or (row[3], row[4]) != (asked.device_id, asked.type.value):
        raise ConflictError(f"cannot ask {asked.device_id}: the request id {asked.request_id} is another question's")
    opened = OpenedQuestion(state=DiagnosticState(row[0]), expires_at=row[1], boot_id=row[2])
    if opened.state is DiagnosticState.REQUESTED:
        await expect(connection, asked.device_id, asked.workflow_id, {DeviceHappening.DIAGNOSED: None})
    return opened


async def answer_questions(connection: AsyncConnection, answers: Sequence[DiagnosticAnswer]) -> int:
    """Record what devices answer; how many answers counted.

    Refused reboots are audited, and an alert is raised: also those that nobody here has ordered, for then somebody else
    has. Of these a device is believed a few in each lock's time, so that it cannot fill the audit.
    """
    if not answers:
        return 0
    first = {(answer.request_id, answer.device_id): answer for answer in reversed(answers)}
    rows = [
        {
            "request_id": answer.request_id,
            "device_id": answer.device_id,
            "answer": None if answer.answer is None else dict(answer.answer),
            "error": answer.error,
        }
        for answer in first.values()
    ]
    cursor = await connection.execute(_ANSWER, {"answers": orjson.dumps(rows).decode(), "channel": OUTBOX})
    over = await cursor.fetchall()
    for request_id, device_id, what, error, _ in over:
        if what == DiagnosticType.REBOOT and error is not None:
            await _note_refused_reboot(connection, device_id, request_id, error)
    counted = {row[0] for row in over}
    strange: dict[str, list[DiagnosticAnswer]] = {}
    for answer in first.values():
        if answer.refused_order and answer.request_id not in counted:
            strange.setdefault(answer.device_id, []).append(answer)
    for device_id, refusals in strange.items():
        for answer in refusals[: await _room_for_refusals(connection, device_id)]:
            await _note_refused_reboot(connection, device_id, answer.request_id, answer.error or "")
    return len(over)


async def _room_for_refusals(connection: AsyncConnection, device_id: str) -> int:
    """How many refusals a device may still add to the audit by itself; none for one that is not in the registry."""
    row = await (await connection.execute(_LATELY, {"device": device_id, "most": STRANGE_REFUSALS})).fetchone()
    return max(0, STRANGE_REFUSALS - int(row[1])) if row is not None and row[0] else 0


async def _note_refused_reboot(connection: AsyncConnection, device_id: str, request_id: str, error: str) -> None:
    details = {"request_id": request_id}
    await append_audit(connection, device_id, "device.reboot-refused", "device", device_id, error, details)
    await raise_alert(connection, REBOOT_RULE, device_id, f"{device_id} refused to reboot: {error}")


async def get_question(connection: AsyncConnection, request_id: str) -> DiagnosticView:
    """One. Raises NotFoundError."""
    found = await _find(connection, "request_id = %s", (request_id,))
    if not found:
        raise NotFoundError(f"no diagnostic request has the id {request_id}")
    return found[0]


async def end_question(connection: AsyncConnection, asked: EndQuestionInput) -> EndedQuestion:
    """Wait no longer: a question that is open is timed out, with what is known of the device."""
    cursor = await connection.execute(  # the row before the wait, as the gateway does
        "SELECT state FROM diagnostics WHERE request_id = %s FOR UPDATE", (asked.request_id,)
    )
    row = await cursor.fetchone()
    await forget(connection, asked.workflow_id)
    if row is not None and row[0] == DiagnosticState.REQUESTED:
        await connection.execute(_TIME_OUT, (await _silence(connection, asked.device_id), asked.request_id))
    view = await get_question(connection, asked.request_id)
    if asked.watch_boot and view.state is DiagnosticState.ANSWERED:
        await expect(connection, asked.device_id, asked.workflow_id, {DeviceHappening.HEARTBEAT: None})
    return EndedQuestion(state=view.state, text=view.error or "", answered_at=view.answered_at)


async def _silence(connection: AsyncConnection, device_id: str) -> str:
    """Why a device may not have answered."""
    row = await (await connection.execute(_LAST_HEARD, (device_id,))).fetchone()
    if row is None:
        return "no answer in time; the device has never sent a heartbeat"
    offline = ", and counts as offline" if row[2] else ""
    return (
        f"no answer in time; the device was last heard at {row[0]:%Y-%m-%d %H:%M:%S}Z, {int(row[1])} s before{offline}"
    )


async def look_at_boot(connection: AsyncConnection, asked: LookAtBootInput) -> BootSeen:
    """Whether a heartbeat of another boot has come; if not, the wait begins again before the look, so none is missed."""
    if asked.last:
        await forget(connection, asked.workflow_id)
    else:
        await expect(connection, asked.device_id, asked.workflow_id, {DeviceHappening.HEARTBEAT: None})
    row = await (
        await connection.execute(_BOOTED, {"request_id": asked.request_id, "boot_id": asked.boot_id})
    ).fetchone()
    if row is None:
        return BootSeen()
    await forget(connection, asked.workflow_id)
    return BootSeen(seconds=round(float(row[0]), 1))


async def _find(connection: AsyncConnection, condition: str, arguments: Sequence[Any]) -> list[DiagnosticView]:
    async with connection.cursor(row_factory=class_row(DiagnosticView)) as cursor:
        await cursor.execute(f"SELECT {_COLUMNS} FROM diagnostics WHERE {condition}".encode(), arguments)
        return await cursor.fetchall()


@dataclass(frozen=True, slots=True)
class RebootToSign:
    """A reboot that is wanted now; `expires_at` in epoch seconds."""

    device_id: str
    request_id: str
    delay_seconds: int
    expires_at: float


async def open_reboot(connection: AsyncConnection, request_id: str) -> RebootToSign | None:
    """An open order to reboot a device that is heard; None for anything else."""
    cursor = await connection.execute(
        "SELECT g.device_id, g.parameters->'delaySeconds', extract(epoch FROM g.expires_at)::float8 FROM diagnostics g "
        "JOIN devices d USING (device_id) WHERE g.request_id = %s AND g.type = 'reboot' AND g.state = 'requested' "
        "AND g.expires_at > now() AND d.barred_at IS NULL AND d.status <> 'retired'",
        (request_id,),
    )
    row = await cursor.fetchone()
    return None if row is None else RebootToSign(row[0], request_id, int(row[1]), float(row[2]))


@dataclass
class DiagnosticStore:
    """What the activities and the command line need. `db` must be open."""

    db: Database

    async def open(self, asked: AskDeviceInput) -> OpenedQuestion:
        """See open_question."""
        async with self.db.pool.connection() as connection:
            return await open_question(connection, asked)

    async def message(self, request_id: str) -> bytes | None:
        """The request as the device gets it; None once it is over. A reboot's is the gateway's to send: it is told to."""
        async with self.db.pool.connection() as connection:
            view = await get_question(connection, request_id)
            if view.state is not DiagnosticState.REQUESTED:
                return None
            if view.type is DiagnosticType.REBOOT:
                await connection.execute("SELECT pg_notify(%s, %s)", (REBOOT_CHANNEL, request_id))
                return None
        return orjson.dumps(
            {
                "requestId": request_id,
                "type": view.type,
                **view.parameters,
                "expiresAt": f"{view.expires_at:%Y-%m-%dT%H:%M:%SZ}",
            }
        )

    async def end(self, asked: EndQuestionInput) -> EndedQuestion:
        """See end_question."""
        async with self.db.pool.connection() as connection:
            return await end_question(connection, asked)

    async def look_at_boot(self, asked: LookAtBootInput) -> BootSeen:
        """See look_at_boot."""
        async with self.db.pool.connection() as connection:
            return await look_at_boot(connection, asked)

    async def get(self, request_id: str) -> DiagnosticView:
        """One. Raises NotFoundError."""
        async with self.db.pool.connection() as connection:
            return await get_question(connection, request_id)

    async def of_device(self, device_id: str, limit: int = 20) -> list[DiagnosticView]:
        """A device's questions, the newest first. Raises NotFoundError for a device that is not there."""
        async with self.db.pool.connection() as connection:
            await standing(connection, device_id)
            condition = "device_id = %s ORDER BY created_at DESC, request_id LIMIT %s"
            return await _find(connection, condition, (device_id, limit))

    async def of_execution(self, job_no: int, device_id: str) -> list[DiagnosticView]:
        """What a device was asked about its part in a job, the oldest first."""
        async with self.db.pool.connection() as connection:
            condition = "job_no = %s AND device_id = %s ORDER BY created_at, type LIMIT 50"
            return await _find(connection, condition, (job_no, device_id))
