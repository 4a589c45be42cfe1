"""`job start | watch | show | list | pause | resume | cancel | retry | explain | devices | failures | events | schedule`."""

import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import jobschedule
from cli.command import Session, command, whoami
from cli.following import follow, temporal_if_there
from cli.given import duration_of
from cli.jobexplain import why_here, why_not_in
from cli.joboptions import Quick, Target, specification_of
from cli.jobscreen import (
    attempts_table,
    devices_table,
    failure_groups,
    failure_table,
    next_command,
    row_of,
    specification,
)
from cli.jobstart import begin, free_name
from cli.jobwatch import JobWatch
from cli.output import ExitStatus, as_dict, facts, table, when
from cli.screen import event_text
from cli.spec import parse_spec
from cli.steering import Stay, Timeout, steer, why_not_running
from models.device import DeviceStatus
from models.errors import NotFoundError, RefusedError
from models.fleetjob import (
    CancelFleetJobInput,
    FleetJobResult,
    FleetJobStatus,
    PauseFleetJobInput,
    ResumeFleetJobInput,
)
from models.jobspec import FleetJobSpec, Membership
from models.protocol import DiagnosticType, ExecutionState, JobOperation
from models.rollout import JobStatus, Phase
from store.fleetjobs import FleetJobStore
from store.registry import Registry
from workflows.fleet_job import FleetJobWorkflow
from workflows.fleet_jobs_client import JobHandle, fleet_job_handle

app = typer.Typer(help="Fleet jobs: one thing on many devices, now, later or again and again.", no_args_is_help=True)
app.add_typer(jobschedule.app, name="schedule")

FAILURES_READ = 2000
"""Of a job with more failures, what is grouped are the last."""

Name = Annotated[str, typer.Argument(metavar="NAME", help="The job's name.")]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; kept with the job's events.")]
Wait = Annotated[bool, typer.Option("--wait", help="Watch it until it ends; the exit status says how.")]
Repeated = list[str] | None
_REPEAT = "repeat for any of several."
_QUESTIONS = ", ".join(kind for kind in DiagnosticType if kind is not DiagnosticType.REBOOT)


@command(app, "start")
async def start(
    session: Session,
    spec_or_name: Annotated[
        str,
        typer.Argument(
            metavar="SPEC.yaml|NAME", help="The specification (- reads standard input); or with --operation a name."
        ),
    ],
    operation: Annotated[
        JobOperation | None, typer.Option(metavar="OPERATION", help=f"One of {', '.join(JobOperation)}.")
    ] = None,
    type_: Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Devices of this type.")] = None,
    site: Annotated[Repeated, typer.Option(metavar="SITE", help=f"Devices of this site; {_REPEAT}")] = None,
    tag: Annotated[
        Repeated,
        typer.Option(
            metavar="TAG=VALUE", help="Devices with this tag; also TAG<VALUE, <=, >, >=, !=. Repeat: all must match."
        ),
    ] = None,
    status: Annotated[
        list[DeviceStatus] | None, typer.Option(metavar="STATUS", help=f"Devices with this status; {_REPEAT}")
    ] = None,
    version: Annotated[
        Repeated, typer.Option(metavar="VERSION", help=f"Devices that run this firmware; {_REPEAT}")
    ] = None,
    id_: Annotated[Repeated, typer.Option("--id", metavar="ID", help="This device; repeat for several.")] = None,
    inactive: Annotated[str | None, typer.Option(metavar="DURATION", help="Devices silent for so long: 30m.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every device that is not retired.")] = False,
    release: Annotated[str | None, typer.Option(metavar="PRODUCT@VERSION", help="For firmware-update.")] = None,
    document: Annotated[Path | None, typer.Option(metavar="FILE", help="For custom: a JSON object.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For config-sync: a JSON object that devices are to take first.")
    ] = None,
    ask: Annotated[
        Repeated,
        typer.Option(metavar="QUESTION", help=f"For diagnostic: one of {_QUESTIONS}; repeat for several."),
    ] = None,
    continuous: Annotated[
        bool, typer.Option("--continuous", help="Devices that match later join, until it ends.")
    ] = False,
    max_parallel: Annotated[int | None, typer.Option(min=1, metavar="N", help="Devices at one moment (100).")] = None,
    per_minute: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Devices started in any 60 seconds.")
    ] = None,
    attempts: Annotated[int | None, typer.Option(min=1, metavar="N", help="Attempts for each device (1).")] = None,
    backoff: Annotated[str | None, typer.Option(metavar="DURATION", help="Before the second attempt (30s).")] = None,
    start_at: Annotated[str | None, typer.Option(metavar="TIME", help="Not before: 2026-11-30T02:00:00Z.")] = None,
    end_at: Annotated[str | None, typer.Option(metavar="TIME", help="Nothing starts after this.")] = None,
    wait: Wait = False,
    timeout: Timeout = None,
    stay: Stay = None,
) -> ExitStatus:
    """Start a job from its specification, or from options.

    job start restart-berlin --operation restart --site berlin --max-parallel 50 --attempts 3

    The name is the identity: while a job of this name exists, running or ended, another is refused.
    """
    quick = Quick(
        operation, release, document, config, ask or [], continuous, max_parallel, per_minute, attempts, backoff, start_at, end_at
    )  # fmt: skip
    target = Target(type_, site or [], tag or [], status or [], version or [], id_ or [], inactive, everything)
    if spec_or_name == "-" and operation is None:
        spec = parse_spec(sys.stdin.buffer.read(), "standard input", FleetJobSpec)
    else:
        spec = specification_of(spec_or_name, quick, target)
    return await begin(session, spec, wait, timeout, stay)


