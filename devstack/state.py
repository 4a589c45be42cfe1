"""The state directory: one folder that holds all a stack remembers from one start to the next.

```
lock            held by the supervisor that runs; two on one folder are refused
endpoints.json  where everything answers; present only while everything does
ports.json      the ports chosen once, used again while they are free
processes.json  what runs now, by process id and start time, so that a later start can end orphans
secrets.json    the database's password, for this folder's owner alone
ca/ ca.passphrase  the keys of the certificate authorities, encrypted, and what opens them
tls/            certificates of the services (devstack/identity.py)
keys/ postgres/ temporal/ broker/ store/ logs/
```
"""

import contextlib
import fcntl
import json
import os
import random
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from devstack.process import Identity, kill_group, wait_until_gone
from models.errors import InvalidInputError, RefusedError
from models.settings import Endpoints

PORTS = range(15_000, 32_000)
"""Below the range that kernels give to outgoing connections (32768 up on Linux, 49152 up elsewhere): there, a client
that reconnects while its server is down can take the server's port, or connect to itself."""
ORPHAN_SECONDS = 15.0
_PRIVATE, _PASSABLE = 0o700, 0o711
_OF_OTHER_ACCOUNTS = ("postgres", "broker")
"""Their servers, started by root, run under accounts of their own and have to pass through to their data."""


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback interface now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file's content so that a reader sees the old or the new text, whole, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class StateDirectory:
    """One folder, made on first use and readable by its owner alone."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._files = threading.Lock()
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(_PASSABLE if os.geteuid() == 0 else _PRIVATE)

    def folder(self, name: str) -> Path:
        """A subfolder, made where it is missing."""
        path = self.path / name
        path.mkdir(exist_ok=True)
        path.chmod(_PASSABLE if os.geteuid() == 0 and name in _OF_OTHER_ACCOUNTS else _PRIVATE)
        return path

    def log(self, name: str) -> Path:
        """The log file of a piece."""
        return self.folder("logs") / f"{name}.log"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder. Raises RefusedError naming the process that holds it already."""
        with (self.path / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RefusedError(
                    f"cannot start a stack in {self.path}: process {file.read().strip() or 'unknown'} runs one there; "
                    "stop that one, or choose another folder with --state"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def port(self, name: str) -> int:
        """The port of this name: the one remembered while it is free, else another, remembered from now on."""
        with self._changing("ports.json") as ports:
            known = ports.pop(name, None)
            if known is None or not port_is_free(known):
                candidates = (random.choice(PORTS) for _ in range(10_000))
                known = next(port for port in candidates if port not in ports.values() and port_is_free(port))
            ports[name] = known
            return int(known)

    def secret(self, name: str) -> str:
        """The secret of this name, made on first use."""
        with self._changing("secrets.json") as known:
            return str(known.setdefault(name, secrets.token_urlsafe(24)))

    def record(self, name: str, identity: Identity | None, stop_signal: int = signal.SIGTERM) -> None:
        """Remember that a piece runs as this process, or (None) that it does not run."""
        with self._changing("processes.json") as processes:
            processes.pop(name, None)
            if identity is not None:
                processes[name] = {"pid": identity.pid, "started": identity.started, "signal": int(stop_signal)}

    def end_orphans(self) -> list[str]:
        """End what a supervisor that was killed has left running; the names of what had to be ended. Call locked."""
        recorded = {
            name: (Identity(entry["pid"], entry["started"]), entry["signal"])
            for name, entry in self._read("processes.json").items()
        }
        alive = [name for name, (identity, _) in recorded.items() if identity.alive()]
        groups = [
            identity.pid
            for name, (identity, _) in recorded.items()
            if name in alive or (identity.started > psutil.boot_time() and not psutil.pid_exists(identity.pid))
        ]
        for name in alive:
            identity, stop_signal = recorded[name]
            with contextlib.suppress(ProcessLookupError):
                os.kill(identity.pid, stop_signal)
        for identity in wait_until_gone([recorded[name][0] for name in alive], ORPHAN_SECONDS):
            with contextlib.suppress(ProcessLookupError):
                os.kill(identity.pid, signal.SIGKILL)
        for group in groups:
            kill_group(group)
        self._write("processes.json", {})
        return alive

    @property
    def endpoints_path(self) -> Path:
        """`endpoints.json`."""
        return self.path / "endpoints.json"

    def write_endpoints(self, endpoints: Endpoints) -> None:
        """Tell people and programs where everything answers."""
        write_atomically(self.endpoints_path, endpoints.model_dump_json(indent=2) + "\n")

    def remove_endpoints(self) -> None:
        """Take it back: something does not answer any more."""
        self.endpoints_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[dict[str, Any]]:
        """A file's content, written back when it has changed. Pieces are prepared in threads, hence the lock."""
        with self._files:
            content = self._read(name)
            before = json.dumps(content)
            yield content
            if json.dumps(content) != before:
                self._write(name, content)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InvalidInputError(f"cannot read {self.path / name}: expected JSON: {error}") from error
        return content

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(content, indent=2) + "\n")
