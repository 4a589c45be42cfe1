"""Looking one device up, by id or by serial number: from Redis where it may be believed, else from PostgreSQL.

What is kept is `DeviceFacts`: all that the registry knows but presence (last heartbeat, uptime), which changes with every
heartbeat, and whether the device is barred. Where no Redis is given this is PostgreSQL alone. An answer from the cache is at most
`device_cache.FRESH_MS` old, whatever fails; what may rest on no old answer (who may speak: store/access.py) asks
PostgreSQL. That there is no such device is not remembered: it may be created the next moment.

A Redis that is away, slow or refuses costs one time limit, and is then left alone for a second.

```python
lookup = DeviceLookup(db, "redis://127.0.0.1:6379/0")
found = await lookup.get("motor-7")
found.device.site_id, found.source
```
"""

import logging
import time
from collections.abc import Awaitable
from contextlib import suppress
from enum import StrEnum
from typing import TypeVar

from prometheus_client import Counter
from psycopg import AsyncConnection, OperationalError
from psycopg.rows import class_row
from psycopg_pool import AsyncConnectionPool
from pydantic import BaseModel, ConfigDict
from redis.exceptions import RedisError

from domain.mistakes import shown
from models.device import DeviceFacts
from models.errors import NotFoundError
from store.device_cache import CONNECTIONS, DeviceCache, Lease, UnvouchedError, Wanted, by_id, by_serial, open_redis
from store.engine import Database

TIMEOUT_SECONDS = 0.05
"""PostgreSQL answers within a millisecond or two: nobody should wait much longer for what is meant to spare it."""
PAUSE_SECONDS = 1.0
"""How long a Redis that failed, or for which nobody vouches, is not asked."""

_LOOKUPS = Counter("tidegate_lookups", "Devices looked up, by where the answer came from.", ["source"])
_FAILURES = Counter(
    "tidegate_lookup_cache_failures", "Times that Redis was away, too slow, refused, or not vouched for."
)
_SELECT = f"SELECT {', '.join(DeviceFacts.model_fields)} FROM devices"

log = logging.getLogger("lookup")
T = TypeVar("T")


class Source(StrEnum):
    """Where an answer came from."""

    REDIS = "redis"
    POSTGRESQL = "postgresql"


class Found(BaseModel):
    """A device, where it was found, and why there."""

    model_config = ConfigDict(frozen=True)

    device: DeviceFacts
    source: Source
    why: str


class DeviceLookup:
    """Reads devices; safe to share between tasks."""

    def __init__(self, db: Database, redis_url: str | None, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Connects to nothing yet. Raises InvalidInputError where the address of Redis is none."""
        self._db = db
        self._cache = DeviceCache(open_redis(redis_url, timeout_seconds)) if redis_url else None
        self._breaker = Breaker()
        # One statement that reads needs no transaction and no question before whether the connection lives: 1 round
        # trip instead of 4, half the cost on both sides.
        self._readers: AsyncConnectionPool[AsyncConnection] = AsyncConnectionPool(
            db.url, min_size=1, max_size=CONNECTIONS, open=False, kwargs={"autocommit": True}
        )

    async def get(self, device_id: str) -> Found:
        """The device of this id; raises NotFoundError."""
        if (found := await self._find(by_id(device_id), "device_id", device_id)) is None:
            raise NotFoundError(f"no device with the id {shown(device_id)}; 'device list' shows those there are")
        return found

    async def get_by_serial(self, serial_number: str) -> Found:
        """The device of this serial number; raises NotFoundError."""
        if (found := await self._find(by_serial(serial_number), "serial_number", serial_number)) is None:
            raise NotFoundError(f"no device with the serial number {shown(serial_number)}")
        return found

    async def close(self) -> None:
        """Close every connection of its own."""
        await self._readers.close()
        if self._cache is not None:
            with suppress(RedisError, OSError):
                await self._cache.close()

    async def _find(self, wanted: Wanted, column: str, value: str) -> Found | None:
        kept, why = await self._ask(wanted)
        if isinstance(kept, DeviceFacts):
            return _found(kept, Source.REDIS, why)
        device = await self._read(column, value)
        if device is None:
            return None
        if kept is not None and self._cache is not None:
            await self._breaker.run(self._cache.store(device, kept))
        return _found(device, Source.POSTGRESQL, why)

    async def _ask(self, wanted: Wanted) -> tuple[DeviceFacts | Lease | None, str]:
        if self._cache is None:
            return None, "no Redis is given"
        if not self._breaker.lets_through():
            return None, f"Redis is left alone for a moment: {self._breaker.reason}"
        answer = await self._breaker.run(self._cache.find(wanted))
        if answer is None:
            return None, self._breaker.reason
        return answer, "kept" if isinstance(answer, DeviceFacts) else "not kept so far, or changed since"

    async def _read(self, column: str, value: str) -> DeviceFacts | None:
        """The row as PostgreSQL has it, read after this was called."""
        if "\0" in value:
            return None
        if self._readers.closed:
            await self._readers.open()
        try:
            return await _select(self._readers, column, value)
        except OperationalError:  # a connection that has died since its last use; the other pool gives none of these
            return await _select(self._db.pool, column, value)


async def _select(pool: AsyncConnectionPool[AsyncConnection], column: str, value: str) -> DeviceFacts | None:
    async with pool.connection() as connection, connection.cursor(row_factory=class_row(DeviceFacts)) as cursor:
        await cursor.execute(f"{_SELECT} WHERE {column} = %s".encode(), (value,))
        return await cursor.fetchone()


def _found(device: DeviceFacts, source: Source, why: str) -> Found:
    _LOOKUPS.labels(source).inc()
    return Found(device=device, source=source, why=why)


class Breaker:
    """Leaves a Redis alone for a while after a failure; then one request tries, and the others wait for its success."""

    def __init__(self) -> None:
        self.reason = ""
        self._closed_until = 0.0

    def lets_through(self) -> bool:
        """Whether to ask Redis now. After a pause, only the first to ask hears yes."""
        now = time.monotonic()
        if now < self._closed_until:
            return False
        if self.reason:
            self._closed_until = now + PAUSE_SECONDS
        return True

    async def run(self, work: Awaitable[T]) -> T | None:
        """What Redis answers, or None: it failed, and is left alone from now on. A reason is logged when it changes."""
        try:
            answer = await work
        except (RedisError, OSError, UnvouchedError) as error:
            _FAILURES.inc()
            reason = str(error) if isinstance(error, UnvouchedError) else f"{type(error).__name__}: {error}"
            if reason != self.reason:
                log.warning("asking PostgreSQL instead of Redis: %s", reason)
            self.reason, self._closed_until = reason, time.monotonic() + PAUSE_SECONDS
            return None
        self.reason, self._closed_until = "", 0.0
        return answer
