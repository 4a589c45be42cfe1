"""Changes of alerts on their way to people: gathered by rule and event into digests, and handed over once.

Rows are written by a trigger on `alerts` (migration 0003). First a digest is written on the rows that belong together and
committed, then its workflow is started, then they are marked as handed over. Whoever dies in between leaves rows that
bear a digest already, and the next one starts a workflow of the same id.
"""

from datetime import datetime, timedelta
from uuid import uuid4

from psycopg import AsyncConnection
from psycopg.rows import dict_row

from domain.notifications import compose
from models.alerting import AlertEvent, NotedAlert, NotifyInput
from store.engine import Database

NOBODY = "none"
"""The digest of what nobody is told of."""

RELAY_LOCK = 7311462
MOST = 10_000
"""Changes in one digest."""

_EVENTS = {"open": AlertEvent.OPENED, "acknowledged": AlertEvent.ACKNOWLEDGED, "resolved": AlertEvent.RESOLVED}

_GATHER = """
WITH waiting AS (
  SELECT n.notification_no, n.event, n.at, a.rule FROM alert_notifications n JOIN alerts a USING (alert_no)
  WHERE n.handed_over_at IS NULL AND n.digest IS NULL ORDER BY n.notification_no LIMIT %(most)s
), ripe AS (
  SELECT rule, event FROM waiting w GROUP BY rule, event
  HAVING min(at) <= clock_timestamp() - CASE WHEN EXISTS (
    SELECT FROM alert_notifications t JOIN alerts b USING (alert_no)
    WHERE t.handed_over_at > clock_timestamp() - %(quiet)s::interval AND t.event = w.event AND b.rule = w.rule
  ) THEN %(quiet)s::interval ELSE %(gather)s::interval END
), digests AS (
  SELECT rule, event, replace(gen_random_uuid()::text, '-', '') AS digest FROM ripe
)
UPDATE alert_notifications n SET digest = d.digest FROM waiting w JOIN digests d USING (rule, event)
WHERE n.notification_no = w.notification_no
"""
"""What is new is told soon; what goes on being told, together and not so often."""

_OPEN_DIGESTS = """
SELECT n.digest, n.event, n.at, a.rule, a.alert_no, a.subject, a.text, a.severity, d.site_id AS site
FROM alert_notifications n JOIN alerts a USING (alert_no) LEFT JOIN devices d ON d.device_id = a.subject
WHERE n.handed_over_at IS NULL AND n.digest IS NOT NULL ORDER BY n.notification_no
"""


class NotificationStore:
    """What the relay in the worker does."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def digests(self, gather: timedelta, quiet: timedelta) -> list[NotifyInput]:
        """What is to be told now, of what has waited for `gather`; for `quiet` where the same was told just before.

        Empty while another relay is at it.
        """
        async with self._db.pool.connection() as connection:
            if not await _is_ours(connection):
                return []
            await connection.execute(_GATHER, {"gather": gather, "quiet": quiet, "most": MOST})
            async with connection.cursor(row_factory=dict_row) as cursor:
                await cursor.execute(_OPEN_DIGESTS)
                rows = await cursor.fetchall()
                await cursor.execute("SELECT clock_timestamp() AS now")
                clock = await cursor.fetchone()
        assert clock is not None
        return _composed(rows, clock["now"])

    async def handed_over(self, digest: str) -> int:
        """A workflow has it; how many changes it tells of."""
        async with self._db.pool.connection() as connection:
            cursor = await connection.execute(
                "UPDATE alert_notifications SET handed_over_at = clock_timestamp() "
                "WHERE digest = %s AND handed_over_at IS NULL",
                (digest,),
            )
            return cursor.rowcount

    async def leave(self, after: timedelta) -> int:
        """Tell nobody of what has waited for so long; how many that were."""
        async with self._db.pool.connection() as connection:
            cursor = await connection.execute(
                f"UPDATE alert_notifications SET handed_over_at = clock_timestamp(), digest = '{NOBODY}' "
                "WHERE handed_over_at IS NULL AND digest IS NULL AND at <= clock_timestamp() - %s::interval".encode(),
                (after,),
            )
            return cursor.rowcount


async def _is_ours(connection: AsyncConnection) -> bool:
    """Whether no other relay gathers in this moment: two would tear apart what belongs together."""
    row = await (await connection.execute("SELECT pg_try_advisory_xact_lock(%s)", (RELAY_LOCK,))).fetchone()
    return bool(row and row[0])


def _composed(rows: list[dict[str, object]], now: datetime) -> list[NotifyInput]:
    found: dict[str, list[dict[str, object]]] = {}
    for row in rows:
        found.setdefault(str(row["digest"]), []).append(row)
    return [
        compose(
            digest,
            str(of[0]["rule"]),
            _EVENTS[str(of[0]["event"])],
            [NotedAlert.model_validate(row) for row in of],
            now,
        )
        for digest, of in found.items()
    ]


def new_digest() -> str:
    """Of a notification that no alert stands behind."""
    return uuid4().hex
