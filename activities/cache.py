"""The relay of invalidations: what the trigger on `devices` has written, taken to Redis. One of all workers' relays works.

A background task of the worker, not an activity. The trigger writes a row for each device that changed, in the
transaction that changed it, while a relay is registered: an invalidation is lost with its change or not at all. Rows are
deleted once Redis has forgotten their devices.

A relay promises readers (store/device_cache.py) with `vouch` that every change that was committed before it looked has
been forgotten. Hence it begins a new epoch, in which no former entry counts, whenever it cannot know that:

- It has just registered; and it does not vouch before every transaction has ended that may have changed a device
  without seeing the registration.
- Its registration has lapsed. A relay that could not reach Redis or PostgreSQL for some minutes is none any more, or a
  worker that never comes back would let rows pile up for ever.
- Redis has lost a write: it came back from a snapshot, or a replica took over.
"""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
import structlog
from prometheus_client import Counter
from redis.exceptions import RedisError

from models.errors import TidegateError
from observe.stopping import pause
from store.cache_queue import CacheQueue
from store.device_cache import CacheLostError, CacheWriter, open_redis

BEAT_SECONDS = 0.5
"""A quarter of how long an epoch is vouched for: three beats may be late."""
GATHER_SECONDS = 0.02
"""After a notification: what a busy fleet changes at the same moment is forgotten in one go."""
RENEW_SECONDS = 20.0
RETRY_SECONDS = 1.0
TIMEOUT_SECONDS = 1.0
"""Of Redis; longer than a reader's, because a relay that gives up leaves readers without a cache."""
_KEEPALIVE: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}

_FORGOTTEN = Counter("tidegate_cache_invalidations", "Changed devices that Redis was told to forget.")
_EPOCHS = Counter("tidegate_cache_epochs", "Times that everything in the lookup cache was declared void.")

log = structlog.get_logger("cache")


@dataclass
class CacheRelay:
    """`run` it for as long as the worker runs."""

    database_url: str
    redis_url: str
    _writer: CacheWriter = field(init=False)
    _said: str = field(default="", init=False)

    def __post_init__(self) -> None:
        """Connects to nothing yet. Raises InvalidInputError where the address is none of Redis."""
        self._writer = CacheWriter(open_redis(self.redis_url, TIMEOUT_SECONDS))

    async def run(self, stop: asyncio.Event) -> None:
        """Relay until stopped, whatever fails on the way."""
        try:
            while not stop.is_set():
                try:
                    await self._run_once(stop)
                except (psycopg.Error, RedisError, OSError, TidegateError) as error:
                    self._say("the lookup cache is not invalidated, so it is not used", error)
                await pause(stop, RETRY_SECONDS)
        finally:
            with suppress(RedisError, OSError):
                await self._writer.close()

    async def _run_once(self, stop: asyncio.Event) -> None:
        """Work until stopped, where no other relay does."""
        async with await psycopg.AsyncConnection.connect(
            self.database_url, autocommit=True, **_KEEPALIVE
        ) as connection:
            queue = CacheQueue(connection)
            if await queue.is_ours():
                await self._serve(queue, self._writer, stop)
                await _leave(queue, self._writer)
            else:
                self._say("standing by: another worker invalidates the lookup cache")

    async def _serve(self, queue: CacheQueue, writer: CacheWriter, stop: asyncio.Event) -> None:
        await queue.register()
        while not await queue.older_writers_are_gone() and not stop.is_set():
            await pause(stop, BEAT_SECONDS)
        renewed, whole = time.monotonic(), False
        while not stop.is_set():
            try:
                if not whole:
                    await writer.begin()
                    _EPOCHS.inc()
                    whole = True
                looked_at = await writer.clock_ms()
                if time.monotonic() - renewed > RENEW_SECONDS:
                    await queue.renew()
                    renewed = time.monotonic()
                if await self._deliver(queue, writer):
                    continue
                await writer.vouch(looked_at)
                self._say("the lookup cache is invalidated by this worker")
                await queue.wait(BEAT_SECONDS)
                await pause(stop, GATHER_SECONDS)
            except CacheLostError as error:
                log.warning("everything in the lookup cache is void", reason=str(error))
                whole = False
            except (RedisError, OSError) as error:
                self._say(
                    "Redis does not answer; changed devices wait to be forgotten, and readers ask PostgreSQL", error
                )
                await pause(stop, RETRY_SECONDS)

    async def _deliver(self, queue: CacheQueue, writer: CacheWriter) -> int:
        """Have some changed devices forgotten; how many."""
        if rows := await queue.next():
            await writer.forget([(device_id, serial) for _, device_id, serial in rows])
            await queue.delivered([number for number, _, _ in rows])
            _FORGOTTEN.inc(len(rows))
        return len(rows)

    def _say(self, what: str, error: Exception | None = None) -> None:
        """Log a state when it changes."""
        reason = f"{type(error).__name__}: {error}" if error else ""
        if what + reason != self._said:
            log.log(30 if error else 20, what, **({"reason": reason} if error else {}))
        self._said = what + reason


async def _leave(queue: CacheQueue, writer: CacheWriter) -> None:
    """Readers stop believing at once, and nothing is recorded any more."""
    with suppress(RedisError, OSError):
        await writer.end()
    await queue.leave()
