"""Alert rules: kept by name, changed by people, read by the gateway."""

import itertools
import logging
from datetime import timedelta
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from pydantic import ValidationError

from domain.alerting import WELL, Change, judge
from models.alerting import AlertRuleSpec, AlertRuleView, RuleTrial
from models.errors import NotFoundError
from store.engine import Database
from store.filters import where

log = logging.getLogger("alerts")

COLUMNS = {
    "cpuTemperature": "h.cpu_temperature",
    "errorCount": "h.error_count",
    "freeMemory": "h.free_memory",
    "uptime": "h.uptime",
    "networkSignalStrength": "h.signal_strength",
}
"""Where the history of heartbeats keeps a key; others are in `extra`."""

_SET = """
INSERT INTO alert_rules AS r (name, spec, enabled, created_by) VALUES (%s, %s, %s, %s)
ON CONFLICT (name) DO UPDATE SET spec = excluded.spec, enabled = excluded.enabled,
  revision = r.revision + 1, updated_at = now()
"""

_LIST = """
SELECT r.name, r.spec, r.enabled, r.revision, r.created_by, r.updated_at,
       (SELECT count(*) FROM alerts a WHERE a.rule = r.name AND a.state <> 'resolved') AS standing
FROM alert_rules r WHERE %(name)s::text IS NULL OR r.name = %(name)s ORDER BY r.name
"""

_SHOWN = 5


async def load_rules(connection: AsyncConnection) -> list[tuple[AlertRuleSpec, int]]:
    """The rules that are enabled, with their revisions. One that cannot be read is left out, with a line in the log."""
    cursor = await connection.execute("SELECT name, spec, revision FROM alert_rules WHERE enabled ORDER BY name")
    rules = []
    for name, spec, revision in await cursor.fetchall():
        try:
            rules.append((AlertRuleSpec.model_validate(spec), revision))
        except ValidationError as error:
            log.error("alert rule %s cannot be used: %s", name, str(error)[:300])
    return rules


class AlertRuleStore:
    """What the commands do with rules."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def find(self) -> list[AlertRuleView]:
        """All, by name."""
        return await self._read(None)

    async def get(self, name: str) -> AlertRuleView:
        """One rule. Raises NotFoundError."""
        if not (found := await self._read(name)):
            raise NotFoundError(f"no alert rule {name}; 'alert rule list' shows those there are")
        return found[0]

    async def set(self, rule: AlertRuleSpec, actor: str) -> None:
        """Create a rule, or change it. What devices were on their way to begins anew; alerts that stand go on under it."""
        async with self._db.pool.connection() as connection:
            spec = rule.model_dump(mode="json", by_alias=True, exclude={"enabled"})
            await connection.execute(_SET, (rule.name, Jsonb(spec), rule.enabled, actor))
            if rule.enabled:
                await connection.execute("DELETE FROM alert_progress WHERE rule = %s AND NOT firing", (rule.name,))
            else:
                await _end(connection, rule.name, actor)

    async def enable(self, name: str, enabled: bool, actor: str) -> None:
        """Use a rule, or do not; its alerts are over with it. Raises NotFoundError."""
        async with self._db.pool.connection() as connection:
            cursor = await connection.execute(
                "UPDATE alert_rules SET enabled = %s, revision = revision + 1, updated_at = now() WHERE name = %s",
                (enabled, name),
            )
            await self._ended(connection, cursor.rowcount, name, actor, end=not enabled)

    async def delete(self, name: str, actor: str) -> None:
        """Forget a rule; its alerts are over with it. Raises NotFoundError."""
        async with self._db.pool.connection() as connection:
            cursor = await connection.execute("DELETE FROM alert_rules WHERE name = %s", (name,))
            await self._ended(connection, cursor.rowcount, name, actor, end=True)

    async def _ended(self, connection: AsyncConnection, found: int, name: str, actor: str, *, end: bool) -> None:
        if not found:
            raise NotFoundError(f"no alert rule {name}; 'alert rule list' shows those there are")
        if end:
            await _end(connection, name, actor)

    async def _read(self, name: str | None) -> list[AlertRuleView]:
        async with self._db.pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(_LIST, {"name": name})
            return [_view(row) for row in await cursor.fetchall()]

    async def trial(self, rule: AlertRuleSpec, since: timedelta) -> RuleTrial:
        """What the rule would have made of the heartbeats of the last so long, those of its target as it is now."""
        condition, parameters = where(rule.target)
        value = COLUMNS.get(rule.metric, "(h.extra ->> %(metric)s)::float8")
        sql = (
            f"SELECT h.device_id, extract(epoch FROM h.at)::float8, {value}::float8 FROM heartbeats h "
            f"JOIN devices d USING (device_id) WHERE h.at > now() - %(since)s AND {value} IS NOT NULL AND {condition} "
            "ORDER BY h.device_id, h.at, h.beat_no"
        )
        result, first = RuleTrial(), []
        async with self._db.pool.connection() as connection, connection.cursor("rule_trial") as cursor:
            await cursor.execute(sql.encode(), parameters | {"since": since, "metric": rule.metric})
            progress, opened, last = WELL, 0, None
            async for device, at, found in cursor:
                if device != last:
                    result.devices, result.still_open = result.devices + 1, result.still_open + progress.firing
                    progress, opened, last = WELL, 0, device
                progress, change = judge(progress, found, at, rule)
                result.heartbeats += 1
                if change is Change.OPENED:
                    result.alerts, result.alerting = result.alerts + 1, result.alerting + (not opened)
                    if not opened:
                        first.append(device)
                    opened += 1
            result.still_open += progress.firing
        return result.model_copy(update={"first": tuple(itertools.islice(first, _SHOWN))})


async def _end(connection: AsyncConnection, name: str, actor: str) -> None:
    """After the rule's own row has been changed: the gateway, which locks that first, adds nothing behind our back."""
    await connection.execute("DELETE FROM alert_progress WHERE rule = %s", (name,))
    await connection.execute(
        "UPDATE alerts SET state = 'resolved', resolved_at = now(), resolved_by = %s "
        "WHERE rule = %s AND state <> 'resolved'",
        (actor, name),
    )


def _view(row: dict[str, Any]) -> AlertRuleView:
    spec = AlertRuleSpec.model_validate(row["spec"] | {"enabled": row["enabled"]})
    return AlertRuleView(
        spec=spec,
        revision=row["revision"],
        created_by=row["created_by"],
        updated_at=row["updated_at"],
        standing=row["standing"],
    )
