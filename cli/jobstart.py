"""Starting a fleet job, and saying what was planned."""

from datetime import UTC, datetime
from typing import Any

from temporalio.exceptions import WorkflowAlreadyStartedError

from cli.command import Session, whoami
from cli.following import follow, tell_unplanned
from cli.given import duration_of
from cli.jobscreen import JobSnapshot, what
from cli.jobwatch import JobWatch
from cli.output import ExitStatus, facts, when
from cli.steering import PLAN_PATIENCE_SECONDS, already_running, refuse_ended
from models.errors import NotFoundError
from models.fleetjob import FleetJobResult, StartFleetJobInput
from models.ids import fleet_job_workflow_id
from models.jobspec import FleetJobSpec
from store.engine import Database
from store.fleetjobs import FleetJobStore
from workflows.fleet_jobs_client import start_fleet_job

MAX_NAME_CHARS = 63
"""Of models.ids.JOB_NAME."""


async def begin(session: Session, spec: FleetJobSpec, wait: bool, timeout: str | None, stay: bool | None) -> ExitStatus:
    """Start it; with `wait`, watch it until it ends. Raises ConflictError, RefusedError."""
    limit = duration_of("--timeout", timeout)
    async with session.database() as db:
        await refuse_ended("job", spec.name, FleetJobStore(db).get(spec.name))
        client = await session.temporal()
        try:
            await start_fleet_job(client, StartFleetJobInput(spec=spec, requested_by=whoami()))
        except WorkflowAlreadyStartedError as error:
            raise already_running("job", spec.name) from error
        watching = JobWatch(session, db, spec.name, client)
        later = spec.start_at is not None and spec.start_at > datetime.now(UTC)
        planned = await watching.until_planned(0 if later else PLAN_PATIENCE_SECONDS)
        if isinstance(planned, FleetJobResult):
            await watching.close()
            return tell_unplanned("job", session.out, planned)
        _tell_started(session, spec, planned, wait, later)
        if not wait:
            await watching.close()
            return ExitStatus.SUCCEEDED
        return await follow(watching, limit, stay)


async def free_name(db: Database, name: str) -> str:
    """`NAME-retry`, or with a number behind it where that exists."""
    number = 1
    while True:
        end = "-retry" if number == 1 else f"-retry{number}"
        chosen = name[: MAX_NAME_CHARS - len(end)].rstrip(".-") + end
        try:
            await FleetJobStore(db).get(chosen)
        except NotFoundError:
            return chosen
        number += 1


def _tell_started(session: Session, spec: FleetJobSpec, planned: JobSnapshot | None, waits: bool, later: bool) -> None:
    workflow_id = fleet_job_workflow_id(spec.name)
    link = session.ui_link(workflow_id)
    total = planned.view.progress.total if planned else None
    made: dict[str, Any] = {"name": spec.name, "operation": spec.operation, "workflow_id": workflow_id}
    made |= {"job_no": planned.view.job_no if planned else None, "devices": total, "ui_url": link}
    plan = f"starts at {when(spec.start_at)}" if later else f"{total} devices" if planned else "being planned"
    pairs = [("job", spec.name), ("operation", what(spec)), ("plan", plan), ("UI", link)]
    session.out.result(made, [facts(pairs), ""] if waits else facts([*pairs, ("watch", f"job watch {spec.name}")]))
    if planned is None and not later:
        session.out.say(
            f"no plan within {PLAN_PATIENCE_SECONDS:.0f} s; a large fleet takes longer, but is a worker running?"
        )
