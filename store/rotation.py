"""Rotation in PostgreSQL: which certificates a device has, asking for a new one, and ending it one way or the other.

Each method is one transaction and can be repeated. What a workflow was told by a signal is never believed: what is
revoked is decided here, under the lock that every change of access takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from psycopg import AsyncConnection
from psycopg.rows import class_row

from domain.rotation import HeldCertificate, ending_text, is_ending, share_left, sort_certificates
from domain.standing import why_not_rotate
from models.errors import RefusedError
from models.identity import DeviceHappening, RevocationReason
from models.lifecycle import (
    AskForRotationInput,
    CertificatesSeen,
    DueCertificate,
    EndedRotation,
    EndRotationInput,
    RotateFleetInput,
    RotationFigures,
    RotationSeen,
)
from models.protocol import Operation
from store.access import change_access, revoke
from store.alerts import raise_alert, resolve_alert
from store.audit import append_audit
from store.commands import close_command, open_command
from store.engine import Database, fetch_one
from store.lifecycle import refuse, standing
from store.waits import expect, forget

ENDING_ALERT, REVERTED_ALERT = "certificate-ending", "rotation-reverted"

_VALID = """
SELECT certificate_id, generation, confirmed_at IS NOT NULL AS confirmed FROM certificates
WHERE device_id = %s AND state = 'valid' AND not_after > now() ORDER BY generation DESC
"""

_NEWEST = """
SELECT DISTINCT ON (c.device_id) c.device_id, c.certificate_id, c.generation, c.authority_id, c.issued_at, c.not_after,
       c.confirmed_at
FROM certificates c WHERE c.state = 'valid' AND c.not_after > now() ORDER BY c.device_id, c.generation DESC
"""

_IS_DUE = "n.not_after - now() < (n.not_after - n.issued_at) * (%(percent)s / 100.0)::float8"

_LEFT_ALONE = """
(EXISTS (SELECT FROM device_commands k WHERE k.device_id = n.device_id AND k.operation = %(operation)s
         AND k.created_at > now() - %(left_alone)s::interval)
 OR n.issued_at > now() - LEAST(%(left_alone)s::interval, (n.not_after - n.issued_at) / 4))
"""
"""A try that is recent: it was asked, or has a certificate that is new. New is at most a quarter of a certificate's
life, or those that live for a day would not be renewed in time."""

_OVERLAPS = """
(n.issued_at < now() - %(overlap)s::interval AND EXISTS (
   SELECT FROM certificates o WHERE o.device_id = n.device_id AND o.state = 'valid' AND o.not_after > now()
   AND o.generation < n.generation))
"""
"""Two are valid for longer than they may be: whoever was to end that is gone."""

_DUE = f"""
WITH newest AS ({_NEWEST})
SELECT n.device_id, n.certificate_id, n.not_after, NOT {_OVERLAPS} AS ask,
       CASE WHEN {_OVERLAPS} THEN 'two certificates are valid for longer than they may overlap'
            WHEN a.state <> 'active' THEN 'its CA ' || a.name || ' is ' || a.state
            WHEN {_IS_DUE} THEN 'less than ' || %(percent)s || ' %% of its life is left'
            ELSE 'all are asked' END AS reason
FROM newest n JOIN devices d USING (device_id) JOIN authorities a USING (authority_id)
WHERE d.status NOT IN ('retired','provisioning') AND d.barred_at IS NULL
  AND (%(sites)s::text[] IS NULL OR d.site_id = ANY(%(sites)s))
  AND ({_OVERLAPS} OR (%(everything)s OR a.state <> 'active' OR {_IS_DUE}) AND NOT {_LEFT_ALONE})
  AND (%(after_end)s::timestamptz IS NULL OR (n.not_after, n.device_id) > (%(after_end)s, %(after_device)s))
