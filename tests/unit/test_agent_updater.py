"""The update's state machine: THREATS rows 11, 18, 19, 25 and 5, against the stand-in's real signatures and deltas."""

import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import pytest_asyncio

from agent.bootloader import Boot, BootLoader
from agent.client import MqttReports
from agent.download import Downloader, DownloadPolicy
from agent.image import declared_image
from agent.jobs import Execution, parse_execution
from agent.slots import Slots
from agent.state import StateStore
from agent.updater import Identity, Leg, Updater
from tests.agent_flash import Flash
from tests.agent_standin import DirectClient, Publisher, StandInJobs, sha256

THING = "motor-7"
BODY = random.Random(18).randbytes(6000)
OLD, NEW = declared_image("1.2.0", body=BODY), declared_image("1.3.0", body=BODY[:3000] + b"new" + BODY[3000:])
OTHER = declared_image("1.2.1", body=BODY[::-1])
PUBLISHER = Publisher()


class Bench:
    """One device on the bench, with its server."""

    def __init__(self, base: bytes = OLD) -> None:
        self.flash = Flash()
        self.slots = Slots(self.flash)
        self.slots.make(base, "1.2.0")
        self.jobs = StandInJobs(PUBLISHER)
        self.client = DirectClient(THING, self.jobs)
        self.problem: str | None = None
        self.fetched: list[str] = []

    def boot(self) -> Boot:
        return BootLoader(self.slots).boot()

    def updater(self, boot: Boot, http: httpx.AsyncClient, clock: float = 0) -> Updater:
        async def self_test() -> str | None:
            return self.problem

        async def note(request: httpx.Request) -> None:
            self.fetched.append(request.url.path.rpartition("/")[2])

        http.event_hooks["request"] = [note]
        downloader = Downloader(self.flash, http, DownloadPolicy(pause_seconds=0, fruitless_attempts=1))
        now = clock or time.time()
        return Updater(Identity(THING, "motor", PUBLISHER.keys), boot, self.flash, downloader, lambda: now, self_test)

    async def leg(self, updater: Updater) -> Leg:
        execution = await self.client.start_next()
        return await updater.handle(execution, MqttReports(self.client, execution) if execution else None)

    async def update(self, http: httpx.AsyncClient) -> Boot:
        """Until the device rests; the last boot."""
        for _ in range(10):
            boot = self.boot()
            updater = self.updater(boot, http)
            while (leg := await self.leg(updater)) is not Leg.REBOOT:
                if leg is Leg.IDLE and self.jobs.jobs[THING].status not in ("QUEUED", "IN_PROGRESS"):
                    return boot
        raise AssertionError("the device does not come to rest")

    @property
    def steps(self) -> list[str]:
        return [details.get("step", status) for _, status, details in self.jobs.log]

    @property
    def last(self) -> dict[str, str]:
        return self.jobs.log[-1][2]


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with PUBLISHER.http() as client:
        yield client


async def test_an_update_by_delta_reports_every_step_and_what_really_runs(http: httpx.AsyncClient) -> None:
    bench = Bench()
    release = PUBLISHER.publish(NEW, "1.3.0", counter=2, bases=(OLD,))
    bench.jobs.queue(THING, "job", release)
    await bench.update(http)
    assert bench.steps == [
        "downloading",
        "downloaded",
        "installing",
        "rebooting",
        "confirming",
        "SUCCEEDED",
    ]
    assert bench.last == {"version": "1.3.0", "sha256": sha256(NEW), "slot": "b", "via": "delta"}
    assert bench.fetched == [release.deltas[0]["sha256"]]
    assert bench.slots.load().security_floor == 2
    assert not [name for name in (f"download/{release.deltas[0]['sha256']}.part",) if bench.flash.size(name)]


