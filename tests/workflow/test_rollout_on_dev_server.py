"""What only the real server does: continue-as-new, termination of children, visibility, what the UI shows."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta

import pytest_asyncio
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.service import RPCError
from temporalio.testing import WorkflowEnvironment

from models.fleetjob import StartFleetJobInput
from models.jobspec import FleetJobSpec
from models.rollout import (
    AdjustRolloutInput,
    DriveMode,
    DriveWaveInput,
    FinishRolloutInput,
    Outcome,
    PauseRolloutInput,
    Phase,
    PromoteRolloutInput,
    ResumeRolloutInput,
)
from tests.temporal_server import BINARIES
from tests.workflow.conftest import THREE_WAVES, Stage
from tests.workflow.job_stage import JobStage
from tests.workflow.scripted import HOLD, Runs, ScriptedRollout, Waits
from workflows.client import register_search_attributes
from workflows.fleet_job import FleetJobWorkflow
from workflows.options import TASK_QUEUE
from workflows.rollout import RolloutWorkflow

ANSWER = DriveMode.ANSWERING
LONG_HISTORY = 45
"""Events after which this server suggests to continue as new; the default is 4,096."""


@pytest_asyncio.fixture(scope="module")
async def server() -> AsyncIterator[WorkflowEnvironment]:
    """A development server that finds histories long early."""
    async with await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        dev_server_existing_path=str(BINARIES / "temporal"),
        dev_server_extra_args=["--dynamic-config-value", f"limit.historyCount.suggestContinueAsNew={LONG_HISTORY}"],
        dev_server_log_level="error",
    ) as environment:
        yield environment


@pytest_asyncio.fixture
async def live(server: WorkflowEnvironment) -> AsyncIterator[Stage]:
    """A stage on the real server: its time does not run ahead."""
    await register_search_attributes(server.client)
    stage = Stage(server, ScriptedRollout())
    await stage.start_workers()
    yield stage
    await stage.stop_workers()
    for handle in stage.started:
        with suppress(RPCError):  # it has ended, or does so just now
            await handle.terminate("the test is over")


async def test_search_attributes_are_registered_once(server: WorkflowEnvironment) -> None:
    await register_search_attributes(server.client)
    assert await register_search_attributes(server.client) == []


async def test_a_long_history_goes_on_as_a_new_run_with_everything_it_remembered(live: Stage) -> None:
    live.script.waves = tuple((f"w{n}", 5) for n in range(1, 7))
    live.script.script(1, ANSWER, Runs())
    handle = await live.start([{"name": f"w{n}", "size": 5 * n} for n in range(1, 7)])
    first_run = handle.first_execution_run_id
    await live.until_asked("drive 1 answering")
    await handle.execute_update(RolloutWorkflow.adjust, AdjustRolloutInput(actor="alice", in_flight=33))
    await handle.execute_update(RolloutWorkflow.pause, PauseRolloutInput(actor="alice"))
    await handle.execute_update(RolloutWorkflow.resume, ResumeRolloutInput(actor="alice"))
    live.script.answers.set()
    result = await live.result()

    assert result.outcome is Outcome.SUCCEEDED
    assert (await handle.describe()).run_id != first_run
    assert live.script.kinds().count("PlanRollout") == live.script.kinds().count("PrepareArtifacts") == 1
    assert [drive.wave for drive in live.script.only(DriveWaveInput)] == [1, 2, 3, 4, 5, 6]
    status = await handle.query(RolloutWorkflow.status)
    assert status.pace is not None
    assert (status.phase, status.pace.in_flight, len(status.verdicts)) == (Phase.DONE, 33, 6)


async def test_a_wave_that_somebody_terminates_ends_the_rollout_as_failed_and_closes_its_job(live: Stage) -> None:
    live.script.script(1, ANSWER, Waits())
    await live.start()
    await live.until_asked("drive 1 answering")
    await live.wave(1).terminate("by mistake")
    result = await live.result()
    assert result.outcome is Outcome.FAILED
    assert "terminated" in result.reason.lower()
    assert live.script.only(FinishRolloutInput)[-1].drain


async def test_rollouts_and_waves_are_found_by_what_they_are_and_how_they_stand(live: Stage) -> None:
    live.script.script(2, ANSWER, HOLD)
    await live.start()
    await live.until(Phase.HOLDING)
    assert await ids_of(live, 'TidegateKind = "rollout" AND TidegatePhase = "holding"') == [live.handle.id]
    found = await ids_of(
        live, f'TidegateKind = "wave" AND TidegateRelease = "motor@1.3.0" AND WorkflowId STARTS_WITH "{live.handle.id}"'
    )
    assert sorted(found) == [live.wave(1).id, live.wave(2).id]
    await live.handle.execute_update(RolloutWorkflow.promote, PromoteRolloutInput(actor="alice"))
    await live.result()
    assert await ids_of(live, f'TidegateOutcome = "succeeded" AND WorkflowId = "{live.handle.id}"') == [live.handle.id]


async def test_the_page_of_a_rollout_says_what_it_is_where_it_stands_and_what_it_waits_for(live: Stage) -> None:
    await live.start(THREE_WAVES)
    await live.until(Phase.SOAKING)
    described = await live.handle.describe()
    assert await described.static_summary() == "motor@1.3.0 in 3 waves: canary 5%, early 25%, fleet 100%"
    assert "**Gate** healthy 2%, limit 10%" in (await described.static_details() or "")
    details = (await live.handle.query("__temporal_workflow_metadata")).current_details
    assert details.startswith("**soaking** promote: 20 of 20 succeeded")
    assert "| 1 canary | 3 | 4h | soaking |  |" in details
    assert "Next timer: soak ends 20" in details
    assert "Gate: halt when failed ≥ 4.0704 + 0.050253 × exposed" in details


async def test_the_whole_history_of_a_rollout_of_three_waves_has_at_most_a_hundred_events(live: Stage) -> None:
    await live.start()
    await live.result()
    handles = [live.handle, *(live.wave(n) for n in (1, 2, 3))]
    events = [len((await handle.fetch_history()).events) for handle in handles]
    assert sum(events) <= 100, events


async def test_a_worker_that_ends_in_the_middle_of_a_soak_costs_nothing_but_a_replay(live: Stage) -> None:
    live.script.waves = (("canary", 3), ("fleet", 57))
    await live.start([{"name": "canary", "size": "5%", "soak": "2s"}, {"name": "fleet", "size": "100%"}])
    await live.until(Phase.SOAKING)
    await live.until_asked("drive 1 soaking")
    await live.stop_workers()
    await live.start_workers()
    assert (await live.result()).outcome is Outcome.SUCCEEDED
    assert live.script.kinds().count("PlanRollout") == live.script.kinds().count("drive 1 answering") == 1
    assert await live.took() >= timedelta(seconds=2)


async def ids_of(live: Stage, query: str) -> list[str]:
    """Workflows that a visibility query finds, once it finds any; visibility lags behind a little."""
    for _ in range(100):
        found = [execution.id async for execution in live.environment.client.list_workflows(query)]
        if found:
            return found
        await asyncio.sleep(0.05)
    return []


async def test_a_long_fleet_job_goes_on_as_a_new_run_under_the_name_it_had(server: WorkflowEnvironment) -> None:
    await register_search_attributes(server.client)
    stage = JobStage(server)
    stage.script.waves = tuple((f"w{n}", 5) for n in range(1, 9))
    spec = FleetJobSpec.model_validate(
        {"name": "nightly", "operation": "restart", "waves": [{"name": f"w{n}", "size": 5 * n} for n in range(1, 9)]}
    )
    await stage.start_workers()
    handle = await server.client.start_workflow(
        FleetJobWorkflow.run,
        StartFleetJobInput(spec=spec, schedule="nightly"),
        id="job:nightly-2026-11-30T02:00:00Z",
        task_queue=TASK_QUEUE,
    )
    stage.started.append(handle)
    result = await stage.result()
    await stage.stop_workers()
    assert (result.outcome, result.name) == (Outcome.SUCCEEDED, "nightly-20261130T020000")
    assert (await handle.describe()).run_id != handle.first_execution_run_id
    assert stage.script.kinds().count("PlanFleetJob") == 1
    assert [drive.wave for drive in stage.script.only(DriveWaveInput)] == list(range(1, 9))