ORDER BY n.not_after, n.device_id LIMIT %(limit)s
"""

_FIGURES = f"""
WITH newest AS ({_NEWEST})
SELECT count(*) AS valid,
       count(*) FILTER (WHERE a.state <> 'active' OR {_IS_DUE}) AS due,
       count(*) FILTER (WHERE a.state <> 'active') AS of_former_authorities,
       count(*) FILTER (WHERE n.not_after - now() < (n.not_after - n.issued_at) * 0.1) AS ending,
       count(*) FILTER (WHERE n.confirmed_at IS NULL AND EXISTS (
         SELECT FROM certificates o WHERE o.device_id = n.device_id AND o.state = 'valid' AND o.not_after > now()
         AND o.generation < n.generation)) AS unconfirmed,
       min(n.not_after) AS next_end,
       (SELECT count(DISTINCT device_id) FROM device_commands k
        WHERE k.operation = %(operation)s AND k.created_at > now() - interval '24 hours') AS asked,
       (SELECT count(*) FROM devices d WHERE d.status <> 'retired'
        AND EXISTS (SELECT FROM certificates c WHERE c.device_id = d.device_id)
        AND NOT EXISTS (SELECT FROM newest v WHERE v.device_id = d.device_id)) AS expired
FROM newest n JOIN devices d USING (device_id) JOIN authorities a USING (authority_id)
WHERE d.status <> 'retired'
"""


@dataclass
class RotationStore:
    """See the module. `db` must be open."""

    db: Database

    async def look(self, device_id: str, *, ask: bool) -> CertificatesSeen:
        """Where a rotation begins. Raises NotFoundError or RefusedError."""
        async with self.db.pool.connection() as connection:
            refuse(why_not_rotate(await standing(connection, device_id)))
            return sort_certificates(await _valid(connection, device_id), ask=ask)

    async def ask(self, asked: AskForRotationInput) -> RotationSeen:
        """Wait for what is still to come, and open the command where the device is to be asked.

        Raises NotFoundError or RefusedError: the device is not heard any more, and nothing is waited for.
        """
        try:
            return await self._ask(asked)
        except RefusedError:
            await self.forget(asked.workflow_id)
            raise

    async def _ask(self, asked: AskForRotationInput) -> RotationSeen:
        async with self.db.pool.connection() as connection:
            # Whoever retires the device at this moment ends its commands and waits: those of before, or none are made.
            refuse(why_not_rotate(await standing(connection, asked.device_id, lock=True)))
            seen = await _seen(connection, asked.device_id, asked.old)
            waits: dict[DeviceHappening, int | None] = {}
            if seen.confirmed is None:
                waits[DeviceHappening.CERTIFICATE_CONFIRMED] = None
            if seen.issued is None:
                waits[DeviceHappening.CERTIFICATE_ISSUED] = None
                if asked.ask:
                    operation = Operation.ROTATE_CERTIFICATE
                    await open_command(connection, asked.device_id, operation, asked.actor, asked.until)
            await expect(connection, asked.device_id, asked.workflow_id, waits)
            return seen

    async def settle(self, asked: EndRotationInput) -> EndedRotation:
        """The new certificate has been seen to connect: revoke every other. `confirmed` False: it has not."""
        async with self.db.pool.connection() as connection:
            await change_access(connection)
            seen = await _seen(connection, asked.device_id, asked.old)
            if seen.confirmed is None:
                return EndedRotation(issued=seen.issued is not None)
            return await _settle(connection, asked, seen.confirmed)

    async def give_up(self, asked: EndRotationInput) -> EndedRotation:
        """The device did not come in time. `issued` True: it came in the last moment, so the rotation goes on."""
        async with self.db.pool.connection() as connection:
            seen = await _seen(connection, asked.device_id, asked.old)
            if seen.issued is not None:
                return EndedRotation(issued=True)
            await _stop_asking(connection, asked, "expired", "the device did not come for a certificate in time")
            kept = asked.old[0] if asked.old else None
            await _alert_if_ending(connection, asked.device_id, asked.reason)
            details = {"certificate_id": kept}
            await append_audit(
                connection, asked.actor, "certificate.unanswered", "device", asked.device_id, asked.reason, details
            )
            return EndedRotation(kept=kept, reason=asked.reason)

    async def revert(self, asked: EndRotationInput) -> EndedRotation:
        """The new certificate was not seen in time: revoke it, so that no two are valid beyond the overlap.

        `confirmed` True: it was seen in the last moment, and the others are revoked instead. Where the old ones have
        ended by themselves, or are about to, the new one stays: a device that was switched off while it rotated would
        come back without any that is valid.
        """
        async with self.db.pool.connection() as connection:
            await change_access(connection)
            seen = await _seen(connection, asked.device_id, asked.old)
            if seen.confirmed is not None:
                return await _settle(connection, asked, seen.confirmed)
            held = await _valid(connection, asked.device_id)
            old = [each.certificate_id for each in held if each.certificate_id in asked.old]
            new = [each.certificate_id for each in held if each.certificate_id not in asked.old]
            if not old or (new and await _all_ending(connection, old)):
                return await _keep_unseen(connection, asked, new)
            if new:
                await revoke(
                    connection, asked.device_id, RevocationReason.SUPERSEDED, asked.actor, asked.reason, only=new
                )
                await connection.execute(
                    "UPDATE device_credentials SET certificate_id = %s WHERE device_id = %s", (old[0], asked.device_id)
                )
                text = f"{asked.device_id} fetched a new certificate and was not seen with it: {asked.reason}"
                await raise_alert(connection, REVERTED_ALERT, asked.device_id, text)
            await _stop_asking(connection, asked, "expired", asked.reason)
            await _alert_if_ending(connection, asked.device_id, asked.reason)
            revoked = await _revoked_since(connection, asked)
            return EndedRotation(kept=old[0], issued=bool(new), revoked=revoked, reason=asked.reason)

    async def forget(self, workflow_id: str) -> None:
        """Wait for nothing any more."""
        async with self.db.pool.connection() as connection:
            await forget(connection, workflow_id)

    # --- the fleet -----------------------------------------------------------------------------------------------------

    async def due(
        self, asked: RotateFleetInput, limit: int, after: DueCertificate | None = None
    ) -> list[DueCertificate]:
        """Devices to ask next, those whose certificate ends first before others, behind `after`.

        A device that was asked lately is not among them, so a sweep that begins anew goes on where it was.
        """
        values = {
            **_rule(asked),
            "after_end": after.not_after if after else None,
            "after_device": after.device_id if after else None,
            "limit": limit,
        }
        async with (
            self.db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(DueCertificate)) as cursor,
        ):
            await cursor.execute(_DUE.encode(), values)
            return await cursor.fetchall()

    async def count_due(self, asked: RotateFleetInput) -> int:
        """How many `due` would find in all."""
        values = {**_rule(asked), "after_end": None, "after_device": None, "limit": None}
        async with self.db.pool.connection() as connection:
            row = await fetch_one(connection, f"SELECT count(*) FROM ({_DUE}) due", values)
        return int(row[0])

    async def figures(self) -> RotationFigures:
        """Where the fleet's certificates stand."""
        async with (
            self.db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(RotationFigures)) as cursor,
        ):
            await cursor.execute(_FIGURES.encode(), _rule(RotateFleetInput()))
            return await cursor.fetchone() or RotationFigures()


