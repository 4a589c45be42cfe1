"""Whole rollouts: the real Temporal, the real PostgreSQL, the real activities, and devices that wait to be told."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import WorkflowHandle
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.service import RPCError
from temporalio.testing import WorkflowEnvironment

from activities.artifact_store import ArtifactStore
from activities.artifacts import ArtifactActivities
from activities.rollouts import RolloutActivities
from firmware.keys import generate_private_key
from models.errors import RefusedError
from models.protocol import FailureClass
from models.rollout import (
    AbortRolloutInput,
    AdjustRolloutInput,
    CheckPromotableInput,
    JobStatus,
    Outcome,
    PauseRolloutInput,
    Phase,
    PromoteRolloutInput,
    ResumeRolloutInput,
    RolloutResult,
    StartRolloutInput,
    Verdict,
)
from models.views import RolloutView
from store.deltas import DeltaStore
from store.engine import Database
from store.executions import ExecutionStore
from store.rollouts import RolloutStore
from tests.integration.hinted_devices import FAILURE, SUCCESS, HintedDevices
from tests.integration.rollout_setup import add_devices, add_release, recount, specification
from tests.temporal_server import BINARIES
from tests.workflow.conftest import workers
from workflows.client import register_search_attributes, start_rollout
from workflows.rollout import RolloutWorkflow

ALICE = "alice"
PATIENCE_SECONDS = 30.0
THREE_WAVES = [{"name": "canary", "size": "5%"}, {"name": "early", "size": "25%"}, {"name": "fleet", "size": "100%"}]


@pytest_asyncio.fixture(scope="module")
async def temporal(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkflowEnvironment]:
    """The development server on a database file, as in the embedded stack."""
    file = tmp_path_factory.mktemp("temporal") / "temporal.db"
    async with await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        dev_server_existing_path=str(BINARIES / "temporal"),
        dev_server_database_filename=str(file),
        dev_server_extra_args=["--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=normal"],
        dev_server_log_level="error",
    ) as environment:
        await register_search_attributes(environment.client)
        yield environment


@dataclass
class Site:
    """A fleet of devices, its store, and workers between them and Temporal."""

    temporal: WorkflowEnvironment
    db: Database
    store: RolloutStore
    devices: HintedDevices
    handles: list[WorkflowHandle[RolloutWorkflow, RolloutResult]] = field(default_factory=list)

    @property
    def handle(self) -> WorkflowHandle[RolloutWorkflow, RolloutResult]:
        """The rollout."""
        return self.handles[-1]

    async def start(self, devices: int = 0, **spec: Any) -> None:
        """Add devices, and start a rollout to all of them."""
        if devices:
            await add_devices(self.db, devices)
            await add_release(self.db, generate_private_key())
        request = StartRolloutInput(spec=specification(**spec), requested_by=ALICE)
        self.handles.append(await start_rollout(self.temporal.client, request))

    async def result(self) -> RolloutResult:
        """The result; counters have been recounted."""
        result = await asyncio.wait_for(self.handle.result(), PATIENCE_SECONDS)
        await self.devices.settle()
        view = await self.view()
        assert await recount(self.db, view.job_no) == []
        return result

    async def view(self) -> RolloutView:
        """The rollout as PostgreSQL has it."""
        return await self.store.show(self.handle.id.removeprefix("rollout:"))

    async def until(self, what: Any) -> RolloutView:
        """Wait until the view fulfils something."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if any(view.job_no for view in await self.store.list_rollouts()) and what(await self.view()):
                return await self.view()
            await asyncio.sleep(0.01)
        pytest.fail(f"not reached: {await self.view()}")


@pytest_asyncio.fixture
async def site(temporal: WorkflowEnvironment, db: Database, tmp_path: Path) -> AsyncIterator[Site]:
    """An empty database, devices that wait, workers."""
    store, devices = RolloutStore(db), HintedDevices(ExecutionStore(db))
    site = Site(temporal, db, store, devices)
    async with workers(temporal.client, activities(site, tmp_path)):
        yield site
        for handle in site.handles:
            with suppress(RPCError):  # it has ended, or does so just now
                await handle.terminate("the test is over")
        await devices.settle()


def activities(site: Site, folder: Path) -> list[Any]:
    """The real ones. The artifact store has no image, so every rollout goes on with the full one."""
    rollouts = RolloutActivities(site.store, site.devices)
    artifacts = ArtifactActivities(ArtifactStore.open(folder.as_uri()), DeltaStore(site.db), site.store)
    return [
        rollouts.plan_rollout,
        rollouts.write_plain_document,
        rollouts.drive_wave,
        rollouts.close_wave,
        rollouts.check_promotable,
        rollouts.set_job_status,
        rollouts.adjust_pace,
        rollouts.finish_rollout,
        artifacts.prepare_artifacts,
    ]


