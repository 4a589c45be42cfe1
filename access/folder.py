"""The folder that a Mosquitto reads: files replaced whole, and a note of the sessions that still have to end.

The note is written before the files, so that a keeper that is killed between the two, or before it has thrown everybody
out, does it after its next start.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from access.mosquitto import DEVICE_ACL, DEVICE_CAS, DEVICE_CRLS, ENGINE_ACL
from models.errors import UnavailableError

NAMES = (DEVICE_CRLS, DEVICE_CAS, DEVICE_ACL, ENGINE_ACL)
"""In the order of writing: a CA is never trusted before its revocation list is there, and the canary comes last."""

_PENDING = "pending-kicks.json"


class BrokerFolder:
    """Reads and replaces the files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, str]:
        """The files that are there, by name."""
        return {name: (self.path / name).read_text() for name in NAMES if (self.path / name).exists()}

    def write(self, files: Mapping[str, str]) -> None:
        """Replace what differs; a reader, and a machine that loses power, sees the old or the new text, whole.

        Readable by all: the broker has an account of its own, and nothing in them is secret.
        """
        for name in NAMES:
            path = self.path / name
            if not path.exists() or path.read_text() != files[name]:
                _replace(path, files[name])

    def pending(self) -> frozenset[str]:
        """Devices whose session has to end."""
        try:
            return frozenset(json.loads((self.path / _PENDING).read_text()))
        except FileNotFoundError:
            return frozenset()

    def add_pending(self, devices: Iterable[str]) -> None:
        """Note these too."""
        wanted = self.pending() | set(devices)
        if wanted != self.pending():
            _replace(self.path / _PENDING, json.dumps(sorted(wanted)))

    def remove_pending(self, devices: Iterable[str]) -> None:
        """These are out."""
        left = self.pending() - set(devices)
        if left:
            _replace(self.path / _PENDING, json.dumps(sorted(left)))
        else:
            (self.path / _PENDING).unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def broker_process(pid_file: Path) -> psutil.Process:
    """The Mosquitto of this process id file.

    Raises UnavailableError when it does not run: also when the number belongs to another program by now, which a signal
    could end.
    """
    try:
        process = psutil.Process(int(pid_file.read_text()))
        name = process.name()
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess) as error:
        raise UnavailableError(f"cannot reach Mosquitto: {pid_file} names no running process: {error}") from error
    if "mosquitto" not in name:
        raise UnavailableError(f"cannot reach Mosquitto: {pid_file} names process {process.pid}, which is {name!r}")
    return process
