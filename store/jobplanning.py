"""Planning a fleet job: which devices, in which order, in which waves; and the devices that join one later.

A job's devices are chosen by the same rules as a rollout's (store/planning.py). What differs: several jobs may want
something of one device at one time, unless they install firmware; and a continuous job takes in devices that match
later. Both choose by set-based statements, under locks that make the choice hold.
"""

from dataclasses import dataclass
from typing import Any

import orjson
import psycopg
from psycopg import AsyncConnection
from psycopg.types.json import Jsonb

from domain.gate import breaker_of, completion_count
from models.device import DeviceStatus
from models.errors import ConflictError, NotFoundError, RefusedError
from models.fleetjob import PlanFleetJobInput
from models.ids import fleet_job_id, parse_release_ref
from models.jobspec import FleetJobSpec, Membership
from models.protocol import DiagnosticType, JobOperation
from models.rollout import PlanRolloutResult
from store.configurations import check_config, want_of_many
from store.engine import fetch_one
from store.events import append_event
from store.filters import where
from store.planning import count_held, find_release, hold_planning, insert_waves, read_plan

KIND = "job"
FAILED_STATES = ("FAILED", "TIMED_OUT", "REJECTED")
"""Ends that `retry_of` takes up: not those of devices that were withdrawn or have left."""
JOIN_CHUNK = 5000
"""Devices that join in one transaction."""
CONFIG_CHUNK = 2000
"""Devices whose configuration is set in one transaction: about a quarter of a second."""


async def plan_fleet_job(connection: AsyncConnection, asked: PlanFleetJobInput) -> PlanRolloutResult:
    """Choose the devices, put them in order, cut the waves.

    Idempotent by the job's name: the same specification again returns the plan that exists.

    Raises:
        NotFoundError: no such release, or no such job to retry.
        RefusedError: no device to do it, or devices whose hardware the release does not name.
        ConflictError: another specification under this name, or devices whose firmware another job installs.
    """
    spec = asked.spec
    if spec.config is not None:
        check_config(spec.config)
    await hold_planning(connection)
    existing = await _existing_plan(connection, spec)
    if existing is not None:
        return existing
    release = await find_release(connection, f"job {spec.name}", spec.release) if spec.release else None
    retried = await _job_to_retry(connection, spec) if spec.retry_of else None
    chosen, parameters = _chosen_sql(spec, release["sha256"] if release else None, retried)
    await connection.execute(
        f"CREATE TEMPORARY TABLE targets ON COMMIT DROP AS SELECT d.device_id, d.device_type, d.firmware_version, "
        f"d.firmware_sha256, {_RANK} AS rank FROM devices d WHERE {chosen}".encode(),
        parameters,
    )
    await _refuse_bad_targets(connection, spec, release)
    job_no = await _insert_job(connection, asked, release, retried)
    try:
        await _insert_executions(connection, spec, job_no)
    except psycopg.errors.UniqueViolation as error:
        raise ConflictError(f"cannot plan job {spec.name}: {error.diag.message_detail}") from error
    return await read_plan(connection, job_no)


async def join_fleet_job(connection: AsyncConnection, job_no: int) -> int:
    """Take in devices that match a continuous job by now and have never been part of it. Returns how many.

    They come last, in the last wave; QUEUED where it is open. A device whose firmware another job installs joins when
    that is over; one that has left the target and come back is part of it already.
    """
    found = await _continuous_job(connection, job_no)
    # Without the locks first: most looks find nobody, and need not hold anybody up while they read the registry.
    if found is None or not await _anybody_new(connection, found, job_no):
        return 0
    await hold_planning(connection)
    await connection.execute("SELECT 1 FROM jobs WHERE job_no = %s FOR UPDATE", (job_no,))
    found = await _continuous_job(connection, job_no)
    if found is None:
        return 0
    spec = found.spec
    joined = await _insert_joining(connection, found, job_no)
    if not joined:
        return 0
    wave, opened = joined[0][1], joined[0][2] == "QUEUED"
    devices = [device for device, *_ in joined]
    total = (await fetch_one(connection, _GROW_WAVE, {"n": len(joined), "job_no": job_no, "wave": wave}))[0]
    await connection.execute(
        "UPDATE waves SET completion_count = %s WHERE job_no = %s AND wave = %s",
        (completion_count(total, spec.completion), job_no, wave),
    )
    await connection.execute("UPDATE jobs SET devices = devices + %s WHERE job_no = %s", (len(joined), job_no))
    if opened and spec.config is not None:
        await want_of_many(connection, devices, spec.config, found.requested_by, f"job {spec.name}")
    first = ", ".join(devices[:3]) + (", ..." if len(devices) > 3 else "")
    await append_event(connection, job_no, "joined", f"{len(joined)} devices: {first}", wave)
    return len(joined)


