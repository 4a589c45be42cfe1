"""Worker and gateway under the stack: ready when they say so, back by themselves after a crash, on loopback only."""

import asyncio
import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from devstack.broker import mosquitto_binary
from devstack.postgres import make_passable
from devstack.stack import EmbeddedStack
from devstack.supervisor import PieceEvent
from models.settings import Settings


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A state directory that a server's own account can reach."""
    opened = make_passable(tmp_path / "state")
    yield tmp_path / "state"
    for parent in opened:
        parent.chmod(parent.stat().st_mode & ~stat.S_IXOTH)


async def test_the_services_run_are_restarted_after_a_crash_and_stay_down_when_killed_on_purpose(
    folder: Path,
) -> None:
    events: list[PieceEvent] = []
    services = ("worker", "gateway", "enrolment", *(("access",) if mosquitto_binary() else ()))
    without = set() if mosquitto_binary() else {"access"}
    async with EmbeddedStack(folder, settings=Settings(), listener=events.append) as stack:
        metrics = json.loads((folder / "endpoints.json").read_text())["metrics"]
        assert set(metrics) == {"artifacts", "gateway", "worker", "worker-temporal", "access", "enrolment"} - without
        async with httpx.AsyncClient(trust_env=False) as http:
            for name, url in metrics.items():
                text = (await http.get(url)).text
                assert (f'tidegate_ready{{process="{name}"}} 1.0' in text) == (name != "worker-temporal")
        for name in services:
            for pid in stack.pids()[name]:
                for connection in psutil.Process(pid).net_connections("tcp"):
                    assert connection.laddr.ip == "127.0.0.1"

        events.clear()
        crashed = {name: stack.pids()[name][0] for name in services}
        for pid in crashed.values():
            psutil.Process(pid).kill()
        async with asyncio.timeout(40):
            while {event.piece.name for event in events if event.kind == "started"} != set(crashed):
                await asyncio.sleep(0.05)
        assert all(stack.pids()[name][0] != pid for name, pid in crashed.items())

        stack.kill("worker")
        began = time.monotonic()
        while time.monotonic() < began + 1:
            assert "worker" not in stack.pids()
            await asyncio.sleep(0.05)
        await stack.start("worker")
        assert "worker" in stack.pids()


async def test_a_worker_can_be_left_out_and_started_later(folder: Path) -> None:
    async with EmbeddedStack(folder, settings=Settings(), worker=False, gateway=False, enrolment=False) as stack:
        assert not {"worker", "gateway", "enrolment"} & stack.pids().keys()
        await stack.start("worker")
        assert "worker" in stack.pids()
        assert stack.endpoints.metrics["worker"].startswith("http://127.0.0.1:")
        assert "worker" in json.loads((folder / "endpoints.json").read_text())["metrics"]
