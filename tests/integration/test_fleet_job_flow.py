"""Whole fleet jobs: the real Temporal, the real PostgreSQL, the real activities, and devices that wait to be told."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from temporalio.client import Client
from temporalio.service import RPCError

import activities.driving
from activities.artifact_store import ArtifactStore
from activities.artifacts import ArtifactActivities
from activities.fleet_jobs import FleetJobActivities
from activities.rollouts import RolloutActivities
from firmware.keys import generate_private_key
from models.errors import ConflictError, InvalidInputError, NotFoundError
from models.fleetjob import (
    CancelFleetJobInput,
    FleetJobResult,
    FleetJobView,
    PauseFleetJobInput,
    ResumeFleetJobInput,
    StartFleetJobInput,
)
from models.protocol import ExecutionState
from models.rollout import JobStatus, Outcome, Phase
from store.deltas import DeltaStore
from store.engine import Database
from store.executions import ExecutionStore
from store.fleetjobs import FleetJobStore
from store.rollouts import RolloutStore
from tests.integration.hinted_devices import FAILURE, SUCCESS, Fate, HintedDevices
from tests.integration.jobs_setup import adds_up, job, miscounted
from tests.integration.rollout_setup import add_devices, add_release
from tests.workflow.conftest import workers
from workflows import fleet_jobs_client as jobs_client
from workflows.fleet_job import FleetJobWorkflow
from workflows.fleet_jobs_client import JobHandle, fleet_job_handle, start_fleet_job

PATIENCE_SECONDS = 60.0


@dataclass
class Site:
    """Devices, stores, and workers between them and Temporal."""

    temporal: Client
    db: Database
    devices: HintedDevices
    folder: Path
    handles: list[JobHandle] = field(default_factory=list)
    running: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def store(self) -> FleetJobStore:
        """What is shown of jobs."""
        return FleetJobStore(self.db)

    async def start_workers(self) -> None:
        """With the real activities. The artifact store has no image, so firmware comes as a whole."""
        rollouts, db = RolloutActivities(RolloutStore(self.db), self.devices), self.db
        artifacts = ArtifactActivities(ArtifactStore.open(self.folder.as_uri()), DeltaStore(db), RolloutStore(db))
        found: list[Any] = [
            FleetJobActivities(self.store).plan_fleet_job,
            rollouts.write_plain_document,
            rollouts.drive_wave,
            rollouts.close_wave,
            rollouts.set_job_status,
            rollouts.cancel_running,
            rollouts.finish_rollout,
            artifacts.prepare_artifacts,
        ]
        self.running = AsyncExitStack()
        await self.running.enter_async_context(workers(self.temporal, found))

    async def start(self, operation: str = "custom", **spec: Any) -> str:
        """Start a job on all devices; its name."""
        name = spec.pop("name", f"job-{uuid4().hex[:8]}")
        request = StartFleetJobInput(spec=job(name, operation, **spec), requested_by="alice")
        self.handles.append(await start_fleet_job(self.temporal, request))
        return str(name)

    async def result(self) -> FleetJobResult:
        """The result; counters have been recounted."""
        result = await asyncio.wait_for(self.handles[-1].result(), PATIENCE_SECONDS)
        await self.devices.settle()
        assert await miscounted(self.db, (await self.store.get(result.name)).job_no) == []
        assert adds_up(result.progress)
        return result

    async def until(self, name: str, what: Callable[[FleetJobView], bool]) -> FleetJobView:
        """Wait until the job's view fulfils something."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        view = None
        while time.monotonic() < deadline:
            with suppress(NotFoundError):
                view = await self.store.get(name)
                assert adds_up(view.progress)
                if what(view):
                    return view
            await asyncio.sleep(0.02)
        pytest.fail(f"not reached: {view}")


@pytest_asyncio.fixture
async def site(temporal: Client, db: Database, tmp_path: Path) -> AsyncIterator[Site]:
    """An empty database, devices that wait, workers."""
    site = Site(temporal, db, HintedDevices(ExecutionStore(db)), tmp_path)
    await site.start_workers()
    yield site
    for handle in site.handles:
        with suppress(RPCError):  # it has ended, or does so just now
            await handle.terminate("the test is over")
    await site.running.aclose()
    await site.devices.settle()


def failing(times: dict[str, int]) -> Callable[[str], Fate]:
    """Devices that fail so many times before they succeed."""
    failed: Counter[str] = Counter()

    def fate(thing: str) -> Fate:
        failed[thing] += 1
        return FAILURE if failed[thing] <= times.get(thing, 0) else SUCCESS

    return fate


