"""The activities of a rollout with their queues, timeouts and summaries: what a workflow calls to have a step done.

Only arranges calls; when and in which order is the workflows' business.
"""

from collections.abc import Callable
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception
from temporalio.workflow import ActivityCancellationType, ActivityHandle

from activities.rollouts import RolloutActivities
from models.rollout import (
    AdjustPaceInput,
    CancelRunningInput,
    CheckPromotableInput,
    CloseWaveInput,
    DriveWaveInput,
    DriveWaveResult,
    FinishRolloutInput,
    FinishRolloutResult,
    PlanRolloutInput,
    PlanRolloutResult,
    PrepareArtifactsInput,
    PrepareArtifactsResult,
    SetJobStatusInput,
    WaveVerdict,
    WriteDocumentInput,
)
from workflows import options

_SHORT: dict[str, Any] = {
    "start_to_close_timeout": options.SHORT_TIMEOUT,
    "retry_policy": options.SHORT_RETRY,
}
_LONG: dict[str, Any] = {
    "task_queue": options.DISPATCH_QUEUE,
    "start_to_close_timeout": options.DRIVE_TIMEOUT,
    "heartbeat_timeout": options.HEARTBEAT_TIMEOUT,
    "retry_policy": options.DRIVE_RETRY,
    # A driver learns of its cancellation with its next heartbeat; nobody needs to wait for that.
    "cancellation_type": ActivityCancellationType.TRY_CANCEL,
}


async def plan(asked: PlanRolloutInput) -> PlanRolloutResult:
    """Plan the rollout, or take up the plan that exists."""
    return await workflow.execute_activity_method(
        RolloutActivities.plan_rollout,
        asked,
        start_to_close_timeout=options.PLAN_TIMEOUT,
        retry_policy=options.SHORT_RETRY,
        summary=f"plan {asked.spec.release}",
    )


async def prepare(plan: PlanRolloutResult) -> None:
    """Deltas and the job document. That no delta could be made is no reason to stop: the full image serves."""
    try:
        await workflow.execute_activity(
            options.PREPARE_ARTIFACTS,
            PrepareArtifactsInput(job_no=plan.job_no, target_sha256=plan.release_sha256, bases=plan.bases),
            result_type=PrepareArtifactsResult,
            task_queue=options.ARTIFACTS_QUEUE,
            schedule_to_start_timeout=options.ARTIFACTS_QUEUE_TIMEOUT,
            schedule_to_close_timeout=options.ARTIFACTS_TIMEOUT,
            heartbeat_timeout=options.ARTIFACTS_HEARTBEAT,
            retry_policy=options.ARTIFACTS_RETRY,
            summary=f"deltas from {len(plan.bases)} images in the field",
        )
    except ActivityError as error:
        if is_cancelled_exception(error):
            raise
        workflow.logger.warning("artifacts could not be prepared, going on with the full image: %s", error.cause)
        await workflow.execute_activity_method(
            RolloutActivities.write_plain_document,
            WriteDocumentInput(job_no=plan.job_no),
            summary="full image only",
            **_SHORT,
        )


def drive(asked: DriveWaveInput, wave_name: str) -> ActivityHandle[DriveWaveResult]:
    """Start to drive, watch or judge a wave."""
    return workflow.start_activity_method(
        RolloutActivities.drive_wave, asked, summary=f"wave {asked.wave} ({wave_name}): {asked.mode}", **_LONG
    )


async def watch_until(ready: Callable[[], bool], asked: DriveWaveInput, wave_name: str) -> WaveVerdict | None:
    """Wait while waves that are open stay watched: deadlines run, late devices are served.

    Returns the verdict when a breaker trips meanwhile, else None.
    """
    watch = drive(asked, wave_name)
    try:
        await workflow.wait_condition(lambda: ready() or watch.done())
        return watch.result().verdict if watch.done() else None
    finally:
        let_go(watch)


def let_go(driver: ActivityHandle[DriveWaveResult]) -> None:
    """Cancel a driver that is no longer needed, without waiting; what it still says is nobody's concern."""
    if not driver.done():
        driver.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        driver.cancel()


async def close_wave(asked: CloseWaveInput) -> None:
    """Record a verdict that a person brought about."""
    await workflow.execute_activity_method(
        RolloutActivities.close_wave, asked, summary=asked.verdict.reason[:100], **_SHORT
    )


async def check_promotable(asked: CheckPromotableInput) -> None:
    """Raise ActivityError when a breaker has tripped."""
    await workflow.execute_activity_method(
        RolloutActivities.check_promotable, asked, summary=f"may wave {asked.wave} be promoted?", **_SHORT
    )


async def set_status(asked: SetJobStatusInput) -> None:
    """Change what admission asks of the job, and what is shown of it."""
    await workflow.execute_activity_method(
        RolloutActivities.set_job_status, asked, summary=asked.reason[:100], **_SHORT
    )


async def adjust_pace(asked: AdjustPaceInput) -> None:
    """New cap and pace."""
    pace = asked.pace
    summary = f"{pace.in_flight} in flight, {pace.per_minute or 'no limit'} per minute"
    await workflow.execute_activity_method(RolloutActivities.adjust_pace, asked, summary=summary, **_SHORT)


async def cancel_running(asked: CancelRunningInput) -> None:
    """Cancel what is in progress."""
    await workflow.execute_activity_method(
        RolloutActivities.cancel_running, asked, summary="cancel what is in progress", **_LONG
    )


async def finish(asked: FinishRolloutInput) -> FinishRolloutResult:
    """Close the job, after a drain where one is asked for."""
    summary = f"{asked.outcome}: " + ("withdraw, drain, close" if asked.drain else "close")
    return await workflow.execute_activity_method(RolloutActivities.finish_rollout, asked, summary=summary, **_LONG)
