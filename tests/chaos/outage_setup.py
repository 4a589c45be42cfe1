"""A PostgreSQL, a Mosquitto with persistence and a gateway of one's own, each of which can go and come back; and devices.

The gateway is started again whenever it has ended, as the stack does it. Devices work as firmware does: they remember what
was acknowledged to them, and where an answer stays out they ask how things stand and go on from there.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiomqtt
import orjson
import psycopg

from devstack.postgres import Postgres, make_passable
from devstack.state import StateDirectory
from models.protocol import heartbeat_topic, jobs_topic, shadow_topic
from models.settings import Settings
from store.engine import Database, migrate
from store.offline import sweep_offline
from tests.conftest import free_port, mosquitto_binary, wait_for_port
from tests.gateway_process import GatewayProcess
from tests.integration.rollout_setup import NEW, prepare

JOB = "motor-1_3_0"
ANSWER_SECONDS = 4.0
PAUSE_SECONDS = 0.3
LIMIT = timedelta(seconds=45)
"""Of silence. Shorter than the default by far, and longer than the 30 s after which a missing pulse says that nobody is
heard: below that, an outage could not be told from silence."""


@dataclass
class Ground:
    """The servers."""

    folder: Path
    postgres: Postgres
    broker_port: int
    devices: int
    stopping: bool = False
    servers: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    gateway: GatewayProcess | None = None
    starts: int = 0
    offline: set[str] = field(default_factory=set)
    """Every device that was ever marked offline."""
    sweeps: int = 0

    @property
    def url(self) -> str:
        return str(self.postgres.endpoints()["database_url"])

    def _start(self, name: str, command: list[str], account: str | None = None) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            more: dict[str, Any] = {"user": account, "group": account, "extra_groups": []} if account else {}
            self.servers[name] = subprocess.Popen(command, stdout=log, stderr=log, **more)

    async def start_postgres(self) -> None:
        """Where it was, with what it had."""
        self.postgres.prepare()
        launch = self.postgres.launch()
        self._start("postgres", list(launch.command), launch.account)
        async with asyncio.timeout(60):
            while not await self.postgres.answers():
                await asyncio.sleep(0.1)

    def start_broker(self) -> None:
        """With the sessions and messages that it wrote down as it ended."""
        config = self.folder / "mosquitto.conf"
        (self.folder / "sessions").mkdir(exist_ok=True)
        config.write_text(
            f"listener {self.broker_port} 127.0.0.1\nallow_anonymous true\nmax_inflight_messages 0\n"
            f"max_queued_messages 1000000\npersistence true\npersistence_location {self.folder}/sessions/\nlog_dest none\n"
            + ("user root\n" if os.geteuid() == 0 else "")
        )
        self._start("broker", [str(mosquitto_binary()), "-c", str(config)])
        wait_for_port(self.broker_port, self.servers["broker"])

    async def end(self, name: str, number: signal.Signals) -> None:
        """Send it a signal and see it gone."""
        process = self.servers.pop(name)
        process.send_signal(number)
        await asyncio.to_thread(process.wait, 30)

    async def keep_gateway(self) -> None:
        """Start it whenever it does not run: without PostgreSQL it ends, and comes back with it."""
        assert self.gateway is not None
        while not self.stopping:
            if not self.gateway.alive:
                self.gateway.start()
                self.starts += 1
            await asyncio.sleep(0.3)

    async def keep_sweeping(self) -> None:
        """Look for silent devices once a second, as the worker's activity does each minute."""
        while not self.stopping:
            with contextlib.suppress(psycopg.OperationalError):
                async with await psycopg.AsyncConnection.connect(self.url, connect_timeout=2) as connection:
                    await sweep_offline(connection, LIMIT)
                    found = await connection.execute("SELECT device_id FROM presence WHERE offline_since IS NOT NULL")
                    self.offline |= {row[0] for row in await found.fetchall()}
                    self.sweeps += 1
            await asyncio.sleep(1)

    async def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        async with await psycopg.AsyncConnection.connect(self.url) as connection:
            return await (await connection.execute(query.encode(), values)).fetchall()


@asynccontextmanager
async def ground(folder: Path, devices: int) -> AsyncIterator[Ground]:
    """All of it, with a rollout that waits for every device."""
    make_passable(folder)
    made = Ground(folder, Postgres(StateDirectory(folder / "state")), free_port(), devices)
    tasks: list[asyncio.Task[None]] = []
    try:
        await made.start_postgres()
        await made.postgres.complete()
        migrate(made.url)  # not in a thread: Alembic keeps its context in globals, and other grounds migrate too
        db = Database(made.url)
        await db.open()
        fleet = await prepare(db, devices)
        await db.close()
        made.start_broker()
        settings = Settings(mqtt_url=f"mqtt://127.0.0.1:{made.broker_port}", database_url=made.url)
        made.gateway = GatewayProcess(folder, settings, fleet.order_key)
        tasks = [asyncio.create_task(made.keep_gateway()), asyncio.create_task(made.keep_sweeping())]
        yield made
    finally:
        made.stopping = True
        await asyncio.gather(*tasks)
        if made.gateway is not None:
            made.gateway.kill()
        for name in list(made.servers):
            await made.end(name, signal.SIGTERM if name == "broker" else signal.SIGINT)


