"""The steps of a provisioning that change what is true of a device: check, issue, activate, undo; and the next certificate.

Each is one transaction, and finds by the enrolment's state whether it has been done before. Whoever signs is given as
a `Signer`, which writes the certificate's row in the transaction of the caller: a certificate that nobody knows of
cannot come to be.

Locks are taken in the order batch, enrolment, access (store/access.py), device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from cryptography.hazmat.primitives.serialization import load_pem_public_key
from psycopg import AsyncConnection, errors
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from domain.enrolment import Batch, device_id_for, judge_batch
from models.errors import ConflictError, InvalidInputError, NotFoundError, RefusedError
from models.identity import (
    ActivateDeviceInput,
    ActivateDeviceResult,
    CheckEnrolmentResult,
    DeviceHappening,
    EnrolmentVerdict,
    IssueCertificateInput,
    IssueCertificateResult,
    ReissueCertificateInput,
    ReissueCertificateResult,
    RevocationReason,
    UndoProvisioningInput,
    UndoProvisioningResult,
)
from store.access import change_access, revoke, share_access, unbar
from store.audit import append_audit
from store.certificates import DeviceCertificateRow, certificate_of_key
from store.configurations import set_desired
from store.engine import Database, fetch_one
from store.enrolments import ENGINE, tell
from store.waits import expect, forget, happened

MAX_A_DAY = 50
"""Certificates that a device is given within 24 hours: each one that is superseded is a line of the revocation list until
it would have ended, and a change of access that every broker reads. A device on trial needs a handful."""
MAX_UNCONFIRMED = 5
"""Certificates that a device may have been given and never used; who asks for more has to use one of them first."""


class Signer(Protocol):
    """activities.signing.CertificateSigner."""

    async def issue_device(
        self, connection: AsyncConnection, device_id: str, generation: int, public_key: Any, actor: str
    ) -> DeviceCertificateRow:
        """Sign, and write the row; raises ConflictError for a key that has a certificate already."""


@dataclass(frozen=True)
class EnrolmentFacts:
    """What the enrolment hook is asked about, beside the verdict."""

    verdict: CheckEnrolmentResult
    serial_number: str
    spki_sha256: str
    issued: bool
    """It has its certificate already."""


class ProvisioningStore:
    """See the module."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # --- check -------------------------------------------------------------------------------------------------------

    async def check(self, enrolment_no: int) -> EnrolmentFacts:
        """What the batch says of an enrolment now. Changes nothing."""
        async with self._db.pool.connection() as connection:
            row = await _enrolment(connection, enrolment_no)
        verdict, reason = EnrolmentVerdict.ISSUE, ""
        if row["state"] not in ("requested", "waiting", "issued", "active"):
            verdict, reason = EnrolmentVerdict.REFUSE, f"enrolment {enrolment_no} is {row['state']}: {row['reason']}"
        elif row["certificate_id"] is None and (refused := judge_batch(_batch_of(row), row["now"])):
            verdict, reason = EnrolmentVerdict.REFUSE, refused
        elif row["certificate_id"] is None and row["approval"] == "manual" and row["decided_by"] is None:
            verdict, reason = EnrolmentVerdict.WAIT, f"batch {row['batch']} asks for a person's approval"
        result = CheckEnrolmentResult(verdict=verdict, reason=reason, batch=row["batch"])
        return EnrolmentFacts(result, row["serial_number"], row["spki_sha256"], row["certificate_id"] is not None)

    async def wait_for_approval(self, enrolment_no: int, reason: str) -> None:
        """Show that a person is waited for. Idempotent: a state is set."""
        async with self._db.pool.connection() as connection:
            await connection.execute(
                "UPDATE enrolments SET state = 'waiting', reason = %s WHERE enrolment_no = %s AND state = 'requested'",
                (reason, enrolment_no),
            )
            await tell(connection, enrolment_no)

    async def refuse(self, enrolment_no: int, actor: str, reason: str) -> None:
        """No certificate. Gives the batch's place back, because nothing came of it. Idempotent by the state."""
        async with self._db.pool.connection() as connection:
            await _refuse(connection, await _enrolment(connection, enrolment_no, lock=True), actor, reason)

    # --- issue -------------------------------------------------------------------------------------------------------

    async def issue(self, asked: IssueCertificateInput, signer: Signer) -> IssueCertificateResult:
        """Certificate, device, configuration and waits, all in one transaction. Idempotent by the enrolment's state.

        Whatever has changed since the request (batch disabled, serial number retired) counts here for the last time.
        """
        try:
            async with self._db.pool.connection() as connection:
                return await _issue(connection, asked, signer)
        except (ConflictError, RefusedError, InvalidInputError) as error:
            await self.refuse(asked.enrolment_no, ENGINE, str(error))
            return IssueCertificateResult(refused=str(error))
        except errors.UniqueViolation as error:
            reason = f"another request was faster ({error.diag.constraint_name})"
            await self.refuse(asked.enrolment_no, ENGINE, reason)
            return IssueCertificateResult(refused=reason)

    # --- afterwards --------------------------------------------------------------------------------------------------

    async def mark_configured(self, device_id: str) -> None:
        """The device runs its first configuration. Idempotent: only from `provisioning`."""
        async with self._db.pool.connection() as connection:
            await connection.execute(
                "UPDATE devices SET status = 'configured', updated_at = now() "
                "WHERE device_id = %s AND status = 'provisioning'",
                (device_id,),
            )

    async def activate(self, asked: ActivateDeviceInput) -> ActivateDeviceResult:
        """The device is at work. Idempotent by its status; a device that was barred or retired meanwhile stays so."""
        async with self._db.pool.connection() as connection:
            await connection.execute("SELECT FROM enrolments WHERE enrolment_no = %s FOR UPDATE", (asked.enrolment_no,))
            await share_access(connection)
            await forget(connection, asked.workflow_id)
            cursor = await connection.execute(
                "UPDATE devices SET status = 'active', updated_at = now() WHERE device_id = %s AND barred_at IS NULL "
                "AND status IN ('provisioning','configured')",
                (asked.device_id,),
            )
            changed = cursor.rowcount > 0
            cursor = await connection.execute(
                "SELECT status, barred_reason FROM devices WHERE device_id = %s", (asked.device_id,)
            )
            row = await cursor.fetchone()
            if row is None or row[1] is not None or row[0] != "active":
                status = "gone" if row is None else f"{row[0]} ({row[1] or 'not barred'})"
                return ActivateDeviceResult(
                    refused=f"device {asked.device_id} became {status} while it was provisioned"
                )
            await connection.execute(
                "UPDATE enrolments SET state = 'active', reason = '' WHERE enrolment_no = %s AND state = 'issued'",
                (asked.enrolment_no,),
            )
            # The device has connected over MQTT and there is no other certificate: that proves this one.
            await connection.execute(
                "UPDATE certificates SET confirmed_at = COALESCE(confirmed_at, now()) "
                "WHERE certificate_id = %s AND state = 'valid'",
                (asked.certificate_id,),
            )
            if changed:
                await append_audit(
                    connection, ENGINE, "device.activated", "device", asked.device_id,
                    "connected, configured and sent a heartbeat", {"enrolment_no": asked.enrolment_no},
                )  # fmt: skip
        return ActivateDeviceResult()

    async def undo(self, asked: UndoProvisioningInput) -> UndoProvisioningResult:
        """Revoke, `error`, failed. Idempotent by the enrolment's state; one that was closed meanwhile is left alone."""
        async with self._db.pool.connection() as connection:
            row = await _enrolment(connection, asked.enrolment_no, lock=True)
            if row["state"] not in ("requested", "waiting", "issued"):
                # Whoever lost the first answer still has to hear that there is something to publish.
                gone = await _count_revoked(connection, row["certificate_id"])
                return UndoProvisioningResult(revoked=gone if row["state"] == "failed" else 0)
            revoked: list[str] = []
            if row["certificate_id"] is not None:
                # All of them: with the one it was given it may have fetched another meanwhile.
                revoked = await revoke(
                    connection, row["device_id"], RevocationReason.PRIVILEGE_WITHDRAWN, ENGINE, asked.reason
                )
            else:
                await _give_place_back(connection, row)
            await forget(connection, asked.workflow_id)
            # What was told to this run is not to be taken for news by the next one.
            await connection.execute("DELETE FROM workflow_outbox WHERE workflow_id = %s", (asked.workflow_id,))
            await connection.execute(
                "UPDATE devices SET status = 'error', updated_at = now() "
                "WHERE serial_number = %s AND status IN ('provisioning','configured','active')",
                (row["serial_number"],),
            )
            await connection.execute(
                "UPDATE enrolments SET state = 'failed', reason = %s, decided_at = COALESCE(decided_at, now()) "
                "WHERE enrolment_no = %s",
                (asked.reason, asked.enrolment_no),
            )
            await append_audit(
                connection, ENGINE, "enrolment.failed", "serial", row["serial_number"], asked.reason,
                {"enrolment_no": asked.enrolment_no, "revoked": revoked},
            )  # fmt: skip
            await tell(connection, asked.enrolment_no)
        return UndoProvisioningResult(revoked=len(revoked))

    # --- a device's later certificates ---------------------------------------------------------------------------------

    async def reissue(self, asked: ReissueCertificateInput, signer: Signer, spki: str) -> ReissueCertificateResult:
        """A device's next certificate. Idempotent by the key: the same key gets the same certificate.

        Both certificates are valid from then on; which one stays is the rotation's business (RotateCertificate...).
        """
        try:
            async with self._db.pool.connection() as connection:
                return await _reissue(connection, asked, signer, spki)
        except (ConflictError, RefusedError) as error:
            return ReissueCertificateResult(refused=str(error))