@pytest.mark.parametrize("spoilt", ["missing", "other bytes", "for another base", "truncated"])
async def test_any_failure_of_the_delta_leads_to_the_full_image(spoilt: str, http: httpx.AsyncClient) -> None:
    bench = Bench()
    release = PUBLISHER.publish(NEW, "1.3.0", bases=(OLD,))
    foreign = PUBLISHER.publish(NEW, "1.3.0", bases=(OTHER,)).deltas[0]
    delta = release.deltas[0]
    patch = PUBLISHER.artifacts[delta["sha256"]]
    if spoilt == "missing":
        del PUBLISHER.artifacts[delta["sha256"]]
    elif spoilt == "other bytes":
        PUBLISHER.artifacts[delta["sha256"]] = patch[::-1]
    elif spoilt == "for another base":
        delta |= {"url": foreign["url"], "sha256": foreign["sha256"], "size": foreign["size"]}
    else:
        delta |= {"url": PUBLISHER.keep(patch[:-9]), "sha256": sha256(patch[:-9]), "size": len(patch) - 9}
    bench.jobs.queue(THING, "job", release)
    before = bench.slots.image("a")
    boot = await bench.update(http)
    PUBLISHER.artifacts[sha256(patch)] = patch
    assert (boot.sha256, bench.last["via"]) == (sha256(NEW), "full")
    assert bench.slots.image("a") == before


async def test_a_delta_for_another_base_is_not_even_fetched(http: httpx.AsyncClient) -> None:
    bench = Bench(base=OTHER)
    release = PUBLISHER.publish(NEW, "1.3.0", bases=(OLD,))
    bench.jobs.queue(THING, "job", release)
    await bench.update(http)
    assert bench.fetched == [release.full["sha256"]]


async def test_one_flipped_bit_of_the_base_leads_to_the_full_image(http: httpx.AsyncClient) -> None:
    bench = Bench()
    bench.jobs.queue(THING, "job", PUBLISHER.publish(NEW, "1.3.0", bases=(OLD,)))
    boot = bench.boot()
    bench.flash.write("slots/a.img", OLD[:99] + bytes([OLD[99] ^ 4]) + OLD[100:])
    assert await bench.leg(bench.updater(boot, http)) is Leg.REBOOT
    boot = await bench.update(http)
    assert (boot.sha256, bench.last["via"]) == (sha256(NEW), "full")


async def refused(bench: Bench, http: httpx.AsyncClient, **tampered: Any) -> dict[str, str]:
    bench.jobs.tamper = lambda document: document | tampered
    before = (bench.slots.image("a"), bench.slots.load())
    await bench.update(http)
    assert (bench.slots.image("a"), bench.slots.load()) == before, "a refused update has touched the slots"
    assert not bench.fetched
    return bench.last


async def test_an_order_for_another_device_is_refused_and_reported(http: httpx.AsyncClient) -> None:
    bench = Bench()
    release = PUBLISHER.publish(NEW, "1.3.0")
    bench.jobs.queue(THING, "job", release)
    document = PUBLISHER.document("motor-8", "job", 1, release)
    details = await refused(bench, http, order=document["order"])
    assert details["failure"] == "verify" and "motor-8" in details["reason"]


async def test_a_release_for_other_hardware_is_reported_as_incompatible(http: httpx.AsyncClient) -> None:
    bench = Bench()
    bench.jobs.queue(THING, "job", PUBLISHER.publish(NEW, "1.3.0", hardware="pump"))
    assert (await refused(bench, http))["failure"] == "incompatible"


async def test_an_image_that_the_store_has_swapped_is_refused_with_the_active_slot_untouched(
    http: httpx.AsyncClient,
) -> None:
    bench = Bench()
    release = PUBLISHER.publish(NEW, "1.3.0")
    bench.jobs.queue(THING, "job", release)
    PUBLISHER.artifacts[sha256(NEW)] = NEW[::-1]
    before = bench.flash.read("slots/a.img")
    boot = await bench.update(http)
    PUBLISHER.artifacts[sha256(NEW)] = NEW
    assert (boot.sha256, bench.last["failure"]) == (sha256(OLD), "verify")
    assert bench.flash.read("slots/a.img") == before and bench.flash.read("slots/b.img") is None


