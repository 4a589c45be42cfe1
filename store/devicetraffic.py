"""What device traffic leaves behind besides executions: presence, what devices say they run, and quarantine."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from psycopg import AsyncConnection

MAX_KEPT_BYTES = 4096

_UPSERT_PRESENCE = """
INSERT INTO presence AS p (device_id, last_heartbeat, device_time, uptime, free_memory, cpu_temperature,
                           firmware_version, signal_strength, error_count, extra)
SELECT n.device_id, now(), to_timestamp(n.device_time), n.uptime, n.free_memory, n.cpu_temperature,
       n.firmware_version, n.signal_strength, n.error_count, n.extra::jsonb
FROM unnest(%s::text[], %s::float8[], %s::bigint[], %s::bigint[], %s::float8[], %s::text[], %s::float8[], %s::bigint[],
            %s::text[])
  AS n(device_id, device_time, uptime, free_memory, cpu_temperature, firmware_version, signal_strength, error_count,
       extra)
JOIN devices d USING (device_id)
ORDER BY n.device_id
ON CONFLICT (device_id) DO UPDATE SET
  last_heartbeat = excluded.last_heartbeat, device_time = excluded.device_time, uptime = excluded.uptime,
  free_memory = excluded.free_memory, cpu_temperature = excluded.cpu_temperature,
  firmware_version = excluded.firmware_version, signal_strength = excluded.signal_strength,
  error_count = excluded.error_count, extra = excluded.extra
"""

_RECONCILE = """
UPDATE devices d SET firmware_version = n.version, firmware_sha256 = n.sha256, updated_at = now()
FROM unnest(%s::text[], %s::text[], %s::text[]) AS n(device_id, version, sha256)
WHERE d.device_id = n.device_id
  AND (d.firmware_version, d.firmware_sha256) IS DISTINCT FROM (n.version, n.sha256)
"""


async def save_heartbeats(connection: AsyncConnection, beats: Mapping[str, Any]) -> int:
    """Upsert presence from the newest heartbeat of each device (`gateway.requests.Heartbeat` by device id), and correct
    what the registry says of devices that name the image they run. Unknown devices leave nothing.

    Returns how many devices were known.
    """
    things = sorted(beats)
    rows = [beats[thing] for thing in things]
    cursor = await connection.execute(
        _UPSERT_PRESENCE,
        (
            things,
            [beat.device_time for beat in rows],
            [beat.uptime for beat in rows],
            [beat.free_memory for beat in rows],
            [beat.cpu_temperature for beat in rows],
            [beat.firmware_version for beat in rows],
            [beat.signal_strength for beat in rows],
            [beat.error_count for beat in rows],
            [orjson.dumps(beat.extra).decode() if beat.extra else None for beat in rows],
        ),
    )
    said = [(t, b.firmware_version, b.firmware_sha256) for t, b in zip(things, rows, strict=True) if b.firmware_sha256]
    if said:
        await connection.execute(_RECONCILE, tuple(list(column) for column in zip(*said, strict=True)))
    return cursor.rowcount


async def save_quarantined(
    connection: AsyncConnection, messages: Sequence[tuple[str, str | None, bytes, str, str]]
) -> None:
    """Keep messages that could not be used: (topic, thing, payload, code, reason)."""
    async with connection.cursor() as cursor:
        await cursor.executemany(
            "INSERT INTO quarantine (topic, thing, size_bytes, payload, code, reason) VALUES (%s, %s, %s, %s, %s, %s)",
            [
                (topic[:512].replace("\x00", "\\0"), thing, len(payload), payload[:MAX_KEPT_BYTES], code, reason)
                for topic, thing, payload, code, reason in messages
            ],
        )
