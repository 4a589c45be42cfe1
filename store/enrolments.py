"""Enrolments: requests for a first certificate, who may have one, and what a person decides about two keys.

`request` is one transaction. It holds the batch's row, so that places are counted one after the other; that a serial
number has one live enrolment at most, and a batch no more devices than places, is held by constraints of the database
whatever the code above them thinks. A certificate is made later, by a worker that has the CA's key (store/provisioning).

```python
answer = await EnrolmentStore(db).request(claim_certificate_id, EnrolmentRequest("SN-1", spki, pem), "10.0.0.7")
```
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import class_row, dict_row

from domain.enrolment import Admission, Batch, Judgement, KnownDevice, Serial, judge_batch, judge_request
from models.errors import ConflictError, InvalidInputError, NotFoundError
from models.identity import EnrolmentState, EnrolmentView, RevocationReason
from models.ids import provision_workflow_id
from store.access import revoke
from store.alerts import raise_alert, resolve_alert
from store.audit import append_audit
from store.engine import Database
from store.waits import forget

CHANNEL = "tidegate_enrolment"
"""NOTIFY channel: an enrolment has changed; the payload is its number."""
ENGINE = "tidegate"
"""The actor of what no person decided."""
CONFLICT_ALERT, RATE_ALERT = "enrolment-conflict", "claim-rate"
RATE_WINDOW = timedelta(seconds=60)
USUAL_PER_MINUTE = 1000
"""New requests of a batch for which nobody has said how many are usual."""
MAX_CONFLICTS = 20
"""Keys that are kept of those that claim one serial number; who sends more is only alerted of."""

LIVE = ("requested", "waiting", "issued", "active")

_BATCH = """
SELECT name, device_type, expires_at, max_devices, enrolled, listed_only, disabled_at, alarm_per_minute, now() AS now
FROM claim_batches WHERE claim_certificate_id = %s FOR UPDATE
"""

_VIEW = """
SELECT enrolment_no, serial_number, spki_sha256, batch, state, device_id, certificate_id, reason, source, requested_at,
       decided_at, decided_by
FROM enrolments
"""

_LIVE = """
SELECT e.enrolment_no, e.spki_sha256, e.batch, e.state, e.reason, e.device_id, c.pem, c.state = 'revoked' AS revoked
FROM enrolments e LEFT JOIN certificates c USING (certificate_id)
WHERE e.serial_number = %s AND e.state IN ('requested','waiting','issued','active')
"""

_FACTS = """
SELECT (SELECT batch FROM claim_serials WHERE serial_number = %(serial)s) AS listed_in,
       (SELECT retired_at FROM tombstones WHERE serial_number = %(serial)s AND released_at IS NULL) AS retired_at,
       EXISTS (SELECT FROM tombstones WHERE serial_number = %(serial)s AND released_at IS NOT NULL) AS released,
       EXISTS (SELECT FROM enrolments WHERE serial_number = %(serial)s AND batch = %(batch)s AND counted) AS has_place,
       EXISTS (SELECT FROM certificates WHERE spki_sha256 = %(spki)s)
         OR EXISTS (SELECT FROM enrolments WHERE spki_sha256 = %(spki)s AND serial_number <> %(serial)s
                    AND state IN ('requested','waiting','issued','active')) AS key_known,
       (SELECT state = 'failed' FROM enrolments
        WHERE serial_number = %(serial)s AND state NOT IN ('conflict','refused')
        ORDER BY enrolment_no DESC LIMIT 1) AS failed_before,
       (SELECT decided_by FROM enrolments
        WHERE serial_number = %(serial)s AND spki_sha256 = %(spki)s AND state = 'refused' AND decided_by <> 'tidegate'
        ORDER BY enrolment_no DESC LIMIT 1) AS refused_by
"""

_DEVICE = """
SELECT device_id, device_type, status,
       EXISTS (SELECT FROM certificates c WHERE c.device_id = d.device_id AND c.state = 'valid' AND c.not_after > now()),
       barred_at IS NOT NULL AND NOT EXISTS (
         SELECT FROM enrolments e WHERE e.serial_number = d.serial_number AND e.state = 'failed'
         AND e.reason = d.barred_reason)
