"""Tasks of fleet jobs on the real agent code: what is signed is done once, whatever the power does."""

import asyncio
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import agent.tasks
from agent.bootloader import BootLoader
from agent.client import MqttReports
from agent.custom import Program
from agent.download import Downloader
from agent.errors import TaskError, UnansweredError
from agent.image import declared_image
from agent.slots import Slots
from agent.tasks import Abilities, Tasker, TaskStore, next_leg
from agent.updater import Identity, Leg, Updater
from firmware.task import Task
from models.protocol import FailureClass
from tests.agent_flash import Cut, Flash, PowerCut
from tests.agent_standin import DirectClient, StandInJobs
from tests.task_standin import Tasked, TaskPublisher, queue_task

THING = "motor-7"
JOB = "_restart-berlin"
PUBLISHER = TaskPublisher()
RESTART = Tasked("restart")
MOST_BOOTS = 30


@dataclass
class World:
    """A device with its server. `reboots`: resets that an order caused; `boots`: all of them."""

    flash: Flash = field(default_factory=Flash)
    cuts: list[tuple[int, Cut]] = field(default_factory=list)
    custom: Any = None
    config_version: int = 4
    boots: int = 0
    reboots: int = 0
    done: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.jobs = StandInJobs(PUBLISHER)
        self.client = DirectClient(THING, self.jobs)

    def queue(self, task: Tasked, job_id: str = JOB, attempts: int = 1) -> "World":
        queue_task(self.jobs, THING, job_id, task, attempts)
        return self

    def tasker(self, clock: float = 0) -> Tasker:
        async def sync_config() -> int:
            self.done.append("config")
            return self.config_version

        async def diagnose(request: Mapping[str, Any]) -> None:
            self.done.append(request["requestId"])

        abilities = Abilities(sync_config, diagnose, self.custom)
        now = clock or time.time()
        return Tasker(THING, PUBLISHER.keys, self.flash, f"boot-{self.boots}", abilities, lambda: now)

    async def leg(self, tasker: Tasker) -> Leg:
        execution = await self.client.start_next()
        return await tasker.handle(execution, MqttReports(self.client, execution) if execution else None)

    async def settle(self) -> None:
        """Boot and run, cut after cut, until the server has nothing more for the device."""
        while True:
            self.boots += 1
            assert self.boots < MOST_BOOTS, "the device boots for ever"
            try:
                tasker = self.tasker()
                while (leg := await self.leg(tasker)) is not Leg.REBOOT:
                    job = self.jobs.jobs[THING]
                    if leg is Leg.IDLE and job.status not in ("QUEUED", "IN_PROGRESS"):
                        await self.leg(tasker)
                        return
                self.reboots += 1
            except PowerCut:
                if self.cuts:
                    self.flash.power_on(*self.cuts.pop())

    @property
    def reports(self) -> list[tuple[str, dict[str, str]]]:
        """Final ones."""
        return [(status, details) for _, status, details in self.jobs.log if status != "IN_PROGRESS"]


async def test_a_restart_is_reported_by_the_boot_after_it_and_its_boot_id_is_another() -> None:
    world = World().queue(RESTART)
    await world.settle()
    assert world.reports == [("SUCCEEDED", {"bootId": "boot-2"})]
    assert (world.boots, world.reboots) == (2, 1)
    assert [details.get("step") for _, _, details in world.jobs.log] == ["rebooting", None]


async def operations_of(task: Tasked, custom: Any = None) -> int:
    world = World(custom=custom).queue(task)
    await world.settle()
    return len(world.flash.operations)


@pytest.mark.parametrize(("cut", "seeds"), [("none", 1), ("all", 1), ("torn", 10)])
async def test_a_power_cut_at_any_step_of_a_restart_leaves_one_report_and_at_most_one_ordered_reboot(
    cut: Cut, seeds: int
) -> None:
    operations = await operations_of(RESTART)
    assert operations >= 12
    for at in range(1, operations + 1):
        for seed in range(seeds):
            await cut_restart([(at, cut)], seed)


async def test_five_power_cuts_in_a_restart_change_nothing_of_that() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        await cut_restart([(rng.randrange(1, 15), rng.choice(("none", "all", "torn"))) for _ in range(5)], seed)


async def cut_restart(cuts: list[tuple[int, Cut]], seed: int) -> World:
    world = World(Flash(rng=random.Random(f"{cuts} {seed}")), cuts[::-1]).queue(RESTART)
    world.flash.power_on(*world.cuts.pop())
    await world.settle()
    assert [status for status, _ in world.reports] == ["SUCCEEDED"], cuts
    assert world.reboots <= 1, cuts
    assert world.boots >= 2
    assert TaskStore(world.flash).state.run is None
    return world


async def test_a_device_that_does_not_journal_before_the_reboot_reboots_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TaskStore, "put", lambda self, state: setattr(self, "state", state))
    with pytest.raises(AssertionError, match="boots for ever"):
        await World().queue(RESTART).settle()


