"""How programs reach fleet jobs: starting and steering one, and schedules that start one by the clock.

```python
handle = await start_fleet_job(client, StartFleetJobInput(spec=spec, requested_by="alice"))
result = await handle.result()
await create_job_schedule(client, "nightly", spec, cron="0 2 * * *", timezone="Europe/Berlin", actor="alice")
```
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionExecutionStartWorkflow,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleHandle,
    ScheduleListDescription,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    ScheduleState,
    WorkflowHandle,
)
from temporalio.common import (
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.service import RPCError, RPCStatusCode

from models.errors import ConflictError, InvalidInputError, NotFoundError
from models.fleetjob import FleetJobResult, JobScheduleView, StartFleetJobInput
from models.ids import (
    JOB_NAME,
    MAX_SCHEDULE_NAME_CHARS,
    fleet_job_workflow_id,
    job_schedule_id,
    scheduled_job_name,
    scheduled_workflow_id,
)
from models.jobspec import FleetJobSpec
from models.protocol import JobOperation
from models.quantities import format_duration, format_share
from models.rollout import Phase
from workflows.attributes import found_by
from workflows.fleet_job import FleetJobWorkflow
from workflows.options import JOB_CATCH_UP, JOB_SCHEDULE, KIND_JOB, TASK_QUEUE

_CRON, _ZONE, _OPERATION = "cron", "timezone", "operation"
"""In a schedule's memo: the server keeps a calendar, and no longer says which expression it was."""
_PREFIX = job_schedule_id("")

JobHandle = WorkflowHandle[FleetJobWorkflow, FleetJobResult]


async def start_fleet_job(client: Client, request: StartFleetJobInput) -> JobHandle:
    """Start a job. Its name is the idempotency key.

    Raises temporalio.exceptions.WorkflowAlreadyStartedError while one of this name runs, InvalidInputError for a name
    that only a schedule's run has. After it has ended the name may be started again: the plan in PostgreSQL decides
    whether that is a continuation or a conflict.
    """
    spec = request.spec
    if scheduled_workflow_id(spec.name) != fleet_job_workflow_id(spec.name):
        raise InvalidInputError(
            f"cannot start job {spec.name}: a name that ends in a time is that of a schedule's run; give it another name"
        )
    return await client.start_workflow(
        FleetJobWorkflow.run,
        request,
        id=fleet_job_workflow_id(spec.name),
        task_queue=TASK_QUEUE,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
        search_attributes=search_attributes(spec),
        static_summary=summary(spec),
        static_details=details(spec, request.requested_by),
    )


def fleet_job_handle(client: Client, name: str) -> JobHandle:
    """The workflow of a job by the job's name, also of a schedule's run."""
    return client.get_workflow_handle_for(FleetJobWorkflow.run, scheduled_workflow_id(name))


async def create_job_schedule(
    client: Client, name: str, spec: FleetJobSpec, *, cron: str, timezone: str = "UTC", actor: str = "unknown"
) -> ScheduleHandle:
    """Start a job by the clock: `<name>-<yyyymmddThhmmss>` each time, none while the one before it runs.

    Args:
        name: of the schedule; `spec.name` is not used.
        cron: five fields, as in `0 2 * * *`.
        timezone: a name of the IANA database.

    Raises:
        InvalidInputError: a name too long, an expression or time zone that is none, or a specification with a time.
        ConflictError: a schedule of this name exists.
    """
    _check_schedule(name, spec, cron, timezone)
    spec = spec.model_copy(update={"name": name})
    action = ScheduleActionStartWorkflow(
        FleetJobWorkflow.run,
        StartFleetJobInput(spec=spec, requested_by=actor, schedule=name),
        id=fleet_job_workflow_id(name),
        task_queue=TASK_QUEUE,
        typed_search_attributes=search_attributes(spec),
        static_summary=summary(spec),
        static_details=details(spec, actor),
    )
    schedule = Schedule(
        action=action,
        spec=ScheduleSpec(cron_expressions=[cron], time_zone_name=timezone),
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=JOB_CATCH_UP),
        state=ScheduleState(note=f"created by {actor}"),
    )
    memo = {_CRON: cron, _ZONE: timezone, _OPERATION: str(spec.operation)}
    attributes = found_by(JOB_SCHEDULE)
    try:
        return await client.create_schedule(job_schedule_id(name), schedule, memo=memo, search_attributes=attributes)
    except ScheduleAlreadyRunningError:
        raise ConflictError(
            f"cannot create schedule {name}: one of this name exists; delete it first, or take another name"
        ) from None
    except RPCError as error:
        if error.status is RPCStatusCode.INVALID_ARGUMENT:
            raise InvalidInputError(f"cannot create schedule {name} with cron {cron!r}: {error.message}") from error
        raise


async def list_job_schedules(client: Client) -> list[JobScheduleView]:
    """All schedules of jobs, by name."""
    found = [await _described(entry) async for entry in await client.list_schedules() if entry.id.startswith(_PREFIX)]
    return sorted(found, key=lambda view: view.name)


