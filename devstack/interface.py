"""What a piece of the stack is: how it is launched, when it answers, and what it tells others.

A piece starts nothing by itself and keeps no process: `process.py` runs what `launch()` describes, so that every
piece is started, watched, killed and recovered in one way.
"""

import signal
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One program to run. `account`: the user to become, where we are root. Signals end it politely."""

    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    account: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 15.0


class Piece(ABC):
    """One server of the stack. `name` is what `stack.kill(name)` takes; `title` is for people."""

    name: str
    title: str
    ready_seconds: float = 60.0

    def prepare(self) -> None:  # noqa: B027, a step that not every piece has
        """Make on disk what the server needs before it can start. Blocking; may be called again before a restart."""

    @abstractmethod
    def launch(self) -> Launch:
        """The program, with addresses chosen."""

    @abstractmethod
    async def answers(self) -> bool:
        """Whether the server does its work now. False, or an OSError, while it does not yet."""

    async def complete(self) -> None:  # noqa: B027, likewise
        """What is done once it answers for the first time, as creating a database."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Where it answers, without secrets; for people."""

    def endpoints(self) -> dict[str, Any]:
        """The fields of `models.settings.Endpoints` that this piece fills."""
        return {}
