"""Partitions by day (UTC) of the tables that only grow: made ahead, and dropped when they are old.

What no partition is there for lands in `<table>_default`, so nothing is lost while nobody makes any. When the partition
of such a day is made, those rows move into it: most of them in small pieces before it takes part, the last few in the
moment when it does. While they move, readers do not see them; writers wait for that moment alone, LOCK_TIMEOUT at most.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from psycopg import AsyncConnection, errors, sql

from models.errors import UnavailableError
from store.engine import Database

DAYS_AHEAD = 3
"""Nobody may be there to make partitions for so long before rows land in the default one."""

LOCK_TIMEOUT = "2s"
"""For locks that a batch of the gateway would have to wait for behind us."""

MAX_APART = timedelta(days=1)
"""Between PostgreSQL's day and this process's own: one that is set wrong by more would drop what is to be kept."""

MOVED_AT_ONCE = 5000
LOCK_TRIES = 5


@dataclass(frozen=True, slots=True)
class Kept:
    """A table that is kept by days, and how many days before today are kept."""

    table: str
    days: int


@dataclass(frozen=True, slots=True)
class Turned:
    """What was made, what was dropped, how many rows have moved out of default partitions, how many were deleted there."""

    made: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    moved: int = 0
    deleted: int = 0


async def turn_partitions(db: Database, kept: Sequence[Kept], today: date | None = None) -> Turned:
    """Make what is missing and drop what is too old. `today`: the database's, in UTC.

    Idempotent, and one at a time: who comes second finds what the first has done. Raises psycopg.errors.LockNotAvailable
    where a lock cannot be had in LOCK_TRIES tries; what has been done stays done. UnavailableError where the clocks do not
    agree what day it is: then nothing is made and nothing dropped.
    """
    made: list[str] = []
    dropped: list[str] = []
    moved = deleted = 0
    for one in kept:
        day = today or await _today(db)
        oldest = day - timedelta(days=one.days)
        wanted = {day + timedelta(days=ahead) for ahead in range(DAYS_AHEAD + 1)}
        wanted |= {stray for stray in await _stray_days(db, one.table) if stray >= oldest}
        for missing in sorted(wanted - set(await _days(db, one.table))):
            moved += await _make(db, one.table, missing)
            made.append(name_of(one.table, missing))
        for old in await _days(db, one.table):
            if old < oldest:
                await _drop(db, one.table, old)
                dropped.append(name_of(one.table, old))
        deleted += await _delete_strays(db, one.table, oldest)
    return Turned(tuple(made), tuple(dropped), moved, deleted)


def name_of(table: str, day: date) -> str:
    """The partition's name.

    >>> name_of("heartbeats", date(2026, 3, 1))
    'heartbeats_20260301'
    """
    return f"{table}_{day:%Y%m%d}"


def bounds_of(day: date) -> tuple[datetime, datetime]:
    """The day's first instant, and that of the next day."""
    first = datetime.combine(day, time(), UTC)
    return first, first + timedelta(days=1)


async def _today(db: Database) -> date:
    async with db.pool.connection() as connection:
        row = await (await connection.execute("SELECT (now() AT TIME ZONE 'UTC')::date")).fetchone()
    assert row is not None
    found, here = row[0], datetime.now(UTC).date()
    assert isinstance(found, date)
    if abs(found - here) > MAX_APART:
        raise UnavailableError(
            f"cannot tell which history is old: it is {found} by PostgreSQL's clock and {here} by this worker's; nothing "
            "was dropped; set the clock that is wrong"
        )
    return found


async def _days(db: Database, table: str) -> list[date]:
    """The days that have a partition which takes part, in order."""
    async with db.pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
            "WHERE i.inhparent = %s::regclass ORDER BY c.relname",
            (table,),
        )
        names = [row[0] for row in await cursor.fetchall()]
    matches = (re.fullmatch(rf"{table}_(\d{{4}})(\d\d)(\d\d)", name) for name in names)
    return [date(int(found[1]), int(found[2]), int(found[3])) for found in matches if found]


