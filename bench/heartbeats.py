"""`python -m bench heartbeats`: durable heartbeats per second through the real path, against three references.

Publishers in a process of their own send heartbeats at QoS 1 to the broker; the gateway takes them in batches, and a
heartbeat counts when another session of PostgreSQL sees it (synchronous commit on). The publishers are allowed a fixed
lead over what has been committed, so the rate is that of the whole path and not of a backlog; it is taken over the steady
part. At the end every heartbeat must be in the history exactly once. Then, on the same machine in the same run:

- the broker alone: the same publishers, and a subscriber that throws everything away;
- PostgreSQL alone: the same batches through the gateway's own statements, with no MQTT;
- one by one: the requirements document's shape, aiomqtt with one statement and one commit for each message.
"""

import argparse
import asyncio
import math
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import orjson
import psycopg

from bench.beats import BeatsTask
from bench.heartbeats_report import batches_between, missed, percentiles
from bench.sampling import Sampler
from devstack.broker import BrokerKind
from devstack.stack import EmbeddedStack
from domain.device_rows import Format
from gateway.requests import Heartbeat
from models.errors import UnavailableError
from models.protocol import heartbeat_topic
from models.settings import Settings
from store.access import share_access
from store.devicetraffic import ask_standing, read_standing, save_heartbeats
from store.engine import Database
from store.registry import Registry

POLL_SECONDS = 0.02
WARM_SECONDS = 2.0
STALLED_SECONDS = 15.0
"""So long nothing more is committed: what has not come by then is lost."""
PROBES = 50
"""Devices whose heartbeats are timed, from the publisher's clock to the first query that sees them."""
REFERENCE_SHARE = 1 / 3
"""Each reference is measured for this share of the durable part's time."""
FEWEST_REFERENCE_SECONDS = 2.0
BEATS = "SELECT coalesce(sum(uptime), 0)::bigint FROM presence"
"""A device's `uptime` says which of its heartbeats this is: their sum over the newest ones is how many there were."""


