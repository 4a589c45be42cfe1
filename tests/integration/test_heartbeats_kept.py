"""What a batch of heartbeats leaves behind: every one of them in the history, the newest in presence, none of them twice."""

import dataclasses
from typing import Any

import pytest

import store.devicetraffic
from gateway.beats import Beats
from gateway.requests import Heartbeat
from store.devicetraffic import Saved, save_heartbeats
from store.engine import Database
from tests.integration.rollout_setup import NEW, OLD, add_devices

BASE = Heartbeat("motor-1", 1000.0, 5, 4096, 41.5, "1.2.0", None, -60.0, 0, "aa", {"volts": 3.3})


def heartbeat(time: float | None, thing: str = "motor-1", **changes: Any) -> Heartbeat:
    return dataclasses.replace(BASE, device_id=thing, device_time=time, **changes)


async def save(db: Database, *said: Heartbeat) -> Saved:
    """One batch, as the gateway saves it."""
    beats = Beats()
    for beat in said:
        beats.add(dataclasses.replace(beat))
    async with db.pool.connection() as connection, connection.pipeline():
        return await save_heartbeats(connection, beats.said)


async def rows(db: Database, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
    async with db.pool.connection() as connection:
        return list(await (await connection.execute(sql.encode(), arguments)).fetchall())


async def recorded(db: Database, thing: str = "motor-1") -> list[tuple[Any, ...]]:
    """Device times and boots in the history, in its order."""
    return await rows(
        db,
        "SELECT extract(epoch FROM device_time)::float8, boot_id FROM heartbeats WHERE device_id = %s "
        "ORDER BY at, beat_no",
        thing,
    )


async def present(db: Database, thing: str = "motor-1") -> tuple[Any, ...]:
    [row] = await rows(
        db,
        "SELECT extract(epoch FROM device_time)::float8, boot_id, uptime FROM presence WHERE device_id = %s",
        thing,
    )
    return row


async def test_every_heartbeat_of_a_batch_is_recorded_and_presence_has_the_newest(db: Database) -> None:
    await add_devices(db, 2)
    await save(db, heartbeat(1.0), heartbeat(2.0, "motor-2"), heartbeat(3.0), heartbeat(4.0, "stranger"))
    await save(db, heartbeat(5.0, uptime=9))
    assert await recorded(db) == [(1.0, "aa"), (3.0, "aa"), (5.0, "aa")]
    assert await present(db) == (5.0, "aa", 9)
    assert await rows(db, "SELECT device_id FROM heartbeats ORDER BY device_id") == [("motor-1",)] * 3 + [("motor-2",)]
    assert await rows(db, "SELECT device_id FROM presence ORDER BY device_id") == [("motor-1",), ("motor-2",)]
    [first, *_] = await rows(
        db,
        "SELECT uptime, free_memory, cpu_temperature, firmware_version, signal_strength, error_count, extra, "
        "at = (SELECT min(at) FROM heartbeats), beat_no FROM heartbeats WHERE device_id = 'motor-1' ORDER BY at, beat_no",
    )
    assert first == (5, 4096, 41.5, "1.2.0", -60.0, 0, {"volts": 3.3}, True, 0)


async def told_twice(db: Database) -> tuple[list[tuple[Any, ...]], tuple[Any, ...]]:
    """Three heartbeats, a reboot and another; then all of it again and something new; history and presence."""
    await add_devices(db, 1)
    backlog = [
        heartbeat(1.0),
        heartbeat(2.0),
        heartbeat(3.0),
        heartbeat(0.5, boot_id="bb"),
        heartbeat(4.0, uptime=None),
    ]
    await save(db, *backlog[:3])
    await save(db, *backlog[3:])
    await save(db, *backlog)
    for beat in backlog:
        await save(db, beat)
    await save(db, backlog[1], heartbeat(9.0, boot_id="bb"), backlog[0])
    return await recorded(db), await present(db)


async def test_what_the_broker_delivers_again_is_not_recorded_twice_and_turns_nothing_back(db: Database) -> None:
    history, presence = await told_twice(db)
    assert history == [(1.0, "aa"), (2.0, "aa"), (3.0, "aa"), (0.5, "bb"), (4.0, "aa"), (9.0, "bb")]
    assert presence == (9.0, "bb", 5)
    saved = await save(db, heartbeat(1.0), heartbeat(10.0, boot_id="bb"))
    assert saved.repeated == {("motor-1", 0)} and not saved.clones


async def test_without_the_look_into_the_history_it_is(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    statement = store.devicetraffic._RECORD_DOUBTFUL
    monkeypatch.setattr(store.devicetraffic, "_RECORD_DOUBTFUL", statement.replace("NOT EXISTS", "true OR EXISTS"))
    history, _ = await told_twice(db)
    assert len(history) > 15


async def test_a_device_with_a_clock_that_stands_still_or_goes_back_is_heard(db: Database) -> None:
    await add_devices(db, 2)
    for uptime in (5, 6, 7):
        await save(db, heartbeat(0.0, uptime=uptime))
    await save(db, heartbeat(-5.0 + 1000, uptime=8), heartbeat(20.0, uptime=9))
    assert [time for time, _ in await recorded(db)] == [0.0, 0.0, 0.0, 995.0, 20.0]
    assert await present(db) == (20.0, "aa", 9)
    for _ in range(3):
        await save(db, heartbeat(None, "motor-2"))
    assert len(await recorded(db, "motor-2")) == 3, "without a time nothing can be told apart, and all of it counts"


async def test_a_device_that_repeats_itself_word_for_word_is_still_there(db: Database) -> None:
    await add_devices(db, 1)
    await save(db, heartbeat(0.0))
    await rows(db, "UPDATE presence SET last_heartbeat = now() - interval '50 minutes' RETURNING 1")
    await rows(db, "UPDATE heartbeats SET at = now() - interval '50 minutes' RETURNING 1")
    await save(db, heartbeat(0.0))
    assert await rows(db, "SELECT count(*) FROM heartbeats") == [(1,)]
    assert await rows(db, "SELECT last_heartbeat > now() - interval '1 minute' FROM presence") == [(True,)]
    await rows(db, "UPDATE heartbeats SET at = now() - interval '2 hours' RETURNING 1")
    await save(db, heartbeat(0.0))
    assert await rows(db, "SELECT count(*) FROM heartbeats") == [(2,)]


async def test_an_image_named_before_an_update_does_not_come_back_with_a_repeated_heartbeat(db: Database) -> None:
    await add_devices(db, 1)
    before = heartbeat(1.0, firmware_sha256=OLD)
    await save(db, before)
    await save(db, heartbeat(2.0, firmware_version="1.3.0", firmware_sha256=NEW, boot_id="bb"))
    await save(db, before)
    assert await rows(db, "SELECT firmware_version, firmware_sha256 FROM devices") == [("1.3.0", NEW)]
