"""The unit of work that changes executions: lock the jobs, load a Ledger, decide in memory, write it all back.

```python
async with store.batch(things, pairs) as batch:      # one transaction
    refused = batch.ledger.admit(execution, batch.now, details)
    ...                                               # committed when the block ends
```

Everything that changes an execution's state locks its job's row first, in the order of job numbers. So the counters,
the caps and the breaker are exact, and there is no deadlock. Loading is one network round trip, saving another.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from psycopg import AsyncConnection

from domain.admission import Ledger
from domain.gate import Breaker
from domain.ledger_rows import COUNTERS, ExecutionRow, FailedAttempt, JobRow, WaveRow
from models.protocol import ExecutionState
from models.rollout import JobStatus
from store.engine import Database

CHANNEL = "tidegate_wave"
"""NOTIFY channel; the payload is the job's number. Rare: a wave tripped, answered, or has nothing outstanding."""

_LOCK_JOBS = """
SELECT job_no, job_id, operation, status, in_flight_cap, per_minute, in_flight, exposed, by_delta,
       admitted_seconds, admitted_counts, download_seconds, install_seconds, confirm_seconds,
       target_version, target_sha256, accept_seconds, max_attempts, backoff_seconds, backoff_multiplier,
       max_backoff_seconds, CASE WHEN operation = 'diagnostic' THEN document->'types' END
FROM jobs
WHERE job_no = ANY(ARRAY(
        SELECT job_no FROM executions
        WHERE device_id = ANY(ARRAY(SELECT jsonb_array_elements_text(%(things)s::jsonb))) AND state IN ('PENDING','QUEUED','IN_PROGRESS')
      ))
   OR job_id = ANY(ARRAY(SELECT jsonb_array_elements_text(%(job_ids)s::jsonb))) OR job_no = ANY(%(job_nos)s)
ORDER BY job_no FOR UPDATE
"""

_WAVES = """
SELECT w.job_no, w.wave, w.status, w.completion_count, w.pending, w.queued, w.in_progress, w.succeeded, w.failed,
       w.timed_out, w.rejected, w.removed, w.canceled, w.gate_succeeded, w.gate_failed,
       w.failure_weight, w.success_weight, w.halt_threshold,
       extract(epoch FROM w.tripped_at)::float8, w.tripped_failed, w.tripped_exposed,
       extract(epoch FROM w.answered_at)::float8, w.retrying, w.attempts_failed
FROM waves w
WHERE w.job_no = ANY(ARRAY(
        SELECT job_no FROM executions
        WHERE device_id = ANY(ARRAY(SELECT jsonb_array_elements_text(%(things)s::jsonb))) AND state IN ('PENDING','QUEUED','IN_PROGRESS')
      ))
   OR w.job_no = ANY(ARRAY(SELECT job_no FROM jobs WHERE job_id = ANY(ARRAY(SELECT jsonb_array_elements_text(%(job_ids)s::jsonb)))))
   OR w.job_no = ANY(%(job_nos)s)
"""

_EXECUTION_COLUMNS = """
e.job_no, e.device_id, e.wave, e.state, e.version_number, e.execution_number, e.step, e.status_details,
e.failure_class, e.reason, e.base_sha256, e.by_delta, extract(epoch FROM e.queued_at)::float8,
extract(epoch FROM e.started_at)::float8, extract(epoch FROM e.updated_at)::float8,
extract(epoch FROM e.finished_at)::float8, extract(epoch FROM e.deadline_at)::float8,
extract(epoch FROM e.retry_at)::float8, e.boot_id,
CASE WHEN NOT e.exclusive THEN (SELECT p.boot_id FROM presence p WHERE p.device_id = e.device_id) END,
CASE WHEN NOT e.exclusive THEN (SELECT d.desired_config_version FROM devices d WHERE d.device_id = e.device_id) END
"""

_OPEN_EXECUTIONS = f"""
SELECT {_EXECUTION_COLUMNS} FROM executions e
WHERE e.device_id = ANY(ARRAY(SELECT jsonb_array_elements_text(%(things)s::jsonb))) AND e.state IN ('PENDING','QUEUED','IN_PROGRESS')
"""

_NAMED_EXECUTIONS = f"""
SELECT {_EXECUTION_COLUMNS}
FROM jsonb_to_recordset(%(pairs)s::jsonb) AS r(job_id text, device_id text)
JOIN jobs j ON j.job_id = r.job_id
JOIN executions e ON e.job_no = j.job_no AND e.device_id = r.device_id
"""

