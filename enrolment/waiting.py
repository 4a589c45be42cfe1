"""Requests that wait for their enrolment to change, woken by PostgreSQL (LISTEN) rather than by asking again and again.

One connection listens for all of them. A notification that gets lost, with its connection or before it, costs a waiter
the interval at which it looks by itself.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg
import structlog
from psycopg import AsyncConnection

from store.enrolments import CHANNEL

RECONNECT_SECONDS = 1.0

log = structlog.get_logger("enrolment")


class Changes:
    """Which requests wait for which enrolment."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._waiting: defaultdict[int, set[asyncio.Event]] = defaultdict(set)

    @contextmanager
    def of(self, enrolment_no: int) -> Iterator[asyncio.Event]:
        """An event that is set with each change of this enrolment, for the length of the block."""
        event = asyncio.Event()
        self._waiting[enrolment_no].add(event)
        try:
            yield event
        finally:
            self._waiting[enrolment_no].discard(event)
            if not self._waiting[enrolment_no]:
                del self._waiting[enrolment_no]

    async def listen(self) -> None:
        """Until cancelled."""
        while True:
            with suppress(psycopg.OperationalError):
                async with await AsyncConnection.connect(self._url, autocommit=True) as connection:
                    await connection.execute(f"LISTEN {CHANNEL}".encode())
                    async for notice in connection.notifies():
                        self._wake(notice.payload)
            log.warning("cannot listen for enrolments, trying again")
            await asyncio.sleep(RECONNECT_SECONDS)

    def _wake(self, payload: str) -> None:
        if payload.isdigit():
            for event in self._waiting.get(int(payload), ()):
                event.set()
