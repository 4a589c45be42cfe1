"""What rollouts and fleet jobs are shown as: their waves, their devices, what happened to them. Reads alone.

`kind` is that of jobs: `rollout` or `job`.
"""

from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import dict_row

from models.errors import NotFoundError
from models.protocol import ExecutionState
from models.rollout import FinishRolloutResult, Outcome, WaveCounts, WaveProgress
from models.views import EventView, ExecutionView, RolloutView
from store.engine import fetch_one

_EXECUTIONS = """
SELECT j.name AS rollout, e.device_id, e.wave, w.name AS wave_name, e.rank, e.state, e.version_number,
  e.execution_number, e.step, coalesce(e.status_details, '{}') AS status_details, e.failure_class, e.reason,
  e.base_version, e.base_sha256, e.by_delta, e.queued_at, e.started_at, e.updated_at, e.finished_at, e.deadline_at,
  e.retry_at
FROM jobs j JOIN executions e USING (job_no) JOIN waves w USING (job_no, wave)
WHERE j.kind = %(kind)s AND j.name = %(name)s
"""

_WAVE_COLUMNS = (
    "wave, name, status, tripped_at IS NOT NULL AS tripped, tripped_failed, tripped_exposed, opened_at, answered_at, "
    "closed_at, verdict, reason, target_count, " + ", ".join(WaveCounts.model_fields)
)


async def read_waves(connection: AsyncConnection, job_no: int, wave: int | None = None) -> list[WaveProgress]:
    """A job's waves in their order, or the one that is named."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            f"SELECT {_WAVE_COLUMNS} FROM waves WHERE job_no = %(job_no)s "
            "AND (%(wave)s::int IS NULL OR wave = %(wave)s) ORDER BY wave",
            {"job_no": job_no, "wave": wave},
        )
        return [wave_progress(row) for row in await cursor.fetchall()]


def wave_progress(row: dict[str, Any]) -> WaveProgress:
    """A wave from its row: columns, or the same as JSON."""
    counts = WaveCounts(**{name: row[name] for name in WaveCounts.model_fields})
    return WaveProgress.model_validate({**row, "counts": counts})


async def read_figures(connection: AsyncConnection, job_no: int) -> FinishRolloutResult:
    """What came of a job: its totals, and its waves."""
    devices, exposed, by_delta, outcome = await fetch_one(
        connection, "SELECT devices, exposed, by_delta, outcome FROM jobs WHERE job_no = %s", (job_no,)
    )
    waves = await read_waves(connection, job_no)
    return FinishRolloutResult(
        outcome=Outcome(outcome) if outcome else None,
        devices=devices,
        succeeded=sum(wave.counts.succeeded for wave in waves),
        failed=sum(wave.counts.gate_failed for wave in waves),
        exposed=exposed,
        by_delta=by_delta,
        waves=tuple(waves),
    )


async def read_rollouts(
    connection: AsyncConnection, condition: str, arguments: dict[str, Any], tail: str = ""
) -> list[RolloutView]:
    """Rollouts with their waves; `condition` and `tail` are SQL of ours over `j`, a row of jobs."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            "SELECT j.job_no, j.job_id, j.name, j.spec->>'release' AS release, j.target_version, j.target_sha256, j.status, j.phase, j.outcome, j.reason, "
            "j.requested_by, j.devices, j.in_flight, j.in_flight_cap, j.per_minute, j.exposed, j.by_delta, "
            "j.created_at, j.started_at, j.finished_at, j.spec "
            f"FROM jobs j WHERE j.kind = 'rollout' AND {condition} {tail}",
            arguments,
        )
        jobs = await cursor.fetchall()
    return [RolloutView(**job, waves=tuple(await read_waves(connection, job["job_no"]))) for job in jobs]


async def read_execution(connection: AsyncConnection, kind: str, name: str, device_id: str) -> ExecutionView:
    """One device of a job. Raises NotFoundError."""
    wanted = {"kind": kind, "name": name, "device_id": device_id}
    found = await _executions(connection, _EXECUTIONS + "AND e.device_id = %(device_id)s", wanted)
    if not found:
        raise NotFoundError(f"device {device_id!r} is not part of {kind} {name!r}")
    return found[0]


async def read_executions(
    connection: AsyncConnection, kind: str, name: str, state: ExecutionState | None, limit: int
) -> list[ExecutionView]:
    """Devices of a job in their order, optionally in one state. `rollout` of the views is the job's name."""
    one_state = "AND e.state = %(state)s " if state else ""
    sql = _EXECUTIONS + one_state + "ORDER BY e.wave, e.rank LIMIT %(limit)s"
    return await _executions(connection, sql, {"kind": kind, "name": name, "state": state, "limit": limit})


async def _executions(connection: AsyncConnection, sql: str, wanted: dict[str, Any]) -> list[ExecutionView]:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(sql.encode(), wanted)
        return [ExecutionView(**row) for row in await cursor.fetchall()]


async def read_events(connection: AsyncConnection, job_no: int, limit: int) -> list[EventView]:
    """The last `limit` events of a job, oldest first."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            "SELECT event_no, at, kind, wave, actor, text FROM job_events WHERE job_no = %s ORDER BY event_no DESC LIMIT %s",
            (job_no, limit),
        )
        return [EventView(**row) for row in reversed(await cursor.fetchall())]
