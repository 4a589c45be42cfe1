"""Tidegate's own processes as pieces of the stack: the worker and the gateway."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from devstack.interface import Launch, Piece
from devstack.state import StateDirectory
from models.settings import Settings
from observe.metrics import READY

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "worker": (sys.executable, str(ROOT / "worker.py")),
    "gateway": (sys.executable, "-m", "gateway"),
}
METRICS_PORTS = {
    "worker": {"worker": "worker_metrics_port", "worker-temporal": "worker_temporal_metrics_port"},
    "gateway": {"gateway": "gateway_metrics_port"},
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
        self.title = name.capitalize()
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
