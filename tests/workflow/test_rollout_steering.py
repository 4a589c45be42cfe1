"""What operators ask of a running rollout: updates, their refusals, queries. Scripted activities, skipped time."""

from datetime import timedelta

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowUpdateStage

from models.protocol import JOB_ID
from models.rollout import (
    AbortRolloutInput,
    AdjustPaceInput,
    AdjustRolloutInput,
    ApproveRolloutInput,
    DriveMode,
    DriveWaveInput,
    FindDeviceInput,
    FinishRolloutInput,
    JobStatus,
    Outcome,
    PauseRolloutInput,
    Phase,
    PlannedWave,
    PromoteRolloutInput,
    ResumeRolloutInput,
    SetJobStatusInput,
)
from models.spec import PaceSpec
from tests.workflow.conftest import THREE_WAVES, Stage
from tests.workflow.scripted import HALT, HOLD, Fails, Waits
from tests.workflow.scripted import PROMOTE as PROMOTED
from workflows.rollout import RolloutWorkflow
from workflows.wave import WaveWorkflow

ALICE = "alice"
PAUSE, RESUME = PauseRolloutInput(actor=ALICE, reason="storm"), ResumeRolloutInput(actor=ALICE)
APPROVE, ABORT = ApproveRolloutInput(actor=ALICE), AbortRolloutInput(actor=ALICE, reason="wrong image")
PROMOTE = PromoteRolloutInput(actor=ALICE)
ANSWER, SOAK = DriveMode.ANSWERING, DriveMode.SOAKING


async def busy(stage: Stage, **spec: object) -> None:
    """A rollout whose first wave never answers."""
    stage.script.script(1, ANSWER, Waits())
    await stage.start(**spec)
    await stage.until_asked("drive 1 answering")


async def soaking(stage: Stage) -> None:
    """A rollout in the soak of its first wave."""
    await stage.start(THREE_WAVES)
    await stage.until(Phase.SOAKING)


# --- pause and resume -----------------------------------------------------------------------------------------------


async def test_pausing_stops_admission_before_the_update_returns(stage: Stage) -> None:
    await busy(stage)
    status = await stage.handle.execute_update(RolloutWorkflow.pause, PAUSE)
    assert (status.phase, status.reason) == (Phase.PAUSED, "storm")
    [asked] = stage.script.only(SetJobStatusInput)
    assert (asked.status, asked.phase, asked.actor) == (JobStatus.PAUSED, Phase.PAUSED, ALICE)
    assert asked.reason == "paused by alice: storm"


async def test_no_wave_opens_while_a_rollout_is_paused(stage: Stage) -> None:
    await soaking(stage)
    await stage.handle.execute_update(RolloutWorkflow.pause, PAUSE)
    await stage.skip(hours=5)
    await stage.until_asked("drive 1 judging")
    await stage.skip(days=3)
    assert not [drive for drive in stage.script.only(DriveWaveInput) if drive.wave == 2]
    status = await stage.handle.execute_update(RolloutWorkflow.resume, RESUME)
    assert status.phase is not Phase.PAUSED
    assert (await stage.result()).outcome is Outcome.SUCCEEDED


async def test_resuming_shows_again_what_was_underneath(stage: Stage) -> None:
    await soaking(stage)
    before = await stage.handle.query(RolloutWorkflow.status)
    await stage.handle.execute_update(RolloutWorkflow.pause, PAUSE)
    await stage.handle.execute_update(RolloutWorkflow.resume, RESUME)
    assert await stage.handle.query(RolloutWorkflow.status) == before
    resumed = stage.script.only(SetJobStatusInput)[-1]
    assert (resumed.status, resumed.phase) == (JobStatus.RUNNING, Phase.SOAKING)


async def test_a_paused_rollout_that_waits_for_its_start_is_not_running_when_resumed(stage: Stage) -> None:
    await stage.start(approval="start")
    await stage.until(Phase.WAITING_APPROVAL)
    await stage.handle.execute_update(RolloutWorkflow.pause, PAUSE)
    await stage.handle.execute_update(RolloutWorkflow.resume, RESUME)
    resumed = stage.script.only(SetJobStatusInput)[-1]
    assert (resumed.status, resumed.phase) == (JobStatus.PLANNED, Phase.WAITING_APPROVAL)