@pytest.mark.parametrize("end", ["SUCCEEDED", "FAILED"])
@pytest.mark.parametrize("reboot", [False, True])
async def test_an_order_never_starts_again_once_its_attempt_has_ended(
    end: str, reboot: bool, http: httpx.AsyncClient
) -> None:
    bench = Bench()
    release = PUBLISHER.publish(NEW, "1.3.0")
    recorded = PUBLISHER.document(THING, "job", 1, release)
    bench.jobs.queue(THING, "job", release)
    bench.jobs.tamper = lambda document: recorded
    bench.problem = None if end == "SUCCEEDED" else "broken"
    boot = await bench.update(http)
    assert bench.jobs.jobs[THING].status == end
    writes = bench.slots.load().writes
    bench.problem = None
    bench.jobs.queue(THING, "job", release)
    updater = bench.updater(bench.boot() if reboot else replace(boot, trial=False), http)
    await bench.leg(updater)
    assert bench.last["failure"] == "verify" and "has ended" in bench.last["reason"]
    assert bench.slots.load().writes == writes


async def test_a_device_that_remembers_nothing_would_install_a_replayed_order(http: httpx.AsyncClient) -> None:
    bench = Bench()
    release = PUBLISHER.publish(NEW, "1.3.0")
    recorded = PUBLISHER.document(THING, "job", 1, release)
    bench.jobs.queue(THING, "job", release)
    bench.jobs.tamper = lambda document: recorded
    bench.problem = "broken"
    await bench.update(http)
    bench.problem = None
    bench.flash.unlink("device.json")
    bench.jobs.queue(THING, "job", release)
    assert (await bench.update(http)).sha256 == sha256(NEW)


async def test_an_expired_order_is_refused_even_when_the_clock_is_back_in_1970(http: httpx.AsyncClient) -> None:
    bench = Bench()
    release = PUBLISHER.publish(NEW, "1.3.0")
    bench.jobs.queue(THING, "one", release)
    bench.problem = "broken"
    await bench.update(http)
    past = int(time.time()) - 7200
    stale = PUBLISHER.document(THING, "two", 1, release, issued_at=past, expires_at=past + 60)
    bench.jobs.queue(THING, "two", release)
    bench.jobs.tamper = lambda document: stale
    await bench.leg(bench.updater(bench.boot(), http, clock=1))
    assert "valid until" in bench.last["reason"]


async def test_a_new_image_is_not_confirmed_before_the_gateway_has_answered(http: httpx.AsyncClient) -> None:
    bench = Bench()
    bench.jobs.queue(THING, "job", PUBLISHER.publish(NEW, "1.3.0"))
    assert await bench.leg(bench.updater(bench.boot(), http)) is Leg.REBOOT
    boot = bench.boot()
    assert boot.trial
    updater = bench.updater(boot, http)
    execution = await bench.client.start_next()
    assert execution is not None
    bench.client.deaf = True
    assert await updater.handle(execution, MqttReports(bench.client, execution)) is Leg.WAIT
    record = bench.slots.load()
    assert record.active == "a" and record.trial is not None and updater.on_trial
    bench.client.deaf = False
    assert await bench.leg(updater) is Leg.IDLE
    assert bench.slots.load().active == "b" and not updater.on_trial


async def test_no_trial_starts_while_the_gateway_cannot_be_reached(http: httpx.AsyncClient) -> None:
    bench = Bench()
    bench.jobs.queue(THING, "job", PUBLISHER.publish(NEW, "1.3.0"))
    execution = await bench.client.start_next()
    assert execution is not None
    bench.client.deaf = True
    updater = bench.updater(bench.boot(), http)
    assert await updater.handle(execution, MqttReports(bench.client, execution)) is Leg.WAIT
    assert bench.slots.load().trial is None
    bench.client.deaf = False
    assert (await bench.update(http)).sha256 == sha256(NEW)
    assert bench.slots.load().writes == 1, "the image was written twice"


@pytest.mark.parametrize("moment", ["downloading", "downloaded", "installing", "rebooting"])
async def test_an_update_that_the_server_ends_before_the_reboot_is_dropped(
    moment: str, http: httpx.AsyncClient
) -> None:
    bench = Bench()
    bench.jobs.queue(THING, "job", PUBLISHER.publish(NEW, "1.3.0"))
    steps = ["downloading", "downloaded", "installing", "rebooting"]

    def seen(thing: str, status: str, details: dict[str, str]) -> None:
        index = steps.index(moment)
        if index and details.get("step") == steps[index - 1]:
            bench.jobs.end(THING, "TIMED_OUT")

    bench.jobs.seen = seen
    updater = bench.updater(bench.boot(), http)
    execution = await bench.client.start_next()
    assert execution is not None
    if moment == "downloading":
        bench.jobs.end(THING, "TIMED_OUT")
    assert await updater.handle(execution, MqttReports(bench.client, execution)) is Leg.IDLE
    assert bench.slots.load().trial is None and StateStore(bench.flash).state.update is None


