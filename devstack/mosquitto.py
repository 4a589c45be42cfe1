"""Mosquitto, the reference broker for one machine, where it is installed: a listener for devices, one for the engine.

`access/mosquitto.py` has the configuration; what changes with the registry is in `<state>/broker/mosquitto/access/`,
written once before the broker starts and kept by the access keeper from then on.
"""

import asyncio
import os
import pwd
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from access.folder import BrokerFolder
from access.mosquitto import MosquittoFiles, MosquittoListeners, config
from access.plan import plan_access
from devstack.broker import MAX_PACKET_BYTES, mosquitto_binary, mqtt_answers
from devstack.identity import BROKER, StackIdentity
from devstack.interface import Launch, Piece
from devstack.postgres import make_passable
from devstack.state import StateDirectory, write_atomically
from store.brokers import BrokerStore
from store.engine import Database


class Mosquitto(Piece):
    """The broker."""

    name = "broker"
    title = "Mosquitto"

    def __init__(self, state: StateDirectory, identity: StackIdentity, broker_id: str, *, open_mqtt: bool) -> None:
        self._state = state
        self._identity = identity
        self._broker_id = broker_id
        self._open = open_mqtt
        self._listeners = MosquittoListeners(0, 0)
        self._account = _account() if os.geteuid() == 0 else None

    @property
    def _folder(self) -> Path:
        return self._state.path / "broker" / "mosquitto"

    @property
    def access_folder(self) -> Path:
        """What the access keeper writes."""
        return self._folder / "access"

    @property
    def pid_file(self) -> Path:
        """The broker's process id, written by itself."""
        return self._folder / "mosquitto.pid"

    async def prepare_access(self, db: Database) -> None:
        """Write the files that the access keeper keeps; the broker does not run yet, so nobody is thrown out."""
        self._make_folders()
        snapshot = await BrokerStore(db).snapshot()
        folder = BrokerFolder(self.access_folder)
        plan = plan_access(snapshot, folder.read(), self._broker_id, datetime.now(UTC))
        await asyncio.to_thread(folder.write, plan.files)

    def prepare(self) -> None:
        """Write the configuration, and the server's certificate and key where the broker's account can read them."""
        port = self._state.port
        self._listeners = MosquittoListeners(
            devices=port("mqtt"), engine=port("mqtt-engine"), open=port("mqtt-open") if self._open else None
        )
        self._make_folders()
        server = self._identity.files(BROKER)
        for path in (server.certificate, server.private_key, self._identity.ca):
            write_atomically(self._folder / path.name, path.read_text())
        files = MosquittoFiles(
            folder=self.access_folder,
            certificate=self._folder / server.certificate.name,
            private_key=self._folder / server.private_key.name,
            service_ca=self._folder / self._identity.ca.name,
            pid_file=self.pid_file,
            persistence=self._folder,
        )
        self._config.write_text(config(self._listeners, files, MAX_PACKET_BYTES))
        self.pid_file.unlink(missing_ok=True)
        if self._account:
            make_passable(self._folder)
            for path in (self._folder, *(path for path in self._folder.iterdir() if path.is_file())):
                shutil.chown(path, self._account)

    def _make_folders(self) -> None:
        self._state.folder("broker")
        self._folder.mkdir(exist_ok=True)
        self.access_folder.mkdir(exist_ok=True)
        self.access_folder.chmod(0o755)

    @property
    def _config(self) -> Path:
        return self._folder / "mosquitto.conf"

    def launch(self) -> Launch:
        """`mosquitto -c`, under its own account where we are root."""
        return Launch(command=(str(mosquitto_binary()), "-c", str(self._config)), account=self._account)

    async def answers(self) -> bool:
        """Whether it accepts a service on the engine's listener, and somebody listens for devices."""
        _reader, writer = await asyncio.open_connection("127.0.0.1", self._listeners.devices)
        writer.close()
        return await mqtt_answers(self._listeners.engine, self._identity.client_context())

    @property
    def address(self) -> str:
        """As MQTT URLs."""
        lines = [f"mqtts://127.0.0.1:{self._listeners.devices}", f"engine mqtts://127.0.0.1:{self._listeners.engine}"]
        if self._listeners.open is not None:
            lines.append(f"open mqtt://127.0.0.1:{self._listeners.open}")
        return "\n".join(lines)

    def endpoints(self) -> dict[str, Any]:
        """The three listeners."""
        listeners = self._listeners
        return {
            "mqtt_host": "127.0.0.1",
            "mqtt_port": listeners.devices,
            "engine_mqtt_url": f"mqtts://127.0.0.1:{listeners.engine}",
            "open_mqtt_url": None if listeners.open is None else f"mqtt://127.0.0.1:{listeners.open}",
        }


def _account() -> str:
    """The account that the Debian package makes, else the one every system has."""
    try:
        return pwd.getpwnam("mosquitto").pw_name
    except KeyError:
        return "nobody"
