"""The whole embedded stack in one object.

```python
async with EmbeddedStack(Path(".tidegate")) as stack:
    stack.endpoints.database_url
    stack.kill("worker")          # as kill -9; stays down
    await stack.start("worker")
```

Use it from the main thread: the servers end when the thread that started them does. A server whose address is set in
the settings is somebody else's and is not started. Where the state directory was left by a stack that was killed, what
still runs of it is ended first, and what it was doing goes on.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from devstack.artifacts import ArtifactServer
from devstack.broker import BrokerKind, choose_broker
from devstack.interface import Piece
from devstack.mosquitto import Mosquitto
from devstack.nats import NatsServer
from devstack.postgres import Postgres
from devstack.services import Service
from devstack.state import StateDirectory
from devstack.supervisor import PieceEvent, Supervisor, log
from devstack.temporal import TemporalServer
from firmware.keys import generate_private_key, save_private_key, save_public_key
from models.errors import InvalidInputError
from models.settings import Endpoints, Settings
from store.engine import Database, migrate
from workflows.client import connect

GIVEN_SECONDS = 5.0
"""How long a server whose address was given may take to answer."""


class EmbeddedStack:
    """PostgreSQL, Temporal, a broker, the artifact server, a worker and a gateway, as far as they are not given."""

    def __init__(
        self,
        state_dir: Path | None = None,
        *,
        settings: Settings | None = None,
        broker: BrokerKind | None = None,
        worker: bool = True,
        gateway: bool = True,
        environment: dict[str, str] | None = None,
        listener: Callable[[PieceEvent], None] | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            state_dir: where all state lives; `settings.state_dir` when None.
            settings: addresses that are set replace a piece; read from the environment when None.
            broker: the broker to run; Mosquitto where it is installed when None.
            worker: whether to start a worker.
            gateway: whether to start a gateway.
            environment: more variables for worker and gateway.
            listener: is told what happens to the pieces.
        """
        settings = settings or Settings()
        self.settings = settings.model_copy(update={"state_dir": (state_dir or settings.state_dir).absolute()})
        self.endpoints = Endpoints()
        self.broker_kind: BrokerKind | None = None if self.settings.mqtt_url else choose_broker(broker)
        self._services = [name for name, wanted in (("worker", worker), ("gateway", gateway)) if wanted]
        self._environment = environment or {}
        self._listener = listener
        self._held = ExitStack()

    async def __aenter__(self) -> Self:
        self.state = StateDirectory(self.settings.state_dir)
        self._held.enter_context(self.state.locked())
        self.supervisor = Supervisor(self.state, self._listener)
        try:
            await self._start_all()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop everything in reverse order and let go of the state directory."""
        self.state.remove_endpoints()
        try:
            await self.supervisor.stop_all()
        finally:
            self._held.close()

    def env(self) -> dict[str, str]:
        """The environment of a child process that works with this stack: ours, and where everything answers."""
        return dict(os.environ) | self._addresses()

    def kill(self, name: str) -> None:
        """SIGKILL to worker, gateway, artifacts, broker, temporal or postgres; it stays down until `start`."""
        self.supervisor.kill(name)

    async def stop(self, name: str) -> None:
        """End a piece politely; it stays down until `start`."""
        await self.supervisor.stop(name)

    async def start(self, name: str) -> None:
        """Start a piece again, or a worker or gateway that was left out; returns when it answers."""
        if name in ("worker", "gateway") and name not in {piece.name for piece in self.supervisor.pieces}:
            await self._start(self._service(name))
            self.state.write_endpoints(self.endpoints)
        else:
            await self.supervisor.start_again(name)

    def pids(self) -> dict[str, list[int]]:
        """All processes of each piece that runs: the server's, and those it started."""
        running = ((piece.name, self.supervisor.process(piece.name)) for piece in self.supervisor.pieces)
        return {name: process.pids() for name, process in running if process is not None}

    async def _start_all(self) -> None:
        ended = await asyncio.to_thread(self.state.end_orphans)
        if ended:
            log.warning("ended what an earlier run left", pieces=", ".join(ended))
        self.state.remove_endpoints()
        self.endpoints = self._given_endpoints()
        engines = self._engines()
        await self._check_given()
        await self._start(*engines)
        assert self.endpoints.database_url is not None
        await asyncio.to_thread(migrate, self.endpoints.database_url)
        await self._start(*(self._service(name) for name in self._services))
        self.state.write_endpoints(self.endpoints)

    async def _check_given(self) -> None:
        """Whether the servers of others answer, before ours are started. Raises UnavailableError."""
        if self.settings.database_url:
            database = Database(self.settings.database_url)
            await database.open(GIVEN_SECONDS)
            await database.close()
        if self.settings.temporal_address:
            await connect(self.settings.temporal_address, self.settings.temporal_namespace)

    async def _start(self, *pieces: Piece) -> None:
        await self.supervisor.start(*pieces)
        for piece in pieces:
            found = piece.endpoints()
            found["metrics"] = self.endpoints.metrics | found.get("metrics", {})
            self.endpoints = self.endpoints.model_copy(update=found)

    def _engines(self) -> list[Piece]:
        engines: list[Piece] = []
        if self.settings.database_url is None:
            engines.append(Postgres(self.state))
        if self.settings.temporal_address is None:
            engines.append(TemporalServer(self.state))
        if self.broker_kind is not None:
            engines.append(Mosquitto(self.state) if self.broker_kind == "mosquitto" else NatsServer(self.state))
        if self.settings.artifact_url is None:
            assert self.endpoints.artifact_store is not None
            engines.append(ArtifactServer(self.state, self.endpoints.artifact_store))
        return engines

    def _service(self, name: str) -> Service:
        return Service(name, self.state, self.settings, lambda: self._addresses() | self._environment)

    def _given_endpoints(self) -> Endpoints:
        """What the settings say, and what lies in the state directory."""
        given: dict[str, Any] = {
            "database_url": self.settings.database_url,
            "temporal_address": self.settings.temporal_address,
            "artifact_url": self.settings.artifact_url,
            "artifact_store": self.settings.artifact_store or (self.state.folder("store")).as_uri(),
            "order_key": str(self.settings.order_key or self._order_key()),
        }
        if self.settings.mqtt_url:
            given |= _mqtt_endpoints(self.settings.mqtt_url)
            given["ca"] = str(self.settings.mqtt_ca) if self.settings.mqtt_ca else None
        return Endpoints(**given)

    def _order_key(self) -> Path:
        """The online key that signs orders, made on first use; its public half is what devices trust."""
        keys = self.state.folder("keys")
        path = keys / "order.pem"
        if not path.exists():
            key = generate_private_key()
            (keys / "order.pub").unlink(missing_ok=True)
            save_public_key(keys / "order.pub", key.public_key())
            save_private_key(path, key)
        return path

    def _addresses(self) -> dict[str, str]:
        values: dict[str, object] = {
            "TIDEGATE_STATE_DIR": self.settings.state_dir,
            "TIDEGATE_DATABASE_URL": self.endpoints.database_url,
            "TIDEGATE_TEMPORAL_ADDRESS": self.endpoints.temporal_address,
            "TIDEGATE_TEMPORAL_NAMESPACE": self.settings.temporal_namespace,
            "TIDEGATE_ARTIFACT_URL": self.endpoints.artifact_url,
            "TIDEGATE_ARTIFACT_STORE": self.endpoints.artifact_store,
            "TIDEGATE_ORDER_KEY": self.endpoints.order_key,
            "TIDEGATE_MQTT_URL": self.settings.mqtt_url
            or f"mqtt://{self.endpoints.mqtt_host}:{self.endpoints.mqtt_port}",
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def _mqtt_endpoints(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
        raise InvalidInputError(f"cannot use TIDEGATE_MQTT_URL {url!r}: expected mqtt://host:port or mqtts://host:port")
    return {"mqtt_host": parts.hostname, "mqtt_port": parts.port or (8883 if parts.scheme == "mqtts" else 1883)}