@dataclass(frozen=True)
class _Continuous:
    """A continuous job that is not over."""

    spec: FleetJobSpec
    sha256: str | None
    requested_by: str


async def _continuous_job(connection: AsyncConnection, job_no: int) -> _Continuous | None:
    row = await (
        await connection.execute(
            "SELECT spec, target_sha256, requested_by FROM jobs WHERE job_no = %s AND continuous "
            "AND status NOT IN ('halted','finished')",
            (job_no,),
        )
    ).fetchone()
    return None if row is None else _Continuous(FleetJobSpec.model_validate(row[0]), row[1], row[2])


_RANK = "row_number() OVER (ORDER BY md5(%(job)s || '/' || d.device_id), d.device_id)"
"""The same for everybody who plans this job, and another for every job: no device is always the first to be tried."""

_GROW_WAVE = """
UPDATE waves SET target_count = target_count + %(n)s,
  queued = queued + CASE WHEN status = 'open' THEN %(n)s ELSE 0 END,
  pending = pending + CASE WHEN status = 'open' THEN 0 ELSE %(n)s END
WHERE job_no = %(job_no)s AND wave = %(wave)s RETURNING target_count
"""


def _chosen_sql(spec: FleetJobSpec, sha256: str | None, retried: int | None) -> tuple[str, dict[str, Any]]:
    """The devices a job is for, as a condition over `devices d`.

    Whatever the target says: a device that is retired, or whose word counts for nothing, is not chosen. One that is
    being provisioned has never been heard of: it is chosen where the target asks for it.
    """
    condition, parameters = ("true", {}) if retried is not None else where(spec.target)
    clauses = [condition, "d.status <> 'retired'", "d.barred_at IS NULL"]
    if retried is not None:
        clauses.append(
            "EXISTS (SELECT FROM executions f WHERE f.job_no = %(retried)s AND f.device_id = d.device_id "
            "AND f.state = ANY(%(failed)s))"
        )
    elif DeviceStatus.PROVISIONING not in spec.target.statuses:
        clauses.append("d.status <> 'provisioning'")
    if sha256 is not None:
        clauses.append("d.firmware_sha256 IS DISTINCT FROM %(target_sha256)s")
    if spec.operation is JobOperation.CONFIG_SYNC and spec.config is None:
        clauses.append("d.desired_config_version > 0")
    more = {"job": spec.name, "retried": retried, "failed": list(FAILED_STATES), "target_sha256": sha256}
    return " AND ".join(clauses), {**parameters, **more}


async def _existing_plan(connection: AsyncConnection, spec: FleetJobSpec) -> PlanRolloutResult | None:
    row = await (
        await connection.execute("SELECT job_no, spec FROM jobs WHERE kind = %s AND name = %s", (KIND, spec.name))
    ).fetchone()
    if row is None:
        return None
    if FleetJobSpec.model_validate(row[1]) != spec:
        raise ConflictError(
            f"cannot start job {spec.name}: a job of this name with another specification exists; "
            "a job is never changed by starting it again, so give this one another name"
        )
    return await read_plan(connection, row[0])


async def _job_to_retry(connection: AsyncConnection, spec: FleetJobSpec) -> int:
    row = await (
        await connection.execute(
            "SELECT j.job_no, j.status, (SELECT count(*) FROM executions e WHERE e.job_no = j.job_no "
            "AND e.state = ANY(%s)) FROM jobs j WHERE j.kind = 'job' AND j.name = %s",
            (list(FAILED_STATES), spec.retry_of),
        )
    ).fetchone()
    if row is None:
        raise NotFoundError(
            f"cannot start job {spec.name}: no job {spec.retry_of} to retry; 'starter.py job list' shows those that exist"
        )
    if row[2] == 0:
        raise RefusedError(
            f"cannot start job {spec.name}: no device of job {spec.retry_of} has failed "
            f"(the job is {row[1]}), so there is nothing to retry"
        )
    return int(row[0])


