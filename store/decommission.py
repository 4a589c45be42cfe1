"""Decommissioning in PostgreSQL. `retire` is the point: one transaction ends all that a device is and has.

Each method is one transaction and can be repeated. Locks are taken in the order that keeps everybody out of each
other's way: planning, the device's enrolments, access, jobs, the device.
"""

from dataclasses import dataclass
from typing import Any

from psycopg import AsyncConnection

from domain.standing import Standing, why_not_decommission
from models.identity import DeviceHappening, RevocationReason
from models.lifecycle import (
    AskToWipeInput,
    BeginDecommissionInput,
    BegunDecommission,
    EndDecommissionInput,
    RetiredDevice,
    RetireDeviceInput,
    WipeAsked,
)
from models.protocol import CommandStatus, Operation
from store.access import bar, change_access, revoke
from store.alerts import raise_alert, resolve_judged
from store.audit import append_audit
from store.commands import close_command, open_command
from store.engine import Database, fetch_one
from store.events import append_event
from store.executions import load, save
from store.lifecycle import refuse, standing
from store.planning import hold_planning
from store.shadows import clear_shadows
from store.waits import expect

_ALIVE = "seen_at > now() - interval '2 minutes'"
"""A broker whose keeper has not been seen for longer enforces nothing new: nobody waits for it, an alert is its own."""

_OF_THIS_LIFE = "created_at > COALESCE((SELECT max(retired_at) FROM tombstones WHERE device_id = %s), '-infinity')"
"""A serial number that was released and came back has a life before this one."""

_BURY = """
INSERT INTO tombstones (serial_number, device_id, retired_by, reason) VALUES (%s, %s, %s, %s)
ON CONFLICT (serial_number) WHERE released_at IS NULL DO NOTHING
"""

_HOLD_ENROLMENTS = """
SELECT FROM enrolments WHERE serial_number = (SELECT serial_number FROM devices WHERE device_id = %s)
AND state IN ('requested','waiting','issued','active','conflict') ORDER BY enrolment_no FOR UPDATE
"""
"""Whoever holds one wants access next (store/provisioning.py)."""

_CLOSE_ENROLMENTS = """
WITH closed AS (
    UPDATE enrolments SET state = 'closed', reason = %s, decided_at = now(), decided_by = %s
    WHERE serial_number = %s AND state IN ('requested','waiting','issued','active','conflict') RETURNING enrolment_no
)
SELECT pg_notify('tidegate_enrolment', enrolment_no::text) FROM closed
"""


@dataclass
class DecommissionStore:
    """See the module. `db` must be open."""

    db: Database

    async def begin(self, asked: BeginDecommissionInput) -> BegunDecommission:
        """Take the device out of every rollout. Raises NotFoundError, and RefusedError where all is done already."""
        async with self.db.pool.connection() as connection:
            found = await standing(connection, asked.device_id)
            refuse(why_not_decommission(found))
            await _remove_executions(connection, asked.device_id, asked.actor, asked.reason)
            return BegunDecommission(serial_number=found.serial_number, answers=_answers(found))

    async def ask_to_wipe(self, asked: AskToWipeInput) -> WipeAsked:
        """Open the command, and wait for its answer. What was answered already is not asked again.

        Raises RefusedError where the device is retired: a late attempt must not wipe whoever enrols there next.
        """
        async with self.db.pool.connection() as connection:
            refuse(why_not_decommission(await standing(connection, asked.device_id, lock=True)))
            cursor = await connection.execute(
                f"SELECT request_id FROM device_commands WHERE device_id = %s AND operation = %s "
                f"AND state IN ('succeeded','failed') AND {_OF_THIS_LIFE} ORDER BY created_at DESC LIMIT 1".encode(),
                (asked.device_id, Operation.WIPE_CREDENTIALS.value, asked.device_id),
            )
            if (row := await cursor.fetchone()) is not None:
                return WipeAsked(request_id=row[0], answered=True)
            operation = Operation.WIPE_CREDENTIALS
            request_id = await open_command(connection, asked.device_id, operation, asked.actor, asked.until)
            await expect(connection, asked.device_id, asked.workflow_id, {DeviceHappening.COMMAND_ANSWERED: None})
            return WipeAsked(request_id=request_id)

    async def retire(self, asked: RetireDeviceInput) -> RetiredDevice:
        """End the device: executions, certificates, its word, its status, its serial number, its enrolments, its shadows.

        From the commit on nothing that it says changes anything, nothing plans with it, and nobody enrols under its
        serial number. Idempotent: a device that was retired so is left as it is.
        """
        device_id, actor, reason = asked.device_id, asked.actor, asked.reason
        async with self.db.pool.connection() as connection:
            await hold_planning(connection)
            await connection.execute(_HOLD_ENROLMENTS, (device_id,))
            revision = await change_access(connection)
            await _remove_executions(connection, device_id, actor, reason)
            found = await standing(connection, device_id, lock=True)
            if why_not_decommission(found) is not None:
                return await _retired_before(connection, device_id, revision)
            revoked = await revoke(connection, device_id, RevocationReason.CESSATION_OF_OPERATION, actor, reason)
            await bar(connection, device_id, actor, reason or "decommissioned")
            await connection.execute(
                "UPDATE devices SET status = 'retired', retired_at = COALESCE(retired_at, now()), updated_at = now() "
                "WHERE device_id = %s",
                (device_id,),
            )
            wiped = await _close_commands(connection, device_id)
            await connection.execute(_BURY, (found.serial_number, device_id, actor, reason))
            await connection.execute(_CLOSE_ENROLMENTS, ("the device was decommissioned", actor, found.serial_number))
            await connection.execute("DELETE FROM device_waits WHERE device_id = %s", (device_id,))
            shadows = await clear_shadows(connection, device_id)
            await resolve_judged(connection, device_id, actor)
            removed = await _count_removed(connection, device_id)
            (revision,) = await fetch_one(connection, "SELECT revision FROM access_state", ())
            details: dict[str, Any] = {
                "serial_number": found.serial_number,
                "certificates_revoked": len(revoked),
                "executions_removed": removed,
                "shadows_deleted": shadows,
                "wiped": wiped,
            }
            await append_audit(connection, actor, "device.retired", "device", device_id, reason, details)
            return RetiredDevice(
                revision=revision, wiped=wiped, executions_removed=removed, certificates_revoked=len(revoked)
            )

    async def brokers_behind(self, revision: int) -> list[str]:
        """Brokers that are alive and do not enforce this revision yet."""
        async with self.db.pool.connection() as connection:
            cursor = await connection.execute(
                f"SELECT broker_id FROM brokers WHERE {_ALIVE} AND applied_revision < %s ORDER BY broker_id".encode(),
                (revision,),
            )
            return [row[0] for row in await cursor.fetchall()]

    async def alert(self, rule: str, subject: str, text: str) -> None:
        """Tell people."""
        async with self.db.pool.connection() as connection:
            await raise_alert(connection, rule, subject, text)

    async def end(self, asked: EndDecommissionInput) -> None:
        """Note that it is over, once."""
        action = "device.decommissioned"
        async with self.db.pool.connection() as connection:
            await connection.execute("DELETE FROM device_waits WHERE device_id = %s", (asked.device_id,))
            cursor = await connection.execute(
                "SELECT action FROM audit_events WHERE subject_kind = 'device' AND subject = %s "
                "AND action IN ('device.retired', %s) ORDER BY event_no DESC LIMIT 1",
                (asked.device_id, action),
            )
            row = await cursor.fetchone()
            if row is None or row[0] != action:
                await append_audit(connection, asked.actor, action, "device", asked.device_id, asked.reason)