async def pause_job_schedule(client: Client, name: str, *, actor: str, reason: str = "") -> None:
    """No further run is started until it is unpaused; one that runs goes on. Raises NotFoundError."""
    async with _schedule(client, name) as handle:
        await handle.pause(note=f"paused by {actor}" + (f": {reason}" if reason else ""))


async def unpause_job_schedule(client: Client, name: str, *, actor: str, reason: str = "") -> None:
    """Start runs again, from the next time on. Raises NotFoundError."""
    async with _schedule(client, name) as handle:
        await handle.unpause(note=f"unpaused by {actor}" + (f": {reason}" if reason else ""))


async def trigger_job_schedule(client: Client, name: str) -> None:
    """Start a run now, unless one runs. Raises NotFoundError."""
    async with _schedule(client, name) as handle:
        await handle.trigger(overlap=ScheduleOverlapPolicy.SKIP)


async def delete_job_schedule(client: Client, name: str) -> None:
    """No further run; one that runs goes on. Raises NotFoundError."""
    async with _schedule(client, name) as handle:
        await handle.delete()


def search_attributes(spec: FleetJobSpec) -> TypedSearchAttributes:
    """What a job can be found by from its first moment."""
    return found_by(KIND_JOB, release=spec.release or None, phase=str(Phase.PLANNING))


def summary(spec: FleetJobSpec) -> str:
    """One line for the list of workflows: `restart on at most 20 devices at a time`."""
    what = f"{spec.operation} to {spec.release}" if spec.release else str(spec.operation)
    where = f" on the failed devices of {spec.retry_of}" if spec.retry_of else ""
    waves = f" in {len(spec.waves)} waves" if len(spec.waves) > 1 else ""
    return f"{what}{where}{waves}, at most {spec.max_parallel} at a time, {spec.membership}"[:200]


def details(spec: FleetJobSpec, requested_by: str) -> str:
    """The specification as Markdown, for the workflow's page."""
    retry, gate = spec.retry, spec.gate
    lines = [
        f"**Operation** {spec.operation}, requested by {requested_by}",
        f"**Target** `{spec.target.model_dump_json(exclude_defaults=True)}` ({spec.membership})"
        if spec.retry_of is None
        else f"**Target** the devices of job {spec.retry_of} that have failed",
        f"**Attempts** {retry.max_attempts}, {format_duration(retry.backoff)} after the first, times {retry.backoff_multiplier:g} "
        f"after each, at most {format_duration(retry.max_backoff)}",
        f"**Pace** {spec.max_parallel} at a time, {spec.per_minute or 'no limit'} per minute",
        f"**Gate** healthy {format_share(gate.healthy)}, limit {format_share(gate.limit)}" if gate else "**Gate** none",
    ]
    return "\n\n".join(lines)


def _check_schedule(name: str, spec: FleetJobSpec, cron: str, timezone: str) -> None:
    if not JOB_NAME.fullmatch(name) or len(name) > MAX_SCHEDULE_NAME_CHARS:
        raise InvalidInputError(
            f"not a schedule's name: {name!r}, expected letters, digits, dots and dashes, at most "
            f"{MAX_SCHEDULE_NAME_CHARS}, because its runs have the time in theirs"
        )
    if not re.fullmatch(r"\S+( +\S+){4}", cron.strip()):
        raise InvalidInputError(f"not a cron expression: {cron!r}, expected five fields, as in '0 2 * * *'")
    try:
        ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidInputError(f"no time zone {timezone!r}, expected a name as in Europe/Berlin") from None
    if spec.start_at is not None or spec.end_at is not None:
        raise InvalidInputError(
            f"cannot create schedule {name}: its jobs start by the schedule; leave start_at and end_at out"
        )


@asynccontextmanager
async def _schedule(client: Client, name: str) -> AsyncIterator[ScheduleHandle]:
    try:
        yield client.get_schedule_handle(job_schedule_id(name))
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        raise NotFoundError(f"no schedule {name!r}; 'starter.py job schedule list' shows those that exist") from None


async def _described(entry: ScheduleListDescription) -> JobScheduleView:
    memo = await entry.memo()
    state, info = entry.schedule.state if entry.schedule else None, entry.info
    actions = [result.action for result in info.recent_actions] if info else []
    runs = [action.workflow_id for action in actions if isinstance(action, ScheduleActionExecutionStartWorkflow)]
    operation = memo.get(_OPERATION)
    return JobScheduleView(
        name=entry.id.removeprefix(_PREFIX),
        cron=str(memo.get(_CRON, "")),
        timezone=str(memo.get(_ZONE, "UTC")),
        paused=bool(state and state.paused),
        note=(state.note or "") if state else "",
        operation=JobOperation(operation) if operation else None,
        next_runs=tuple(info.next_action_times[:3]) if info else (),
        last_runs=tuple(scheduled_job_name(run) or run for run in runs),
    )