async def test_a_pause_that_the_database_refuses_leaves_the_rollout_as_it_was(stage: Stage) -> None:
    await busy(stage)
    stage.script.status_errors.append(("RefusedError", "cannot make job 7 paused: it is halted"))
    assert await stage.refusal(RolloutWorkflow.pause, PAUSE) == "cannot make job 7 paused: it is halted"
    assert (await stage.until(Phase.ROLLING)).phase is Phase.ROLLING


async def test_a_breaker_that_trips_while_a_rollout_is_paused_between_waves_halts_it(stage: Stage) -> None:
    stage.script.script(1, SOAK, Waits(), HALT)
    await soaking(stage)
    await stage.handle.execute_update(RolloutWorkflow.pause, PAUSE)
    result = await stage.result()
    assert result.outcome is Outcome.HALTED
    assert stage.script.kinds()[-3:] == ["drive 1 judging", "drive 1 soaking", "finish halted"]


# --- approval -------------------------------------------------------------------------------------------------------


async def test_a_rollout_with_approval_at_start_waits_for_it_and_asks_once(stage: Stage) -> None:
    await stage.start(approval="start")
    status = await stage.until(Phase.WAITING_APPROVAL)
    assert status.waiting_for == "approval of wave 1 (canary)"
    await stage.skip(days=9)
    assert stage.script.only(DriveWaveInput) == []
    await stage.handle.execute_update(RolloutWorkflow.approve, APPROVE)
    assert (await stage.result()).outcome is Outcome.SUCCEEDED
    approved = [asked for asked in stage.script.only(SetJobStatusInput) if asked.actor == ALICE]
    assert [asked.reason for asked in approved] == ["wave 1 approved by alice"]


async def test_every_wave_is_approved_by_a_person_when_asked_so(stage: Stage) -> None:
    await stage.start(approval="every-wave")
    for wave in (1, 2, 3):
        status = await stage.until(Phase.WAITING_APPROVAL, wave=wave - 1)
        assert status.waiting_for.startswith(f"approval of wave {wave} ")
        await stage.handle.execute_update(RolloutWorkflow.approve, APPROVE)
    assert (await stage.result()).outcome is Outcome.SUCCEEDED


async def test_open_waves_are_watched_while_the_next_one_waits_for_approval(stage: Stage) -> None:
    stage.script.script(1, SOAK, HALT)
    await stage.start(approval="every-wave")
    await stage.until(Phase.WAITING_APPROVAL)
    await stage.handle.execute_update(RolloutWorkflow.approve, APPROVE)
    assert (await stage.result()).outcome is Outcome.HALTED
    watch = [drive for drive in stage.script.only(DriveWaveInput) if drive.mode is SOAK]
    assert [(drive.wave, drive.phase) for drive in watch] == [(1, Phase.WAITING_APPROVAL)]


async def test_approving_while_paused_does_not_start_anything(stage: Stage) -> None:
    await stage.start(approval="start")
    await stage.until(Phase.WAITING_APPROVAL)
    await stage.handle.execute_update(RolloutWorkflow.pause, PAUSE)
    await stage.handle.execute_update(RolloutWorkflow.approve, APPROVE)
    assert stage.script.only(SetJobStatusInput)[-1].status is JobStatus.PAUSED
    await stage.skip(days=1)
    assert stage.script.only(DriveWaveInput) == []
    await stage.handle.execute_update(RolloutWorkflow.resume, RESUME)
    assert (await stage.result()).outcome is Outcome.SUCCEEDED


# --- promote --------------------------------------------------------------------------------------------------------


async def test_promoting_ends_the_rest_of_a_soak_and_fresh_counts_are_judged(stage: Stage) -> None:
    await soaking(stage)
    await stage.until_asked("drive 1 soaking")
    asked_at = await stage.environment.get_current_time()
    await stage.handle.execute_update(RolloutWorkflow.promote, PromoteRolloutInput(actor="bob", reason="urgent"))
    await stage.until(Phase.SOAKING, wave=2)
    assert await stage.environment.get_current_time() - asked_at < timedelta(hours=1)
    judged = next(drive for drive in stage.script.only(DriveWaveInput) if drive.mode is DriveMode.JUDGING)
    assert (judged.promoted_by, judged.promote_reason) == ("bob", "urgent")
    assert (await stage.result()).outcome is Outcome.SUCCEEDED


