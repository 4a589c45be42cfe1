"""Fleets on a real broker: real devices and simulated ones meet the fates that their seed says."""

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import pytest_asyncio

from agent.client import Broker as Address
from agent.client import Patience
from agent.device import Timing
from agent.faults import Fate, FaultPlan, FaultRule
from agent.fleet import FleetConfig, FleetDevice, FleetReport, read_devices, run_fleet
from agent.slots import TRIES
from firmware.keys import save_public_key
from models.errors import InvalidInputError
from tests.agent_standin import FINAL, Publisher, StandInGateway, StandInJobs, serving_artifacts, sha256
from tests.conftest import Broker, free_port

BASE = random.Random(60).randbytes(30_000)
NEW = BASE[:10_000] + b"new" + BASE[10_000:]
DEVICES = tuple(FleetDevice(f"unit-{number}", "motor") for number in range(16))
FAULTS = FaultPlan(5, (FaultRule.parse("version=1.3.0,fail=20%,crash=20%,no-confirm=10%,silent=10%"),))
FATES = {device.device_id: FAULTS.fate(device.device_id, "1.3.0") for device in DEVICES}


class Plant:
    """A stand-in gateway with artifacts."""

    def __init__(self, publisher: Publisher, broker: Broker) -> None:
        self.publisher, self.broker = publisher, broker
        self.jobs = StandInJobs(publisher)
        self.gateway = StandInGateway(self.jobs, broker.host, broker.port)

    def queue_all(self) -> None:
        release = self.publisher.publish(NEW, "1.3.0", bases=(BASE,))
        for device in DEVICES:
            self.jobs.queue(device.device_id, "job", release)

    def config(self, **changes: object) -> FleetConfig:
        config = FleetConfig(
            devices=DEVICES,
            keys=self.publisher.keys,
            broker=Address(self.broker.host, self.broker.port),
            faults=FAULTS,
            base_version="1.2.0",
            base_sha256=sha256(BASE),
            timing=Timing(retry_seconds=0.2, confirm_seconds=1.5, heartbeat_seconds=0),
            patience=Patience(answer_seconds=1),
        )
        return replace(config, **changes)  # type: ignore[arg-type]

    async def run(self, config: FleetConfig, seconds: float = 60) -> FleetReport:
        """Until every device that is not silent has ended its job."""
        stop = asyncio.Event()
        task = asyncio.create_task(run_fleet(config, stop))
        speaking = [d.device_id for d in config.devices if config.faults.fate(d.device_id, "1.3.0") is not Fate.SILENT]
        async with asyncio.timeout(seconds):
            while any(self.jobs.jobs[name].status not in FINAL for name in speaking if name in self.jobs.jobs):
                assert not task.done(), task.result()
                await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)
        stop.set()
        return await task


@pytest_asyncio.fixture
async def plant(broker: Broker) -> AsyncIterator[Plant]:
    async with serving_artifacts(free_port()) as publisher:
        plant = Plant(publisher, broker)
        async with plant.gateway.running():
            yield plant


def check_fates(plant: Plant, report: FleetReport) -> None:
    """Every device ended as its fate says: on the server, in its slots, and in how often it booted and wrote."""
    assert set(FATES.values()) == set(Fate), "the seed does not show every fate"
    for device in report.devices:
        fate, job = FATES[device.device_id], plant.jobs.jobs[device.device_id]
        good = fate is Fate.HEALTHY
        assert (device.version, device.sha256) == (("1.3.0", sha256(NEW)) if good else ("1.2.0", sha256(BASE)))
        assert device.boots == {Fate.HEALTHY: 2, Fate.FAIL: 1, Fate.SILENT: 2}.get(fate, 1 + TRIES + 1), fate
        if fate is Fate.SILENT:
            assert job.status == "IN_PROGRESS" and device.outcomes == {}
            continue
        assert job.status == ("SUCCEEDED" if good else "FAILED")
        assert device.outcomes == {"job": job.status}
        assert job.details["sha256"] == device.sha256
        if not good:
            assert job.details["failure"] == ("flash" if fate is Fate.FAIL else "rolled-back")
    assert report.outcomes["SUCCEEDED"] == sum(fate is Fate.HEALTHY for fate in FATES.values())


async def test_real_devices_meet_their_fates(plant: Plant, tmp_path: Path) -> None:
    plant.queue_all()
    base = tmp_path / "base.bin"
    base.write_bytes(BASE)
    config = plant.config(base=base, state_dir=tmp_path / "fleet", ready_file=tmp_path / "ready")
    report = await plant.run(config)
    check_fates(plant, report)
    assert (tmp_path / "ready").read_text() == "16 devices are connected\n"
    assert all(device.installs == 1 for device in report.devices)
    assert all(job.details.get("via") == "delta" for job in plant.jobs.jobs.values() if job.status == "SUCCEEDED")
    again = FaultPlan(5)
    for device in DEVICES:
        if FATES[device.device_id] is not Fate.SILENT:
            del plant.jobs.jobs[device.device_id]
    report = await plant.run(replace(config, faults=again))
    assert all(plant.jobs.jobs[name].status == "SUCCEEDED" for name in plant.jobs.jobs), "the silent ones came back"