FROM devices d WHERE serial_number = %s
"""
"""What an undone enrolment barred may come again by itself; what a person or the gateway barred may not."""

_ADMIT = """
INSERT INTO enrolments (serial_number, spki_sha256, public_key, batch, state, counted, source)
VALUES (%(serial)s, %(spki)s, %(public_key)s, %(batch)s, 'requested', TRUE, %(source)s)
ON CONFLICT (serial_number) WHERE state IN ('requested','waiting','issued','active') DO NOTHING
RETURNING enrolment_no
"""

_TAKE_PLACE = "UPDATE claim_batches SET enrolled = enrolled + 1 WHERE name = %s"

_NOTE = """
INSERT INTO enrolments (serial_number, spki_sha256, public_key, batch, state, reason, source, decided_at, decided_by)
SELECT %(serial)s, %(spki)s, %(public_key)s, %(batch)s, %(state)s, %(reason)s, %(source)s,
       CASE WHEN %(state)s = 'refused' THEN now() END, CASE WHEN %(state)s = 'refused' THEN 'tidegate' END
WHERE NOT EXISTS (
    SELECT FROM enrolments WHERE serial_number = %(serial)s AND spki_sha256 = %(spki)s AND state = %(state)s
    AND (reason = %(reason)s OR state = 'conflict'))
