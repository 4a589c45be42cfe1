"""`job schedule create | list | pause | resume | trigger | delete`: jobs that start by the clock."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.command import Session, command, whoami
from cli.output import as_dict, facts, table, when
from cli.spec import load_spec
from models.fleetjob import JobScheduleView
from models.jobspec import FleetJobSpec
from workflows.fleet_jobs_client import (
    create_job_schedule,
    delete_job_schedule,
    list_job_schedules,
    pause_job_schedule,
    trigger_job_schedule,
    unpause_job_schedule,
)

app = typer.Typer(help="Jobs that start by the clock.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The schedule's name.")]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; kept as the schedule's note.")]


@command(app, "create")
async def create(
    session: Session,
    name: Name,
    spec: Annotated[
        Path,
        typer.Argument(
            metavar="SPEC.yaml", help="What each run does; its name is replaced, start_at and end_at stay out."
        ),
    ],
    cron: Annotated[str, typer.Option(metavar="'M H D M W'", help="When: five fields, as in '0 2 * * *'.")],
    timezone: Annotated[str, typer.Option(metavar="ZONE", help="Whose clock: Europe/Berlin.")] = "UTC",
) -> None:
    """Start a job at these times: NAME-<time>. While one runs, the next is left out."""
    asked = load_spec(spec, FleetJobSpec)
    client = await session.temporal()
    await create_job_schedule(client, name, asked, cron=cron, timezone=timezone, actor=whoami())
    found = next((view for view in await list_job_schedules(client) if view.name == name), None)
    next_run = found.next_runs[0] if found and found.next_runs else None
    made: dict[str, Any] = {"name": name, "cron": cron, "timezone": timezone, "operation": asked.operation}
    pairs = [
        ("schedule", name),
        ("operation", asked.operation),
        ("when", f"{cron} ({timezone})"),
        ("next run", next_run),
    ]
    session.out.result({**made, "next_run": next_run}, facts(pairs))


@command(app, "list")
async def list_schedules(session: Session) -> None:
    """List schedules with their next run, and the jobs of the last ones."""
    found = await list_job_schedules(await session.temporal())
    columns = ("schedule", "operation", "when", "state", "next run", "last jobs", "note")
    rows = [_row(view) for view in found]
    session.out.result({"schedules": [as_dict(view) for view in found]}, [table("", columns, rows)] if rows else [])
    if not found:
        session.out.say("no schedule; 'job schedule create NAME SPEC.yaml --cron ...' makes one")


@command(app, "pause")
async def pause(session: Session, name: Name, reason: Reason = "") -> None:
    """Start no further run until resumed; one that runs goes on."""
    await pause_job_schedule(await session.temporal(), name, actor=whoami(), reason=reason)
    session.out.result({"name": name, "paused": True}, f"schedule {name} is paused")


@command(app, "resume")
async def resume(session: Session, name: Name, reason: Reason = "") -> None:
    """Start runs again, from the next time on."""
    await unpause_job_schedule(await session.temporal(), name, actor=whoami(), reason=reason)
    session.out.result({"name": name, "paused": False}, f"schedule {name} runs again")


@command(app, "trigger")
async def trigger(session: Session, name: Name) -> None:
    """Start a run now, unless one runs."""
    await trigger_job_schedule(await session.temporal(), name)
    session.out.result(
        {"name": name, "triggered": True}, f"schedule {name} starts a run now, unless one runs; 'job list' shows it"
    )


@command(app, "delete")
async def delete(session: Session, name: Name) -> None:
    """Remove a schedule: no further run; one that runs goes on."""
    await delete_job_schedule(await session.temporal(), name)
    session.out.result({"name": name, "deleted": True}, f"schedule {name} is deleted")


def _row(view: JobScheduleView) -> tuple[object, ...]:
    next_run = "" if view.paused or not view.next_runs else when(view.next_runs[0])
    state = "paused" if view.paused else "active"
    return (
        view.name,
        view.operation,
        f"{view.cron} ({view.timezone})",
        state,
        next_run,
        view.last_runs[-3:],
        view.note,
    )
