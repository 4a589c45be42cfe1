"""A whole running stack with its command line, and fleets of agents, for tests of the command line."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from devstack.postgres import make_passable
from tests.cli_runner import Ran, run

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Plant:
    """A running stack, its command line, and devices in groups that do not meet."""

    folder: Path
    up: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        return {"TIDEGATE_STATE_DIR": str(self.folder / "state"), "TIDEGATE_ACTOR": "anna"}

    def run(self, *words: object) -> Ran:
        """Run a command."""
        return run(*words, **self.environment)

    def spec(self, name: str, group: str, version: str = "1.3.0", **changes: Any) -> Path:
        """A specification for one group of devices, in a file (JSON is YAML)."""
        found: dict[str, Any] = {
            "name": name,
            "release": f"motor-controller@{version}",
            "target": {"tags": {"group": group}},
            "waves": [{"name": "canary", "size": "25%"}, {"name": "fleet", "size": "100%"}],
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps({**found, **changes}))
        return path

    def until(self, name: str, phase: str) -> None:
        """Wait until a rollout is in a phase."""
        deadline = time.monotonic() + 30
        while (found := self.run("rollout", "show", name, "--json").json["phase"]) != phase:
            assert time.monotonic() < deadline, f"{name} is {found}, expected {phase}"
            time.sleep(0.1)

    def worker(self) -> psutil.Process:
        """The stack's worker."""
        children = psutil.Process(self.up.pid).children(recursive=True)
        return next(child for child in children if any("worker.py" in part for part in child.cmdline()))


@contextmanager
def running(folder: Path) -> Iterator[Plant]:
    """A stack, until the end of the block."""
    make_passable(folder / "state")
    command = [sys.executable, "starter.py", "up", "--open-mqtt", "--state", str(folder / "state")]
    with (folder / "up.log").open("wb") as log:
        up = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            wait_for(folder / "state" / "endpoints.json", up)
            yield Plant(folder, up)
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(30)


@contextmanager
def fleet_of(plant: Plant, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """The devices of `fleet.jsonl` with the image `1.2.0.bin`, connected, until the end of the block."""
    folder = plant.folder
    endpoints = json.loads((folder / "state" / "endpoints.json").read_text())
    command = [sys.executable, "-m", "agent.fleet", "--devices-file", str(folder / "fleet.jsonl")]
    command += ["--base", str(folder / "1.2.0.bin"), "--release-key", str(folder / "release.pub")]
    command += ["--order-key", str(Path(endpoints["order_key"]).with_suffix(".pub"))]
    command += ["--mqtt", endpoints["open_mqtt_url"], "--poll", "2", "--retry", "0.5"]
    command += ["--ready-file", str(folder / "ready"), *words]
    with (folder / "fleet.log").open("wb") as log:
        fleet = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            wait_for(folder / "ready", fleet)
            yield fleet
        finally:
            fleet.send_signal(signal.SIGTERM)
            fleet.wait(30)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the file is there; the process has to live as long."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, path
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def on_a_terminal(plant: Plant, *words: str) -> str:
    """What a command shows a person, colours and what is drawn over included; it has to succeed."""
    primary, secondary = pty.openpty()
    environment = {**os.environ, **plant.environment, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    command = [sys.executable, "starter.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=secondary, stderr=secondary, env=environment)
    os.close(secondary)
    seen = b""
    while select.select([primary], [], [], 30)[0]:
        try:
            chunk = os.read(primary, 65536)
        except OSError:  # the other end is closed
            break
        seen += chunk
    os.close(primary)
    assert process.wait(10) == 0
    return seen.decode()