def _rule(asked: RotateFleetInput) -> dict[str, object]:
    return {
        "percent": asked.ask_below_percent,
        "everything": asked.everything,
        "sites": list(asked.sites) or None,
        "left_alone": asked.left_alone,
        "overlap": asked.overlap,
        "operation": Operation.ROTATE_CERTIFICATE.value,
    }


async def _valid(connection: AsyncConnection, device_id: str) -> list[HeldCertificate]:
    rows = await (await connection.execute(_VALID, (device_id,))).fetchall()
    return [HeldCertificate(*row) for row in rows]


async def _seen(connection: AsyncConnection, device_id: str, old: Sequence[str]) -> RotationSeen:
    new = [each for each in await _valid(connection, device_id) if each.certificate_id not in old]
    confirmed = next((each.certificate_id for each in new if each.confirmed), None)
    return RotationSeen(issued=new[0].certificate_id if new else None, confirmed=confirmed)


async def _settle(connection: AsyncConnection, asked: EndRotationInput, confirmed: str) -> EndedRotation:
    device_id = asked.device_id
    held = await _valid(connection, device_id)
    others = [each.certificate_id for each in held if each.certificate_id != confirmed]
    if others:
        text = asked.reason or "superseded by a certificate that has been seen to connect"
        await revoke(connection, device_id, RevocationReason.SUPERSEDED, asked.actor, text, only=others)
    noted = await connection.execute(
        "INSERT INTO device_credentials AS c (device_id, certificate_id, last_rotation) VALUES (%s, %s, now()) "
        "ON CONFLICT (device_id) DO UPDATE SET certificate_id = excluded.certificate_id, last_rotation = now() "
        "WHERE c.certificate_id IS DISTINCT FROM excluded.certificate_id OR c.last_rotation IS NULL OR c.last_rotation < "
        "(SELECT confirmed_at FROM certificates k WHERE k.certificate_id = excluded.certificate_id)",
        (device_id, confirmed),
    )
    if noted.rowcount:
        details = {"certificate_id": confirmed, "superseded": others}
        await append_audit(connection, asked.actor, "certificate.rotated", "device", device_id, asked.reason, details)
    await _stop_asking(connection, asked, "canceled", "the device has a new certificate, and has been seen with it")
    for rule in (ENDING_ALERT, REVERTED_ALERT):
        await resolve_alert(connection, rule, device_id, asked.actor)
    revoked = await _revoked_since(connection, asked)
    return EndedRotation(kept=confirmed, confirmed=True, issued=True, revoked=revoked)


