"""The place where SDKs are judged by: Mosquitto as the stack runs it (TLS, certificates, ACL), PostgreSQL, and the gateway.

The gateway is a process, so that it can be killed. Devices have real certificates of a device CA.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg

from access.mosquitto import GATEWAY, WORKER
from activities.notices import OfferedJob, offer_notices
from store.engine import Database
from tests.conftest import TABLES, free_port
from tests.integration.access_setup import Credentials, Stage, stage
from tests.integration.rollout_setup import Fleet, prepare

JOB = "motor-1_3_0"
ROOT = Path(__file__).parent.parent.parent
READY_SECONDS = 40


@dataclass
class Site:
    """All of it, with a rollout that waits for every device."""

    stage: Stage
    fleet: Fleet
    folder: Path
    free: list[str] = field(default_factory=list)
    gateway: "subprocess.Popen[bytes] | None" = None
    metrics_port: int = 0

    @property
    def port(self) -> int:
        """Where devices connect."""
        return self.stage.listeners.devices

    async def device(self) -> Credentials:
        """A device that no test has had yet."""
        return await self.stage.device(self.free.pop())

    def start_gateway(self) -> None:
        """Start it; `ready` says when it serves."""
        settings = self.stage.settings(GATEWAY)
        self.metrics_port = free_port()
        environment = {
            **os.environ,
            "TIDEGATE_STATE_DIR": str(self.folder),
            "TIDEGATE_DATABASE_URL": str(settings.database_url),
            "TIDEGATE_MQTT_URL": str(settings.mqtt_url),
            "TIDEGATE_MQTT_CA": str(settings.mqtt_ca),
            "TIDEGATE_MQTT_CERTIFICATE": str(settings.mqtt_certificate),
            "TIDEGATE_MQTT_PRIVATE_KEY": str(settings.mqtt_private_key),
            "TIDEGATE_ARTIFACT_URL": "http://127.0.0.1:1/",
            "TIDEGATE_ORDER_KEY": str(self.folder / "order.pem"),
            "TIDEGATE_GATEWAY_METRICS_PORT": str(self.metrics_port),
        }
        with (self.folder / "gateway.log").open("ab") as log:
            self.gateway = subprocess.Popen(
                [sys.executable, "-m", "gateway"], env=environment, cwd=ROOT, stdout=log, stderr=log
            )

    def kill_gateway(self) -> None:
        """SIGKILL."""
        if self.gateway is not None:
            self.gateway.kill()
            self.gateway.wait(10)
            self.gateway = None

    async def ready(self) -> None:
        """Until the gateway serves."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        async with httpx.AsyncClient() as client, asyncio.timeout(READY_SECONDS):
            while True:
                assert self.gateway is not None and self.gateway.poll() is None, self.log()
                try:
                    if 'tidegate_ready{process="gateway"} 1.0' in (await client.get(url)).text:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.05)

    def log(self) -> str:
        """What the gateway has said."""
        return (self.folder / "gateway.log").read_text()[-4000:]

    async def offer(self, thing: str) -> None:
        """Hint at the rollout, as the worker does."""
        worker = self.stage.client(self.stage.credentials(WORKER), engine=True, client_id="engine@worker-test")
        async with worker as client:
            for topic, payload in offer_notices([thing], OfferedJob(JOB, 1_790_000_000), 1_790_000_000):
                await client.publish(topic, payload)

    async def quarantined(self) -> list[tuple[str, str, str]]:
        """Topic, code and reason of all that could not be used."""
        async with self.stage.db.pool.connection() as connection:
            rows = await (await connection.execute("SELECT topic, code, reason FROM quarantine")).fetchall()
        return [tuple(row) for row in rows]


@asynccontextmanager
async def site(database_url: str, folder: Path, devices: int) -> AsyncIterator[Site]:
    """A running one with an empty registry but for `devices` devices and their rollout."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"TRUNCATE {TABLES} RESTART IDENTITY".encode())
        connection.execute("UPDATE access_state SET revision = 0")
    db = Database(database_url, max_size=5)
    await db.open()
    try:
        async with stage(db) as made:
            fleet = await prepare(db, devices)
            pem = fleet.order_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            (folder / "order.pem").write_bytes(pem)
            (folder / "order.pem").chmod(0o600)
            running = Site(made, fleet, folder, [f"motor-{i}" for i in range(devices, 0, -1)])
            running.start_gateway()
            try:
                await running.ready()
                yield running
            finally:
                running.kill_gateway()
    finally:
        await db.close()
