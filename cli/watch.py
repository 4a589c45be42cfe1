"""A rollout being followed: see cli.following."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from temporalio.client import WorkflowHandle

from cli.following import ASK_SECONDS, EVENTS_READ, Following
from cli.screen import MEANING, Snapshot
from models.ids import rollout_workflow_id
from models.rollout import Outcome, RolloutResult, RolloutStatus
from store.rollouts import RolloutStore
from workflows.rollout import RolloutWorkflow

Handle = WorkflowHandle[RolloutWorkflow, RolloutResult]


class Watch(Following[Snapshot, RolloutResult]):
    """See the module."""

    kind = "rollout"
    result_type = RolloutResult
    _status: RolloutStatus | None = None

    @property
    def handle(self) -> Handle | None:
        """See Following."""
        if self.client is None:
            return None
        return self.client.get_workflow_handle_for(RolloutWorkflow.run, rollout_workflow_id(self.name))

    async def look(self) -> Snapshot:
        """See Following."""
        view = await RolloutStore(self.db).show(self.name)
        events = await RolloutStore(self.db).events(view.job_no, EVENTS_READ)
        if view.outcome is None:
            self.ask_in_the_background()
        return Snapshot(
            at=datetime.now(UTC),
            view=view,
            events=tuple(events),
            status=self._status,
            ui_link=self.session.ui_link(rollout_workflow_id(self.name)),
        )

    async def ask(self) -> None:
        """See Following."""
        if (handle := self.handle) is not None:
            self._status = await handle.query(RolloutWorkflow.status, rpc_timeout=timedelta(seconds=ASK_SECONDS))

    def forget(self) -> None:
        """See Following."""
        self._status = None

    def failed(self, reason: str) -> RolloutResult:
        """See Following."""
        return RolloutResult(name=self.name, outcome=Outcome.FAILED, reason=reason)

    def figures(self, seen: Snapshot) -> dict[str, Any]:
        """See Following."""
        view = seen.view
        return {
            "name": view.name,
            "outcome": view.outcome,
            "reason": seen.reason,
            "devices": view.devices,
            "succeeded": view.counts.succeeded,
            "failed": view.counts.failed + view.counts.timed_out + view.counts.rejected,
            "exposed": view.exposed,
            "by_delta": view.by_delta,
        }

    def tell_waiting(self, seen: Snapshot) -> str:
        """See Following."""
        action, name = MEANING.get(seen.phase, "rollout show"), seen.view.name
        return f"rollout {name} waits for a person ({seen.phase}): {seen.reason}; see '{action} {name}'"

    def old(self, seen: Snapshot, trouble: str) -> Snapshot:
        """See Following."""
        return replace(seen, trouble=trouble)

    def said(self, seen: Snapshot) -> str:
        """See Following."""
        return seen.reason
