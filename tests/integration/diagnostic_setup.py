"""Everything that asks devices how they are, for real: gateway, worker, relay, Temporal, a broker, and agents."""

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from temporalio.client import Client

from activities.diagnostics import DiagnosticActivities
from activities.relay import OutboxRelay
from agent.client import Broker as Address
from agent.device import Device, DeviceConfig, Timing
from agent.image import declared_image
from agent.slots import Slots
from agent.storage import PosixStorage
from agent.updater import Identity
from firmware.keys import TrustedKeys, generate_private_key
from gateway.diagnostics import RebootSigner, order_reboots
from gateway.documents import Documents
from gateway.service import Gateway
from models.diagnostics import AskDeviceInput, AskDeviceResult, DiagnosticView
from models.protocol import REQUEST_FILTERS, DiagnosticType
from models.settings import Settings
from store.diagnostics import DiagnosticStore
from store.engine import Database
from tests.conftest import Broker, _mosquitto, _nats, free_port, wait_for_port
from tests.workflow.life_stage import life_workers
from transport.connection import Connection
from transport.publisher import Publisher
from workflows import options
from workflows.lifecycle_client import start_diagnosis


@contextmanager
def running_broker(kind: str) -> Iterator[Broker]:
    """A broker of that kind for a few tests."""
    folder, port = Path(tempfile.mkdtemp(prefix="tidegate-mqtt-")), free_port()
    process = (_mosquitto if kind == "mosquitto" else _nats)(folder, port)
    try:
        wait_for_port(port, process)
        yield Broker("127.0.0.1", port, kind, process.pid)
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Ward:
    """What a test asks, and whom."""

    db: Database
    temporal: Client
    broker: Broker
    order_key: Ed25519PrivateKey
    folder: Path
    started: list[str] = field(default_factory=list)
    tasks: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def keys(self) -> TrustedKeys:
        """What its devices trust."""
        return TrustedKeys.of([generate_private_key().public_key()], [self.order_key.public_key()])

    def asked(self, device_id: str, what: DiagnosticType, **given: Any) -> AskDeviceInput:
        """A question."""
        request_id = given.pop("request_id", secrets.token_hex(16))
        return AskDeviceInput(device_id=device_id, request_id=request_id, type=what, actor="alice", **given)

    async def ask(self, device_id: str, what: DiagnosticType, **given: Any) -> tuple[AskDeviceResult, DiagnosticView]:
        """Ask, and wait for what becomes of it."""
        asked = self.asked(device_id, what, **given)
        handle = await start_diagnosis(self.temporal, asked)
        self.started.append(handle.id)
        result = await asyncio.wait_for(handle.result(), 60)
        return result, await DiagnosticStore(self.db).get(asked.request_id)

    async def device(self, device_id: str, **timing: float) -> Device:
        """A real agent, connected."""
        root = self.folder / device_id
        root.mkdir()
        storage = PosixStorage(root)
        Slots(storage).make(declared_image("1.2.0", body=b"x" * 100), "1.2.0")
        identity = Identity(device_id, "motor", self.keys)
        rhythm = Timing(**{"poll_seconds": 60, "heartbeat_seconds": 0.3, **timing})
        config = DeviceConfig(identity, Address(self.broker.host, self.broker.port), rhythm)
        http = await self.tasks.enter_async_context(httpx.AsyncClient())
        device = Device(config, storage, http=http)
        await self.tasks.enter_async_context(background(device.life()))
        await asyncio.wait_for(device.online.wait(), 20)
        return device


@asynccontextmanager
async def background(work: Any) -> AsyncIterator[None]:
    """Something that runs beside the test."""
    task = asyncio.create_task(work)
    try:
        yield
        assert not task.done() or task.exception() is None, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def ward(
    db: Database, temporal: Client, broker: Broker, folder: Path, *, workers: bool = True
) -> AsyncIterator[Ward]:
    """A gateway, and a worker unless there is to be none."""
    settings = Settings(mqtt_url=f"mqtt://{broker.host}:{broker.port}", database_url=db.url)
    key, stop = generate_private_key(), asyncio.Event()
    connection = Connection(f"gateway-{secrets.token_hex(4)}")
    gateway = Gateway(db, connection, Documents("http://127.0.0.1:1/", key, 3600), settings)
    await connection.open(settings, REQUEST_FILTERS, gateway.receive)
    publisher = await Publisher.connect(settings)
    place = Ward(db, temporal, broker, key, folder)
    activities = DiagnosticActivities(DiagnosticStore(db), publisher)
    steps = [
        activities.open_question,
        activities.publish_question,
        activities.end_question,
        activities.look_at_boot,
    ]
    try:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(background(gateway.run(stop)))
            ordering = order_reboots(db.url, RebootSigner(key), connection.publish, stop)
            await stack.enter_async_context(background(ordering))
            await stack.enter_async_context(background(OutboxRelay(db, temporal, options.DEVICE_EVENT).run(stop)))
            if workers:
                await stack.enter_async_context(life_workers(temporal, steps))
            await stack.enter_async_context(place.tasks)
            yield place
    finally:
        stop.set()
        await publisher.close()
        await connection.close()