RETURNING enrolment_no
"""


@dataclass(frozen=True)
class EnrolmentRequest:
    """What a device brings: its serial number, and its public key (PEM) with the hash of that."""

    serial_number: str
    spki_sha256: str
    public_key: str


@dataclass(frozen=True)
class EnrolmentAnswer:
    """Where a request stands; `certificate` (PEM) once it is issued. `enrolment_no` is None where nothing was kept."""

    state: EnrolmentState
    reason: str = ""
    enrolment_no: int | None = None
    certificate: str | None = None


@dataclass(frozen=True)
class _Held:
    """The batch, as this transaction holds it."""

    batch: Batch
    alarm_per_minute: int | None
    now: datetime


class EnrolmentStore:
    """Enrolments in PostgreSQL."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # --- a device asks -----------------------------------------------------------------------------------------------

    async def request(self, claim_certificate_id: str, asked: EnrolmentRequest, source: str | None) -> EnrolmentAnswer:
        """Take a request, or find the one that the same key made before."""
        async with self._db.pool.connection() as connection:
            held = await _hold_batch(connection, claim_certificate_id)
            if held is None:
                return EnrolmentAnswer(EnrolmentState.REFUSED, "the claim certificate belongs to no batch")
            if refused := judge_batch(held.batch, held.now):
                return EnrolmentAnswer(EnrolmentState.REFUSED, refused)
            live = await _live(connection, asked.serial_number)
            if live is not None and live["spki_sha256"] == asked.spki_sha256:
                return _joined(live, held.batch, asked.serial_number)
            judged = judge_request(held.batch, await _facts(connection, held.batch, asked, live))
            if judged.admission is Admission.ADMIT:
                admitted = await _admit(connection, held, asked, source)
                if admitted is not None:
                    return admitted
                judged = Judgement(
                    Admission.CONFLICT,
                    f"serial number {asked.serial_number} is enrolled with another key; a person has to decide which one holds",
                )
            return await _note(connection, held, asked, judged, source)

    async def answer(self, enrolment_no: int) -> EnrolmentAnswer:
        """Where it stands now."""
        async with self._db.pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT e.state, e.reason, c.pem FROM enrolments e LEFT JOIN certificates c USING (certificate_id) "
                "WHERE e.enrolment_no = %s",
                (enrolment_no,),
            )
            row = await cursor.fetchone()
        if row is None:
            raise NotFoundError(f"no enrolment {enrolment_no}")
        return EnrolmentAnswer(EnrolmentState(row[0]), row[1], enrolment_no, row[2])

    # --- a person looks, and decides -----------------------------------------------------------------------------------

    async def find(
        self, *, state: str | None = None, batch: str | None = None, serial: str | None = None, limit: int = 100
    ) -> list[EnrolmentView]:
        """The newest first."""
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(EnrolmentView)) as cursor,
        ):
            await cursor.execute(
                f"{_VIEW} WHERE (%(state)s::text IS NULL OR state = %(state)s) "
                "AND (%(batch)s::text IS NULL OR batch = %(batch)s) "
                "AND (%(serial)s::text IS NULL OR serial_number = %(serial)s) "
                "ORDER BY enrolment_no DESC LIMIT %(limit)s".encode(),
                {"state": state, "batch": batch, "serial": serial, "limit": limit},
            )
            return await cursor.fetchall()

    async def get(self, enrolment_no: int) -> EnrolmentView:
        """The enrolment of this number; raises NotFoundError."""
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(EnrolmentView)) as cursor,
        ):
            await cursor.execute(f"{_VIEW} WHERE enrolment_no = %s".encode(), (enrolment_no,))
            found = await cursor.fetchone()
        if found is None:
            raise NotFoundError(f"no enrolment {enrolment_no}; 'enrolment list' shows those there are")
        return found

    async def accept_conflict(self, enrolment_no: int, actor: str, reason: str) -> EnrolmentView:
        """Let the new key in: what the old one had is revoked, its enrolment closed, and this one stands in its place.

        Idempotent: one that was accepted before stays as it is. The certificate is made by the provisioning of this
        enrolment. Raises ConflictError where the enrolment is no conflict.
        """
        async with self._db.pool.connection() as connection:
            conflict = await _lock_conflict(connection, enrolment_no)
            if conflict["state"] in LIVE and await _accepted_before(
                connection, conflict["serial_number"], enrolment_no
            ):
                return await self.get(enrolment_no)
            _must_be_conflict(conflict, enrolment_no)
            serial, text = conflict["serial_number"], f"enrolment {enrolment_no} takes its place: {reason or 'decided'}"
            # Before the device is looked at: a certificate that is being issued for the other key is there afterwards.
            await connection.execute(
                "UPDATE enrolments SET state = 'closed', reason = %s, decided_at = now(), decided_by = %s "
                "WHERE serial_number = %s AND state IN ('requested','waiting','issued','active')",
                (text, actor, serial),
            )
            device = await (await connection.execute(_DEVICE, (serial,))).fetchone()
            if device is not None:
                await revoke(connection, device[0], RevocationReason.SUPERSEDED, actor, text)
                await connection.execute(
                    "UPDATE devices SET status = 'provisioning', updated_at = now() WHERE device_id = %s "
                    "AND status <> 'retired'",
                    (device[0],),
                )
            await _take_place_once(connection, enrolment_no, conflict)
            former = provision_workflow_id(serial)
            await forget(connection, former)
            await connection.execute("DELETE FROM workflow_outbox WHERE workflow_id = %s", (former,))
            await connection.execute(
                "UPDATE enrolments SET state = 'requested', counted = TRUE, reason = %s, decided_at = now(), "
                "decided_by = %s WHERE enrolment_no = %s",
                (reason, actor, enrolment_no),
            )
            await _settled(connection, enrolment_no, serial, actor, "enrolment.accepted", reason)
        return await self.get(enrolment_no)

    async def reject_conflict(self, enrolment_no: int, actor: str, reason: str) -> EnrolmentView:
        """The key that holds goes on to hold; this one is refused from now on. Raises ConflictError for no conflict."""
        async with self._db.pool.connection() as connection:
            conflict = await _lock_conflict(connection, enrolment_no)
            if conflict["state"] != "refused":
                _must_be_conflict(conflict, enrolment_no)
                await connection.execute(
                    "UPDATE enrolments SET state = 'refused', reason = %s, decided_at = now(), decided_by = %s "
                    "WHERE enrolment_no = %s",
                    (reason or "rejected", actor, enrolment_no),
                )
                await _settled(connection, enrolment_no, conflict["serial_number"], actor, "enrolment.rejected", reason)
        return await self.get(enrolment_no)


# --- a request's steps -------------------------------------------------------------------------------------------------


async def tell(connection: AsyncConnection, enrolment_no: int) -> None:
    """Wake whoever waits for this enrolment, once this transaction commits."""
    await connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, str(enrolment_no)))


async def _hold_batch(connection: AsyncConnection, claim_certificate_id: str) -> _Held | None:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_BATCH.encode(), (claim_certificate_id,))
        row = await cursor.fetchone()
    if row is None:
        return None
    return _Held(
        Batch(
            row["name"],
            row["device_type"],
            row["expires_at"],
            row["max_devices"],
            row["enrolled"],
            row["listed_only"],
            row["disabled_at"] is not None,
        ),
        row["alarm_per_minute"],
        row["now"],
    )


