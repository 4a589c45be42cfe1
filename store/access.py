"""Who may speak: revoking certificates, barring devices, and the revision that brokers are brought to.

The rule that everything else follows from: **a device is barred in the transaction that revokes its last certificate,
and from the moment that transaction commits nothing it says changes anything.** Every transaction over device traffic
holds `share_access` first; every change of access holds `change_access`. So a batch of the gateway has committed before
the revocation does, or sees it.
"""

from collections.abc import Sequence

from psycopg import AsyncConnection

from models.identity import RevocationReason
from store.audit import append_audit

_ACCESS_LOCK = 7311465
CHANNEL = "tidegate_access"
"""NOTIFY channel: brokers have something to catch up with."""


async def share_access(connection: AsyncConnection) -> None:
    """Called first in each transaction that uses what devices said: no change of access commits before this one ends."""
    await connection.execute("SELECT pg_advisory_xact_lock_shared(%s)", (_ACCESS_LOCK,))


async def change_access(connection: AsyncConnection) -> int:
    """Called first in each transaction that changes who may speak. Returns the new revision."""
    await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_ACCESS_LOCK,))
    cursor = await connection.execute(
        "UPDATE access_state SET revision = revision + 1, changed_at = now() RETURNING revision"
    )
    row = await cursor.fetchone()
    assert row is not None
    await connection.execute("SELECT pg_notify(%s, '')", (CHANNEL,))
    return int(row[0])


async def barred(connection: AsyncConnection, device_ids: Sequence[str]) -> set[str]:
    """Those of these devices whose word counts for nothing."""
    cursor = await connection.execute(
        "SELECT device_id FROM devices WHERE barred_at IS NOT NULL AND device_id = ANY(%s)", (list(device_ids),)
    )
    return {row[0] for row in await cursor.fetchall()}


async def revoke(
    connection: AsyncConnection,
    device_id: str,
    reason: RevocationReason,
    actor: str,
    text: str,
    *,
    only: Sequence[str] | None = None,
) -> list[str]:
    """Revoke a device's certificates (all that are valid, or `only` these ids); the ids that were revoked just now.

    Calls `change_access` by itself. A device that is left without a valid certificate is barred. Idempotent: what is
    revoked stays as it is.
    """
    await change_access(connection)
    cursor = await connection.execute(
        """
        UPDATE certificates SET state = 'revoked', revoked_at = now(), revocation_reason = %s
        WHERE device_id = %s AND state = 'valid' AND (%s::text[] IS NULL OR certificate_id = ANY(%s))
        RETURNING certificate_id
        """,
        (reason.value, device_id, None if only is None else list(only), None if only is None else list(only)),
    )
    revoked = [row[0] for row in await cursor.fetchall()]
    for certificate_id in revoked:
        details = {"certificate_id": certificate_id, "rfc5280": reason.value}
        await append_audit(connection, actor, "certificate.revoked", "device", device_id, text, details)
    cursor = await connection.execute(
        "SELECT EXISTS (SELECT FROM certificates WHERE device_id = %s AND state = 'valid' AND not_after > now())",
        (device_id,),
    )
    row = await cursor.fetchone()
    if row is not None and not row[0]:
        await bar(connection, device_id, actor, text)
    return revoked


async def bar(connection: AsyncConnection, device_id: str, actor: str, reason: str) -> None:
    """From the commit on, nothing that this device says is used. Call `change_access` (or `revoke`) before."""
    cursor = await connection.execute(
        "UPDATE devices SET barred_at = now(), barred_reason = %s, updated_at = now() "
        "WHERE device_id = %s AND barred_at IS NULL",
        (reason, device_id),
    )
    if cursor.rowcount:
        await append_audit(connection, actor, "device.barred", "device", device_id, reason)


async def unbar(connection: AsyncConnection, device_id: str, actor: str, reason: str) -> None:
    """The device's word counts again. Call `change_access` before."""
    cursor = await connection.execute(
        "UPDATE devices SET barred_at = NULL, barred_reason = NULL, updated_at = now() "
        "WHERE device_id = %s AND barred_at IS NOT NULL",
        (device_id,),
    )
    if cursor.rowcount:
        await append_audit(connection, actor, "device.unbarred", "device", device_id, reason)
