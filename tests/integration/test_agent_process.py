"""The agent as a process, on a real broker and a real HTTP server: THREATS rows 22, 23 and 25."""

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from agent.image import Behaviour, declared_image
from agent.slots import BootRecord, Slots
from agent.storage import PosixStorage
from firmware.keys import save_public_key
from tests.agent_standin import FINAL, Job, Publisher, StandInGateway, StandInJobs, serving_artifacts, sha256
from tests.conftest import Broker, free_port

THING = "motor-7"
BODY = random.Random(22).randbytes(40_000)
OLD = declared_image("1.2.0", body=BODY)


def image(version: str, does: Behaviour = Behaviour.HEALTHY) -> bytes:
    return declared_image(version, does, BODY[:20_000] + does.encode() + BODY[20_000:])


class Rig:
    """A stand-in gateway, artifacts, and one agent process."""

    def __init__(self, folder: Path, broker: Broker, publisher: Publisher) -> None:
        self.folder, self.broker, self.publisher = folder, broker, publisher
        self.jobs = StandInJobs(publisher)
        self.gateway = StandInGateway(self.jobs, broker.host, broker.port)
        self.process: asyncio.subprocess.Process | None = None
        self.log = folder / "agent.log"
        (folder / "base.bin").write_bytes(OLD)
        save_public_key(folder / "release.pem", publisher.release_private.public_key())
        save_public_key(folder / "order.pem", publisher.order_private.public_key())

    async def start(self, *more: str, module: tuple[str, ...] = ("-m", "agent"), **environment: str) -> None:
        arguments = {
            "--id": THING,
            "--type": "motor",
            "--state": self.folder / "state",
            "--base": self.folder / "base.bin",
            "--base-version": "1.2.0",
            "--release-key": self.folder / "release.pem",
            "--order-key": self.folder / "order.pem",
            "--mqtt": f"mqtt://{self.broker.host}:{self.broker.port}",
            "--retry": "0.1",
            "--answer-within": "1",
            "--watchdog": "1.5",
            "--confirm-within": "2",
        }
        flat = [str(part) for pair in arguments.items() for part in pair]
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, *module, *flat, *more, stderr=log, env=os.environ | environment
            )

    async def settled(self, seconds: float = 40) -> Job:
        """The job once it has ended."""
        job = self.jobs.jobs[THING]
        async with asyncio.timeout(seconds):
            while job.status not in FINAL:
                await asyncio.sleep(0.05)
        return job

    async def until(self, step: str) -> None:
        async with asyncio.timeout(60):
            while not any(details.get("step") == step for _, _, details in self.jobs.log):
                await asyncio.sleep(0.002)

    async def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await self.process.wait()

    def record(self) -> BootRecord:
        return Slots(PosixStorage(self.folder / "state")).load()

    def active_sha256(self) -> str:
        record = self.record()
        return sha256((self.folder / "state" / "slots" / f"{record.active}.img").read_bytes())

    async def next_update_succeeds(self) -> None:
        """I3."""
        again = image("1.4.0")
        self.jobs.queue(THING, "job-next", self.publisher.publish(again, "1.4.0"))
        await self.gateway.hint(THING)
        assert (await self.settled()).status == "SUCCEEDED"
        assert self.active_sha256() == sha256(again)


@pytest_asyncio.fixture
async def rig(tmp_path: Path, broker: Broker) -> AsyncIterator[Rig]:
    async with serving_artifacts(free_port()) as publisher:
        rig = Rig(tmp_path, broker, publisher)
        async with rig.gateway.running():
            yield rig
            if rig.process is not None and rig.process.returncode is None:
                await rig.end(signal.SIGKILL)


@pytest.mark.parametrize("protocol", ["3.1.1", "5"])
async def test_a_device_updates_itself_and_says_what_runs(rig: Rig, protocol: str) -> None:
    if protocol == "5" and rig.broker.kind == "nats":
        pytest.skip("nats-server speaks MQTT 3.1.1 only")
    new = image("1.3.0")
    rig.jobs.queue(THING, "job", rig.publisher.publish(new, "1.3.0", bases=(OLD,)))
    await rig.start("--heartbeat", "0.2", "--mqtt-version", protocol)
    job = await rig.settled()
    assert (job.status, job.details["sha256"], job.details["via"]) == ("SUCCEEDED", sha256(new), "delta")
    async with asyncio.timeout(40):
        while not any(beat["firmwareSha256"] == sha256(new) for beat in rig.gateway.heartbeats):
            await asyncio.sleep(0.05)
    await rig.next_update_succeeds()
    assert await rig.end() == 0


