"""The workflows that look who is offline and keep the history by days, and the schedules that start them."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from temporalio.client import ScheduleOverlapPolicy, WorkflowFailureError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from models.health import KeepHistoryInput, SweepOfflineInput
from tests.temporal_server import development_server
from tests.workflow.conftest import SkippingServers
from tests.workflow.scripted_health import DEAF, ScriptedHealth
from workflows import options
from workflows.client import ensure_schedules
from workflows.offline import OfflineSweepWorkflow
from workflows.retention import RetentionWorkflow
from workflows.sandbox import runner


def worker_of(client: Any, script: ScriptedHealth) -> Worker:
    return Worker(
        client,
        task_queue=options.TASK_QUEUE,
        workflows=[OfflineSweepWorkflow, RetentionWorkflow],
        activities=[script.sweep_offline, script.keep_history],
        workflow_runner=runner(),
    )


async def play(servers: SkippingServers, script: ScriptedHealth, run: Any, asked: Any) -> Any:
    client = (await servers.get()).client
    async with worker_of(client, script):
        handle = await client.start_workflow(run, asked, id=f"health-{uuid4().hex[:8]}", task_queue=options.TASK_QUEUE)
        return await asyncio.wait_for(handle.result(), 20)


async def test_a_look_says_what_it_found(servers: SkippingServers) -> None:
    result = await play(servers, ScriptedHealth(), OfflineSweepWorkflow.run, SweepOfflineInput())
    assert (result.offline, result.back, result.reason) == (2, 1, "2 fell silent, 1 back")
    deaf = await play(servers, ScriptedHealth(listening=False), OfflineSweepWorkflow.run, SweepOfflineInput())
    assert not deaf.listening and deaf.alerts == (DEAF,)


async def test_a_look_is_tried_again_while_postgresql_is_away_and_given_up_for_the_next(
    servers: SkippingServers,
) -> None:
    script = ScriptedHealth(ConnectionError("away"), ConnectionError("away"))
    assert (await play(servers, script, OfflineSweepWorkflow.run, SweepOfflineInput())).offline == 2
    assert script.asked == ["sweep"] * 3
    gone = ScriptedHealth(*[ConnectionError("away")] * 1000)
    with pytest.raises(WorkflowFailureError):
        await play(servers, gone, OfflineSweepWorkflow.run, SweepOfflineInput())


async def test_a_round_of_retention_says_what_it_made(servers: SkippingServers) -> None:
    script = ScriptedHealth(ConnectionError("a lock could not be had"))
    result = await play(servers, script, RetentionWorkflow.run, KeepHistoryInput())
    assert result.made == ("heartbeats_20260301",) and script.asked == ["keep", "keep"]


@pytest_asyncio.fixture(scope="module")
async def server() -> AsyncIterator[WorkflowEnvironment]:
    """A development server: the one that skips time has no schedules."""
    async with development_server() as environment:
        yield environment


async def test_a_worker_without_keys_makes_the_schedules_of_health_which_start_at_once(
    server: WorkflowEnvironment,
) -> None:
    client = server.client
    assert sorted(await ensure_schedules(client, None)) == [options.OFFLINE_SCHEDULE, options.RETENTION_SCHEDULE]
    assert await ensure_schedules(client, None) == []
    wanted = {
        options.OFFLINE_SCHEDULE: (timedelta(minutes=1), options.OFFLINE_CATCH_UP),
        options.RETENTION_SCHEDULE: (timedelta(hours=1), options.CATCH_UP),
    }
    for name, (every, catch_up) in wanted.items():
        schedule = (await client.get_schedule_handle(name).describe()).schedule
        assert schedule.spec.intervals[0].every == every
        assert schedule.policy.catchup_window == catch_up
        assert schedule.policy.overlap is ScheduleOverlapPolicy.SKIP
    script = ScriptedHealth()
    async with worker_of(client, script), asyncio.timeout(30):
        while {"sweep", "keep"} - set(script.asked):
            await asyncio.sleep(0.05)
