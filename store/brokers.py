"""What brokers have to enforce, read in one snapshot, and what each of them enforces by now."""

from dataclasses import dataclass
from datetime import datetime

from psycopg import AsyncConnection, IsolationLevel
from psycopg.rows import class_row

from models.views import BrokerView
from store.engine import Database, fetch_one

_AUTHORITIES = """
SELECT a.authority_id, a.name, a.certificate, c.pem AS crl
FROM authorities a
LEFT JOIN LATERAL (
    SELECT pem FROM crls WHERE crls.authority_id = a.authority_id ORDER BY number DESC LIMIT 1
) c ON true
WHERE a.kind = 'device' AND a.state IN ('active', 'trusted')
ORDER BY a.not_before, a.authority_id
"""

_REVOKED = """
SELECT certificate_id, device_id, authority_id, serial_hex FROM certificates
WHERE state = 'revoked' AND not_after > now()
"""

_DENIED = """
SELECT device_id FROM devices d WHERE barred_at IS NOT NULL
  AND EXISTS (SELECT FROM certificates c WHERE c.device_id = d.device_id AND c.not_after > now())
UNION
SELECT device_id FROM certificates c WHERE state = 'revoked' AND not_after > now()
  AND NOT EXISTS (SELECT FROM devices d WHERE d.device_id = c.device_id)
"""

_APPLIED = """
INSERT INTO brokers AS b (broker_id, applied_revision, applied_at, crl_next_update, seen_at, error)
VALUES (%(broker)s, COALESCE(%(revision)s, 0), CASE WHEN %(revision)s::bigint IS NULL THEN NULL ELSE now() END,
        %(next_update)s, now(), %(error)s)
ON CONFLICT (broker_id) DO UPDATE SET
    applied_revision = COALESCE(%(revision)s, b.applied_revision),
    applied_at = CASE WHEN %(revision)s::bigint IS NULL OR %(revision)s = b.applied_revision
                      THEN b.applied_at ELSE now() END,
    crl_next_update = COALESCE(%(next_update)s, b.crl_next_update), seen_at = now(), error = excluded.error
"""


@dataclass(frozen=True)
class TrustedAuthority:
    """A device CA that brokers have to trust, and its newest revocation list; both PEM."""

    authority_id: str
    name: str
    certificate: str
    crl: str | None


@dataclass(frozen=True)
class RevokedCertificate:
    """A revoked certificate whose time is not over."""

    certificate_id: str
    device_id: str
    authority_id: str
    serial_hex: str


@dataclass(frozen=True)
class AccessSnapshot:
    """Everything at one moment. `denied`: devices whose word counts for nothing while they may have a certificate."""

    revision: int
    denied: frozenset[str]
    revoked: tuple[RevokedCertificate, ...]
    authorities: tuple[TrustedAuthority, ...]


class BrokerStore:
    """Reads what is wanted, records what is in force."""

    def __init__(self, db: Database) -> None:
        self.db = db

    async def snapshot(self) -> AccessSnapshot:
        """What brokers have to enforce now."""
        async with self.db.pool.connection() as connection:
            await connection.set_isolation_level(IsolationLevel.REPEATABLE_READ)
            try:
                async with connection.transaction():
                    return await _snapshot(connection)
            finally:
                await connection.set_isolation_level(None)

    async def record(
        self,
        connection: AsyncConnection,
        broker_id: str,
        *,
        revision: int | None,
        crl_next_update: datetime | None,
        error: str | None,
    ) -> None:
        """What the broker enforces. `revision` None: as before, and `error` says what is missing."""
        arguments = {"broker": broker_id, "revision": revision, "next_update": crl_next_update, "error": error}
        await connection.execute(_APPLIED, arguments)

    async def wanted(self) -> int:
        """The newest revision of who may speak."""
        async with self.db.pool.connection() as connection:
            return int((await fetch_one(connection, "SELECT revision FROM access_state", ()))[0])

    async def find(self) -> list[BrokerView]:
        """All that have been heard of."""
        async with (
            self.db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(BrokerView)) as cursor,
        ):
            await cursor.execute(
                "SELECT broker_id, applied_revision, applied_at, crl_next_update, seen_at, error FROM brokers "
                "ORDER BY broker_id"
            )
            return await cursor.fetchall()

    async def applied(self, broker_id: str) -> int:
        """The revision that a broker enforces; 0 for one that nobody has heard of."""
        async with self.db.pool.connection() as connection:
            statement = "SELECT COALESCE(max(applied_revision), 0) FROM brokers WHERE broker_id = %s"
            return int((await fetch_one(connection, statement, (broker_id,)))[0])


async def _snapshot(connection: AsyncConnection) -> AccessSnapshot:
    revision = await fetch_one(connection, "SELECT revision FROM access_state", ())
    denied = await (await connection.execute(_DENIED)).fetchall()
    async with connection.cursor(row_factory=class_row(RevokedCertificate)) as revoked:
        await revoked.execute(_REVOKED)
        certificates = await revoked.fetchall()
    async with connection.cursor(row_factory=class_row(TrustedAuthority)) as authorities:
        await authorities.execute(_AUTHORITIES)
        trusted = await authorities.fetchall()
    return AccessSnapshot(int(revision[0]), frozenset(row[0] for row in denied), tuple(certificates), tuple(trusted))
