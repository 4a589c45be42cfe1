"""The steps that a fleet job has beside a rollout's (workflows/steps.py), with their queues, timeouts and summaries."""

from temporalio import workflow
from temporalio.common import SearchAttributePair, TypedSearchAttributes

from activities.fleet_jobs import FleetJobActivities
from models.fleetjob import PlanFleetJobInput
from models.jobspec import FleetJobSpec
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


def wave_attributes(spec: FleetJobSpec) -> TypedSearchAttributes:
    """What a job's wave can be found by."""
    release = [SearchAttributePair(options.RELEASE, spec.release)] if spec.release else []
    return TypedSearchAttributes([SearchAttributePair(options.KIND, options.KIND_WAVE), *release])
