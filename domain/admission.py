"""Jobs, waves and executions as one transaction sees them, and the only code that changes them.

A `Ledger` is loaded under the lock of the jobs it holds (store/executions.py), decides message by message in their
order, and is written back before the lock is released. So every cap is exact, and the breaker trips in the
transaction that records the failure: the next admission, in this batch or in any later one, finds it open.

A failed attempt of a job that grants more than one goes back to QUEUED in the same step, as the next attempt of the
same row (docs/adr/0017): its end never shows, only a `FailedAttempt` does, and the gate counts nothing.

Times are seconds since the epoch, by PostgreSQL's clock.
"""

import hashlib
import math
from datetime import UTC, datetime

from domain.ledger_rows import (
    COUNTERS,
    ExecutionRow,
    FailedAttempt,
    JobRow,
    Question,
    Refusal,
    Report,
    WaveRow,
)
from domain.lifecycle import (
    DEVICE_MOVES,
    PHASE_OF_STEP,
    SERVER_MOVES,
    DeadlinePhase,
    GateEffect,
    enters_later_phase,
    gate_effect,
)
from models.protocol import TERMINAL_STATES, ErrorCode, ExecutionState, FailureClass, JobOperation
from models.rollout import JobStatus, WaveStatus

FIRMWARE_UPDATE = JobOperation.FIRMWARE_UPDATE.value
PACE_WINDOW_SECONDS = 60