@command(app, "retry")
async def retry(
    session: Session,
    name: Name,
    new_name: Annotated[str | None, typer.Option("--name", metavar="NEW", help="Of the new job (NAME-retry).")] = None,
    wait: Wait = False,
    timeout: Timeout = None,
    stay: Stay = None,
) -> ExitStatus:
    """Start a new job over exactly the devices that have failed in this one."""
    async with session.database() as db:
        view = await FleetJobStore(db).get(name)
        if not view.progress.failed:
            raise RefusedError(f"cannot retry job {name}: no device of it has failed for good")
        chosen = new_name or await free_name(db, name)
    once = {"name": chosen, "retry_of": name, "membership": Membership.SNAPSHOT, "start_at": None, "end_at": None}
    spec = FleetJobSpec.model_validate({**view.spec, **once})
    return await begin(session, spec, wait, timeout, stay)


@command(app, "watch")
async def watch(session: Session, name: Name, timeout: Timeout = None, stay: Stay = None) -> ExitStatus:
    """Show a job live until it ends; the exit status says how it ended."""
    limit = duration_of("--timeout", timeout)
    async with session.database() as db:
        return await follow(JobWatch(session, db, name, await temporal_if_there(session)), limit, stay)


@command(app, "show")
async def show(
    session: Session,
    name: Name,
    devices: Annotated[bool, typer.Option("--devices", help="Every device, too.")] = False,
    failures: Annotated[bool, typer.Option("--failures", help="Every failed attempt, too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Most devices, and most failed attempts.")] = 100,
) -> ExitStatus:
    """Show where a job stands now, how devices have failed, and what to do next."""
    async with session.database() as db:
        looking = JobWatch(session, db, name, await temporal_if_there(session))
        found = await looking.until_planned(0)
        await looking.close()
        if isinstance(found, FleetJobResult):
            session.out.result(found, f"job {name} {found.outcome}: {found.reason}")
            return ExitStatus.SUCCEEDED
        if found is None:
            session.out.result(
                {"name": name, "phase": "planning"},
                f"job {name} has no plan yet; it waits for its time, or is being planned",
            )
            return ExitStatus.SUCCEEDED
        store = FleetJobStore(db)
        groups = failure_groups(await store.failures(name, FAILURES_READ, only_final=True))
        attempts = await store.failures(name, limit) if failures else []
        places = await store.executions(name, None, limit) if devices else []
    view = found.view
    times = [("planned", view.created_at), ("started", view.started_at), ("finished", view.finished_at)]
    origin = [("requested by", view.requested_by), ("schedule", view.schedule), *times]
    shown: list[Any] = [found.screen, "", facts([*specification(found.spec), *origin])]
    shown += ["", failure_table(groups)] if groups else []
    shown += [attempts_table(attempts)] if attempts else []
    shown += [devices_table(places)] if places else []
    more: dict[str, Any] = {"failure_groups": [vars(group) for group in groups]}
    more |= {"devices": [as_dict(e) for e in places]} if devices else {}
    more |= {"failures": [as_dict(f) for f in attempts]} if failures else {}
    session.out.result({**found.as_object, **more}, shown)
    session.out.say(f"next: {next_command(found)}")
    return ExitStatus.SUCCEEDED


