"""One device that says a thousand things a second, and five hundred that want an answer each second.

There is no limit for a device in the gateway: a flood of this size is a fraction of what a batch takes, and the broker
hands messages on in their order. What is measured here is that this is enough, for each kind of flood.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import pytest

from agent.wire import WireSession
from firmware.keys import save_private_key
from models.protocol import heartbeat_topic, jobs_topic
from store.engine import Database
from tests.conftest import Broker
from tests.integration.rollout_setup import Fleet, prepare
from tests.integration.test_gateway_jobs import JOB

DEVICES, CONNECTIONS = 500, 10
FLOOD_PER_SECOND = 1_000
PHASE_SECONDS = 3.0
UNANSWERED_SECONDS = 3.0
SLOWER = 2.0
ROUNDS = 4
"""The machine may be busy with other things: in one of so many rounds it has to hold."""
FLOODER = f"motor-{DEVICES + 1}"


@asynccontextmanager
async def gateway(db: Database, broker: Broker, fleet: Fleet, folder: Path) -> AsyncIterator[None]:
    """The real process."""
    save_private_key(folder / "order.pem", fleet.order_key)
    environment = os.environ | {
        "TIDEGATE_DATABASE_URL": db.url,
        "TIDEGATE_MQTT_URL": f"mqtt://{broker.host}:{broker.port}",
        "TIDEGATE_ARTIFACT_URL": "http://127.0.0.1:1/",
        "TIDEGATE_ORDER_KEY": str(folder / "order.pem"),
        "TIDEGATE_STATE_DIR": str(folder),
        "TIDEGATE_LOG_LEVEL": "ERROR",
    }
    process = await asyncio.to_thread(subprocess.Popen, [sys.executable, "-m", "gateway"], env=environment)
    try:
        yield
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 60)


@dataclass
class Devices:
    """Five hundred devices on a few connections, which ask and say that they live, one after the other, and note how long
    an answer takes."""

    broker: Broker
    names: list[str]
    sessions: list[WireSession] = field(default_factory=list)
    asked: dict[str, float] = field(default_factory=dict)
    taken: list[float] = field(default_factory=list)
    answers: int = 0

    async def connect(self) -> None:
        for number in range(CONNECTIONS):
            filters = [jobs_topic(name, "get", "accepted") for name in self.names[number::CONNECTIONS]]
            self.sessions.append(await connected(self.broker, f"normal-{number}", filters, self._answered))

    def _answered(self, topic: str, _payload: memoryview) -> None:
        sent = self.asked.pop(topic.split("/")[2], None)
        if sent is not None:
            self.taken.append(time.perf_counter() - sent)
            self.answers += 1

    async def ask_until(self, until: Callable[[], bool]) -> None:
        """Each device once a second, evenly."""
        began, turn = time.perf_counter(), 0
        while not until():
            while turn < (time.perf_counter() - began) * DEVICES:
                number = turn % DEVICES
                name = self.names[number]
                if name not in self.asked or time.perf_counter() - self.asked[name] > UNANSWERED_SECONDS:
                    if name in self.asked:
                        self.taken.append(UNANSWERED_SECONDS)
                    self.asked[name] = time.perf_counter()
                    self.sessions[number % CONNECTIONS].publish(jobs_topic(name, "get"), b"{}")
                    self.sessions[number % CONNECTIONS].publish(heartbeat_topic(name), b'{"uptime":7}')
                turn += 1
            await asyncio.sleep(0.002)

    async def p99(self) -> float:
        """Of one phase."""
        self.taken.clear()
        self.asked.clear()
        end = time.perf_counter() + PHASE_SECONDS
        await self.ask_until(lambda: time.perf_counter() > end)
        return statistics.quantiles(self.taken, n=100)[98]


@asynccontextmanager
async def normal_devices(broker: Broker) -> AsyncIterator[Devices]:
    """Connected, and answered: the gateway is there."""
    devices = Devices(broker, [f"motor-{number}" for number in range(1, DEVICES + 1)])
    await devices.connect()
    async with asyncio.timeout(60):
        await devices.ask_until(lambda: devices.answers > DEVICES)
    yield devices
    for session in devices.sessions:
        session.close()
    await asyncio.sleep(0.1)


@asynccontextmanager
async def flooder(broker: Broker) -> AsyncIterator[WireSession]:
    session = await connected(broker, "flooder", [], lambda _topic, _payload: None)
    yield session
    session.close()


async def connected(
    broker: Broker, client_id: str, filters: list[str], received: Callable[[str, memoryview], None]
) -> WireSession:
    loop = asyncio.get_running_loop()
    session = WireSession(client_id, filters or ["nothing"], received, lambda: None)
    await loop.create_connection(lambda: session, broker.host, broker.port)
    await session.ready
    return session


async def flood(session: WireSession, topic: str, payload: bytes) -> None:
    began, sent = time.perf_counter(), 0
    while True:
        while sent < (time.perf_counter() - began) * FLOOD_PER_SECOND:
            session.publish(topic, payload)
            sent += 1
        await asyncio.sleep(0.002)


KINDS = {
    "heartbeats": (heartbeat_topic(FLOODER), orjson.dumps({"uptime": 1})),
    "questions": (jobs_topic(FLOODER, "get"), b"{}"),
    "refused": (jobs_topic(FLOODER, JOB, "update"), orjson.dumps({"status": "SUCCEEDED"})),
    "garbage": (jobs_topic(FLOODER, JOB, "update"), b"{" * 200),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_five_hundred_devices_hardly_notice_one_that_floods(
    db: Database, broker: Broker, tmp_path: Path, kind: str
) -> None:
    fleet = await prepare(db, DEVICES + 1)
    found = []
    async with gateway(db, broker, fleet, tmp_path), normal_devices(broker) as devices, flooder(broker) as session:
        for _ in range(ROUNDS):
            alone = await devices.p99()
            flooding = asyncio.create_task(flood(session, *KINDS[kind]))
            await asyncio.sleep(0.5)
            beside = await devices.p99()
            flooding.cancel()
            found.append((round(alone, 4), round(beside, 4)))
            if beside <= SLOWER * alone:
                return
    pytest.fail(f"seconds at p99, alone and beside the flood: {found}")
