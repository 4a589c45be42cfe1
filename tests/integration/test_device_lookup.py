"""Looking devices up through a real Redis and a real relay: never an old answer, whatever fails, and what goes wrong
when one of the defences is switched off."""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from activities import cache as relay_module
from activities.cache import CacheRelay
from domain.device_rows import Format
from models.device import DeviceChanges, DeviceFacts, DeviceFilter, DeviceRecord, DeviceStatus
from models.errors import InvalidInputError, NotFoundError
from store import device_cache
from store.cache_queue import CacheQueue
from store.device_cache import FRESH, FRESH_MS, STATE, DeviceCache, Lease
from store.engine import Database
from store.lookup import PAUSE_SECONDS, DeviceLookup, Found, Source
from store.registry import Registry
from tests.conftest import RedisServer, free_port

SOON = 10.0
GONE = FRESH_MS / 1000 + 0.3
"""After this, nothing in the cache is believed unless somebody vouches for it again."""


class World:
    """A registry, a Redis, a relay that can be stopped, and what a reader sees."""

    def __init__(self, db: Database, server: RedisServer) -> None:
        self.db, self.server = db, server
        self.registry = Registry(db)
        self.lookup = DeviceLookup(db, server.url, timeout_seconds=0.5)
        self.redis = Redis.from_url(server.url)

    async def close(self) -> None:
        await self.lookup.close()
        await self.redis.aclose()

    async def add(self, device_id: str = "motor-7", **more: Any) -> DeviceRecord:
        facts = {"device_type": "motor", "serial_number": f"SN-{device_id}", "site_id": "berlin"} | more
        return await self.registry.create(DeviceRecord(device_id=device_id, **facts))

    async def move(self, site: str, device_id: str = "motor-7") -> None:
        await self.registry.update(device_id, DeviceChanges(site_id=site))

    async def site(self, device_id: str = "motor-7") -> tuple[str, Source]:
        found = await self.lookup.get(device_id)
        return found.device.site_id, found.source

    async def kept(self, device_id: str = "motor-7") -> None:
        """Have the device in the cache."""
        await until(lambda: self._comes_from_redis(device_id))

    async def _comes_from_redis(self, device_id: str) -> bool:
        return (await self.lookup.get(device_id)).source is Source.REDIS

    async def queue(self) -> int:
        async with self.db.pool.connection() as connection:
            cursor = await connection.execute("SELECT count(*) FROM cache_invalidations")
            row = await cursor.fetchone()
        assert row is not None
        return int(row[0])

    async def delivered(self) -> None:
        await until(lambda: self._is_empty())

    async def _is_empty(self) -> bool:
        return await self.queue() == 0

    async def vouched(self) -> None:
        await until(lambda: self._is_fresh())

    async def _is_fresh(self) -> bool:
        return await self.redis.get(FRESH) is not None

    @asynccontextmanager
    async def relay(self) -> AsyncIterator[CacheRelay]:
        """A relay that works while the block lasts."""
        stop, relay = asyncio.Event(), CacheRelay(self.db.url, self.server.url)
        task = asyncio.create_task(relay.run(stop))
        try:
            yield relay
        finally:
            stop.set()
            await task


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SOON):
        while not await condition():
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def world(db: Database, redis_server: RedisServer) -> AsyncIterator[World]:
    made = World(db, redis_server)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def running(world: World) -> AsyncIterator[World]:
    """With a relay that vouches, and motor-7 in the registry."""
    await world.add()
    async with world.relay():
        await world.vouched()
        yield world


# --- what it is for --------------------------------------------------------------------------------------------------


async def test_a_device_is_read_once_and_then_comes_from_redis_by_id_and_by_serial(running: World) -> None:
    first = await running.lookup.get("motor-7")
    assert (first.source, first.device.site_id) == (Source.POSTGRESQL, "berlin")
    second = await running.lookup.get("motor-7")
    third = await running.lookup.get_by_serial("SN-motor-7")
    assert {second.source, third.source} == {Source.REDIS}
    assert first.device == second.device == third.device
    record = (await running.registry.get("motor-7")).model_dump()
    assert first.device.model_dump() == {name: record[name] for name in DeviceFacts.model_fields}
    assert 290 < await running.redis.ttl("device:motor-7") <= 300
    assert 290 < await running.redis.ttl("serial:SN-motor-7") <= 300


