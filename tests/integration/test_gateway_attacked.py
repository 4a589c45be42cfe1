"""Ways to make the gateway forget, grow or fall, found by attacking it: each is tried on the real thing."""

import asyncio
import time
from typing import Any

import aiomqtt
import orjson
import psycopg
import pytest

import gateway.service
import store.shadows
from domain.shadow import RECENT_UPDATES
from gateway.documents import Documents
from gateway.pulse import Pulse, note_pulses
from gateway.service import Gateway
from models.protocol import heartbeat_topic, shadow_topic
from models.settings import Settings
from store.engine import Database
from store.ingest import read_coverage
from tests.conftest import Broker
from tests.integration.rollout_setup import prepare
from tests.integration.shadow_setup import ask, rows, shadow_door
from tests.integration.test_gateway_jobs import Door, open_door
from tests.integration.test_gateway_shadow import deliver
from transport.connection import Connection

# --- shadows: what the broker delivers again ---------------------------------------------------------------------------

Said = tuple[str, dict[str, Any]]


def update(value: int, token: str | None = None) -> Said:
    """An update, which says which one it is if it has a token."""
    return "update", {"state": {"reported": {"a": value}}, **({"clientToken": token} if token else {})}


AGAIN: dict[str, list[Said]] = {
    "deleted in between": [update(1, "one"), ("delete", {}), update(2, "two")],
    "the first has no token": [update(1), update(2, "two")],
    "the first are not known any more": [update(n, f"t{n}") for n in range(RECENT_UPDATES + 3)],
    "deleted at the end": [update(1, "one"), update(2), ("delete", {})],
}


async def told_twice(door: Door, said: list[Said]) -> tuple[Any, Any]:
    """The shadow after all of it has come, and after all of it has come again, as to a gateway that could not acknowledge."""
    found = []
    for duplicate in (False, True):
        for verb, body in said:
            await deliver(door, shadow_topic("motor-1", "", verb), orjson.dumps(body), duplicate)
        found.append((await ask(door, "motor-1", "get")).get("state"))
    return found[0], found[1]


@pytest.mark.parametrize("said", AGAIN.values(), ids=AGAIN.keys())
async def test_what_comes_again_leaves_the_shadow_as_it_was(db: Database, broker: Broker, said: list[Said]) -> None:
    async with shadow_door(db, broker) as door:
        first, again = await told_twice(door, said)
    assert first == again


