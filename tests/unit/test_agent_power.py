"""Power cuts at every durable operation of the real agent code: THREATS rows 21, 24, 27 and 5, with their mutants.

Invariants: I1 the device runs the old or the new image; I2 server and device agree once things have settled; I3 the next
ordinary update succeeds.
"""

import errno
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx
import pytest
import pytest_asyncio

import agent.slots
from agent.bootloader import Boot, BootLoader
from agent.client import MqttReports
from agent.download import Downloader, DownloadPolicy
from agent.errors import BrickedError
from agent.image import Behaviour, behaviour_of, declared_image
from agent.slots import Slots
from agent.state import StateStore
from agent.updater import Identity, Leg, Updater
from tests.agent_flash import Cut, Flash, PowerCut
from tests.agent_standin import DirectClient, Publisher, StandInJobs, sha256

THING = "motor-7"
BODY = random.Random(7).randbytes(1500)
OLD = declared_image("1.2.0", body=BODY)
GOOD = declared_image("1.3.0", body=BODY[:900] + b"new" + BODY[900:])
CRASHING = declared_image("1.3.0", Behaviour.CRASH, body=BODY[:900] + b"bad" + BODY[900:])
NEXT = declared_image("1.4.0", body=BODY[300:])
MOST_BOOTS = 60
PUBLISHER = Publisher()
RELEASES = {
    image: PUBLISHER.publish(image, version, counter=counter, bases=(OLD,))
    for image, version, counter in ((GOOD, "1.3.0", 3), (CRASHING, "1.3.0", 3), (NEXT, "1.4.0", 4))
}


