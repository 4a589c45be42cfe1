"""`up` as a process: what a person's Ctrl-C, a service manager's SIGTERM and a `kill -9` leave behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from devstack.interface import Launch
from devstack.postgres import make_passable
from devstack.process import Identity, ManagedProcess, wait_until_gone

UP = "import typer; from cli.up import up; app = typer.Typer(); app.command()(up); app()"
Starter = Callable[[], subprocess.Popen[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state directory that a server's own account can reach."""
    make_passable(tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def start(folder: Path) -> Iterator[Starter]:
    """Starts `up` without worker and gateway; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", UP, "--state", str(folder), "--no-worker", "--no-gateway"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def until_ready(folder: Path, process: subprocess.Popen[str]) -> dict[str, str]:
    """The content of endpoints.json once it is there."""
    deadline = time.monotonic() + 60
    while not (folder / "endpoints.json").exists():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found: dict[str, str] = json.loads((folder / "endpoints.json").read_text())
    return found


def children(process: subprocess.Popen[str]) -> list[Identity]:
    return [Identity(child.pid, child.create_time()) for child in psutil.Process(process.pid).children(recursive=True)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_takes_the_addresses_back(
    folder: Path, start: Starter, number: signal.Signals
) -> None:
    process = start()
    until_ready(folder, process)
    family = children(process)
    assert len(family) >= 4
    if os.geteuid() == 0:
        accounts = {child.name(): child.username() for child in psutil.Process(process.pid).children()}
        assert accounts["postgres"] == "embedded_postgres"
        assert accounts.get("mosquitto", "mosquitto") in ("mosquitto", "nobody")
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert output.rstrip().endswith("Stopped.")
    assert wait_until_gone(family, 0.1) == []
    assert not (folder / "endpoints.json").exists()
    assert "database system is shut down" in (folder / "logs" / "postgres.log").read_text()


def test_a_signal_during_the_start_takes_the_start_back(folder: Path, start: Starter) -> None:
    process = start()
    deadline = time.monotonic() + 30
    while not (folder / "logs" / "temporal.log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = children(process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert wait_until_gone(family, 0.1) == []
    assert not (folder / "endpoints.json").exists()


def test_after_kill_9_of_the_supervisor_nothing_runs_on_and_the_next_start_resumes(
    folder: Path, start: Starter
) -> None:
    process = start()
    first = until_ready(folder, process)
    with psycopg.connect(first["database_url"], autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    family = children(process)
    process.kill()
    process.wait()
    if sys.platform == "linux":
        assert wait_until_gone(family, 15) == []
    # What the killed one could not take back must not send anybody to a stack that is not there.
    assert (folder / "endpoints.json").exists()
    again = start()
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline
        try:
            with psycopg.connect(first["database_url"]) as connection:
                row = connection.execute("SELECT answer FROM kept").fetchone()
            break
        except psycopg.OperationalError:
            assert again.poll() is None, again.stdout and again.stdout.read()
            time.sleep(0.1)
    assert row == (42,)
    until_ready(folder, again)
    assert json.loads((folder / "endpoints.json").read_text()) == first


def test_what_a_killed_supervisor_left_running_is_ended_by_the_next_start(folder: Path, tmp_path: Path) -> None:
    from devstack.state import StateDirectory

    # A program that outlived its supervisor, as on a system that has no signal for a parent's death, with a child.
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    orphan = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        state = StateDirectory(folder)
        identity = Identity.of(orphan.pid)
        state.record("worker", identity)
        # The number of a process of ours that has ended, given to another program since.
        state.record("gateway", Identity(bystander.pid, Identity.of(bystander.pid).started - 3600))
        while not psutil.Process(orphan.pid).children():
            time.sleep(0.02)
        family = [identity, *(Identity.of(child.pid) for child in psutil.Process(orphan.pid).children())]
        assert state.end_orphans() == ["worker"]
        assert wait_until_gone(family, 5) == []
        assert bystander.poll() is None
        assert state.end_orphans() == []
    finally:
        for process in (orphan, bystander):
            process.kill()
            process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_program_does_not_outlive_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from devstack.interface import Launch; "
        "from devstack.process import ManagedProcess; "
        "p = ManagedProcess(Launch(('/bin/sleep', '600')), Path(sys.argv[1])); print(p.pid, flush=True); "
        "sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout and parent.stdin
    child = Identity.of(int(parent.stdout.readline()))
    deadline = time.monotonic() + 10
    while psutil.Process(child.pid).name() != "sleep":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    assert wait_until_gone([child], 5) == []


async def test_a_program_that_ignores_the_polite_signal_is_killed_with_all_it_started(tmp_path: Path) -> None:
    script = "trap '' TERM; /bin/sleep 600 & echo ready; while true; do /bin/sleep 1; done"
    process = ManagedProcess(Launch(("/bin/sh", "-c", script), stop_seconds=0.3), tmp_path / "log")
    while "ready" not in process.new_log():
        await asyncio.sleep(0.01)
    family = [Identity.of(pid) for pid in process.pids()]
    assert len(family) >= 2
    await process.stop()
    assert process.exit_code == -signal.SIGKILL
    assert wait_until_gone(family, 1) == []
