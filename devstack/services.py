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
        self._port = 0

    def prepare(self) -> None:
        """Choose the port of its metrics."""
        wanted: int = getattr(self._settings, f"{self.name}_metrics_port")
        self._port = wanted or self._state.port(f"{self.name}-metrics")

    def launch(self) -> Launch:
        """The program, with the addresses of the stack in its environment."""
        port = {f"TIDEGATE_{self.name.upper()}_METRICS_PORT": str(self._port)}
        return Launch(command=COMMANDS[self.name], environment=self._environment() | port, stop_seconds=STOP_SECONDS)

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
        return f"http://{self._settings.metrics_host}:{self._port}/metrics"

    @property
    def address(self) -> str:
        """Only its metrics can be asked; it listens on nothing else."""
        return f"metrics {self.metrics_url}"

    def endpoints(self) -> dict[str, Any]:
        """Its metrics."""
        return {"metrics": {self.name: self.metrics_url}}