async def test_a_device_found_by_its_serial_number_is_kept_for_both(running: World) -> None:
    assert (await running.lookup.get_by_serial("SN-motor-7")).source is Source.POSTGRESQL
    assert (await running.lookup.get_by_serial("SN-motor-7")).source is Source.REDIS
    assert (await running.lookup.get("motor-7")).source is Source.REDIS


async def test_a_device_that_does_not_exist_is_not_remembered(running: World) -> None:
    for _ in range(2):
        with pytest.raises(NotFoundError, match="no device with the id 'nobody'"):
            await running.lookup.get("nobody")
        with pytest.raises(NotFoundError, match="no device with the serial number 'SN-nobody'"):
            await running.lookup.get_by_serial("SN-nobody")
    await running.add("nobody")
    assert (await running.lookup.get("nobody")).device.serial_number == "SN-nobody"
    assert (await running.lookup.get_by_serial("SN-nobody")).device.device_id == "nobody"
    with pytest.raises(NotFoundError):
        await running.lookup.get("a\0b")


async def test_without_redis_postgresql_is_asked(db: Database) -> None:
    await Registry(db).create(
        DeviceRecord(device_id="motor-7", device_type="motor", serial_number="S", site_id="berlin")
    )
    lookup = DeviceLookup(db, None)
    for _ in range(2):
        assert await lookup.get("motor-7") == await lookup.get_by_serial("S")
        assert (await lookup.get("motor-7")).source is Source.POSTGRESQL
    await lookup.close()


async def test_connections_that_postgresql_has_ended_do_not_fail_a_lookup(db: Database) -> None:
    await Registry(db).create(
        DeviceRecord(device_id="motor-7", device_type="motor", serial_number="S", site_id="berlin")
    )
    lookup = DeviceLookup(db, None)
    await asyncio.gather(*(lookup.get("motor-7") for _ in range(20)))
    async with await psycopg.AsyncConnection.connect(db.url, autocommit=True) as connection:
        await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    await asyncio.gather(*(lookup.get("motor-7") for _ in range(20)))
    await lookup.close()


@pytest.mark.parametrize("url", ["127.0.0.1:6379", "http://127.0.0.1", "redis://127.0.0.1:port/0"])
def test_an_odd_address_is_refused(db: Database, url: str) -> None:
    with pytest.raises(InvalidInputError, match="expected redis://host:port/0"):
        DeviceLookup(db, url)


async def test_every_way_to_change_a_device_is_noticed(running: World) -> None:
    async def imports() -> None:
        line = b'{"device_id": "motor-7", "device_type": "pump", "serial_number": "SN-motor-7", "site_id": "berlin"}'
        await running.registry.import_devices([line], "x", Format.JSON_LINES)

    async def in_sql() -> None:
        async with running.db.pool.connection() as connection:
            await connection.execute("UPDATE devices SET firmware_version = '9' WHERE device_id = 'motor-7'")

    ways: list[Callable[[], Awaitable[Any]]] = [
        lambda: running.move("paris"),
        lambda: running.registry.update_many(DeviceFilter(type="motor"), DeviceChanges(tags={"a": "b"})),
        imports,
        in_sql,
        lambda: running.registry.retire("motor-7"),
    ]
    for way in ways:
        await running.kept()
        before = (await running.lookup.get("motor-7")).device
        await way()
        await running.delivered()
        after = await running.lookup.get("motor-7")
        assert after.source is Source.POSTGRESQL
        assert after.device != before
    assert after.device.status is DeviceStatus.RETIRED


async def test_a_device_that_is_deleted_is_gone_and_its_serial_number_finds_its_next_bearer(running: World) -> None:
    await running.kept()
    async with running.db.pool.connection() as connection:
        await connection.execute("DELETE FROM devices WHERE device_id = 'motor-7'")
    await running.add("motor-8", serial_number="SN-motor-7")
    await running.delivered()
    with pytest.raises(NotFoundError):
        await running.lookup.get("motor-7")
    assert (await running.lookup.get_by_serial("SN-motor-7")).device.device_id == "motor-8"


