"""The gateway's pulse: what it says to itself through the broker, so that silence can be told from deafness.

It goes the way of every device's message: broker, queue, batch, commit. What is noted is when one was handled
(PostgreSQL's clock) and how long it was under way (this process's own, which is never set). Pulses of another gateway,
of one that is gone or of somebody who can write anything, say nothing: each gateway knows its own by a random name.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import structlog
from prometheus_client import Counter, Gauge
from psycopg import AsyncConnection

from domain.presence import next_coverage
from models.protocol import PULSE_TOPIC
from observe.stopping import pause
from store.ingest import read_coverage, save_coverage
from transport.connection import Connection

log = structlog.get_logger("gateway")

EVERY_SECONDS = 5.0
UNDER_WAY = Gauge("tidegate_gateway_pulse_seconds", "How long the last pulse was under way, from broker to commit.")
GAPS = Counter("tidegate_gateway_gaps_total", "Times that nothing could be heard: devices' limits began anew.")


@dataclass(frozen=True, slots=True)
class Pulse:
    """Who said it, and when by that process's monotonic clock, in seconds."""

    source: str
    sent: float


def parse_pulse(body: dict[str, Any]) -> Pulse:
    """Judge a pulse. Raises ValueError."""
    source, sent = body.get("gateway"), body.get("sent")
    if not isinstance(source, str) or isinstance(sent, bool) or not isinstance(sent, int | float) or sent < 0:
        raise ValueError('expected a pulse {"gateway": ..., "sent": ...}')
    return Pulse(source, float(sent))


async def send_pulses(
    connection: Connection, source: str, stop: asyncio.Event, every_seconds: float = EVERY_SECONDS
) -> None:
    """Say it now and every few seconds, until `stop`."""
    while not stop.is_set():
        connection.publish_durably(PULSE_TOPIC, orjson.dumps({"gateway": source, "sent": time.monotonic()}))
        await pause(stop, every_seconds)


async def note_pulses(
    connection: AsyncConnection, pulses: Sequence[Pulse], source: str, now: float, noted: float = -math.inf
) -> float:
    """Note what pulses of this gateway have come; returns when the newest of them was sent.

    Args:
        now: PostgreSQL's clock, in epoch seconds.
        noted: the newest that has been noted before. Older ones come a second time, by the broker or by somebody who has
            listened, and would say that devices had to wait; those from the future are nobody's.
    """
    sent = [pulse.sent for pulse in pulses if pulse.source == source and noted < pulse.sent <= time.monotonic()]
    if not sent:
        return noted
    before = await read_coverage(connection)
    under_way = timedelta(seconds=max(0.0, time.monotonic() - min(sent)))
    covered = next_coverage(before, datetime.fromtimestamp(now, UTC), under_way)
    UNDER_WAY.set(under_way.total_seconds())
    if before is not None and covered.since != before.since:
        GAPS.inc()
        gap = covered.pulsed_at - before.pulsed_at
        log.warning("devices could not be heard", last_pulse=str(gap), under_way=str(under_way))
    await save_coverage(connection, covered)
    return max(sent)
