"""Enrolment beside whatever else ends or changes a device: who was shut out stays out, and nobody waits for nobody.

Two things at once are made to meet where it hurts: a signer that waits, a row that is held.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from psycopg import AsyncConnection

from activities.signing import CertificateSigner
from models.identity import (
    ActivateDeviceInput,
    EnrolmentState,
    IssueCertificateInput,
    IssueCertificateResult,
    ReissueCertificateInput,
    RevocationReason,
    UndoProvisioningInput,
)
from models.lifecycle import RetireDeviceInput
from store.access import change_access, revoke
from store.certificates import DeviceCertificateRow
from store.decommission import DecommissionStore
from store.devicetraffic import bar_clone
from store.engine import Database
from store.enrolments import EnrolmentStore
from store.provisioning import ProvisioningStore
from tests.integration.enrolment_setup import Pki, column, new_key, value
from tests.integration.test_enrolment_defences import ask, wanted

FLOW = "provision:SN-1"


async def issue(db: Database, number: int | None, signer: Any) -> IssueCertificateResult:
    asked = IssueCertificateInput(enrolment_no=number or 0, workflow_id=FLOW, actor="test")
    return await ProvisioningStore(db).issue(asked, signer)


async def activate(db: Database, number: int | None, issued: IssueCertificateResult) -> str:
    asked = ActivateDeviceInput(
        enrolment_no=number or 0, workflow_id=FLOW, device_id=issued.device_id, certificate_id=issued.certificate_id
    )
    return (await ProvisioningStore(db).activate(asked)).refused


async def undo(db: Database, number: int | None, reason: str) -> None:
    await ProvisioningStore(db).undo(UndoProvisioningInput(enrolment_no=number or 0, workflow_id=FLOW, reason=reason))


async def by_a_person(db: Database) -> None:
    async with db.pool.connection() as connection:
        await revoke(connection, "SN-1", RevocationReason.KEY_COMPROMISE, "alice", "stolen on its way")


async def as_a_clone(db: Database) -> None:
    async with db.pool.connection() as connection:
        await connection.execute("INSERT INTO presence (device_id, last_heartbeat) VALUES ('SN-1', now())")
        assert await bar_clone(connection, "SN-1")


@dataclass
class SlowSigner:
    """Signs when it is let."""

    signer: CertificateSigner
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    may: asyncio.Event = field(default_factory=asyncio.Event)

    async def issue_device(
        self, connection: AsyncConnection, device_id: str, generation: int, public_key: Any, actor: str
    ) -> DeviceCertificateRow:
        self.asked.set()
        await self.may.wait()
        return await self.signer.issue_device(connection, device_id, generation, public_key, actor)


async def until_blocked(db: Database, task: "asyncio.Task[Any]") -> None:
    """Until somebody waits for a lock of somebody else's, or `task` has ended without."""
    for _ in range(200):
        if task.done() or await value(db, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nobody waits")


# --- who was shut out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("barring", [by_a_person, as_a_clone])
async def test_a_device_that_was_barred_while_it_was_provisioned_is_let_in_again_by_a_person_only(
    db: Database, pki: Pki, barring: Any
) -> None:
    await pki.batch(db)
    first = await ask(db, "SN-1")
    issued = await issue(db, first.enrolment_no, CertificateSigner(db, pki.keys))
    await barring(db)
    refused = await activate(db, first.enrolment_no, issued)
    assert refused
    await undo(db, first.enrolment_no, refused)
    again = await ask(db, "SN-1")
    assert (again.state, "is barred; a person has to decide" in again.reason) == (EnrolmentState.CONFLICT, True)
    assert await value(db, "SELECT barred_at IS NOT NULL FROM devices")


async def test_a_device_whose_provisioning_was_undone_comes_again_by_itself(db: Database, pki: Pki) -> None:
    await pki.batch(db)
    for _ in range(2):
        answer = await ask(db, "SN-1")
        assert answer.state is EnrolmentState.REQUESTED
        issued = await issue(db, answer.enrolment_no, CertificateSigner(db, pki.keys))
        assert not issued.refused
        assert await value(db, "SELECT barred_at IS NULL FROM devices")
        await undo(db, answer.enrolment_no, "SN-1 did not connect within 10 min")
        assert await value(db, "SELECT barred_at IS NOT NULL FROM devices")


async def test_a_device_that_renewed_while_it_was_provisioned_keeps_no_certificate_when_that_is_undone(
    db: Database, pki: Pki
) -> None:
    await pki.batch(db)
    answer = await ask(db, "SN-1")
    signer, store = CertificateSigner(db, pki.keys), ProvisioningStore(db)
    issued = await issue(db, answer.enrolment_no, signer)
    renewal = wanted("SN-1")
    asked = ReissueCertificateInput(
        device_id="SN-1", certificate_id=issued.certificate_id, public_key=renewal.public_key, source=None
    )
    assert not (await store.reissue(asked, signer, renewal.spki_sha256)).refused
    await undo(db, answer.enrolment_no, "SN-1 was configured and sent no heartbeat within 10 min")
    assert await column(db, "SELECT state FROM certificates") == ["revoked", "revoked"]
    assert await value(db, "SELECT barred_at IS NOT NULL FROM devices")


async def test_a_key_whose_certificate_was_revoked_is_told_so(db: Database, pki: Pki) -> None:
    await pki.batch(db)
    key = new_key()
    answer = await ask(db, "SN-1", key)
    await issue(db, answer.enrolment_no, CertificateSigner(db, pki.keys))
    await by_a_person(db)
    again = await ask(db, "SN-1", key)
    assert (again.state, again.certificate) == (EnrolmentState.REFUSED, None)
    assert "was revoked" in again.reason


async def test_a_registered_device_that_was_barred_is_let_in_by_a_person_only(db: Database, pki: Pki) -> None:
    await pki.batch(db)
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO devices (device_id, device_type, serial_number, site_id, status) VALUES "
            "('SN-1', 'motor', 'SN-1', 'plant-1', 'provisioning')"
        )
    await by_a_person(db)
    assert (await ask(db, "SN-1")).state is EnrolmentState.CONFLICT


