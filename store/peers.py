"""Who stands behind a client certificate at the enrolment server, and what it confirms by coming with it.

TLS has proved that the peer has the key of a certificate of ours; what that certificate is worth now is asked here, of
the registry, each time. So a revocation counts from its commit on, whatever revocation lists say.
"""

from dataclasses import dataclass

from psycopg.rows import class_row

from models.identity import DeviceHappening
from store.access import barred, share_access
from store.audit import append_audit
from store.engine import Database
from store.waits import happened

_DEVICE = """
SELECT c.certificate_id, c.device_id, d.serial_number, c.spki_sha256,
       CASE WHEN c.state <> 'valid' THEN 'this certificate of ' || c.device_id || ' is revoked'
            WHEN c.not_after <= now() THEN 'this certificate of ' || c.device_id || ' has expired'
            WHEN a.state IS NULL OR a.state = 'retired' THEN 'the authority of this certificate is retired'
            WHEN d.device_id IS NULL OR d.status = 'retired' THEN 'device ' || c.device_id || ' is retired'
            WHEN d.barred_at IS NOT NULL THEN 'device ' || c.device_id || ' is barred: ' || d.barred_reason
            ELSE '' END AS refused
FROM certificates c LEFT JOIN devices d USING (device_id) LEFT JOIN authorities a USING (authority_id)
WHERE c.certificate_id = %s
"""


@dataclass(frozen=True)
class DevicePeer:
    """A device certificate that we issued; `refused` says why it is worth nothing now."""

    certificate_id: str
    device_id: str
    serial_number: str | None
    spki_sha256: str
    refused: str


class PeerStore:
    """Looks at client certificates."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def device(self, certificate_id: str) -> DevicePeer | None:
        """The device that has this certificate; None for one that is no device's."""
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(DevicePeer)) as cursor,
        ):
            await cursor.execute(_DEVICE, (certificate_id,))
            return await cursor.fetchone()

    async def is_claim(self, certificate_id: str) -> bool:
        """Whether it is a batch's claim certificate."""
        async with self._db.pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT EXISTS (SELECT FROM claim_batches WHERE claim_certificate_id = %s)", (certificate_id,)
            )
            row = await cursor.fetchone()
            return bool(row and row[0])

    async def confirm(self, certificate_id: str, device_id: str) -> bool:
        """The device has been seen with this certificate. False where it is worth nothing any more. Idempotent."""
        async with self._db.pool.connection() as connection:
            await share_access(connection)
            if await barred(connection, [device_id]):
                return False
            cursor = await connection.execute(
                "UPDATE certificates SET confirmed_at = COALESCE(confirmed_at, now()) "
                "WHERE certificate_id = %s AND device_id = %s AND state = 'valid' AND not_after > now() "
                "RETURNING confirmed_at = now()",
                (certificate_id, device_id),
            )
            row = await cursor.fetchone()
            if row is None:
                return False
            detail = {"certificate_id": certificate_id}
            await happened(connection, [(device_id, DeviceHappening.CERTIFICATE_CONFIRMED, detail)])
            if row[0]:
                actor = f"device:{device_id}"
                await append_audit(connection, actor, "certificate.confirmed", "device", device_id, "", detail)
        return True
