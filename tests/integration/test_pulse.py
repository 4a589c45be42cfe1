"""The pulse on a real broker: outages of gateway, broker and PostgreSQL declare nobody offline; afterwards silence counts.

Outages last 20 minutes by moving what the database has into the past; gateway, broker and connections really end.
"""

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path

import aiomqtt
import pytest
from aiomqtt import ProtocolVersion
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import domain.presence
import gateway.pulse
from access.mosquitto import GATEWAY
from domain.presence import Coverage
from gateway.documents import Documents
from gateway.pulse import send_pulses
from gateway.service import Gateway
from models.protocol import PULSE_TOPIC, REQUEST_FILTERS, heartbeat_topic
from models.settings import Settings
from store.engine import Database
from tests.conftest import Broker, free_port, mosquitto_binary, wait_for_port
from tests.integration.access_setup import VERSIONS, ear, stage, without_acl
from tests.integration.rollout_setup import Fleet, prepare
from tests.integration.test_access_attacks import say
from tests.integration.test_heartbeats_kept import rows
from tests.integration.test_offline import offline, standing, sweep
from transport.connection import Connection

needs_mosquitto = pytest.mark.skipif(mosquitto_binary() is None, reason="Mosquitto is not installed")


@asynccontextmanager
async def pulsing(
    db: Database, port: int, fleet: Fleet, client_id: str, *, pulses: bool = True
) -> AsyncIterator[Gateway]:
    """A gateway that sends its pulse ten times a second."""
    settings, stop = Settings(mqtt_url=f"mqtt://127.0.0.1:{port}", database_url=db.url), asyncio.Event()
    connection = Connection(client_id, keep_session=True)
    served = Gateway(db, connection, Documents("http://127.0.0.1:1/", fleet.order_key, 3600), settings)
    await connection.open(settings, REQUEST_FILTERS, served.receive)
    running = [asyncio.create_task(served.run(stop))]
    if pulses:
        running.append(asyncio.create_task(send_pulses(connection, served.name, stop, 0.1)))
    try:
        yield served
    finally:
        stop.set()
        await asyncio.gather(*running)
        await connection.close()


