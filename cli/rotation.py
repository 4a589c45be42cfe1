"""`rotation start | status`: the certificates of the whole fleet."""

from datetime import timedelta
from typing import Annotated

import typer
from temporalio.client import Client
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from cli.command import Session, command, whoami
from cli.following import temporal_if_there
from cli.output import facts, when
from models.errors import ConflictError
from models.lifecycle import RotateFleetInput
from store.rotation import RotationStore
from workflows.lifecycle_client import ROTATION_SCHEDULE, start_fleet_rotation
from workflows.options import KIND, KIND_ROTATION

app = typer.Typer(help="Certificates of the fleet: renew those that are due, see how they stand.", no_args_is_help=True)


@command(app, "start")
async def start(
    session: Session,
    everything: Annotated[bool, typer.Option("--all", help="Every certificate, not only those that are due.")] = False,
    per_minute: Annotated[int, typer.Option(min=1, max=60_000, metavar="N", help="Devices asked in a minute.")] = 60,
    site: Annotated[
        list[str] | None, typer.Option(metavar="SITE", help="Only at this site; repeat for several.")
    ] = None,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; kept with each rotation.")] = "",
) -> None:
    """Ask devices for new keys, those whose certificate ends first before others.

    A device that was asked, or got a certificate, within 24 hours is left alone. The hourly schedule does the same for
    what is due; this is for doing it now, faster, or for all.
    """
    asked = RotateFleetInput(
        actor=whoami(),
        reason=reason,
        everything=everything,
        sites=tuple(site or ()),
        per_minute=per_minute,
        overlap=timedelta(hours=session.settings.rotation_overlap_hours),
    )
    async with session.database() as db:
        due = await RotationStore(db).count_due(asked)
    try:
        handle = await start_fleet_rotation(await session.temporal(), asked)
    except WorkflowAlreadyStartedError as error:
        raise ConflictError("cannot start a rotation of the fleet: one that a person started runs already") from error
    minutes = -(-due // per_minute)
    text = (
        f"{due} device{'' if due == 1 else 's'} to be asked, {per_minute} per minute, in about {minutes} min"
        if due
        else "no device to ask: one that was asked, or got a certificate, within 24 h is left alone"
        if everything
        else "no device is due"
    )
    session.out.result({"workflow_id": handle.id, "due": due, "per_minute": per_minute}, text)


@command(app, "status")
async def status(session: Session) -> None:
    """Show how the fleet's certificates stand, and what is being done about it."""
    async with session.database() as db:
        figures = await RotationStore(db).figures()
    client = await temporal_if_there(session)
    running, next_sweep = await _processes(client) if client else (None, None)
    data = {**figures.model_dump(mode="json"), "rotations_running": running, "next_sweep": next_sweep}
    pairs: list[tuple[str, object]] = [
        ("valid", figures.valid),
        ("due", figures.due),
        ("of a former CA", figures.of_former_authorities),
        ("asked in 24 h", figures.asked),
        ("not seen yet", figures.unconfirmed),
        ("nearly over", figures.ending),
        ("none valid", figures.expired),
        ("next end", when(figures.next_end)),
        ("rotations running", running),
        ("next sweep", next_sweep),
    ]
    session.out.result(data, facts(pairs))


async def _processes(client: Client) -> tuple[int | None, str | None]:
    """How many rotations run, and when the schedule sweeps next; None where Temporal does not say."""
    try:
        counted = await client.count_workflows(f'{KIND.name} = "{KIND_ROTATION}" AND ExecutionStatus = "Running"')
        described = await client.get_schedule_handle(ROTATION_SCHEDULE).describe()
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return counted.count, None
        return None, None
    times = described.info.next_action_times
    return counted.count, when(times[0]) if times else None