@dataclass
class Device:
    """One device's work, and what was acknowledged to it."""

    thing: str
    port: int
    stop: asyncio.Event
    beats: list[int] = field(default_factory=list)
    """Device times, in milliseconds, of heartbeats that the broker has acknowledged."""
    changes: dict[int, int] = field(default_factory=dict)
    """By number of the change, the version that its `accepted` gave the shadow."""
    reports: int = 0
    """Accepted reports about the job."""
    execution_version: int = 1
    done: bool = False
    reconnects: int = 0
    _waiting: dict[str, "asyncio.Future[dict[str, Any]]"] = field(default_factory=dict)
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _version: int | None = None
    _last: int = 0

    async def live(self) -> None:
        """Until it is told to stop and its job is over."""
        while not self.done:
            try:
                async with aiomqtt.Client("127.0.0.1", self.port, identifier=self.thing, clean_session=False) as client:
                    self.reconnects += 1
                    await self._work(client)
            except (aiomqtt.MqttError, OSError):
                await asyncio.sleep(PAUSE_SECONDS)

    async def _work(self, client: aiomqtt.Client) -> None:
        for topic in (jobs_topic(self.thing, "#"), shadow_topic(self.thing, "", "#")):
            await client.subscribe(topic, qos=1)
        listening = asyncio.create_task(self._listen(client))
        try:
            while not self.done:
                await self.beat(client)
                await self._change(client)
                await self._report(client)
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError, aiomqtt.MqttError):
                await listening

    async def _listen(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            if (body := orjson.loads(message.payload or b"{}")) and str(message.topic).endswith("ed"):
                waiting = self._waiting.pop(str(body.get("clientToken")), None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(body)

    async def _ask(self, client: aiomqtt.Client, topic: str, **body: Any) -> dict[str, Any] | None:
        """The answer; None where it stayed out."""
        token = f"{self.thing}-{next(self._numbers)}"
        answer = self._waiting[token] = asyncio.get_running_loop().create_future()
        await client.publish(topic, orjson.dumps({**body, "clientToken": token}), qos=1, timeout=ANSWER_SECONDS)
        try:
            return await asyncio.wait_for(answer, ANSWER_SECONDS)
        except TimeoutError:
            return None

    async def beat(self, client: aiomqtt.Client) -> None:
        """A heartbeat; it counts as acknowledged once the broker has."""
        self._last = max(self._last + 1, int(time.time() * 1000))
        beat = {"deviceId": self.thing, "timestamp": self._last, "uptime": self._last // 1000}
        await client.publish(heartbeat_topic(self.thing), orjson.dumps(beat), qos=1, timeout=ANSWER_SECONDS)
        self.beats.append(self._last)

    async def _change(self, client: aiomqtt.Client) -> None:
        if self._version is None:
            got = await self._ask(client, shadow_topic(self.thing, "", "get"))
            if got is None:
                return
            self._version = 0 if got.get("code") == 404 else int(got["version"])
        number = next(self._numbers)
        expected = {"version": self._version} if self._version else {}
        answer = await self._ask(
            client, shadow_topic(self.thing, "", "update"), state={"reported": {"n": number}}, **expected
        )
        if answer is None or "code" in answer:
            self._version = None
            return
        assert answer["version"] == self._version + 1, f"{answer} after version {self._version}"
        self._version = self.changes[number] = int(answer["version"])

    async def _report(self, client: aiomqtt.Client) -> None:
        if self.execution_version == 1:
            answer = await self._ask(client, jobs_topic(self.thing, "start-next"))
            self.execution_version = answer["execution"]["versionNumber"] if answer else 1
            return
        body: dict[str, Any] = {"status": "IN_PROGRESS", "statusDetails": {"step": "confirming"}}
        if self.stop.is_set():
            body = {"status": "SUCCEEDED", "statusDetails": {"version": "1.3.0", "sha256": NEW, "slot": "b"}}
        answer = await self._ask(
            client, jobs_topic(self.thing, JOB, "update"), expectedVersion=self.execution_version, **body
        )
        if answer is not None and "code" not in answer:
            self.reports += 1
            self.execution_version += 1
            self.done = self.stop.is_set() and body["status"] == "SUCCEEDED"
            return
        await self._look(client)

    async def _look(self, client: aiomqtt.Client) -> None:
        """An answer stayed out, or said that the version is another: the report was used once, or is still to be."""
        found = await self._ask(client, jobs_topic(self.thing, JOB, "get"))
        if found is None:
            return
        version, state = found["execution"]["versionNumber"], found["execution"]["status"]
        assert self.execution_version <= version <= self.execution_version + 1, f"{version} reports were counted"
        self.execution_version, self.done = version, state == "SUCCEEDED"
