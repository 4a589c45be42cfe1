"""Devices that have fallen silent, and devices that are heard again.

One statement marks who is silent beyond the limit of its type while somebody listened, and opens an alert for each;
another takes back what is over. Rows that the gateway is writing at this moment are left out: those devices are speaking.
A device's status is left alone (docs/adr/0018).
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from psycopg import AsyncConnection

from domain.presence import MANY_DEVICES, MAX_GAP, are_many
from store.alerts import REPEAT, resolve_alert
from store.ingest import SOURCE

DEVICE_OFFLINE, SITE_OFFLINE, INGEST_SILENT = "device-offline", "site-offline", "ingest-silent"
"""Rules of alerts; the subjects are the device, `site:<site>` or `fleet`, and the source of pulses."""

ACTOR = "upkeep"

COUNTS = "d.status <> 'retired' AND d.barred_at IS NULL"

_MARK = f"""
WITH heard AS (
  SELECT covered_since FROM ingest_state WHERE source = '{SOURCE}'
    AND pulsed_at > now() - %(gap)s AND pulsed_at < now() + %(gap)s
), least AS (
  SELECT least(%(limit)s::float8, min(offline_after_seconds)) AS seconds FROM device_types
), silent AS (
  SELECT p.device_id, p.last_heartbeat, d.site_id, COALESCE(t.offline_after_seconds, %(limit)s::float8) AS seconds
  FROM presence p JOIN devices d USING (device_id) LEFT JOIN device_types t USING (device_type)
  WHERE p.offline_since IS NULL AND {COUNTS}
    AND p.last_heartbeat < now() - make_interval(secs => (SELECT seconds FROM least))
    AND greatest(p.last_heartbeat, (SELECT covered_since FROM heard))
        < now() - make_interval(secs => COALESCE(t.offline_after_seconds, %(limit)s::float8))
    AND EXISTS (SELECT FROM heard)
  FOR UPDATE OF p SKIP LOCKED
), marked AS (
  UPDATE presence p SET offline_since = now() FROM silent s
  WHERE p.device_id = s.device_id AND p.offline_since IS NULL
  RETURNING p.device_id, s.site_id, s.last_heartbeat, s.seconds
), told AS (
  INSERT INTO alerts AS a (rule, subject, text, severity, state)
  SELECT '{DEVICE_OFFLINE}', device_id,
         format('%%s of site %%s is silent, its limit is %%s; last heard %%s UTC', device_id, site_id,
                CASE WHEN seconds < 120 THEN seconds || ' s' ELSE round(seconds / 60) || ' min' END,
                to_char(last_heartbeat AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')),
         'warning', 'open'
  FROM marked
  ON CONFLICT (rule, subject) WHERE state <> 'resolved'
  DO UPDATE SET text = excluded.text, occurrences = a.occurrences + 1, last_at = now()
)
SELECT count(*) FROM marked
"""

_TAKE_BACK = f"""
WITH over AS (
  SELECT p.device_id FROM presence p JOIN devices d USING (device_id) LEFT JOIN device_types t USING (device_type)
  WHERE p.offline_since IS NOT NULL
    AND (p.last_heartbeat > p.offline_since OR NOT ({COUNTS})
         OR p.last_heartbeat >= now() - make_interval(secs => COALESCE(t.offline_after_seconds, %(limit)s::float8)))
  FOR UPDATE OF p SKIP LOCKED
), cleared AS (
  UPDATE presence p SET offline_since = NULL FROM over o WHERE p.device_id = o.device_id RETURNING p.device_id
), resolved AS (
  UPDATE alerts a SET state = 'resolved', resolved_at = now(), resolved_by = '{ACTOR}' FROM cleared c
  WHERE a.rule = '{DEVICE_OFFLINE}' AND a.subject = c.device_id AND a.state <> 'resolved'
)
SELECT count(*) FROM cleared
"""

_PULSE = f"""
SELECT now(), (SELECT pulsed_at FROM ingest_state WHERE source = '{SOURCE}'), EXISTS (SELECT FROM presence)
"""

_BY_SITE = f"""
SELECT d.site_id, count(*) FILTER (WHERE p.offline_since IS NOT NULL), count(*)
FROM presence p JOIN devices d USING (device_id) WHERE {COUNTS} GROUP BY d.site_id
"""

_STANDING = "SELECT EXISTS (SELECT FROM alerts WHERE rule = %s AND state <> 'resolved')"

_NOBODY_LEFT = f"""
UPDATE alerts SET state = 'resolved', resolved_at = now(), resolved_by = '{ACTOR}'
WHERE rule = %(rule)s AND state <> 'resolved' AND NOT subject = ANY(%(subjects)s)
"""
"""Of sites whose devices have been retired, barred or moved."""

_OPEN = """
INSERT INTO alerts AS a (rule, subject, text, severity, state) VALUES (%s, %s, %s, %s, 'open')
ON CONFLICT (rule, subject) WHERE state <> 'resolved'
DO UPDATE SET text = excluded.text, occurrences = a.occurrences + 1, last_at = now() WHERE a.last_at < now() - %s
"""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep has done."""

    listening: bool
    offline: int
    back: int
    alerts: tuple[str, ...]
    deaf: str = ""
    """Why nobody can be heard; an alert, where there is somebody to be heard."""


async def sweep_offline(connection: AsyncConnection, limit: timedelta) -> Sweep:
    """Bring `presence.offline_since` and its alerts to what is true now. `limit` holds where the type has none."""
    values = {"limit": limit.total_seconds(), "gap": MAX_GAP}
    deaf, expected = await _judge_ingest(connection)
    back = await _count(connection, _TAKE_BACK, values)
    if deaf:
        return Sweep(False, 0, back, (deaf,) if expected else (), deaf)
    offline = await _count(connection, _MARK, values)
    return Sweep(True, offline, back, await _judge_sites(connection, offline))


async def _count(connection: AsyncConnection, statement: str, values: dict[str, object]) -> int:
    row = await (await connection.execute(statement.encode(), values)).fetchone()
    assert row is not None
    return int(row[0])


async def _judge_ingest(connection: AsyncConnection) -> tuple[str, bool]:
    """Empty while devices can be heard, else why not; and whether there are devices to be heard: then it is an alert."""
    row = await (await connection.execute(_PULSE)).fetchone()
    assert row is not None
    now, pulsed_at, expected = row
    if pulsed_at is not None and abs(now - pulsed_at) < MAX_GAP:
        await resolve_alert(connection, INGEST_SILENT, SOURCE, ACTOR)
        return "", expected
    text = _deaf(now, pulsed_at)
    if expected:
        await connection.execute(_OPEN, (INGEST_SILENT, SOURCE, text, "critical", REPEAT))
    return text, expected


def _deaf(now: datetime, pulsed_at: datetime | None) -> str:
    since = "ever" if pulsed_at is None else f"for {(now - pulsed_at).total_seconds():.0f} s"
    return (
        f"no device can be heard: the gateway's pulse has not come through the broker {since}, expected one every few "
        "seconds; look after gateway, broker and PostgreSQL. Nobody is declared offline meanwhile"
    )


async def _judge_sites(connection: AsyncConnection, offline: int) -> tuple[str, ...]:
    """Alerts on sites, and on the fleet, of which many devices are offline: what is wrong there is hardly each device."""
    row = await (await connection.execute(_STANDING, (SITE_OFFLINE,))).fetchone()
    standing = row is not None and row[0]
    if offline <= MANY_DEVICES and not standing:
        return ()
    counts = await (await connection.execute(_BY_SITE)).fetchall()
    groups = {f"site:{site}": (gone, devices) for site, gone, devices in counts}
    groups["fleet"] = (sum(gone for _, gone, _ in counts), sum(devices for _, _, devices in counts))
    await connection.execute(_NOBODY_LEFT, {"rule": SITE_OFFLINE, "subjects": list(groups)})
    found = []
    for subject, (gone, devices) in groups.items():
        if not are_many(gone, devices):
            await resolve_alert(connection, SITE_OFFLINE, subject, ACTOR)
            continue
        text = f"{gone} of {devices} devices of {subject.replace(':', ' ')} are offline ({gone / devices:.0%})"
        await connection.execute(_OPEN, (SITE_OFFLINE, subject, text, "critical", REPEAT))
        found.append(text)
    return tuple(found)