# --- two at once ------------------------------------------------------------------------------------------------------


async def test_a_key_that_loses_while_its_certificate_is_signed_has_none_that_is_valid(db: Database, pki: Pki) -> None:
    await pki.batch(db, "a")
    await pki.batch(db, "b")
    first = await ask(db, "SN-1", batch="a")
    conflict = await ask(db, "SN-1", batch="b")
    assert conflict.state is EnrolmentState.CONFLICT
    signer = SlowSigner(CertificateSigner(db, pki.keys))
    issuing = asyncio.create_task(issue(db, first.enrolment_no, signer))
    await signer.asked.wait()
    accepting = asyncio.create_task(EnrolmentStore(db).accept_conflict(conflict.enrolment_no or 0, "alice", "replaced"))
    await until_blocked(db, accepting)
    signer.may.set()
    await asyncio.gather(issuing, accepting)
    await issue(db, conflict.enrolment_no, CertificateSigner(db, pki.keys))
    assert await column(db, "SELECT state FROM certificates ORDER BY generation") == ["revoked", "valid"]


async def test_who_is_revoked_while_a_certificate_is_signed_is_left_with_none(db: Database, pki: Pki) -> None:
    await pki.batch(db)
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO devices (device_id, device_type, serial_number, site_id, status) VALUES "
            "('SN-1', 'motor', 'SN-1', 'plant-1', 'provisioning')"
        )
    answer = await ask(db, "SN-1")
    signer = SlowSigner(CertificateSigner(db, pki.keys))
    issuing = asyncio.create_task(issue(db, answer.enrolment_no, signer))
    await signer.asked.wait()
    revoking = asyncio.create_task(by_a_person(db))
    await until_blocked(db, revoking)
    signer.may.set()
    await asyncio.gather(issuing, revoking)
    assert await value(db, "SELECT barred_at IS NOT NULL FROM devices")
    assert await value(db, "SELECT count(*) FROM certificates WHERE state = 'valid'") == 0


@pytest.mark.parametrize("ending", ["retire", "activate"])
async def test_whoever_holds_an_enrolment_gets_at_the_access_lock(db: Database, pki: Pki, ending: str) -> None:
    """Locks are taken in one order (store/provisioning.py), or the two would wait for each other."""
    await pki.batch(db)
    answer = await ask(db, "SN-1")
    issued = await issue(db, answer.enrolment_no, CertificateSigner(db, pki.keys))
    async with db.pool.connection() as connection:
        await connection.execute("SELECT FROM enrolments WHERE serial_number = 'SN-1' FOR UPDATE")
        asked = RetireDeviceInput(device_id="SN-1", actor="alice", reason="scrapped")
        ended = DecommissionStore(db).retire(asked) if ending == "retire" else activate(db, answer.enrolment_no, issued)
        task: asyncio.Task[Any] = asyncio.ensure_future(ended)  # type: ignore[arg-type]
        await until_blocked(db, task)
        await connection.execute("SET LOCAL lock_timeout = '500ms'")
        await change_access(connection)
    await task