async def test_a_journal_that_is_renamed_without_a_sync_reboots_a_device_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename_without_sync(storage: Flash, name: str, data: bytes) -> None:
        storage.write(name + ".new", data)
        storage.rename(name + ".new", name)

    monkeypatch.setattr(agent.tasks, "replace_durably", rename_without_sync)
    twice = 0
    for seed in range(40):
        world = World(Flash(rng=random.Random(seed)), []).queue(RESTART)
        tasker = world.tasker()
        assert await world.leg(tasker) is Leg.REBOOT
        world.flash.power_on(1, "none")  # the reboot is as hard as a power cut
        with pytest.raises(PowerCut):
            world.flash.write("anything", b"")
        world.flash.power_on()
        twice += await world.leg(world.tasker()) is Leg.REBOOT
    assert twice == 40


async def test_a_restart_whose_announcement_is_not_heard_waits_and_one_that_is_over_reboots_nobody() -> None:
    world = World().queue(RESTART)
    execution = await world.client.start_next()
    assert execution is not None
    world.client.deaf = True
    assert await world.tasker().handle(execution, MqttReports(world.client, execution)) is Leg.WAIT
    world.client.deaf = False
    world.jobs.end(THING, "CANCELED")
    assert await world.tasker().handle(execution, MqttReports(world.client, execution)) is Leg.IDLE
    assert TaskStore(world.flash).state.run is None


async def test_a_restart_that_has_been_reported_is_not_carried_out_when_its_order_comes_again() -> None:
    world = World().queue(RESTART)
    await world.settle()
    world.jobs.jobs[THING].status = "IN_PROGRESS"  # a gateway that replays, or somebody in its place
    await world.settle()
    assert world.reboots == 1
    assert world.reports[-1][0] == "FAILED" and world.reports[-1][1]["failure"] == "verify"
    assert "has ended here" in world.reports[-1][1]["reason"]


async def test_without_the_memory_of_what_has_ended_a_replayed_restart_reboots_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent.tasks.TaskState, "finished_tasks", property(lambda self: frozenset()))
    world = World().queue(RESTART)
    await world.settle()
    world.jobs.jobs[THING].status = "IN_PROGRESS"
    await world.settle()
    assert world.reboots == 2


async def test_the_next_attempt_of_a_job_is_another_order_and_is_carried_out() -> None:
    calls = 0

    async def flaky(task: Task) -> Mapping[str, str]:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise TaskError(FailureClass.INTERNAL, "not yet")
        return {"output": f"attempt {task.attempt}"}

    world = World(custom=flaky).queue(Tasked("custom", {"do": "it"}), attempts=3)
    await world.settle()
    assert [status for status, _ in world.reports] == ["FAILED", "FAILED", "SUCCEEDED"]
    assert world.reports[-1][1]["output"] == "attempt 3"
    assert world.reports[0][1] == {"failure": "internal", "reason": "not yet"}


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ({"device_id": "motor-8"}, "for device motor-8"),
        ({"job_id": "_other"}, "for job _other"),
        ({"attempt": 9}, "for attempt 9"),
        ({"operation": "firmware-update"}, "firmware-update"),
        ({"issued_at": 1, "expires_at": 2}, "valid until 2"),
    ],
)
async def test_what_is_signed_for_something_else_is_refused_and_nothing_is_done(
    order: dict[str, Any], says: str
) -> None:
    world = World().queue(Tasked("restart", order=order))
    await world.settle()
    assert (world.reboots, len(world.reports)) == (0, 1)
    status, details = world.reports[0]
    assert status == "FAILED" and details["failure"] == "verify" and says in details["reason"]


@pytest.mark.parametrize("order", [None, {}, "x", {"payload": "e30=", "payloadType": "x", "signatures": []}])
async def test_an_unsigned_task_is_refused(order: Any) -> None:
    world = World().queue(RESTART)
    world.jobs.tamper = lambda document: {**document, "order": order}
    await world.settle()
    assert world.reboots == 0 and world.reports[0][1]["failure"] == "verify"


async def test_only_what_is_signed_is_done_whatever_stands_beside_it() -> None:
    seen = []

    async def custom(task: Task) -> Mapping[str, str]:
        seen.append(task.payload)
        return {}

    world = World(custom=custom).queue(Tasked("custom", {"volume": 3}))
    world.jobs.tamper = lambda document: {**document, "operation": "restart", "volume": 11}
    await world.settle()
    assert seen == [{"volume": 3}] and world.reboots == 0


async def test_a_device_without_custom_operations_rejects_them_as_incompatible() -> None:
    world = World().queue(Tasked("custom", {"do": "it"}))
    await world.settle()
    status, details = world.reports[0]
    assert (status, details["failure"]) == ("REJECTED", "incompatible") and "custom" in details["reason"]


async def test_a_config_sync_reports_the_version_that_runs() -> None:
    world = World().queue(Tasked("config-sync", {"configVersion": 4}))
    await world.settle()
    assert world.reports == [("SUCCEEDED", {"configVersion": "4", "bootId": "boot-1"})] and world.done == ["config"]


async def test_a_config_sync_that_gets_an_older_configuration_than_was_ordered_has_failed() -> None:
    world = World().queue(Tasked("config-sync", {"configVersion": 5}))
    await world.settle()
    assert world.reports == [("FAILED", {"failure": "internal", "reason": "it runs configuration 4, expected 5"})]


