"""The step of a fleet job that a rollout has not: its plan. All others are activities/rollouts.py's."""

from dataclasses import dataclass
from typing import Protocol

from temporalio import activity

from models.errors import ConflictError
from models.fleetjob import FleetJobView, PlanFleetJobInput
from models.rollout import JobStatus, PlanRolloutResult


class FleetJobRecords(Protocol):
    """What is true of fleet jobs: store.fleetjobs.FleetJobStore, or a test's script."""

    async def plan(self, asked: PlanFleetJobInput, /) -> PlanRolloutResult:
        """Choose, order and cut; the same specification again returns the plan that exists."""

    async def get(self, name: str, /) -> FleetJobView:
        """One job."""


@dataclass
class FleetJobActivities:
    """See the module."""

    jobs: FleetJobRecords

    @activity.defn
    async def plan_fleet_job(self, asked: PlanFleetJobInput) -> PlanRolloutResult:
        """Plan. Idempotent by the job's name and specification.

        A job that was planned before and is not over is taken up where it stands; one that is over is refused.
        """
        plan = await self.jobs.plan(asked)
        if (await self.jobs.get(asked.spec.name)).status is JobStatus.FINISHED:
            raise ConflictError(
                f"cannot start job {asked.spec.name}: it has run already, and is over; "
                f"'starter.py job show {asked.spec.name}' says how; give a new one another name"
            )
        return plan
