"""What a driver concludes: counts in the light of the job's status. The order of the rules is what is tested."""

import pytest

from domain.verdicts import drive_verdict, with_promotion
from models.jobspec import FleetJobSpec
from models.rollout import (
    DriveMode,
    DriveWaveInput,
    JobProgress,
    JobStatus,
    Verdict,
    WaveCounts,
    WaveProgress,
    WaveStatus,
    WaveVerdict,
)
from models.spec import RolloutSpec

SPEC = RolloutSpec(name="motor-1.3.0", release="motor@1.3.0", waves=({"name": "all", "size": "100%"},))  # type: ignore[arg-type]
GOOD = WaveCounts(succeeded=20, gate_succeeded=20)
HALF = WaveCounts(succeeded=10, gate_succeeded=10, queued=10)
FEW = WaveCounts(succeeded=10, gate_succeeded=10, canceled=10)
BAD = WaveCounts(succeeded=17, failed=3, gate_succeeded=17, gate_failed=3)
DEAD = WaveCounts(failed=5, gate_failed=5, queued=15)


def asked(mode: DriveMode = DriveMode.ANSWERING, **more: object) -> DriveWaveInput:
    """A driver of wave 1."""
    return DriveWaveInput(job_no=7, wave=1, spec=SPEC, mode=mode, **more)  # type: ignore[arg-type]


def seen(counts: WaveCounts, status: JobStatus = JobStatus.RUNNING, **more: object) -> JobProgress:
    """Wave 1 of a job, with nothing outstanding elsewhere."""
    wave = {"verdict": None, "reason": None, "tripped": False, **more}
    tripped_wave, outstanding = wave.pop("tripped_wave", None), wave.pop("outstanding", counts.outstanding)
    progress = WaveProgress(wave=1, name="all", status=WaveStatus.OPEN, counts=counts, target_count=20, **wave)  # type: ignore[arg-type]
    return JobProgress(wave=progress, job_status=status, outstanding=outstanding, tripped_wave=tripped_wave)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "counts", "verdict"),
    [
        (DriveMode.ANSWERING, HALF, Verdict.CONTINUE),
        (DriveMode.ANSWERING, GOOD, Verdict.PROMOTE),
        (DriveMode.ANSWERING, FEW, Verdict.HOLD),
        (DriveMode.ANSWERING, BAD, Verdict.HALT),
        (DriveMode.ANSWERING, DEAD, Verdict.HALT),
        (DriveMode.SOAKING, GOOD, Verdict.CONTINUE),
        (DriveMode.SOAKING, BAD, Verdict.CONTINUE),  # the breaker is closed; the soak's end decides
        (DriveMode.JUDGING, GOOD, Verdict.PROMOTE),
        (DriveMode.JUDGING, BAD, Verdict.HALT),
        (DriveMode.JUDGING, HALF, Verdict.HOLD),
    ],
)
def test_counts_decide_while_the_job_runs(mode: DriveMode, counts: WaveCounts, verdict: Verdict) -> None:
    assert drive_verdict(asked(mode), seen(counts)).verdict is verdict


@pytest.mark.parametrize("mode", DriveMode)
def test_a_breaker_that_tripped_halts_whatever_the_mode_and_says_at_which_counts(mode: DriveMode) -> None:
    verdict = drive_verdict(asked(mode), seen(BAD, tripped=True, tripped_failed=5, tripped_exposed=6))
    assert verdict.verdict is Verdict.HALT
    assert verdict.reason.startswith("halt: 5 of 6 exposed devices failed (83.3 %), boundary 4.4")


@pytest.mark.parametrize("mode", DriveMode)
def test_another_waves_breaker_halts_this_one_too(mode: DriveMode) -> None:
    verdict = drive_verdict(asked(mode), seen(GOOD, tripped_wave=2))
    assert verdict == WaveVerdict(verdict=Verdict.HALT, reason="halt: the breaker of wave 2 has tripped")


@pytest.mark.parametrize("mode", DriveMode)
@pytest.mark.parametrize("status", [JobStatus.HALTED, JobStatus.FINISHED])
def test_a_job_that_is_over_ends_its_driver(mode: DriveMode, status: JobStatus) -> None:
    assert drive_verdict(asked(mode), seen(GOOD, status)).verdict is Verdict.HALT


@pytest.mark.parametrize("mode", DriveMode)
@pytest.mark.parametrize("counts", [GOOD, FEW])
def test_nothing_is_promoted_or_held_while_the_job_is_paused(mode: DriveMode, counts: WaveCounts) -> None:
    assert drive_verdict(asked(mode), seen(counts, JobStatus.PAUSED)).verdict is Verdict.CONTINUE