async def _keep_unseen(connection: AsyncConnection, asked: EndRotationInput, new: Sequence[str]) -> EndedRotation:
    await _stop_asking(connection, asked, "expired", asked.reason)
    reason = f"{asked.reason}; it stays, because the one before has ended or is about to"
    if new:
        await raise_alert(connection, REVERTED_ALERT, asked.device_id, f"{asked.device_id}: {reason}")
    return EndedRotation(kept=new[0] if new else None, issued=bool(new), reason=reason)


async def _stop_asking(connection: AsyncConnection, asked: EndRotationInput, state: str, answer: str) -> None:
    """Forget the waits; the command is handed out no more."""
    cursor = await connection.execute(
        "SELECT request_id FROM device_commands WHERE device_id = %s AND operation = %s AND state IN ('pending','accepted')",
        (asked.device_id, Operation.ROTATE_CERTIFICATE.value),
    )
    for row in await cursor.fetchall():
        await close_command(connection, row[0], state, answer)
    await forget(connection, asked.workflow_id)


async def _revoked_since(connection: AsyncConnection, asked: EndRotationInput) -> tuple[str, ...]:
    """What this rotation revoked, by this attempt or by one before it: the old ones, and those issued after them."""
    cursor = await connection.execute(
        "SELECT certificate_id FROM certificates WHERE device_id = %(device)s AND state = 'revoked' "
        "AND (certificate_id = ANY(%(old)s) OR generation > (SELECT max(generation) FROM certificates "
        "WHERE device_id = %(device)s AND certificate_id = ANY(%(old)s))) ORDER BY generation",
        {"device": asked.device_id, "old": list(asked.old)},
    )
    return tuple(row[0] for row in await cursor.fetchall())


async def _all_ending(connection: AsyncConnection, certificate_ids: Sequence[str]) -> bool:
    cursor = await connection.execute(
        "SELECT issued_at, not_after, now() FROM certificates WHERE certificate_id = ANY(%s)", (list(certificate_ids),)
    )
    return all(is_ending(share_left(*row)) for row in await cursor.fetchall())


async def _alert_if_ending(connection: AsyncConnection, device_id: str, tried: str) -> None:
    cursor = await connection.execute(
        "SELECT issued_at, not_after FROM certificates WHERE device_id = %s AND state = 'valid' "
        "ORDER BY not_after DESC LIMIT 1",
        (device_id,),
    )
    row = await cursor.fetchone()
    if row is None:
        return
    share = share_left(row[0], row[1], datetime.now(UTC))
    if (text := ending_text(device_id, share, row[1], tried)) is not None:
        await raise_alert(connection, ENDING_ALERT, device_id, text)
