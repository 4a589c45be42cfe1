"""What a wave's driver concludes from what it sees: the gate's decision in the light of the job's status. Pure.

`domain.gate` judges counts. This module adds what counts do not say: a breaker that another wave tripped, a job that
was halted or paused by a person, a verdict that is recorded already, and a person's promotion. The order of the rules
is the point: whatever speaks against the release comes first, and nothing promotes while the job is paused.
"""

from domain.gate import breaker_of, halt_reason, judge_answered, judge_running
from models.jobspec import FleetJobSpec, Membership
from models.rollout import DriveMode, DriveWaveInput, JobProgress, JobStatus, Verdict, WaveCounts, WaveVerdict
from models.spec import GateSpec, RolloutSpec

OVER = (JobStatus.HALTED, JobStatus.FINISHED)


def tripped_verdict(seen: JobProgress, gate: GateSpec | None) -> WaveVerdict | None:
    """HALT when this wave's breaker, or that of another wave of the job, has tripped; else None."""
    wave = seen.wave
    if wave.tripped:
        failed = wave.counts.gate_failed if wave.tripped_failed is None else wave.tripped_failed
        exposed = wave.counts.exposed if wave.tripped_exposed is None else wave.tripped_exposed
        return WaveVerdict(verdict=Verdict.HALT, reason=halt_reason(gate, failed, exposed))
    if seen.tripped_wave is not None:
        return WaveVerdict(verdict=Verdict.HALT, reason=f"halt: the breaker of wave {seen.tripped_wave} has tripped")
    return None


def drive_verdict(asked: DriveWaveInput, seen: JobProgress) -> WaveVerdict:
    """What a driver does next: CONTINUE to go on, anything else to end with it.

    Args:
        asked: the driver's input; `mode` says what it waits for.
        seen: wave and job as PostgreSQL has them now, after a sweep of deadlines where `mode` is JUDGING.
    """
    spec, wave = asked.spec, seen.wave
    halt = tripped_verdict(seen, spec.gate)
    if halt is not None:
        return halt
    if seen.job_status in OVER:
        return WaveVerdict(verdict=Verdict.HALT, reason=wave.reason or f"halt: the job is {seen.job_status}")
    if wave.verdict in (Verdict.PROMOTE, Verdict.HALT) and asked.mode is not DriveMode.SOAKING:
        return WaveVerdict(verdict=wave.verdict, reason=wave.reason or f"{wave.verdict}: recorded before")
    if asked.mode is DriveMode.SOAKING:
        return WaveVerdict(verdict=Verdict.CONTINUE, reason="the soak is not over")
    if asked.is_last and is_continuous(spec):
        return _going_on(spec, wave.counts)
    if asked.mode is DriveMode.JUDGING:
        verdict = with_promotion(
            judge_answered(wave.counts, spec.gate, spec.completion), asked.promoted_by, asked.promote_reason
        )
    else:
        verdict = judge_running(
            wave.counts,
            spec.gate,
            spec.completion,
            outstanding=seen.outstanding if asked.is_last else wave.counts.outstanding,
            wait_for_all=asked.is_last,
        )
    if seen.job_status is not JobStatus.RUNNING and verdict.verdict is not Verdict.HALT:
        return WaveVerdict(verdict=Verdict.CONTINUE, reason=f"the job is {seen.job_status}")
    return verdict


def is_continuous(spec: RolloutSpec | FleetJobSpec) -> bool:
    """Whether devices may join while it runs: then nobody but a person or the clock ends its last wave."""
    return isinstance(spec, FleetJobSpec) and spec.membership is Membership.CONTINUOUS


def _going_on(spec: RolloutSpec | FleetJobSpec, counts: WaveCounts) -> WaveVerdict:
    if breaker_of(spec.gate).trips(counts.gate_failed, counts.exposed):
        reason = halt_reason(spec.gate, counts.gate_failed, counts.exposed)
        return WaveVerdict(verdict=Verdict.HALT, reason=reason)
    return WaveVerdict(verdict=Verdict.CONTINUE, reason="devices may join until the job is ended")


def with_promotion(verdict: WaveVerdict, actor: str, reason: str) -> WaveVerdict:
    """A verdict after a person has promoted: HOLD gives way, HALT does not, and the person is named."""
    if not actor or verdict.verdict not in (Verdict.HOLD, Verdict.PROMOTE):
        return verdict
    said = f": {reason}" if reason else ""
    return WaveVerdict(verdict=Verdict.PROMOTE, reason=f"promoted by {actor}{said} ({verdict.reason})")