async def test_attempts_follow_one_another_until_one_succeeds_or_none_is_left(site: Site) -> None:
    await add_devices(site.db, 40)
    site.devices.fate = failing({"motor-1": 2, "motor-2": 1, "motor-3": 9})
    retry = {"max_attempts": 3, "backoff": "0.2s", "backoff_multiplier": 2}
    name = await site.start(
        retry=retry, max_parallel=7, waves=[{"name": "a", "size": "50%"}, {"name": "b", "size": "100%"}]
    )
    result = await site.result()
    assert result.outcome is Outcome.COMPLETED
    p = result.progress
    assert (p.total, p.succeeded, p.failed, p.attempts_failed) == (40, 39, 1, 6)
    failures = await site.store.failures(name)
    assert sorted((f.device_id, f.attempt) for f in failures) == [
        ("motor-1", 1), ("motor-1", 2), ("motor-2", 1), ("motor-3", 1), ("motor-3", 2), ("motor-3", 3),
    ]  # fmt: skip
    [final] = await site.store.failures(name, only_final=True)
    assert (final.device_id, final.attempt) == ("motor-3", 3)
    assert (await site.store.get(name)).status is JobStatus.FINISHED


async def test_a_job_over_the_failed_devices_of_another_is_for_them_alone(site: Site) -> None:
    await add_devices(site.db, 20)
    site.devices.fate = failing({"motor-4": 1, "motor-5": 1})
    first = await site.start()
    assert (await site.result()).progress.failed == 2
    await site.start(retry_of=first)
    assert (await site.result()).progress.model_dump(include={"total", "succeeded"}) == {"total": 2, "succeeded": 2}
    await site.start(retry_of=f"{site.handles[-1].id.removeprefix('job:')}")
    refused = await asyncio.wait_for(site.handles[-1].result(), PATIENCE_SECONDS)
    assert refused.outcome is Outcome.REFUSED
    assert "so there is nothing to retry" in refused.reason


async def test_devices_that_come_to_match_are_taken_in_until_the_job_is_cancelled(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activities.driving.WaveDriver, "join_every", timedelta(seconds=0.3))
    await add_devices(site.db, 5)
    name = await site.start(membership="continuous")
    await site.until(name, lambda view: view.progress.succeeded == 5)
    await add_devices(site.db, 7, "late")
    view = await site.until(name, lambda view: view.progress.succeeded == 12)
    assert (view.status, view.progress.total) == (JobStatus.RUNNING, 12)
    await site.handles[-1].execute_update(FleetJobWorkflow.cancel, CancelFleetJobInput(actor="alice", reason="enough"))
    result = await site.result()
    assert (result.outcome, result.reason, result.progress.succeeded) == (
        Outcome.ABORTED,
        "canceled by alice: enough",
        12,
    )


async def test_paused_nobody_starts_and_cancelled_by_force_nothing_is_waited_for(site: Site) -> None:
    await add_devices(site.db, 30)
    site.devices.fate = lambda thing: None
    name = await site.start(max_parallel=4)
    await site.until(name, lambda view: view.progress.in_progress == 4)
    handle = fleet_job_handle(site.temporal, name)
    await handle.execute_update(FleetJobWorkflow.pause, PauseFleetJobInput(actor="alice"))
    view = await site.store.get(name)
    assert (view.status, view.phase) == (JobStatus.PAUSED, Phase.PAUSED)
    await handle.execute_update(FleetJobWorkflow.resume, ResumeFleetJobInput(actor="alice"))
    await handle.execute_update(FleetJobWorkflow.cancel, CancelFleetJobInput(actor="alice"))
    view = await site.until(name, lambda view: view.progress.withdrawn == 26)
    assert (view.progress.in_progress, view.outcome) == (4, None), "devices in progress are waited for"
    await handle.execute_update(FleetJobWorkflow.cancel, CancelFleetJobInput(actor="alice", force=True))
    result = await site.result()
    assert (result.outcome, result.progress.withdrawn) == (Outcome.ABORTED, 30)
    assert site.devices.started <= site.devices.withdrawn, "they have been told"


async def test_silence_is_an_attempt_that_failed(site: Site) -> None:
    await add_devices(site.db, 3)
    seen: Counter[str] = Counter()

    def fate(thing: str) -> Fate:
        seen[thing] += 1
        return None if thing == "motor-1" and seen[thing] == 1 else SUCCESS

    site.devices.fate = fate
    name = await site.start(retry={"max_attempts": 2, "backoff": "0.1s"}, deadlines={"download": "1s"})
    assert (await site.result()).progress.model_dump(include={"succeeded", "attempts_failed"}) == {
        "succeeded": 3,
        "attempts_failed": 1,
    }
    [failure] = await site.store.failures(name)
    assert (failure.state, failure.failure_class) == ("TIMED_OUT", "silent")