@dataclass
class World:
    """A device, its server, and what was seen to run."""

    target: bytes
    attempts: int = 3
    flash: Flash = field(default_factory=Flash)
    cuts: list[tuple[int, Cut]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.jobs = StandInJobs(PUBLISHER)
        self.client = DirectClient(THING, self.jobs)
        self.jobs.queue(THING, "motor-1_3_0", RELEASES[self.target], self.attempts)
        self.identity = Identity(THING, "motor", PUBLISHER.keys)
        self.allowed = {sha256(OLD), sha256(self.target)}
        Slots(self.flash).make(OLD, "1.2.0")
        self.flash.power_on()
        self.boots = 0

    async def settle(self, http: httpx.AsyncClient) -> Boot:
        """Boot and run, cut after cut, until the server has nothing more for the device."""
        while True:
            self.boots += 1
            assert self.boots < MOST_BOOTS, "the device boots for ever"
            try:
                boot = BootLoader(Slots(self.flash)).boot()
                self.check_running(boot)
                if await self.run(boot, http):
                    return boot
            except PowerCut:
                if self.cuts:
                    self.flash.power_on(*self.cuts.pop())

    def check_running(self, boot: Boot) -> None:
        image = Slots(self.flash).image(boot.slot)
        assert sha256(image) == boot.sha256, "I1: the boot loader ran other bytes than it verified"
        assert boot.sha256 in self.allowed, "I1: neither the old nor the new image runs"

    async def run(self, boot: Boot, http: httpx.AsyncClient) -> bool:
        """One boot. True when everything is settled, False for a reset."""
        image = Slots(self.flash).image(boot.slot)
        if behaviour_of(image) is Behaviour.CRASH:
            return False

        async def healthy() -> str | None:
            return None

        downloader = Downloader(self.flash, http, DownloadPolicy(pause_seconds=0))
        updater = Updater(self.identity, boot, self.flash, downloader, lambda: 1_700_000_100, healthy)
        while True:
            execution = await self.client.start_next()
            leg = await updater.handle(execution, MqttReports(self.client, execution) if execution else None)
            if leg is Leg.REBOOT:
                return False
            if leg is Leg.IDLE and execution is None:
                return True

    async def check_settled(self, boot: Boot, http: httpx.AsyncClient, expected: bytes) -> None:
        """I2 and I3."""
        job = self.jobs.jobs[THING]
        assert boot.sha256 == sha256(expected)
        record = Slots(self.flash).load()
        assert record.trial is None and record.active == boot.slot
        assert job.status == ("SUCCEEDED" if expected == self.target else "FAILED"), job
        assert job.details["sha256"] == boot.sha256, "I2: the last report names another image than runs"
        assert StateStore(self.flash).state.update is None
        self.jobs.queue(THING, "motor-1_4_0", RELEASES[NEXT], 1)
        self.allowed = {boot.sha256, sha256(NEXT)}
        self.flash.power_on()
        after = await self.settle(http)
        assert after.sha256 == sha256(NEXT), "I3: the next ordinary update did not succeed"
        assert self.jobs.jobs[THING].status == "SUCCEEDED"


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with PUBLISHER.http() as client:
        yield client


async def operations_of(target: bytes, http: httpx.AsyncClient) -> int:
    """Durable operations of a run without a cut, from the first boot until all is settled."""
    world = World(target, attempts=1)
    await world.settle(http)
    return len(world.flash.operations)


async def cut_run(target: bytes, cuts: list[tuple[int, Cut]], seed: int, http: httpx.AsyncClient) -> World:
    """A run with these cuts, each counted from the boot before it, and the three invariants behind it."""
    attempts = 1 if target == CRASHING else 3
    world = World(target, attempts, Flash(rng=random.Random(f"{cuts} {seed}")), cuts[::-1])
    world.flash.power_on(*world.cuts.pop())
    boot = await world.settle(http)
    world.flash.power_on()
    await world.check_settled(boot, http, OLD if target == CRASHING else target)
    return world


@pytest.mark.parametrize("target", [GOOD, CRASHING], ids=["good image", "crashing image"])
@pytest.mark.parametrize(("cut", "seeds"), [("none", 1), ("all", 1), ("torn", 10)])
async def test_a_power_cut_at_any_operation_leaves_the_old_or_the_new_image(
    target: bytes, cut: Cut, seeds: int, http: httpx.AsyncClient
) -> None:
    operations = await operations_of(target, http)
    assert operations > 30
    for at in range(1, operations + 1):
        for seed in range(seeds):
            await cut_run(target, [(at, cut)], seed, http)


async def test_no_device_refuses_a_good_image_for_ever_after_five_power_cuts(http: httpx.AsyncClient) -> None:
    for seed in range(300):
        rng = random.Random(seed)
        cuts: list[tuple[int, Cut]] = [(rng.randrange(1, 45), rng.choice(("none", "all", "torn"))) for _ in range(5)]
        await cut_run(GOOD, cuts, seed, http)


async def test_without_the_sync_before_the_rename_a_power_cut_bricks_devices(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename_without_sync(storage: Flash, name: str, data: bytes) -> None:
        storage.write(name + ".new", data)
        storage.rename(name + ".new", name)
        storage.sync_folder("")

    monkeypatch.setattr(agent.slots, "replace_durably", rename_without_sync)
    operations, bricked = await operations_of(GOOD, http), 0
    for at in range(1, operations + 1):
        try:
            await cut_run(GOOD, [(at, "torn")], 1, http)
        except BrickedError:
            bricked += 1
    assert bricked > 0


class WeakFlash(Flash):
    """Flash that loses one bit of every image written to slot b."""

    def write(self, name: str, data: bytes) -> None:
        super().write(name, data[:700] + bytes([data[700] ^ 1]) + data[701:] if name == "slots/b.img" else data)


async def test_an_image_that_does_not_read_back_is_never_booted_and_reported_as_flash(http: httpx.AsyncClient) -> None:
    world = World(GOOD, attempts=1, flash=WeakFlash())
    boot = await world.settle(http)
    assert boot.sha256 == sha256(OLD)
    assert world.jobs.jobs[THING].details["failure"] == "flash"


async def test_without_read_back_and_without_boot_verification_a_damaged_image_is_confirmed(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slots, "holds", lambda self, slot, wanted: self.load().slot(slot).state != "empty")
    world = World(GOOD, attempts=1, flash=WeakFlash())
    with pytest.raises(AssertionError, match="other bytes than it verified"):
        await world.settle(http)


async def test_the_boot_loader_alone_stops_a_damaged_image(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    holds = Slots.holds
    keep = Slots.keep

    def keep_without_reading_back(self: Slots, target: str, image: bytes, wanted: agent.slots.Slot) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Slots, "holds", lambda *_: True)
            keep(self, target, image, wanted)

    monkeypatch.setattr(Slots, "keep", keep_without_reading_back)
    world = World(GOOD, attempts=1, flash=WeakFlash())
    boot = await world.settle(http)
    assert Slots.holds is holds
    assert boot.sha256 == sha256(OLD)
    assert "does not verify" in world.jobs.jobs[THING].details["reason"]


async def test_a_boot_loader_that_does_not_count_tries_never_comes_back_from_a_crashing_image(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(CRASHING, attempts=1)
    store = Slots.store

    def store_without_counting(self: Slots, record: agent.slots.BootRecord) -> None:
        if record.trial is None or record.trial.tries_left == agent.slots.TRIES:
            store(self, record)

    monkeypatch.setattr(Slots, "store", store_without_counting)
    with pytest.raises(AssertionError, match="boots for ever"):
        await world.settle(http)


async def test_a_crashing_image_is_tried_three_times_and_rolled_back(http: httpx.AsyncClient) -> None:
    world = World(CRASHING, attempts=1)
    boot = await world.settle(http)
    assert (boot.sha256, world.boots) == (sha256(OLD), 1 + agent.slots.TRIES + 1)
    assert world.jobs.jobs[THING].details["failure"] == "rolled-back"


async def test_the_security_floor_rises_with_the_confirmation_and_not_before(http: httpx.AsyncClient) -> None:
    world = World(CRASHING, attempts=1)
    await world.settle(http)
    assert Slots(world.flash).load().security_floor == 0
    world = World(GOOD, attempts=1)
    await world.settle(http)
    assert Slots(world.flash).load().security_floor == 3


class FullFlash(Flash):
    """Flash that has no room from operation `full_at` on, for `length` operations."""

    full_at = 0
    length = 1

    def _before(self, operation: str, name: str) -> None:
        super()._before(operation, name)
        number = len(self.operations)
        if self.full_at <= number < self.full_at + self.length and not operation.startswith(("unlink", "sync_folder")):
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("length", [1, 5, 1000])
async def test_a_full_disk_at_any_operation_leaves_the_old_or_the_new_image(
    length: int, http: httpx.AsyncClient
) -> None:
    for at in range(1, await operations_of(GOOD, http) + 1):
        world = World(GOOD, flash=FullFlash())
        assert isinstance(world.flash, FullFlash)
        world.flash.full_at, world.flash.length = at, length
        boot = await world.settle(http)
        world.flash.length = 0
        settled = await world.settle(http)  # the power goes once more; there is room again
        job = world.jobs.jobs[THING]
        assert job.details["sha256"] == boot.sha256 == settled.sha256
        world.flash.power_on()
        await world.check_settled(settled, http, GOOD if job.status == "SUCCEEDED" else OLD)


async def test_no_room_for_the_image_is_found_out_before_anything_is_downloaded(http: httpx.AsyncClient) -> None:
    world = World(GOOD, attempts=1, flash=Flash(room=3000))
    await world.settle(http)
    assert "no room" in world.jobs.jobs[THING].details["reason"]
    assert not any("download" in operation for operation in world.flash.operations)
