"""`enrolment list | show | approve | reject | resolve`: devices that ask for their first certificate."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any

import typer
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from cli.command import Session, command, whoami
from cli.output import facts, table, when
from models.errors import InvalidInputError, NotFoundError, RefusedError, UnavailableError
from models.identity import Decision, EnrolmentState, EnrolmentView, ProvisionDeviceInput
from models.ids import provision_workflow_id
from store.engine import Database
from store.enrolments import EnrolmentStore
from workflows.client import MEMO_ENROLMENT, start_provisioning
from workflows.provisioning import ProvisioningWorkflow

app = typer.Typer(help="Enrolments: what devices asked for, and what a person decides.", no_args_is_help=True)

STOP_SECONDS = 60.0
"""How long a provisioning that is called off has to end; what it has done is undone before."""

Number = Annotated[int, typer.Argument(metavar="N", help="Number of the enrolment.")]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; for the audit.")]


@command(app, "list")
async def list_enrolments(
    session: Session,
    status: Annotated[
        EnrolmentState | None, typer.Option(metavar="STATUS", help=f"One of {', '.join(EnrolmentState)}.")
    ] = None,
    batch: Annotated[str | None, typer.Option(metavar="BATCH", help="Of this batch only.")] = None,
    serial: Annotated[str | None, typer.Option(metavar="SERIAL", help="Of this serial number only.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most enrolments to show.")] = 50,
) -> None:
    """List enrolments, the newest first."""
    async with session.database() as db:
        found = await EnrolmentStore(db).find(
            state=None if status is None else status.value, batch=batch, serial=serial, limit=limit
        )
    rows = [
        (e.enrolment_no, e.serial_number, e.batch, e.state, e.device_id, when(e.requested_at), e.decided_by, e.reason)
        for e in found
    ]
    columns = ("no", "serial number", "batch", "state", "device", "requested", "decided by", "reason")
    session.out.result(
        {"enrolments": [e.model_dump(mode="json") for e in found]},
        [table("", columns, rows, right=("no",))] if rows else [],
    )
    if not found:
        session.out.say("no enrolment")


@command(app, "show")
async def show(session: Session, number: Number) -> None:
    """Show an enrolment."""
    async with session.database() as db:
        found = await EnrolmentStore(db).get(number)
    _print(session, found)
    session.say_process(provision_workflow_id(found.serial_number))


@command(app, "approve")
async def approve(session: Session, number: Number, reason: Reason = "") -> None:
    """Let a device in that waits for a person."""
    await _decide(session, number, "approve", Decision(actor=whoami(), reason=reason))


@command(app, "reject")
async def reject(session: Session, number: Number, reason: Reason = "") -> None:
    """Refuse a device that waits for a person. The same key is refused from then on."""
    await _decide(session, number, "reject", Decision(actor=whoami(), reason=reason))


@command(app, "resolve")
async def resolve(
    session: Session,
    number: Number,
    accept: Annotated[
        bool | None,
        typer.Option(
            "--accept/--reject", help="Let the new key in and revoke what the old one has, or refuse the new key."
        ),
    ] = None,
    reason: Reason = "",
) -> None:
    """Decide about a second key for a serial number that is known.

    With --accept the device is the one with the new key: certificates of the old one are revoked at once, and the next
    request with the new key gets a certificate. With --reject everything stays as it is.
    """
    if accept is None:
        raise InvalidInputError("cannot resolve: expected --accept or --reject")
    async with session.database() as db:
        store = EnrolmentStore(db)
        if not accept:
            _print(session, await store.reject_conflict(number, whoami(), reason))
            return
        client = await session.temporal()
        found = await store.accept_conflict(number, whoami(), reason)
        await call_off(client, found)
        if found.state in (EnrolmentState.REQUESTED, EnrolmentState.WAITING):
            wanted = ProvisionDeviceInput(enrolment_no=number, serial_number=found.serial_number)
            await start_provisioning(client, wanted)
    _print(session, found)
    session.out.say(f"{found.serial_number} gets a certificate for its new key with its next request")


async def call_off(client: Client, accepted: EnrolmentView) -> None:
    """End the provisioning of another enrolment of this serial number, so that a new one can begin. Idempotent."""
    handle = client.get_workflow_handle(provision_workflow_id(accepted.serial_number))
    try:
        described = await handle.describe()
        if described.status is not WorkflowExecutionStatus.RUNNING:
            return
        if await described.memo_value(MEMO_ENROLMENT, None) == accepted.enrolment_no:
            return
        await handle.cancel()
        with suppress(WorkflowFailureError):
            await asyncio.wait_for(handle.result(), STOP_SECONDS)
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
    except TimeoutError as error:
        raise UnavailableError(
            f"the provisioning that runs for {accepted.serial_number} does not end: is a worker running? The decision "
            "stands; repeat the command"
        ) from error


async def _decide(session: Session, number: int, what: str, decision: Decision) -> None:
    updates: dict[str, Callable[[Any], Awaitable[None]]] = {
        "approve": lambda handle: handle.execute_update(ProvisioningWorkflow.approve, decision),
        "reject": lambda handle: handle.execute_update(ProvisioningWorkflow.reject, decision),
    }
    async with session.database() as db:
        found = await EnrolmentStore(db).get(number)
        if found.state is not EnrolmentState.WAITING:
            raise RefusedError(f"cannot {what} enrolment {number}: it is {found.state}, expected waiting")
        client = await session.temporal()
        handle = client.get_workflow_handle_for(ProvisioningWorkflow.run, provision_workflow_id(found.serial_number))
        try:
            await updates[what](handle)
        except WorkflowUpdateFailedError as error:
            cause = error.cause
            raise RefusedError(cause.message if isinstance(cause, ApplicationError) else str(cause)) from error
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            raise NotFoundError(
                f"cannot {what} enrolment {number}: its provisioning does not run; it begins again when the device asks"
            ) from error
        _print(session, await _settled(db, number))


async def _settled(db: Database, number: int) -> EnrolmentView:
    """The enrolment, once the process has done what was decided; it goes on by itself where that takes longer."""
    for _ in range(30):
        found = await EnrolmentStore(db).get(number)
        if found.state is not EnrolmentState.WAITING:
            break
        await asyncio.sleep(0.1)
    return found


def _print(session: Session, found: EnrolmentView) -> None:
    session.out.result(found, facts((name, getattr(found, name)) for name in EnrolmentView.model_fields))