_NOW = "SELECT extract(epoch FROM clock_timestamp())::float8"

_SAVE_EXECUTIONS = """
UPDATE executions e SET
  state = n.state, version_number = n.version_number, execution_number = n.execution_number, step = n.step,
  status_details = n.details, queued_at = to_timestamp(n.queued_at), retry_at = to_timestamp(n.retry_at),
  boot_id = n.boot_id,
  failure_class = n.failure_class, reason = n.reason, by_delta = n.by_delta,
  started_at = to_timestamp(n.started_at), updated_at = to_timestamp(n.updated_at),
  finished_at = to_timestamp(n.finished_at), deadline_at = to_timestamp(n.deadline_at)
FROM jsonb_to_recordset(%s::jsonb)
  AS n(job_no bigint, device_id text, state text, version_number int, execution_number int, step text, details jsonb,
       failure_class text, reason text, by_delta bool, boot_id text, queued_at float8, retry_at float8, started_at float8, updated_at float8, finished_at float8, deadline_at float8)
WHERE e.job_no = n.job_no AND e.device_id = n.device_id
"""

_SAVE_WAVE = """
UPDATE waves SET pending = %s, queued = %s, in_progress = %s, succeeded = %s, failed = %s, timed_out = %s,
  rejected = %s, removed = %s, canceled = %s, gate_succeeded = %s, gate_failed = %s, tripped_at = to_timestamp(%s),
  tripped_failed = %s, tripped_exposed = %s, answered_at = to_timestamp(%s), retrying = %s, attempts_failed = %s
WHERE job_no = %s AND wave = %s
"""

_SAVE_JOB = """
UPDATE jobs SET in_flight = %s, exposed = %s, by_delta = %s, admitted_seconds = %s, admitted_counts = %s
WHERE job_no = %s
"""

_SAVE_INSTALLED = """
UPDATE devices d SET firmware_version = n.version, firmware_sha256 = n.sha256, updated_at = now()
FROM jsonb_to_recordset(%s::jsonb) AS n(device_id text, version text, sha256 text)
WHERE d.device_id = n.device_id
"""

_SAVE_FAILURES = """
INSERT INTO execution_failures (job_no, device_id, attempt, state, failure_class, reason, details, started_at, failed_at,
  retry_at)
SELECT job_no, device_id, attempt, state, failure_class, reason, details, to_timestamp(started_at),
  to_timestamp(failed_at), to_timestamp(retry_at)
FROM jsonb_to_recordset(%s::jsonb)
  AS n(job_no bigint, device_id text, attempt int, state text, failure_class text, reason text, details jsonb,
       started_at float8, failed_at float8, retry_at float8)
"""

_SAVE_QUESTIONS = """
INSERT INTO diagnostics (request_id, device_id, type, state, requested_by, job_no, execution_number, expires_at)
SELECT n.request_id, n.device_id, n.type, 'requested', j.requested_by, n.job_no, n.attempt, to_timestamp(n.expires_at)
FROM jsonb_to_recordset(%s::jsonb)
  AS n(request_id text, device_id text, type text, job_no bigint, attempt int, expires_at float8)
JOIN jobs j USING (job_no)
ON CONFLICT (request_id) DO NOTHING
"""

COUNT_NAMES = tuple(COUNTERS.values())
"""The counters of a wave, in the order in which the statements above name them."""


@dataclass
class Batch:
    """What a transaction may read and change. `now` is PostgreSQL's clock, in seconds since the epoch."""

    ledger: Ledger
    now: float
    connection: AsyncConnection


class ExecutionStore:
    """Opens batches."""

    def __init__(self, db: Database) -> None:
        self._db = db

    @asynccontextmanager
    async def batch(
        self,
        things: Sequence[str] = (),
        pairs: Sequence[tuple[str, str]] = (),
        job_nos: Sequence[int] = (),
    ) -> AsyncIterator[Batch]:
        """One transaction over the open executions of `things`, the executions named by `pairs` (job id, thing),
        and the jobs `job_nos`, all locked. What the Ledger changed is committed when the block ends without error.
        """
        async with self._db.pool.connection() as connection:
            batch = await load(connection, things, pairs, job_nos)
            yield batch
            await save(batch)


