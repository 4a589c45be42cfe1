"""Fleet jobs over devices in a real database: planned, opened, and recounted."""

from typing import Any

from models.fleetjob import FleetJobProgress, PlanFleetJobInput
from models.jobspec import FleetJobSpec
from models.rollout import PlanRolloutResult
from store.engine import Database
from store.fleetjobs import FleetJobStore
from store.rollouts import RolloutStore
from tests.integration.rollout_setup import recount


def job(name: str = "restart-all", operation: str = "restart", **changes: Any) -> FleetJobSpec:
    """A job on every device, unless said otherwise."""
    return FleetJobSpec.model_validate({"name": name, "operation": operation} | changes)


async def plan_job(db: Database, spec: FleetJobSpec, *, open_waves: int = 1) -> PlanRolloutResult:
    """Planned, and its first waves open."""
    plan = await FleetJobStore(db).plan(PlanFleetJobInput(spec=spec, requested_by="alice"))
    for wave in range(1, open_waves + 1):
        await RolloutStore(db).open_wave(plan.job_no, wave)
    return plan


def adds_up(progress: FleetJobProgress) -> bool:
    """Whether every device is counted in exactly one place."""
    p = progress
    return p.total == p.waiting + p.in_progress + p.succeeded + p.failed + p.withdrawn and p.retrying <= p.waiting


async def miscounted(db: Database, job_no: int) -> list[tuple[Any, ...]]:
    """Waves whose counters differ from a recount of executions and failures: none, if all is well."""
    async with db.pool.connection() as connection:
        cursor = await connection.execute(
            """
            SELECT w.wave, w.retrying, w.attempts_failed, e.retrying, e.failures, w.target_count, e.total FROM waves w
            LEFT JOIN (
              SELECT x.wave, count(*) AS total,
                count(*) FILTER (WHERE x.state = 'QUEUED' AND x.execution_number > 1) AS retrying,
                sum((SELECT count(*) FROM execution_failures f WHERE f.job_no = x.job_no AND f.device_id = x.device_id))
                  AS failures
              FROM executions x WHERE x.job_no = %(j)s GROUP BY x.wave) e USING (wave)
            WHERE w.job_no = %(j)s AND (w.retrying, w.attempts_failed, w.target_count) IS DISTINCT FROM
              (coalesce(e.retrying, 0)::int, coalesce(e.failures, 0)::int, coalesce(e.total, 0)::int)
            """,
            {"j": job_no},
        )
        return [*await recount(db, job_no), *await cursor.fetchall()]
