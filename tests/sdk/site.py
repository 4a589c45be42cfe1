"""The place where SDKs are judged by: Mosquitto as the stack runs it (TLS, certificates, ACL), PostgreSQL, and the gateway.

The gateway is a process, so that it can be killed. Devices have real certificates of a device CA.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiomqtt
import psycopg

from access.mosquitto import GATEWAY, WORKER
from activities.notices import OfferedJob, offer_notices
from models.protocol import Verb, jobs_topic
from store.engine import Database
from tests.conftest import TABLES
from tests.gateway_process import READY_SECONDS, GatewayProcess
from tests.integration.access_setup import Credentials, Stage, stage
from tests.integration.rollout_setup import Fleet, prepare
from tests.sdk.judge import Judge

JOB = "motor-1_3_0"


@dataclass
class Site:
    """All of it, with a rollout that waits for every device."""

    stage: Stage
    fleet: Fleet
    gateway: GatewayProcess
    free: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        """Where devices connect."""
        return self.stage.listeners.devices

    async def device(self) -> Credentials:
        """A device that no test has had yet."""
        return await self.stage.device(self.free.pop())

    async def offer(self, thing: str) -> None:
        """Hint at the rollout, as the worker does."""
        worker = self.stage.client(self.stage.credentials(WORKER), engine=True, client_id="engine@worker-test")
        async with worker as client:
            for topic, payload in offer_notices([thing], OfferedJob(JOB, 1_790_000_000), 1_790_000_000):
                await client.publish(topic, payload)

    async def answers(self) -> None:
        """Until the gateway answers: after its broker was away it subscribes anew, and what came before is lost."""
        who = await self.device()
        async with asyncio.timeout(READY_SECONDS), self.stage.client(who) as client:
            await client.subscribe(jobs_topic(who.name, "get/accepted"))
            asking = asyncio.create_task(self._ask_often(client, who.name))
            try:
                await anext(client.messages)
            finally:
                asking.cancel()

    @staticmethod
    async def _ask_often(client: aiomqtt.Client, thing: str) -> None:
        while True:
            await client.publish(jobs_topic(thing, "get"), b"{}", qos=1)
            await asyncio.sleep(0.2)


@asynccontextmanager
async def site(database_url: str, folder: Path, devices: int) -> AsyncIterator[Site]:
    """A running one with an empty registry but for `devices` devices and their rollout."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"TRUNCATE {TABLES} RESTART IDENTITY".encode())
        connection.execute("UPDATE access_state SET revision = 0")
    db = Database(database_url, max_size=5)
    await db.open()
    try:
        async with stage(db) as made:
            fleet = await prepare(db, devices)
            gateway = GatewayProcess(folder, made.settings(GATEWAY), fleet.order_key)
            running = Site(made, fleet, gateway, [f"motor-{i}" for i in range(devices, 0, -1)])
            gateway.start()
            try:
                await gateway.ready()
                yield running
            finally:
                gateway.kill()
    finally:
        await db.close()


@asynccontextmanager
async def judging(place: Site, kind: type[Judge], *shadows: str) -> AsyncIterator[Judge]:
    """A connected judge; no thread of its SDK outlives it."""
    before = set(threading.enumerate())
    judge = kind("localhost", place.port, await place.device())
    await asyncio.to_thread(judge.open, shadows)
    try:
        yield judge
    finally:
        await asyncio.to_thread(judge.close)
    left = [thread for thread in set(threading.enumerate()) - before if "asyncio" not in thread.name]
    for thread in left:
        if not isinstance(thread, threading._DummyThread):  # type: ignore[attr-defined]
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive(), f"{thread} of the SDK runs on"


async def outlive_outages(place: Site, judge: Judge) -> None:
    """The gateway is killed and the broker is, and the SDK is answered after either."""
    assert (await asyncio.to_thread(judge.ask, Verb.GET_PENDING)).accepted
    place.gateway.kill()
    asked = asyncio.create_task(asyncio.to_thread(judge.ask, Verb.START_NEXT))
    await asyncio.sleep(0.2)
    place.gateway.start()
    answer = await asked
    assert answer.body["execution"]["status"] == "IN_PROGRESS", "the broker kept the request for the gateway"
    await place.gateway.ready()
    place.stage.stop_broker()
    place.stage.start_broker()
    await place.answers()
    again = await asyncio.to_thread(judge.ask_patiently, Verb.START_NEXT)
    assert again.body["execution"]["versionNumber"] == 2, "it is the same execution"
