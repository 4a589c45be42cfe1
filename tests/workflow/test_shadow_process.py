"""A wait for a device's shadow on a time-skipping server with scripted activities."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio

from models.identity import DeviceHappening
from models.shadow import CheckShadowInput, SyncOutcome, WantShadowInput
from tests.workflow.conftest import SkippingServers
from tests.workflow.life_stage import LifeStage, life_stage
from workflows.shadow_client import find_shadow_sync
from workflows.shadow_sync import ShadowSyncWorkflow

REPORTED = DeviceHappening.SHADOW_REPORTED


@pytest_asyncio.fixture
async def life(servers: SkippingServers) -> AsyncIterator[LifeStage]:
    async with life_stage(servers) as stage:
        yield stage


async def test_a_device_that_reports_it_ends_the_wait(life: LifeStage) -> None:
    await life.sync_shadow(limit=timedelta(hours=1))
    await life.until_asked("want_shadow")
    life.script.shadow_reported = True
    await life.tell(REPORTED, shadow="", version=4)
    result = await life.result(skipping=False)
    assert (result.outcome, result.version, result.differs) == (SyncOutcome.CONFIRMED, 3, {})
    assert life.script.steps == ["want_shadow", "check_shadow"]
    assert await life.took() < timedelta(seconds=5)


async def test_what_the_device_reports_already_is_waited_for_by_nobody(life: LifeStage) -> None:
    life.script.shadow_reported = True
    await life.sync_shadow()
    assert (await life.result()).outcome is SyncOutcome.CONFIRMED
    assert life.script.steps == ["want_shadow"]


async def test_a_report_of_something_else_ends_nothing_and_the_next_look_waits_a_second(life: LifeStage) -> None:
    await life.sync_shadow(limit=timedelta(minutes=5))
    await life.until_asked("want_shadow")
    await life.tell(REPORTED, shadow="", version=4)
    await life.until_asked("check_shadow")
    life.script.shadow_reported = True
    await life.tell(REPORTED, shadow="", version=5)
    assert (await life.result(skipping=False)).outcome is SyncOutcome.CONFIRMED
    assert timedelta(seconds=1) <= await life.took() < timedelta(seconds=5)


async def test_a_device_that_says_nothing_is_reminded_and_the_result_says_what_differs(life: LifeStage) -> None:
    await life.sync_shadow(limit=timedelta(seconds=30))
    result = await life.result()
    assert (result.outcome, result.differs) == (SyncOutcome.TIMED_OUT, {"power": "on"})
    assert result.reason == "it is offline; it stays wanted"
    reminders = [check.remind for check in life.script.only(CheckShadowInput)]
    assert reminders == [True, True, False], "after 5 and 15 seconds; at the limit it is looked at once more"
    assert timedelta(seconds=30) <= await life.took() < timedelta(seconds=35)


async def test_a_report_whose_signal_was_lost_is_found_by_the_next_reminder(life: LifeStage) -> None:
    life.script.reported_on_reminder = 2
    await life.sync_shadow(limit=timedelta(hours=1))
    assert (await life.result()).outcome is SyncOutcome.CONFIRMED
    assert await life.took() < timedelta(minutes=1)


async def test_a_device_that_may_not_be_asked_is_a_result_that_says_why(life: LifeStage) -> None:
    life.script.refusal = "cannot configure motor-7: it is retired"
    await life.sync_shadow()
    result = await life.result()
    assert (result.outcome, result.reason) == (SyncOutcome.REFUSED, "cannot configure motor-7: it is retired")


@pytest.mark.parametrize("step", ["want_shadow", "check_shadow", "end_shadow"])
async def test_a_step_that_fails_is_tried_again(life: LifeStage, step: str) -> None:
    life.script.fails.append(step)
    await life.sync_shadow(limit=timedelta(seconds=20))
    assert (await life.result()).outcome is SyncOutcome.TIMED_OUT
    assert not life.script.fails


async def test_whoever_asks_for_the_same_joins_the_wait_and_it_is_written_once(life: LifeStage) -> None:
    await life.sync_shadow(limit=timedelta(hours=1))
    await life.until_asked("want_shadow")
    await life.sync_shadow(limit=timedelta(hours=2))
    first, second = life.started
    assert first.id == second.id and first.id.startswith(f"shadow:{life.device_id}//")
    assert (await first.describe()).run_id == (await second.describe()).run_id
    life.script.shadow_reported = True
    await life.tell(REPORTED, shadow="", version=4)
    assert (await life.result(skipping=False)).outcome is SyncOutcome.CONFIRMED
    assert len(life.script.only(WantShadowInput)) == 1


async def test_the_same_after_the_end_is_a_wait_of_its_own_with_a_mark_of_its_own(life: LifeStage) -> None:
    life.script.shadow_reported = True
    for _ in range(2):
        await life.sync_shadow()
        await life.result()
    one, other = life.script.only(WantShadowInput)
    assert one.workflow_id == other.workflow_id and one.mark != other.mark


async def test_nothing_is_lost_when_the_one_who_waits_dies(life: LifeStage) -> None:
    """Another program joins by the token that the first one said."""
    await life.sync_shadow(limit=timedelta(hours=1))
    await life.until_asked("want_shadow")
    waiting = asyncio.create_task(life.handle.result())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    life.script.shadow_reported = True
    await life.tell(REPORTED, shadow="", version=4)
    token = life.handle.id.rpartition("/")[2]
    joined = find_shadow_sync(life.environment.client, life.device_id, "", token)
    assert (await asyncio.wait_for(joined.result(), 20)).outcome is SyncOutcome.CONFIRMED


async def test_a_worker_that_remembers_nothing_replays_to_the_same_end(life: LifeStage) -> None:
    await life.remember_nothing()
    await life.sync_shadow(limit=timedelta(hours=1))
    await life.until_asked("want_shadow")
    await life.tell(REPORTED, shadow="", version=4)
    await life.until_asked("check_shadow")
    life.script.shadow_reported = True
    await life.tell(REPORTED, shadow="", version=5)
    assert (await life.result(skipping=False)).outcome is SyncOutcome.CONFIRMED
    assert life.script.steps.count("want_shadow") == 1


async def test_the_query_says_what_it_waits_for(life: LifeStage) -> None:
    await life.sync_shadow(limit=timedelta(hours=1))
    await life.until_asked("want_shadow")
    async with asyncio.timeout(20):
        while (status := await life.handle.query(ShadowSyncWorkflow.status)).phase != "waiting":
            await asyncio.sleep(0.01)
    assert status.version == 3 and status.until is not None
    life.script.shadow_reported = True
    await life.tell(REPORTED, shadow="", version=4)
    assert (await life.result(skipping=False)).version == 3
