"""Scenarios of FleetJobWorkflow, one for each way to end; `python -m tests.replay.record` saves their histories."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from temporalio.client import WorkflowHandle
from temporalio.testing import WorkflowEnvironment

from models.fleetjob import CancelFleetJobInput, PauseFleetJobInput, ResumeFleetJobInput
from models.rollout import DriveMode, Phase
from tests.workflow.job_stage import JobStage
from tests.workflow.scripted import HALT, HOLD, Runs, Waits
from workflows.fleet_job import FleetJobWorkflow

Ended = WorkflowHandle[Any, Any]
ANSWER = DriveMode.ANSWERING


def _played(act: Callable[[JobStage, str], Awaitable[None]]) -> Callable[[WorkflowEnvironment], Awaitable[Ended]]:
    """A scenario with workers and a script around it."""

    async def play(environment: WorkflowEnvironment) -> Ended:
        stage = JobStage(environment)
        await stage.start_workers()
        try:
            await act(stage, f"recorded-{act.__name__.replace('_', '-')}")
            await stage.result()
        finally:
            await stage.stop_workers()
        return stage.handle

    return play


async def succeeded(stage: JobStage, name: str) -> None:
    """Three waves."""
    await stage.start(name=name)


async def scheduled(stage: JobStage, name: str) -> None:
    """It waits for its time, and is paused and resumed meanwhile."""
    await stage.start(name=name, start_at=await stage.now() + timedelta(hours=2))
    await stage.until(Phase.SCHEDULED)
    await stage.update(FleetJobWorkflow.pause, PauseFleetJobInput(actor="bob"))
    await stage.update(FleetJobWorkflow.resume, ResumeFleetJobInput(actor="bob"))


async def firmware(stage: JobStage, name: str) -> None:
    """It installs a release."""
    await stage.start("firmware-update", name=name, release="motor@1.3.0")


async def paused(stage: JobStage, name: str) -> None:
    """Paused while its first wave runs, and resumed before the second."""
    stage.script.script(1, ANSWER, Runs())
    await stage.start(name=name)
    await stage.until_asked("drive 1 answering")
    await stage.update(FleetJobWorkflow.pause, PauseFleetJobInput(actor="bob"))
    stage.script.answers.set()
    await stage.until_asked("drive 1 soaking")
    await stage.update(FleetJobWorkflow.resume, ResumeFleetJobInput(actor="bob"))


async def held(stage: JobStage, name: str) -> None:
    """A wave is held by its gate, and let go on."""
    stage.script.script(2, ANSWER, HOLD)
    await stage.start(name=name, gate={})
    await stage.until(Phase.HOLDING)
    await stage.update(FleetJobWorkflow.resume, ResumeFleetJobInput(actor="bob"))


async def halted(stage: JobStage, name: str) -> None:
    """Its gate halts it."""
    stage.script.script(1, ANSWER, HALT)
    await stage.start(name=name, gate={})


async def canceled(stage: JobStage, name: str) -> None:
    """Cancelled, and again with force while devices in progress are waited for."""
    stage.script.script(1, ANSWER, Waits())
    stage.script.drains = True
    await stage.start(name=name)
    await stage.until_asked("drive 1 answering")
    await stage.update(FleetJobWorkflow.cancel, CancelFleetJobInput(actor="bob"))
    await stage.until_asked("finish aborted")
    await stage.update(FleetJobWorkflow.cancel, CancelFleetJobInput(actor="bob", force=True))


async def continuous(stage: JobStage, name: str) -> None:
    """It lasts until its end."""
    stage.script.waves = (("all", 60),)
    stage.script.script(1, ANSWER, Waits())
    end_at = await stage.now() + timedelta(days=1)
    await stage.start(name=name, membership="continuous", end_at=end_at, waves=[{"name": "all", "size": "100%"}])


async def refused(stage: JobStage, name: str) -> None:
    """No device matches."""
    stage.script.plan_errors.append(("RefusedError", "cannot start job x: no device matches the target"))
    await stage.start(name=name)


JOBS = {
    "FleetJobWorkflow": {
        act.__name__: _played(act)
        for act in (succeeded, scheduled, firmware, paused, held, halted, canceled, continuous, refused)
    }
}
