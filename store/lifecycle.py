"""A device's standing, and what a person does to its identity at once: look at its certificates, revoke, release.

```python
await lifecycle.check("motor-7", why_not_rotate)        # raises NotFoundError or RefusedError
```
"""

from collections.abc import Callable
from dataclasses import dataclass

from psycopg import AsyncConnection
from psycopg.rows import class_row

from domain.standing import Standing, why_not_unbar
from models.device import DeviceStatus
from models.errors import NotFoundError, RefusedError
from models.identity import CertificateView, RevocationReason
from store.access import change_access, revoke, unbar
from store.alerts import resolve_alert
from store.audit import append_audit
from store.devicetraffic import CLONE_RULE
from store.engine import Database

_STANDING = """
SELECT d.device_id, d.serial_number, d.status, d.barred_at, d.barred_reason,
       (SELECT count(*) FROM certificates c
        WHERE c.device_id = d.device_id AND c.state = 'valid' AND c.not_after > now()),
       EXISTS (SELECT FROM tombstones t WHERE t.serial_number = d.serial_number AND t.released_at IS NULL)
FROM devices d WHERE d.device_id = %s
"""

_CERTIFICATES = """
SELECT certificate_id, device_id, authority_id, generation, serial_hex, spki_sha256, not_before, not_after, state,
       issued_at, confirmed_at, revoked_at, revocation_reason
FROM certificates WHERE device_id = %s ORDER BY generation DESC
"""


async def standing(connection: AsyncConnection, device_id: str, *, lock: bool = False) -> Standing:
    """A device's standing; with `lock`, nobody changes its row before this transaction ends. Raises NotFoundError."""
    if lock:
        # A statement of its own: what it waited for is visible to the next one only.
        await connection.execute("SELECT FROM devices WHERE device_id = %s FOR UPDATE", (device_id,))
    row = await (await connection.execute(_STANDING, (device_id,))).fetchone()
    if row is None:
        raise NotFoundError(f"no device with the id {device_id!r}; 'device list' shows those there are")
    return Standing(row[0], row[1], DeviceStatus(row[2]), *row[3:])


def refuse(why: str | None) -> None:
    """Raise RefusedError with the sentence, where there is one."""
    if why is not None:
        raise RefusedError(why)


@dataclass
class LifecycleStore:
    """See the module. `db` must be open."""

    db: Database

    async def check(self, device_id: str, why_not: Callable[[Standing], str | None]) -> Standing:
        """The standing of a device that may be dealt with so. Raises NotFoundError or RefusedError."""
        async with self.db.pool.connection() as connection:
            found = await standing(connection, device_id)
        refuse(why_not(found))
        return found

    async def certificates(self, device_id: str) -> list[CertificateView]:
        """All of a device's certificates, the newest first. Raises NotFoundError for a device that is not there."""
        async with self.db.pool.connection() as connection:
            await standing(connection, device_id)
            async with connection.cursor(row_factory=class_row(CertificateView)) as cursor:
                await cursor.execute(_CERTIFICATES, (device_id,))
                return await cursor.fetchall()

    async def revoke(self, device_id: str, reason: RevocationReason, actor: str, text: str) -> list[str]:
        """Revoke all of a device's certificates; the ids of those that were valid. The device is barred.

        Raises NotFoundError.
        """
        async with self.db.pool.connection() as connection:
            await standing(connection, device_id)
            return await revoke(connection, device_id, reason, actor, text)

    async def unbar(self, device_id: str, actor: str, reason: str) -> None:
        """The device's word counts again, as after a false alarm of a clone. Raises NotFoundError or RefusedError."""
        async with self.db.pool.connection() as connection:
            await change_access(connection)
            refuse(why_not_unbar(await standing(connection, device_id, lock=True)))
            await unbar(connection, device_id, actor, reason)
            await connection.execute(
                "UPDATE devices SET status = 'active', updated_at = now() WHERE device_id = %s AND status = 'error'",
                (device_id,),
            )
            await resolve_alert(connection, CLONE_RULE, device_id, actor)

    async def release(self, serial_number: str, actor: str, reason: str) -> str:
        """Lift the tombstone of a serial number, so that it can be enrolled again; the device it belonged to.

        Raises NotFoundError where none stands.
        """
        async with self.db.pool.connection() as connection:
            cursor = await connection.execute(
                "UPDATE tombstones SET released_at = now(), released_by = %s "
                "WHERE serial_number = %s AND released_at IS NULL RETURNING device_id",
                (actor, serial_number),
            )
            row = await cursor.fetchone()
            if row is None:
                raise NotFoundError(
                    f"no tombstone stands for the serial number {serial_number!r}: it is free, or has never been retired"
                )
            details = {"device_id": row[0]}
            await append_audit(connection, actor, "serial.released", "serial", serial_number, reason, details)
        return str(row[0])
