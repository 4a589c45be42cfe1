"""Claim batches: who may enrol with a claim certificate, how many, which, until when, and what they become.

The batch's row is what counts. Its certificate proves which batch a request is for, and nothing else: disabling a batch
takes effect with the next transaction, without a revocation list.

```python
claims = ClaimStore(db)
await claims.create(spec, ["SN-1", "SN-2"], certificate_pem, certificate_id, "alice")
await claims.disable("line-4", "alice", "claim key was seen in a log")
```
"""

from collections.abc import Sequence

from psycopg import AsyncConnection, errors
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from models.errors import ConflictError, NotFoundError
from models.identity import ClaimBatchSpec, ClaimBatchView
from store.audit import append_audit
from store.engine import Database

_COLUMNS = """
b.name, b.device_type, b.site_id, b.zone, b.manufacturer, b.tags, b.config, b.id_prefix, b.approval, b.listed_only,
b.max_devices, b.alarm_per_minute, b.expires_at, b.enrolled, b.disabled_at, b.disabled_reason, b.created_at, b.created_by,
(SELECT count(*) FROM claim_serials s WHERE s.batch = b.name)::int AS listed
"""

_CREATE = """
INSERT INTO claim_batches (name, device_type, site_id, zone, manufacturer, tags, config, id_prefix, approval, listed_only,
                           max_devices, alarm_per_minute, expires_at, claim_certificate, claim_certificate_id, created_by)
VALUES (%(name)s, %(device_type)s, %(site_id)s, %(zone)s, %(manufacturer)s, %(tags)s, %(config)s, %(id_prefix)s,
        %(approval)s, %(listed_only)s, %(max_devices)s, %(alarm_per_minute)s, %(expires_at)s, %(pem)s,
        %(certificate_id)s, %(actor)s)
"""

_LIST = """
INSERT INTO claim_serials (serial_number, batch) SELECT unnest(%s::text[]), %s ON CONFLICT (serial_number) DO NOTHING
"""


class ClaimStore:
    """Claim batches in PostgreSQL."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def create(
        self, spec: ClaimBatchSpec, serials: Sequence[str], certificate: str, certificate_id: str, actor: str
    ) -> ClaimBatchView:
        """Make a batch with its allow-list. Raises ConflictError when the name or a serial number is taken."""
        values = spec.model_dump() | {"tags": Jsonb(spec.tags), "config": Jsonb(spec.config)}
        try:
            async with self._db.pool.connection() as connection:
                await connection.execute(
                    _CREATE, {**values, "pem": certificate, "certificate_id": certificate_id, "actor": actor}
                )
                await append_audit(connection, actor, "batch.created", "batch", spec.name, "", {
                    "max_devices": spec.max_devices, "listed": len(serials), "certificate_id": certificate_id,
                    "expires_at": spec.expires_at.isoformat(),
                })  # fmt: skip
                await _allow(connection, spec.name, serials)
        except errors.UniqueViolation as error:
            raise ConflictError(
                f"cannot create batch {spec.name}: there is one of this name; choose another, or add serial numbers to "
                f"that one with 'claim allow {spec.name}'"
            ) from error
        return await self.get(spec.name)

    async def all(self) -> list[ClaimBatchView]:
        """Every batch, the newest first."""
        return await self._find("TRUE ORDER BY b.created_at DESC", None)

    async def get(self, name: str) -> ClaimBatchView:
        """The batch of this name; raises NotFoundError."""
        found = await self._find("b.name = %(wanted)s", name)
        if not found:
            raise NotFoundError(f"no claim batch {name!r}; 'claim list' shows those there are")
        return found[0]

    async def disable(self, name: str, actor: str, reason: str) -> ClaimBatchView:
        """From the commit on, its claim certificate gets nobody in. Devices that have enrolled are not touched."""
        async with self._db.pool.connection() as connection:
            cursor = await connection.execute(
                "UPDATE claim_batches SET disabled_at = now(), disabled_reason = %s WHERE name = %s AND disabled_at IS NULL",
                (reason, name),
            )
            if cursor.rowcount:
                await append_audit(connection, actor, "batch.disabled", "batch", name, reason)
        return await self.get(name)

    async def allow(self, name: str, serials: Sequence[str], actor: str) -> int:
        """Add to the allow-list; how many are new. Raises ConflictError when another batch has one of them."""
        await self.get(name)
        async with self._db.pool.connection() as connection:
            added = await _allow(connection, name, serials)
            if added:
                await append_audit(connection, actor, "batch.allowed", "batch", name, "", {"serials": added})
        return added

    async def _find(self, condition: str, wanted: str | None) -> list[ClaimBatchView]:
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(ClaimBatchView)) as cursor,
        ):
            await cursor.execute(
                f"SELECT {_COLUMNS} FROM claim_batches b WHERE {condition}".encode(), {"wanted": wanted}
            )
            return await cursor.fetchall()


async def _allow(connection: AsyncConnection, name: str, serials: Sequence[str]) -> int:
    if not serials:
        return 0
    added = (await connection.execute(_LIST, (list(serials), name))).rowcount
    cursor = await connection.execute(
        "SELECT serial_number, batch FROM claim_serials WHERE serial_number = ANY(%s) AND batch <> %s LIMIT 1",
        (list(serials), name),
    )
    if (taken := await cursor.fetchone()) is not None:
        raise ConflictError(
            f"cannot put serial number {taken[0]} on the list of batch {name}: it is on that of batch {taken[1]}; "
            "a device has one batch"
        )
    return int(added)
