"""`kill -9` of the worker, the gateway and Temporal in the middle of a wave: the rollout ends as if nothing had been.

A whole embedded stack, three hundred simulated devices in a process of their own, and real signals. What is looked at
is the result of the workflow, PostgreSQL, and how often each device wrote a slot.
"""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from devstack.stack import EmbeddedStack
from firmware.keys import generate_private_key, save_public_key
from models.rollout import Outcome, RolloutResult, StartRolloutInput
from models.settings import Settings
from store.engine import Database
from store.rollouts import RolloutStore
from tests.integration.rollout_setup import OLD, add_devices, add_release, recount, specification
from workflows.client import connect, start_rollout

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

DEVICES = 300


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedStack]:
    state = tmp_path_factory.mktemp("chaos")
    async with EmbeddedStack(state, settings=Settings(state_dir=state), open_mqtt=True) as running:
        yield running


def digest(version: str) -> str:
    return version.encode().hex().ljust(64, "0")


async def roll_and_kill(stack: EmbeddedStack, tmp_path: Path, version: str, *victims: str) -> dict[str, Any]:
    """Roll `version` out to devices of their own, kill the victims in the second wave, and gather what was left."""
    db = Database(str(stack.endpoints.database_url))
    await db.open()
    fleet: subprocess.Popen[bytes] | None = None
    try:
        name = "-".join(victims)
        key = generate_private_key()
        await add_devices(db, DEVICES, name)
        await add_release(db, key, version, digest(version))
        fleet = start_fleet(stack, tmp_path, name, key.public_key())
        client = await connect(str(stack.endpoints.temporal_address))
        waves = [{"name": "canary", "size": "10%"}, {"name": "fleet", "size": "100%"}]
        spec = specification(
            name=f"rollout-{name}",
            release=f"motor-controller@{version}",
            target={"ids": [f"{name}-{i}" for i in range(1, DEVICES + 1)]},
            waves=waves,
            pace={"in_flight": 6, "per_minute": None},
        )
        handle = await start_rollout(client, StartRolloutInput(spec=spec, requested_by="test"))
        store = RolloutStore(db)
        job_no = await second_wave(store, spec.name)
        for victim in victims:
            stack.kill(victim)
        await asyncio.sleep(1.0)
        for victim in reversed(victims):
            await stack.start(victim)
        client = await connect(str(stack.endpoints.temporal_address))
        handle = client.get_workflow_handle(handle.id, result_type=RolloutResult)
        result = await asyncio.wait_for(handle.result(), 120)
        await asyncio.sleep(0.5)
        fleet.send_signal(signal.SIGTERM)
        await asyncio.to_thread(fleet.wait, 30)
        return {
            "result": result,
            "view": await store.show(spec.name),
            "miscounted": await recount(db, job_no),
            "devices": json.loads((tmp_path / "report.json").read_text())["devices"],
            "version": version,
        }
    finally:
        if fleet is not None and fleet.poll() is None:
            fleet.kill()
            fleet.wait()
        await db.close()


async def second_wave(store: RolloutStore, name: str) -> int:
    async with asyncio.timeout(60):
        while True:
            await asyncio.sleep(0.02)
            views = [view for view in await store.list_rollouts() if view.name == name]
            if views and len(views[0].waves) > 1 and views[0].waves[1].counts.terminal >= 20:
                assert views[0].waves[1].counts.outstanding > 100, "the wave was over before anything could be killed"
                return views[0].job_no


def start_fleet(stack: EmbeddedStack, folder: Path, prefix: str, release_key: Any) -> "subprocess.Popen[bytes]":
    save_public_key(folder / "release.pub", release_key)
    endpoints = stack.endpoints
    command = [sys.executable, "-m", "agent.fleet", "--simulate", "--devices", str(DEVICES), "--prefix", f"{prefix}-"]
    command += ["--type", "motor", "--product", "motor-controller", "--base-version", "1.2.0", "--base-sha256", OLD]
    command += ["--release-key", str(folder / "release.pub")]
    command += ["--order-key", str(Path(str(endpoints.order_key)).with_suffix(".pub"))]
    command += ["--mqtt", str(endpoints.open_mqtt_url), "--retry", "1", "--answer-within", "2"]
    command += ["--poll", "5", "--ready-file", str(folder / "ready"), "--report", str(folder / "report.json")]
    process = subprocess.Popen(command, env=stack.env())
    while not (folder / "ready").exists():
        assert process.poll() is None, "the fleet ended before it was connected"
        signal.sigtimedwait([], 0.05)
    return process


def check(ended: dict[str, Any]) -> None:
    result: RolloutResult = ended["result"]
    assert result.outcome is Outcome.SUCCEEDED, result.reason
    assert (result.devices, result.succeeded, result.failed, result.exposed) == (DEVICES, DEVICES, 0, DEVICES)
    assert ended["miscounted"] == []
    assert ended["view"].in_flight == 0
    assert {device["installs"] for device in ended["devices"]} == {1}, "a device installed twice, or never"
    assert {device["sha256"] for device in ended["devices"]} == {digest(ended["version"])}
    assert len(ended["devices"]) == DEVICES


async def test_a_rollout_survives_the_worker_being_killed(stack: EmbeddedStack, tmp_path: Path) -> None:
    check(await roll_and_kill(stack, tmp_path, "2.0.1", "worker"))


async def test_a_rollout_survives_the_gateway_being_killed(stack: EmbeddedStack, tmp_path: Path) -> None:
    check(await roll_and_kill(stack, tmp_path, "2.0.2", "gateway"))


async def test_a_rollout_survives_temporal_being_killed(stack: EmbeddedStack, tmp_path: Path) -> None:
    check(await roll_and_kill(stack, tmp_path, "2.0.3", "temporal"))


async def test_a_rollout_survives_everything_but_the_data_being_killed(stack: EmbeddedStack, tmp_path: Path) -> None:
    check(await roll_and_kill(stack, tmp_path, "2.0.4", "gateway", "worker", "temporal", "broker"))
