"""A fleet job with a rollout's script behind it, on a server whose time runs ahead."""

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from temporalio.client import WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment

from models.fleetjob import FleetJobResult, FleetJobStatus, StartFleetJobInput
from models.jobspec import FleetJobSpec
from models.rollout import Phase
from tests.workflow.conftest import PATIENCE_SECONDS, why_it_hangs, workers
from tests.workflow.scripted import ScriptedRollout
from workflows.fleet_job import FleetJobWorkflow
from workflows.fleet_jobs_client import JobHandle, start_fleet_job

WAVES = ({"name": "first", "size": "5%"}, {"name": "second", "size": "25%"}, {"name": "rest", "size": "100%"})


@dataclass
class JobStage:
    """A running job with its script, and what a test does to it."""

    environment: WorkflowEnvironment
    script: ScriptedRollout = field(default_factory=ScriptedRollout)
    started: list[JobHandle] = field(default_factory=list)
    workers: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start_workers(self) -> None:
        """Workers of all queues. Nothing is cached by a new one: it replays what it takes up."""
        await self.workers.enter_async_context(workers(self.environment.client, self.script.activities()))

    async def stop_workers(self) -> None:
        """End them, with what they hold in memory."""
        await self.workers.aclose()

    @property
    def handle(self) -> JobHandle:
        """The job."""
        return self.started[-1]

    async def now(self) -> datetime:
        """By the server's clock."""
        return await self.environment.get_current_time()

    async def start(self, operation: str = "restart", **spec: Any) -> JobHandle:
        """Start a job under a name of its own."""
        name = spec.pop("name", f"job-{uuid4().hex[:8]}")
        asked = {"name": name, "operation": operation, "waves": WAVES} | spec
        request = StartFleetJobInput(spec=FleetJobSpec.model_validate(asked), requested_by="alice")
        self.started.append(await start_fleet_job(self.environment.client, request))
        return self.handle

    async def result(self) -> FleetJobResult:
        """The result; time runs ahead."""
        try:
            return await asyncio.wait_for(self.handle.result(), PATIENCE_SECONDS)
        except TimeoutError:
            pytest.fail(f"{self.handle.id} hangs: {await why_it_hangs(self.handle)}")

    async def took(self) -> timedelta:
        """From its start to its end, by the server's clock."""
        described = await self.handle.describe()
        assert described.close_time is not None
        return described.close_time - described.start_time

    async def ended_at(self) -> datetime:
        """When it ended, by the server's clock."""
        described = await self.handle.describe()
        assert described.close_time is not None
        return described.close_time

    async def until(self, phase: Phase, wave: int = 0) -> FleetJobStatus:
        """Wait until the job is in a phase; time does not run ahead."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            status = await self.handle.query(FleetJobWorkflow.status)
            if status.phase is phase and (not wave or status.wave == wave):
                return status
            await asyncio.sleep(0.01)
        pytest.fail(f"{self.handle.id} is {status}, not {phase}: {await why_it_hangs(self.handle)}")

    async def until_asked(self, kind: str, times: int = 1) -> None:
        """Wait until the workflow has asked for something, as ScriptedRollout.kinds names it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.script.kinds().count(kind) < times:
            if time.monotonic() > deadline:
                pytest.fail(f"{kind!r} was not asked for: {self.script.kinds()}; {await why_it_hangs(self.handle)}")
            await asyncio.sleep(0.01)

    async def update(self, update: Any, argument: Any) -> FleetJobStatus:
        """An operator asks for something."""
        status: FleetJobStatus = await self.handle.execute_update(update, argument)
        return status

    async def refusal(self, update: Any, argument: Any) -> str:
        """The text with which an update is refused."""
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await self.handle.execute_update(update, argument)
        cause = refused.value.cause
        assert isinstance(cause, ApplicationError), cause
        return cause.message
