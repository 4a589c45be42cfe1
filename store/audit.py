"""The audit: who or what did what to an identity, when and why. Append-only, a trigger of the database sees to it.

Written in the transaction that does what it says, so there is no deed without a line and no line without a deed.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from models.identity import AuditView
from store.engine import Database

_APPEND = """
INSERT INTO audit_events (actor, action, subject_kind, subject, reason, details) VALUES (%s, %s, %s, %s, %s, %s)
"""

_FIND = """
SELECT event_no, at, actor, action, subject_kind, subject, reason, details FROM audit_events
WHERE (%(kind)s::text IS NULL OR subject_kind = %(kind)s) AND (%(subject)s::text IS NULL OR subject = %(subject)s)
  AND (%(subjects)s::jsonb IS NULL OR (subject_kind, subject) IN
       (SELECT kind, subject FROM jsonb_to_recordset(%(subjects)s::jsonb) AS s(kind text, subject text)))
  AND (%(actor)s::text IS NULL OR actor = %(actor)s) AND (%(action)s::text IS NULL OR action LIKE %(action)s)
  AND (%(since)s::timestamptz IS NULL OR at >= %(since)s)
ORDER BY event_no DESC LIMIT %(limit)s
"""

_SERIALS = """
SELECT serial_number FROM devices WHERE device_id = %(device)s
UNION SELECT serial_number FROM enrolments WHERE device_id = %(device)s
UNION SELECT serial_number FROM tombstones WHERE device_id = %(device)s
"""


async def append_audit(
    connection: AsyncConnection,
    actor: str,
    action: str,
    subject_kind: str,
    subject: str,
    reason: str = "",
    details: Mapping[str, Any] | None = None,
) -> None:
    """Add a line.

    Args:
        action: `<what>.<did>`: certificate.issued, certificate.revoked, enrolment.refused, device.retired, ...
        subject_kind: device, serial, batch, authority or broker.
    """
    await connection.execute(_APPEND, (actor, action, subject_kind, subject, reason, Jsonb(dict(details or {}))))


class AuditStore:
    """Reads the audit."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def find(
        self,
        *,
        subject_kind: str | None = None,
        subject: str | None = None,
        subjects: Sequence[tuple[str, str]] | None = None,
        actor: str | None = None,
        action: str | None = None,
        since: datetime | None = None,
        limit: int = 100,
    ) -> list[AuditView]:
        """The newest lines first.

        Args:
            subjects: any of these (kind, subject).
            action: a pattern as of LIKE: `certificate.%`.
        """
        arguments = {
            "kind": subject_kind,
            "subject": subject,
            "subjects": None if subjects is None else Jsonb([{"kind": k, "subject": s} for k, s in subjects]),
            "actor": actor,
            "action": action,
            "since": since,
            "limit": limit,
        }
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(AuditView)) as cursor,
        ):
            await cursor.execute(_FIND, arguments)
            return await cursor.fetchall()

    async def subjects_of_device(self, device_id: str) -> list[tuple[str, str]]:
        """What a device appears as in the audit: its id, and the serial numbers it has borne, whose enrolment is theirs."""
        async with self._db.pool.connection() as connection:
            cursor = await connection.execute(_SERIALS, {"device": device_id})
            return [("device", device_id), *(("serial", row[0]) for row in await cursor.fetchall())]
