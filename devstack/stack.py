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

from access.mosquitto import ACCESS, GATEWAY, WORKER
from devstack.artifacts import ArtifactServer
from devstack.broker import BrokerKind, choose_broker
from devstack.identity import StackIdentity
from devstack.interface import Piece
from devstack.mosquitto import Mosquitto
from devstack.nats import NatsServer
from devstack.postgres import Postgres
from devstack.services import COMMANDS, EnrolmentService, Service
from devstack.state import StateDirectory
from devstack.supervisor import PieceEvent, Supervisor, log
from devstack.temporal import TemporalServer
from firmware.keys import generate_private_key, save_private_key, save_public_key
from models.errors import InvalidInputError
from models.settings import Endpoints, Settings
from store.engine import Database, migrate
from workflows.client import connect

CERTIFICATE_OF = {"gateway": GATEWAY, "worker": WORKER, "access": ACCESS}
"""Which certificate a process connects to the broker with."""

GIVEN_SECONDS = 5.0
"""How long a server whose address was given may take to answer."""


class EmbeddedStack:
    """PostgreSQL, Temporal, a broker, the artifact server and Tidegate's own processes, as far as they are not given.

    With a broker of its own it has certificate authorities, an enrolment server, and (Mosquitto) an access keeper too.
    """

    def __init__(
        self,
        state_dir: Path | None = None,
        *,
        settings: Settings | None = None,
        broker: BrokerKind | None = None,
        worker: bool = True,
        gateway: bool = True,
        enrolment: bool = True,
        open_mqtt: bool = False,
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
            enrolment: whether to start an enrolment server.
            open_mqtt: whether the broker has a listener on loopback for clients without identity (simulated fleets).
            environment: more variables for worker and gateway.
            listener: is told what happens to the pieces.
        """
        settings = settings or Settings()
        self.settings = settings.model_copy(update={"state_dir": (state_dir or settings.state_dir).absolute()})
        self.endpoints = Endpoints()
        self.broker_kind: BrokerKind | None = None if self.settings.mqtt_url else choose_broker(broker)
        self._open_mqtt = open_mqtt
        self._wanted = {"worker": worker, "gateway": gateway, "enrolment": enrolment and self.broker_kind is not None}
        self._environment = environment or {}
        self._listener = listener
        self._held = ExitStack()
        self._identity: StackIdentity | None = None
        self._access: dict[str, str] = {}

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
        """SIGKILL to worker, gateway, access, enrolment, artifacts, broker, temporal or postgres; down until `start`."""
        self.supervisor.kill(name)

    async def stop(self, name: str) -> None:
        """End a piece politely; it stays down until `start`."""
        await self.supervisor.stop(name)

    async def start(self, name: str) -> None:
        """Start a piece again, or a process of Tidegate that was left out; returns when it answers."""
        if name in COMMANDS and name not in {piece.name for piece in self.supervisor.pieces}:
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
        self._identity = None if self.broker_kind is None else StackIdentity(self.state, self.settings)
        engines = self._engines()
        await self._check_given()
        await self._start(*engines)
        assert self.endpoints.database_url is not None
        await asyncio.to_thread(migrate, self.endpoints.database_url)
        if self._identity is not None:
            await self._start_broker(self._identity, self.endpoints.database_url)
        await self._start(*(self._service(name) for name, wanted in self._wanted.items() if wanted))
        self.state.write_endpoints(self.endpoints)

    async def _start_broker(self, identity: StackIdentity, database_url: str) -> None:
        """CAs first, then the broker, which has to know whom to believe before it listens, then what keeps it so."""
        broker: Mosquitto | NatsServer
        if self.broker_kind == "mosquitto":
            broker_id = self.settings.access_broker_id
            broker = Mosquitto(self.state, identity, broker_id, open_mqtt=self._open_mqtt)
        else:
            broker = NatsServer(self.state, identity, open_mqtt=self._open_mqtt)
        database = Database(database_url, max_size=2)
        await database.open()
        try:
            await identity.prepare(database)
            await broker.prepare_access(database)
        finally:
            await database.close()
        await self._start(broker)
        self.endpoints = self.endpoints.model_copy(update=self._identity_endpoints(identity))
        self._wanted = {"access": isinstance(broker, Mosquitto)} | self._wanted
        if isinstance(broker, Mosquitto):
            self._access = {
                "TIDEGATE_ACCESS_FOLDER": str(broker.access_folder),
                "TIDEGATE_ACCESS_PID_FILE": str(broker.pid_file),
                "TIDEGATE_ACCESS_BROKER_ID": self.settings.access_broker_id,
            }

    def _identity_endpoints(self, identity: StackIdentity) -> dict[str, Any]:
        """What devices, and whoever runs a service by hand, need to know."""
        found: dict[str, Any] = {"ca_dir": str(identity.ca_dir), "ca_passphrase_file": str(identity.ca_passphrase_file)}
        if (self.endpoints.engine_mqtt_url or "").startswith("mqtts:"):
            files = identity.files(GATEWAY)
            found |= {
                "ca": str(identity.ca),
                "service_ca": str(identity.ca),
                "service_certificate": str(files.certificate),
                "service_private_key": str(files.private_key),
            }
        return found

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
        if self.settings.artifact_url is None:
            assert self.endpoints.artifact_store is not None
            engines.append(ArtifactServer(self.state, self.endpoints.artifact_store))
        return engines

    def _service(self, name: str) -> Service:
        def environment() -> dict[str, str]:
            return self._addresses(name) | self._environment

        if name == "enrolment":
            if self._identity is None:
                raise InvalidInputError(
                    "cannot start the enrolment server: the broker is not this stack's, so it has no certificates; run "
                    "'python -m enrolment' with TIDEGATE_ENROLMENT_CERTIFICATE and TIDEGATE_ENROLMENT_PRIVATE_KEY"
                )
            return EnrolmentService(self.state, self.settings, self._identity, environment)
        return Service(name, self.state, self.settings, environment)

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

    def _addresses(self, service: str = "gateway") -> dict[str, str]:
        """The variables of one of Tidegate's processes; the keys of the CAs are for the worker alone."""
        values: dict[str, object] = {
            "TIDEGATE_STATE_DIR": self.settings.state_dir,
            "TIDEGATE_DATABASE_URL": self.endpoints.database_url,
            "TIDEGATE_TEMPORAL_ADDRESS": self.endpoints.temporal_address,
            "TIDEGATE_TEMPORAL_NAMESPACE": self.settings.temporal_namespace,
            "TIDEGATE_ARTIFACT_URL": self.endpoints.artifact_url,
            "TIDEGATE_ARTIFACT_STORE": self.endpoints.artifact_store,
            "TIDEGATE_ORDER_KEY": self.endpoints.order_key,
            "TIDEGATE_MQTT_URL": self.settings.mqtt_url or self.endpoints.engine_mqtt_url,
            "TIDEGATE_MQTT_CA": self.settings.mqtt_ca,
            "TIDEGATE_MQTT_CERTIFICATE": self.settings.mqtt_certificate,
            "TIDEGATE_MQTT_PRIVATE_KEY": self.settings.mqtt_private_key,
            "TIDEGATE_ENROLMENT_URL": self.endpoints.enrolment_url,
            "TIDEGATE_REDIS_URL": self.settings.redis_url,
        }
        if self._identity is not None:
            values |= self._identity_variables(self._identity, service)
        return {name: str(value) for name, value in values.items() if value is not None}

    def _identity_variables(self, identity: StackIdentity, service: str) -> dict[str, object]:
        values: dict[str, object] = {}
        if self.endpoints.service_certificate:
            files = identity.files(CERTIFICATE_OF.get(service, GATEWAY))
            values |= {
                "TIDEGATE_MQTT_CA": identity.ca,
                "TIDEGATE_MQTT_CERTIFICATE": files.certificate,
                "TIDEGATE_MQTT_PRIVATE_KEY": files.private_key,
            }
        if service == "worker":
            values |= {
                "TIDEGATE_CA_DIR": identity.ca_dir,
                "TIDEGATE_CA_PASSPHRASE_FILE": identity.ca_passphrase_file,
            }
        if service == "access":
            values |= self._access
        return values


def _mqtt_endpoints(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
        raise InvalidInputError(f"cannot use TIDEGATE_MQTT_URL {url!r}: expected mqtt://host:port or mqtts://host:port")
    return {"mqtt_host": parts.hostname, "mqtt_port": parts.port or (8883 if parts.scheme == "mqtts" else 1883)}