async def beat(port: int, *things: str) -> None:
    async with aiomqtt.Client("127.0.0.1", port) as client:
        for thing in things:
            await client.publish(heartbeat_topic(thing), b"{}", qos=1)


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for it; 30 s, for a machine that has much else to do."""
    async with asyncio.timeout(30):
        while not await condition():  # type: ignore[misc]
            await asyncio.sleep(0.05)
    assert what


async def pulsed(db: Database) -> None:
    """A pulse that is sent after this call has been handled."""
    [(before,)] = await rows(db, "SELECT now()")

    async def handled() -> bool:
        return bool(await rows(db, "SELECT FROM ingest_state WHERE pulsed_at > %s", before))

    await until(handled, "a pulse")


async def heard(db: Database, *things: str) -> None:
    """These have been heard just now."""

    async def all_there() -> bool:
        found = await rows(db, "SELECT device_id FROM presence WHERE last_heartbeat > now() - interval '5 minutes'")
        return {row[0] for row in found} >= set(things)

    await until(all_there, "heartbeats")


async def pass_by(db: Database, minutes: int) -> None:
    """So much time passes in which nothing comes."""
    passed = timedelta(minutes=minutes)
    await rows(db, "UPDATE presence SET last_heartbeat = last_heartbeat - %s RETURNING 1", passed)
    await rows(db, "UPDATE ingest_state SET pulsed_at = pulsed_at - %s, covered_since = covered_since - %s RETURNING 1",
               passed, passed)  # fmt: skip


async def pass_by_with_pulses(db: Database, minutes: int) -> None:
    """So much time passes in which pulses come."""
    passed = timedelta(minutes=minutes)
    await rows(db, "UPDATE presence SET last_heartbeat = last_heartbeat - %s RETURNING 1", passed)
    await rows(db, "UPDATE ingest_state SET covered_since = covered_since - %s RETURNING 1", passed)


async def through_a_gateway_outage(db: Database, broker: Broker) -> list[str]:
    """A gateway dies for 20 minutes; motor-1 speaks meanwhile, motor-2 comes back later. Who was declared offline?"""
    fleet = await prepare(db, 2)
    name = f"pulsing-{free_port()}"
    async with pulsing(db, broker.port, fleet, name):
        await beat(broker.port, "motor-1", "motor-2")
        await heard(db, "motor-1", "motor-2")
        await pulsed(db)
    await beat(broker.port, "motor-1")  # waits at the broker: a backlog that is delivered late
    await pass_by(db, 20)
    found = []
    await sweep(db)
    found += await offline(db)
    async with pulsing(db, broker.port, fleet, name):
        await heard(db, "motor-1")
        await pulsed(db)
        await sweep(db)
        found += await offline(db)
        if not found:
            assert await standing(db) == []
            await pass_by_with_pulses(db, 11)
            await beat(broker.port, "motor-1")
            await heard(db, "motor-1")
            await pulsed(db)
            await sweep(db)
            assert await offline(db) == ["motor-2"], "silence counts again, and only of who is silent"
    return found


def careless(before: Coverage | None, now: datetime, under_way: timedelta) -> Coverage:
    """The mutant of the rule: a pulse is a pulse."""
    return Coverage(before.since if before else now, now)


async def test_a_gateway_that_was_away_declares_nobody_offline(db: Database, broker: Broker) -> None:
    assert await through_a_gateway_outage(db, broker) == []


async def test_without_the_rule_of_gaps_it_declares_devices_offline_that_had_no_time_to_come_back(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.pulse, "next_coverage", careless)
    assert await through_a_gateway_outage(db, broker) == ["motor-2"]


@contextlib.contextmanager
def mosquitto(folder: Path, port: int) -> Iterator[None]:
    """A broker that can be ended."""

    config = folder / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nlog_dest none\npersistence false\n")
    process = subprocess.Popen([str(mosquitto_binary()), "-c", str(config)])
    try:
        wait_for_port(port, process)
        yield
    finally:
        process.terminate()
        process.wait(10)


@needs_mosquitto
async def test_a_broker_that_was_away_declares_nobody_offline(db: Database, tmp_path: Path) -> None:
    fleet, port = await prepare(db, 2), free_port()
    with contextlib.ExitStack() as first:
        first.enter_context(mosquitto(tmp_path, port))
        async with pulsing(db, port, fleet, "pulsing"):
            await beat(port, "motor-1", "motor-2")
            await heard(db, "motor-1", "motor-2")
            await pulsed(db)
            await asyncio.to_thread(first.close)

            async def deaf() -> bool:
                await pass_by(db, 20)  # again where the last batch had not been committed yet
                return not (await sweep(db)).listening

            await until(deaf, "silence")
            assert await standing(db) == [("ingest-silent", "gateway")]
            with mosquitto(tmp_path, port):
                await pulsed(db)
                swept = await sweep(db)
                assert swept.listening and await offline(db) == [] and await standing(db) == []


class Wire:
    """A way to PostgreSQL that can be cut."""

    def __init__(self, url: str) -> None:
        self.address = url
        self.cut = False
        self._open: set[asyncio.StreamWriter] = set()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.cut:
            writer.close()
            return
        info = conninfo_to_dict(self.address)
        host = str(info["host"])
        if host.startswith("/"):
            far = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{info.get('port', 5432)}")
        else:
            far = await asyncio.open_connection(host, int(str(info.get("port", 5432))))
        self._open |= {writer, far[1]}
        await asyncio.gather(self._pump(reader, far[1]), self._pump(far[0], writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    def break_off(self) -> None:
        self.cut = True
        for writer in self._open:
            writer.transport.abort()


async def through_a_database_outage(db: Database, broker: Broker) -> list[str]:
    """PostgreSQL is away from the gateway for longer than the largest gap; heartbeats and pulses wait. Who is offline?"""
    fleet = await prepare(db, 2)
    wire = Wire(db.url)
    server = await asyncio.start_server(wire._carry, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    through = Database(make_conninfo(db.url, host="127.0.0.1", port=port, sslmode="disable"), max_size=4)
    await through.open()
    try:
        async with pulsing(through, broker.port, fleet, f"pulsing-{free_port()}"):
            await beat(broker.port, "motor-1", "motor-2")
            await heard(db, "motor-1", "motor-2")
            await pulsed(db)
            wire.break_off()
            await beat(broker.port, "motor-1")
            await rows(db, "UPDATE presence SET last_heartbeat = last_heartbeat - interval '20 minutes' RETURNING 1")
            await rows(
                db,
                "UPDATE ingest_state SET covered_since = covered_since - interval '1 day' RETURNING 1",
            )
            await asyncio.sleep(2.5)
            wire.cut = False
            await heard(db, "motor-1")
            await pulsed(db)
            await sweep(db)
            return await offline(db)
    finally:
        await through.close()
        server.close()


async def test_a_postgresql_that_was_away_declares_nobody_offline(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second is the largest gap here, because the outage really lasts."""
    monkeypatch.setattr(domain.presence, "MAX_GAP", timedelta(seconds=1))
    assert await through_a_database_outage(db, broker) == []