@pytest.mark.parametrize("connections", [None, 3])
async def test_simulated_devices_meet_the_same_fates_as_real_ones(
    plant: Plant, connections: int | None, tmp_path: Path
) -> None:
    plant.queue_all()
    report_file = tmp_path / "report.json"
    config = plant.config(simulate=True, connections=connections, report_file=report_file)
    report = await plant.run(config)
    check_fates(plant, report)
    written = json.loads(report_file.read_bytes())
    assert [device["sha256"] for device in written["devices"]] == [device.sha256 for device in report.devices]
    assert written["installs"] == sum(fate is not Fate.FAIL for fate in FATES.values())


async def test_simulated_devices_refuse_what_the_agent_refuses(plant: Plant) -> None:
    plant.queue_all()
    plant.jobs.tamper = lambda document: document | {"order": document["release"]}
    report = await plant.run(plant.config(simulate=True, faults=FaultPlan()))
    assert report.installs == 0 and report.outcomes == {"FAILED": len(DEVICES)}
    assert {job.details["failure"] for job in plant.jobs.jobs.values()} == {"verify"}


async def test_simulated_devices_ask_again_when_nobody_answers_and_when_a_hint_comes(plant: Plant) -> None:
    plant.gateway.mute = True
    stop = asyncio.Event()
    config = plant.config(simulate=True, faults=FaultPlan(), timing=Timing(retry_seconds=60))
    task = asyncio.create_task(run_fleet(config, stop))
    await asyncio.sleep(1)
    plant.gateway.mute = False
    await asyncio.sleep(2.5)
    plant.queue_all()
    for device in DEVICES:
        await plant.gateway.hint(device.device_id)
    async with asyncio.timeout(10):
        while any(job.status != "SUCCEEDED" for job in plant.jobs.jobs.values()):
            await asyncio.sleep(0.05)
    await asyncio.sleep(1)  # the last answers are on their way
    stop.set()
    assert (await task).outcomes == {"SUCCEEDED": len(DEVICES)}


async def test_late_devices_are_not_waited_for_and_still_update(plant: Plant, tmp_path: Path) -> None:
    plant.queue_all()
    late = FaultPlan(2, late=Fraction(1, 2))
    config = plant.config(simulate=True, faults=late, late_seconds=2, ready_file=tmp_path / "ready")
    report = await plant.run(config)
    assert report.outcomes == {"SUCCEEDED": len(DEVICES)} and (tmp_path / "ready").exists()


async def test_the_command_runs_a_fleet_from_a_device_file(plant: Plant, tmp_path: Path) -> None:
    plant.queue_all()
    lines = [json.dumps({"device_id": d.device_id, "device_type": d.hardware, "site_id": "x"}) for d in DEVICES[:4]]
    (tmp_path / "devices.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "base.bin").write_bytes(BASE)
    save_public_key(tmp_path / "release.pem", plant.publisher.release_private.public_key())
    save_public_key(tmp_path / "order.pem", plant.publisher.order_private.public_key())
    arguments = ["--devices-file", "devices.jsonl", "--base", "base.bin", "--base-version", "1.2.0", "--state", "fleet"]
    arguments += [
        "--release-key",
        "release.pem",
        "--order-key",
        "order.pem",
        "--report",
        "report.json",
        "--retry",
        "0.2",
    ]
    arguments += ["--mqtt", f"mqtt://{plant.broker.host}:{plant.broker.port}", "--seconds", "60"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent.fleet", *arguments, cwd=tmp_path, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(40):
        while any(plant.jobs.jobs[device.device_id].status not in FINAL for device in DEVICES[:4]):
            await asyncio.sleep(0.1)
    await asyncio.sleep(0.3)
    process.terminate()
    output, _ = await process.communicate()
    assert process.returncode == 0 and b"4 devices, 4 installs" in output
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert {device["sha256"] for device in report["devices"]} == {sha256(NEW)}


def test_a_device_file_that_cannot_be_read_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "devices.jsonl"
    path.write_text('{"device_id":"a","device_type":"motor"}\n{"device_id":"b"}\n')
    with pytest.raises(InvalidInputError, match=r"devices\.jsonl:2"):
        read_devices(path)


async def test_a_fleet_that_cannot_run_says_why(plant: Plant) -> None:
    stop = asyncio.Event()
    twice = (DEVICES[0], DEVICES[0])
    for config, words in (
        (plant.config(), "state directory"),
        (plant.config(simulate=True, devices=twice), "2 devices, 1 different"),
        (plant.config(simulate=True, devices=(FleetDevice("a/b", "motor"),)), "no device id"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            await run_fleet(config, stop)