async def _stray_days(db: Database, table: str) -> list[date]:
    """Days of rows that no partition was there for."""
    async with db.pool.connection() as connection:
        cursor = await connection.execute(
            sql.SQL("SELECT DISTINCT (at AT TIME ZONE 'UTC')::date FROM {}").format(_default(table))
        )
        return [row[0] for row in await cursor.fetchall()]


def _default(table: str) -> sql.Identifier:
    return sql.Identifier(f"{table}_default")


async def _make(db: Database, table: str, day: date) -> int:
    """Make a day's partition; returns how many rows have moved into it."""
    first, end = bounds_of(day)
    names = {"table": sql.Identifier(table), "part": sql.Identifier(name_of(table, day)), "strays": _default(table)}
    days = {**names, "first": sql.Literal(first), "end": sql.Literal(end)}
    create = sql.SQL(
        "CREATE TABLE IF NOT EXISTS {part} (LIKE {table} INCLUDING ALL, "
        "CONSTRAINT of_its_day CHECK (at >= {first} AND at < {end}))"
    ).format(**days)
    move = sql.SQL(
        "WITH gone AS (DELETE FROM {strays} WHERE ctid IN (SELECT ctid FROM {strays} WHERE at >= {first} AND at < {end} "
        "LIMIT {limit}) RETURNING *) INSERT INTO {part} SELECT * FROM gone"
    )
    some = move.format(**days, limit=sql.Literal(MOVED_AT_ONCE))
    rest = move.format(**days, limit=sql.SQL("ALL"))
    attach = sql.SQL(
        "ALTER TABLE {table} ATTACH PARTITION {part} FOR VALUES FROM ({first}) TO ({end}); "
        "ALTER TABLE {part} DROP CONSTRAINT of_its_day"
    ).format(**days)
    moved = 0
    async with db.pool.connection() as connection:
        await connection.execute(create)
    while True:
        async with db.pool.connection() as connection:
            piece = (await connection.execute(some)).rowcount
        moved += piece
        if piece < MOVED_AT_ONCE:
            break
    for attempt in range(LOCK_TRIES):
        try:
            async with db.pool.connection() as connection:
                await _lock(connection, table, f"{table}_default")
                moved += (await connection.execute(rest)).rowcount
                await connection.execute(attach)
            return moved
        except errors.LockNotAvailable:
            if attempt + 1 == LOCK_TRIES:
                raise
    return moved


async def _lock(connection: AsyncConnection, table: str, part: str) -> None:
    """Writers wait, for the moment that attaching takes, before they look which partition is theirs: one that had chosen
    the default partition already would find its row refused there."""
    await connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
    await connection.execute(sql.SQL("LOCK TABLE ONLY {} IN SHARE ROW EXCLUSIVE MODE").format(sql.Identifier(table)))
    await connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(sql.Identifier(part)))


async def _drop(db: Database, table: str, day: date) -> None:
    """Drop a day's partition. It waits for whoever reads or writes the table now, and they wait for it, briefly."""
    drop = sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(name_of(table, day)))
    for attempt in range(LOCK_TRIES):
        try:
            async with db.pool.connection() as connection:
                await connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
                await connection.execute(drop)
            return
        except errors.LockNotAvailable:
            if attempt + 1 == LOCK_TRIES:
                raise


async def _delete_strays(db: Database, table: str, oldest: date) -> int:
    """Rows of the default partition that are too old for any other."""
    statement = sql.SQL(
        "DELETE FROM {strays} WHERE ctid IN (SELECT ctid FROM {strays} WHERE at < {oldest} LIMIT {limit})"
    ).format(strays=_default(table), oldest=sql.Literal(bounds_of(oldest)[0]), limit=sql.Literal(MOVED_AT_ONCE))
    return await delete_in_pieces(db, statement, MOVED_AT_ONCE)


async def delete_in_pieces(db: Database, statement: sql.Composed, piece: int) -> int:
    """Repeat a statement that deletes `piece` rows at most, each time in a transaction of its own, until none are left."""
    deleted = 0
    while True:
        async with db.pool.connection() as connection:
            gone = (await connection.execute(statement)).rowcount
        deleted += gone
        if gone < piece:
            return deleted
