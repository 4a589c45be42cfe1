"""What device traffic leaves behind besides executions: presence, what devices say they run, clones, and quarantine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from psycopg import AsyncConnection, AsyncCursor

from models.identity import DeviceHappening
from store.access import bar, change_access
from store.alerts import raise_alert

MAX_KEPT_BYTES = 4096

CLONE_RULE = "cloned-device"
"""The alert's rule, and what the device is barred for."""
CLONE_RETURNS = 2
"""So many returns of a former boot id within CLONE_WINDOW make a clone. One may be a message that came late."""
CLONE_WINDOW = "10 minutes"
MAX_FORMER_BOOTS = 8

_STANDING = """
WITH t AS (SELECT jsonb_array_elements_text(%s::jsonb) AS device_id)
SELECT NULL, NULL, extract(epoch FROM clock_timestamp())::float8
UNION ALL
SELECT d.device_id, NULL, NULL FROM t JOIN devices d USING (device_id) WHERE d.barred_at IS NOT NULL
UNION ALL
SELECT w.device_id, w.event, NULL FROM t JOIN device_waits w USING (device_id)
WHERE w.event IN ('connected', 'heartbeat')
UNION ALL
SELECT p.device_id, 'alert', NULL FROM t JOIN alert_progress p USING (device_id)
"""

_CHANGED = "excluded.boot_id IS DISTINCT FROM p.boot_id AND excluded.boot_id IS NOT NULL"
_POSITION = "array_position(p.former_boots, excluded.boot_id)"
_RETURNED = f"{_CHANGED} AND {_POSITION} IS NOT NULL"
_LEFT = f"{_CHANGED} AND p.boot_id IS NOT NULL"

_UPSERT_PRESENCE = f"""
WITH saved AS (
  INSERT INTO presence AS p (device_id, last_heartbeat, device_time, uptime, free_memory, cpu_temperature,
                             firmware_version, signal_strength, error_count, boot_id, extra)
  SELECT n.device_id, now(), to_timestamp(n.device_time), n.uptime, n.free_memory, n.cpu_temperature,
         n.firmware_version, n.signal_strength, n.error_count, n.boot_id, n.extra::jsonb
  FROM json_to_recordset(%s::json)
    AS n(device_id text, device_time float8, uptime bigint, free_memory bigint, cpu_temperature float8,
         firmware_version text, signal_strength float8, error_count bigint, boot_id text, extra json)
  JOIN devices d USING (device_id)
  ORDER BY n.device_id
  ON CONFLICT (device_id) DO UPDATE SET
    last_heartbeat = excluded.last_heartbeat, device_time = excluded.device_time, uptime = excluded.uptime,
    free_memory = excluded.free_memory, cpu_temperature = excluded.cpu_temperature,
    firmware_version = excluded.firmware_version, signal_strength = excluded.signal_strength,
    error_count = excluded.error_count, extra = excluded.extra,
    boot_id = COALESCE(excluded.boot_id, p.boot_id),
    former_boots = CASE WHEN {_LEFT} THEN (p.boot_id || p.former_boots)[1:{MAX_FORMER_BOOTS}] ELSE p.former_boots END,
    former_times = CASE WHEN {_LEFT} THEN
        (COALESCE(p.device_time, '-infinity') || p.former_times)[1:{MAX_FORMER_BOOTS}] ELSE p.former_times END,
    boot_returns = CASE WHEN NOT ({_RETURNED}) THEN p.boot_returns
        WHEN p.boot_returned_at > now() - interval '{CLONE_WINDOW}' THEN p.boot_returns + 1 ELSE 1 END,
    boot_returned_at = CASE WHEN {_RETURNED} THEN now() ELSE p.boot_returned_at END
  -- A heartbeat of a former boot that is no newer than the last one of it came late: it says nothing of now.
  WHERE NOT ({_RETURNED}) OR excluded.device_time > p.former_times[{_POSITION}]
  RETURNING device_id, boot_returns, boot_returned_at
)
SELECT device_id FROM saved WHERE boot_returns >= {CLONE_RETURNS} AND boot_returned_at = now()
"""

