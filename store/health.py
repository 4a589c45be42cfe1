"""How devices and the fleet are: presence, the history of heartbeats, and the limits of device types."""

from datetime import UTC, datetime, timedelta
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import class_row

from domain.presence import is_listening
from models.errors import NotFoundError
from models.health import DeviceHealth, DeviceTypeView, FleetHealth, HealthGroup, PresenceView, Spread
from store.audit import append_audit
from store.engine import Database, fetch_one
from store.ingest import read_coverage
from store.offline import COUNTS

PARTS = 40
"""Equal parts of the time that a course is told in: as many characters are shown for it."""

_PRESENCE = """
SELECT d.device_id, p.last_heartbeat, p.offline_since, t.offline_after_seconds, p.device_time, p.uptime, p.free_memory,
       p.cpu_temperature, p.signal_strength, p.error_count, p.firmware_version, p.boot_id, p.extra
FROM devices d LEFT JOIN presence p USING (device_id) LEFT JOIN device_types t USING (device_type)
WHERE d.device_id = %s
"""

_COUNTED = """
SELECT count(*), count(DISTINCT boot_id), extract(epoch FROM max(gap))::float8 FROM (
  SELECT boot_id, at - lag(at) OVER (ORDER BY at, beat_no) AS gap FROM heartbeats WHERE device_id = %s AND at >= %s
) h
"""

_COURSES = """
SELECT m.name, width_bucket(extract(epoch FROM h.at)::float8, %(since)s::float8, %(until)s::float8, %(parts)s) AS part,
       min(m.value), avg(m.value), max(m.value), count(*), (array_agg(m.value ORDER BY h.at DESC, h.beat_no DESC))[1]
FROM heartbeats h, LATERAL (
  VALUES ('cpuTemperature', h.cpu_temperature), ('freeMemory', h.free_memory::float8),
         ('networkSignalStrength', h.signal_strength), ('errorCount', h.error_count::float8)
  UNION ALL SELECT key, value::float8 FROM jsonb_each_text(COALESCE(h.extra, '{}'))
) m(name, value)
WHERE h.device_id = %(device)s AND h.at >= to_timestamp(%(since)s) AND m.value IS NOT NULL
GROUP BY m.name, part ORDER BY m.name, part
"""

_FLEET = f"""
SELECT d.site_id, d.device_type, count(*), count(p.device_id) FILTER (WHERE p.offline_since IS NULL),
       count(p.offline_since), count(*) FILTER (WHERE p.device_id IS NULL)
FROM devices d LEFT JOIN presence p USING (device_id) WHERE {COUNTS}
GROUP BY GROUPING SETS ((d.site_id), (d.device_type), ()) ORDER BY d.site_id, d.device_type
"""

_TYPES = """
SELECT device_type, count(d.device_id) AS devices, t.offline_after_seconds
FROM (SELECT * FROM devices WHERE status <> 'retired') d FULL JOIN device_types t USING (device_type)
GROUP BY device_type, t.offline_after_seconds ORDER BY device_type
"""


