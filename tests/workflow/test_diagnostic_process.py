"""A question to a device on a time-skipping server with scripted activities."""

from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import uuid4

import pytest
import pytest_asyncio
from temporalio.exceptions import WorkflowAlreadyStartedError

from models.diagnostics import AskOutcome, DiagnosticState, EndedQuestion, EndQuestionInput, LookAtBootInput
from models.identity import DeviceHappening
from models.protocol import DiagnosticType
from tests.workflow.conftest import SkippingServers
from tests.workflow.life_stage import LifeStage, life_stage
from workflows import options

DIAGNOSED, HEARTBEAT = DeviceHappening.DIAGNOSED, DeviceHappening.HEARTBEAT
ANSWERED = EndedQuestion(state=DiagnosticState.ANSWERED)


@pytest_asyncio.fixture
async def life(servers: SkippingServers) -> AsyncIterator[LifeStage]:
    async with life_stage(servers) as stage:
        yield stage


async def test_an_answer_ends_the_wait(life: LifeStage) -> None:
    life.script.question, request_id = ANSWERED, uuid4().hex
    await life.diagnose(request_id=request_id)
    await life.until_asked("publish_question")
    await life.tell(DIAGNOSED, request_id=request_id)
    await life.tell(DIAGNOSED, request_id=request_id)
    result = await life.result()
    assert (result.outcome, result.request_id) == (AskOutcome.ANSWERED, request_id)
    assert life.script.steps == ["open_question", "publish_question", "end_question"]
    assert await life.took() < timedelta(seconds=20)


async def test_an_answer_to_another_question_does_not(life: LifeStage) -> None:
    await life.diagnose()
    await life.until_asked("publish_question")
    await life.tell(DIAGNOSED, request_id="f" * 32)
    result = await life.result()
    assert (result.outcome, result.text) == (AskOutcome.TIMED_OUT, "no answer in time")


async def test_a_question_is_sent_three_times_and_ends_after_thirty_seconds(life: LifeStage) -> None:
    await life.diagnose()
    result = await life.result()
    assert result.outcome is AskOutcome.TIMED_OUT
    assert life.script.steps == ["open_question", *["publish_question"] * 3, "end_question"]
    assert timedelta(seconds=30) <= await life.took() < timedelta(seconds=60)


async def test_an_answer_whose_signal_was_lost_is_found_at_the_end(life: LifeStage) -> None:
    life.script.question = ANSWERED
    await life.diagnose(DiagnosticType.LOG_TAIL, lines=20)
    assert (await life.result()).outcome is AskOutcome.ANSWERED


async def test_a_device_that_says_no_has_failed_and_its_words_are_the_result(life: LifeStage) -> None:
    life.script.question = EndedQuestion(state=DiagnosticState.FAILED, text="Invalid confirmation token")
    await life.diagnose(DiagnosticType.REBOOT, wait_for_boot=True)
    result = await life.result()
    assert (result.outcome, result.text) == (AskOutcome.FAILED, "Invalid confirmation token")
    assert "look_at_boot" not in life.script.steps


async def test_a_device_that_may_not_be_asked_is_refused(life: LifeStage) -> None:
    life.script.refusal = "cannot ask motor-7: nothing that it says is used"
    await life.diagnose()
    result = await life.result()
    assert (result.outcome, result.text) == (AskOutcome.REFUSED, life.script.refusal)
    assert life.script.steps == ["open_question"]


async def test_a_question_that_was_answered_before_is_not_sent(life: LifeStage) -> None:
    life.script.asked_before, life.script.question = DiagnosticState.ANSWERED, ANSWERED
    await life.diagnose()
    assert (await life.result()).outcome is AskOutcome.ANSWERED
    assert life.script.steps == ["open_question", "end_question"]


async def test_a_question_is_asked_once_even_after_its_end(life: LifeStage) -> None:
    request_id = uuid4().hex
    await life.diagnose(request_id=request_id)
    await life.result()
    with pytest.raises(WorkflowAlreadyStartedError):
        await life.diagnose(request_id=request_id)


async def test_a_reboot_waits_for_a_heartbeat_of_another_boot(life: LifeStage) -> None:
    life.script.question = ANSWERED
    life.script.boots.extend([None, 14.2])
    await life.diagnose(DiagnosticType.REBOOT, delay_seconds=5, wait_for_boot=True)
    await life.until_asked("publish_question")
    await life.tell(DIAGNOSED, request_id=life.handle.id.split("/")[1])
    await life.until_asked("look_at_boot")
    await life.tell(HEARTBEAT)
    result = await life.result()
    assert (result.outcome, result.boot_seconds) == (AskOutcome.REBOOTED, 14.2)
    assert "14s after it said so" in result.text
    [ended] = life.script.only(EndQuestionInput)
    assert (ended.watch_boot, ended.boot_id) == (True, "b1")


async def test_a_device_that_never_comes_back_is_a_result_and_nothing_is_waited_for_any_more(life: LifeStage) -> None:
    life.script.question = ANSWERED
    await life.diagnose(DiagnosticType.REBOOT, wait_for_boot=True)
    result = await life.result()
    assert result.outcome is AskOutcome.NOT_REBOOTED
    looks = life.script.only(LookAtBootInput)
    assert [look.last for look in looks] == [False] * (len(looks) - 1) + [True]
    assert timedelta(minutes=10) <= await life.took() < timedelta(minutes=12)


async def test_without_wait_a_reboot_ends_with_the_answer(life: LifeStage) -> None:
    life.script.question = ANSWERED
    await life.diagnose(DiagnosticType.REBOOT)
    assert (await life.result()).outcome is AskOutcome.ANSWERED
    assert life.script.only(LookAtBootInput) == []


async def test_a_database_that_is_away_delays_and_loses_nothing(life: LifeStage) -> None:
    life.script.fails.extend(["open_question", "publish_question", "end_question"])
    life.script.question = ANSWERED
    await life.diagnose()
    assert (await life.result()).outcome is AskOutcome.ANSWERED


async def test_every_task_can_be_replayed_from_the_first_event_and_search_attributes_say_what_it_is(
    life: LifeStage,
) -> None:
    await life.remember_nothing()
    life.script.question = ANSWERED
    life.script.boots.extend([3.0])
    await life.diagnose(DiagnosticType.REBOOT, wait_for_boot=True)
    assert (await life.result()).outcome is AskOutcome.REBOOTED
    found = (await life.handle.describe()).typed_search_attributes
    assert (found[options.KIND], found[options.DEVICE]) == (options.KIND_DIAGNOSTIC, life.device_id)
    assert (found[options.PHASE], found[options.OUTCOME]) == ("done", "rebooted")
