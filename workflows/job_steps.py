"""The steps that a fleet job has beside a rollout's (workflows/steps.py), with their queues, timeouts and summaries."""

from temporalio import workflow

from activities.fleet_jobs import FleetJobActivities
from models.fleetjob import PlanFleetJobInput
from models.rollout import PlanRolloutResult
from workflows import options


async def plan(asked: PlanFleetJobInput) -> PlanRolloutResult:
    """Plan the job, or take up the plan that exists."""
    return await workflow.execute_activity_method(
        FleetJobActivities.plan_fleet_job,
        asked,
        start_to_close_timeout=options.PLAN_TIMEOUT,
        retry_policy=options.SHORT_RETRY,
        summary=f"plan {asked.spec.name}",
    )
