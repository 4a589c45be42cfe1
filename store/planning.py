"""Planning a rollout: which devices, in which order, in which waves. One transaction, one `INSERT ... SELECT`."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import orjson
import psycopg
from psycopg import AsyncConnection
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from domain.admission import FIRMWARE_UPDATE
from domain.gate import Breaker, breaker_of, completion_count
from domain.waves import cut_waves
from models.device import DeviceStatus
from models.errors import ConflictError, NotFoundError, RefusedError
from models.ids import parse_release_ref, rollout_job_id
from models.rollout import PlannedWave, PlanRolloutInput, PlanRolloutResult
from models.spec import RolloutSpec, WaveSpec
from store.engine import fetch_one
from store.events import append_event
from store.filters import where

KIND = "rollout"
_PLAN_LOCK = 7311463


async def hold_planning(connection: AsyncConnection) -> None:
    """Until this transaction ends, no rollout is planned but by itself: what it says of devices holds for the plan."""
    await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_PLAN_LOCK,))


async def plan_rollout(connection: AsyncConnection, request: PlanRolloutInput) -> PlanRolloutResult:
    """Choose the devices, put them in order, cut the waves.

    Idempotent by the rollout's name: the same specification again returns the plan that exists.

    Raises:
        NotFoundError: no such release.
        RefusedError: no device to update, or devices whose hardware the release does not name.
        ConflictError: another specification under this name, or devices that another rollout holds.
    """
    spec = request.spec
    await hold_planning(connection)
    existing = await _existing_plan(connection, spec)
    if existing is not None:
        return existing
    release = await find_release(connection, f"rollout {spec.name}", spec.release)
    await connection.execute(*_targets_sql(spec, release["sha256"]))
    await _refuse_bad_targets(connection, spec, release)
    job_no = await _insert_job(connection, spec, release, request.requested_by)
    try:
        await _insert_executions(connection, spec, job_no)
    except psycopg.errors.UniqueViolation as error:
        raise ConflictError(f"cannot plan rollout {spec.name}: {error.diag.message_detail}") from error
    return await read_plan(connection, job_no)


async def _existing_plan(connection: AsyncConnection, spec: RolloutSpec) -> PlanRolloutResult | None:
    row = await (
        await connection.execute("SELECT job_no, spec FROM jobs WHERE kind = %s AND name = %s", (KIND, spec.name))
    ).fetchone()
    if row is None:
        return None
    if RolloutSpec.model_validate(row[1]) != spec:
        raise ConflictError(
            f"cannot start rollout {spec.name}: a rollout of this name with another specification exists; "
            "a rollout is never changed by starting it again, so give this one another name"
        )
    return await read_plan(connection, row[0])


async def find_release(connection: AsyncConnection, who: str, ref: str) -> dict[str, Any]:
    """The row of a release. Raises NotFoundError, saying that `who` cannot start."""
    product, version = parse_release_ref(ref)
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("SELECT * FROM releases WHERE product = %s AND version = %s", (product, version))
        release = await cursor.fetchone()
    if release is None:
        raise NotFoundError(
            f"cannot start {who}: no release {ref}; publish it with "
            f"'starter.py release publish IMAGE --product {product} --version {version} ...'"
        )
    return release


def _targets_sql(spec: RolloutSpec, sha256: str) -> tuple[Any, dict[str, Any]]:
    """Devices of the target that do not run the release yet, in their order, as a temporary table.

    Whatever the target says: a device that is retired, or whose word counts for nothing, is not chosen. One that is
    being provisioned has never been heard of, and a wave would wait for it: it is chosen where the target asks for it.
    """
    condition, parameters = where(spec.target)
    sql = (
        "CREATE TEMPORARY TABLE targets ON COMMIT DROP AS "
        "SELECT d.device_id, d.device_type, d.firmware_version, d.firmware_sha256, "
        "row_number() OVER (ORDER BY md5(%(rollout)s || '/' || d.device_id), d.device_id) AS rank "
        f"FROM devices d WHERE {condition} AND d.status <> 'retired' AND d.barred_at IS NULL "
        "AND (d.status <> 'provisioning' OR %(any_status)s) "
        "AND d.firmware_sha256 IS DISTINCT FROM %(target_sha256)s"
    )
    asked_for = DeviceStatus.PROVISIONING in spec.target.statuses
    return sql, {**parameters, "rollout": spec.name, "target_sha256": sha256, "any_status": asked_for}


async def _refuse_bad_targets(connection: AsyncConnection, spec: RolloutSpec, release: dict[str, Any]) -> None:
    total, wrong, types = await fetch_one(
        connection,
        "SELECT count(*), count(*) FILTER (WHERE device_type <> ALL(%(hardware)s)), "
        "string_agg(DISTINCT device_type, ', ') FILTER (WHERE device_type <> ALL(%(hardware)s)) FROM targets",
        {"hardware": release["hardware"]},
    )
    if total == 0:
        raise RefusedError(
            f"cannot start rollout {spec.name}: no device matches the target and does not run {spec.release} already; "
            "'starter.py device list' shows what is in the registry"
        )
    if wrong:
        raise RefusedError(
            f"cannot start rollout {spec.name}: release is for hardware {', '.join(release['hardware'])}, "
            f"{wrong} of {total} targets are {types}; narrow the target or publish an image for them"
        )
    held = await count_held(connection)
    if held:
        others = ", ".join(f"{count} of its {total} devices are held by {name}" for name, count in held)
        raise ConflictError(f"cannot start rollout {spec.name}: {others}; wait for it, abort it, or narrow the target")


async def count_held(connection: AsyncConnection) -> list[tuple[str, int]]:
    """What installs firmware on devices of `targets` already (`rollout motor-1.3.0`), and on how many."""
    cursor = await connection.execute(
        "SELECT j.kind || ' ' || j.name, count(*) FROM targets t JOIN executions e USING (device_id) "
        "JOIN jobs j USING (job_no) WHERE e.exclusive AND e.state IN ('PENDING','QUEUED','IN_PROGRESS') "
        "GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    return [(str(name), int(count)) for name, count in await cursor.fetchall()]


async def _insert_job(connection: AsyncConnection, spec: RolloutSpec, release: dict[str, Any], by: str) -> int:
    row = await fetch_one(
        connection,
        "INSERT INTO jobs (job_id, kind, name, operation, status, phase, spec, release_id, target_version, "
        "target_sha256, requested_by, in_flight_cap, per_minute, accept_seconds, download_seconds, install_seconds, "
        "confirm_seconds) VALUES (%(job_id)s, 'rollout', %(name)s, %(operation)s, 'planned', 'planning', %(spec)s, "
        "%(release_id)s, %(version)s, %(sha256)s, %(by)s, %(in_flight)s, %(per_minute)s, %(accept)s, %(download)s, "
        "%(install)s, %(confirm)s) RETURNING job_no",
        {
            "job_id": rollout_job_id(spec.name),
            "name": spec.name,
            "operation": FIRMWARE_UPDATE,
            "spec": Jsonb(orjson.loads(spec.model_dump_json())),
            "release_id": release["release_id"],
            "version": release["version"],
            "sha256": release["sha256"],
            "by": by,
            "in_flight": spec.pace.in_flight,
            "per_minute": spec.pace.per_minute,
            "accept": spec.deadlines.accept.total_seconds(),
            "download": spec.deadlines.download.total_seconds(),
            "install": spec.deadlines.install.total_seconds(),
            "confirm": spec.deadlines.confirm.total_seconds(),
        },
    )
    return int(row[0])


@dataclass(frozen=True)
class Cut:
    """Waves as they were cut: `bounds` are the ranks at which they end, `upto` the last of them."""

    bounds: list[int]
    upto: int
    names: str

    @property
    def text(self) -> str:
        """`40 devices in 2 waves: canary 4, fleet 36`."""
        return f"{self.upto} devices in {len(self.bounds)} wave{'' if len(self.bounds) == 1 else 's'}: {self.names}"


async def insert_waves(
    connection: AsyncConnection,
    job_no: int,
    waves: Sequence[WaveSpec],
    *,
    total: int,
    completion: Fraction,
    breaker: Breaker,
    keep_last: bool = False,
) -> Cut:
    """Cut `total` devices into waves. One that gets none is left out: an earlier one has reached everybody; the last
    stays with `keep_last`, for those who will come."""
    sizes = cut_waves(total, [wave.size for wave in waves])
    upto, bounds = 0, []
    for wave, devices in zip(waves, sizes, strict=True):
        if devices == 0 and not (keep_last and wave is waves[-1]):
            continue
        upto += devices
        bounds.append(upto)
        await connection.execute(
            "INSERT INTO waves (job_no, wave, name, status, target_count, completion_count, pending, failure_weight, "
            "success_weight, halt_threshold) VALUES (%s, %s, %s, 'pending', %s, %s, %s, %s, %s, %s)",
            (
                job_no,
                len(bounds),
                wave.name,
                devices,
                completion_count(devices, completion),
                devices,
                breaker.failure_weight,
                breaker.success_weight,
                breaker.halt_threshold,
            ),
        )
    names = ", ".join(f"{wave.name} {devices}" for wave, devices in zip(waves, sizes, strict=True) if devices)
    return Cut(bounds, upto, names)


async def _insert_executions(connection: AsyncConnection, spec: RolloutSpec, job_no: int) -> None:
    (total,) = await fetch_one(connection, "SELECT count(*) FROM targets", {})
    cut = await insert_waves(
        connection, job_no, spec.waves, total=total, completion=spec.completion, breaker=breaker_of(spec.gate)
    )
    await connection.execute(
        "INSERT INTO executions (job_no, device_id, wave, rank, exclusive, state, base_version, base_sha256) "
        "SELECT %(job_no)s, device_id, width_bucket(rank - 1, %(bounds)s::bigint[]) + 1, rank, true, 'PENDING', "
        "firmware_version, firmware_sha256 FROM targets WHERE rank <= %(upto)s",
        {"job_no": job_no, "bounds": cut.bounds, "upto": cut.upto},
    )
    await connection.execute("UPDATE jobs SET devices = %s WHERE job_no = %s", (cut.upto, job_no))
    # The planner's statistics would otherwise say that the table is empty until autovacuum comes by.
    await connection.execute("ANALYZE executions")
    await append_event(connection, job_no, "planned", cut.text)


async def read_plan(connection: AsyncConnection, job_no: int) -> PlanRolloutResult:
    """A plan as it stands."""
    devices, sha256 = await fetch_one(
        connection, "SELECT devices, target_sha256 FROM jobs WHERE job_no = %s", (job_no,)
    )
    waves = await (
        await connection.execute(
            "SELECT wave, name, target_count FROM waves WHERE job_no = %s ORDER BY wave", (job_no,)
        )
    ).fetchall()
    bases = await (
        await connection.execute(
            "SELECT base_sha256, count(*) FROM executions WHERE job_no = %s AND base_sha256 IS NOT NULL "
            "GROUP BY 1 ORDER BY 2 DESC, 1",
            (job_no,),
        )
    ).fetchall()
    return PlanRolloutResult(
        job_no=job_no,
        devices=devices,
        waves=tuple(PlannedWave(wave=w, name=n, devices=d) for w, n, d in waves),
        release_sha256=sha256 or "",
        bases=tuple((base, count) for base, count in bases),
    )
