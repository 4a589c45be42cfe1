"""A device's configuration on a time-skipping server with scripted activities."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio

from models.identity import ConfigureOutcome, DeviceHappening
from models.lifecycle import EndConfigurationInput, HintConfigurationInput, WantConfigurationInput
from tests.workflow.conftest import SkippingServers
from tests.workflow.life_stage import LifeStage, life_stage
from workflows.configuration import ConfigurationWorkflow

CONFIGURED = DeviceHappening.CONFIGURED


@pytest_asyncio.fixture
async def life(servers: SkippingServers) -> AsyncIterator[LifeStage]:
    async with life_stage(servers) as stage:
        yield stage


async def test_a_device_that_reports_the_version_ends_the_wait(life: LifeStage) -> None:
    await life.configure()
    await life.until_asked("hint_configuration")
    await life.tell(CONFIGURED, version=1)
    result = await life.result()
    assert (result.outcome, result.version) == (ConfigureOutcome.APPLIED, 1)
    assert life.script.steps == ["want_configuration", "hint_configuration"]
    assert await life.took() < timedelta(seconds=30)


async def test_the_request_is_written_once_though_start_and_signal_carry_it(life: LifeStage) -> None:
    life.script.applied_at_once = True
    await life.configure()
    assert (await life.result()).outcome is ConfigureOutcome.APPLIED
    [wanted] = life.script.only(WantConfigurationInput)
    assert (wanted.config, wanted.actor, wanted.workflow_id) == (
        {"interval": 5},
        "alice",
        f"configure:{life.device_id}",
    )


async def test_a_newer_configuration_replaces_what_is_waited_for_and_is_a_version_more(life: LifeStage) -> None:
    await life.configure()
    await life.until_asked("hint_configuration")
    await life.configure(config={"interval": 7})
    await life.until_asked("hint_configuration", 2)
    await life.tell(CONFIGURED, version=1)
    await life.tell(CONFIGURED, version=2)
    result = await life.result()
    assert (result.outcome, result.version) == (ConfigureOutcome.APPLIED, 2)
    assert [wanted.config for wanted in life.script.only(WantConfigurationInput)] == [{"interval": 5}, {"interval": 7}]
    assert life.started[0].id == life.started[1].id
    assert (await life.started[0].describe()).run_id == (await life.started[1].describe()).run_id


async def test_a_report_of_an_older_version_ends_nothing(life: LifeStage) -> None:
    await life.configure()
    await life.configure(config={"interval": 7})
    await life.until_asked("want_configuration", 2)
    await life.tell(CONFIGURED, version=1)
    result = await life.result()
    assert (result.outcome, result.version) == (ConfigureOutcome.TIMED_OUT, 2)


async def test_a_device_that_never_answers_is_reminded_ever_more_rarely_until_the_limit(life: LifeStage) -> None:
    await life.configure(limit=timedelta(hours=24))
    result = await life.result()
    assert (result.outcome, result.version) == (ConfigureOutcome.TIMED_OUT, 1)
    assert result.reason == "no report of version 1 within 1d; it stays wanted"
    assert 10 <= len(life.script.only(HintConfigurationInput)) <= 16
    assert timedelta(hours=24) <= await life.took() < timedelta(hours=24, minutes=1)
    assert len(life.script.only(EndConfigurationInput)) == 1


async def test_a_report_whose_signal_was_lost_is_found_by_the_next_reminder(life: LifeStage) -> None:
    life.script.applied_on_hint = 3
    await life.configure()
    assert (await life.result()).outcome is ConfigureOutcome.APPLIED
    assert await life.took() < timedelta(minutes=2)


async def test_a_report_in_the_last_moment_counts(life: LifeStage) -> None:
    life.script.applied_at_end = True
    await life.configure(limit=timedelta(minutes=5))
    assert (await life.result()).outcome is ConfigureOutcome.APPLIED


async def test_a_device_that_may_not_be_configured_is_a_result_that_says_why(life: LifeStage) -> None:
    life.script.refusal = "cannot configure motor-7: it is retired"
    await life.configure()
    result = await life.result()
    assert (result.outcome, result.version, result.reason) == (
        ConfigureOutcome.REFUSED,
        0,
        "cannot configure motor-7: it is retired",
    )


@pytest.mark.parametrize("step", ["want_configuration", "hint_configuration", "end_configuration"])
async def test_a_step_that_fails_is_tried_again(life: LifeStage, step: str) -> None:
    life.script.fails.append(step)
    await life.configure(limit=timedelta(minutes=1))
    assert (await life.result()).outcome is ConfigureOutcome.TIMED_OUT
    assert not life.script.fails


async def test_a_worker_that_remembers_nothing_replays_to_the_same_end(life: LifeStage) -> None:
    await life.remember_nothing()
    await life.configure()
    await life.until_asked("hint_configuration")
    await life.tell(CONFIGURED, version=1)
    assert (await life.result()).outcome is ConfigureOutcome.APPLIED
    assert life.script.steps.count("want_configuration") == 1


async def test_the_query_says_what_it_waits_for(life: LifeStage) -> None:
    await life.configure()
    await life.until_asked("hint_configuration")
    status = await life.handle.query(ConfigurationWorkflow.status)
    assert (status.phase, status.version) == ("waiting", 1)
    assert status.until is not None
    await life.tell(CONFIGURED, version=1)
    assert (await life.result()).version == 1