@pytest.mark.parametrize("step", ["downloading", "installing", "confirming"])
async def test_kill_9_at_any_step_ends_in_a_successful_update_all_the_same(rig: Rig, step: str) -> None:
    new = image("1.3.0")
    rig.jobs.queue(THING, "job", rig.publisher.publish(new, "1.3.0", bases=(OLD,)), attempts=3)
    await rig.start()
    await rig.until(step)
    await rig.end(signal.SIGKILL)
    assert rig.active_sha256() in (sha256(OLD), sha256(new))
    await rig.start()
    job = await rig.settled()
    assert (job.status, job.details["sha256"], rig.active_sha256()) == ("SUCCEEDED", sha256(new), sha256(new))
    await rig.next_update_succeeds()


KILLED = """
import os, runpy, signal, sys
from agent.storage import PosixStorage
count, at = 0, int(os.environ.pop("KILL_AT"))
def counted(method):
    def run(self, *arguments):
        global count
        method(self, *arguments)
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
    return run
for name in ("write", "append", "sync", "rename", "unlink", "sync_folder"):
    setattr(PosixStorage, name, counted(getattr(PosixStorage, name)))
sys.argv[0] = "agent"
runpy.run_module("agent", run_name="__main__")
"""


@pytest.mark.parametrize("at", [2, 9, 17, 22, 28])
async def test_kill_9_after_any_file_operation_ends_in_a_successful_update_all_the_same(rig: Rig, at: int) -> None:
    new = image("1.3.0")
    rig.jobs.queue(THING, "job", rig.publisher.publish(new, "1.3.0"), attempts=3)
    await rig.start(module=("-c", KILLED), KILL_AT=str(at))
    assert rig.process is not None
    async with asyncio.timeout(40):
        assert await rig.process.wait() == -signal.SIGKILL
    await rig.start()
    assert (await rig.settled()).status == "SUCCEEDED"
    assert rig.active_sha256() == sha256(new)


BAD = {
    Behaviour.CRASH: "ended without a word",
    Behaviour.HANG: "ended without a word",
    Behaviour.NO_NETWORK: "no answer from the gateway",
    Behaviour.SELF_TEST: "self-test failed",
}


@pytest.mark.parametrize("does", BAD, ids=str)
async def test_a_bad_image_is_rolled_back_by_the_device_itself_and_reported(rig: Rig, does: Behaviour) -> None:
    rig.jobs.queue(THING, "job", rig.publisher.publish(image("1.3.0", does), "1.3.0", counter=9))
    await rig.start()
    job = await rig.settled()
    assert (job.status, job.details["failure"], job.details["version"]) == ("FAILED", "rolled-back", "1.2.0")
    assert BAD[does] in job.details["reason"]
    assert rig.active_sha256() == sha256(OLD)
    assert rig.record().security_floor == 0
    await rig.next_update_succeeds()


async def test_an_image_that_claims_another_version_is_rolled_back(rig: Rig) -> None:
    rig.jobs.queue(THING, "job", rig.publisher.publish(image("6.6.6"), "1.3.0"))
    await rig.start()
    job = await rig.settled()
    assert (job.status, job.details["sha256"]) == ("FAILED", sha256(OLD))
    assert "says it is version 6.6.6" in job.details["reason"]


async def test_a_gateway_that_is_away_for_one_try_of_a_trial_costs_nothing(rig: Rig) -> None:
    new = image("1.3.0")
    rig.jobs.queue(THING, "job", rig.publisher.publish(new, "1.3.0"))
    rig.jobs.seen = lambda thing, status, details: setattr(rig.gateway, "mute", details.get("step") == "rebooting")
    await rig.start()
    await rig.until("rebooting")
    await asyncio.sleep(3.5)
    assert rig.record().active == "a", "confirmed without an answer"
    rig.gateway.mute = False
    assert (await rig.settled()).status == "SUCCEEDED"
    assert rig.active_sha256() == sha256(new)


async def test_a_gateway_that_is_away_for_all_tries_brings_the_old_image_back(rig: Rig) -> None:
    rig.jobs.queue(THING, "job", rig.publisher.publish(image("1.3.0"), "1.3.0"), attempts=2)
    rig.jobs.seen = lambda thing, status, details: setattr(rig.gateway, "mute", details.get("step") == "rebooting")
    await rig.start()
    await rig.until("rebooting")
    async with asyncio.timeout(60):
        while rig.record().trial is not None or rig.record().fallback is None:
            await asyncio.sleep(0.1)
    assert rig.active_sha256() == sha256(OLD)
    rig.jobs.seen = lambda thing, status, details: None
    rig.gateway.mute = False
    assert (await rig.settled()).status == "SUCCEEDED", "the second attempt was refused"
    failures = [details["failure"] for _, status, details in rig.jobs.log if status == "FAILED"]
    assert failures == ["rolled-back"]


async def test_a_device_without_a_bootable_slot_says_so_and_stops(rig: Rig) -> None:
    Slots(PosixStorage(rig.folder / "state")).make(OLD, "1.2.0")
    (rig.folder / "state" / "slots" / "a.img").write_bytes(b"rot")
    await rig.start()
    assert rig.process is not None
    assert await rig.process.wait() == 3
    assert "cannot boot" in rig.log.read_text()
