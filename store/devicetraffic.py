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
REPEAT_WINDOW = "1 hour"
"""How far before a device was last heard a heartbeat may have been recorded that comes again. A gateway that dies is
told again of its last moment; a broker that restarts, of what has changed since it last wrote its state (30 minutes)."""

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

_SAID = """
json_to_recordset(%s::json)
  AS n(device_id text, device_time float8, uptime bigint, free_memory bigint, cpu_temperature float8,
       firmware_version text, signal_strength float8, error_count bigint, boot_id text, extra json,
       beat_no integer, round integer, newest boolean)
"""
_RECORD = """
INSERT INTO heartbeats (device_id, at, beat_no, device_time, uptime, free_memory, cpu_temperature, firmware_version,
                        signal_strength, error_count, boot_id, extra)
SELECT n.device_id, now(), n.beat_no, to_timestamp(n.device_time), n.uptime, n.free_memory, n.cpu_temperature,
       n.firmware_version, n.signal_strength, n.error_count, n.boot_id, n.extra::jsonb
"""
_BE_PRESENT = """
INSERT INTO presence AS p (device_id, last_heartbeat, device_time, uptime, free_memory, cpu_temperature,
                           firmware_version, signal_strength, error_count, boot_id, extra)
SELECT n.device_id, now(), to_timestamp(n.device_time), n.uptime, n.free_memory, n.cpu_temperature,
       n.firmware_version, n.signal_strength, n.error_count, n.boot_id, n.extra::jsonb
"""
_OR_GO_ON = f"""
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
"""
_CLONES = f"FROM saved WHERE boot_returns >= {CLONE_RETURNS} AND boot_returned_at = now()"

_SAVE = f"""
WITH n AS MATERIALIZED (
  -- In doubt: it is no newer than what is known, or of a boot that is over. It may have been recorded before.
  SELECT n.*, n.device_time IS NOT NULL AND p.device_id IS NOT NULL
         AND (COALESCE(to_timestamp(n.device_time) <= p.device_time, true)
              OR COALESCE(n.boot_id = ANY(p.former_boots), false)) AS doubtful
  FROM {_SAID} LEFT JOIN presence p USING (device_id)
  WHERE p.device_id IS NOT NULL OR EXISTS (SELECT FROM devices d WHERE d.device_id = n.device_id)
), recorded AS (
  {_RECORD} FROM n WHERE NOT n.doubtful
), saved AS (
  {_BE_PRESENT} FROM n WHERE NOT n.doubtful AND n.newest AND n.round = 0 {_OR_GO_ON}
)
SELECT device_id, NULL::integer {_CLONES} UNION ALL SELECT device_id, beat_no FROM n WHERE doubtful
"""

_SAVE_LATER = f"""
WITH saved AS ({_BE_PRESENT} FROM {_SAID} JOIN devices d USING (device_id) {_OR_GO_ON}) SELECT device_id {_CLONES}
"""

_RECORD_DOUBTFUL = f"""
{_RECORD} FROM {_SAID} JOIN presence p USING (device_id)
WHERE NOT EXISTS (
  SELECT FROM heartbeats h
  WHERE h.device_id = n.device_id AND h.at >= p.last_heartbeat - interval '{REPEAT_WINDOW}'
    AND h.device_time = to_timestamp(n.device_time)
    AND (h.boot_id, h.uptime, h.free_memory, h.cpu_temperature, h.firmware_version, h.signal_strength, h.error_count,
         h.extra)
      IS NOT DISTINCT FROM (n.boot_id, n.uptime, n.free_memory, n.cpu_temperature, n.firmware_version,
                            n.signal_strength, n.error_count, n.extra::jsonb))
RETURNING device_id, beat_no
"""

_STILL_THERE = """
UPDATE presence p SET last_heartbeat = now()
FROM (SELECT jsonb_array_elements_text(%s::jsonb) AS device_id) n
WHERE p.device_id = n.device_id AND p.last_heartbeat < now()
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


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of a batch's heartbeats.

    `clones`: devices that are two, because a boot id that one had left behind has come back, again, with newer times.
    `repeated`: (device, beat_no) of those that had been recorded before.
    """

    clones: frozenset[str]
    repeated: frozenset[tuple[str, int]]


async def save_heartbeats(connection: AsyncConnection, beats: Sequence[Any]) -> Saved:
    """Record heartbeats (`gateway.requests.Heartbeat`), bring presence to the newest of each device, and correct what
    the registry says of devices that name the image they run. Unknown devices leave nothing.

    A heartbeat that says, word for word and with the same device time, what its device was recorded to say within
    REPEAT_WINDOW before it was last heard, has been delivered again: it is not recorded, and presence keeps what is
    newer. That the device is there is all that it still says, for one whose clock stands still may repeat itself.
    """
    cursor = await connection.execute(_SAVE, (orjson.dumps(beats).decode(),))
    answer = await cursor.fetchall()
    clones = {device_id for device_id, beat_no in answer if beat_no is None}
    doubtful = frozenset((device_id, beat_no) for device_id, beat_no in answer if beat_no is not None)
    repeated = await _record_doubtful(connection, beats, doubtful) if doubtful else frozenset[tuple[str, int]]()
    for later in _presence_later(beats, doubtful, repeated):
        cursor = await connection.execute(_SAVE_LATER, (orjson.dumps(later).decode(),))
        clones.update(device_id for (device_id,) in await cursor.fetchall())
    await _reconcile(connection, beats, repeated)
    return Saved(frozenset(clones), repeated)


async def _reconcile(connection: AsyncConnection, beats: Sequence[Any], repeated: frozenset[tuple[str, int]]) -> None:
    said = {
        beat.device_id: {"device_id": beat.device_id, "version": beat.firmware_version, "sha256": beat.firmware_sha256}
        for beat in beats
        if beat.firmware_sha256 and (beat.device_id, beat.beat_no) not in repeated
    }
    if said:
        await connection.execute(_RECONCILE, (orjson.dumps(list(said.values())).decode(),))


async def _record_doubtful(
    connection: AsyncConnection, beats: Sequence[Any], doubtful: frozenset[tuple[str, int]]
) -> frozenset[tuple[str, int]]:
    """Record those that are new after all; returns those that are not."""
    asked = [beat for beat in beats if (beat.device_id, beat.beat_no) in doubtful]
    cursor = await connection.execute(_RECORD_DOUBTFUL, (orjson.dumps(asked).decode(),))
    repeated = doubtful - {(device_id, beat_no) for device_id, beat_no in await cursor.fetchall()}
    if repeated:
        await connection.execute(_STILL_THERE, (orjson.dumps(sorted({thing for thing, _ in repeated})).decode(),))
    return repeated


def _presence_later(
    beats: Sequence[Any], doubtful: frozenset[tuple[str, int]], repeated: frozenset[tuple[str, int]]
) -> list[list[Any]]:
    """What presence still has to be brought to, in rounds: all but the first round, and of that what was in doubt."""
    rounds: dict[int, dict[str, Any]] = {}
    settled = set()
    for beat in beats:
        key = (beat.device_id, beat.beat_no)
        if beat.round == 0 and beat.newest and key not in doubtful:
            settled.add(beat.device_id)
        elif key not in repeated:
            rounds.setdefault(beat.round, {})[beat.device_id] = beat
    first = {thing: beat for thing, beat in rounds.pop(0, {}).items() if thing not in settled}
    return [list(found.values()) for found in (first, *(rounds[number] for number in sorted(rounds))) if found]


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