@dataclass(frozen=True)
class HeartbeatsConfig:
    """What to run. `publishers`: connections that share the devices; `lead`: heartbeats sent and not yet committed."""

    seconds: float = 15.0
    devices: int = 2_000
    publishers: int = 20
    lead: int = 8_000
    broker: BrokerKind | None = None

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The options of `python -m bench heartbeats`."""
        default = HeartbeatsConfig()
        for name, kind, metavar, text in (
            ("seconds", float, "S", "how long the durable part is measured; each reference a third of it"),
            ("devices", int, "N", "devices that send heartbeats"),
            ("publishers", int, "N", "connections that share the devices"),
            ("lead", int, "N", "heartbeats on the way at one time"),
        ):
            value = getattr(default, name)
            parser.add_argument(f"--{name}", type=kind, default=value, metavar=metavar, help=f"{text} (%(default)s)")
        parser.add_argument(
            "--broker", choices=("mosquitto", "nats"), help="MQTT broker (mosquitto where it is installed)"
        )

    @classmethod
    def of(cls, options: argparse.Namespace) -> "HeartbeatsConfig":
        """From those options."""
        return cls(options.seconds, options.devices, options.publishers, options.lead, options.broker)


@dataclass
class Flow:
    """What one stream came to."""

    sent: int = 0
    acknowledged: int = 0
    counted: int = 0
    """In the steady part."""
    seconds: float = 0.0
    arrived: int = 0
    """Altogether, by the end."""
    latencies: list[float] = field(default_factory=list)
    saturated: list[float] = field(default_factory=list)
    at_half: list[float] = field(default_factory=list)
    """Milliseconds from publish to commit while the publishers kept their lead, and at half that rate."""
    sampler: Sampler | None = None
    metrics: tuple[str, str] = ("", "")
    """What the gateway said of itself before the steady part and after it."""

    @property
    def per_second(self) -> float:
        """Rate of the steady part."""
        return self.counted / self.seconds if self.seconds else 0.0


Count = Callable[[], Awaitable[int]]


@dataclass
class Bench:
    """One run on one stack."""

    config: HeartbeatsConfig
    folder: Path
    stack: EmbeddedStack
    db: Database
    names: list[str] = field(default_factory=list)
    _seen: dict[str, int] = field(default_factory=dict)

    async def run(self) -> dict[str, Any]:
        """All four; the figures by their names."""
        self.names = [f"beat-{number:06d}" for number in range(self.config.devices)]
        await self._import()
        async with await psycopg.AsyncConnection.connect(self.db.url, autocommit=True) as watcher:
            durable = await self._durable(watcher)
            kept = await self._kept(watcher)
        batches = batches_between(*durable.metrics)
        seconds = max(FEWEST_REFERENCE_SECONDS, self.config.seconds * REFERENCE_SHARE)
        raw = await self._against("discard", "bench/{}/heartbeat", seconds)
        alone = await self._alone(round(batches["mean_messages"]) or 1, seconds)
        one = await self._against("one-by-one", "bench/{}/heartbeat", seconds)
        assert durable.sampler is not None
        return {
            "durable_per_second": durable.per_second,
            "raw_broker_per_second": raw.per_second,
            "postgresql_alone_per_second": alone,
            "one_by_one_per_second": one.per_second,
            "durable_by_one_by_one": durable.per_second / one.per_second if one.per_second else None,
            "cpu_seconds_per_1000": {
                name: 1000 * used / max(1, durable.counted) for name, used in durable.sampler.cpu.items()
            },
            "peak_memory_mib": durable.sampler.peak_mib,
            "batches": batches,
            "latency_ms": percentiles(durable.saturated),
            "latency_at_half_ms": percentiles(durable.at_half),
            "published": durable.sent,
            "acknowledged_by_broker": durable.acknowledged,
            "seconds": durable.seconds,
            "others_share_of_machine": durable.sampler.others_share,
        } | kept(durable.sent)

    async def _import(self) -> None:
        lines = [
            orjson.dumps({"device_id": name, "device_type": "bench", "serial_number": f"SN-{name}", "site_id": "bench"})
            for name in self.names
        ]
        await Registry(self.db).import_devices(lines, "beats.jsonl", Format.JSON_LINES)

    # --- the real path -----------------------------------------------------------------------------------------------

    async def _durable(self, watcher: psycopg.AsyncConnection) -> Flow:
        flow, probes = Flow(), orjson.dumps(self.names[:: max(1, len(self.names) // PROBES)]).decode()

        async def committed() -> int:
            cursor = await watcher.execute(
                f"SELECT NULL, ({BEATS}), NULL UNION ALL SELECT device_id, uptime, extract(epoch FROM device_time)::float8 "
                "FROM presence WHERE device_id IN (SELECT jsonb_array_elements_text(%s::jsonb))",
                (probes,),
            )
            rows, now = await cursor.fetchall(), time.time()
            for device_id, beat, sent_at in rows[1:]:
                if self._seen.get(device_id, 0) < beat:
                    self._seen[device_id] = beat
                    flow.latencies.append(1000 * (now - sent_at))
            return int(rows[0][1])

        async with self._process("publish", heartbeat_topic("{}")) as publisher:
            await self._pump(flow, publisher, committed, self.config.seconds, lambda: self._pids(publisher.pid))
        return flow

    def _pids(self, publisher: int) -> dict[str, list[int]]:
        pids = self.stack.pids()
        return {
            "gateway": pids["gateway"],
            "postgresql": pids["postgres"],
            "broker": pids["broker"],
            "publisher": [publisher],
        }

    async def _kept(self, watcher: psycopg.AsyncConnection) -> Callable[[int], dict[str, int]]:
        """How many heartbeats of the publishers are in the history, and how many of them more than once."""
        cursor = await watcher.execute("SELECT count(*), count(DISTINCT (device_id, uptime)) FROM heartbeats")
        row = await cursor.fetchone()
        assert row is not None
        rows, different = row

        def against(sent: int) -> dict[str, int]:
            return {"in_history": rows, "lost": sent - different, "twice": rows - different}

        return against

    async def _metrics(self) -> str:
        async with httpx.AsyncClient(trust_env=False) as http:
            return (await http.get(self.stack.endpoints.metrics["gateway"])).text

    # --- references --------------------------------------------------------------------------------------------------

    async def _against(self, role: Literal["discard", "one-by-one"], topic: str, seconds: float) -> Flow:
        """The same publishers on a topic that the gateway does not hear, and another subscriber."""
        flow, had = Flow(), 0
        async with self._process(role, topic) as subscriber, self._process("publish", topic) as publisher:

            async def listen() -> None:
                nonlocal had
                assert subscriber.stdout is not None
                while line := await subscriber.stdout.readline():
                    had = int(line)

            async def count() -> int:
                return had

            listening = asyncio.create_task(listen())
            await self._pump(flow, publisher, count, seconds, None)
            listening.cancel()
        return flow

    async def _alone(self, size: int, seconds: float) -> float:
        """Batches as large as the gateway's were, one after the other."""
        done, turn, names = 0, 0, self.names
        began = time.monotonic()
        while (taken := time.monotonic() - began) < seconds:
            beats: dict[str, Heartbeat] = {}
            rounds = [beats]
            for number in range(turn, turn + size):
                name = names[number % len(names)]
                if name in rounds[-1]:
                    rounds.append({})
                rounds[-1][name] = _beat(name, number)
            async with self.db.pool.connection() as connection, connection.pipeline():
                await share_access(connection)
                asked = await ask_standing(connection, list(rounds[0]))
                await read_standing(asked)
                for beats in rounds:
                    await save_heartbeats(connection, list(beats.values()))
                await connection.commit()
            done, turn = done + size, turn + size
        return done / taken

    # --- pumping -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _process(
        self, role: Literal["publish", "discard", "one-by-one"], topic: str
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """One side of a stream, connected."""
        url = urlsplit(str(self.stack.endpoints.open_mqtt_url))
        task = BeatsTask(
            role=role, host=str(url.hostname), port=int(url.port or 1883), topic=topic, database_url=self.db.url
        )
        if role == "publish":
            task = task.model_copy(update={"devices": self.names, "connections": self.config.publishers})
        with self.stack.state.log("beats").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "bench.beats",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
            )  # fmt: skip
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(task.model_dump_json().encode() + b"\n")
            if await process.stdout.readline() != b"ready\n":
                raise UnavailableError(f"the process of heartbeats ({role}) did not start; see {log.name}")
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()

    async def _pump(
        self,
        flow: Flow,
        publisher: asyncio.subprocess.Process,
        count: Count,
        seconds: float,
        pids: Callable[[], dict[str, list[int]]] | None,
    ) -> None:
        """Keep the publishers `lead` ahead: first warm, then measured, then until everything has come.

        With `pids`: measured is what these processes use, and then how long heartbeats take at half the rate.
        """
        assert publisher.stdin is not None and publisher.stdout is not None
        started, allowed = await count(), 0

        async def go_on(until: float, per_second: float = math.inf) -> int:
            nonlocal allowed
            before, began = allowed, time.monotonic()
            while True:
                had = await count() - started
                if (now := time.monotonic()) >= until:
                    return had
                wanted = had + self.config.lead
                if per_second < math.inf:
                    wanted = min(wanted, before + int(per_second * (now - began)))
                if wanted > allowed:
                    allowed = wanted
                    publisher.stdin.write(b"%d\n" % allowed)  # type: ignore[union-attr]
                await asyncio.sleep(POLL_SECONDS)

        await go_on(time.monotonic() + min(WARM_SECONDS, seconds))
        before = await self._metrics()
        sampler = Sampler(pids or dict)
        async with sampler:
            flow.latencies.clear()
            warm, began = await count() - started, time.monotonic()
            flow.counted = await go_on(began + seconds) - warm
            flow.seconds = time.monotonic() - began
        flow.sampler, flow.saturated = sampler, flow.latencies.copy()
        flow.metrics = before, await self._metrics()
        if pids is not None:
            half = flow.per_second / 2
            await go_on(time.monotonic() + min(WARM_SECONDS, seconds), half)
            flow.latencies.clear()
            await go_on(time.monotonic() + max(FEWEST_REFERENCE_SECONDS, seconds * REFERENCE_SHARE), half)
            flow.at_half = flow.latencies.copy()
        publisher.stdin.close()
        report = orjson.loads(await asyncio.wait_for(publisher.stdout.readline(), 60) or b"{}")
        if not report:
            raise UnavailableError("the publishers ended before they had reported; see the log of beats")
        flow.sent, flow.acknowledged = report["sent"], report["acknowledged"]
        flow.arrived = await _until_all(count, started, flow.sent)


