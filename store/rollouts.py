"""Rollouts in PostgreSQL: planning, opening and closing waves, sweeping deadlines, hints, and what is shown.

Every method is one transaction (or says otherwise) and can be repeated after a crash: workflows call them through
activities, which Temporal retries.
"""

from dataclasses import dataclass

from psycopg import AsyncConnection
from psycopg.types.json import Jsonb

from domain.admission import FIRMWARE_UPDATE
from models.artifacts import DeltaRef
from models.diagnostics import CauseView
from models.errors import NotFoundError, RefusedError
from models.protocol import ExecutionState, FailureClass
from models.rollout import (
    FinishRolloutResult,
    JobProgress,
    JobStatus,
    Outcome,
    Phase,
    PlanRolloutInput,
    PlanRolloutResult,
    Verdict,
    WaveProgress,
    WaveVerdict,
)
from models.spec import PaceSpec
from models.views import EventView, ExecutionView, RolloutView
from store.causes import causes, failures_to_diagnose
from store.engine import Database
from store.events import append_event
from store.executions import CHANNEL, load_expired, load_running, load_withdrawable, save
from store.jobplanning import JOIN_CHUNK, join_fleet_job, want_config_of_wave
from store.jobviews import read_events, read_execution, read_executions, read_figures, read_rollouts, read_waves
from store.listening import named_within
from store.planning import plan_rollout

_QUEUE_WAVE = """
UPDATE executions e SET state = 'QUEUED', queued_at = now(), updated_at = now(),
  deadline_at = now() + make_interval(secs => j.accept_seconds)
FROM jobs j, waves w WHERE j.job_no = e.job_no AND w.job_no = e.job_no AND w.wave = e.wave
  AND w.status = 'pending' AND e.job_no = %s AND e.wave = %s AND e.state = 'PENDING'
"""

_WITHDRAWN = """
SELECT e.device_id FROM executions e WHERE e.job_no = %s AND e.state = 'CANCELED' AND e.queued_at IS NOT NULL
  AND NOT EXISTS (SELECT FROM executions o WHERE o.device_id = e.device_id AND o.state IN ('QUEUED','IN_PROGRESS'))
ORDER BY e.wave, e.rank
"""
"""Not those that another job still wants something of: telling them that nothing waits would be untrue."""

_UNANSWERED = """
UPDATE diagnostics d SET state = 'timed-out', error = 'its attempt ended without an answer' FROM jobs j
WHERE d.job_no = %s AND d.state = 'requested' AND j.job_no = d.job_no AND j.operation = 'diagnostic'
"""
"""Those of a diagnostic job: what a failed update is asked about has a workflow that ends it."""

_CLOSE = """
UPDATE jobs j SET status = 'finished', phase = 'done', reason = %(reason)s, finished_at = clock_timestamp(),
  outcome = CASE WHEN %(outcome)s::text = 'succeeded' AND j.kind = 'job' AND EXISTS (
      SELECT FROM waves w WHERE w.job_no = j.job_no AND w.failed + w.timed_out + w.rejected > 0
    ) THEN 'completed' ELSE %(outcome)s::text END
WHERE j.job_no = %(job_no)s AND j.status <> 'finished'
"""

_CHUNK = 5000
"""Executions moved in one transaction where many move at once, so that the job's lock is held only briefly."""


