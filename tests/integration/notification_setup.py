"""A receiver of notifications, the file that names it, and alerts to tell it of."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from store.alerts import raise_alert
from store.engine import Database
from tests.integration.test_gateway_identity import until

SECRET, WRONG = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
PATH_SECRET = "/path-secret"


@dataclass
class Receiver:
    """An HTTP server on loopback that keeps what it is sent."""

    failures: int = 0
    """Requests it refuses before it takes one."""
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    taken: list[dict[str, Any]] = field(default_factory=list)
    on_request: Callable[[], None] = lambda: None
    server: Any = None

    def start(self) -> "Receiver":
        """Listen."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.requests.append(({k.lower(): v for k, v in self.headers.items()}, body))
                receiver.on_request()
                refused = len(receiver.requests) <= receiver.failures
                if not refused:
                    receiver.taken.append(json.loads(body))
                self.send_response(503 if refused else 204)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server.server_address[1]}{PATH_SECRET}"


def channels(folder: Path, receiver: Receiver, **given: Any) -> Path:
    """A notify file with one channel, `ops`."""
    path = folder / "notify.yaml"
    ops = {"name": "ops", "kind": "webhook", "url": receiver.url, "secret": SECRET} | given
    path.write_text(json.dumps({"channels": [ops]}))
    path.chmod(0o600)
    return path


async def hot(db: Database, count: int, rule: str = "overheating") -> None:
    """Alerts of devices motor-1 ..., each in a transaction of its own."""
    async with db.pool.connection() as connection:
        for number in range(1, count + 1):
            await raise_alert(connection, rule, f"motor-{number}", f"motor-{number}: cpuTemperature is 99")
            await connection.commit()


async def taken(receiver: Receiver, count: int, seconds: float = 40) -> list[dict[str, Any]]:
    """What it has taken, once that is so many."""

    async def enough() -> bool:
        return len(receiver.taken) >= count

    await until(enough, seconds)
    return receiver.taken