async def _live(connection: AsyncConnection, serial_number: str) -> dict[str, Any] | None:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_LIVE, (serial_number,))
        return await cursor.fetchone()


def _joined(live: dict[str, Any], batch: Batch, serial_number: str) -> EnrolmentAnswer:
    if live["batch"] != batch.name:
        return EnrolmentAnswer(
            EnrolmentState.REFUSED, f"serial number {serial_number} is enrolled through another batch than {batch.name}"
        )
    if live["revoked"]:
        return EnrolmentAnswer(
            EnrolmentState.REFUSED,
            f"the certificate of this key for serial number {serial_number} was revoked, and a key does not come back; "
            "make a new key, and a person has to decide whether it gets a certificate",
        )
    return EnrolmentAnswer(EnrolmentState(live["state"]), live["reason"], live["enrolment_no"], live["pem"])


async def _facts(
    connection: AsyncConnection, batch: Batch, asked: EnrolmentRequest, live: dict[str, Any] | None
) -> Serial:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_FACTS, {"serial": asked.serial_number, "batch": batch.name, "spki": asked.spki_sha256})
        row = await cursor.fetchone()
    assert row is not None
    device = await (await connection.execute(_DEVICE, (asked.serial_number,))).fetchone()
    return Serial(
        number=asked.serial_number,
        enrolled_with_other_key=live is not None,
        device=None if device is None else KnownDevice(*device),
        **row | {"failed_before": bool(row["failed_before"])},
    )


async def _admit(
    connection: AsyncConnection, held: _Held, asked: EnrolmentRequest, source: str | None
) -> EnrolmentAnswer | None:
    """A place and a row; None when another key was faster."""
    batch = held.batch.name
    had_place = await _has_place(connection, asked.serial_number, batch)
    cursor = await connection.execute(_ADMIT, _values(asked, batch, source))
    row = await cursor.fetchone()
    if row is None:
        return None
    if not had_place:
        await connection.execute(_TAKE_PLACE, (batch,))
    await append_audit(
        connection, f"batch:{batch}", "enrolment.requested", "serial", asked.serial_number, "",
        {"enrolment_no": row[0], "spki_sha256": asked.spki_sha256, "source": source},
    )  # fmt: skip
    await _watch_rate(connection, held)
    return EnrolmentAnswer(EnrolmentState.REQUESTED, "", row[0])


async def _note(
    connection: AsyncConnection, held: _Held, asked: EnrolmentRequest, judged: Judgement, source: str | None
) -> EnrolmentAnswer:
    """Keep a refused or disputed request, once for each key, and tell a person of a dispute."""
    conflict = judged.admission is Admission.CONFLICT
    state = EnrolmentState.CONFLICT if conflict else EnrolmentState.REFUSED
    if conflict:
        next_step = "'enrolment list --status conflict' shows the keys, 'enrolment resolve' decides"
        await raise_alert(connection, CONFLICT_ALERT, asked.serial_number, f"{judged.reason}; {next_step}")
    if conflict and await _conflicts(connection, asked.serial_number) >= MAX_CONFLICTS:
        return EnrolmentAnswer(state, judged.reason)
    if not conflict and await _watch_rate(connection, held):
        return EnrolmentAnswer(state, judged.reason)
    values = _values(asked, held.batch.name, source) | {"state": state.value, "reason": judged.reason}
    row = await (await connection.execute(_NOTE, values)).fetchone()
    if row is not None:
        action = "enrolment.conflict" if conflict else "enrolment.refused"
        details = {"enrolment_no": row[0], "spki_sha256": asked.spki_sha256, "source": source}
        await append_audit(
            connection, f"batch:{held.batch.name}", action, "serial", asked.serial_number, judged.reason, details
        )
        await _watch_rate(connection, held)
    return EnrolmentAnswer(state, judged.reason, row[0] if row else None)


def _values(asked: EnrolmentRequest, batch: str, source: str | None) -> dict[str, Any]:
    return {
        "serial": asked.serial_number,
        "spki": asked.spki_sha256,
        "public_key": asked.public_key,
        "batch": batch,
        "source": source,
    }