async def test_three_waves_reach_everyone_and_the_next_opens_by_itself(site: Site) -> None:
    await site.start(200, waves=THREE_WAVES, pace={"in_flight": 20, "per_minute": None})
    result = await site.result()
    assert result.outcome is Outcome.SUCCEEDED
    assert (result.devices, result.succeeded, result.exposed, result.by_delta) == (200, 200, 200, 200)
    assert [wave.counts.succeeded for wave in result.waves] == [10, 40, 150]
    view = await site.view()
    assert (view.status, view.phase, view.outcome) == (JobStatus.FINISHED, Phase.DONE, Outcome.SUCCEEDED)
    for before, after in zip(view.waves, view.waves[1:], strict=False):
        assert before.answered_at and after.opened_at
        assert (after.opened_at - before.answered_at).total_seconds() < 5


async def test_a_dead_image_is_halted_withdrawn_and_its_devices_in_progress_are_waited_for(site: Site) -> None:
    site.devices.fate, site.devices.seconds = (lambda thing: FAILURE), 0.2
    await site.start(
        100, waves=[{"name": "canary", "size": "50%"}, {"name": "rest", "size": "100%"}], pace={"in_flight": 8}
    )
    result = await site.result()
    assert result.outcome is Outcome.HALTED
    assert "exposed devices failed" in result.reason
    assert result.exposed <= 5 + 8
    assert result.failed == result.exposed  # each of them has reported
    view = await site.view()
    assert view.in_flight == 0
    assert view.waves[1].opened_at is None
    assert view.counts.canceled == 100 - result.exposed
    assert site.devices.withdrawn >= set(site.devices.told) - site.devices.started
    assert view.waves[0].verdict is Verdict.HALT


async def test_devices_that_fall_silent_time_out_and_count_as_failures(site: Site) -> None:
    site.devices.fate = lambda thing: None
    await site.start(12, deadlines={"download": "1s", "install": "1s", "confirm": "1s"})
    result = await site.result()
    assert result.outcome is Outcome.HALTED
    assert (await site.view()).failures == {FailureClass.SILENT: 12}


async def test_devices_that_never_ask_leave_the_wave_held_for_a_person(site: Site) -> None:
    site.devices.away = True
    await site.start(6, waves=[{"name": "a", "size": 3}, {"name": "b", "size": "100%"}], deadlines={"accept": "1s"})
    view = await site.until(lambda view: view.phase is Phase.HOLDING)
    assert view.waves[0].verdict is Verdict.HOLD
    assert view.waves[1].opened_at is None
    site.devices.away = False
    await site.handle.execute_update(RolloutWorkflow.promote, PromoteRolloutInput(actor=ALICE, reason="they are off"))
    result = await site.result()
    assert (result.outcome, result.succeeded) == (Outcome.SUCCEEDED, 3)
    promoted = (await site.view()).waves[0]
    assert (promoted.verdict, promoted.reason) == (
        Verdict.PROMOTE,
        "promoted by alice: they are off (hold: 0 of 3 answered (0.0 %), 3 needed for a completion of 95%)",
    )


async def test_a_paused_rollout_admits_nobody_and_goes_on_when_resumed(site: Site) -> None:
    await site.start(300, pace={"in_flight": 5, "per_minute": None})
    await site.until(lambda view: view.exposed >= 10)
    await site.handle.execute_update(RolloutWorkflow.pause, PauseRolloutInput(actor=ALICE, reason="storm"))
    exposed = (await site.view()).exposed
    await asyncio.sleep(0.5)
    paused = await site.view()
    assert (paused.status, paused.phase, paused.exposed, paused.in_flight) == (
        JobStatus.PAUSED,
        Phase.PAUSED,
        exposed,
        0,
    )
    await site.handle.execute_update(RolloutWorkflow.adjust, AdjustRolloutInput(actor=ALICE, in_flight=100))
    await site.handle.execute_update(RolloutWorkflow.resume, ResumeRolloutInput(actor=ALICE))
    assert (await site.result()).succeeded == 300
    kinds = [(event.kind, event.actor) for event in await site.store.events(paused.job_no)]
    assert ("paused", ALICE) in kinds
    assert ("adjusted", ALICE) in kinds


async def test_an_aborted_rollout_waits_for_devices_in_progress_and_frees_the_others_at_once(site: Site) -> None:
    site.devices.seconds = 5.0
    await site.start(40, pace={"in_flight": 4, "per_minute": None})
    await site.until(lambda view: view.in_flight == 4)
    await site.handle.execute_update(RolloutWorkflow.abort, AbortRolloutInput(actor=ALICE, reason="wrong image"))
    draining = await site.until(lambda view: view.counts.canceled == 36)
    assert draining.in_flight == 4
    assert draining.outcome is None
    result = await site.result()
    assert (result.outcome, result.reason, result.exposed) == (Outcome.ABORTED, "aborted by alice: wrong image", 4)
    assert (await site.view()).counts.succeeded == 4


