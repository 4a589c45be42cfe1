"""Workers with a scripted life behind them, and what a test does to its workflows."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from temporalio.client import Client, WorkflowHandle
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from models.diagnostics import AskDeviceInput
from models.identity import (
    ConfigureDeviceInput,
    DecommissionDeviceInput,
    DeviceEvent,
    DeviceHappening,
    RotateCertificateInput,
)
from models.protocol import DiagnosticType
from models.shadow import SyncShadowInput
from tests.workflow.conftest import PATIENCE_SECONDS, SkippingServers, why_it_hangs
from tests.workflow.scripted_life import ScriptedLife
from workers.lifecycle import LIFECYCLE_WORKFLOWS
from workflows import options
from workflows.lifecycle_client import start_configuration, start_decommission, start_diagnosis, start_rotation
from workflows.sandbox import runner
from workflows.shadow_client import start_shadow_sync


@asynccontextmanager
async def life_workers(
    client: Client, activities: list[Any], workflows: Sequence[type] = (), **settings: Any
) -> AsyncIterator[None]:
    """Workers of the queues that lifecycle workflows use, as worker.py has them; for further `workflows` too."""
    async with AsyncExitStack() as stack:
        for queue in (options.TASK_QUEUE, options.DISPATCH_QUEUE, options.CA_QUEUE, options.ARTIFACTS_QUEUE):
            worker = Worker(
                client,
                task_queue=queue,
                workflows=[*LIFECYCLE_WORKFLOWS, *workflows] if queue == options.TASK_QUEUE else [],
                activities=activities,
                workflow_runner=runner(),
                **settings,
            )
            await stack.enter_async_context(worker)
        yield


@dataclass
class LifeStage:
    """See the module."""

    environment: WorkflowEnvironment
    script: ScriptedLife = field(default_factory=ScriptedLife)
    device_id: str = field(default_factory=lambda: f"motor-{uuid4().hex[:8]}")
    started: list[WorkflowHandle[Any, Any]] = field(default_factory=list)
    workers: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start_workers(self, **settings: Any) -> None:
        """Workers of the queues that lifecycle workflows use."""
        workers = life_workers(self.environment.client, self.script.activities(), **settings)
        await self.workers.enter_async_context(workers)

    async def remember_nothing(self) -> None:
        """Before a start: from here on each task of a workflow replays it from its first event."""
        await self.stop_workers()
        await self.start_workers(max_cached_workflows=0)

    async def stop_workers(self) -> None:
        """End them, with what they hold in memory."""
        await self.workers.aclose()

    @property
    def handle(self) -> WorkflowHandle[Any, Any]:
        """The workflow that was started last."""
        return self.started[-1]

    async def configure(self, **given: Any) -> None:
        """Ask for a configuration."""
        asked = {"config": {"interval": 5}, "actor": "alice", **given}
        request = ConfigureDeviceInput(device_id=self.device_id, **asked)
        self.started.append(await start_configuration(self.environment.client, request))

    async def rotate(self, **given: Any) -> None:
        """Ask for a new certificate."""
        request = RotateCertificateInput(device_id=self.device_id, actor="alice", **given)
        self.started.append(await start_rotation(self.environment.client, request))

    async def decommission(self, **given: Any) -> None:
        """End the device."""
        request = DecommissionDeviceInput(device_id=self.device_id, actor="alice", reason="scrapped", **given)
        self.started.append(await start_decommission(self.environment.client, request))

    async def sync_shadow(self, **given: Any) -> None:
        """Want a state of the device's shadow, and wait for it."""
        request = SyncShadowInput(device_id=self.device_id, **{"patch": {"power": "on"}, "actor": "alice", **given})
        self.started.append(await start_shadow_sync(self.environment.client, request))

    async def diagnose(self, what: DiagnosticType = DiagnosticType.PING, **given: Any) -> None:
        """Ask the device."""
        asked = {"request_id": uuid4().hex, "actor": "alice", **given}
        request = AskDeviceInput(device_id=self.device_id, type=what, **asked)
        self.started.append(await start_diagnosis(self.environment.client, request))

    async def tell(self, happening: DeviceHappening, **detail: Any) -> None:
        """What the relay delivers."""
        event = DeviceEvent(device_id=self.device_id, happening=happening, at=datetime.now(UTC), detail=detail)
        await self.handle.signal(options.DEVICE_EVENT, event)

    async def until_asked(self, step: str, times: int = 1) -> None:
        """Wait until a step has been taken so often; time does not run ahead."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.script.steps.count(step) < times:
            if time.monotonic() > deadline:
                pytest.fail(f"{step} was not asked for: {self.script.steps}; {await why_it_hangs(self.handle)}")
            await asyncio.sleep(0.01)

    async def result(self, *, skipping: bool = True) -> Any:
        """The result; time runs ahead. A workflow that hangs fails with why its last task failed.

        Without `skipping` time goes on as it does: where all that is waited for has been told already, the server might
        run ahead of a signal that has not been looked at yet, to the end of the workflow's time.
        """
        try:
            with nullcontext() if skipping else self.environment.auto_time_skipping_disabled():
                return await asyncio.wait_for(self.handle.result(), PATIENCE_SECONDS)
        except TimeoutError:
            pytest.fail(f"{self.handle.id} hangs: {self.script.steps}; {await why_it_hangs(self.handle)}")

    async def skip(self, **duration: float) -> None:
        """Let time pass."""
        await self.environment.sleep(timedelta(**duration))

    async def took(self) -> timedelta:
        """From start to end, by the server's clock."""
        described = await self.handle.describe()
        assert described.close_time is not None
        return described.close_time - described.start_time


@asynccontextmanager
async def life_stage(servers: SkippingServers) -> AsyncIterator[LifeStage]:
    """A stage on a server whose time runs ahead while a test waits for a result."""
    stage = LifeStage(await servers.get())
    await stage.start_workers()
    yield stage
    described = [await handle.describe() for handle in stage.started]
    await stage.stop_workers()
    if any(each.close_time is None for each in described):
        await servers.discard()