class Ledger:
    """Everything a batch may touch. Change executions through `admit`, `report`, `expire`, `withdraw`,
    `cancel` and `remove` alone. `failures` are the attempts that failed in this batch,
    `questions` what is asked of the devices that have begun one."""

    def __init__(self, jobs: list[JobRow], executions: list[ExecutionRow]) -> None:
        self.jobs = {job.job_no: job for job in jobs}
        self.by_job_id = {job.job_id: job for job in jobs}
        self.by_key = {(execution.job_no, execution.device_id): execution for execution in executions}
        self.failures: list[FailedAttempt] = []
        self.questions: list[Question] = []
        self.open: dict[str, list[ExecutionRow]] = {}
        for execution in self.by_key.values():
            if execution.state not in TERMINAL_STATES:
                self.open.setdefault(execution.device_id, []).append(execution)

    def find(self, job_id: str, device_id: str) -> ExecutionRow | None:
        """A device's execution of the job with this wire id, if a device may know of it yet."""
        job = self.by_job_id.get(job_id)
        execution = self.by_key.get((job.job_no, device_id)) if job else None
        return None if execution is None or execution.state is ExecutionState.PENDING else execution

    def pending_of(self, device_id: str, now: float = math.inf) -> list[ExecutionRow]:
        """What a device has before it, in AWS IoT's order: in progress first, then by the time it was queued.

        What waits for its next attempt is not shown before that is due.
        """
        rows = [
            e
            for e in self.open.get(device_id, ())
            if e.state is ExecutionState.IN_PROGRESS
            or (e.state is ExecutionState.QUEUED and (e.retry_at is None or e.retry_at <= now))
        ]
        if len(rows) > 1:
            rows.sort(key=lambda e: (e.state is not ExecutionState.IN_PROGRESS, e.queued_at or 0, e.job_no))
        return rows

    def why_not(self, execution: ExecutionRow, now: float) -> str | None:
        """What keeps a QUEUED execution from starting now, or None. The one place where admission is decided."""
        job = self.jobs[execution.job_no]
        if execution.retry_at is not None and execution.retry_at > now:
            return f"it waits for its next attempt until {_clock(execution.retry_at)}"
        if job.status != JobStatus.RUNNING:
            return f"the job is {job.status}"
        if job.waves[execution.wave].status != WaveStatus.OPEN:
            return f"wave {execution.wave} is {job.waves[execution.wave].status}"
        for wave in job.waves.values():
            if wave.tripped_at is not None:
                return f"the breaker of wave {wave.wave} has tripped"
        if job.in_flight >= job.in_flight_cap:
            return f"the in-flight cap of {job.in_flight_cap} is reached"
        if job.per_minute is not None and _recent(job.admitted, now) >= job.per_minute:
            return f"the pace of {job.per_minute} per minute is reached"
        return None

    def admit(self, execution: ExecutionRow, now: float, details: dict[str, str] | None) -> str | None:
        """Start a QUEUED execution, or say why not."""
        refused = self.why_not(execution, now)
        if refused is not None:
            return refused
        job = self.jobs[execution.job_no]
        if job.per_minute is not None:
            second = int(now)
            job.admitted = {s: n for s, n in job.admitted.items() if s >= second - PACE_WINDOW_SECONDS}
            job.admitted[second] = job.admitted.get(second, 0) + 1
        job.exposed += 1
        execution.started_at, execution.retry_at = now, None
        if job.diagnostics:
            self.questions += questions_of(job, execution)
        execution.boot_id = (details or {}).get("bootId") or execution.known_boot
        execution.deadline_at = now + job.phase_seconds[DeadlinePhase.DOWNLOAD.value]
        self._note(execution, details)
        self._move(execution, ExecutionState.IN_PROGRESS, now)
        return None

    def report(self, execution: ExecutionRow | None, report: Report, now: float) -> Refusal | None:
        """Apply a device's update, or say why it is rejected (the wire's codes)."""
        if execution is None:
            return Refusal(ErrorCode.RESOURCE_NOT_FOUND, "no such execution for this thing")
        if report.execution_number not in (None, execution.execution_number):
            return _other_attempt(execution, report.execution_number or 0)
        if execution.state in TERMINAL_STATES:
            return Refusal(ErrorCode.TERMINAL_STATE_REACHED, f"the execution is over: {execution.state}")
        if report.expected_version not in (None, execution.version_number):
            message = f"expected version {report.expected_version}, the execution is at {execution.version_number}"
            return Refusal(ErrorCode.VERSION_MISMATCH, message)
        if (doubt := _of_an_earlier_attempt(execution, report, now)) is not None:
            return doubt
        if report.status not in DEVICE_MOVES.get(execution.state, frozenset()):
            message = f"{execution.state} to {report.status} is not a move a device can make"
            return Refusal(ErrorCode.INVALID_STATE_TRANSITION, message)
        if execution.state is ExecutionState.QUEUED and report.status is ExecutionState.IN_PROGRESS:
            refused = self.admit(execution, now, report.details)
            return Refusal(ErrorCode.REQUEST_THROTTLED, f"cannot start now: {refused}") if refused else None
        before = execution.step
        self._note(execution, report.details)
        phase = enters_later_phase(before, execution.step)
        if phase is not None:
            execution.deadline_at = now + self.jobs[execution.job_no].phase_seconds[phase.value]
        state = self._true_state(execution, report)
        if state in _FAILED_STATES:
            self._end_attempt(execution, state, now)
        else:
            self._move(execution, state, now)
        return None

    def has_applied(self, execution: ExecutionRow | None, report: Report) -> bool:
        """Whether a report that is delivered again is the one that brought the execution to where it is.

        Success may have been judged to be none. An expected version is that from before the report.
        """
        if execution is None or report.execution_number not in (None, execution.execution_number):
            return False
        judged = report.status is ExecutionState.SUCCEEDED and execution.state is ExecutionState.FAILED
        return (
            (execution.state is report.status or judged)
            and report.details in (None, execution.details)
            and report.expected_version in (None, execution.version_number - 1)
        )

    def expire(self, execution: ExecutionRow, now: float) -> bool:
        """TIMED_OUT when its deadline has passed. Returns whether it was.

        An attempt that was begun is followed by another where there is one left; an offer that nobody took is over.
        """
        if ExecutionState.TIMED_OUT not in SERVER_MOVES.get(execution.state, frozenset()):
            return False
        if execution.deadline_at is None or execution.deadline_at > now:
            return False
        if execution.state is ExecutionState.IN_PROGRESS:
            execution.failure_class = FailureClass.SILENT
            execution.reason = f"nothing heard in time after step {execution.step or 'accepted'}"
        else:
            execution.reason = "did not ask for the update in time"
        self._end_attempt(execution, ExecutionState.TIMED_OUT, now)
        return True

    def withdraw(self, execution: ExecutionRow, reason: str, now: float) -> bool:
        """CANCELED, unless it has started. Returns whether it was."""
        if execution.state not in (ExecutionState.PENDING, ExecutionState.QUEUED):
            return False
        execution.reason = reason
        self._move(execution, ExecutionState.CANCELED, now)
        return True

    def cancel(self, execution: ExecutionRow, reason: str, now: float) -> bool:
        """CANCELED although it has started. Says nothing about the release. Returns whether it was."""
        if execution.state is not ExecutionState.IN_PROGRESS:
            return False
        execution.reason = reason
        self._move(execution, ExecutionState.CANCELED, now)
        return True

    def remove(self, execution: ExecutionRow, reason: str, now: float) -> bool:
        """REMOVED: the device leaves the fleet, whatever it was doing. Returns whether there was anything to remove.

        Says nothing about the release, and frees the device's place. The wave's driver is told to look: one device
        fewer is waited for.
        """
        if ExecutionState.REMOVED not in SERVER_MOVES.get(execution.state, frozenset()):
            return False
        execution.reason = reason
        self._move(execution, ExecutionState.REMOVED, now)
        self.jobs[execution.job_no].waves[execution.wave].news = True
        return True

    def _note(self, execution: ExecutionRow, details: dict[str, str] | None) -> None:
        if details is None:
            return
        execution.details = details
        if details.get("step") in PHASE_OF_STEP:
            execution.step = details["step"]
        if "via" in details:
            execution.by_delta = details["via"] == "delta"

    def _true_state(self, execution: ExecutionRow, report: Report) -> ExecutionState:
        """What a report means: success is what the device runs, not what it says."""
        details = report.details or {}
        if report.status in (ExecutionState.FAILED, ExecutionState.REJECTED):
            said = details.get("failure", "")
            execution.failure_class = said if said in _DEVICE_FAILURES else FailureClass.INTERNAL
            execution.reason = details.get("reason")
        job = self.jobs[execution.job_no]
        if report.status is not ExecutionState.SUCCEEDED:
            return report.status
        untrue = _why_untrue(job, execution, details)
        if untrue is None:
            return ExecutionState.SUCCEEDED
        execution.failure_class, execution.reason = FailureClass.VERIFY, f"reported success {untrue}"
        return ExecutionState.FAILED

    def _end_attempt(self, execution: ExecutionRow, state: ExecutionState, now: float) -> None:
        """An attempt has failed: record it, and either it was the last or the next one waits for its time."""
        job, attempt = self.jobs[execution.job_no], execution.execution_number
        again = (
            state is not ExecutionState.REJECTED
            and execution.state is ExecutionState.IN_PROGRESS
            and attempt < job.max_attempts
            and job.grants_retries
        )
        failure = FailedAttempt(
            job_no=job.job_no,
            device_id=execution.device_id,
            attempt=attempt,
            state=state,
            failure_class=execution.failure_class,
            reason=execution.reason,
            details=execution.details,
            version_number=execution.version_number + 1,
            started_at=execution.started_at,
            failed_at=now,
            retry_at=now + job.pause_after(attempt) if again else None,
        )
        self.failures.append(failure)
        wave = job.waves[execution.wave]
        wave.attempts_failed += 1
        wave.changed = job.changed = True
        if not again:
            self._move(execution, state, now)
            return
        execution.ended_attempt, execution.retry_at = failure, failure.retry_at
        execution.execution_number = attempt + 1
        execution.step = execution.details = execution.failure_class = execution.reason = None
        execution.by_delta = execution.started_at = execution.boot_id = None
        execution.queued_at = failure.retry_at
        execution.deadline_at = (failure.retry_at or now) + job.accept_seconds
        self._move(execution, ExecutionState.QUEUED, now)
        execution.version_number = 1

    def _move(self, execution: ExecutionRow, state: ExecutionState, now: float) -> None:
        """Change a state and every counter that depends on it."""
        before, waited = execution.state, execution.state is ExecutionState.QUEUED and execution.execution_number > 1
        execution.state, execution.updated_at, execution.changed = state, now, True
        execution.version_number += 1
        if before is state:
            return
        job = self.jobs[execution.job_no]
        wave = job.waves[execution.wave]
        job.changed = wave.changed = True
        wave.counts[COUNTERS[before]] -= 1
        wave.counts[COUNTERS[state]] += 1
        wave.retrying += execution.retrying - waited
        job.in_flight += (state is ExecutionState.IN_PROGRESS) - (before is ExecutionState.IN_PROGRESS)
        if state not in TERMINAL_STATES:
            return
        execution.finished_at, execution.deadline_at, execution.retry_at = now, None, None
        job.by_delta += state is ExecutionState.SUCCEEDED and bool(execution.by_delta)
        failure = FailureClass(execution.failure_class) if execution.failure_class else None
        started = execution.started_at is not None or execution.execution_number > 1
        effect = gate_effect(state, failure, started=started)
        wave.gate_succeeded += effect is GateEffect.SUCCESS
        wave.gate_failed += effect is GateEffect.FAILURE
        _look_at_wave(wave, now)