# --- issue -------------------------------------------------------------------------------------------------------------


async def _issue(connection: AsyncConnection, asked: IssueCertificateInput, signer: Signer) -> IssueCertificateResult:
    row = await _enrolment(connection, asked.enrolment_no, lock=True)
    if row["certificate_id"] is not None and row["state"] in ("issued", "active"):
        return await _issued_before(connection, row, asked.workflow_id)
    device = await _hold_device(connection, row["serial_number"])
    _must_be_issuable(row, await _tombstone(connection, row["serial_number"]))
    reason = asked.reason or f"enrolled through batch {row['batch']}"
    if device is None:
        device_id = await _create(connection, row)
        await append_audit(connection, asked.actor, "device.created", "device", device_id, reason)
    else:
        device_id = device["device_id"]
        await _adopt(connection, device, asked.actor, reason)
    generation = await _next_generation(connection, device_id)
    key = load_pem_public_key(row["public_key"].encode())
    certificate = await signer.issue_device(connection, device_id, generation, key, asked.actor)
    config = row["config"] if device is None or device["desired_config"] is None else device["desired_config"]
    version = await set_desired(connection, device_id, config, asked.actor, reason) if config else None
    await _credential(connection, device_id, certificate.certificate_id)
    await _expect(connection, device_id, asked.workflow_id, version)
    await connection.execute(
        "UPDATE enrolments SET state = 'issued', reason = %s, device_id = %s, certificate_id = %s, "
        "decided_at = COALESCE(decided_at, now()), decided_by = COALESCE(decided_by, %s) WHERE enrolment_no = %s",
        (asked.reason, device_id, certificate.certificate_id, asked.actor, asked.enrolment_no),
    )
    await tell(connection, asked.enrolment_no)
    return IssueCertificateResult(
        device_id=device_id, certificate_id=certificate.certificate_id, config_version=version
    )