async def test_nobody_promotes_past_a_breaker_that_has_tripped(stage: Stage) -> None:
    await soaking(stage)
    stage.script.tripped = "cannot promote wave 1: halt: 5 of 5 failed; nobody overrules the breaker"
    assert await stage.refusal(RolloutWorkflow.promote, PROMOTE) == stage.script.tripped
    assert (await stage.handle.query(RolloutWorkflow.status)).phase is Phase.SOAKING


async def test_a_wave_is_not_promoted_twice(stage: Stage) -> None:
    stage.script.script(1, DriveMode.JUDGING, Waits())
    await soaking(stage)
    await stage.handle.execute_update(RolloutWorkflow.promote, PROMOTE)
    assert await stage.refusal(RolloutWorkflow.promote, PROMOTE) == (
        "cannot promote: wave 1 has been promoted already, by alice"
    )


# --- abort ----------------------------------------------------------------------------------------------------------


async def test_aborting_a_running_wave_stops_admission_and_drains(stage: Stage) -> None:
    await busy(stage)
    await stage.handle.execute_update(RolloutWorkflow.abort, ABORT)
    result = await stage.result()
    assert (result.outcome, result.reason) == (Outcome.ABORTED, "aborted by alice: wrong image")
    assert stage.script.kinds()[-2:] == ["halted by alice", "finish aborted"]
    assert stage.script.only(FinishRolloutInput)[0].drain


@pytest.mark.parametrize("where", ["soaking", "holding", "waiting", "paused"])
async def test_a_rollout_can_be_aborted_wherever_it_stands(stage: Stage, where: str) -> None:
    if where == "soaking":
        await soaking(stage)
    elif where == "holding":
        stage.script.script(1, ANSWER, HOLD)
        await stage.start()
        await stage.until(Phase.HOLDING)
    elif where == "waiting":
        await stage.start(approval="start")
        await stage.until(Phase.WAITING_APPROVAL)
    else:
        await busy(stage)
        await stage.handle.execute_update(RolloutWorkflow.pause, PAUSE)
    await stage.handle.execute_update(RolloutWorkflow.abort, ABORT)
    assert (await stage.result()).outcome is Outcome.ABORTED


async def test_an_abort_during_planning_closes_the_job_that_was_planned_meanwhile(stage: Stage) -> None:
    stage.script.plan_errors.append(("RuntimeError", "away"))
    await stage.start()
    await stage.until_asked("PlanRollout")
    await stage.handle.execute_update(RolloutWorkflow.abort, ABORT)
    result = await stage.result()
    assert (result.outcome, result.devices) == (Outcome.ABORTED, 60)
    assert stage.script.kinds() == ["PlanRollout", "PlanRollout", "finish aborted"]


# --- adjust ---------------------------------------------------------------------------------------------------------


async def test_adjusting_keeps_what_is_not_given(stage: Stage) -> None:
    await busy(stage, pace=PaceSpec(in_flight=50, per_minute=100))
    for asked in (
        AdjustRolloutInput(actor=ALICE, in_flight=80),
        AdjustRolloutInput(actor=ALICE, unlimited_per_minute=True),
        AdjustRolloutInput(actor=ALICE, per_minute=30),
    ):
        status = await stage.handle.execute_update(RolloutWorkflow.adjust, asked)
    assert [(asked.pace.in_flight, asked.pace.per_minute) for asked in stage.script.only(AdjustPaceInput)] == [
        (80, 100),
        (80, None),
        (80, 30),
    ]
    assert status.pace == PaceSpec(in_flight=80, per_minute=30)


