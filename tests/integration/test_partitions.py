"""Partitions by day: made ahead, filled with what came before them, dropped when they are old; and what else is old."""

import asyncio
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
import pytest

import store.partitions
from activities.health import HealthActivities
from models.errors import UnavailableError
from models.health import KeepHistoryInput
from store.engine import Database
from store.partitions import Kept, Turned, turn_partitions

DAY = date(2026, 3, 10)
HISTORY = Kept("heartbeats", 5)


@pytest.fixture(autouse=True)
def no_partitions(empty_database: str) -> Any:
    """Tests share a database, and partitions are not emptied but dropped."""
    yield
    with psycopg.connect(empty_database, autocommit=True) as connection:
        found = connection.execute(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname ~ '^(heartbeats|shadow_history)_\\d{8}$'"
        ).fetchall()
        for (name,) in found:
            connection.execute(f"DROP TABLE {name}".encode())


async def say(db: Database, *moments: datetime) -> None:
    async with db.pool.connection() as connection, connection.cursor() as cursor:
        await cursor.executemany("INSERT INTO heartbeats (device_id, at) VALUES ('m', %s)", [(at,) for at in moments])


async def where(db: Database) -> list[tuple[str, datetime]]:
    async with db.pool.connection() as connection:
        cursor = await connection.execute("SELECT tableoid::regclass::text, at FROM heartbeats ORDER BY at")
        return [(name, at.astimezone(UTC)) for name, at in await cursor.fetchall()]


def at(day: int, hour: int = 0, minute: int = 0, second: int = 0) -> datetime:
    return datetime(2026, 3, day, hour, minute, second, tzinfo=UTC)


async def test_today_and_three_days_are_made_once_and_midnight_parts_them(db: Database) -> None:
    turned = await turn_partitions(db, [HISTORY], DAY)
    assert turned.made == tuple(f"heartbeats_202603{day}" for day in (10, 11, 12, 13))
    assert await turn_partitions(db, [HISTORY], DAY) == Turned()
    last, first = at(10, 23, 59, 59), at(11, 0, 0, 1)
    await say(db, last, first, at(14))
    assert await where(db) == [
        ("heartbeats_20260310", last),
        ("heartbeats_20260311", first),
        ("heartbeats_default", at(14)),
    ]


async def test_what_came_before_its_partition_moves_into_it_and_none_is_lost(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.partitions, "MOVED_AT_ONCE", 100)
    early = [at(9, 12) + timedelta(seconds=second) for second in range(250)]
    today = [at(10) + timedelta(seconds=second) for second in range(333)]
    await say(db, *early, *today, at(10, 23, 59, 59))
    over = asyncio.Event()

    async def go_on() -> int:
        """Heartbeats of the day, all the time."""
        count = 0
        while not over.is_set():
            await say(db, at(10, 12) + timedelta(milliseconds=count))
            count += 1
        return count

    writing = asyncio.create_task(go_on())
    turned = await turn_partitions(db, [HISTORY], DAY)
    over.set()
    said = await writing
    assert turned.made[:2] == ("heartbeats_20260309", "heartbeats_20260310") and turned.moved >= 584
    found = await where(db)
    assert len(found) == 584 + said
    assert {name for name, _ in found} == {"heartbeats_20260309", "heartbeats_20260310"}


