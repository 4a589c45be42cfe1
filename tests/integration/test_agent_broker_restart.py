"""THREATS row 51, the device's part: the broker goes away in the middle of an update and comes back empty.

No device installs twice, and every device finishes: nothing that a device needs was kept by the broker.
"""

import asyncio
import contextlib
import random
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import aiomqtt
import pytest

from agent.client import Broker as Address
from agent.client import Patience
from agent.device import Timing
from agent.faults import FaultPlan
from agent.fleet import FleetConfig, FleetDevice, run_fleet
from tests import conftest
from tests.agent_standin import Publisher, StandInGateway, StandInJobs, serving_artifacts, sha256

BASE = random.Random(51).randbytes(9_000)
NEW = BASE[:5000] + b"new" + BASE[5000:]
DEVICES = tuple(FleetDevice(f"unit-{number}", "motor") for number in range(30))


def start_broker(folder: Path, port: int) -> subprocess.Popen[bytes]:
    folder.mkdir()
    start = conftest._mosquitto if conftest.mosquitto_binary() else conftest._nats
    process = start(folder, port)
    conftest.wait_for_port(port, process)
    return process


@contextlib.asynccontextmanager
async def gateway(jobs: StandInJobs, port: int) -> AsyncIterator[None]:
    with contextlib.suppress(aiomqtt.MqttError):
        async with StandInGateway(jobs, "127.0.0.1", port).running():
            yield


async def until(reached: Callable[[], bool], seconds: float = 40) -> None:
    async with asyncio.timeout(seconds):
        while not reached():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("mode", ["real", "simulated", "simulated on shared connections"])
async def test_a_broker_that_restarts_in_the_middle_costs_no_second_install(mode: str, tmp_path: Path) -> None:
    async with serving_artifacts(conftest.free_port()) as publisher:
        await restart_in_the_middle(mode, tmp_path, publisher)


async def restart_in_the_middle(mode: str, tmp_path: Path, publisher: Publisher) -> None:
    jobs = StandInJobs(publisher)
    release = publisher.publish(NEW, "1.3.0", bases=(BASE,))
    for device in DEVICES:
        jobs.queue(device.device_id, "job", release)
    port, stop = conftest.free_port(), asyncio.Event()
    (tmp_path / "base.bin").write_bytes(BASE)
    config = FleetConfig(
        devices=DEVICES,
        keys=publisher.keys,
        broker=Address("127.0.0.1", port),
        faults=FaultPlan(),
        base_sha256=sha256(BASE),
        timing=Timing(retry_seconds=0.2, heartbeat_seconds=0),
        patience=Patience(answer_seconds=1, reconnect_seconds=0.2),
        simulate=mode != "real",
        connections=3 if "shared" in mode else None,
    )
    config = replace(config, base=tmp_path / "base.bin", state_dir=tmp_path / "fleet")
    broker = start_broker(tmp_path / "first", port)
    async with gateway(jobs, port):
        fleet = asyncio.create_task(run_fleet(config, stop))
        await until(lambda: len(jobs.log) >= 5)
        broker.kill()
        broker.wait()
    broker = start_broker(tmp_path / "second", port)
    try:
        async with gateway(jobs, port):
            await until(lambda: all(job.status == "SUCCEEDED" for job in jobs.jobs.values()))
            await asyncio.sleep(2)  # the last answers are on their way
            stop.set()
            report = await fleet
    finally:
        broker.terminate()
        broker.wait()
    assert all(device.installs == 1 for device in report.devices)
    assert {device.sha256 for device in report.devices} == {sha256(NEW)}
    assert sum(status == "SUCCEEDED" for _, status, _ in jobs.log) == len(DEVICES)
