"""A fleet, a signed release and a planned rollout in a real database, for tests of the store and the gateway."""

import hashlib
import time
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from psycopg.types.json import Jsonb

from firmware.envelope import sign_envelope
from firmware.keys import TrustedKeys, generate_private_key
from firmware.manifest import RELEASE_PAYLOAD_TYPE, ReleaseStatement, encode_release
from models.rollout import PlanRolloutInput, PlanRolloutResult
from models.spec import RolloutSpec
from store.engine import Database
from store.rollouts import RolloutStore

OLD = hashlib.sha256(b"old").hexdigest()
NEW = hashlib.sha256(b"new").hexdigest()


@dataclass
class Fleet:
    """What `prepare` made."""

    store: RolloutStore
    plan: PlanRolloutResult
    spec: RolloutSpec
    release_key: Ed25519PrivateKey
    order_key: Ed25519PrivateKey

    @property
    def trusted(self) -> TrustedKeys:
        """What a device of this fleet trusts."""
        return TrustedKeys.of(release=[self.release_key.public_key()], order=[self.order_key.public_key()])


async def add_devices(db: Database, count: int, prefix: str = "motor") -> None:
    """Devices `<prefix>-1` ... of type motor that run the old image."""
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO devices (device_id, device_type, serial_number, site_id, status, firmware_version, "
            "firmware_sha256) SELECT %(p)s || '-' || i, 'motor', %(p)s || '/' || i, 'berlin', 'active', '1.2.0', "
            "%(old)s FROM generate_series(1, %(n)s) i",
            {"p": prefix, "old": OLD, "n": count},
        )


async def add_release(db: Database, key: Ed25519PrivateKey, version: str = "1.3.0", sha256: str = NEW) -> None:
    """A signed release of product motor-controller."""
    statement = ReleaseStatement("motor-controller", version, ("motor",), 1, sha256, 3, int(time.time()))
    envelope = sign_envelope(encode_release(statement), RELEASE_PAYLOAD_TYPE, key)
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO releases (product, version, hardware, security_counter, sha256, size_bytes, envelope, key_id) "
            "VALUES ('motor-controller', %s, ARRAY['motor'], 1, %s, 3, %s, 'k')",
            (version, sha256, Jsonb(envelope)),
        )


def specification(**changes: Any) -> RolloutSpec:
    """One wave of everything, no per-minute limit, unless said otherwise."""
    return RolloutSpec.model_validate(
        {
            "name": "motor-1.3.0",
            "release": "motor-controller@1.3.0",
            "waves": [{"name": "all", "size": "100%"}],
            "pace": {"in_flight": 500, "per_minute": None},
        }
        | changes
    )


async def prepare(db: Database, devices: int, *, open_waves: int = 1, **changes: Any) -> Fleet:
    """Devices, a release, a plan, and its first waves open."""
    store, release_key, order_key = RolloutStore(db), generate_private_key(), generate_private_key()
    await add_devices(db, devices)
    await add_release(db, release_key)
    spec = specification(**changes)
    plan = await store.plan(PlanRolloutInput(spec=spec))
    await store.write_document(plan.job_no, [])
    for wave in range(1, open_waves + 1):
        await store.open_wave(plan.job_no, wave)
    return Fleet(store, plan, spec, release_key, order_key)


async def recount(db: Database, job_no: int) -> list[tuple[Any, ...]]:
    """Waves whose counters differ from a recount of their executions: none, if all is well."""
    async with db.pool.connection() as connection:
        cursor = await connection.execute(
            """
            SELECT w.wave, to_jsonb(w), c.* FROM waves w JOIN (
              SELECT wave, count(*) FILTER (WHERE state = 'PENDING') AS pending,
                count(*) FILTER (WHERE state = 'QUEUED') AS queued,
                count(*) FILTER (WHERE state = 'IN_PROGRESS') AS in_progress,
                count(*) FILTER (WHERE state = 'SUCCEEDED') AS succeeded,
                count(*) FILTER (WHERE state = 'FAILED') AS failed,
                count(*) FILTER (WHERE state = 'TIMED_OUT') AS timed_out,
                count(*) FILTER (WHERE state = 'REJECTED') AS rejected,
                count(*) FILTER (WHERE state = 'CANCELED') AS canceled
              FROM executions WHERE job_no = %(j)s GROUP BY wave) c USING (wave)
            WHERE w.job_no = %(j)s AND (w.pending, w.queued, w.in_progress, w.succeeded, w.failed, w.timed_out,
              w.rejected, w.canceled) IS DISTINCT FROM (c.pending::int, c.queued::int, c.in_progress::int,
              c.succeeded::int, c.failed::int, c.timed_out::int, c.rejected::int, c.canceled::int)
            UNION ALL
            SELECT -1, to_jsonb(j), NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL FROM jobs j
            WHERE job_no = %(j)s AND in_flight <>
              (SELECT count(*) FROM executions WHERE job_no = %(j)s AND state = 'IN_PROGRESS')
            """,
            {"j": job_no},
        )
        return list(await cursor.fetchall())