async def test_a_partition_that_was_being_filled_when_its_maker_died_is_finished_by_the_next(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await say(db, *(at(10, 1) + timedelta(seconds=second) for second in range(40)))
    monkeypatch.setattr(store.partitions, "MOVED_AT_ONCE", 10)

    async def dies(*_: Any) -> None:
        raise psycopg.OperationalError("killed")

    with monkeypatch.context() as patch, pytest.raises(psycopg.OperationalError):
        patch.setattr(store.partitions, "_lock", dies)
        await turn_partitions(db, [HISTORY], DAY)
    assert await where(db) == [], "they are on their way"
    await turn_partitions(db, [HISTORY], DAY)
    assert len(await where(db)) == 40


async def test_exactly_the_days_beyond_retention_are_dropped(db: Database) -> None:
    for day in (1, 4, 8):
        await turn_partitions(db, [Kept("heartbeats", 100)], date(2026, 3, day))
    await say(db, *(at(day, 23, 59, 59) for day in range(1, 12)), datetime(2026, 2, 1, tzinfo=UTC))
    turned = await turn_partitions(db, [HISTORY], DAY)
    assert turned.dropped == tuple(f"heartbeats_202603{day:02}" for day in (1, 2, 3, 4))
    assert turned.deleted == 1, "what is too old for any day was in the default partition"
    assert [found.day for _, found in await where(db)] == list(range(5, 12))


async def test_who_reads_for_long_delays_the_dropping_and_no_writer(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.partitions, "LOCK_TIMEOUT", "50ms")
    await turn_partitions(db, [HISTORY], date(2026, 3, 1))
    async with db.pool.connection() as reader:
        await reader.execute("SELECT count(*) FROM heartbeats")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await turn_partitions(db, [HISTORY], DAY)
        async with asyncio.timeout(5):
            await say(db, at(10))
    assert len((await turn_partitions(db, [HISTORY], DAY)).dropped) == 4


async def test_upkeep_makes_both_tables_partitions_and_deletes_what_is_old(db: Database) -> None:
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO quarantine (at, topic, size_bytes, payload, code, reason) "
            "SELECT now() - make_interval(days => d), 't', 1, '', 'c', 'r' FROM unnest(ARRAY[0, 29, 31, 400]) d"
        )
        await connection.execute(
            "INSERT INTO alert_notifications (alert_no, event, handed_over_at) "
            "VALUES (1, 'open', NULL), (1, 'open', now()), (1, 'open', now() - interval '31 days')"
        )
        await connection.execute(
            "INSERT INTO diagnostics (request_id, device_id, type, state, requested_by, expires_at, answered_at) "
            "SELECT i::text, 'm', 'ping', s, 'a', now() - interval '40 days', t FROM (VALUES "
            "(1, 'answered', now() - interval '31 days'), (2, 'answered', now()), (3, 'requested', NULL), "
            "(4, 'timed-out', NULL)) v(i, s, t)"
        )
        await connection.execute(
            "INSERT INTO shadows (device_id, name, version, updated_at, deleted_at) "
            "SELECT 'm', h::text, 1, now(), now() - make_interval(hours => h) FROM unnest(ARRAY[47, 49]) h"
        )
    upkeep = HealthActivities(db)
    kept = await upkeep.keep_history(KeepHistoryInput())
    assert len(kept.made) == 8 and kept.deleted == {
        "quarantine": 2,
        "alert_notifications": 1,
        "diagnostics": 2,
        "shadows": 1,
    }
    again = await upkeep.keep_history(KeepHistoryInput())
    assert (again.made, again.dropped, again.deleted) == ((), (), {})


class Behind(datetime):
    """A worker's clock that is 40 days behind PostgreSQL's; which of them is wrong, neither can know."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.now(tz) - timedelta(days=40)


async def kept_by_a_worker_behind(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    real = datetime.now(UTC).date() - timedelta(days=40)
    await turn_partitions(db, [HISTORY], real)
    await say(db, datetime.combine(real, datetime.min.time(), UTC))
    monkeypatch.setattr(store.partitions, "datetime", Behind)
    await turn_partitions(db, [HISTORY])


async def test_a_clock_that_was_set_wrong_drops_nothing(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="nothing was dropped; set the clock that is wrong"):
        await kept_by_a_worker_behind(db, monkeypatch)
    assert len(await where(db)) == 1


async def test_if_one_clock_were_believed_all_history_would_be_gone(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.partitions, "MAX_APART", timedelta(days=9999))
    await kept_by_a_worker_behind(db, monkeypatch)
    assert await where(db) == []
