"""PostgreSQL's side of the lookup cache: who wants to hear of changed devices, and the queue of those that have changed.

The trigger on `devices` (migration 0002) writes to the queue while a registration has been renewed within the last five
minutes. A transaction that looked before a registration was committed writes nothing, however late it commits itself;
`older_writers_are_gone` says when there is none left. (Writers are READ COMMITTED, as all of Tidegate's are: the trigger
looks with a snapshot of its own.)
"""

from collections.abc import Sequence

from psycopg import AsyncConnection, sql

from models.errors import TidegateError

CHANNEL = "tidegate_cache"
_RELAY_LOCK = 7311466
_CACHE_ID = "redis"
_BATCH = 500
"""Rows taken at once; a script of Redis can be given some thousands of keys."""

_REGISTER = """
INSERT INTO lookup_caches (cache_id, seen_at) VALUES (%s, clock_timestamp())
ON CONFLICT (cache_id) DO UPDATE SET seen_at = excluded.seen_at
"""
# A minute less than the trigger allows: what is renewed here has never been seen as lapsed there.
_RENEW = """
UPDATE lookup_caches SET seen_at = clock_timestamp()
WHERE cache_id = %s AND seen_at > clock_timestamp() - interval '4 minutes'
"""


class LapsedError(TidegateError):
    """Changes may not have been recorded for a while: the registration was not renewed in time, or removed."""


class CacheQueue:
    """One relay's view, over a connection of its own in autocommit mode: the relay's lock is the connection's."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._registered_at = ""

    async def is_ours(self) -> bool:
        """Whether this is the one relay that works, until the connection ends."""
        return bool(await self._value("SELECT pg_try_advisory_lock(%s)", _RELAY_LOCK))

    async def register(self) -> None:
        """Have changes recorded from now on; forget what was recorded before, and listen."""
        await self._connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))
        await self._connection.execute(_REGISTER, (_CACHE_ID,))
        await self._connection.execute("DELETE FROM cache_invalidations")
        self._registered_at = str(await self._value("SELECT pg_snapshot_xmax(pg_current_snapshot())"))

    async def older_writers_are_gone(self) -> bool:
        """Whether every transaction has ended that had begun to write when the registration was committed."""
        statement = "SELECT pg_snapshot_xmin(pg_current_snapshot()) >= %s::xid8"
        return bool(await self._value(statement, self._registered_at))

    async def renew(self) -> None:
        """Say that this relay is still there; raises LapsedError when that comes too late."""
        if (await self._connection.execute(_RENEW, (_CACHE_ID,))).rowcount != 1:
            raise LapsedError("the relay of invalidations was not heard of for minutes; it registers anew")

    async def next(self) -> list[tuple[int, str, str]]:
        """Changes that are committed: number, device id and serial number."""
        cursor = await self._connection.execute(
            "SELECT invalidation_no, device_id, serial_number FROM cache_invalidations ORDER BY invalidation_no LIMIT %s",
            (_BATCH,),
        )
        return await cursor.fetchall()

    async def delivered(self, numbers: Sequence[int]) -> None:
        """The cache has forgotten these."""
        await self._connection.execute(
            "DELETE FROM cache_invalidations WHERE invalidation_no = ANY(%s)", (list(numbers),)
        )

    async def wait(self, seconds: float) -> None:
        """Return when something has changed, or after this time."""
        async for _ in self._connection.notifies(timeout=seconds, stop_after=1):
            pass

    async def leave(self) -> None:
        """Have nothing recorded any more."""
        await self._connection.execute("DELETE FROM lookup_caches WHERE cache_id = %s", (_CACHE_ID,))
        await self._connection.execute("DELETE FROM cache_invalidations")

    async def _value(self, statement: str, *arguments: object) -> object:
        row = await (await self._connection.execute(statement.encode(), arguments)).fetchone()
        assert row is not None
        return row[0]
