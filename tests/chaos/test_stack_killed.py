"""`kill -9` of `starter.py up` itself in the middle of a wave: the next start resumes and the rollout goes on.

With it go PostgreSQL, Temporal, the broker, the worker and the gateway, all at one moment, as when a machine is switched
off. The devices are a process of their own and stay.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psycopg
import pytest

from devstack.postgres import make_passable
from devstack.stack import EmbeddedStack
from firmware.keys import generate_private_key
from models.ids import rollout_workflow_id
from models.rollout import RolloutResult, StartRolloutInput
from models.settings import Endpoints
from store.engine import Database
from store.rollouts import RolloutStore
from tests.chaos.test_kill_nine import DEVICES, check, digest, second_wave, start_fleet
from tests.integration.rollout_setup import add_devices, add_release, recount, specification
from workflows.client import connect, start_rollout

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

ROOT = Path(__file__).parent.parent.parent
VERSION = "2.1.0"


class Up:
    """`starter.py up` on one state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Endpoints:
        """Start it and wait for what it writes when all answers."""
        path = self.state / "endpoints.json"
        path.unlink(missing_ok=True)
        log = (self.state.parent / "up.log").open("ab")
        command = [sys.executable, str(ROOT / "starter.py"), "up", "--open-mqtt", "--state", str(self.state)]
        with log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 90
        while not path.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, (
                self.state.parent / "up.log"
            ).read_text()
            time.sleep(0.05)
        return Endpoints.model_validate(json.loads(path.read_text()))

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """Ctrl-C; its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


async def test_a_rollout_goes_on_after_the_whole_stack_was_killed(tmp_path: Path) -> None:
    make_passable(tmp_path / "state")
    up = Up(tmp_path / "state")
    fleet: subprocess.Popen[bytes] | None = None
    try:
        endpoints = await asyncio.to_thread(up.start)
        fleet = await begin(endpoints, tmp_path)
        up.kill()
        again = await asyncio.to_thread(up.start)
        assert again == endpoints, "devices, people and programs find everything where it was"
        check(await end(again, tmp_path, fleet))
        assert await asyncio.to_thread(up.stop) == 0
    finally:
        up.kill()
        if fleet is not None:
            fleet.kill()
            fleet.wait()


async def begin(endpoints: Endpoints, folder: Path) -> "subprocess.Popen[bytes]":
    """A rollout that is in the middle of its second wave, and its devices."""
    db = Database(str(endpoints.database_url))
    await db.open()
    key = generate_private_key()
    await add_devices(db, DEVICES, "all")
    await add_release(db, key, VERSION, digest(VERSION))
    addresses = cast(EmbeddedStack, SimpleNamespace(endpoints=endpoints, env=lambda: dict(os.environ)))
    fleet = start_fleet(addresses, folder, "all", key.public_key())
    spec = specification(
        name="all",
        release=f"motor-controller@{VERSION}",
        target={"ids": [f"all-{i}" for i in range(1, DEVICES + 1)]},
        waves=[{"name": "canary", "size": "10%"}, {"name": "fleet", "size": "100%"}],
        pace={"in_flight": 6, "per_minute": None},
    )
    client = await connect(str(endpoints.temporal_address))
    await start_rollout(client, StartRolloutInput(spec=spec, requested_by="test"))
    await second_wave(RolloutStore(db), "all")
    await db.close()
    return fleet


async def end(endpoints: Endpoints, folder: Path, fleet: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """What the workflow, PostgreSQL and the devices say when it is over."""
    client = await connect(str(endpoints.temporal_address))
    handle = client.get_workflow_handle(rollout_workflow_id("all"), result_type=RolloutResult)
    result = await asyncio.wait_for(handle.result(), 120)
    await asyncio.sleep(0.5)
    fleet.send_signal(signal.SIGTERM)
    await asyncio.to_thread(fleet.wait, 30)
    db = Database(str(endpoints.database_url))
    await db.open()
    view = await RolloutStore(db).show("all")
    with psycopg.connect(db.url) as connection:
        row = connection.execute("SELECT count(*) FROM executions WHERE execution_number > 1").fetchone()
    assert row == (0,)
    miscounted = await recount(db, view.job_no)
    await db.close()
    return {
        "result": result,
        "view": view,
        "miscounted": miscounted,
        "devices": json.loads((folder / "report.json").read_text())["devices"],
        "version": VERSION,
    }