async def load(
    connection: AsyncConnection, things: Sequence[str], pairs: Sequence[tuple[str, str]], job_nos: Sequence[int]
) -> Batch:
    """Lock the jobs and read what the batch needs: each statement sees what committed before the lock was granted."""
    async with connection.pipeline():
        return await load_in_pipeline(connection, things, pairs, job_nos)


async def load_in_pipeline(
    connection: AsyncConnection, things: Sequence[str], pairs: Sequence[tuple[str, str]], job_nos: Sequence[int]
) -> Batch:
    """`load` in a pipeline that is open already: one within another costs a round trip."""
    # As JSON, not as arrays: psycopg writes an array element by element in Python, orjson all at once.
    arguments = {
        "things": _json(list(things)),
        "job_ids": _json(list({job_id for job_id, _ in pairs})),
        "job_nos": list(job_nos),
        "pairs": _json([{"job_id": job_id, "device_id": thing} for job_id, thing in pairs]),
    }
    cursors = [connection.cursor() for _ in range(5)]
    for cursor, sql in zip(cursors, (_LOCK_JOBS, _WAVES, _OPEN_EXECUTIONS, _NAMED_EXECUTIONS, _NOW), strict=True):
        await cursor.execute(sql, arguments)
    jobs, waves, opened, named, times = [await cursor.fetchall() for cursor in cursors]
    by_no = {row[0]: _job(row) for row in jobs}
    for row in waves:
        if row[0] in by_no:
            by_no[row[0]].waves[row[1]] = _wave(row)
    executions = {(row[0], row[1]): row for row in (*opened, *named)}
    # A job that appeared between the two statements is not locked, so it is not ours to touch in this batch.
    ours = [_execution(row) for key, row in executions.items() if key[0] in by_no]
    return Batch(Ledger(list(by_no.values()), ours), times[0][0], connection)


async def load_expired(connection: AsyncConnection, job_no: int, limit: int) -> Batch:
    """A batch with one job and those of its executions whose deadline has passed."""
    sql = f"""
        SELECT {_EXECUTION_COLUMNS} FROM executions e
        WHERE e.job_no = %(job_no)s AND e.state IN ('QUEUED','IN_PROGRESS') AND e.deadline_at <= clock_timestamp()
        ORDER BY e.deadline_at LIMIT %(limit)s
    """
    return await _load_more(connection, job_no, sql, {"job_no": job_no, "limit": limit})


async def load_withdrawable(connection: AsyncConnection, job_no: int, limit: int) -> Batch:
    """A batch with one job and those of its executions that have not started."""
    sql = f"""
        SELECT {_EXECUTION_COLUMNS} FROM executions e
        WHERE e.job_no = %(job_no)s AND e.state IN ('PENDING','QUEUED') LIMIT %(limit)s
    """
    return await _load_more(connection, job_no, sql, {"job_no": job_no, "limit": limit})


async def load_running(connection: AsyncConnection, job_no: int, limit: int) -> Batch:
    """A batch with one job and those of its executions that are in progress."""
    sql = f"""
        SELECT {_EXECUTION_COLUMNS} FROM executions e
        WHERE e.job_no = %(job_no)s AND e.state = 'IN_PROGRESS' LIMIT %(limit)s
    """
    return await _load_more(connection, job_no, sql, {"job_no": job_no, "limit": limit})


async def _load_more(connection: AsyncConnection, job_no: int, sql: str, arguments: dict[str, Any]) -> Batch:
    base = await load(connection, (), (), (job_no,))
    rows = await (await connection.execute(sql, arguments)).fetchall()
    return Batch(Ledger(list(base.ledger.jobs.values()), [_execution(row) for row in rows]), base.now, connection)


async def save(batch: Batch) -> None:
    """Write back what changed, in the transaction of the batch."""
    ledger = batch.ledger
    if any(e.changed for e in ledger.by_key.values()) or any(job.changed for job in ledger.jobs.values()):
        async with batch.connection.pipeline():
            await save_in_pipeline(batch)


