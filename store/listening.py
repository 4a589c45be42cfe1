"""Hearing PostgreSQL's notifications: the next one in a process that runs for long, or one that names something."""

import asyncio
import time

from psycopg import AsyncConnection

LISTEN_SECONDS = 2.0
"""How long a notification may be missed before one looks anyway."""


async def heard(listener: AsyncConnection, stop: asyncio.Event, seconds: float = LISTEN_SECONDS) -> list[str]:
    """The payload of the next notification; none when the time is over or `stop` is set before one comes.

    Raises psycopg.Error where the connection of the listener has broken.
    """

    async def next_one() -> list[str]:
        return [notice.payload async for notice in listener.notifies(timeout=seconds, stop_after=1)]

    hearing, stopping = asyncio.ensure_future(next_one()), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([hearing, stopping], return_when=asyncio.FIRST_COMPLETED)
        return hearing.result() if hearing.done() else []
    finally:
        for task in (hearing, stopping):
            task.cancel()
        await asyncio.gather(hearing, stopping, return_exceptions=True)


async def named_within(connection: AsyncConnection, channel: str, payload: str, seconds: float) -> bool:
    """Whether a notification with this payload comes in time. The connection is one of a pool, and is left as it was."""
    deadline = time.monotonic() + seconds
    await connection.set_autocommit(True)
    try:
        await connection.execute(f"LISTEN {channel}".encode())
        async for notice in connection.notifies(timeout=seconds):
            if notice.payload == payload:
                return True
            if time.monotonic() >= deadline:
                return False
        return False
    finally:
        await asyncio.shield(_quiet(connection))


async def _quiet(connection: AsyncConnection) -> None:
    await connection.execute("UNLISTEN *")
    await connection.set_autocommit(False)
