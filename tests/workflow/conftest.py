"""A time-skipping Temporal for the session, and for each test workers with a scripted rollout behind them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from models.ids import wave_workflow_id
from models.rollout import Phase, RolloutResult, RolloutStatus, StartRolloutInput
from models.spec import RolloutSpec
from tests.temporal_server import BINARIES
from tests.workflow.scripted import ScriptedRollout
from workflows import options
from workflows.client import add_search_attributes, start_rollout
from workflows.fleet_job import FleetJobWorkflow
from workflows.rollout import RolloutWorkflow
from workflows.sandbox import runner
from workflows.wave import WaveWorkflow

Handle = WorkflowHandle[RolloutWorkflow, RolloutResult]
PATIENCE_SECONDS = 20.0
THREE_WAVES = (
    {"name": "canary", "size": "5%", "soak": "4h"},
    {"name": "early", "size": "25%", "soak": "4h"},
    {"name": "fleet", "size": "100%"},
)
NO_SOAK = tuple({"name": wave["name"], "size": wave["size"]} for wave in THREE_WAVES)


@dataclass
class SkippingServers:
    """Time-skipping servers, one at a time.

    A workflow that is terminated while a task of it runs leaves its server's clock locked for good, so a test that
    leaves a rollout running takes its server with it.
    """

    running: WorkflowEnvironment | None = None

    async def get(self) -> WorkflowEnvironment:
        """The server; a new one after `discard`."""
        if self.running is None:
            self.running = await WorkflowEnvironment.start_time_skipping(
                data_converter=pydantic_data_converter,
                test_server_existing_path=str(BINARIES / "temporal-test-server"),
            )
            await add_search_attributes(self.running.client, [key.name for key in options.SEARCH_ATTRIBUTES])
        return self.running

    async def discard(self) -> None:
        """End the server."""
        if self.running is not None:
            await self.running.shutdown()
            self.running = None


@pytest_asyncio.fixture(scope="session")
async def servers() -> AsyncIterator[SkippingServers]:
    """For the session."""
    servers = SkippingServers()
    yield servers
    await servers.discard()


@asynccontextmanager
async def workers(client: Client, activities: list[Any], **settings: Any) -> AsyncIterator[None]:
    """Workers of all three queues, as worker.py has them."""
    async with AsyncExitStack() as stack:
        for queue in (options.TASK_QUEUE, options.DISPATCH_QUEUE, options.ARTIFACTS_QUEUE):
            flows = [RolloutWorkflow, WaveWorkflow, FleetJobWorkflow] if queue == options.TASK_QUEUE else []
            worker = Worker(
                client,
                task_queue=queue,
                workflows=flows,
                activities=activities,
                workflow_runner=runner(),
                **settings,
            )
            await stack.enter_async_context(worker)
        yield


@dataclass
class Played:
    """A workflow that runs with a script behind it, and what tests do to any such."""

    environment: WorkflowEnvironment
    script: ScriptedRollout = field(default_factory=ScriptedRollout)
    started: list[Any] = field(default_factory=list)
    workers: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def handle(self) -> WorkflowHandle[Any, Any]:
        """The workflow that was started last."""
        handle: WorkflowHandle[Any, Any] = self.started[-1]
        return handle

    async def start_workers(self) -> None:
        """Workers of all three queues. Nothing is cached by a new one: it replays what it takes up."""
        await self.workers.enter_async_context(workers(self.environment.client, self.script.activities()))

    async def stop_workers(self) -> None:
        """End them, with what they hold in memory."""
        await self.workers.aclose()

    async def took(self) -> timedelta:
        """From its start to its end, by the server's clock, which runs on between tests."""
        described = await self.handle.describe()
        assert described.close_time is not None
        return described.close_time - described.start_time

    async def until_asked(self, kind: str, times: int = 1) -> None:
        """Wait until the workflow has asked for something, as ScriptedRollout.kinds names it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.script.kinds().count(kind) < times:
            if time.monotonic() > deadline:
                pytest.fail(f"{kind!r} was not asked for: {self.script.kinds()}; {await why_it_hangs(self.handle)}")
            await asyncio.sleep(0.01)

    async def refusal(self, update: Any, argument: Any) -> str:
        """The text with which an update is refused."""
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await self.handle.execute_update(update, argument)
        cause = refused.value.cause
        assert isinstance(cause, ApplicationError), cause
        return cause.message


@dataclass
class Stage(Played):
    """A running rollout with its script, and what a test does to it."""

    @property
    def name(self) -> str:
        """The rollout's name."""
        return self.handle.id.removeprefix("rollout:")

    async def start(self, waves: Any = NO_SOAK, **spec: Any) -> Handle:
        """Start a rollout under a name of its own."""
        name = spec.pop("name", f"motor-{uuid4().hex[:8]}")
        request = StartRolloutInput(
            spec=RolloutSpec(name=name, release="motor@1.3.0", waves=waves, **spec), requested_by="alice"
        )
        self.started.append(await start_rollout(self.environment.client, request))
        return self.handle

    async def result(self) -> RolloutResult:
        """The result; time runs ahead. A workflow that hangs fails with why its last task failed."""
        try:
            return await asyncio.wait_for(self.handle.result(), PATIENCE_SECONDS)
        except TimeoutError:
            pytest.fail(f"{self.handle.id} hangs: {await why_it_hangs(self.handle)}")

    async def until(self, phase: Phase, wave: int = 0) -> RolloutStatus:
        """Wait until the rollout is in a phase; time does not run ahead."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            status = await self.handle.query(RolloutWorkflow.status)
            if status.phase is phase and (not wave or status.wave == wave):
                return status
            await asyncio.sleep(0.01)
        pytest.fail(f"{self.handle.id} is {status}, not {phase}: {await why_it_hangs(self.handle)}")

    async def skip(self, **duration: float) -> None:
        """Let time pass."""
        await self.environment.sleep(timedelta(**duration))

    def wave(self, number: int) -> WorkflowHandle[WaveWorkflow, Any]:
        """The child workflow of a wave."""
        return self.environment.client.get_workflow_handle_for(WaveWorkflow.run, wave_workflow_id(self.name, number))


async def why_it_hangs(handle: WorkflowHandle[Any, Any]) -> str:
    """The last failure of a workflow task, or the last event."""
    last = "no event"
    async for event in handle.fetch_history_events():
        last = EventType.Name(event.event_type)
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED:
            return f"{last}: {event.workflow_task_failed_event_attributes.failure}"
    return last


@pytest_asyncio.fixture
async def stage(servers: SkippingServers) -> AsyncIterator[Stage]:
    """Workers with a script, on a server whose time runs ahead while a test waits for a result."""
    stage = Stage(await servers.get(), ScriptedRollout())
    await stage.start_workers()
    yield stage
    described = [await handle.describe() for handle in stage.started]
    await stage.stop_workers()
    if any(rollout.close_time is None for rollout in described):
        await servers.discard()
