"""The process of a fleet job, on a server whose time runs ahead: its times, its waves, and what a person asks."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio

from models.errors import InvalidInputError
from models.fleetjob import (
    CancelFleetJobInput,
    FleetJobProgress,
    PauseFleetJobInput,
    PlanFleetJobInput,
    ResumeFleetJobInput,
    StartFleetJobInput,
)
from models.ids import fleet_job_workflow_id
from models.jobspec import FleetJobSpec
from models.rollout import (
    CancelRunningInput,
    DriveMode,
    FinishRolloutInput,
    Outcome,
    Phase,
    SetJobStatusInput,
)
from tests.workflow.conftest import SkippingServers
from tests.workflow.job_stage import JobStage
from tests.workflow.scripted import HALT, HOLD, Runs, Waits
from workflows import options
from workflows.fleet_job import FleetJobWorkflow
from workflows.fleet_jobs_client import start_fleet_job

ANSWER = DriveMode.ANSWERING
PAUSE, RESUME = PauseFleetJobInput(actor="bob", reason="storm"), ResumeFleetJobInput(actor="bob")


@pytest_asyncio.fixture
async def stage(servers: SkippingServers) -> AsyncIterator[JobStage]:
    stage = JobStage(await servers.get())
    await stage.start_workers()
    yield stage
    described = [await handle.describe() for handle in stage.started]
    await stage.stop_workers()
    if any(job.close_time is None for job in described):
        await servers.discard()


async def test_a_job_goes_through_its_waves_and_shows_how_it_ended(stage: JobStage) -> None:
    await stage.start()
    result = await stage.result()
    assert result.outcome is Outcome.SUCCEEDED
    assert stage.script.kinds() == [
        "PlanFleetJob",
        "drive 1 answering",
        "drive 2 answering",
        "drive 3 answering",
        "finish succeeded",
    ]
    described = await stage.handle.describe()
    attributes = described.typed_search_attributes
    assert [attributes[key] for key in (options.KIND, options.PHASE, options.OUTCOME)] == ["job", "done", "succeeded"]
    assert options.RELEASE not in attributes
    assert await described.static_summary() == "restart in 3 waves, at most 100 at a time, snapshot"


async def test_a_firmware_job_prepares_its_deltas_first(stage: JobStage) -> None:
    await stage.start("firmware-update", release="motor@1.3.0")
    assert (await stage.result()).outcome is Outcome.SUCCEEDED
    assert stage.script.kinds()[:3] == ["PlanFleetJob", "PrepareArtifacts", "drive 1 answering"]
    assert (await stage.handle.describe()).typed_search_attributes[options.RELEASE] == "motor@1.3.0"


async def test_a_job_waits_for_its_time_and_chooses_its_devices_then(stage: JobStage) -> None:
    start_at = await stage.now() + timedelta(days=3)
    await stage.start(start_at=start_at)
    status = await stage.until(Phase.SCHEDULED)
    assert status.start_at == start_at
    assert status.reason == f"starts at {start_at.isoformat()}"
    assert stage.script.asked == []
    assert (await stage.result()).outcome is Outcome.SUCCEEDED
    assert timedelta(0) <= await stage.ended_at() - start_at < timedelta(minutes=10)


async def test_a_job_that_is_paused_before_its_time_starts_when_it_is_resumed(stage: JobStage) -> None:
    await stage.start(start_at=await stage.now() + timedelta(hours=1))
    await stage.until(Phase.SCHEDULED)
    assert (await stage.update(FleetJobWorkflow.pause, PAUSE)).phase is Phase.PAUSED
    await stage.environment.sleep(timedelta(hours=2))
    assert stage.script.asked == []
    await stage.update(FleetJobWorkflow.resume, RESUME)
    assert (await stage.result()).outcome is Outcome.SUCCEEDED
    assert stage.script.only(SetJobStatusInput) == [], "there was nothing in PostgreSQL yet"


async def test_a_job_that_is_cancelled_before_its_time_has_never_been(stage: JobStage) -> None:
    await stage.start(start_at=await stage.now() + timedelta(days=3))
    await stage.until(Phase.SCHEDULED)
    await stage.update(FleetJobWorkflow.cancel, CancelFleetJobInput(actor="bob", reason="wrong site"))
    result = await stage.result()
    assert (result.outcome, result.reason) == (Outcome.ABORTED, "canceled by bob: wrong site")
    assert stage.script.asked == []
    assert await stage.took() < timedelta(hours=1)


@pytest.mark.parametrize("kind", ["NotFoundError", "RefusedError", "ConflictError"])
async def test_a_plan_that_cannot_be_made_is_a_result_that_says_why(stage: JobStage, kind: str) -> None:
    stage.script.plan_errors.append((kind, "cannot start job x: no device matches the target"))
    await stage.start()
    result = await stage.result()
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "cannot start job x: no device matches the target")
    assert result.progress == FleetJobProgress()


async def test_a_job_whose_end_has_passed_is_refused(stage: JobStage) -> None:
    await stage.start(end_at=await stage.now() - timedelta(hours=1))
    result = await stage.result()
    assert result.outcome is Outcome.REFUSED
    assert "has passed" in result.reason


async def test_a_continuous_job_ends_in_its_time_and_waits_for_what_is_in_progress(stage: JobStage) -> None:
    stage.script.waves = (("all", 60),)
    stage.script.script(1, ANSWER, Waits())
    end_at = await stage.now() + timedelta(days=7)
    await stage.start(membership="continuous", end_at=end_at, waves=[{"name": "all", "size": "100%"}])
    await stage.until_asked("drive 1 answering")
    result = await stage.result()
    assert (result.outcome, result.reason) == (Outcome.SUCCEEDED, f"ended at {end_at}, as agreed")
    [finish] = stage.script.only(FinishRolloutInput)
    assert finish.drain
    assert timedelta(0) <= await stage.ended_at() - end_at < timedelta(hours=1)


async def test_a_snapshot_whose_time_is_up_has_not_succeeded(stage: JobStage) -> None:
    stage.script.script(1, ANSWER, Waits())
    await stage.start(end_at=await stage.now() + timedelta(hours=8))
    result = await stage.result()
    assert result.outcome is Outcome.ABORTED
    assert result.reason.startswith("its time was up at ")


async def test_no_wave_opens_while_a_job_is_paused_and_it_goes_on_when_resumed(stage: JobStage) -> None:
    stage.script.script(1, ANSWER, Runs())
    await stage.start()
    await stage.until_asked("drive 1 answering")
    status = await stage.update(FleetJobWorkflow.pause, PAUSE)
    assert (status.phase, status.reason) == (Phase.PAUSED, "storm")
    stage.script.answers.set()
    await stage.until_asked("drive 1 soaking")
    assert "drive 2 answering" not in stage.script.kinds(), "the open wave is watched, no other opens"
    refused = await stage.refusal(FleetJobWorkflow.pause, PAUSE)
    assert refused.endswith("it is paused by bob already")
    await stage.update(FleetJobWorkflow.resume, RESUME)
    assert (await stage.result()).outcome is Outcome.SUCCEEDED
    assert [f"{s.status} by {s.actor}: {s.reason}" for s in stage.script.only(SetJobStatusInput)] == [
        "paused by bob: paused by bob: storm",
        "running by bob: resumed by bob",
    ]


async def test_a_cancelled_job_waits_for_what_is_in_progress_unless_forced(stage: JobStage) -> None:
    stage.script.script(1, ANSWER, Waits())
    stage.script.drains = True
    await stage.start()
    await stage.until_asked("drive 1 answering")
    await stage.update(FleetJobWorkflow.cancel, CancelFleetJobInput(actor="bob"))
    status = await stage.until(Phase.DRAINING)
    assert status.reason == "canceled by bob"
    await stage.until_asked("finish aborted")
    assert stage.script.only(CancelRunningInput) == []
    refused = await stage.refusal(FleetJobWorkflow.cancel, CancelFleetJobInput(actor="bob"))
    assert "cancel it with force to end the devices in progress as well" in refused
    await stage.update(FleetJobWorkflow.cancel, CancelFleetJobInput(actor="bob", force=True))
    result = await stage.result()
    assert (result.outcome, result.reason) == (Outcome.ABORTED, "canceled by bob")
    assert len(stage.script.only(CancelRunningInput)) == 1


async def test_force_cancels_what_is_in_progress_before_the_job_is_closed(stage: JobStage) -> None:
    stage.script.script(1, ANSWER, Waits())
    await stage.start()
    await stage.until_asked("drive 1 answering")
    await stage.update(FleetJobWorkflow.cancel, CancelFleetJobInput(actor="bob", force=True))
    assert (await stage.result()).outcome is Outcome.ABORTED
    assert stage.script.kinds()[-3:] == ["halted by bob", "CancelRunning", "finish aborted"]


async def test_a_job_with_a_gate_is_halted_by_it(stage: JobStage) -> None:
    stage.script.script(2, ANSWER, HALT)
    await stage.start(gate={})
    result = await stage.result()
    assert (result.outcome, result.reason) == (
        Outcome.HALTED,
        "halt: 5 of 5 exposed devices failed (100.0 %), boundary 4.3",
    )


async def test_a_wave_that_is_held_goes_on_when_a_person_resumes(stage: JobStage) -> None:
    stage.script.script(2, ANSWER, HOLD)
    await stage.start(gate={})
    await stage.until(Phase.HOLDING, wave=2)
    await stage.until_asked("drive 2 soaking")
    await stage.update(FleetJobWorkflow.resume, RESUME)
    assert (await stage.result()).outcome is Outcome.SUCCEEDED
    assert "close 2 promote" in stage.script.kinds()


async def test_what_cannot_be_asked_is_refused_with_the_reason(stage: JobStage) -> None:
    stage.script.script(1, ANSWER, Runs())
    await stage.start(name="steady")
    await stage.until(Phase.ROLLING)
    refused = await stage.refusal(FleetJobWorkflow.resume, RESUME)
    assert refused == "cannot resume job steady: it is neither paused nor held, it is rolling"
    stage.script.answers.set()
    await stage.result()


async def test_a_workflow_that_is_cancelled_from_the_outside_closes_its_job(stage: JobStage) -> None:
    stage.script.script(1, ANSWER, Waits())
    await stage.start()
    await stage.until_asked("drive 1 answering")
    await stage.handle.cancel()
    result = await stage.result()
    assert (result.outcome, result.reason) == (Outcome.ABORTED, "canceled: the workflow was cancelled")


async def test_a_schedules_run_has_the_time_of_its_start_in_its_name(stage: JobStage) -> None:
    spec = FleetJobSpec.model_validate({"name": "nightly", "operation": "restart"})
    handle = await stage.environment.client.start_workflow(
        FleetJobWorkflow.run,
        StartFleetJobInput(spec=spec, schedule="nightly"),
        id=fleet_job_workflow_id("nightly-2026-11-30T02:00:00Z"),
        task_queue=options.TASK_QUEUE,
    )
    stage.script.waves = (("all", 60),)
    stage.started.append(handle)
    result = await stage.result()
    assert result.name == "nightly-20261130T020000"
    [planned] = stage.script.only(PlanFleetJobInput)
    assert (planned.spec.name, planned.schedule) == ("nightly-20261130T020000", "nightly")


async def test_a_name_that_only_a_schedules_run_has_is_refused(stage: JobStage) -> None:
    spec = FleetJobSpec.model_validate({"name": "nightly-20261130T020000", "operation": "restart"})
    with pytest.raises(InvalidInputError, match="give it another name"):
        await start_fleet_job(stage.environment.client, StartFleetJobInput(spec=spec))
