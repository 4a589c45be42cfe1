"""Tidegate's own processes as pieces of the stack: worker, gateway, access keeper and enrolment server."""

import ssl
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from devstack.identity import ENROLMENT, StackIdentity
from devstack.interface import Launch, Piece
from devstack.state import StateDirectory
from models.settings import Settings
from observe.metrics import READY

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "worker": (sys.executable, str(ROOT / "worker.py")),
    "gateway": (sys.executable, "-m", "gateway"),
    "access": (sys.executable, "-m", "access"),
    "enrolment": (sys.executable, "-m", "enrolment"),
}
TITLES = {"access": "Access keeper", "enrolment": "Enrolment server"}
METRICS_PORTS = {
    "worker": {"worker": "worker_metrics_port", "worker-temporal": "worker_temporal_metrics_port"},
    "gateway": {"gateway": "gateway_metrics_port"},
    "access": {"access": "access_metrics_port"},
    "enrolment": {"enrolment": "enrolment_metrics_port"},
}
"""By process: what `endpoints.json` calls its metrics, and the setting that holds the port. Its own come first."""
READY_SECONDS = 60.0
STOP_SECONDS = 30.0
"""Longer than the worker's own time for activities to end."""


class Service(Piece):
    """A process of Tidegate. It has started when its metrics say `tidegate_ready 1`."""

    ready_seconds = READY_SECONDS

    def __init__(
        self, name: str, state: StateDirectory, settings: Settings, environment: Callable[[], dict[str, str]]
    ) -> None:
        """`environment`: the addresses of everything else, asked for at every start."""
        self.name = name
        self.title = TITLES.get(name, name.capitalize())
        self._state = state
        self._settings = settings
        self._environment = environment
        self._ports: dict[str, int] = {}

    def prepare(self) -> None:
        """Choose the ports of its metrics."""
        wanted = {what: getattr(self._settings, setting) for what, setting in METRICS_PORTS[self.name].items()}
        self._ports = {what: port or self._state.port(f"{what}-metrics") for what, port in wanted.items()}

    def launch(self) -> Launch:
        """The program, with the addresses of the stack in its environment."""
        settings = METRICS_PORTS[self.name]
        ports = {f"TIDEGATE_{settings[what].upper()}": str(port) for what, port in self._ports.items()}
        return Launch(command=COMMANDS[self.name], environment=self._environment() | ports, stop_seconds=STOP_SECONDS)

    async def answers(self) -> bool:
        """Whether it serves metrics that say it is ready."""
        async with httpx.AsyncClient(trust_env=False) as http:
            try:
                answer = await http.get(self.metrics_url)
            except httpx.HTTPError:
                return False
        return f'{READY._name}{{process="{self.name}"}} 1.0' in answer.text

    @property
    def metrics_url(self) -> str:
        """Where Prometheus reads it."""
        return self._url(self._ports.get(self.name, 0))

    def _url(self, port: int) -> str:
        return f"http://{self._settings.metrics_host}:{port}/metrics"

    @property
    def address(self) -> str:
        """Only its metrics can be asked; it listens on nothing else."""
        return f"metrics {self.metrics_url}"

    def endpoints(self) -> dict[str, Any]:
        """Its metrics."""
        return {"metrics": {what: self._url(port) for what, port in self._ports.items()}}


class EnrolmentService(Service):
    """The enrolment server: HTTPS, asked as a device asks that has no certificate yet."""

    def __init__(
        self,
        state: StateDirectory,
        settings: Settings,
        identity: StackIdentity,
        environment: Callable[[], dict[str, str]],
    ) -> None:
        super().__init__(ENROLMENT, state, settings, environment)
        self._identity = identity
        self._port = 0

    def prepare(self) -> None:
        """Choose its port too."""
        super().prepare()
        self._port = self._settings.enrolment_port or self._state.port(self.name)

    def launch(self) -> Launch:
        """With its address and certificate."""
        launch = super().launch()
        files = self._identity.files(ENROLMENT)
        own = {
            "TIDEGATE_ENROLMENT_HOST": self._settings.enrolment_host,
            "TIDEGATE_ENROLMENT_PORT": str(self._port),
            "TIDEGATE_ENROLMENT_CERTIFICATE": str(files.certificate),
            "TIDEGATE_ENROLMENT_PRIVATE_KEY": str(files.private_key),
        }
        return replace(launch, environment=launch.environment | own)

    async def answers(self) -> bool:
        """Whether it says it is ready, and tells its CAs to a stranger over TLS that checks it."""
        if not await super().answers():
            return False
        context = ssl.create_default_context(cafile=str(self._identity.ca))
        async with httpx.AsyncClient(trust_env=False, verify=context) as http:
            try:
                answer = await http.get(f"{self.url}/.well-known/est/cacerts")
            except httpx.HTTPError:
                return False
        return answer.status_code == httpx.codes.OK

    @property
    def url(self) -> str:
        """Its base URL."""
        host = self._settings.enrolment_host
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1"
        return f"https://[{host}]:{self._port}" if ":" in host else f"https://{host}:{self._port}"

    @property
    def address(self) -> str:
        """Where devices come to."""
        return self.url

    def endpoints(self) -> dict[str, Any]:
        """`enrolment_url`, and its metrics."""
        return super().endpoints() | {"enrolment_url": self.url}