async def test_a_diagnostic_answers_every_request_before_it_succeeds() -> None:
    asked = [{"requestId": "a" * 32, "type": "ping"}, {"requestId": "b" * 32, "type": "log-tail", "lines": 5}]
    world = World().queue(Tasked("diagnostic", {"requests": asked}))
    await world.settle()
    assert world.done == ["a" * 32, "b" * 32] and world.reports[0][1]["answered"] == "2"


async def test_a_diagnostic_without_a_list_of_requests_fails() -> None:
    world = World().queue(Tasked("diagnostic", {"requests": "all"}))
    await world.settle()
    assert world.reports[0][0] == "FAILED" and world.reports[0][1]["failure"] == "incompatible"


async def test_a_gateway_that_is_away_during_a_config_sync_is_a_network_failure() -> None:
    async def nobody() -> int:
        raise UnansweredError("no answer")

    world = World().queue(Tasked("config-sync"))
    abilities = Abilities(nobody, lambda request: asyncio.sleep(0))
    tasker = Tasker(THING, PUBLISHER.keys, world.flash, "b", abilities, time.time)
    await world.leg(tasker)
    assert world.reports[0][1]["failure"] == "network"


@pytest.mark.parametrize(("cut", "seeds"), [("none", 1), ("all", 1), ("torn", 5)])
async def test_a_custom_task_is_begun_once_for_an_attempt_and_reported_once_whatever_the_power_does(
    cut: Cut, seeds: int
) -> None:
    task = Tasked("custom", {"do": "it"})

    async def nothing(task: Task) -> Mapping[str, str]:
        return {}

    operations = await operations_of(task, nothing)
    for at in range(1, operations + 1):
        for seed in range(seeds):
            begun: list[int] = []

            async def custom(task: Task, begun: list[int] = begun) -> Mapping[str, str]:
                begun.append(task.attempt)
                return {}

            world = World(Flash(rng=random.Random(f"{at} {seed}")), custom=custom).queue(task)
            world.flash.power_on(at, cut)
            await world.settle()
            assert len(world.reports) == 1 and len(begun) <= 1
            status, details = world.reports[0]
            assert status == "SUCCEEDED" or (details["failure"] == "power" and "not known" in details["reason"])


async def test_a_storage_that_refuses_is_reported_and_reboots_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(agent.tasks, "replace_durably", refuse)
    world = World().queue(RESTART)
    await world.settle()
    assert world.reboots == 0 and world.reports[0][1]["failure"] == "flash"


async def test_an_image_on_trial_is_ended_before_any_task_is_looked_at() -> None:
    flash = Flash()
    slots = Slots(flash)
    slots.make(declared_image("1.2.0"), "1.2.0")
    boot = BootLoader(slots).boot()
    world = World(flash).queue(RESTART)

    async def healthy() -> str | None:
        return None

    async with httpx.AsyncClient() as http:
        updater = Updater(
            Identity(THING, "motor", PUBLISHER.keys), boot, flash, Downloader(flash, http), time.time, healthy
        )
        updater._trial = True
        execution = await world.client.start_next()
        assert execution is not None
        leg = await next_leg(updater, world.tasker(), execution, MqttReports(world.client, execution))
        assert leg is Leg.REBOOT and TaskStore(flash).state.run is None  # back to the old image, and then again
        updater._trial = False
        leg = await next_leg(updater, world.tasker(), execution, MqttReports(world.client, execution))
        assert leg is Leg.REBOOT and TaskStore(flash).state.run is not None


def program(folder: Path, text: str) -> Path:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


TASK = Task(THING, JOB, 2, "custom", {"say": "$(touch evil)"}, 1, 2, "a" * 32)


async def test_a_program_gets_the_signed_document_on_its_standard_input(tmp_path: Path) -> None:
    path = program(tmp_path, 'cat; echo " $TIDEGATE_JOB_ID $TIDEGATE_ATTEMPT"')
    assert await Program(path)(TASK) == {"output": '{"say":"$(touch evil)"} _restart-berlin 2'}
    assert os.listdir(tmp_path) == ["program"]  # noqa: PTH208 - no shell has seen it


async def test_a_program_that_ends_with_another_status_than_0_has_failed_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="program ended with 3: no such pump") as caught:
        await Program(program(tmp_path, "echo no such pump >&2; exit 3"))(TASK)
    assert caught.value.failure_class is FailureClass.INTERNAL


async def test_a_program_that_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    path = program(tmp_path, f"(sleep 60; touch {tmp_path}/late) & sleep 60")
    with pytest.raises(TaskError, match=r"not ended after 0\.3 s"):
        await Program(path, 0.3)(TASK)


async def test_what_a_program_prints_is_bounded_and_a_missing_one_is_a_failure(tmp_path: Path) -> None:
    output = await Program(program(tmp_path, "yes x | head -c 3000000; echo end"))(TASK)
    assert len(output["output"]) <= 600 and output["output"].endswith("end")
    with pytest.raises(TaskError, match="cannot be started"):
        await Program(tmp_path / "none")(TASK)
