"""Provisioning from the request to its end, with time running ahead: real PostgreSQL, real activities, every limit."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import WorkflowHandle, WorkflowUpdateFailedError
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Replayer

from models.identity import (
    Decision,
    DeviceHappening,
    ProvisionDeviceInput,
    ProvisionDeviceResult,
    ProvisioningLimits,
    ProvisionOutcome,
)
from store.engine import Database
from store.provisioning import ProvisioningStore
from tests.integration.enrolment_setup import Pki, column, new_key, tell, value, working
from tests.integration.test_enrolment_defences import ask
from tests.workflow.conftest import SkippingServers
from workflows.client import start_provisioning
from workflows.provisioning import ProvisioningWorkflow
from workflows.sandbox import runner

Handle = WorkflowHandle[ProvisioningWorkflow, ProvisionDeviceResult]


@pytest_asyncio.fixture
async def pki(db: Database, tmp_path: Path) -> Pki:
    return await Pki.make(db, tmp_path)


@pytest_asyncio.fixture
async def skipping(servers: SkippingServers, db: Database, pki: Pki) -> AsyncIterator[WorkflowEnvironment]:
    """A server whose time runs ahead while a result is awaited, and workers."""
    environment = await servers.get()
    async with working(db, environment.client, pki, listed=False):
        yield environment


async def started(environment: WorkflowEnvironment, db: Database, serial: str, **limits: Any) -> Handle:
    """The provisioning of a new request."""
    answer = await ask(db, serial)
    assert answer.enrolment_no is not None
    asked = ProvisionDeviceInput(
        enrolment_no=answer.enrolment_no, serial_number=serial, limits=ProvisioningLimits(**limits)
    )
    return await start_provisioning(environment.client, asked)


async def until_state(db: Database, state: str) -> None:
    """Time does not run ahead."""
    for _ in range(500):
        if await value(db, "SELECT state FROM enrolments ORDER BY enrolment_no DESC LIMIT 1") == state:
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"the enrolment never was {state}")


async def told(db: Database, device: str, *happenings: DeviceHappening, **detail: Any) -> None:
    """The workflow has been told."""
    await tell(db, device, *happenings, **detail)
    for _ in range(500):
        if not await value(db, "SELECT count(*) FROM workflow_outbox"):
            return
        await asyncio.sleep(0.02)
    pytest.fail("the outbox was not delivered")


async def undone(handle: Handle, db: Database, reason: str, after: timedelta) -> ProvisionDeviceResult:
    """It failed for this reason, after this time, and nothing of it holds any more."""
    result = await handle.result()
    assert (result.outcome, result.reason) == (ProvisionOutcome.FAILED, reason)
    await replays(handle)
    described = await handle.describe()
    assert described.close_time is not None
    assert timedelta(0) <= described.close_time - described.start_time - after < timedelta(minutes=1)
    assert await column(db, "SELECT state FROM certificates") == ["revoked"]
    row = "SELECT status = 'error' AND barred_at IS NOT NULL AND barred_reason = %s FROM devices"
    assert await value(db, row, reason)
    assert await value(db, "SELECT state = 'failed' AND reason = %s FROM enrolments", reason)
    assert await value(db, "SELECT count(*) FROM device_waits") == 0
    assert await value(db, "SELECT revoked FROM crls ORDER BY number DESC LIMIT 1") == 1, "the list is out already"
    assert (
        await value(db, "SELECT count(*) FROM audit_events WHERE action = 'enrolment.failed' AND reason = %s", reason)
        == 1
    )
    return result


async def replays(handle: Handle) -> None:
    """A worker that has not seen it comes to the same end."""
    replayer = Replayer(
        workflows=[ProvisioningWorkflow], workflow_runner=runner(), data_converter=pydantic_data_converter
    )
    await replayer.replay_workflow(await handle.fetch_history())


async def test_a_device_that_never_connects_is_undone_after_a_day(
    skipping: WorkflowEnvironment, db: Database, pki: Pki
) -> None:
    await pki.batch(db)
    handle = await started(skipping, db, "LATE-1")
    await undone(handle, db, "LATE-1 did not connect within 1d", timedelta(days=1))


async def test_a_device_that_does_not_take_its_configuration_is_undone_after_an_hour(
    skipping: WorkflowEnvironment, db: Database, pki: Pki
) -> None:
    await pki.batch(db, config={"interval": 5})
    handle = await started(skipping, db, "LATE-2")
    await until_state(db, "issued")
    await told(db, "LATE-2", DeviceHappening.CONNECTED, DeviceHappening.HEARTBEAT)
    reason = "LATE-2 connected and did not take configuration version 1 within 1h"
    await undone(handle, db, reason, timedelta(hours=1))


async def test_a_device_that_sends_no_heartbeat_is_undone_after_an_hour(
    skipping: WorkflowEnvironment, db: Database, pki: Pki
) -> None:
    await pki.batch(db, config={"interval": 5})
    handle = await started(skipping, db, "LATE-3")
    await until_state(db, "issued")
    await told(db, "LATE-3", DeviceHappening.CONNECTED)
    await told(db, "LATE-3", DeviceHappening.CONFIGURED, version=1)
    reason = "LATE-3 was configured and sent no heartbeat within 1h"
    await undone(handle, db, reason, timedelta(hours=1))


async def test_limits_are_those_of_the_request(skipping: WorkflowEnvironment, db: Database, pki: Pki) -> None:
    await pki.batch(db)
    handle = await started(skipping, db, "LATE-4", connect=timedelta(minutes=3))
    await undone(handle, db, "LATE-4 did not connect within 3m", timedelta(minutes=3))


async def test_a_device_whose_provisioning_was_undone_may_come_again_with_a_new_key_and_not_with_the_old(
    skipping: WorkflowEnvironment, db: Database, pki: Pki
) -> None:
    await pki.batch(db, max_devices=1)
    key = new_key()
    first = await ask(db, "BACK-1", key)
    await (await start_provisioning(skipping.client, _input(first.enrolment_no, "BACK-1"))).result()
    assert "has been used already" in (await ask(db, "BACK-1", key)).reason
    again = await started(skipping, db, "BACK-1")
    await until_state(db, "issued")
    await told(db, "BACK-1", DeviceHappening.CONNECTED, DeviceHappening.HEARTBEAT)
    assert (await again.result()).outcome is ProvisionOutcome.ACTIVE
    assert await value(db, "SELECT status = 'active' AND barred_at IS NULL FROM devices")
    assert await column(db, "SELECT state FROM certificates ORDER BY generation") == ["revoked", "valid"]


def _input(number: int | None, serial: str) -> ProvisionDeviceInput:
    assert number is not None
    return ProvisionDeviceInput(enrolment_no=number, serial_number=serial)


# --- a person ------------------------------------------------------------------------------------------------------------


async def test_a_device_that_nobody_approves_gets_nothing_and_its_place_is_free_again(
    skipping: WorkflowEnvironment, db: Database, pki: Pki
) -> None:
    await pki.batch(db, approval="manual")
    handle = await started(skipping, db, "WAIT-1")
    result = await handle.result()
    assert (result.outcome, result.reason) == (ProvisionOutcome.FAILED, "nobody approved it within 7d")
    described = await handle.describe()
    assert described.close_time is not None
    assert described.close_time - described.start_time >= timedelta(days=7)
    assert await value(db, "SELECT state FROM enrolments") == "failed"
    assert await value(db, "SELECT count(*) FROM certificates") == 0
    assert await value(db, "SELECT enrolled FROM claim_batches") == 0


async def test_a_registered_device_that_nobody_approves_is_in_error(
    skipping: WorkflowEnvironment, db: Database, pki: Pki
) -> None:
    await pki.batch(db, approval="manual")
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO devices (device_id, device_type, serial_number, site_id, status) "
            "VALUES ('m-1', 'motor', 'WAIT-5', 'plant-1', 'provisioning')"
        )
    await (await started(skipping, db, "WAIT-5")).result()
    assert await value(db, "SELECT status FROM devices") == "error"


async def test_an_approved_device_gets_its_certificate_in_the_name_of_who_approved(
    skipping: WorkflowEnvironment, db: Database, pki: Pki
) -> None:
    await pki.batch(db, approval="manual")
    handle = await started(skipping, db, "WAIT-2")
    await until_state(db, "waiting")
    assert await value(db, "SELECT count(*) FROM certificates") == 0
    await handle.execute_update(ProvisioningWorkflow.approve, Decision(actor="alice", reason="saw it"))
    await until_state(db, "issued")
    await told(db, "WAIT-2", DeviceHappening.CONNECTED, DeviceHappening.HEARTBEAT)
    assert (await handle.result()).outcome is ProvisionOutcome.ACTIVE
    await replays(handle)
    assert await value(db, "SELECT decided_by FROM enrolments") == "alice"
    assert await value(db, "SELECT actor FROM audit_events WHERE action = 'certificate.issued'") == "alice"


async def test_a_rejected_device_gets_nothing_and_the_same_key_is_refused_from_then_on(
    skipping: WorkflowEnvironment, db: Database, pki: Pki
) -> None:
    await pki.batch(db, approval="manual")
    key = new_key()
    answer = await ask(db, "WAIT-3", key)
    handle = await start_provisioning(skipping.client, _input(answer.enrolment_no, "WAIT-3"))
    await until_state(db, "waiting")
    await handle.execute_update(ProvisioningWorkflow.reject, Decision(actor="alice", reason="not ours"))
    result = await handle.result()
    assert (result.outcome, result.reason) == (ProvisionOutcome.REFUSED, "rejected by alice: not ours")
    assert await value(db, "SELECT count(*) FROM certificates") == 0
    assert (await ask(db, "WAIT-3", key)).reason == "serial number WAIT-3 was refused with this key by alice"


async def test_nobody_decides_about_a_device_that_does_not_wait(
    skipping: WorkflowEnvironment, db: Database, pki: Pki
) -> None:
    await pki.batch(db)
    handle = await started(skipping, db, "WAIT-4")
    await until_state(db, "issued")
    for update in (ProvisioningWorkflow.approve, ProvisioningWorkflow.reject):
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await handle.execute_update(update, Decision(actor="alice"))
        assert isinstance(refused.value.cause, ApplicationError)
        assert "does not wait for a person" in refused.value.cause.message
    await handle.cancel()
    await handle.result()


# --- cut short -----------------------------------------------------------------------------------------------------------


async def test_a_provisioning_that_is_cancelled_is_undone(
    skipping: WorkflowEnvironment, db: Database, pki: Pki
) -> None:
    await pki.batch(db)
    handle = await started(skipping, db, "CUT-1")
    await until_state(db, "issued")
    await handle.cancel()
    await undone(handle, db, "the provisioning was cancelled", timedelta(0))


async def test_a_second_run_for_the_same_enrolment_takes_up_where_the_first_was_lost(
    skipping: WorkflowEnvironment, db: Database, pki: Pki
) -> None:
    await pki.batch(db, config={"interval": 5})
    answer = await ask(db, "CUT-2")
    first = await start_provisioning(skipping.client, _input(answer.enrolment_no, "CUT-2"))
    await until_state(db, "issued")
    await told(db, "CUT-2", DeviceHappening.CONNECTED)
    await first.terminate("by mistake")
    again = await start_provisioning(skipping.client, _input(answer.enrolment_no, "CUT-2"))
    for _ in range(200):
        if await value(db, "SELECT count(*) FROM device_waits") == 3:
            break
        await asyncio.sleep(0.02)
    await told(db, "CUT-2", DeviceHappening.CONNECTED, DeviceHappening.HEARTBEAT)
    await told(db, "CUT-2", DeviceHappening.CONFIGURED, version=1)
    assert (await again.result()).outcome is ProvisionOutcome.ACTIVE
    assert await value(db, "SELECT count(*) FROM certificates") == 1


async def test_a_device_that_is_barred_while_it_is_provisioned_does_not_become_active(
    skipping: WorkflowEnvironment, db: Database, pki: Pki
) -> None:
    await pki.batch(db)
    handle = await started(skipping, db, "CUT-3")
    await until_state(db, "issued")
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE devices SET barred_at = now(), barred_reason = 'cloned'")
    await told(db, "CUT-3", DeviceHappening.CONNECTED, DeviceHappening.HEARTBEAT)
    result = await handle.result()
    assert result.outcome is ProvisionOutcome.FAILED
    assert "cloned" in result.reason
    assert await value(db, "SELECT status FROM devices") == "error"


# --- interrupted at every step ---------------------------------------------------------------------------------------------


class Lost(Exception):
    """The worker is gone after what it did was committed and before anybody heard of it."""


def lose_first(patch: pytest.MonkeyPatch, step: str) -> list[str]:
    """The first answer of this step is lost; what was done, in order."""
    done: list[str] = []
    real = getattr(ProvisioningStore, step)

    async def lossy(*arguments: Any) -> Any:
        answer = await real(*arguments)
        done.append(step)
        if len(done) == 1:
            raise Lost
        return answer

    patch.setattr(ProvisioningStore, step, lossy)
    return done


@pytest.mark.parametrize("step", ["check", "issue", "mark_configured", "activate"])
async def test_a_step_that_is_done_twice_because_its_answer_was_lost_changes_nothing(
    skipping: WorkflowEnvironment, db: Database, pki: Pki, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = lose_first(monkeypatch, step)
    await pki.batch(db, config={"interval": 5})
    handle = await started(skipping, db, "TWICE-1")
    await until_state(db, "issued")
    await told(db, "TWICE-1", DeviceHappening.CONNECTED)
    await told(db, "TWICE-1", DeviceHappening.CONFIGURED, version=1)
    if step == "mark_configured":
        while len(done) < 2:
            await asyncio.sleep(0.02)
    await told(db, "TWICE-1", DeviceHappening.HEARTBEAT)
    assert (await handle.result()).outcome is ProvisionOutcome.ACTIVE
    assert done == [step, step]
    assert await column(db, "SELECT state FROM certificates") == ["valid"]
    assert await column(db, "SELECT state FROM enrolments") == ["active"]
    assert await value(db, "SELECT enrolled FROM claim_batches") == 1
    assert await value(db, "SELECT status FROM devices") == "active"
    assert await value(db, "SELECT count(*) FROM device_waits") == 0
    twice = "SELECT action FROM audit_events GROUP BY action, subject HAVING count(*) > 1"
    assert await column(db, twice) == []


async def test_an_undoing_that_is_done_twice_changes_nothing(
    skipping: WorkflowEnvironment, db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = lose_first(monkeypatch, "undo")
    await pki.batch(db)
    handle = await started(skipping, db, "TWICE-2")
    await undone(handle, db, "TWICE-2 did not connect within 1d", timedelta(days=1))
    assert done == ["undo", "undo"]