class HealthStore:
    """Reads of health, and the limits of types."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def presence(self, device_id: str) -> PresenceView:
        """What a device said last. Raises NotFoundError."""
        async with self._db.pool.connection() as connection:
            return await _presence(connection, device_id)

    async def device(self, device_id: str, past: timedelta) -> DeviceHealth:
        """A device's presence, and its heartbeats of this time. Raises NotFoundError."""
        async with self._db.pool.connection() as connection:
            presence = await _presence(connection, device_id)
            [now] = await fetch_one(connection, "SELECT now()", ())
            since: datetime = now - past
            count, boots, longest = await fetch_one(connection, _COUNTED, (device_id, since))
            values = {"device": device_id, "since": since.timestamp(), "until": now.timestamp() + 1, "parts": PARTS}
            cursor = await connection.execute(_COURSES, values)
            spreads = _spreads(await cursor.fetchall())
        return DeviceHealth(
            presence=presence,
            since=since,
            heartbeats=count,
            boots=boots,
            longest_silence_seconds=longest,
            measurements=spreads,
        )

    async def fleet(self) -> FleetHealth:
        """How many are online, offline, and were never heard; by site and type, without retired and barred devices."""
        async with self._db.pool.connection() as connection:
            rows = await (await connection.execute(_FLEET)).fetchall()
            coverage = await read_coverage(connection)
            [now] = await fetch_one(connection, "SELECT now()", ())
        total = next(row[2:] for row in rows if row[0] is None and row[1] is None)
        return FleetHealth(
            **dict(zip(("devices", "online", "offline", "never_heard"), total, strict=True)),
            sites=tuple(_group(row[0], row) for row in rows if row[0] is not None),
            types=tuple(_group(row[1], row) for row in rows if row[1] is not None),
            listening=is_listening(coverage, now),
            pulsed_at=coverage and coverage.pulsed_at.astimezone(UTC),
            covered_since=coverage and coverage.since.astimezone(UTC),
        )

    async def types(self) -> list[DeviceTypeView]:
        """Every type that has devices or a limit."""
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(DeviceTypeView)) as cursor,
        ):
            await cursor.execute(_TYPES)
            return await cursor.fetchall()

    async def set_limit(self, device_type: str, limit: timedelta | None, actor: str) -> None:
        """How long devices of a type may be silent; None: as the setting says. The next sweep goes by it.

        Raises NotFoundError where no device is of this type: a limit for a name that is mistyped would hold for nobody.
        """
        seconds = None if limit is None else limit.total_seconds()
        async with self._db.pool.connection() as connection:
            [known] = await fetch_one(
                connection,
                "SELECT EXISTS (SELECT FROM devices WHERE device_type = %s) OR "
                "EXISTS (SELECT FROM device_types WHERE device_type = %s)",
                (device_type, device_type),
            )
            if not known:
                raise NotFoundError(f"no device is of type {device_type}; 'device-type list' shows the types there are")
            await connection.execute(
                "INSERT INTO device_types (device_type, offline_after_seconds) VALUES (%s, %s) ON CONFLICT (device_type) "
                "DO UPDATE SET offline_after_seconds = excluded.offline_after_seconds",
                (device_type, seconds),
            )
            text = "offline as the setting says" if seconds is None else f"offline after {seconds:.0f} s"
            await append_audit(connection, actor, "device-type.changed", "device-type", device_type, text)


async def _presence(connection: AsyncConnection, device_id: str) -> PresenceView:
    async with connection.cursor(row_factory=class_row(PresenceView)) as cursor:
        await cursor.execute(_PRESENCE, (device_id,))
        found = await cursor.fetchone()
    if found is None:
        raise NotFoundError(f"no device {device_id}; 'device list' shows those there are")
    return found


def _group(name: str, row: tuple[Any, ...]) -> HealthGroup:
    return HealthGroup(name=name, devices=row[2], online=row[3], offline=row[4], never_heard=row[5])


def _spreads(rows: list[tuple[Any, ...]]) -> tuple[Spread, ...]:
    """From rows of (name, part, least, mean, most, count, newest), ordered by name and part."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for row in rows:
        found.setdefault(row[0], []).append(row[1:])
    return tuple(_spread(name, parts) for name, parts in found.items())


def _spread(name: str, parts: list[tuple[Any, ...]]) -> Spread:
    means = {min(max(part, 1), PARTS): mean for part, _, mean, _, _, _ in parts}
    count = sum(number for *_, number, _ in parts)
    return Spread(
        name=name,
        least=min(part[1] for part in parts),
        mean=sum(part[2] * part[4] for part in parts) / count,
        most=max(part[3] for part in parts),
        newest=parts[-1][5],
        course=tuple(means.get(part) for part in range(1, PARTS + 1)),
    )
