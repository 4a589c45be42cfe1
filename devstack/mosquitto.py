"""Mosquitto, the reference broker for one machine, where it is installed."""

import os
import pwd
import shutil
from pathlib import Path
from typing import Any

from devstack.broker import MAX_PACKET_BYTES, mosquitto_binary, mqtt_answers
from devstack.interface import Launch, Piece
from devstack.postgres import make_passable
from devstack.state import StateDirectory

CONFIG = """\
# Written at every start; changes are lost.
listener {port} 127.0.0.1
# Every local client is let in: this stack has no device certificates.
allow_anonymous true
# The gateway acknowledges after its commit, so it needs more in flight than the default of 20 (0: no limit).
max_inflight_messages 0
max_queued_messages 1000000
max_packet_size {max_packet_size}
persistence true
persistence_location {folder}/
autosave_interval 60
log_dest stdout
log_type error
log_type warning
log_type notice
connection_messages false
"""


class Mosquitto(Piece):
    """The broker."""

    name = "broker"
    title = "Mosquitto"

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._port = 0
        self._account = _account() if os.geteuid() == 0 else None

    def prepare(self) -> None:
        """Write the configuration."""
        self._port = self._state.port("mqtt")
        folder = self._state.folder("broker") / "mosquitto"
        folder.mkdir(exist_ok=True)
        text = CONFIG.format(port=self._port, folder=folder, max_packet_size=MAX_PACKET_BYTES)
        self._config.write_text(text)
        if self._account:
            make_passable(folder)
            for path in (folder, *folder.iterdir()):
                shutil.chown(path, self._account)

    @property
    def _config(self) -> Path:
        return self._state.path / "broker" / "mosquitto" / "mosquitto.conf"

    def launch(self) -> Launch:
        """`mosquitto -c`, under its own account where we are root."""
        return Launch(command=(str(mosquitto_binary()), "-c", str(self._config)), account=self._account)

    async def answers(self) -> bool:
        """Whether it accepts a client."""
        return await mqtt_answers(self._port)

    @property
    def address(self) -> str:
        """As an MQTT URL."""
        return f"mqtt://127.0.0.1:{self._port}"

    def endpoints(self) -> dict[str, Any]:
        """`mqtt_host` and `mqtt_port`."""
        return {"mqtt_host": "127.0.0.1", "mqtt_port": self._port}


def _account() -> str:
    """The account that the Debian package makes, else the one every system has."""
    try:
        return pwd.getpwnam("mosquitto").pw_name
    except KeyError:
        return "nobody"