async def test_an_update_that_the_server_ends_during_the_trial_is_rolled_back(http: httpx.AsyncClient) -> None:
    bench = Bench()
    bench.jobs.queue(THING, "job", PUBLISHER.publish(NEW, "1.3.0"))
    assert await bench.leg(bench.updater(bench.boot(), http)) is Leg.REBOOT
    boot = bench.boot()
    bench.jobs.end(THING, "TIMED_OUT")
    assert boot.trial and await bench.leg(bench.updater(boot, http)) is Leg.REBOOT
    boot = bench.boot()
    assert boot.sha256 == sha256(OLD)
    assert await bench.leg(bench.updater(boot, http)) is Leg.IDLE
    assert StateStore(bench.flash).state.update is None


async def test_a_failed_self_test_rolls_back_at_once_and_says_why(http: httpx.AsyncClient) -> None:
    bench = Bench()
    bench.jobs.queue(THING, "job", PUBLISHER.publish(NEW, "1.3.0"))
    bench.problem = "no sensor"
    boot = await bench.update(http)
    assert boot.sha256 == sha256(OLD)
    assert bench.last["failure"] == "rolled-back" and "no sensor" in bench.last["reason"]


async def test_a_device_that_already_runs_the_release_succeeds_without_installing(http: httpx.AsyncClient) -> None:
    bench = Bench()
    bench.jobs.queue(THING, "job", PUBLISHER.publish(OLD, "1.2.0"))
    await bench.update(http)
    assert bench.last["sha256"] == sha256(OLD) and bench.slots.load().writes == 0


async def test_a_lost_answer_is_sent_again_with_the_version_the_server_has(http: httpx.AsyncClient) -> None:
    bench = Bench()
    bench.jobs.queue(THING, "job", PUBLISHER.publish(NEW, "1.3.0"))
    execution = await bench.client.start_next()
    assert execution is not None
    behind = Execution(execution.job_id, execution.attempt, execution.version_number - 1, execution.document)
    updater = bench.updater(bench.boot(), http)
    reports = MqttReports(bench.client, behind)
    bench.client.patience = type(bench.client.patience)(step_seconds=1, finish_seconds=1)
    assert await updater.handle(execution, reports) is Leg.REBOOT


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"execution": 7},
        {"execution": {"jobId": 1}},
        {"execution": {"jobId": "j", "status": "QUEUED"}},
        {"execution": {"jobId": "j", "status": "IN_PROGRESS", "versionNumber": "1"}},
        {"execution": {"jobId": "j", "status": "IN_PROGRESS", "jobDocument": []}},
    ],
)
def test_an_answer_that_cannot_be_read_is_no_work(answer: dict[str, Any]) -> None:
    assert parse_execution(answer) is None


async def test_bit_rot_in_the_active_slot_brings_the_other_confirmed_image_back(http: httpx.AsyncClient) -> None:
    bench = Bench()
    bench.jobs.queue(THING, "job", PUBLISHER.publish(NEW, "1.3.0"))
    await bench.update(http)
    image = bench.flash.read("slots/b.img")
    assert image is not None
    bench.flash.write("slots/b.img", image[:-1] + b"?")
    assert bench.boot().sha256 == sha256(OLD)


async def test_parts_of_an_update_that_was_given_up_make_room_for_the_next(http: httpx.AsyncClient) -> None:
    bench = Bench()
    bench.jobs.queue(THING, "one", PUBLISHER.publish(OTHER, "1.2.9"))
    PUBLISHER.artifacts[sha256(OTHER)] = OTHER[:700]
    await bench.update(http)
    part = f"download/{sha256(OTHER)}.part"
    bench.flash.write(part, OTHER[:700])  # what a connection that broke leaves behind
    bench.jobs.queue(THING, "two", PUBLISHER.publish(NEW, "1.3.0"))
    await bench.update(http)
    assert bench.last["sha256"] == sha256(NEW)
    assert bench.flash.size(part) is None