async def test_heartbeats_leave_the_cache_alone(running: World) -> None:
    await running.kept()
    async with running.db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO presence (device_id, last_heartbeat, uptime) VALUES ('motor-7', now(), 5)"
        )
        await connection.execute("UPDATE presence SET last_heartbeat = now(), uptime = 6")
    assert await running.queue() == 0
    assert await running.site() == ("berlin", Source.REDIS)


# --- the race: a reader has read the old row, a writer commits and invalidates, the reader stores ---------------------


async def read_while_it_changes(
    running: World, find: Callable[[], Awaitable[Found]], meanwhile: Callable[[], Awaitable[None]] | None = None
) -> Found:
    """A lookup that misses and reads the row; before it stores, the row is changed and the change delivered."""
    has_read, may_store = asyncio.Event(), asyncio.Event()
    plain = running.lookup._read

    async def slowly(column: str, value: str) -> DeviceFacts | None:
        row = await plain(column, value)
        has_read.set()
        await may_store.wait()
        return row

    running.lookup._read = slowly  # type: ignore[method-assign]
    slow = asyncio.create_task(find())
    await has_read.wait()
    running.lookup._read = plain  # type: ignore[method-assign]
    await running.move("paris")
    await (meanwhile or running.delivered)()
    may_store.set()
    return await slow


async def store_anyway(self: DeviceCache, device: DeviceFacts, lease: Lease) -> bool:
    """The mutant: what the requirements document's example does."""
    entry = device_cache.encode(device, lease.epoch)
    await self._redis.set(f"device:{device.device_id}", entry, ex=300)
    await self._redis.set(f"serial:{device.serial_number}", f"={device.device_id}", ex=300)
    return True


@pytest.mark.parametrize("by", ["id", "serial"])
@pytest.mark.parametrize("defended", [True, False])
async def test_a_slow_reader_does_not_bring_back_what_has_changed_meanwhile(
    running: World, monkeypatch: pytest.MonkeyPatch, by: str, defended: bool
) -> None:
    if not defended:
        monkeypatch.setattr(DeviceCache, "store", store_anyway)

    async def find() -> Found:
        if by == "id":
            return await running.lookup.get("motor-7")
        return await running.lookup.get_by_serial("SN-motor-7")

    slow = await read_while_it_changes(running, find)
    assert slow.device.site_id == "berlin", "the forced interleaving did not happen"
    assert (await find()).device.site_id == ("paris" if defended else "berlin")


async def test_a_slow_reader_does_not_overwrite_what_another_has_stored_since(running: World) -> None:
    other = DeviceLookup(running.db, running.server.url, timeout_seconds=0.5)

    async def another_stores() -> None:
        await running.delivered()
        await until(lambda: from_redis(other))

    slow = await read_while_it_changes(running, lambda: running.lookup.get("motor-7"), another_stores)
    assert slow.device.site_id == "berlin"
    assert await running.site() == ("paris", Source.REDIS)
    await other.close()


async def test_readers_and_writers_at_once_end_with_the_right_answers_and_never_see_a_device_go_back(
    running: World,
) -> None:
    devices = [f"motor-{i}" for i in range(10, 15)]
    for device in devices:
        await running.add(device, site_id="0")
    until_then = time.monotonic() + 3
    source = random.Random(1)
    seen: dict[str, list[tuple[float, int]]] = {device: [] for device in devices}
    written: dict[str, list[tuple[float, int]]] = {device: [(time.monotonic(), 0)] for device in devices}

    async def write() -> None:
        while time.monotonic() < until_then:
            device = source.choice(devices)
            number = written[device][-1][1] + 1
            await running.move(str(number), device)
            written[device].append((time.monotonic(), number))
            await asyncio.sleep(source.random() * 0.02)

    async def read() -> None:
        while time.monotonic() < until_then:
            device, began = source.choice(devices), time.monotonic()
            found = await (
                running.lookup.get(device) if source.random() < 0.5 else running.lookup.get_by_serial(f"SN-{device}")
            )
            seen[device].append((began, int(found.device.site_id)))

    await asyncio.gather(write(), *(read() for _ in range(8)))
    await running.delivered()
    bound = FRESH_MS / 1000
    for device in devices:
        for began, number in seen[device]:
            oldest = max(n for at, n in written[device] if at < began - bound or n == 0)
            assert number >= oldest
        for _ in range(2):
            assert (await running.site(device))[0] == str(written[device][-1][1])
    assert sum(map(len, seen.values())) > 100