async def _until_all(count: Count, started: int, sent: int) -> int:
    """Wait for what is on the way; how many came."""
    last, since = -1, time.monotonic()
    while (had := await count() - started) < sent and time.monotonic() - since < STALLED_SECONDS:
        if had != last:
            last, since = had, time.monotonic()
        await asyncio.sleep(POLL_SECONDS)
    return had


def _beat(name: str, number: int) -> Heartbeat:
    return Heartbeat(
        device_id=name,
        device_time=time.time(),
        uptime=number,
        free_memory=120_000_000,
        cpu_temperature=48.5,
        firmware_version="1.4.2",
        firmware_sha256=None,
        signal_strength=-61.0,
        error_count=0,
        boot_id="boot-1",
        extra=None,
    )


async def run(config: HeartbeatsConfig) -> dict[str, Any]:
    """A stack in a temporary folder, the four streams on it, and everything taken down."""
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as name:
        folder = Path(name)
        async with EmbeddedStack(
            folder / "state", settings=Settings(), broker=config.broker, open_mqtt=True, worker=False, enrolment=False
        ) as stack:
            db = Database(str(stack.endpoints.database_url))
            await db.open()
            try:
                figures = await Bench(config, folder, stack, db).run()
            finally:
                await db.close()
            broker = stack.broker_kind
    given = {"devices": config.devices, "publishers": config.publishers, "lead": config.lead, "broker": broker}
    figures |= given | {"cores": os.cpu_count()}
    return figures | {"missed": missed(figures)}
