"""Alerts: what a person has to look at. One row for each rule and subject until it is resolved, however often it recurs."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

from psycopg import AsyncConnection
from psycopg.rows import class_row

from models.errors import NotFoundError
from models.identity import AlertView
from store.engine import Database

REPEAT = timedelta(hours=1)

_RAISE = """
INSERT INTO alerts AS a (rule, subject, text, state) VALUES (%s, %s, %s, 'open')
ON CONFLICT (rule, subject) WHERE state <> 'resolved'
DO UPDATE SET text = excluded.text, occurrences = a.occurrences + 1, last_at = now()
"""

_COLUMNS = """
alert_no, rule, subject, text, state, occurrences, opened_at, last_at, acknowledged_at, acknowledged_by, resolved_at,
resolved_by
"""


async def raise_alert(connection: AsyncConnection, rule: str, subject: str, text: str) -> None:
    """Open an alert, or note that it has come again."""
    await connection.execute(_RAISE, (rule, subject, text))


async def resolve_alert(connection: AsyncConnection, rule: str, subject: str, actor: str) -> None:
    """Close the alert of this rule and subject, where one is open."""
    await connection.execute(
        "UPDATE alerts SET state = 'resolved', resolved_at = now(), resolved_by = %s "
        "WHERE rule = %s AND subject = %s AND state <> 'resolved'",
        (actor, rule, subject),
    )


async def settle_alerts(
    connection: AsyncConnection,
    rules: Sequence[str],
    prefix: str,
    found: Mapping[tuple[str, str], str],
    *,
    actor: str,
) -> None:
    """Bring the alerts of these rules, on subjects that begin with `prefix`, to what a check has just found.

    Opens what is new, closes what is over, and repeats what lasts once in `REPEAT` only: checks run every few seconds.

    Args:
        found: the text for each (rule, subject).
    """
    cursor = await connection.execute(
        "SELECT rule, subject, last_at > now() - %s FROM alerts "
        "WHERE rule = ANY(%s) AND starts_with(subject, %s) AND state <> 'resolved'",
        (REPEAT, list(rules), prefix),
    )
    standing = {(rule, subject): recent for rule, subject, recent in await cursor.fetchall()}
    for rule, subject in standing.keys() - found.keys():
        await resolve_alert(connection, rule, subject, actor)
    for (rule, subject), text in found.items():
        if not standing.get((rule, subject), False):
            await raise_alert(connection, rule, subject, text)


class AlertStore:
    """Reads alerts, and takes a person's word on them."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def find(self, *, everything: bool = False, limit: int = 100) -> list[AlertView]:
        """Those that are not resolved, or all; the newest first."""
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(AlertView)) as cursor,
        ):
            await cursor.execute(
                f"SELECT {_COLUMNS} FROM alerts WHERE %s OR state <> 'resolved' ORDER BY last_at DESC, alert_no DESC LIMIT %s".encode(),
                (everything, limit),
            )
            return await cursor.fetchall()

    async def acknowledge(self, alert_no: int, actor: str) -> None:
        """Somebody looks at it. Raises NotFoundError where no such alert stands."""
        await self._set(
            "UPDATE alerts SET state = 'acknowledged', acknowledged_at = now(), acknowledged_by = %s "
            "WHERE alert_no = %s AND state <> 'resolved'",
            alert_no,
            actor,
        )

    async def resolve(self, alert_no: int, actor: str) -> None:
        """It is over. Raises NotFoundError where no such alert stands."""
        await self._set(
            "UPDATE alerts SET state = 'resolved', resolved_at = now(), resolved_by = %s "
            "WHERE alert_no = %s AND state <> 'resolved'",
            alert_no,
            actor,
        )

    async def _set(self, statement: str, alert_no: int, actor: str) -> None:
        async with self._db.pool.connection() as connection:
            cursor = await connection.execute(statement.encode(), (actor, alert_no))
            if not cursor.rowcount:
                raise NotFoundError(f"no alert {alert_no} stands; 'alert list' shows those that do")
