"""A gateway that dies between commit and acknowledgement: the broker delivers again, and nothing is recorded twice."""

import asyncio
import time
from typing import Any

import orjson
import pytest

import store.devicetraffic
from gateway.documents import Documents
from gateway.service import Gateway
from models.protocol import REQUEST_FILTERS, heartbeat_topic
from models.settings import Settings
from store.engine import Database
from tests.conftest import Broker
from tests.integration.rollout_setup import Fleet, prepare
from tests.integration.test_gateway_jobs import open_door
from tests.integration.test_heartbeats_kept import rows
from transport.connection import Connection


class Killed(BaseException):
    """The process is gone: nothing after the commit is done."""


async def die_after_commit(
    db: Database, broker: Broker, fleet: Fleet, client_id: str, messages: list[tuple[str, bytes]]
) -> None:
    """A gateway that commits these messages' batches and is gone before it acknowledges the last."""
    settings = Settings(mqtt_url=f"mqtt://{broker.host}:{broker.port}", database_url=db.url)
    connection, stop = Connection(client_id, keep_session=True), asyncio.Event()
    gateway = Gateway(db, connection, Documents("http://127.0.0.1:1/", fleet.order_key, 3600), settings)
    commit = gateway._transact
    used = 0

    async def transact(batch: Any) -> Any:
        nonlocal used
        await commit(batch)
        used += len(batch)
        raise Killed

    gateway._transact = transact  # type: ignore[method-assign]
    await connection.open(settings, REQUEST_FILTERS, gateway.receive)
    speaker = Connection(f"speaker-{time.monotonic_ns()}")
    await speaker.open(settings)
    for topic, payload in messages:
        speaker.publish_durably(topic, payload)
    try:
        async with asyncio.timeout(20):
            while len(gateway.waiting) < len(messages):
                await asyncio.sleep(0.01)
            with pytest.raises(Killed):
                await gateway.run(stop)
        assert used == len(messages)
    finally:
        await speaker.close()
        await connection.close()


async def killed_and_started(db: Database, broker: Broker) -> tuple[list[Any], list[Any]]:
    """Heartbeats of two boots are committed by a gateway that dies; the next gets them again, and a new one."""
    fleet = await prepare(db, 2)
    name = f"dying-{time.monotonic_ns()}"

    def beat(boot: str, at: float, uptime: int) -> tuple[str, bytes]:
        body = {"timestamp": at * 1000, "bootId": boot, "uptime": uptime, "cpuTemperature": 40.0}
        return heartbeat_topic("motor-1"), orjson.dumps(body)

    said = [beat("aa", 1000.0, 50), beat("aa", 1010.0, 60), beat("bb", 1020.0, 1)]
    await die_after_commit(db, broker, fleet, name, said)
    before = await rows(db, "SELECT last_heartbeat, boot_id, uptime FROM presence")
    assert before[0][1:] == ("bb", 1)
    async with open_door(db, broker, fleet, name) as door:
        topic, payload = beat("bb", 1030.0, 11)
        await door.client.publish(topic, payload, qos=1)
        await door.ask("motor-1", "get")
        presence = await rows(db, "SELECT boot_id, uptime, boot_returns FROM presence")
    return await rows(db, "SELECT boot_id, uptime FROM heartbeats ORDER BY device_time, at"), presence


async def test_what_was_committed_before_the_gateway_died_is_recorded_once(db: Database, broker: Broker) -> None:
    history, presence = await killed_and_started(db, broker)
    assert history == [("aa", 50), ("aa", 60), ("bb", 1), ("bb", 11)]
    assert presence == [("bb", 11, 0)]


async def test_without_the_look_into_the_history_it_is_recorded_twice(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    statement = store.devicetraffic._RECORD_DOUBTFUL
    monkeypatch.setattr(store.devicetraffic, "_RECORD_DOUBTFUL", statement.replace("NOT EXISTS", "true OR EXISTS"))
    history, presence = await killed_and_started(db, broker)
    assert len(history) == 7 and presence[0][:2] == ("bb", 11)
