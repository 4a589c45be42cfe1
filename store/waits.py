"""What lifecycle workflows wait for, and the signals that tell them: a wait and an outbox, both rows of PostgreSQL.

A workflow's activity says what it waits for (`expect`). Whoever records that it has happened, in the same transaction,
turns the wait into a row of the outbox (`happened`). A worker delivers the outbox as signals (activities/relay.py) and
deletes what it has delivered, so that a signal is never lost and may come twice. The gateway needs no Temporal for it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from psycopg import AsyncConnection
from psycopg.types.json import Jsonb

from models.identity import DeviceHappening

CHANNEL = "tidegate_outbox"
"""NOTIFY channel: the outbox has something."""

_EXPECT = """
INSERT INTO device_waits (device_id, event, workflow_id, at_least) VALUES (%s, %s, %s, %s)
ON CONFLICT (device_id, event, workflow_id) DO UPDATE SET at_least = excluded.at_least, since = now()
"""

_HAPPENED = """
WITH told AS (
    SELECT * FROM jsonb_to_recordset(%s::jsonb) AS t(device_id text, event text, version int, detail jsonb)
), over AS (
    DELETE FROM device_waits w USING told t
    WHERE w.device_id = t.device_id AND w.event = t.event AND (w.at_least IS NULL OR t.version >= w.at_least)
    RETURNING w.workflow_id, w.device_id, w.event, t.detail
), sent AS (
    INSERT INTO workflow_outbox (workflow_id, event)
    SELECT workflow_id, jsonb_build_object('device_id', device_id, 'happening', event,
                                           'at', to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
                                           'detail', COALESCE(detail, '{}'::jsonb))
    FROM over RETURNING 1
)
SELECT pg_notify('tidegate_outbox', '') FROM sent LIMIT 1
"""


async def expect(
    connection: AsyncConnection, device_id: str, workflow_id: str, happenings: Mapping[DeviceHappening, int | None]
) -> None:
    """Wait for each of these; the value of CONFIGURED is the least version that ends the wait, of others None."""
    for happening, at_least in happenings.items():
        await connection.execute(_EXPECT, (device_id, happening.value, workflow_id, at_least))


async def forget(connection: AsyncConnection, workflow_id: str) -> None:
    """Wait for nothing any more."""
    await connection.execute("DELETE FROM device_waits WHERE workflow_id = %s", (workflow_id,))


async def happened(
    connection: AsyncConnection,
    happenings: Iterable[tuple[str, DeviceHappening, Mapping[str, Any]]],
) -> None:
    """Tell the workflows that wait for these (device, happening, detail), once this transaction commits."""
    told = [
        {"device_id": device, "event": what.value, "version": detail.get("version"), "detail": dict(detail)}
        for device, what, detail in happenings
    ]
    if told:
        await connection.execute(_HAPPENED, (orjson.dumps(told).decode(),))


async def signal(connection: AsyncConnection, workflow_id: str, event: Mapping[str, Any]) -> None:
    """Send a `device_event` whether somebody waits for it or not."""
    await connection.execute(
        "INSERT INTO workflow_outbox (workflow_id, event) VALUES (%s, %s)", (workflow_id, Jsonb(dict(event)))
    )
    await connection.execute("SELECT pg_notify(%s, '')", (CHANNEL,))
