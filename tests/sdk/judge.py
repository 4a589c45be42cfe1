"""What every judge can do, whichever SDK it drives: ask, be answered, and hear events, all in the words of the wire.

A judge turns a request of the protocol into the call that its SDK has for it, and what the SDK hands back into a plain
dictionary with the wire's names and epoch seconds. What the SDK drops, misreads or waits for in vain is so seen here.
"""

import queue
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from models.protocol import Verb
from tests.integration.access_setup import Credentials

ANSWER_SECONDS = 20.0
EVENTS = ("delta", "documents", "notify", "notify-next")


@dataclass(frozen=True)
class Answer:
    """What came back for a request."""

    accepted: bool
    body: dict[str, Any]

    @property
    def code(self) -> Any:
        """Why it was rejected; None when it was not."""
        return None if self.accepted else self.body.get("code")


@dataclass
class Events:
    """What an SDK has heard without having asked for it, by kind and shadow."""

    queues: dict[tuple[str, str], "queue.Queue[dict[str, Any]]"] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, kind: str, shadow: str = "") -> "queue.Queue[dict[str, Any]]":
        with self.lock:
            return self.queues.setdefault((kind, shadow), queue.Queue())

    def put(self, kind: str, shadow: str, body: dict[str, Any]) -> None:
        self.of(kind, shadow).put(body)

    def next(self, kind: str, shadow: str = "", seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """The next one; fails when none comes."""
        try:
            return self.of(kind, shadow).get(timeout=seconds)
        except queue.Empty:
            raise AssertionError(f"no {kind} event reached the SDK within {seconds} s") from None

    def none(self, kind: str, shadow: str = "") -> bool:
        return self.of(kind, shadow).empty()


class Judge(ABC):
    """An SDK, connected as one device."""

    named = True
    """Whether the SDK knows named shadows."""
    names_versions = True
    """Whether an application can say which version of a shadow its update expects. Otherwise the SDK says it itself."""

    def __init__(self, host: str, port: int, who: Credentials) -> None:
        self.host, self.port, self.who, self.thing = host, port, who, who.name
        self.events = Events()

    @abstractmethod
    def open(self, shadows: tuple[str, ...]) -> None:
        """Connect, and listen to the events about jobs and about these shadows."""

    @abstractmethod
    def ask(self, verb: Verb, body: dict[str, Any] | None = None, *, shadow: str = "", job: str = "") -> Answer:
        """Ask by the SDK's own call, and wait for its answer."""

    @abstractmethod
    def close(self) -> None:
        """Disconnect; nothing of the SDK runs on."""

    def ask_patiently(self, verb: Verb, seconds: float = 90, **more: Any) -> Answer:
        """As an application does over an outage: until an answer has come."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.ask(verb, **more)
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
