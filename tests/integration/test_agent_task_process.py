"""Tasks of fleet jobs on the agent as a process, over a real broker: restarts, kill -9, and a program of the device's own."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.agent_standin import Publisher
from tests.conftest import Broker
from tests.integration.test_agent_process import THING, Rig, image
from tests.task_standin import Tasked, TaskPublisher, queue_task


@pytest_asyncio.fixture
async def rig(tmp_path: Path, broker: Broker) -> AsyncIterator[Rig]:
    publisher: Publisher = TaskPublisher()
    rig = Rig(tmp_path, broker, publisher)
    async with rig.gateway.running():
        yield rig
        if rig.process is not None and rig.process.returncode is None:
            await rig.end(signal.SIGKILL)


async def test_a_restart_is_a_new_program_that_reports_its_own_boot_id(rig: Rig) -> None:
    await rig.start("--heartbeat", "0.2")
    async with asyncio.timeout(40):
        while not rig.gateway.heartbeats:
            await asyncio.sleep(0.05)
    before = rig.gateway.heartbeats[0]["bootId"]
    queue_task(rig.jobs, THING, "_restart", Tasked("restart"))
    await rig.gateway.hint(THING)
    job = await rig.settled()
    assert job.status == "SUCCEEDED" and job.details["bootId"] != before
    async with asyncio.timeout(40):
        while rig.gateway.heartbeats[-1]["bootId"] != job.details["bootId"]:
            await asyncio.sleep(0.05)
    assert rig.log.read_text().count("reset (requested)") == 1
    assert await rig.end() == 0


async def test_kill_9_while_a_custom_program_runs_is_reported_once_as_a_power_failure(rig: Rig, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho begun >> {tmp_path}/begun\nexec sleep 30\n")
    program.chmod(0o755)
    queue_task(rig.jobs, THING, "_custom", Tasked("custom", {"do": "it"}))
    await rig.start("--custom-command", str(program))
    async with asyncio.timeout(40):
        while not (tmp_path / "begun").exists():
            await asyncio.sleep(0.05)
    await rig.end(signal.SIGKILL)
    await rig.start("--custom-command", str(program))
    job = await rig.settled()
    assert (job.status, job.details["failure"]) == ("FAILED", "power")
    assert (tmp_path / "begun").read_text() == "begun\n"


async def test_a_device_that_knows_no_custom_operation_rejects_it_and_goes_on(rig: Rig) -> None:
    queue_task(rig.jobs, THING, "_custom", Tasked("custom", {"do": "it"}))
    await rig.start()
    assert (await rig.settled()).status == "REJECTED"
    await rig.gateway.configure(THING, 3, {"colour": "blue"})
    queue_task(rig.jobs, THING, "_config", Tasked("config-sync", {"configVersion": 3}))
    await rig.gateway.hint(THING)
    job = await rig.settled()
    assert (job.status, job.details["configVersion"]) == ("SUCCEEDED", "3")
    assert rig.gateway.reported[THING] == {"version": 3, "config": {"colour": "blue"}}


async def test_firmware_is_still_firmware_on_a_device_that_does_tasks(rig: Rig) -> None:
    rig.jobs.queue(THING, "job", rig.publisher.publish(image("1.3.0"), "1.3.0"))
    await rig.start()
    job = await rig.settled()
    assert (job.status, job.details["failure"]) == ("FAILED", "network")  # nobody serves artifacts here