async def save_in_pipeline(batch: Batch) -> None:
    """`save` in a pipeline that is open already."""
    changed = [e for e in batch.ledger.by_key.values() if e.changed]
    jobs = [job for job in batch.ledger.jobs.values() if job.changed]
    if changed:
        await batch.connection.execute(_SAVE_EXECUTIONS, (_json([_saved(e) for e in changed]),))
    for job in jobs:
        seconds = sorted(job.admitted)
        counts = [job.admitted[second] for second in seconds]
        await batch.connection.execute(
            _SAVE_JOB, (job.in_flight, job.exposed, job.by_delta, seconds, counts, job.job_no)
        )
        for wave in job.waves.values():
            if wave.changed:
                await batch.connection.execute(_SAVE_WAVE, _wave_values(wave))
        if any(wave.news for wave in job.waves.values()):
            await batch.connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, str(job.job_no)))
    if batch.ledger.failures:
        await batch.connection.execute(_SAVE_FAILURES, (_json([_failure(f) for f in batch.ledger.failures]),))
    if batch.ledger.questions:
        await batch.connection.execute(_SAVE_QUESTIONS, (_json([asdict(q) for q in batch.ledger.questions]),))
    if installed := _installed(changed, batch.ledger):
        await batch.connection.execute(_SAVE_INSTALLED, (_json(installed),))


def _installed(changed: list[ExecutionRow], ledger: Ledger) -> list[dict[str, str | None]]:
    """Devices that have just been updated, and what they run now."""
    return [
        {"device_id": e.device_id, "version": job.target_version, "sha256": job.target_sha256}
        for e in changed
        if e.state is ExecutionState.SUCCEEDED and (job := ledger.jobs[e.job_no]).target_sha256
    ]


def _failure(failure: FailedAttempt) -> dict[str, Any]:
    return {
        "job_no": failure.job_no,
        "device_id": failure.device_id,
        "attempt": failure.attempt,
        "state": failure.state.value,
        "failure_class": failure.failure_class,
        "reason": failure.reason,
        "details": failure.details,
        "started_at": failure.started_at,
        "failed_at": failure.failed_at,
        "retry_at": failure.retry_at,
    }


def _job(row: tuple[Any, ...]) -> JobRow:
    return JobRow(
        job_no=row[0],
        job_id=row[1],
        operation=row[2],
        status=JobStatus(row[3]),
        in_flight_cap=row[4],
        per_minute=row[5],
        in_flight=row[6],
        exposed=row[7],
        by_delta=row[8],
        admitted=dict(zip(row[9], row[10], strict=True)),
        phase_seconds=(row[11], row[12], row[13]),
        target_version=row[14],
        target_sha256=row[15],
        accept_seconds=row[16],
        max_attempts=row[17],
        backoff_seconds=row[18],
        backoff_multiplier=row[19],
        max_backoff_seconds=row[20],
        diagnostics=tuple(row[21] or ()),
    )


def _wave(row: tuple[Any, ...]) -> WaveRow:
    return WaveRow(
        job_no=row[0],
        wave=row[1],
        status=row[2],
        completion_count=row[3],
        counts=dict(zip(COUNT_NAMES, row[4:13], strict=True)),
        gate_succeeded=row[13],
        gate_failed=row[14],
        breaker=Breaker(row[15], row[16], row[17]),
        tripped_at=row[18],
        tripped_failed=row[19],
        tripped_exposed=row[20],
        answered_at=row[21],
        retrying=row[22],
        attempts_failed=row[23],
    )


def _execution(row: tuple[Any, ...]) -> ExecutionRow:
    return ExecutionRow(row[0], row[1], row[2], ExecutionState(row[3]), *row[4:])


def _saved(execution: ExecutionRow) -> dict[str, Any]:
    return {
        "job_no": execution.job_no,
        "device_id": execution.device_id,
        "state": execution.state.value,
        "version_number": execution.version_number,
        "execution_number": execution.execution_number,
        "step": execution.step,
        "details": execution.details,
        "failure_class": execution.failure_class,
        "reason": execution.reason,
        "by_delta": execution.by_delta,
        "boot_id": execution.boot_id,
        "queued_at": execution.queued_at,
        "retry_at": execution.retry_at,
        "started_at": execution.started_at,
        "updated_at": execution.updated_at,
        "finished_at": execution.finished_at,
        "deadline_at": execution.deadline_at,
    }


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _wave_values(wave: WaveRow) -> tuple[Any, ...]:
    return (
        *(wave.counts[name] for name in COUNT_NAMES),
        wave.gate_succeeded,
        wave.gate_failed,
        wave.tripped_at,
        wave.tripped_failed,
        wave.tripped_exposed,
        wave.answered_at,
        wave.retrying,
        wave.attempts_failed,
        wave.job_no,
        wave.wave,
    )