# --- Redis is wrong ---------------------------------------------------------------------------------------------------


async def test_garbage_another_device_another_epoch_and_other_types_are_not_believed(running: World) -> None:
    await running.add("motor-8")
    await running.kept()
    await running.kept("motor-8")
    entry, other = await running.redis.mget("device:motor-7", "device:motor-8")
    assert entry is not None and other is not None
    head, _, text = entry.partition(b" ")
    epoch, _, shape = head.partition(b".")
    wrong = [
        b"",
        b"\x00\xff\xfe",
        head,
        head + b" ",
        head + b" null",
        head + b" {}",
        head + b" \xff" + text,
        head + b" " + text[:-1],
        head + b" " + text.replace(b'"active"', b'"flying"'),
        head + b" " + text.replace(b'"tags"', b'"labels"'),
        other,
        b"0" * 16 + b"." + shape + b" " + text,
        epoch + b".00000000 " + text,
        text,
        b"=motor-8",
    ]
    for value in wrong:
        await running.redis.set("device:motor-7", value)
        for look in (running.lookup.get("motor-7"), running.lookup.get_by_serial("SN-motor-7")):
            await running.redis.set("serial:SN-motor-7", "=motor-7")
            await running.redis.set("device:motor-7", value)
            found = await look
            assert (found.device.device_id, found.source) == ("motor-7", Source.POSTGRESQL), value
        assert (await running.site())[1] is Source.REDIS, f"{value!r} was not replaced"
    for value in (b"=motor-8", b"=nobody", b"motor-7", b"", b"=", b"\xff"):
        await running.redis.set("serial:SN-motor-7", value)
        assert (await running.lookup.get_by_serial("SN-motor-7")).device.device_id == "motor-7", value
    for key in ("serial:SN-motor-7", "device:motor-7"):
        await running.redis.delete(key)
        await running.redis.rpush(key, "a", "b")
        assert (await running.lookup.get("motor-7")).device.device_id == "motor-7"
        assert (await running.lookup.get_by_serial("SN-motor-7")).device.device_id == "motor-7"


async def test_a_cancelled_lookup_leaves_no_answer_for_the_next_one(running: World) -> None:
    await running.add("motor-8")
    await running.kept()
    await running.kept("motor-8")
    for pause in range(30):
        task = asyncio.create_task(running.lookup.get("motor-8"))
        for _ in range(pause):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (await running.lookup.get("motor-7")).device.device_id == "motor-7"


async def snapshot(redis: Redis) -> dict[bytes, tuple[int, bytes]]:
    """All that Redis holds, with its expiry."""
    found = {}
    for key in await redis.keys("*"):
        dump = await redis.dump(key)
        if dump is not None:
            found[key] = (await redis.pexpiretime(key), dump)
    return found


async def restore(redis: Redis, saved: dict[bytes, tuple[int, bytes]]) -> None:
    """What a Redis does that comes back from its last snapshot."""
    async with redis.pipeline(transaction=True) as pipeline:
        pipeline.flushall()
        for key, (expires, dump) in saved.items():
            pipeline.restore(key, max(0, expires), dump, replace=True, absttl=True)
        await pipeline.execute()


BLIND = device_cache._VOUCH.replace("if state ~= ARGV[1] and state ~= ARGV[2] then return 0 end", "")