_FAILED_STATES = frozenset({ExecutionState.FAILED, ExecutionState.REJECTED, ExecutionState.TIMED_OUT})
_DEVICE_FAILURES = frozenset(failure.value for failure in FailureClass) - {FailureClass.SILENT.value}


def questions_of(job: JobRow, execution: ExecutionRow) -> list[Question]:
    """What a diagnostic job asks of a device in the attempt that is on: the same ids whenever it is asked."""
    attempt = f"{job.job_id}/{execution.device_id}/{execution.execution_number}"
    return [
        Question(
            request_id=hashlib.sha256(f"{attempt}/{what}".encode()).hexdigest()[:32],
            device_id=execution.device_id,
            type=what,
            job_no=job.job_no,
            attempt=execution.execution_number,
            expires_at=(execution.started_at or 0) + sum(job.phase_seconds),
        )
        for what in job.diagnostics
    ]


def _of_an_earlier_attempt(execution: ExecutionRow, report: Report, now: float) -> Refusal | None:
    """Why a report is, or may be, of an attempt that is over; None where it is of the one that is on, or begins the next.

    Brokers give back what is old (after a crash, what their last snapshot held), and not every device names the attempt.
    """
    if execution.retrying and report.status in (ExecutionState.FAILED, ExecutionState.SUCCEEDED):
        return _other_attempt(execution, execution.execution_number - 1)
    unnamed = report.duplicate and report.execution_number is None
    if unnamed and execution.retrying:
        # To begin the next one, a device can ask, or say the number.
        return Refusal(ErrorCode.REQUEST_THROTTLED, "delivered again, and it names no attempt: ask with start-next")
    failed_later = report.status is ExecutionState.FAILED and execution.execution_number > 1
    if unnamed and failed_later and report.expected_version is None:
        # An attempt that has failed after all is said so again, or ends with its deadline.
        return Refusal(
            ErrorCode.REQUEST_THROTTLED, "delivered again, and it names no attempt: say it with its executionNumber"
        )
    if execution.retry_at is not None and execution.retry_at > now:
        return Refusal(
            ErrorCode.REQUEST_THROTTLED, f"the next attempt may begin at {_clock(execution.retry_at)}, not before"
        )
    return None


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _other_attempt(execution: ExecutionRow, attempt: int) -> Refusal:
    """A report that names another attempt than the one that is on: an earlier one is over."""
    if 0 < attempt < execution.execution_number:
        return Refusal(ErrorCode.TERMINAL_STATE_REACHED, f"attempt {attempt} of the execution is over")
    return Refusal(ErrorCode.RESOURCE_NOT_FOUND, "no such execution for this thing")