@dataclass
class RolloutStore:
    """See the module. `db` must be open."""

    db: Database

    # --- planning ----------------------------------------------------------------------------------------------------

    async def plan(self, request: PlanRolloutInput) -> PlanRolloutResult:
        """Choose the devices, put them in order, cut the waves, in one transaction: see store.planning.plan_rollout."""
        async with self.db.pool.connection() as connection:
            return await plan_rollout(connection, request)

    async def write_document(self, job_no: int, deltas: list[DeltaRef]) -> None:
        """Write what devices are told, but for the order: the release's envelope, the full image and the deltas."""
        async with self.db.pool.connection() as connection:
            row = await (
                await connection.execute(
                    "SELECT r.version, r.envelope, r.sha256, r.size_bytes FROM jobs j "
                    "JOIN releases r USING (release_id) WHERE j.job_no = %s",
                    (job_no,),
                )
            ).fetchone()
            if row is None:
                raise NotFoundError(f"cannot write the document of job {job_no}: it has no release")
            document = {
                "operation": FIRMWARE_UPDATE,
                "version": row[0],
                "release": row[1],
                "full": {"sha256": row[2], "size": row[3]},
                "deltas": [delta.model_dump() for delta in deltas],
            }
            await connection.execute("UPDATE jobs SET document = %s WHERE job_no = %s", (Jsonb(document), job_no))

    # --- waves -------------------------------------------------------------------------------------------------------

    async def open_wave(self, job_no: int, wave: int) -> WaveProgress:
        """PENDING executions of the wave become QUEUED and admission begins. Opening an open wave does nothing."""
        after = ""
        while True:
            async with self.db.pool.connection() as connection:
                last = await want_config_of_wave(connection, job_no, wave, after)
            if last is None:
                break
            after = last
        async with self.db.pool.connection() as connection:
            status = await _lock(connection, job_no)
            if status in (JobStatus.HALTED, JobStatus.FINISHED):
                raise RefusedError(f"cannot open wave {wave} of job {job_no}: the job is {status}")
            moved = await connection.execute(_QUEUE_WAVE, (job_no, wave))
            opened = await connection.execute(
                "UPDATE waves SET status = 'open', opened_at = clock_timestamp(), "
                "pending = pending - %(n)s, queued = queued + %(n)s "
                "WHERE job_no = %(job_no)s AND wave = %(wave)s AND status = 'pending'",
                {"n": moved.rowcount, "job_no": job_no, "wave": wave},
            )
            if opened.rowcount:
                await connection.execute(
                    "UPDATE jobs SET status = CASE status WHEN 'planned' THEN 'running' ELSE status END, "
                    "phase = CASE status WHEN 'paused' THEN phase ELSE 'rolling' END, "
                    "started_at = coalesce(started_at, now()) WHERE job_no = %s",
                    (job_no,),
                )
                await append_event(
                    connection, job_no, "wave-opened", f"wave {wave} opened for {moved.rowcount} devices", wave
                )
            return (await read_waves(connection, job_no, wave))[0]

    async def progress(self, job_no: int, wave: int) -> JobProgress:
        """The wave and the job around it, as last committed."""
        async with self.db.pool.connection() as connection:
            waves = await read_waves(connection, job_no)
            row = await (
                await connection.execute(
                    "SELECT status, in_flight, in_flight_cap, exposed, per_minute, job_id FROM jobs WHERE job_no = %s",
                    (job_no,),
                )
            ).fetchone()
        mine = [progress for progress in waves if progress.wave == wave]
        if row is None or not mine:
            raise NotFoundError(f"no wave {wave} of job {job_no}")
        return JobProgress(
            wave=mine[0],
            job_status=JobStatus(row[0]),
            outstanding=sum(progress.counts.outstanding for progress in waves),
            retrying=sum(progress.counts.retrying for progress in waves),
            in_flight=row[1],
            in_flight_cap=row[2],
            exposed=row[3],
            per_minute=row[4],
            job_id=row[5],
            tripped_wave=next((progress.wave for progress in waves if progress.tripped), None),
        )

    async def sweep(self, job_no: int, limit: int = _CHUNK) -> int:
        """Executions whose deadline has passed become TIMED_OUT, with counters and breaker. Returns how many."""
        expired = 0
        while True:
            async with self.db.pool.connection() as connection:
                # Without the lock first: most sweeps find nothing and need not hold anybody up.
                due = await (
                    await connection.execute(
                        "SELECT 1 FROM executions WHERE job_no = %s AND state IN ('QUEUED','IN_PROGRESS') "
                        "AND deadline_at <= clock_timestamp() LIMIT 1",
                        (job_no,),
                    )
                ).fetchone()
                if due is None:
                    return expired
                batch = await load_expired(connection, job_no, limit)
                moved = sum(batch.ledger.expire(e, batch.now) for e in list(batch.ledger.by_key.values()))
                await save(batch)
            expired += moved
            if moved == 0:
                return expired

    async def take_hints(self, job_no: int, wave: int, limit: int) -> list[str]:
        """Device ids to notify next, in their order, QUEUED ones only; moves the wave's cursor behind them."""
        async with self.db.pool.connection() as connection:
            rows = await (
                await connection.execute(
                    "SELECT e.device_id, e.rank FROM executions e JOIN waves w USING (job_no, wave) "
                    "WHERE e.job_no = %s AND e.wave = %s AND e.rank > w.notified_rank AND e.state = 'QUEUED' "
                    "AND (e.retry_at IS NULL OR e.retry_at <= clock_timestamp()) "
                    "ORDER BY e.rank LIMIT %s",
                    (job_no, wave, limit),
                )
            ).fetchall()
            if rows:
                await connection.execute(
                    "UPDATE waves SET notified_rank = %s WHERE job_no = %s AND wave = %s", (rows[-1][1], job_no, wave)
                )
        return [row[0] for row in rows]

    async def take_due_retries(
        self, job_no: int, wave: int, after: tuple[float, str], limit: int
    ) -> list[tuple[float, str, int]]:
        """(epoch seconds, device, its number) of next attempts that have become due since `after`, in their order."""
        async with self.db.pool.connection() as connection:
            rows = await (
                await connection.execute(
                    "SELECT extract(epoch FROM retry_at)::float8, device_id, execution_number FROM executions "
                    "WHERE job_no = %s AND wave = %s AND state = 'QUEUED' AND retry_at IS NOT NULL "
                    "AND (retry_at, device_id) > (to_timestamp(%s), %s) AND retry_at <= clock_timestamp() "
                    "ORDER BY retry_at, device_id LIMIT %s",
                    (job_no, wave, *after, limit),
                )
            ).fetchall()
        return [(row[0], row[1], row[2]) for row in rows]

    async def join(self, job_no: int) -> int:
        """Take in devices that match a continuous job by now; how many. See store.jobplanning.join_fleet_job."""
        joined = 0
        while True:
            async with self.db.pool.connection() as connection:
                number = await join_fleet_job(connection, job_no)
            joined += number
            if number < JOIN_CHUNK:
                return joined

    async def rewind_hints(self, job_no: int, wave: int) -> None:
        """Notify from the start again: devices that are still QUEUED."""
        async with self.db.pool.connection() as connection:
            await connection.execute(
                "UPDATE waves SET notified_rank = 0 WHERE job_no = %s AND wave = %s", (job_no, wave)
            )

    async def close_wave(self, job_no: int, wave: int, verdict: WaveVerdict) -> WaveProgress:
        """Record a verdict. PROMOTE leaves the wave open for late devices; HALT stops the job in the same transaction."""
        async with self.db.pool.connection() as connection:
            status = await _lock(connection, job_no)
            done = await connection.execute(
                "UPDATE waves SET verdict = %(verdict)s, reason = %(reason)s, "
                "closed_at = CASE WHEN %(verdict)s IN ('promote','halt') THEN coalesce(closed_at, clock_timestamp()) END "
                "WHERE job_no = %(job_no)s AND wave = %(wave)s "
                "AND (verdict, reason) IS DISTINCT FROM (%(verdict)s, %(reason)s)",
                {"verdict": verdict.verdict, "reason": verdict.reason, "job_no": job_no, "wave": wave},
            )
            if done.rowcount:
                await append_event(connection, job_no, f"wave-{verdict.verdict}", verdict.reason, wave)
            if verdict.verdict is Verdict.HALT and status is not JobStatus.FINISHED:
                await connection.execute(
                    "UPDATE jobs SET status = 'halted', reason = %s WHERE job_no = %s", (verdict.reason, job_no)
                )
            return (await read_waves(connection, job_no, wave))[0]

    # --- the job -----------------------------------------------------------------------------------------------------

    async def set_status(self, job_no: int, status: JobStatus, phase: Phase, reason: str, actor: str) -> None:
        """Pause, resume or halt admission, with the next transaction. A halted or finished job is not started again."""
        async with self.db.pool.connection() as connection:
            before = await _lock(connection, job_no)
            if before in (JobStatus.HALTED, JobStatus.FINISHED) and status is not before:
                raise RefusedError(f"cannot make job {job_no} {status}: it is {before}")
            changed = await connection.execute(
                "UPDATE jobs SET status = %(status)s, phase = %(phase)s, reason = %(reason)s WHERE job_no = %(job_no)s "
                "AND (status, phase, reason) IS DISTINCT FROM (%(status)s, %(phase)s, %(reason)s)",
                {"status": status, "phase": phase, "reason": reason, "job_no": job_no},
            )
            if changed.rowcount:
                await append_event(connection, job_no, str(phase), reason or str(status), actor=actor)

    async def set_pace(self, job_no: int, pace: PaceSpec, actor: str) -> None:
        """New cap and pace; the next admission keeps them. Devices beyond a lower cap finish, none starts."""
        async with self.db.pool.connection() as connection:
            await _lock(connection, job_no)
            changed = await connection.execute(
                "UPDATE jobs SET in_flight_cap = %(cap)s, per_minute = %(minute)s WHERE job_no = %(job_no)s "
                "AND (in_flight_cap, per_minute) IS DISTINCT FROM (%(cap)s, %(minute)s)",
                {"cap": pace.in_flight, "minute": pace.per_minute, "job_no": job_no},
            )
            if changed.rowcount:
                text = f"pace: {pace.in_flight} in flight, {pace.per_minute or 'no limit'} per minute"
                await append_event(connection, job_no, "adjusted", text, actor=actor)

    async def set_phase(self, job_no: int, phase: Phase, reason: str) -> None:
        """What is shown of a job that runs; a job that is paused or over keeps what it shows."""
        async with self.db.pool.connection() as connection:
            await connection.execute(
                "UPDATE jobs SET phase = %(phase)s, reason = %(reason)s WHERE job_no = %(job_no)s "
                "AND status IN ('planned','running') AND (phase, reason) IS DISTINCT FROM (%(phase)s, %(reason)s)",
                {"phase": phase, "reason": reason, "job_no": job_no},
            )

    async def withdraw(self, job_no: int, reason: str) -> None:
        """Stop admission, then cancel what has not started. Several transactions; repeats until all of it is done."""
        async with self.db.pool.connection() as connection:
            if await _lock(connection, job_no) is not JobStatus.FINISHED:
                # The stop has a transaction of its own: nothing starts while the rest is withdrawn.
                await connection.execute("UPDATE jobs SET status = 'halted' WHERE job_no = %s", (job_no,))
        while True:
            async with self.db.pool.connection() as connection:
                batch = await load_withdrawable(connection, job_no, _CHUNK)
                moved = sum(batch.ledger.withdraw(e, reason, batch.now) for e in list(batch.ledger.by_key.values()))
                await save(batch)
            if moved == 0:
                return

    async def cancel_running(self, job_no: int, reason: str) -> list[str]:
        """Cancel what is in progress of a job that admits nobody any more; devices to tell. Several transactions."""
        cancelled: list[str] = []
        while True:
            async with self.db.pool.connection() as connection:
                batch = await load_running(connection, job_no, _CHUNK)
                if batch.ledger.jobs[job_no].status in (JobStatus.RUNNING, JobStatus.PLANNED):
                    raise RefusedError(f"cannot cancel what job {job_no} has in progress: it still starts devices")
                moved = [e.device_id for e in batch.ledger.by_key.values() if batch.ledger.cancel(e, reason, batch.now)]
                await save(batch)
            cancelled += moved
            if not moved:
                return cancelled

    async def finish(self, job_no: int, outcome: Outcome, reason: str) -> FinishRolloutResult:
        """Withdraw what has not started, and close the job. Repeats after a crash until all of it is done."""
        await self.withdraw(job_no, reason)
        async with self.db.pool.connection() as connection:
            closed = await connection.execute(_CLOSE, {"outcome": outcome, "reason": reason, "job_no": job_no})
            await connection.execute("UPDATE waves SET status = 'closed' WHERE job_no = %s", (job_no,))
            await connection.execute(_UNANSWERED, (job_no,))
            figures = await read_figures(connection, job_no)
            if closed.rowcount:
                await append_event(connection, job_no, "finished", f"{figures.outcome}: {reason}")
            return figures

    async def withdrawn(self, job_no: int) -> list[str]:
        """Devices whose execution was withdrawn after it had been offered to them."""
        async with self.db.pool.connection() as connection:
            rows = await (await connection.execute(_WITHDRAWN, (job_no,))).fetchall()
        return [row[0] for row in rows]

    async def in_flight(self, job_no: int) -> int:
        """Devices that update at this moment."""
        async with self.db.pool.connection() as connection:
            row = await (await connection.execute("SELECT in_flight FROM jobs WHERE job_no = %s", (job_no,))).fetchone()
        return int(row[0]) if row else 0

    async def wait_for_change(self, job_no: int, timeout: float) -> bool:
        """Whether a wave of this job tripped, answered or ran empty within `timeout` seconds."""
        async with self.db.pool.connection() as connection:
            return await named_within(connection, CHANNEL, str(job_no), timeout)

    async def failures_to_diagnose(self, job_no: int) -> list[tuple[str, int]]:
        """(device, attempt) of failed updates whose devices are to be asked: see store.causes."""
        async with self.db.pool.connection() as connection:
            return [(each.device_id, each.attempt) for each in await failures_to_diagnose(connection, job_no)]

    # --- what is shown -----------------------------------------------------------------------------------------------

    async def events(self, job_no: int, limit: int = 100) -> list[EventView]:
        """The last `limit` events, oldest first."""
        async with self.db.pool.connection() as connection:
            return await read_events(connection, job_no, limit)

    async def show(self, name: str) -> RolloutView:
        """One rollout with its waves and failures by class. Raises NotFoundError."""
        async with self.db.pool.connection() as connection:
            views = await read_rollouts(connection, "j.name = %(name)s", {"name": name})
            if not views:
                raise NotFoundError(f"no rollout {name!r}; 'starter.py rollout list' shows those that exist")
            rows = await (
                await connection.execute(
                    "SELECT failure_class, count(*) FROM executions WHERE job_no = %s AND failure_class IS NOT NULL "
                    "GROUP BY 1 ORDER BY 2 DESC, 1",
                    (views[0].job_no,),
                )
            ).fetchall()
            failures = {FailureClass(name): count for name, count in rows}
            return views[0].model_copy(update={"failures": failures})

    async def causes(self, job_no: int) -> list[CauseView]:
        """Its failures by cause, the most frequent first."""
        async with self.db.pool.connection() as connection:
            return await causes(connection, job_no)

    async def list_rollouts(self, limit: int = 100) -> list[RolloutView]:
        """The newest rollouts first, without failures by class."""
        async with self.db.pool.connection() as connection:
            return await read_rollouts(connection, "true", {"limit": limit}, "ORDER BY j.job_no DESC LIMIT %(limit)s")

    async def execution(self, name: str, device_id: str) -> ExecutionView:
        """One device in a rollout. Raises NotFoundError."""
        async with self.db.pool.connection() as connection:
            return await read_execution(connection, "rollout", name, device_id)

    async def executions(self, name: str, state: ExecutionState | None = None, limit: int = 100) -> list[ExecutionView]:
        """Devices of a rollout in their order, optionally in one state."""
        async with self.db.pool.connection() as connection:
            return await read_executions(connection, "rollout", name, state, limit)


async def _lock(connection: AsyncConnection, job_no: int) -> JobStatus:
    row = await (await connection.execute("SELECT status FROM jobs WHERE job_no = %s FOR UPDATE", (job_no,))).fetchone()
    if row is None:
        raise NotFoundError(f"no job {job_no}")
    return JobStatus(row[0])
