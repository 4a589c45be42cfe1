"""Alerts: what a person has to look at. One row for each rule and subject until it is resolved, however often it recurs."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

from psycopg import AsyncConnection
from psycopg.rows import class_row

from models.alerting import AlertGroup, AlertQuery, AlertTold, Severity, severity_of
from models.errors import NotFoundError
from models.identity import AlertView
from store.engine import Database

REPEAT = timedelta(hours=1)

_RAISE = """
INSERT INTO alerts AS a (rule, subject, text, severity, state) VALUES (%s, %s, %s, %s, 'open')
ON CONFLICT (rule, subject) WHERE state <> 'resolved'
DO UPDATE SET text = excluded.text, severity = excluded.severity, occurrences = a.occurrences + 1, last_at = now()
"""

_COLUMNS = """
alert_no, rule, subject, text, severity, state, occurrences, opened_at, last_at, acknowledged_at, acknowledged_by,
resolved_at, resolved_by
"""

_WANTED = """
(%(everything)s OR a.state <> 'resolved') AND (%(rule)s::text IS NULL OR a.rule = %(rule)s)
AND (%(device)s::text IS NULL OR a.subject = %(device)s) AND (%(severities)s::text[] IS NULL OR a.severity = ANY(%(severities)s))
AND (%(site)s::text IS NULL OR EXISTS (SELECT FROM devices d WHERE d.device_id = a.subject AND d.site_id = %(site)s))
"""

_FIND = f"SELECT {_COLUMNS} FROM alerts a WHERE {_WANTED} ORDER BY last_at DESC, alert_no DESC LIMIT %(limit)s"

_GROUPS = f"""
WITH found AS (
  SELECT a.*, d.site_id FROM alerts a LEFT JOIN devices d ON d.device_id = a.subject WHERE {_WANTED}
), sites AS (
  SELECT rule, jsonb_object_agg(site_id, n) AS sites
  FROM (SELECT rule, site_id, count(*) AS n FROM found WHERE site_id IS NOT NULL GROUP BY rule, site_id) s GROUP BY rule
)
SELECT rule, array_agg(DISTINCT severity) AS severities, count(*) AS count,
       count(*) FILTER (WHERE state = 'open') AS open, count(*) FILTER (WHERE state = 'acknowledged') AS acknowledged,
       count(*) FILTER (WHERE state = 'resolved') AS resolved, min(opened_at) AS first_at, max(last_at) AS last_at,
       (array_agg(subject ORDER BY opened_at, alert_no))[1] AS first_subject,
       COALESCE((SELECT sites.sites FROM sites WHERE sites.rule = found.rule), '{{}}') AS sites