async def _refuse_bad_targets(connection: AsyncConnection, spec: FleetJobSpec, release: dict[str, Any] | None) -> None:
    hardware = release["hardware"] if release else []
    total, wrong, types = await fetch_one(
        connection,
        "SELECT count(*), count(*) FILTER (WHERE device_type <> ALL(%(hardware)s)), "
        "string_agg(DISTINCT device_type, ', ') FILTER (WHERE device_type <> ALL(%(hardware)s)) FROM targets",
        {"hardware": hardware},
    )
    if total == 0 and spec.membership is not Membership.CONTINUOUS:
        raise RefusedError(f"cannot start job {spec.name}: {_why_nobody(spec)}")
    if release is None:
        return
    if wrong:
        raise RefusedError(
            f"cannot start job {spec.name}: release is for hardware {', '.join(hardware)}, "
            f"{wrong} of {total} targets are {types}; narrow the target or publish an image for them"
        )
    if spec.membership is Membership.CONTINUOUS:
        await connection.execute(
            "DELETE FROM targets t USING executions e WHERE e.device_id = t.device_id AND e.exclusive "
            "AND e.state IN ('PENDING','QUEUED','IN_PROGRESS')"
        )
        await connection.execute(
            "UPDATE targets t SET rank = r.rank FROM (SELECT device_id, row_number() OVER (ORDER BY rank) AS rank "
            "FROM targets) r WHERE r.device_id = t.device_id"
        )
        return
    held = await count_held(connection)
    if held:
        others = ", ".join(
            f"the firmware of {count} of its {total} devices is {name}'s to install" for name, count in held
        )
        raise ConflictError(f"cannot start job {spec.name}: {others}; wait for it, end it, or narrow the target")


def _why_nobody(spec: FleetJobSpec) -> str:
    if spec.retry_of:
        return f"the devices of job {spec.retry_of} that have failed are retired or barred, or need it no more"
    if spec.release:
        return (
            f"no device matches the target and does not run {spec.release} already; "
            "'starter.py device list' shows what is in the registry"
        )
    if spec.operation is JobOperation.CONFIG_SYNC and spec.config is None:
        return "no device that matches the target has a configuration to take; give the job one with 'config'"
    return "no device matches the target; 'starter.py device list' shows what is in the registry"


async def _insert_job(
    connection: AsyncConnection, asked: PlanFleetJobInput, release: dict[str, Any] | None, retried: int | None
) -> int:
    spec = asked.spec
    document = None if release else document_of(spec)
    columns: dict[str, Any] = {
        "job_id": fleet_job_id(spec.name),
        "kind": KIND,
        "name": spec.name,
        "operation": str(spec.operation),
        "status": "planned",
        "phase": "planning",
        "spec": Jsonb(orjson.loads(spec.model_dump_json())),
        "document": Jsonb(document) if document is not None else None,
        "release_id": release["release_id"] if release else None,
        "target_version": release["version"] if release else None,
        "target_sha256": release["sha256"] if release else None,
        "requested_by": asked.requested_by,
        "in_flight_cap": spec.max_parallel,
        "per_minute": spec.per_minute,
        "accept_seconds": spec.deadlines.accept.total_seconds(),
        "download_seconds": spec.deadlines.download.total_seconds(),
        "install_seconds": spec.deadlines.install.total_seconds(),
        "confirm_seconds": spec.deadlines.confirm.total_seconds(),
        "max_attempts": spec.retry.max_attempts,
        "backoff_seconds": spec.retry.backoff.total_seconds(),
        "backoff_multiplier": spec.retry.backoff_multiplier,
        "max_backoff_seconds": spec.retry.max_backoff.total_seconds(),
        "continuous": spec.membership is Membership.CONTINUOUS,
        "retry_of": retried,
        "schedule": asked.schedule,
    }
    values = ", ".join(f"%({name})s" for name in columns)
    sql = f"INSERT INTO jobs ({', '.join(columns)}) VALUES ({values}) RETURNING job_no"
    return int((await fetch_one(connection, sql, columns))[0])


async def want_config_of_wave(connection: AsyncConnection, job_no: int, wave: int, after: str) -> str | None:
    """Of a job that brings a configuration: the next devices of a wave that opens are to take it from now on.

    Some thousand at a time, because their rows are locked meanwhile, and the gateway has to get at them. Returns the last
    of these devices; None where no device is left behind `after`, or the job brings none.
    """
    row = await (
        await connection.execute(
            "SELECT j.spec->'config', j.requested_by, j.name FROM jobs j JOIN waves w USING (job_no) "
            "WHERE j.job_no = %s AND w.wave = %s AND w.status = 'pending' AND j.operation = 'config-sync'",
            (job_no, wave),
        )
    ).fetchone()
    if row is None or row[0] is None:
        return None
    cursor = await connection.execute(
        "SELECT device_id FROM executions WHERE job_no = %s AND wave = %s AND state = 'PENDING' AND device_id > %s "
        "ORDER BY device_id LIMIT %s",
        (job_no, wave, after, CONFIG_CHUNK),
    )
    devices = [device for (device,) in await cursor.fetchall()]
    if not devices:
        return None
    await want_of_many(connection, devices, row[0], row[1], f"job {row[2]}")
    return str(devices[-1])