def _answers(found: Standing) -> bool:
    return found.is_heard and found.valid_certificates > 0


async def _remove_executions(connection: AsyncConnection, device_id: str, actor: str, reason: str) -> int:
    batch = await load(connection, [device_id], (), ())
    said = f"decommissioned by {actor}" + (f": {reason}" if reason else "")
    removed = [e for e in list(batch.ledger.by_key.values()) if batch.ledger.remove(e, said, batch.now)]
    await save(batch)
    for execution in removed:
        text = f"{device_id} removed: {said}"
        await append_event(connection, execution.job_no, "removed", text, execution.wave, actor)
    return len(removed)


async def _count_removed(connection: AsyncConnection, device_id: str) -> int:
    """All that ever were removed of it: an attempt before this one may have done it."""
    row = await fetch_one(
        connection,
        "SELECT count(*) FROM jobs j JOIN executions e USING (job_no) WHERE e.device_id = %s AND e.state = 'REMOVED'",
        (device_id,),
    )
    return int(row[0])


async def _close_commands(connection: AsyncConnection, device_id: str) -> bool:
    """Hand out nothing more. Returns whether the device has said that its credentials are gone."""
    cursor = await connection.execute(
        "SELECT request_id FROM device_commands WHERE device_id = %s AND state IN ('pending','accepted')", (device_id,)
    )
    for row in await cursor.fetchall():
        await close_command(connection, row[0], "canceled", "the device was decommissioned")
    cursor = await connection.execute(
        f"SELECT state FROM device_commands WHERE device_id = %s AND operation = %s AND {_OF_THIS_LIFE} "
        "ORDER BY created_at DESC LIMIT 1".encode(),
        (device_id, Operation.WIPE_CREDENTIALS.value, device_id),
    )
    answered = await cursor.fetchone()
    return answered is not None and answered[0] == CommandStatus.SUCCEEDED.value


async def _retired_before(connection: AsyncConnection, device_id: str, revision: int) -> RetiredDevice:
    """What the transaction that retired it wrote into the audit."""
    cursor = await connection.execute(
        "SELECT details FROM audit_events WHERE subject_kind = 'device' AND subject = %s AND action = 'device.retired' "
        "ORDER BY event_no DESC LIMIT 1",
        (device_id,),
    )
    row = await cursor.fetchone()
    details = row[0] if row else {}
    return RetiredDevice(
        revision=revision,
        wiped=bool(details.get("wiped")),
        executions_removed=int(details.get("executions_removed", 0)),
        certificates_revoked=int(details.get("certificates_revoked", 0)),
    )