FROM found GROUP BY rule ORDER BY max(last_at) DESC, rule
"""

_ACKNOWLEDGE = """
UPDATE alerts SET state = 'acknowledged', acknowledged_at = now(), acknowledged_by = %(actor)s
WHERE alert_no = ANY(%(numbers)s) AND state <> 'resolved' RETURNING alert_no
"""

_RESOLVE = """
UPDATE alerts SET state = 'resolved', resolved_at = now(), resolved_by = %(actor)s
WHERE alert_no = ANY(%(numbers)s) AND state <> 'resolved' RETURNING alert_no
"""

_FORGET_PROGRESS = """
DELETE FROM alert_progress p USING (
  SELECT device_id, rule FROM alert_progress
  WHERE (device_id, rule) IN (SELECT subject, rule FROM alerts WHERE alert_no = ANY(%(numbers)s) AND state <> 'resolved')
  ORDER BY device_id, rule FOR UPDATE
) q WHERE p.device_id = q.device_id AND p.rule = q.rule
"""
"""Before the alerts, as the gateway does. What is said to be over begins from nothing if it comes again."""


async def raise_alert(
    connection: AsyncConnection, rule: str, subject: str, text: str, severity: Severity | None = None
) -> None:
    """Open an alert, or note that it has come again; `severity` is the rule's (models/alerting.py) where none is given.

    One that somebody has acknowledged stays acknowledged.
    """
    await connection.execute(_RAISE, (rule, subject, text, (severity or severity_of(rule)).value))


async def resolve_alert(connection: AsyncConnection, rule: str, subject: str, actor: str) -> None:
    """Close the alert of this rule and subject, where one is open."""
    await connection.execute(
        "UPDATE alerts SET state = 'resolved', resolved_at = now(), resolved_by = %s "
        "WHERE rule = %s AND subject = %s AND state <> 'resolved'",
        (actor, rule, subject),
    )


async def resolve_judged(connection: AsyncConnection, device_id: str, actor: str) -> None:
    """End what the rules have judged of a device whose heartbeats count no more: nothing that it says can end it."""
    await connection.execute("DELETE FROM alert_progress WHERE device_id = %s", (device_id,))
    await connection.execute(
        "UPDATE alerts SET state = 'resolved', resolved_at = now(), resolved_by = %s "
        "WHERE subject = %s AND state <> 'resolved' AND rule IN (SELECT name FROM alert_rules)",
        (actor, device_id),
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

    async def find(
        self, wanted: AlertQuery | None = None, *, everything: bool = False, limit: int = 100
    ) -> list[AlertView]:
        """Those that are not resolved, or all; the newest first."""
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(AlertView)) as cursor,
        ):
            await cursor.execute(_FIND.encode(), _parameters(wanted, everything) | {"limit": limit})
            return await cursor.fetchall()

    async def groups(self, wanted: AlertQuery | None = None, *, everything: bool = False) -> list[AlertGroup]:
        """The same, counted by rule."""
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(AlertGroup)) as cursor,
        ):
            await cursor.execute(_GROUPS.encode(), _parameters(wanted, everything))
            return await cursor.fetchall()

    async def get(self, alert_no: int) -> AlertView:
        """One alert. Raises NotFoundError."""
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(AlertView)) as cursor,
        ):
            await cursor.execute(f"SELECT {_COLUMNS} FROM alerts WHERE alert_no = %s".encode(), (alert_no,))
            found = await cursor.fetchone()
        if found is None:
            raise NotFoundError(f"no alert {alert_no}; 'alert list --all' shows all there have been")
        return found

    async def told(self, alert_no: int) -> list[AlertTold]:
        """Who was told of an alert's changes: the notification's workflow, or none yet."""
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(AlertTold)) as cursor,
        ):
            await cursor.execute(
                "SELECT event, at, handed_over_at, digest FROM alert_notifications WHERE alert_no = %s "
                "ORDER BY notification_no",
                (alert_no,),
            )
            return await cursor.fetchall()

    async def numbers(self, wanted: AlertQuery) -> list[int]:
        """Of all that stand and are wanted."""
        async with self._db.pool.connection() as connection:
            cursor = await connection.execute(
                f"SELECT alert_no FROM alerts a WHERE {_WANTED} ORDER BY alert_no".encode(), _parameters(wanted, False)
            )
            return [row[0] for row in await cursor.fetchall()]

    async def acknowledge(self, numbers: Sequence[int], actor: str) -> list[int]:
        """Somebody looks at them; those that stand. Raises NotFoundError, changing nothing, where one does not."""
        async with self._db.pool.connection() as connection:
            return await _settled(connection, _ACKNOWLEDGE, numbers, actor)

    async def resolve(self, numbers: Sequence[int], actor: str) -> list[int]:
        """They are over. Raises NotFoundError, changing nothing, where one does not stand."""
        async with self._db.pool.connection() as connection:
            await connection.execute(_FORGET_PROGRESS.encode(), {"numbers": list(numbers)})
            return await _settled(connection, _RESOLVE, numbers, actor)


async def _settled(connection: AsyncConnection, statement: str, numbers: Sequence[int], actor: str) -> list[int]:
    cursor = await connection.execute(statement.encode(), {"numbers": list(numbers), "actor": actor})
    done = {row[0] for row in await cursor.fetchall()}
    if missing := [number for number in numbers if number not in done]:
        raise NotFoundError(f"no alert {missing[0]} stands, nothing was changed; 'alert list' shows those that do")
    return sorted(done)


def _parameters(wanted: AlertQuery | None, everything: bool) -> dict[str, object]:
    asked = wanted or AlertQuery()
    least = asked.severity
    return {
        "everything": everything,
        "rule": asked.rule,
        "device": asked.device,
        "site": asked.site,
        "severities": None if least is None else [s.value for s in Severity if s.rank >= least.rank],
    }