async def test_a_worker_that_ends_on_the_way_costs_nothing_but_a_replay(site: Site) -> None:
    await add_devices(site.db, 200)
    site.devices.fate = failing({f"motor-{i}": 2 for i in range(1, 21)})
    name = await site.start(max_parallel=5, retry={"max_attempts": 3, "backoff": "0.3s"})
    await site.until(name, lambda view: view.progress.succeeded >= 40)
    await site.running.aclose()
    before = await site.store.get(name)
    assert before.progress.waiting > 20
    await site.start_workers()
    result = await site.result()
    assert (result.progress.succeeded, result.progress.attempts_failed) == (200, 40)


async def test_firmware_goes_out_as_a_job_with_attempts_and_a_gate(site: Site) -> None:
    await add_devices(site.db, 30)
    await add_release(site.db, generate_private_key())
    site.devices.fate = failing({"motor-7": 1})
    name = await site.start(
        "firmware-update",
        release="motor-controller@1.3.0",
        gate={"healthy": "5%", "limit": "20%"},
        retry={"max_attempts": 2, "backoff": "0.1s"},
    )
    result = await site.result()
    assert (result.outcome, result.progress.succeeded, result.progress.attempts_failed) == (Outcome.SUCCEEDED, 30, 1)
    assert (await site.store.executions(name, ExecutionState.FAILED)) == []


async def test_the_workflow_is_found_by_its_name_and_the_same_job_again_is_refused(site: Site) -> None:
    await add_devices(site.db, 3)
    name = await site.start()
    await site.result()
    assert (await fleet_job_handle(site.temporal, name).query(FleetJobWorkflow.status)).outcome is Outcome.SUCCEEDED
    await site.start(name=name)
    again = await asyncio.wait_for(site.handles[-1].result(), PATIENCE_SECONDS)
    assert again.outcome is Outcome.REFUSED
    assert "it has run already, and is over" in again.reason


async def test_a_schedule_starts_jobs_named_by_their_time_and_can_be_paused_and_deleted(site: Site) -> None:
    await add_devices(site.db, 3)
    name, client = f"nightly-{uuid4().hex[:6]}", site.temporal
    spec = job("whatever", "custom")
    await jobs_client.create_job_schedule(client, name, spec, cron="0 2 * * *", timezone="Europe/Berlin", actor="alice")
    with pytest.raises(ConflictError, match="one of this name exists"):
        await jobs_client.create_job_schedule(client, name, spec, cron="0 2 * * *", timezone="UTC", actor="alice")
    await jobs_client.trigger_job_schedule(client, name)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (found := await site.store.list(states=[JobStatus.FINISHED])):
            await asyncio.sleep(0.05)
    [view] = found
    assert view.name.startswith(f"{name}-20") and view.schedule == name
    handle = fleet_job_handle(client, view.name)
    assert handle.id == view.workflow_id
    assert (await handle.result()).name == view.name
    await jobs_client.pause_job_schedule(client, name, actor="bob", reason="holidays")
    listed = await listed_schedule(client, name, lambda shown: shown.paused and bool(shown.last_runs))
    assert (listed.cron, listed.timezone, listed.operation, listed.note) == (
        "0 2 * * *",
        "Europe/Berlin",
        "custom",
        "paused by bob: holidays",
    )
    assert listed.last_runs == (view.name,)
    assert listed.next_runs and all(at.hour in (0, 1) for at in listed.next_runs)
    await jobs_client.unpause_job_schedule(client, name, actor="bob")
    await jobs_client.delete_job_schedule(client, name)
    with pytest.raises(NotFoundError, match=f"no schedule '{name}'"):
        await jobs_client.trigger_job_schedule(client, name)


async def listed_schedule(client: Client, name: str, what: Callable[[Any], bool]) -> Any:
    """A schedule as it is listed; the list lags behind a little."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            for shown in await jobs_client.list_job_schedules(client):
                if shown.name == name and what(shown):
                    return shown
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "x" * 48}, "at most 47"),
        ({"cron": "every day"}, "expected five fields"),
        ({"cron": "99 2 * * *"}, "cannot create schedule"),
        ({"timezone": "Mars/Olympus"}, "no time zone 'Mars/Olympus'"),
        ({"spec": job("x", "custom", start_at="2030-01-01T00:00:00Z")}, "leave start_at and end_at out"),
    ],
)
async def test_a_schedule_that_could_start_nothing_is_refused(
    temporal: Client, change: dict[str, Any], message: str
) -> None:
    asked: dict[str, Any] = {"name": "nightly", "spec": job("x", "custom"), "cron": "0 2 * * *", "timezone": "UTC"}
    with pytest.raises(InvalidInputError, match=message):
        await jobs_client.create_job_schedule(temporal, actor="alice", **(asked | change))