def _must_be_issuable(row: dict[str, Any], retired_at: datetime | None) -> None:
    if row["state"] not in ("requested", "waiting"):
        raise RefusedError(f"enrolment {row['enrolment_no']} is {row['state']}: {row['reason']}")
    if refused := judge_batch(_batch_of(row), row["now"]):
        raise RefusedError(refused)
    if retired_at is not None:
        raise RefusedError(f"serial number {row['serial_number']} was retired on {retired_at:%Y-%m-%d}")


async def _issued_before(connection: AsyncConnection, row: dict[str, Any], workflow_id: str) -> IssueCertificateResult:
    """Waits may be used up by a run that is gone: they are expected anew, but for a configuration that is taken."""
    cursor = await connection.execute(
        "SELECT desired_config_version FROM devices WHERE device_id = %s AND desired_config_version > config_version",
        (row["device_id"],),
    )
    wanted = await cursor.fetchone()
    version = None if wanted is None else int(wanted[0])
    await _expect(connection, row["device_id"], workflow_id, version)
    return IssueCertificateResult(
        device_id=row["device_id"], certificate_id=row["certificate_id"], config_version=version
    )


async def _expect(connection: AsyncConnection, device_id: str, workflow_id: str, version: int | None) -> None:
    waits: dict[DeviceHappening, int | None] = {DeviceHappening.CONNECTED: None, DeviceHappening.HEARTBEAT: None}
    if version is not None:
        waits[DeviceHappening.CONFIGURED] = version
    await expect(connection, device_id, workflow_id, waits)