@pytest.mark.parametrize("defended", [True, False])
async def test_a_redis_that_comes_back_with_old_entries_is_found_out(
    world: World, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    if not defended:
        assert BLIND != device_cache._VOUCH
        monkeypatch.setattr(device_cache, "_VOUCH", BLIND)
    await world.add()
    async with world.relay():
        await world.vouched()
        await world.kept()
        saved = await snapshot(world.redis)
        await world.move("paris")
        await world.delivered()
        assert (await world.site())[0] == "paris"
        await restore(world.redis, saved)
        await asyncio.sleep(GONE)
        await world.vouched()
        await asyncio.sleep(PAUSE_SECONDS)
        sites = {(await world.site())[0] for _ in range(5)}
        assert sites == {"paris" if defended else "berlin"}


# --- Redis is away, or slow -------------------------------------------------------------------------------------------


async def test_a_redis_that_is_not_there_costs_one_try_a_second(db: Database) -> None:
    await Registry(db).create(
        DeviceRecord(device_id="motor-7", device_type="motor", serial_number="S", site_id="berlin")
    )
    lookup = DeviceLookup(db, f"redis://127.0.0.1:{free_port()}/0")
    first = await lookup.get("motor-7")
    assert first.source is Source.POSTGRESQL
    assert "ConnectionError" in first.why
    assert "left alone for a moment" in (await lookup.get_by_serial("S")).why
    await lookup.close()


@pytest.mark.parametrize("defended", [True, False])
async def test_a_redis_that_hangs_delays_one_lookup_and_not_those_after_it(
    running: World, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    await running.kept()
    lookup = DeviceLookup(running.db, running.server.url, timeout_seconds=0.1)
    assert (await lookup.get("motor-7")).source is Source.REDIS
    if not defended:
        monkeypatch.setattr("store.lookup.Breaker.lets_through", lambda _: True)
    running.server.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(5):
            assert (await lookup.get("motor-7")).source is Source.POSTGRESQL
        taken = time.monotonic() - began
    finally:
        running.server.process.send_signal(signal.SIGCONT)
    assert (taken < 0.4) is defended, f"{taken:.3f} s for five lookups with a limit of 0.1 s"
    await lookup.close()


async def test_after_a_pause_one_lookup_tries_and_the_others_do_not_wait(running: World) -> None:
    await running.kept()
    lookup = DeviceLookup(running.db, running.server.url, timeout_seconds=0.3)
    running.server.process.send_signal(signal.SIGSTOP)
    try:
        await lookup.get("motor-7")
        await asyncio.sleep(PAUSE_SECONDS + 0.1)
        took = await asyncio.gather(*(timed(lookup.get("motor-7")) for _ in range(20)))
    finally:
        running.server.process.send_signal(signal.SIGCONT)
    assert sum(seconds >= 0.3 for seconds in took) == 1
    await asyncio.sleep(PAUSE_SECONDS + 0.1)
    await until(lambda: from_redis(lookup))
    await lookup.close()


async def from_redis(lookup: DeviceLookup) -> bool:
    return (await lookup.get("motor-7")).source is Source.REDIS


async def timed(work: Awaitable[Any]) -> float:
    began = time.monotonic()
    await work
    return time.monotonic() - began


async def test_while_redis_is_away_changes_wait_and_are_forgotten_when_it_is_back(running: World) -> None:
    await running.kept()
    running.server.process.send_signal(signal.SIGSTOP)
    await running.move("paris")
    await asyncio.sleep(GONE)
    assert await running.queue() == 1
    assert await running.site() == ("paris", Source.POSTGRESQL)
    running.server.process.send_signal(signal.SIGCONT)
    await running.delivered()
    for _ in range(20):
        assert (await running.site())[0] == "paris"
        await asyncio.sleep(0.1)
    assert await running.site() == ("paris", Source.REDIS)


async def test_a_redis_that_is_killed_and_comes_back_empty_is_used_again(running: World) -> None:
    await running.kept()
    running.server.kill()
    await running.move("paris")
    assert await running.site() == ("paris", Source.POSTGRESQL)
    running.server.start()
    await running.kept()
    assert await running.site() == ("paris", Source.REDIS)


# --- the relay is away ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defended", [True, False])
async def test_when_no_invalidation_can_arrive_the_cache_is_believed_for_two_seconds_more(
    world: World, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    if not defended:
        monkeypatch.setattr(device_cache, "FRESH_MS", 60_000)
    await world.add()
    task = asyncio.create_task(CacheRelay(world.db.url, world.server.url).run(asyncio.Event()))
    await world.vouched()
    await world.kept()
    task.cancel()  # as a kill: nothing is said to anybody
    await asyncio.gather(task, return_exceptions=True)
    await world.move("paris")
    assert await world.site() == ("berlin", Source.REDIS), "it is not two seconds yet"
    await asyncio.sleep(GONE)
    assert await world.site() == (("paris", Source.POSTGRESQL) if defended else ("berlin", Source.REDIS))
    assert await world.queue() == 1
    async with world.relay():
        await world.delivered()
        await world.kept()
        assert (await world.site())[0] == "paris"


async def test_a_relay_that_ends_in_good_order_leaves_nothing_behind(world: World) -> None:
    await world.add()
    async with world.relay():
        await world.kept()
    await world.move("paris")
    assert await world.site() == ("paris", Source.POSTGRESQL)
    assert "nobody vouches" in (await world.lookup.get("motor-7")).why
    assert await world.queue() == 0, "without a relay nobody would ever remove the row"


async def test_a_vouch_that_was_held_up_vouches_for_nothing(world: World) -> None:
    writer = device_cache.CacheWriter(device_cache.open_redis(world.server.url, 1))
    await writer.begin()
    await writer.vouch(await writer.clock_ms() - FRESH_MS - 1)
    assert await world.redis.get(FRESH) is None
    await writer.vouch(await writer.clock_ms())
    assert await world.redis.get(FRESH) is not None
    await writer.close()


@pytest.mark.parametrize("defended", [True, False])
async def test_a_relay_vouches_for_nothing_before_older_transactions_have_ended(
    world: World, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """The change was written before the relay registered, so the trigger recorded nothing, and is committed after."""
    if not defended:

        async def at_once(self: CacheQueue) -> bool:
            return True

        monkeypatch.setattr(CacheQueue, "older_writers_are_gone", at_once)
    await world.add()
    async with await psycopg.AsyncConnection.connect(world.db.url) as writer:
        await writer.execute("UPDATE devices SET site_id = 'paris' WHERE device_id = 'motor-7'")
        async with world.relay():
            if defended:
                await asyncio.sleep(1)
                assert not await world._is_fresh()
            else:
                await world.vouched()
                await world.kept()
            await writer.commit()
            await world.vouched()
            await asyncio.sleep(PAUSE_SECONDS)
            assert (await world.site())[0] == ("paris" if defended else "berlin")


@pytest.mark.parametrize("defended", [True, False])
async def test_a_registration_that_has_lapsed_begins_anew(
    running: World, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """Five minutes without a word, in which the trigger recorded nothing."""
    await running.kept()
    if defended:
        monkeypatch.setattr(relay_module, "RENEW_SECONDS", 0.0)
    async with running.db.pool.connection() as connection:
        await connection.execute("UPDATE lookup_caches SET seen_at = now() - interval '6 minutes'")
        await connection.execute("UPDATE devices SET site_id = 'paris' WHERE device_id = 'motor-7'")
        recorded = await connection.execute("SELECT count(*) FROM cache_invalidations")
        assert await recorded.fetchone() == (0,)
    await asyncio.sleep(PAUSE_SECONDS + 2)
    assert (await running.site())[0] == ("paris" if defended else "berlin")


async def test_one_relay_works_and_another_takes_over(running: World) -> None:
    await running.kept()
    before = await running.redis.get(STATE)
    assert before is not None
    async with running.relay():
        await asyncio.sleep(1)
        assert (await running.redis.get(STATE) or b"")[:16] == before[:16], "two relays at once"
        async with running.db.pool.connection() as connection:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = 7311466 AND granted"
            )
        await running.move("paris")

        async def taken_over() -> bool:
            state = await running.redis.get(STATE)
            return state is not None and state[:16] != before[:16]

        await until(taken_over)
        await running.vouched()
        await running.kept()
        assert (await running.site())[0] == "paris"


async def test_a_thousand_devices_that_change_at_once_are_all_forgotten(running: World) -> None:
    lines = [
        b'{"device_id": "p%d", "device_type": "pump", "serial_number": "P%d", "site_id": "a"}' % (i, i)
        for i in range(1_200)
    ]
    await running.registry.import_devices(lines, "x", Format.JSON_LINES)
    for i in range(0, 1_200, 100):
        await running.kept(f"p{i}")
    await running.registry.update_many(DeviceFilter(type="pump"), DeviceChanges(site_id="b"))
    await running.delivered()
    assert {await running.site(f"p{i}") for i in range(0, 1_200, 100)} == {("b", Source.POSTGRESQL)}