async def test_a_rollout_ends_only_when_the_updates_it_accepted_are_answered(stage: Stage) -> None:
    stage.script.script(3, ANSWER, Fails(), PROMOTED)
    stage.script.pace_errors.extend(["away", "away", "away"])
    await stage.start()
    await stage.until_asked("drive 3 answering")
    update = await stage.handle.start_update(
        RolloutWorkflow.adjust,
        AdjustRolloutInput(actor=ALICE, in_flight=80),
        wait_for_stage=WorkflowUpdateStage.ACCEPTED,
    )
    assert (await stage.result()).outcome is Outcome.SUCCEEDED
    assert stage.script.kinds()[-1] == "AdjustPace"
    assert (await update.result()).pace == PaceSpec(in_flight=80)


# --- what is refused at the door ------------------------------------------------------------------------------------

ROLLING = "rolling, wave 1 of 3 (canary)"


@pytest.mark.parametrize(
    ("update", "asked", "text"),
    [
        (RolloutWorkflow.resume, RESUME, f"cannot resume: it is not paused, it is {ROLLING}"),
        (RolloutWorkflow.approve, APPROVE, f"cannot approve: it waits for no approval, it is {ROLLING}"),
        (
            RolloutWorkflow.promote,
            PROMOTE,
            f"cannot promote: only a wave that soaks or is held can be promoted, it is {ROLLING}; "
            "a wave that runs promotes itself when it has answered",
        ),
        (
            RolloutWorkflow.adjust,
            AdjustRolloutInput(actor=ALICE),
            "cannot adjust: nothing was given; give in_flight, per_minute or unlimited_per_minute",
        ),
        (
            RolloutWorkflow.adjust,
            AdjustRolloutInput(actor=ALICE, per_minute=3, unlimited_per_minute=True),
            "cannot adjust: per_minute and unlimited_per_minute exclude each other; give one of them",
        ),
    ],
)
async def test_a_rolling_rollout_refuses_what_makes_no_sense(
    stage: Stage, update: object, asked: object, text: str
) -> None:
    await busy(stage)
    assert await stage.refusal(update, asked) == text
    assert stage.script.only(SetJobStatusInput) == []


async def test_a_paused_rollout_refuses_to_be_paused_again_and_to_be_promoted(stage: Stage) -> None:
    await soaking(stage)
    await stage.handle.execute_update(RolloutWorkflow.pause, PAUSE)
    assert await stage.refusal(RolloutWorkflow.pause, PAUSE) == "cannot pause: it is paused already, by alice"
    assert await stage.refusal(RolloutWorkflow.promote, PROMOTE) == (
        "cannot promote: it is paused by alice; resume it first"
    )


async def test_what_is_refused_at_the_door_is_not_in_the_history(stage: Stage) -> None:
    await busy(stage)
    await stage.refusal(RolloutWorkflow.resume, RESUME)
    events = (await stage.handle.fetch_history()).events
    assert not [
        event for event in events if event.event_type == EventType.EVENT_TYPE_WORKFLOW_EXECUTION_UPDATE_ACCEPTED
    ]


# --- queries --------------------------------------------------------------------------------------------------------


async def test_the_status_says_where_it_stands_and_until_when_it_soaks(stage: Stage) -> None:
    await soaking(stage)
    status = await stage.until(Phase.SOAKING, wave=1)
    now = await stage.environment.get_current_time()
    assert (status.wave_name, status.job_no, status.devices) == ("canary", 7, 60)
    assert status.soak_until is not None
    assert timedelta(hours=3) < status.soak_until - now <= timedelta(hours=4, seconds=1)
    of_wave = await stage.wave(1).query(WaveWorkflow.status)
    assert (of_wave.phase, of_wave.soak_until) == (Phase.SOAKING, status.soak_until)
    await stage.result()
    status = await stage.handle.query(RolloutWorkflow.status)
    assert (status.phase, status.outcome, len(status.verdicts)) == (Phase.DONE, Outcome.SUCCEEDED, 3)


async def test_the_device_query_says_where_its_execution_is_kept(stage: Stage) -> None:
    await soaking(stage)
    place = await stage.handle.query(RolloutWorkflow.device, FindDeviceInput(device_id="motor-7"))
    assert (place.device_id, place.job_no, place.phase) == ("motor-7", 7, Phase.SOAKING)
    assert JOB_ID.fullmatch(place.job_id)
    assert place.waves_served == (PlannedWave(wave=1, name="canary", devices=3),)