def document_of(spec: FleetJobSpec) -> dict[str, Any]:
    """What all devices of a job are told alike; the gateway adds what is one device's alone (gateway/documents.py).

    Of a firmware-update it is written when its artifacts are there.
    """
    document: dict[str, Any] = {"operation": str(spec.operation), "payload": spec.document}
    if spec.operation is JobOperation.DIAGNOSTIC:
        default = (DiagnosticType.SYSTEM_INFO.value, DiagnosticType.LOG_TAIL.value)
        document["types"] = list(dict.fromkeys(spec.diagnostics or default))
    return document


async def _insert_executions(connection: AsyncConnection, spec: FleetJobSpec, job_no: int) -> None:
    (total,) = await fetch_one(connection, "SELECT count(*) FROM targets", {})
    cut = await insert_waves(
        connection,
        job_no,
        spec.waves,
        total=total,
        completion=spec.completion,
        breaker=breaker_of(spec.gate),
        keep_last=spec.membership is Membership.CONTINUOUS,
    )
    await connection.execute(
        "INSERT INTO executions (job_no, device_id, wave, rank, exclusive, state, base_version, base_sha256) "
        "SELECT %(job_no)s, device_id, width_bucket(rank - 1, %(bounds)s::bigint[]) + 1, rank, %(exclusive)s, "
        "'PENDING', firmware_version, firmware_sha256 FROM targets WHERE rank <= %(upto)s",
        {"job_no": job_no, "bounds": cut.bounds, "upto": cut.upto, "exclusive": spec.release is not None},
    )
    await connection.execute("UPDATE jobs SET devices = %s WHERE job_no = %s", (cut.upto, job_no))
    # The planner's statistics would otherwise say that the table is empty until autovacuum comes by.
    await connection.execute("ANALYZE executions")
    await append_event(connection, job_no, "planned", cut.text)


def _new_sql(job: _Continuous, job_no: int) -> tuple[str, dict[str, Any]]:
    """The devices that match a continuous job, could do it now, and have never been part of it."""
    chosen, parameters = _chosen_sql(job.spec, job.sha256, None)
    clauses = [
        chosen,
        "NOT EXISTS (SELECT FROM executions x WHERE x.job_no = %(job_no)s AND x.device_id = d.device_id)",
    ]
    if job.spec.release is not None:
        product, version = parse_release_ref(job.spec.release)
        parameters |= {"product": product, "version": version}
        clauses += [
            "d.device_type = ANY(SELECT unnest(hardware) FROM releases "
            "WHERE product = %(product)s AND version = %(version)s)",
            "NOT EXISTS (SELECT FROM executions x WHERE x.device_id = d.device_id AND x.exclusive "
            "AND x.state IN ('PENDING','QUEUED','IN_PROGRESS'))",
        ]
    return " AND ".join(clauses), {**parameters, "job_no": job_no}


async def _anybody_new(connection: AsyncConnection, job: _Continuous, job_no: int) -> bool:
    chosen, parameters = _new_sql(job, job_no)
    cursor = await connection.execute(f"SELECT 1 FROM devices d WHERE {chosen} LIMIT 1".encode(), parameters)
    return await cursor.fetchone() is not None


async def _insert_joining(connection: AsyncConnection, job: _Continuous, job_no: int) -> list[tuple[str, int, str]]:
    """(device, wave, state) of those that were added."""
    chosen, parameters = _new_sql(job, job_no)
    sql = f"""
        WITH last AS (
          SELECT w.job_no, w.wave, w.status, j.accept_seconds,
            greatest(j.devices, (SELECT max(e.rank) FROM executions e WHERE e.job_no = w.job_no AND e.wave = w.wave)) AS rank
          FROM waves w JOIN jobs j USING (job_no) WHERE w.job_no = %(job_no)s ORDER BY w.wave DESC LIMIT 1
        ), joining AS (
          SELECT d.device_id, d.firmware_version, d.firmware_sha256, {_RANK} AS rank FROM devices d
          WHERE {chosen}
          LIMIT %(chunk)s
        )
        INSERT INTO executions (job_no, device_id, wave, rank, exclusive, state, base_version, base_sha256,
          queued_at, updated_at, deadline_at)
        SELECT l.job_no, n.device_id, l.wave, l.rank + n.rank, %(exclusive)s,
          CASE WHEN l.status = 'open' THEN 'QUEUED' ELSE 'PENDING' END, n.firmware_version, n.firmware_sha256,
          CASE WHEN l.status = 'open' THEN now() END, CASE WHEN l.status = 'open' THEN now() END,
          CASE WHEN l.status = 'open' THEN now() + make_interval(secs => l.accept_seconds) END
        FROM joining n CROSS JOIN last l
        ON CONFLICT DO NOTHING RETURNING device_id, wave, state
    """
    cursor = await connection.execute(
        sql.encode(),
        {**parameters, "exclusive": job.spec.release is not None, "chunk": JOIN_CHUNK},
    )
    return [(str(device), int(wave), str(state)) for device, wave, state in await cursor.fetchall()]