async def _create(connection: AsyncConnection, row: dict[str, Any]) -> str:
    """A new device, as the batch describes it."""
    for taken in (False, True):
        device_id = device_id_for(row["id_prefix"], row["serial_number"], taken=taken)
        cursor = await connection.execute(
            "INSERT INTO devices (device_id, device_type, serial_number, manufacturer, site_id, zone, tags, status) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s, 'provisioning') ON CONFLICT (device_id) DO NOTHING",
            (device_id, row["device_type"], row["serial_number"], row["manufacturer"], row["site_id"], row["zone"],
             Jsonb(row["tags"])),
        )  # fmt: skip
        if cursor.rowcount:
            return device_id
    raise RefusedError(f"cannot name a device for serial number {row['serial_number']}: {device_id} is taken")


async def _adopt(connection: AsyncConnection, device: dict[str, Any], actor: str, reason: str) -> None:
    """A device that the registry knows and `_hold_device` holds: what is registered holds, and its word counts again."""
    if device["barred_at"] is not None:
        await unbar(connection, device["device_id"], actor, reason)
    await connection.execute(
        "UPDATE devices SET status = 'provisioning', retired_at = NULL, updated_at = now() WHERE device_id = %s",
        (device["device_id"],),
    )
    await append_audit(connection, actor, "device.adopted", "device", device["device_id"], reason)


async def _next_generation(connection: AsyncConnection, device_id: str) -> int:
    cursor = await connection.execute(
        "SELECT COALESCE(max(generation), 0) + 1 FROM certificates WHERE device_id = %s", (device_id,)
    )
    row = await cursor.fetchone()
    return int(row[0]) if row else 1


async def _credential(connection: AsyncConnection, device_id: str, certificate_id: str) -> None:
    await connection.execute(
        "INSERT INTO device_credentials (device_id, certificate_id, last_rotation) VALUES (%s, %s, now()) "
        "ON CONFLICT (device_id) DO UPDATE SET certificate_id = excluded.certificate_id, last_rotation = now()",
        (device_id, certificate_id),
    )


# --- reissue -----------------------------------------------------------------------------------------------------------


async def _reissue(
    connection: AsyncConnection, asked: ReissueCertificateInput, signer: Signer, spki: str
) -> ReissueCertificateResult:
    await share_access(connection)
    await connection.execute("SELECT FROM devices WHERE device_id = %s FOR UPDATE", (asked.device_id,))
    found = await certificate_of_key(connection, spki)
    if found is not None:
        return _reissued_before(found, asked.device_id)
    cursor = await connection.execute(
        "SELECT d.status, d.barred_at IS NOT NULL, c.state = 'valid' AND c.not_after > now() "
        "FROM devices d JOIN certificates c USING (device_id) WHERE d.device_id = %s AND c.certificate_id = %s",
        (asked.device_id, asked.certificate_id),
    )
    if why := why_not_reissue(asked.device_id, await cursor.fetchone()):
        raise RefusedError(why)
    unused, lately = await fetch_one(
        connection,
        "SELECT count(*) FILTER (WHERE state = 'valid' AND confirmed_at IS NULL AND certificate_id <> %s), "
        "count(*) FILTER (WHERE issued_at > now() - interval '24 hours') FROM certificates WHERE device_id = %s",
        (asked.certificate_id, asked.device_id),
    )
    if unused >= MAX_UNCONFIRMED:
        raise RefusedError(
            f"device {asked.device_id} has {unused} certificates that it never used; it has to use one of them first"
        )
    if lately >= MAX_A_DAY:
        raise RefusedError(
            f"device {asked.device_id} has been given {lately} certificates within 24 h, expected fewer than {MAX_A_DAY}; "
            "it may ask again tomorrow"
        )
    generation = await _next_generation(connection, asked.device_id)
    key = load_pem_public_key(asked.public_key.encode())
    certificate = await signer.issue_device(connection, asked.device_id, generation, key, f"device:{asked.device_id}")
    await _credential(connection, asked.device_id, certificate.certificate_id)
    detail: Mapping[str, Any] = {"certificate_id": certificate.certificate_id}
    await happened(connection, [(asked.device_id, DeviceHappening.CERTIFICATE_ISSUED, detail)])
    return ReissueCertificateResult(certificate_id=certificate.certificate_id, certificate=certificate.pem)


def why_not_reissue(device_id: str, row: tuple[str, bool, bool] | None) -> str:
    """Why a device gets no further certificate: (status, barred, the certificate it asked with is valid) of it."""
    if row is None or row[0] == "retired" or row[1] or not row[2]:
        return f"the certificate with which device {device_id} asked is valid no more"
    return ""


def _reissued_before(found: DeviceCertificateRow, device_id: str) -> ReissueCertificateResult:
    if found.device_id != device_id or found.state != "valid":
        raise RefusedError("the key that came has been used already; make a new key")
    return ReissueCertificateResult(certificate_id=found.certificate_id, certificate=found.pem)


