"""Fleet jobs as they are planned and shown. What moves them is store/rollouts.py's: a job's waves are a rollout's.

Figures come from the counters of one statement, so they add up at every moment: no look falls between two changes.

```python
view = await FleetJobStore(db).get("restart-berlin")
assert view.progress.total == view.progress.waiting + view.progress.in_progress + view.progress.succeeded + ...
```
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from psycopg.rows import class_row, dict_row

from models.errors import NotFoundError
from models.fleetjob import FailureView, FleetJobProgress, FleetJobView, PlanFleetJobInput, StartFleetJobInput
from models.protocol import ExecutionState
from models.rollout import JobStatus, PlanRolloutResult
from models.views import EventView, ExecutionView
from store.engine import Database
from store.jobplanning import plan_fleet_job
from store.jobviews import read_events, read_execution, read_executions, wave_progress

_Jobs: TypeAlias = list[FleetJobView]
_Failures: TypeAlias = list[FailureView]
_Places: TypeAlias = list[ExecutionView]
_Events: TypeAlias = list[EventView]

_TOTALS = """
sum(w.pending + w.queued + w.in_progress + w.succeeded + w.failed + w.timed_out + w.rejected + w.removed + w.canceled)
  AS total,
sum(w.pending + w.queued) AS waiting, sum(w.in_progress) AS in_progress, sum(w.succeeded) AS succeeded,
sum(w.failed + w.timed_out + w.rejected) AS failed, sum(w.removed + w.canceled) AS withdrawn,
sum(w.retrying) AS retrying, sum(w.attempts_failed) AS attempts_failed
"""

_VIEWS = f"""
SELECT j.job_no, j.job_id, j.name, j.operation, j.status, j.phase, j.outcome, j.reason, j.requested_by, j.schedule,
  r.name AS retry_of, j.continuous, j.in_flight_cap, j.max_attempts, j.created_at, j.started_at, j.finished_at, j.spec,
  f.progress, f.waves
FROM jobs j LEFT JOIN jobs r ON r.job_no = j.retry_of CROSS JOIN LATERAL (
  SELECT to_jsonb(t) AS progress, (SELECT jsonb_agg(to_jsonb(w) || jsonb_build_object('tripped', w.tripped_at IS NOT NULL)
                                          ORDER BY w.wave) FROM waves w WHERE w.job_no = j.job_no) AS waves
  FROM (SELECT {_TOTALS} FROM waves w WHERE w.job_no = j.job_no) t
) f
WHERE j.kind = 'job'
"""

_FAILURES = """
SELECT f.device_id, f.attempt, f.state, f.failure_class, f.reason, f.details, f.started_at, f.failed_at, f.retry_at
FROM jobs j JOIN execution_failures f USING (job_no)
WHERE j.kind = 'job' AND j.name = %(name)s AND (NOT %(final)s OR f.retry_at IS NULL)
ORDER BY f.failure_no DESC LIMIT %(limit)s
"""


@dataclass
class FleetJobStore:
    """See the module. `db` must be open."""

    db: Database

    async def plan(self, asked: PlanFleetJobInput | StartFleetJobInput) -> PlanRolloutResult:
        """Choose the devices, put them in order, cut the waves, in one transaction: see store.jobplanning."""
        async with self.db.pool.connection() as connection:
            return await plan_fleet_job(
                connection,
                PlanFleetJobInput(spec=asked.spec, requested_by=asked.requested_by, schedule=asked.schedule),
            )

    async def get(self, name: str) -> FleetJobView:
        """One job. Raises NotFoundError."""
        found = await self._views("AND j.name = %(name)s", {"name": name})
        if not found:
            raise NotFoundError(f"no job {name!r}; 'starter.py job list' shows those that exist")
        return found[0]

    async def list(self, limit: int = 100, states: Sequence[JobStatus] = ()) -> _Jobs:
        """The newest jobs first; with `states`, those in one of them."""
        return await self._views(
            "AND (%(states)s::text[] = '{}' OR j.status = ANY(%(states)s)) ORDER BY j.job_no DESC LIMIT %(limit)s",
            {"states": [str(state) for state in states], "limit": limit},
        )

    async def failures(self, name: str, limit: int = 100, only_final: bool = False) -> _Failures:
        """Failed attempts, the newest first; with `only_final` those that no other attempt has followed or will."""
        async with self.db.pool.connection() as connection, connection.cursor(row_factory=class_row(FailureView)) as c:
            await c.execute(_FAILURES, {"name": name, "limit": limit, "final": only_final})
            return await c.fetchall()

    async def executions(self, name: str, state: ExecutionState | None = None, limit: int = 100) -> _Places:
        """Devices of a job in their order, optionally in one state. `rollout` of the views is the job's name."""
        async with self.db.pool.connection() as connection:
            return await read_executions(connection, "job", name, state, limit)

    async def execution(self, name: str, device_id: str) -> ExecutionView:
        """One device of a job. Raises NotFoundError."""
        async with self.db.pool.connection() as connection:
            return await read_execution(connection, "job", name, device_id)

    async def events(self, job_no: int, limit: int = 100) -> _Events:
        """The last `limit` events of a job, oldest first."""
        async with self.db.pool.connection() as connection:
            return await read_events(connection, job_no, limit)

    async def figures(self, job_no: int) -> FleetJobProgress:
        """The counts, of one snapshot: they add up to `total`."""
        async with self.db.pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(f"SELECT {_TOTALS} FROM waves w WHERE w.job_no = %s".encode(), (job_no,))
            return _progress(await cursor.fetchone() or {})

    async def _views(self, tail: str, arguments: dict[str, Any]) -> _Jobs:
        async with self.db.pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute((_VIEWS + tail).encode(), arguments)
            return [_view(row) for row in await cursor.fetchall()]


def _progress(row: dict[str, Any]) -> FleetJobProgress:
    return FleetJobProgress(**{name: int(value or 0) for name, value in row.items()})


def _view(row: dict[str, Any]) -> FleetJobView:
    progress, waves = _progress(row.pop("progress") or {}), row.pop("waves") or []
    return FleetJobView(**row, progress=progress, waves=tuple(wave_progress(wave) for wave in waves))
