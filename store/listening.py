"""Hearing PostgreSQL's notifications, in a process that is to stop when it is told to."""

import asyncio

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