# --- rows --------------------------------------------------------------------------------------------------------------


async def _enrolment(connection: AsyncConnection, enrolment_no: int, *, lock: bool = False) -> dict[str, Any]:
    """The enrolment with its batch. With `lock` the batch's row is held, then the enrolment's."""
    if lock:
        await connection.execute(
            "SELECT FROM claim_batches WHERE name = (SELECT batch FROM enrolments WHERE enrolment_no = %s) FOR UPDATE",
            (enrolment_no,),
        )
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            "SELECT e.*, b.device_type, b.site_id, b.zone, b.manufacturer, b.tags, b.config, b.id_prefix, b.approval, "
            "b.expires_at, b.max_devices, b.enrolled, b.listed_only, b.disabled_at, now() AS now "
            "FROM enrolments e JOIN claim_batches b ON b.name = e.batch WHERE e.enrolment_no = %s"
            + (" FOR UPDATE OF e" if lock else ""),
            (enrolment_no,),
        )
        row = await cursor.fetchone()
    if row is None:
        raise NotFoundError(f"no enrolment {enrolment_no}, or its batch is gone")
    return row


def _batch_of(row: dict[str, Any]) -> Batch:
    return Batch(
        row["batch"],
        row["device_type"],
        row["expires_at"],
        row["max_devices"],
        row["enrolled"],
        row["listed_only"],
        row["disabled_at"] is not None,
    )


async def _hold_device(connection: AsyncConnection, serial_number: str) -> dict[str, Any] | None:
    """The device that has this serial number, with its access: nobody bars or revokes it before this transaction ends.

    Raises RefusedError where somebody has barred it meanwhile.
    """
    seen = await _device(connection, serial_number)
    if seen is None:
        return None
    if seen["barred_at"] is None:
        await share_access(connection)
    else:
        await change_access(connection)
    held = await _device(connection, serial_number, lock=True)
    if held is not None and held["barred_at"] is not None and seen["barred_at"] is None:
        raise RefusedError(f"device {held['device_id']} was barred while it was being enrolled; ask again")
    return held


async def _device(connection: AsyncConnection, serial_number: str, *, lock: bool = False) -> dict[str, Any] | None:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            "SELECT device_id, status, desired_config, barred_at FROM devices WHERE serial_number = %s"
            + (" FOR UPDATE" if lock else ""),
            (serial_number,),
        )
        return await cursor.fetchone()


async def _count_revoked(connection: AsyncConnection, certificate_id: str | None) -> int:
    cursor = await connection.execute(
        "SELECT count(*) FROM certificates WHERE certificate_id = %s AND state = 'revoked'", (certificate_id,)
    )
    row = await cursor.fetchone()
    return int(row[0]) if row else 0


async def _tombstone(connection: AsyncConnection, serial_number: str) -> datetime | None:
    cursor = await connection.execute(
        "SELECT retired_at FROM tombstones WHERE serial_number = %s AND released_at IS NULL", (serial_number,)
    )
    row = await cursor.fetchone()
    return None if row is None else row[0]


async def _refuse(connection: AsyncConnection, row: dict[str, Any], actor: str, reason: str) -> None:
    if row["state"] not in ("requested", "waiting"):
        return
    await _give_place_back(connection, row)
    await connection.execute(
        "UPDATE enrolments SET state = 'refused', reason = %s, decided_at = now(), decided_by = %s WHERE enrolment_no = %s",
        (reason, actor, row["enrolment_no"]),
    )
    await append_audit(
        connection, actor, "enrolment.refused", "serial", row["serial_number"], reason,
        {"enrolment_no": row["enrolment_no"], "spki_sha256": row["spki_sha256"]},
    )  # fmt: skip
    await tell(connection, row["enrolment_no"])


async def _give_place_back(connection: AsyncConnection, row: dict[str, Any]) -> None:
    """A place is for a device that got a certificate; the row that holds it is the only one that gives it back."""
    if row["counted"]:
        await connection.execute(
            "UPDATE enrolments SET counted = FALSE WHERE enrolment_no = %s", (row["enrolment_no"],)
        )
        await connection.execute(
            "UPDATE claim_batches SET enrolled = enrolled - 1 WHERE name = %s "
            "AND NOT EXISTS (SELECT FROM enrolments WHERE serial_number = %s AND batch = %s AND counted)",
            (row["batch"], row["serial_number"], row["batch"]),
        )
