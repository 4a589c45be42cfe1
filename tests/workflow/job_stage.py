"""A fleet job with a rollout's script behind it, on a server whose time runs ahead."""

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

import pytest

from models.fleetjob import FleetJobResult, FleetJobStatus, StartFleetJobInput
from models.jobspec import FleetJobSpec
from models.rollout import Phase
from tests.workflow.conftest import PATIENCE_SECONDS, Played, why_it_hangs
from workflows.fleet_job import FleetJobWorkflow
from workflows.fleet_jobs_client import JobHandle, start_fleet_job

WAVES = ({"name": "first", "size": "5%"}, {"name": "second", "size": "25%"}, {"name": "rest", "size": "100%"})


@dataclass
class JobStage(Played):
    """A running job with its script, and what a test does to it."""

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

    async def update(self, update: Any, argument: Any) -> FleetJobStatus:
        """An operator asks for something."""
        status: FleetJobStatus = await self.handle.execute_update(update, argument)
        return status