async def test_if_known_updates_were_always_skipped_the_last_word_would_be_lost(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.shadows.LoadedShadow.update

    def remembering(self: Any, *arguments: Any, again: bool = False, **options: Any) -> None:
        real(self, *arguments, **options)

    monkeypatch.setattr(store.shadows.LoadedShadow, "update", remembering)
    async with shadow_door(db, broker) as door:
        first, again = await told_twice(door, AGAIN["the first has no token"])
    assert (first["reported"], again["reported"]) == ({"a": 2}, {"a": 1})


# --- shadows: one device, any number of names ----------------------------------------------------------------------------


async def names_made(db: Database, door: Door, count: int) -> int:
    for number in range(count):
        door.gateway.receive(
            shadow_topic("motor-1", f"n{number}", "update"), b'{"state":{"desired":{"a":1}}}', False, True, (None, b"")
        )
    await ask(door, "motor-2", "get")
    [(made,)] = await rows(db, "SELECT count(*) FROM shadows WHERE device_id = 'motor-1'")
    return int(made)


async def test_a_device_cannot_make_shadows_without_end(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.shadows, "MAX_SHADOWS", 5)
    async with shadow_door(db, broker) as door:
        assert await names_made(db, door, 12) == 5
        refused = await ask(door, "motor-1", "update", {"state": {"desired": {"a": 1}}}, name="one-more")
        assert refused["code"] == 400 and refused["message"].startswith("Too many shadows: a device may have 5")
        await ask(door, "motor-1", "delete", name="n0")
        assert (await ask(door, "motor-1", "update", {"state": {"desired": {"a": 1}}}, name="other"))["code"] == 400
        again = await ask(door, "motor-1", "update", {"state": {"desired": {"a": 1}}}, name="n0")
        assert again["version"] == 2, "its own row is there"
        monkeypatch.setattr(store.shadows, "MAX_SHADOWS", 10**9)
        assert await names_made(db, door, 12) == 12, "without the limit there is none"


# --- memory: a link that breaks while the queue is full ----------------------------------------------------------------

LIMIT = 1000


async def full_and_broken(db: Database, broker: Broker) -> bool:
    """Whether a gateway whose queue is full reads on from a new link; nobody takes batches."""
    fleet = await prepare(db, 1)
    settings = Settings(
        mqtt_url=f"mqtt://{broker.host}:{broker.port}", database_url=db.url, gateway_queue_messages=LIMIT
    )
    connection = Connection(f"full-{time.monotonic_ns()}", keep_session=True)
    served = Gateway(db, connection, Documents("http://127.0.0.1:1/", fleet.order_key, 3600), settings)
    await connection.open(settings, [heartbeat_topic("+")], served.receive)
    try:
        async with (
            asyncio.timeout(60),
            aiomqtt.Client(
                broker.host, broker.port, max_inflight_messages=1000, max_queued_outgoing_messages=0
            ) as client,
        ):

            async def say(count: int) -> None:
                await asyncio.gather(
                    *(client.publish(heartbeat_topic("motor-1"), b"{}", qos=1, timeout=50) for _ in range(count))
                )

            await say(LIMIT)
            while len(served.waiting) < LIMIT:
                await asyncio.sleep(0.01)
            connection._client._connection._transport.abort()
            while connection.reconnects == 0 or len(served.waiting) <= LIMIT:
                await asyncio.sleep(0.01)
            before = 0
            while before != len(served.waiting):  # what had been read before it was told to stop
                before = len(served.waiting)
                await asyncio.sleep(0.1)
            await say(10)
            for _ in range(20):  # turns of the loop in which a link that is read would have been
                await asyncio.sleep(0.02)
            return len(served.waiting) >= before + 10 or connection._client._connection._transport.is_reading()
    finally:
        await connection.close()


async def test_a_full_queue_stays_full_when_the_link_breaks(db: Database, broker: Broker) -> None:
    if broker.kind != "mosquitto":
        pytest.skip("nats-server delivers again after half a minute only")
    reads_on = await full_and_broken(db, broker)
    assert not reads_on


async def test_if_it_were_told_to_stop_but_once_it_would_grow_with_every_link(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broker.kind != "mosquitto":
        pytest.skip("nats-server delivers again after half a minute only")
    real, told = Connection.pause, []

    def once(self: Connection, paused: bool) -> None:
        if not told:
            real(self, paused)
        told.append(paused)

    monkeypatch.setattr(Connection, "pause", once)
    reads_on = await full_and_broken(db, broker)
    assert reads_on


# --- a message that cannot be used, and PostgreSQL away in that moment --------------------------------------------------


async def test_a_gateway_that_cannot_put_a_message_aside_tries_again(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fell, and every next one over the same message, for as long as PostgreSQL came and went."""
    tries = []

    async def away(*_: Any) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise psycopg.OperationalError("the server closed the connection unexpectedly")
        await save(*_)

    async def broken(*_: Any) -> None:
        raise RuntimeError("a defect that this message meets")

    save = gateway.service.save_quarantined
    monkeypatch.setattr(gateway.service, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(gateway.service, "save_quarantined", away)
    monkeypatch.setattr(gateway.service, "take_diagnostics", broken)
    fleet = await prepare(db, 1)
    async with open_door(db, broker, fleet) as door:
        body = {"requestId": "a" * 32, "pong": True}
        await door.client.publish("devices/motor-1/diagnostics/response", orjson.dumps(body), qos=1)
        assert (await door.ask("motor-1", "get"))[0]
    assert len(tries) == 3 and await rows(db, "SELECT code FROM quarantine") == [("InternalError",)]


@pytest.mark.parametrize("defended", [True, False])
async def test_a_postgresql_that_cannot_write_yet_costs_no_message(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """A standby that takes over is read-only for a moment; then nothing is wrong with the message."""
    real, tries = gateway.service.share_access, []

    async def standby(connection: psycopg.AsyncConnection) -> None:
        tries.append(1)
        await connection.execute(b"SET TRANSACTION READ ONLY" if len(tries) == 1 else b"SELECT 1")
        await real(connection)

    monkeypatch.setattr(gateway.service, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(gateway.service, "share_access", standby)
    if not defended:
        away = tuple(e for e in gateway.service._AWAY if e is not psycopg.errors.ReadOnlySqlTransaction)
        monkeypatch.setattr(gateway.service, "_AWAY", away)
    async with shadow_door(db, broker) as door:
        answer = await ask(door, "motor-1", "update", {"state": {"reported": {"a": 1}}})
    assert answer.get("code") == (None if defended else 500)
    assert len(await rows(db, "SELECT FROM quarantine")) == (0 if defended else 1)


# --- pulses that somebody has listened to -------------------------------------------------------------------------------


async def note(db: Database, sent: list[float], noted: float) -> float:
    async with db.pool.connection() as connection:
        return await note_pulses(connection, [Pulse("me", at) for at in sent], "me", time.time(), noted)


async def test_a_pulse_that_is_said_again_later_does_not_begin_everybodys_limit_anew(db: Database) -> None:
    """On a listener without an ACL anybody hears pulses; one that was kept for a minute would hide every silence."""
    now = time.monotonic()
    noted = await note(db, [now], float("-inf"))
    assert noted == now
    async with db.pool.connection() as connection:
        before = await read_coverage(connection)
    assert await note(db, [now - 60, now, now + 3600, 1e300], noted) == noted
    async with db.pool.connection() as connection:
        assert await read_coverage(connection) == before
    await note(db, [now - 60], float("-inf"))
    async with db.pool.connection() as connection:
        after = await read_coverage(connection)
    assert before and after and after.since > before.since, "without the order of pulses it would"