def _why_untrue(job: JobRow, execution: ExecutionRow, details: dict[str, str]) -> str | None:
    """What a device that reports success would have to show, and does not; None where it does."""
    match job.operation:
        case JobOperation.FIRMWARE_UPDATE:
            if details.get("version") == job.target_version and details.get("sha256") == job.target_sha256:
                return None
            return (
                f"running version {details.get('version')} with sha256 {details.get('sha256')}, "
                f"expected {job.target_version} with {job.target_sha256}"
            )
        case JobOperation.CONFIG_SYNC:
            if details.get("configVersion") == str(execution.wanted_config):
                return None
            return f"with configVersion {details.get('configVersion')}, expected {execution.wanted_config}"
        case JobOperation.RESTART:
            # A device that never told a boot id cannot be asked for another one.
            if execution.boot_id is None or details.get("bootId") not in (None, execution.boot_id):
                return None
            return (
                f"with bootId {details.get('bootId')}, expected another one than {execution.boot_id}, in which it began"
            )
        case _:
            return None


def _recent(admitted: dict[int, int], now: float) -> int:
    """Admissions of the last 60 seconds and the running one, by whole seconds: never fewer than any true 60 s."""
    return sum(count for second, count in admitted.items() if second >= int(now) - PACE_WINDOW_SECONDS)


def _look_at_wave(wave: WaveRow, now: float) -> None:
    """Trip the breaker, and mark what the wave's driver waits for."""
    finished = wave.gate_succeeded + wave.gate_failed
    exposed = finished + wave.counts["in_progress"]
    if wave.tripped_at is None and wave.breaker.trips(wave.gate_failed, exposed):
        wave.tripped_at, wave.tripped_failed, wave.tripped_exposed = now, wave.gate_failed, exposed
        wave.news = True
    if wave.answered_at is None and (finished >= wave.completion_count or wave.outstanding == 0):
        wave.answered_at = now
        wave.news = True
    if wave.outstanding == 0:
        wave.news = True
