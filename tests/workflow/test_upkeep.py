"""Upkeep of revocation lists: signs, looks, and looks too where nobody signs. And the schedule that starts it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from temporalio import activity
from temporalio.client import Schedule, ScheduleOverlapPolicy, ScheduleUpdate, ScheduleUpdateInput
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Replayer, Worker

from models.errors import NotFoundError
from models.identity import (
    CheckAuthoritiesInput,
    CheckAuthoritiesResult,
    KeepCrlsInput,
    KeepCrlsResult,
    PublishCrlsInput,
    PublishCrlsResult,
    PublishedCrlFacts,
)
from tests.temporal_server import development_server
from tests.workflow.conftest import SkippingServers
from workflows import options
from workflows.client import ensure_schedules
from workflows.sandbox import runner
from workflows.upkeep import CrlUpkeepWorkflow

SIGNED = PublishedCrlFacts(
    authority_id="a" * 64,
    name="Tidegate device CA 1",
    number=8,
    revoked=3,
    next_update=datetime(2027, 1, 1, tzinfo=UTC),
    reason="2 certificates revoked since list 7",
)


class ScriptedAuthorities:
    """Signs and looks as it is told to."""

    def __init__(self, *answers: PublishCrlsResult | Exception, alerts: tuple[str, ...] = ()) -> None:
        self.answers = list(answers)
        self.alerts = alerts
        self.asked: list[str] = []

    @activity.defn
    async def publish_crls(self, asked: PublishCrlsInput) -> PublishCrlsResult:
        self.asked.append("publish")
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    @activity.defn
    async def check_authorities(self, asked: CheckAuthoritiesInput) -> CheckAuthoritiesResult:
        self.asked.append("check")
        return CheckAuthoritiesResult(alerts=self.alerts)


async def upkeep(servers: SkippingServers, script: ScriptedAuthorities, *, signer: bool = True) -> KeepCrlsResult:
    """One round, with or without a worker that has the keys."""
    client = (await servers.get()).client
    async with AsyncExitStack() as stack:
        for queue, activities in (
            (options.TASK_QUEUE, [script.check_authorities]),
            (options.CA_QUEUE, [script.publish_crls]),
        ):
            if signer or queue != options.CA_QUEUE:
                flows: list[Any] = [CrlUpkeepWorkflow] if queue == options.TASK_QUEUE else []
                worker = Worker(
                    client, task_queue=queue, workflows=flows, activities=activities, workflow_runner=runner()
                )
                await stack.enter_async_context(worker)
        handle = await client.start_workflow(
            CrlUpkeepWorkflow.run, KeepCrlsInput(), id=f"upkeep:crl-{uuid4().hex[:8]}", task_queue=options.TASK_QUEUE
        )
        result = await asyncio.wait_for(handle.result(), 20)
    replayer = Replayer(workflows=[CrlUpkeepWorkflow], workflow_runner=runner(), data_converter=pydantic_data_converter)
    await replayer.replay_workflow(await handle.fetch_history())
    return result


async def test_a_round_signs_what_is_due_and_then_looks(servers: SkippingServers) -> None:
    script = ScriptedAuthorities(PublishCrlsResult(signed=(SIGNED,), standing=1), alerts=("a CA ends",))
    result = await upkeep(servers, script)
    assert script.asked == ["publish", "check"]
    assert result.reason == "signed list 8 of Tidegate device CA 1 (2 certificates revoked since list 7); 1 stands"
    assert (result.signed, result.alerts) == ((SIGNED,), ("a CA ends",))


async def test_a_signer_that_is_away_for_a_while_is_waited_for(servers: SkippingServers) -> None:
    away = ConnectionError("the signer does not answer")
    script = ScriptedAuthorities(away, away, PublishCrlsResult(standing=1))
    result = await upkeep(servers, script)
    assert script.asked == ["publish", "publish", "publish", "check"]
    assert result.reason == "1 stands"


async def test_where_no_worker_has_the_keys_the_round_still_looks(
    servers: SkippingServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, lists would lapse and nobody would be told before devices are refused.

    While an activity waits for a worker this server's time does not run ahead, so the wait is a second here.
    """
    monkeypatch.setattr(options, "CRL_UPKEEP_LIMIT", timedelta(seconds=1))
    script = ScriptedAuthorities(PublishCrlsResult(), alerts=("the list is past half of its life",))
    result = await upkeep(servers, script, signer=False)
    assert script.asked == ["check"]
    assert result.reason.startswith("no list could be signed: ")
    assert result.alerts == ("the list is past half of its life",)


async def test_what_no_repetition_mends_is_not_repeated(servers: SkippingServers) -> None:
    lost = ApplicationError("the CA's key does not exist", type=NotFoundError.__name__)
    script = ScriptedAuthorities(lost)
    result = await upkeep(servers, script)
    assert script.asked == ["publish", "check"]
    assert result.reason == "no list could be signed: NotFoundError: the CA's key does not exist"


# --- the schedule ----------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module")
async def server() -> AsyncIterator[WorkflowEnvironment]:
    """A development server: the one that skips time has no schedules."""
    async with development_server() as environment:
        yield environment


async def test_many_workers_make_each_schedule_once_and_it_starts_a_round_at_once(server: WorkflowEnvironment) -> None:
    client = server.client
    made = await asyncio.gather(*(ensure_schedules(client, timedelta(hours=168)) for _ in range(5)))
    assert sorted(name for names in made for name in names) == [
        options.CRL_SCHEDULE,
        options.OFFLINE_SCHEDULE,
        options.RETENTION_SCHEDULE,
    ]
    handle = client.get_schedule_handle(options.CRL_SCHEDULE)
    schedule = (await handle.describe()).schedule
    assert schedule.spec.intervals[0].every == timedelta(hours=1)
    assert schedule.policy.catchup_window == options.CATCH_UP
    assert schedule.policy.overlap is ScheduleOverlapPolicy.SKIP
    script = ScriptedAuthorities(PublishCrlsResult(standing=1))
    async with (
        Worker(
            client,
            task_queue=options.TASK_QUEUE,
            workflows=[CrlUpkeepWorkflow],
            activities=[script.check_authorities],
            workflow_runner=runner(),
        ),
        Worker(client, task_queue=options.CA_QUEUE, activities=[script.publish_crls]),
    ):
        deadline = asyncio.get_running_loop().time() + 30
        while script.asked != ["publish", "check"]:
            assert asyncio.get_running_loop().time() < deadline, script.asked
            await asyncio.sleep(0.05)


async def test_a_schedule_is_brought_to_what_this_version_wants_and_stays_paused(server: WorkflowEnvironment) -> None:
    client = server.client
    await ensure_schedules(client, timedelta(hours=168))
    handle = client.get_schedule_handle(options.CRL_SCHEDULE)

    async def until(true: Callable[[Schedule], bool]) -> Schedule:
        """The server shows changes a moment later."""
        while not true(found := (await handle.describe()).schedule):
            await asyncio.sleep(0.05)
        return found

    def daily(found: ScheduleUpdateInput) -> ScheduleUpdate:
        found.description.schedule.spec.intervals[0].every = timedelta(days=1)
        return ScheduleUpdate(found.description.schedule)

    await handle.pause(note="maintenance of the signer")
    await until(lambda schedule: schedule.state.paused)
    await handle.update(daily)
    await until(lambda schedule: schedule.spec.intervals[0].every == timedelta(days=1))
    assert await ensure_schedules(client, timedelta(hours=4)) == []
    found = await until(lambda schedule: schedule.spec.intervals[0].every == timedelta(minutes=30))
    assert (found.state.paused, found.state.note) == (True, "maintenance of the signer")