async def test_without_the_rule_of_gaps_it_declares_devices_offline_that_it_has_not_heard_yet(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.pulse, "next_coverage", careless)
    assert await through_a_database_outage(db, broker) == ["motor-2"]


async def test_a_pulse_of_another_gateway_says_nothing(db: Database, broker: Broker) -> None:
    fleet = await prepare(db, 1)
    async with pulsing(db, broker.port, fleet, f"pulsing-{free_port()}", pulses=False):
        async with aiomqtt.Client("127.0.0.1", broker.port) as client:
            await client.publish(PULSE_TOPIC, b'{"gateway":"another","sent":1e9}', qos=1)
            await client.publish(PULSE_TOPIC, b'{"gateway":1}', qos=1)
            await client.publish(heartbeat_topic("motor-1"), b"{}", qos=1)
        await heard(db, "motor-1")
    assert await rows(db, "SELECT FROM ingest_state") == []
    assert await rows(db, "SELECT topic, thing FROM quarantine") == [(PULSE_TOPIC, None)]


@needs_mosquitto
@pytest.mark.parametrize("version", VERSIONS)
async def test_no_device_can_send_the_pulse_nor_hear_it(db: Database, version: ProtocolVersion) -> None:
    async with stage(db) as ground:
        attacker = await ground.device("attacker")
        service = ground.credentials(GATEWAY)
        async with (
            ear(ground.client(service, engine=True, client_id="engine@ear"), ["devices/#"]) as engine,
            ear(ground.client(await ground.device("listener")), ["devices/#"]) as listener,
        ):
            await say(ground, attacker, version, (PULSE_TOPIC, "forged"), ("devices/attacker/heartbeat", "last"))
            assert await engine.hears("last") and "forged" not in engine.texts
            async with ground.client(service, engine=True, client_id="engine@test") as client:
                await client.publish(PULSE_TOPIC, "real", qos=1)
                await client.publish("devices/listener/commands/request", "for you", qos=1)
            assert await engine.hears("real")
            assert await listener.hears("for you") and "real" not in listener.texts


@needs_mosquitto
async def test_without_the_acl_a_device_sends_the_pulse(db: Database) -> None:
    async with stage(db, without_acl) as ground:
        attacker = await ground.device("attacker")
        service = ground.credentials(GATEWAY)
        async with ear(ground.client(service, engine=True, client_id="engine@ear"), [PULSE_TOPIC]) as engine:
            await say(ground, attacker, ProtocolVersion.V311, (PULSE_TOPIC, "forged"))
            assert await engine.hears("forged")