_RECONCILE = """
UPDATE devices d SET firmware_version = n.version, firmware_sha256 = n.sha256, updated_at = now()
FROM json_to_recordset(%s::json) AS n(device_id text, version text, sha256 text)
WHERE d.device_id = n.device_id
  AND (d.firmware_version, d.firmware_sha256) IS DISTINCT FROM (n.version, n.sha256)
"""


@dataclass(frozen=True, slots=True)
class Standing:
    """How the devices of a batch stand: `barred` says nothing that counts, `awaited` has workflows waiting for it.

    `watched`: on the way into an alert of a rule, or out of it (gateway/alerting.py). `now`: PostgreSQL's clock, in epoch seconds.
    """

    barred: frozenset[str]
    awaited: frozenset[tuple[str, DeviceHappening]]
    now: float
    watched: frozenset[str] = frozenset()


async def ask_standing(connection: AsyncConnection, things: Sequence[str]) -> AsyncCursor:
    """Ask how these devices stand, for `read_standing`; in a pipeline the answer costs no round trip of its own."""
    return await connection.execute(_STANDING, (orjson.dumps(list(things)).decode(),))


async def read_standing(cursor: AsyncCursor) -> Standing:
    """The answer to `ask_standing`."""
    barred, awaited, watched, now = set(), set(), set(), 0.0
    for device_id, event, clock in await cursor.fetchall():
        if device_id is None:
            now = clock
        elif event is None:
            barred.add(device_id)
        elif event == "alert":
            watched.add(device_id)
        else:
            awaited.add((device_id, DeviceHappening(event)))
    return Standing(frozenset(barred), frozenset(awaited), now, frozenset(watched))


async def save_heartbeats(connection: AsyncConnection, beats: Sequence[Any]) -> list[str]:
    """Upsert presence from heartbeats (`gateway.requests.Heartbeat`), one of each device, and correct what the registry
    says of devices that name the image they run. Unknown devices leave nothing.

    Returns the devices that are two: a boot id that one had left behind has come back, again, with newer times.
    """
    said = [
        {"device_id": beat.device_id, "version": beat.firmware_version, "sha256": beat.firmware_sha256}
        for beat in beats
        if beat.firmware_sha256
    ]
    cursor = await connection.execute(_UPSERT_PRESENCE, (orjson.dumps(beats).decode(),))
    if said:
        await connection.execute(_RECONCILE, (orjson.dumps(said).decode(),))
    return [row[0] for row in await cursor.fetchall()]


async def bar_clone(connection: AsyncConnection, device_id: str) -> str | None:
    """Bar a device whose identity is used twice, and raise the alert; why, or None where it is barred already.

    A transaction of its own: it changes access, so nothing may have been locked before.
    """
    await change_access(connection)
    cursor = await connection.execute(
        "UPDATE devices d SET status = CASE WHEN d.status = 'retired' THEN d.status ELSE 'error' END, updated_at = now() "
        "FROM presence p WHERE d.device_id = %s AND p.device_id = d.device_id AND d.barred_at IS NULL "
        "RETURNING p.boot_returns, p.boot_id, p.former_boots[1]",
        (device_id,),
    )
    if (row := await cursor.fetchone()) is None:
        return None
    reason = (
        f"{device_id} is there twice: boot ids it had left came back {row[0]} times within {CLONE_WINDOW}, "
        f"last {row[1]} after {row[2]}; enrol one of the two anew"
    )
    await bar(connection, device_id, "gateway", reason)
    await raise_alert(connection, CLONE_RULE, device_id, reason)
    await connection.execute(
        "UPDATE presence SET boot_returns = 0, boot_returned_at = NULL, former_boots = '{}', former_times = '{}' "
        "WHERE device_id = %s",
        (device_id,),
    )
    return reason


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