async def _has_place(connection: AsyncConnection, serial_number: str, batch: str) -> bool:
    cursor = await connection.execute(
        "SELECT EXISTS (SELECT FROM enrolments WHERE serial_number = %s AND batch = %s AND counted)",
        (serial_number, batch),
    )
    row = await cursor.fetchone()
    return bool(row and row[0])


async def _conflicts(connection: AsyncConnection, serial_number: str) -> int:
    cursor = await connection.execute(
        "SELECT count(*) FROM enrolments WHERE serial_number = %s AND state = 'conflict'", (serial_number,)
    )
    row = await cursor.fetchone()
    return int(row[0]) if row else 0


async def _watch_rate(connection: AsyncConnection, held: _Held) -> bool:
    """Whether more new requests have come within a minute than the batch says is usual; then a person is told."""
    limit, batch = held.alarm_per_minute or USUAL_PER_MINUTE, held.batch.name
    cursor = await connection.execute(
        "SELECT count(*) FROM (SELECT FROM enrolments WHERE batch = %s AND requested_at > now() - %s LIMIT %s) recent",
        (batch, RATE_WINDOW, limit + 1),
    )
    row = await cursor.fetchone()
    if row is None or row[0] <= limit:
        return False
    text = (
        f"more than {limit} new requests within {RATE_WINDOW.total_seconds():.0f} s with the claim certificate of batch "
        f"{batch}; where that is not the line at work, 'claim disable {batch}' stops it"
    )
    await raise_alert(connection, RATE_ALERT, batch, text)
    return True


# --- a decision's steps ------------------------------------------------------------------------------------------------


async def _lock_conflict(connection: AsyncConnection, enrolment_no: int) -> dict[str, Any]:
    """The batch's row first, as `request` does, or the two would wait for each other."""
    await connection.execute(
        "SELECT FROM claim_batches WHERE name = (SELECT batch FROM enrolments WHERE enrolment_no = %s) FOR UPDATE",
        (enrolment_no,),
    )
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            "SELECT serial_number, batch, state, decided_by FROM enrolments WHERE enrolment_no = %s FOR UPDATE",
            (enrolment_no,),
        )
        row = await cursor.fetchone()
    if row is None:
        raise NotFoundError(f"no enrolment {enrolment_no}; 'enrolment list' shows those there are")
    return row


def _must_be_conflict(row: dict[str, Any], enrolment_no: int) -> None:
    if row["state"] != "conflict":
        raise ConflictError(
            f"cannot resolve enrolment {enrolment_no}: it is {row['state']}, expected a conflict; "
            "'enrolment list --status conflict' shows those that wait for a decision"
        )


async def _accepted_before(connection: AsyncConnection, serial_number: str, enrolment_no: int) -> bool:
    """Whether a person has decided for this conflict. One that is in because its batch let it in was none."""
    cursor = await connection.execute(
        "SELECT EXISTS (SELECT FROM audit_events WHERE subject_kind = 'serial' AND subject = %s "
        "AND action = 'enrolment.accepted' AND details->>'enrolment_no' = %s)",
        (serial_number, str(enrolment_no)),
    )
    row = await cursor.fetchone()
    return bool(row and row[0])


async def _take_place_once(connection: AsyncConnection, enrolment_no: int, row: dict[str, Any]) -> None:
    """A person's word does not stretch a batch: the constraint holds for it, too."""
    if await _has_place(connection, row["serial_number"], row["batch"]):
        return
    cursor = await connection.execute(
        "UPDATE claim_batches SET enrolled = enrolled + 1 WHERE name = %s AND enrolled < max_devices", (row["batch"],)
    )
    if not cursor.rowcount:
        raise InvalidInputError(
            f"cannot accept enrolment {enrolment_no}: batch {row['batch']} is full; the device has to come with the "
            "claim certificate of another batch"
        )


async def _settled(
    connection: AsyncConnection, enrolment_no: int, serial_number: str, actor: str, action: str, reason: str
) -> None:
    await append_audit(connection, actor, action, "serial", serial_number, reason, {"enrolment_no": enrolment_no})
    if not await _conflicts(connection, serial_number):
        await resolve_alert(connection, CONFLICT_ALERT, serial_number, actor)
    await tell(connection, enrolment_no)
