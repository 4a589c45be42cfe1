"""A fleet job being followed: see cli.following."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from cli.following import ASK_SECONDS, EVENTS_READ, Following
from cli.jobscreen import MEANING, JobSnapshot, next_command
from models.fleetjob import FleetJobResult, FleetJobStatus
from models.ids import scheduled_workflow_id
from models.rollout import Outcome
from store.fleetjobs import FleetJobStore
from workflows.fleet_job import FleetJobWorkflow
from workflows.fleet_jobs_client import JobHandle, fleet_job_handle


class JobWatch(Following[JobSnapshot, FleetJobResult]):
    """See the module."""

    kind = "job"
    result_type = FleetJobResult
    _status: FleetJobStatus | None = None

    @property
    def handle(self) -> JobHandle | None:
        """See Following."""
        return None if self.client is None else fleet_job_handle(self.client, self.name)

    async def look(self) -> JobSnapshot:
        """See Following."""
        store = FleetJobStore(self.db)
        view = await store.get(self.name)
        events = await store.events(view.job_no, EVENTS_READ)
        if view.outcome is None:
            self.ask_in_the_background()
        link = self.session.ui_link(scheduled_workflow_id(self.name))
        return JobSnapshot(datetime.now(UTC), view, tuple(events), self._status, link)

    async def ask(self) -> None:
        """See Following."""
        if (handle := self.handle) is not None:
            self._status = await handle.query(FleetJobWorkflow.status, rpc_timeout=timedelta(seconds=ASK_SECONDS))

    def forget(self) -> None:
        """See Following."""
        self._status = None

    def failed(self, reason: str) -> FleetJobResult:
        """See Following."""
        return FleetJobResult(name=self.name, outcome=Outcome.FAILED, reason=reason)

    def figures(self, seen: JobSnapshot) -> dict[str, Any]:
        """See Following."""
        view = seen.view
        progress = view.progress.model_dump(mode="json")
        return {
            "name": view.name,
            "outcome": view.outcome,
            "reason": seen.reason,
            **progress,
            "next": next_command(seen),
        }

    def tell_waiting(self, seen: JobSnapshot) -> str:
        """See Following."""
        action, name = MEANING.get(seen.phase, "job show"), seen.view.name
        return f"job {name} waits for a person ({seen.phase}): {seen.reason}; see '{action} {name}'"

    def old(self, seen: JobSnapshot, trouble: str) -> JobSnapshot:
        """See Following."""
        return replace(seen, trouble=trouble)

    def said(self, seen: JobSnapshot) -> str:
        """See Following."""
        name, failed = seen.view.name, seen.view.progress.failed
        return seen.reason + (f"; 'job show {name}' says how, 'job retry {name}' tries them again" if failed else "")