async def test_a_soak_shows_itself_serves_late_devices_and_is_ended_by_a_person(site: Site) -> None:
    await site.start(
        40,
        waves=[{"name": "canary", "size": "50%", "soak": "4h"}, {"name": "fleet", "size": "100%"}],
        completion="80%",
        pace={"in_flight": 2, "per_minute": None},
    )
    soaking = await site.until(lambda view: view.phase is Phase.SOAKING)
    assert soaking.waves[0].counts.outstanding > 0
    await site.until(lambda view: view.waves[0].counts.succeeded == 20)
    await site.handle.execute_update(RolloutWorkflow.promote, PromoteRolloutInput(actor=ALICE))
    result = await site.result()
    assert result.succeeded == 40
    assert (result.waves[0].reason or "").startswith("promoted by alice (promote: 20 of 20 succeeded")


async def test_a_breaker_that_trips_in_the_soak_halts_without_waiting_for_its_end(site: Site) -> None:
    site.devices.fate = lambda thing: SUCCESS if int(thing.split("-")[1]) > 12 else None
    await site.start(
        60,
        waves=[{"name": "canary", "size": "90%", "soak": "4h"}, {"name": "fleet", "size": "100%"}],
        completion="60%",
        deadlines={"download": "6s", "install": "6s", "confirm": "6s"},
    )
    await site.until(lambda view: view.phase is Phase.SOAKING)
    result = await site.result()
    assert result.outcome is Outcome.HALTED
    assert 6 <= result.failed <= 12
    assert (await site.view()).waves[1].opened_at is None


async def test_nobody_promotes_past_a_breaker_that_has_tripped(site: Site) -> None:
    await site.start(20, waves=[{"name": "canary", "size": "50%", "soak": "4h"}, {"name": "fleet", "size": "100%"}])
    view = await site.until(lambda view: view.phase is Phase.SOAKING)
    rollouts = RolloutActivities(site.store, site.devices)
    asked = CheckPromotableInput(job_no=view.job_no, wave=1, spec=view.spec)
    await rollouts.check_promotable(asked)
    async with site.db.pool.connection() as connection:
        await connection.execute(
            "UPDATE waves SET tripped_at = now(), tripped_failed = 5, tripped_exposed = 5 WHERE job_no = %s AND wave = 1",
            (view.job_no,),
        )
    with pytest.raises(RefusedError, match=r"cannot promote wave 1: halt: 5 of 5 .* nobody overrules the breaker"):
        await rollouts.check_promotable(asked)
    assert (await site.result()).outcome is Outcome.HALTED


async def test_a_rollout_whose_workflow_was_lost_goes_on_where_postgresql_stands(site: Site) -> None:
    waves = [{"name": "canary", "size": "10%"}, {"name": "fleet", "size": "100%"}]
    pace = {"in_flight": 5, "per_minute": None}
    await site.start(200, waves=waves, pace=pace)
    await site.until(lambda view: view.exposed >= 60)
    await site.handle.terminate("history lost")
    await asyncio.sleep(0.2)
    await site.start(waves=waves, pace=pace)
    result = await site.result()
    assert (result.outcome, result.succeeded, result.exposed) == (Outcome.SUCCEEDED, 200, 200)
    assert len(await site.store.list_rollouts()) == 1


async def test_a_rollout_that_is_over_is_not_run_again_under_its_name(site: Site) -> None:
    await site.start(3)
    assert (await site.result()).outcome is Outcome.SUCCEEDED
    await site.start()
    again = await site.result()
    assert again.outcome is Outcome.REFUSED
    assert again.reason.startswith("cannot start rollout motor-1.3.0: it has run already, and is over")


async def test_a_broker_that_is_away_delays_a_rollout_and_does_not_end_it(site: Site) -> None:
    site.devices.away = True
    await site.start(20)
    await site.until(lambda view: view.waves[0].opened_at is not None)
    await asyncio.sleep(0.3)
    site.devices.away = False
    assert (await site.result()).succeeded == 20


async def test_a_rollout_of_many_devices_leaves_no_more_history_than_one_of_few(site: Site) -> None:
    await site.start(1500, waves=THREE_WAVES)
    assert (await site.result()).succeeded == 1500
    name = site.handle.id
    ids = [name, *(f"{name}/wave:{n}" for n in (1, 2, 3))]
    events = [len((await site.temporal.client.get_workflow_handle(id).fetch_history()).events) for id in ids]
    assert sum(events) <= 110, events