@command(app, "list")
async def list_jobs(
    session: Session,
    status: Annotated[
        list[JobStatus] | None,
        typer.Option("--status", metavar="STATUS", help=f"One of {', '.join(JobStatus)}; {_REPEAT}"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to show.")] = 50,
) -> None:
    """List jobs, the newest first."""
    async with session.database() as db:
        found = await FleetJobStore(db).list(limit, status or ())
    rows = [row_of(view) for view in found]
    columns = ("job", "operation", "state", "planned", "devices", "reason")
    session.out.result({"jobs": [as_dict(view) for view in found]}, [table("", columns, rows)] if rows else [])
    if not found:
        session.out.say("no job; 'job start SPEC.yaml' begins one")


@command(app, "pause")
async def pause(session: Session, name: Name, reason: Reason = "") -> None:
    """Stop admission: devices in progress end, no other starts."""
    asked = PauseFleetJobInput(actor=whoami(), reason=reason)
    await _steer(session, name, lambda handle: handle.execute_update(FleetJobWorkflow.pause, asked))


@command(app, "resume")
async def resume(session: Session, name: Name, reason: Reason = "") -> None:
    """Go on after a pause, or where a wave is held for a person."""
    asked = ResumeFleetJobInput(actor=whoami(), reason=reason)
    await _steer(session, name, lambda handle: handle.execute_update(FleetJobWorkflow.resume, asked))


@command(app, "cancel")
async def cancel(
    session: Session,
    name: Name,
    reason: Reason = "",
    force: Annotated[
        bool, typer.Option("--force", help="Devices in progress are cancelled too; without it they end.")
    ] = False,
) -> None:
    """End a job: nothing more starts, what is only queued is withdrawn."""
    asked = CancelFleetJobInput(actor=whoami(), reason=reason, force=force)
    await _steer(session, name, lambda handle: handle.execute_update(FleetJobWorkflow.cancel, asked), ends=True)


@command(app, "explain")
async def explain(
    session: Session, name: Name, device_id: Annotated[str, typer.Argument(metavar="DEVICE", help="Device id.")]
) -> None:
    """Say why a device is not doing what the job wants, or what came of it."""
    async with session.database() as db:
        store, now = FleetJobStore(db), datetime.now(UTC)
        job = await store.get(name)
        known = await Registry(db).get(device_id)
        try:
            found = await store.execution(name, device_id)
        except NotFoundError as error:
            raise NotFoundError(
                f"device {device_id} is not part of job {name}: {why_not_in(known, job, now)}"
            ) from error
        failed = [f for f in await store.failures(name, FAILURES_READ) if f.device_id == device_id]
    why = why_here(found, job, known, now)
    pairs: list[tuple[str, object]] = [("device", f"{device_id}, {known.device_type} at {known.site_id}")]
    pairs += [("state", f"{found.state}, attempt {found.execution_number} of {job.max_attempts}"), ("why", why)]
    names = ("queued_at", "started_at", "updated_at", "finished_at", "deadline_at", "retry_at", "status_details")
    pairs += [(field.replace("_", " "), getattr(found, field)) for field in names]
    shown = [facts(pairs), attempts_table(failed)] if failed else [facts(pairs)]
    session.out.result({**as_dict(found), "why": why, "failures": [as_dict(f) for f in failed]}, shown)


@command(app, "devices")
async def devices(
    session: Session,
    name: Name,
    status: Annotated[
        ExecutionState | None, typer.Option(metavar="STATE", help=f"One of {', '.join(ExecutionState)}.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most devices to show.")] = 100,
) -> None:
    """List a job's devices in their order."""
    async with session.database() as db:
        store = FleetJobStore(db)
        await store.get(name)
        found = await store.executions(name, status, limit)
    session.out.result({"devices": [as_dict(e) for e in found]}, [devices_table(found)] if found else [])
    session.out.say(f"{len(found)} device{'' if len(found) == 1 else 's'}")


@command(app, "failures")
async def failures(
    session: Session, name: Name, limit: Annotated[int, typer.Option(min=1, help="The last so many.")] = 100
) -> None:
    """List failed attempts, the newest first, also those that another attempt has followed."""
    async with session.database() as db:
        store = FleetJobStore(db)
        await store.get(name)
        found = await store.failures(name, limit)
    session.out.result({"failures": [as_dict(f) for f in found]}, [attempts_table(found)] if found else [])
    session.out.say(f"{len(found)} failed attempt{'' if len(found) == 1 else 's'}")


@command(app, "events")
async def events(
    session: Session, name: Name, limit: Annotated[int, typer.Option(min=1, help="The last so many.")] = 100
) -> None:
    """Show what happened to a job, when, and by whom."""
    async with session.database() as db:
        store = FleetJobStore(db)
        found = await store.events((await store.get(name)).job_no, limit)
    rows = [(when(e.at), e.wave, e.kind, e.actor, event_text(e)) for e in found]
    shown = table("", ("time", "wave", "kind", "by", "what"), rows, right=("wave",))
    session.out.result({"events": [as_dict(event) for event in found]}, shown)


# --- inside ----------------------------------------------------------------------------------------------------------


async def _steer(
    session: Session, name: str, send: Callable[[JobHandle], Awaitable[FleetJobStatus]], *, ends: bool = False
) -> None:
    """Send an operator's request to the workflow and show what it answers; one that `ends` the job, as it is from now on."""
    handle = fleet_job_handle(await session.temporal(), name)
    status = await steer(f"job {name}", send(handle), lambda: _not_running(session, name))
    if ends and status.outcome is None:
        said = f"canceled by {whoami()}; 'job watch {name}' shows the rest of it"
        status = status.model_copy(update={"phase": Phase.DRAINING, "reason": said})
    pairs = [("job", name), ("phase", status.phase), ("reason", status.reason)]
    session.out.result(status, facts(pairs))


async def _not_running(session: Session, name: str) -> RefusedError | NotFoundError:
    async with session.database() as db:
        return await why_not_running("job", name, FleetJobStore(db).get(name))
