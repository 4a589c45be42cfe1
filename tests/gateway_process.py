"""The gateway as the process it is in the field: started, killed with SIGKILL, measured."""

import asyncio
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from models.settings import Settings
from tests.conftest import free_port

ROOT = Path(__file__).parent.parent
READY_SECONDS = 40


@dataclass
class GatewayProcess:
    """`python -m gateway` with these settings, and the order key in `folder`."""

    folder: Path
    settings: Settings
    order_key: Ed25519PrivateKey
    process: "subprocess.Popen[bytes] | None" = None
    metrics_port: int = 0

    def start(self) -> None:
        """Start it; `ready` says when it serves."""
        key = self.folder / "order.pem"
        key.write_bytes(self.order_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        key.chmod(0o600)
        self.metrics_port = free_port()
        given = {
            "STATE_DIR": self.folder,
            "DATABASE_URL": self.settings.database_url,
            "MQTT_URL": self.settings.mqtt_url,
            "MQTT_CA": self.settings.mqtt_ca,
            "MQTT_CERTIFICATE": self.settings.mqtt_certificate,
            "MQTT_PRIVATE_KEY": self.settings.mqtt_private_key,
            "ARTIFACT_URL": "http://127.0.0.1:1/",
            "ORDER_KEY": key,
            "GATEWAY_METRICS_PORT": self.metrics_port,
        }
        environment = os.environ | {
            f"TIDEGATE_{name}": str(value) for name, value in given.items() if value is not None
        }
        with (self.folder / "gateway.log").open("ab") as log:
            command = [sys.executable, "-m", "gateway"]
            self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    async def ready(self) -> None:
        """Until it serves."""
        async with asyncio.timeout(READY_SECONDS):
            while 'tidegate_ready{process="gateway"} 1.0' not in await self.metrics():
                assert self.alive, self.log()
                await asyncio.sleep(0.05)

    async def metrics(self) -> str:
        """What it says of itself; nothing while it does not answer."""
        try:
            async with httpx.AsyncClient() as client:
                return (await client.get(f"http://127.0.0.1:{self.metrics_port}/metrics")).text
        except httpx.TransportError:
            return ""

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def resident_bytes(self) -> int:
        """The memory it holds."""
        assert self.process is not None
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def log(self) -> str:
        """What it has said last."""
        return (self.folder / "gateway.log").read_text()[-4000:]