def test_a_paused_job_still_halts() -> None:
    assert drive_verdict(asked(), seen(BAD, JobStatus.PAUSED)).verdict is Verdict.HALT


def test_a_verdict_that_is_recorded_is_given_again_to_a_driver_that_starts_anew() -> None:
    recorded = seen(HALF, verdict=Verdict.PROMOTE, reason="promote: 19 of 19 succeeded")
    assert drive_verdict(asked(), recorded).reason == "promote: 19 of 19 succeeded"
    assert drive_verdict(asked(DriveMode.SOAKING), recorded).verdict is Verdict.CONTINUE


def test_the_last_wave_waits_for_the_whole_rollout() -> None:
    assert drive_verdict(asked(is_last=True), seen(GOOD, outstanding=4)).verdict is Verdict.CONTINUE
    assert drive_verdict(asked(is_last=True), seen(GOOD, outstanding=0)).verdict is Verdict.PROMOTE
    assert drive_verdict(asked(is_last=False), seen(GOOD, outstanding=4)).verdict is Verdict.PROMOTE


def test_a_person_overrules_a_hold_and_never_a_halt() -> None:
    held = WaveVerdict(verdict=Verdict.HOLD, reason="hold: 12 of 20 answered")
    halted = WaveVerdict(verdict=Verdict.HALT, reason="halt: 3 of 20 failed")
    assert with_promotion(held, "bob", "known offline") == WaveVerdict(
        verdict=Verdict.PROMOTE, reason="promoted by bob: known offline (hold: 12 of 20 answered)"
    )
    assert with_promotion(halted, "bob", "") == halted
    assert with_promotion(held, "", "") == held
    judged = drive_verdict(asked(DriveMode.JUDGING, promoted_by="bob"), seen(HALF))
    assert judged.verdict is Verdict.PROMOTE
    assert judged.reason.startswith("promoted by bob (hold: 10 of 20 answered")
    assert drive_verdict(asked(DriveMode.JUDGING, promoted_by="bob"), seen(BAD)).verdict is Verdict.HALT


def job(**changes: object) -> FleetJobSpec:
    """A fleet job of one wave."""
    waves = [{"name": "all", "size": "100%"}]
    return FleetJobSpec.model_validate({"name": "restart-all", "operation": "restart", "waves": waves} | changes)


@pytest.mark.parametrize("mode", [DriveMode.ANSWERING, DriveMode.JUDGING])
@pytest.mark.parametrize("counts", [GOOD, FEW, BAD, WaveCounts(failed=20, gate_failed=20), WaveCounts(canceled=20)])
def test_without_a_gate_a_wave_that_has_answered_is_promoted_however_many_have_failed(
    mode: DriveMode, counts: WaveCounts
) -> None:
    verdict = drive_verdict(DriveWaveInput(job_no=7, wave=1, spec=job(), mode=mode, is_last=True), seen(counts))
    assert verdict.verdict is Verdict.PROMOTE
    assert verdict.reason == f"{counts.succeeded} of {counts.total} succeeded, {counts.failed} failed"


def test_without_a_gate_what_is_outstanding_is_waited_for() -> None:
    asked_ = DriveWaveInput(job_no=7, wave=1, spec=job(), is_last=True)
    assert drive_verdict(asked_, seen(HALF)).verdict is Verdict.CONTINUE
    waiting = WaveCounts(succeeded=19, gate_succeeded=19, queued=1, retrying=1, attempts_failed=1)
    assert drive_verdict(asked_, seen(waiting)).verdict is Verdict.CONTINUE, "one waits for its next attempt"


def test_the_last_wave_of_a_continuous_job_does_not_end_by_itself_but_its_gate_can_halt_it() -> None:
    calm = DriveWaveInput(job_no=7, wave=1, spec=job(membership="continuous"), is_last=True)
    gated = DriveWaveInput(job_no=7, wave=1, spec=job(membership="continuous", gate={}), is_last=True)
    assert [drive_verdict(calm, seen(counts)).verdict for counts in (GOOD, DEAD)] == [Verdict.CONTINUE] * 2
    assert drive_verdict(gated, seen(GOOD)).verdict is Verdict.CONTINUE
    assert drive_verdict(gated, seen(DEAD)).verdict is Verdict.HALT
    assert drive_verdict(calm.model_copy(update={"is_last": False}), seen(GOOD)).verdict is Verdict.PROMOTE
    assert drive_verdict(calm, seen(GOOD, JobStatus.HALTED)).verdict is Verdict.HALT
