"""A decommissioning on a time-skipping server with scripted activities."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio
from temporalio.client import WorkflowFailureError

from models.identity import DeviceHappening
from models.lifecycle import AskToWipeInput, AwaitBrokersInput, StopFlowsInput
from tests.workflow.conftest import SkippingServers
from tests.workflow.life_stage import LifeStage, life_stage

ANSWERED = DeviceHappening.COMMAND_ANSWERED
AFTER_THE_ANSWER = [
    "retire_device",
    "stop_flows",
    "publish_crls",
    "await_brokers",
    "clear_retained",
    "end_decommission",
]


@pytest_asyncio.fixture
async def life(servers: SkippingServers) -> AsyncIterator[LifeStage]:
    async with life_stage(servers) as stage:
        yield stage


async def test_a_device_that_answers_is_retired_at_once(life: LifeStage) -> None:
    await life.decommission()
    await life.until_asked("ask_to_wipe")
    life.script.wiped = True
    await life.tell(ANSWERED, request_id="wipe-1", status="succeeded")
    result = await life.result()
    assert (result.wiped, result.serial_number, result.executions_removed) == (True, "SN-7", 1)
    assert (result.certificates_revoked, result.retained_cleared) == (2, 3)
    assert result.reason == "its credentials are wiped; 3 retained messages cleared"
    assert life.script.steps == ["begin_decommission", "stop_flows", "ask_to_wipe", *AFTER_THE_ANSWER]
    assert await life.took() < timedelta(seconds=30)


async def test_a_device_that_never_answers_is_reminded_and_retired_when_the_time_is_over(life: LifeStage) -> None:
    await life.decommission(wipe_within=timedelta(minutes=10))
    result = await life.result()
    assert not result.wiped
    assert result.reason.startswith("it did not say that its credentials are wiped")
    assert timedelta(minutes=10) <= await life.took() < timedelta(minutes=11)
    assert 5 <= len(life.script.only(AskToWipeInput)) <= 12
    assert life.script.steps[-6:] == AFTER_THE_ANSWER


async def test_an_answer_to_another_command_ends_no_wait(life: LifeStage) -> None:
    await life.decommission(wipe_within=timedelta(minutes=10))
    await life.until_asked("ask_to_wipe")
    await life.tell(ANSWERED, request_id="rotate-9", status="succeeded")
    assert not (await life.result()).wiped
    assert await life.took() >= timedelta(minutes=10)


async def test_an_answer_whose_signal_was_lost_is_found_by_the_next_reminder(life: LifeStage) -> None:
    await life.decommission(wipe_within=timedelta(minutes=10))
    await life.until_asked("ask_to_wipe")
    life.script.wiped = True
    assert (await life.result()).wiped
    assert await life.took() < timedelta(minutes=1)


@pytest.mark.parametrize("given", [{"wipe_within": timedelta(0)}, {}])
async def test_a_device_that_is_not_heard_is_not_asked(life: LifeStage, given: dict[str, timedelta]) -> None:
    life.script.answers = bool(given)
    await life.decommission(**given)
    await life.result()
    assert life.script.steps == ["begin_decommission", "stop_flows", *AFTER_THE_ANSWER]


async def test_workflows_are_ended_before_the_device_is_asked_and_after_it_is_retired(life: LifeStage) -> None:
    life.script.answers = False
    await life.decommission()
    await life.result()
    [first, second] = life.script.only(StopFlowsInput)
    assert first == second
    assert first.reason == f"{life.device_id} is decommissioned by alice"
    assert first.serial_number == "SN-7"


async def test_brokers_that_do_not_follow_and_a_signer_that_is_away_are_told_of_and_keep_nobody(
    life: LifeStage,
) -> None:
    life.script.answers, life.script.signs, life.script.behind = False, False, ("mosquitto",)
    await life.decommission()
    assert (await life.result()).reason == (
        "it did not say that its credentials are wiped; no revocation list was signed yet; "
        "broker mosquitto does not shut it out yet; 3 retained messages cleared"
    )
    assert life.script.only(AwaitBrokersInput)[0].revision == 12


async def test_retained_messages_that_cannot_be_cleared_are_an_alert_and_not_the_end_of_it(life: LifeStage) -> None:
    life.script.answers, life.script.retained_error = False, "the broker does not answer"
    await life.decommission()
    result = await life.result()
    assert result.retained_cleared == 0
    assert life.script.steps[-2:] == ["alert_retained_left", "end_decommission"]


async def test_a_device_that_is_retired_already_fails_with_the_reason(life: LifeStage) -> None:
    life.script.refusal = "cannot decommission motor-7: it is retired already"
    await life.decommission()
    with pytest.raises(WorkflowFailureError) as failed:
        await life.result()
    assert life.script.refusal in str(failed.value.cause.cause)  # type: ignore[union-attr]


@pytest.mark.parametrize("step", ["begin_decommission", "ask_to_wipe", *AFTER_THE_ANSWER])
async def test_a_step_that_fails_is_tried_again(life: LifeStage, step: str) -> None:
    life.script.fails.append(step)
    await life.decommission(wipe_within=timedelta(minutes=1))
    await life.result()
    assert not life.script.fails
    assert life.script.steps[-6:] == AFTER_THE_ANSWER


async def test_a_worker_that_remembers_nothing_replays_to_the_same_end(life: LifeStage) -> None:
    await life.remember_nothing()
    await life.decommission()
    await life.until_asked("ask_to_wipe")
    life.script.wiped = True
    await life.tell(ANSWERED, request_id="wipe-1", status="succeeded")
    assert (await life.result()).wiped
    assert life.script.steps.count("begin_decommission") == 1
