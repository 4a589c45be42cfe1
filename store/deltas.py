"""Which deltas exist, and which could not be made: the table `deltas`, by (base, target, codec)."""

from datetime import timedelta

from models.artifacts import BuildDeltaInput, DeltaRecord, DeltaRef
from store.engine import Database

FAILURE_KEPT = timedelta(days=7)
"""A delta that could not be made is tried again after this: the reason may have been a busy machine or an old codec."""

_FIND = """
SELECT sha256, size_bytes, failure FROM deltas
WHERE base_sha256 = %s AND target_sha256 = %s AND codec = %s AND (failure IS NULL OR created_at > now() - %s)
"""

# A failure never takes the place of a delta that exists.
_RECORD = """
INSERT INTO deltas (base_sha256, target_sha256, codec, sha256, size_bytes, failure) VALUES (%s, %s, %s, %s, %s, %s)
ON CONFLICT (base_sha256, target_sha256, codec) DO UPDATE
SET sha256 = EXCLUDED.sha256, size_bytes = EXCLUDED.size_bytes, failure = EXCLUDED.failure, created_at = now()
WHERE deltas.failure IS NOT NULL OR EXCLUDED.failure IS NULL
"""


class DeltaStore:
    """The table `deltas`."""

    def __init__(self, db: Database) -> None:
        self._pool = db.pool

    async def find(self, wanted: BuildDeltaInput) -> DeltaRecord | None:
        """What is known of this delta; None for one that has not been tried, or failed longer than a week ago."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                _FIND, (wanted.base_sha256, wanted.target_sha256, wanted.codec, FAILURE_KEPT)
            )
            row = await cursor.fetchone()
        if row is None:
            return None
        sha256, size_bytes, failure = row
        if failure is not None:
            return DeltaRecord(failure=failure)
        return DeltaRecord(
            delta=DeltaRef(base_sha256=wanted.base_sha256, sha256=sha256, size_bytes=size_bytes, codec=wanted.codec)
        )

    async def record(self, wanted: BuildDeltaInput, record: DeltaRecord) -> None:
        """Write it down. Idempotent; a failure does not replace a delta."""
        delta = record.delta
        values = (delta.sha256, delta.size_bytes) if delta else (None, None)
        async with self._pool.connection() as connection:
            await connection.execute(
                _RECORD, (wanted.base_sha256, wanted.target_sha256, wanted.codec, *values, record.failure)
            )
