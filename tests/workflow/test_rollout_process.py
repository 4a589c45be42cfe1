"""The way of a rollout through its waves, on a time-skipping server with scripted activities."""

import asyncio
from datetime import timedelta

import pytest
from temporalio.client import WorkflowFailureError

from models.rollout import (
    CloseWaveInput,
    DriveMode,
    DriveWaveInput,
    FinishRolloutInput,
    Outcome,
    Phase,
    PlanRolloutInput,
    PromoteRolloutInput,
    Verdict,
)
from tests.workflow.conftest import THREE_WAVES, Stage
from tests.workflow.scripted import HALT, HOLD, PROMOTE, Fails, Says, Waits
from workflows.rollout import RolloutWorkflow

SOAK = DriveMode.SOAKING
ANSWER = DriveMode.ANSWERING


async def test_three_waves_with_four_hours_of_soak_each_are_promoted_in_order(stage: Stage) -> None:
    await stage.start(THREE_WAVES)
    result = await stage.result()
    assert result.outcome is Outcome.SUCCEEDED
    assert (result.devices, result.succeeded) == (60, 60)
    assert stage.script.kinds() == [
        "PlanRollout",
        "PrepareArtifacts",
        *(f"drive {wave} {mode}" for wave in (1, 2) for mode in ("answering", "soaking", "judging")),
        "drive 3 answering",
        "finish succeeded",
    ]
    assert await stage.took() >= timedelta(hours=8)
    assert [drive.is_last for drive in stage.script.only(DriveWaveInput)][-1:] == [True]


async def test_a_wave_without_soak_is_closed_by_its_one_driver(stage: Stage) -> None:
    await stage.start()
    assert (await stage.result()).outcome is Outcome.SUCCEEDED
    drives = stage.script.only(DriveWaveInput)
    assert [(drive.wave, drive.mode, drive.soaks) for drive in drives] == [(n, ANSWER, False) for n in (1, 2, 3)]
    assert stage.script.only(CloseWaveInput) == []


async def test_a_halt_in_the_canary_wave_opens_no_further_wave_and_drains(stage: Stage) -> None:
    stage.script.script(1, ANSWER, HALT)
    await stage.start(THREE_WAVES)
    result = await stage.result()
    assert result.outcome is Outcome.HALTED
    assert result.reason.startswith("halt: 5 of 5 exposed devices failed")
    assert stage.script.kinds()[2:] == ["drive 1 answering", "finish halted"]
    assert stage.script.only(FinishRolloutInput)[0].drain


async def test_a_breaker_that_trips_during_the_soak_halts_without_waiting_for_its_end(stage: Stage) -> None:
    stage.script.script(1, SOAK, HALT)
    await stage.start(THREE_WAVES)
    result = await stage.result()
    assert result.outcome is Outcome.HALTED
    assert stage.script.kinds()[2:] == ["drive 1 answering", "drive 1 soaking", "finish halted"]
    assert await stage.took() < timedelta(hours=4)


async def test_a_judgement_after_the_soak_can_halt(stage: Stage) -> None:
    stage.script.script(1, DriveMode.JUDGING, Says(Verdict.HALT, "halt: 8 of 60 failed (13.3 %), more than 10%"))
    await stage.start(THREE_WAVES)
    assert (await stage.result()).reason == "halt: 8 of 60 failed (13.3 %), more than 10%"


async def test_a_held_wave_goes_on_when_a_person_promotes_it(stage: Stage) -> None:
    stage.script.script(2, ANSWER, HOLD)
    await stage.start()
    status = await stage.until(Phase.HOLDING)
    assert (status.wave, status.reason) == (2, "hold: 12 of 20 answered, 19 needed")
    assert status.waiting_for == "a person to promote or abort"
    await stage.until_asked("drive 2 soaking")
    await stage.handle.execute_update(
        RolloutWorkflow.promote, PromoteRolloutInput(actor="bob", reason="the rest is on a ship")
    )
    assert (await stage.result()).outcome is Outcome.SUCCEEDED
    [closed] = stage.script.only(CloseWaveInput)
    assert (closed.wave, closed.verdict.verdict) == (2, Verdict.PROMOTE)
    assert closed.verdict.reason == ("promoted by bob: the rest is on a ship (hold: 12 of 20 answered, 19 needed)")


async def test_a_breaker_that_trips_while_a_wave_is_held_halts(stage: Stage) -> None:
    stage.script.script(2, ANSWER, HOLD)
    stage.script.script(2, SOAK, HALT)
    await stage.start()
    assert (await stage.result()).outcome is Outcome.HALTED


async def test_the_wave_that_is_held_stays_watched_under_the_phase_that_people_see(stage: Stage) -> None:
    stage.script.script(1, ANSWER, HOLD)
    await stage.start()
    await stage.until_asked("drive 1 soaking")
    watch = stage.script.only(DriveWaveInput)[-1]
    assert (watch.mode, watch.phase, watch.phase_reason) == (SOAK, Phase.HOLDING, "a person to promote or abort")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("NotFoundError", "cannot start rollout x: no release motor@1.3.0"),
        ("RefusedError", "cannot start rollout x: no device matches the target"),
        ("ConflictError", "cannot start rollout x: 14 of its 60 devices are held by rollout y"),
    ],
)
async def test_a_plan_that_cannot_be_made_is_a_result_that_says_why(stage: Stage, kind: str, message: str) -> None:
    stage.script.plan_errors.append((kind, message))
    await stage.start()
    result = await stage.result()
    assert (result.outcome, result.reason, result.devices) == (Outcome.REFUSED, message, 0)
    assert stage.script.kinds() == ["PlanRollout"]


async def test_a_refused_rollout_can_be_started_again_under_its_name(stage: Stage) -> None:
    stage.script.plan_errors.append(("NotFoundError", "no release"))
    await stage.start(name="again-1.0.0")
    assert (await stage.result()).outcome is Outcome.REFUSED
    await stage.start(name="again-1.0.0")
    assert (await stage.result()).outcome is Outcome.SUCCEEDED


async def test_a_database_that_is_away_delays_a_rollout_and_does_not_end_it(stage: Stage) -> None:
    stage.script.plan_errors.extend([("RuntimeError", "away"), ("RuntimeError", "away")])
    stage.script.script(1, ANSWER, Fails(), Fails(), PROMOTE)
    await stage.start()
    assert (await stage.result()).outcome is Outcome.SUCCEEDED
    assert len(stage.script.only(PlanRolloutInput)) == 3
    assert stage.script.kinds().count("drive 1 answering") == 3


async def test_deltas_that_cannot_be_built_do_not_stop_a_rollout(stage: Stage) -> None:
    stage.script.artifacts_error = "the image is not in the artifact store"
    await stage.start()
    assert (await stage.result()).outcome is Outcome.SUCCEEDED
    assert stage.script.kinds()[1:4] == ["PrepareArtifacts", "WriteDocument", "drive 1 answering"]


async def test_a_workflow_that_is_cancelled_in_the_ui_ends_as_aborted_and_closes_its_job(stage: Stage) -> None:
    stage.script.script(1, ANSWER, Waits())
    await stage.start()
    await stage.until_asked("drive 1 answering")
    await stage.handle.cancel()
    result = await stage.result()
    assert (result.outcome, result.reason) == (Outcome.ABORTED, "aborted: the workflow was cancelled")
    assert stage.script.kinds()[-1] == "finish aborted"
    with pytest.raises(WorkflowFailureError):
        await asyncio.wait_for(stage.wave(1).result(), 5)
