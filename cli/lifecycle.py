"""`device configure | configuration | rotate | certificates | revoke | unbar | decommission | release`: a device's life.

What takes time is a workflow: these commands start it and leave, or wait for its end with `--wait`.
"""

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from cli.command import Session, command, whoami
from cli.device import app as app
from cli.given import duration_of, object_in
from cli.output import ExitStatus, ago, facts, rough, table, when
from domain.configurations import DeviceConfig
from domain.standing import Standing, why_not_configure, why_not_decommission, why_not_rotate
from models.errors import ConflictError, InvalidInputError, RefusedError
from models.identity import (
    CertificateView,
    ConfigureDeviceInput,
    ConfigureDeviceResult,
    ConfigureOutcome,
    DecommissionDeviceInput,
    RevocationReason,
    RotateCertificateInput,
    RotateOutcome,
)
from models.ids import decommission_workflow_id
from store.configuring import ConfiguringStore
from store.engine import Database
from store.lifecycle import LifecycleStore
from workflows.lifecycle_client import start_configuration, start_decommission, start_rotation, trigger_crl_upkeep

DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="Device id.")]
ReasonOption = Annotated[str, typer.Option(metavar="TEXT", help="Why, for the audit.")]


# --- configuration ---------------------------------------------------------------------------------------------------


@command(app, "configure")
async def configure_device(
    session: Session,
    device_id: DeviceArgument,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one key of what is wanted, as in led.on=true; JSON, or else text; null takes it out. Repeat.",
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The whole configuration, a JSON object; - reads standard input.")
    ] = None,
    reason: ReasonOption = "",
    limit: Annotated[str, typer.Option(metavar="DURATION", help="How long to remind the device.")] = "24h",
    wait: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Wait so long for the device to report it (else status 5).")
    ] = None,
) -> ExitStatus:
    """Want a configuration of a device, and see to it that it takes it.

    A newer configuration replaces what is waited for. It stays wanted, however long the device takes.
    """
    if (set_ is None) == (file is None):
        raise InvalidInputError(
            "cannot configure a device: expected either --set KEY=VALUE, as often as needed, or --file"
        )
    patience, lasting = duration_of("--wait", wait), duration_of("--limit", limit) or timedelta(hours=24)
    async with session.database() as db:
        await LifecycleStore(db).check(device_id, why_not_configure)
        config = object_in(file, "a configuration") if file is not None else await _changed(db, device_id, set_ or [])
    asked = ConfigureDeviceInput(device_id=device_id, config=config, actor=whoami(), reason=reason, limit=lasting)
    handle = await start_configuration(await session.temporal(), asked)
    result = await _result(handle, patience)
    if result is None:
        shown = {"device_id": device_id, "workflow_id": handle.id, "config": config, "outcome": None}
        session.out.result(
            shown, f"{device_id} is asked to take the configuration; 'device configuration {device_id}' shows it"
        )
        session.say_process(handle.id)
        return ExitStatus.WAITING if patience else ExitStatus.SUCCEEDED
    session.out.result(result, f"{device_id}: {result.reason}")
    return _status_of(result)


@command(app, "configuration")
async def show_configuration(
    session: Session,
    device_id: DeviceArgument,
    limit: Annotated[int, typer.Option(min=1, help="Most versions to show.")] = 20,
) -> None:
    """Show what was wanted of a device, what it runs, and whether the two agree."""
    async with session.database() as db:
        config, versions = await ConfiguringStore(db).history(device_id, limit)
    data = {
        **_shown_config(config),
        "versions": [view.model_dump(mode="json", exclude={"device_id"}) for view in versions],
    }
    rows = [
        (v.version, when(v.created_at), v.actor, when(v.acknowledged_at), v.reason, json.dumps(v.config))
        for v in versions
    ]
    columns = ("version", "wanted", "by", "taken", "reason", "configuration")
    tables = [table("", columns, rows, right=("version",))] if rows else []
    session.out.result(data, [facts(_facts_of_config(config)), *tables])


# --- certificates ----------------------------------------------------------------------------------------------------


@command(app, "certificates")
async def show_certificates(session: Session, device_id: DeviceArgument) -> None:
    """List a device's certificates, the newest first."""
    async with session.database() as db:
        found = await LifecycleStore(db).certificates(device_id)
    now = datetime.now(UTC)
    rows = [
        (c.generation, c.certificate_id[:16], _state(c, now), when(c.issued_at), when(c.confirmed_at), when(c.not_after),
         rough(c.not_after - now) if c.not_after > now else "", c.revocation_reason)
        for c in found
    ]  # fmt: skip
    columns = ("no", "certificate", "state", "issued", "seen", "ends", "left", "revoked for")
    shown = [table("", columns, rows, right=("no",))] if rows else []
    session.out.result({"certificates": [c.model_dump(mode="json") for c in found]}, shown)
    if not found:
        session.out.say(f"{device_id} has no certificate; 'device enroll' gets one by hand")


@command(app, "rotate")
async def rotate_device(
    session: Session,
    device_id: DeviceArgument,
    reason: ReasonOption = "",
    renew_within: Annotated[str, typer.Option(metavar="DURATION", help="How long the device has to come.")] = "7d",
    overlap: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="How long both certificates may be valid (TIDEGATE_ROTATION_OVERLAP_HOURS).",
            show_default=False,
        ),
    ] = None,
    wait: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Wait so long for the end of it (else status 5).")
    ] = None,
) -> ExitStatus:
    """Ask a device for a new key, and replace its certificate.

    The old certificate is revoked when the new one has been seen to connect; the new one, when it has not.
    """
    patience = duration_of("--wait", wait)
    request = RotateCertificateInput(
        device_id=device_id,
        actor=whoami(),
        reason=reason,
        renew_within=duration_of("--renew-within", renew_within) or timedelta(days=7),
        overlap=duration_of("--overlap", overlap) or timedelta(hours=session.settings.rotation_overlap_hours),
    )
    await _check(session, device_id, why_not_rotate)
    try:
        handle = await start_rotation(await session.temporal(), request)
    except WorkflowAlreadyStartedError as error:
        raise ConflictError(f"cannot rotate the certificate of {device_id}: a rotation of it runs already") from error
    result = await _result(handle, patience)
    if result is None:
        shown = {"device_id": device_id, "workflow_id": handle.id, "outcome": None}
        session.out.result(
            shown, f"{device_id} is asked for a new key; 'device certificates {device_id}' shows what comes"
        )
        session.say_process(handle.id)
        return ExitStatus.WAITING if patience else ExitStatus.SUCCEEDED
    session.out.result(result, f"{device_id}: {result.outcome}: {result.reason}")
    return {
        RotateOutcome.ROTATED: ExitStatus.SUCCEEDED,
        RotateOutcome.REFUSED: ExitStatus.REFUSED,
        RotateOutcome.UNANSWERED: ExitStatus.WAITING,
    }.get(result.outcome, ExitStatus.ERROR)


@command(app, "revoke")
async def revoke_device(
    session: Session,
    device_id: DeviceArgument,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the audit.")],
    code: Annotated[
        RevocationReason,
        typer.Option("--code", metavar="CODE", help=f"RFC 5280's word: {', '.join(RevocationReason)}."),
    ] = RevocationReason.PRIVILEGE_WITHDRAWN,
) -> None:
    """Revoke all certificates of a device: from now on nothing that it says is used. It stays in the registry."""
    async with session.database() as db:
        revoked = await LifecycleStore(db).revoke(device_id, code, whoami(), reason)
    if revoked:
        await _sign_soon(session)
    text = (
        f"{device_id}: {_many(len(revoked), 'certificate')} revoked, and nothing that it says is used"
        if revoked
        else f"{device_id} had no valid certificate"
    )
    session.out.result({"device_id": device_id, "revoked": revoked}, text)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


@command(app, "unbar")
async def unbar_device(
    session: Session,
    device_id: DeviceArgument,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the audit.")],
) -> None:
    """Use again what a barred device says, as after a false alarm. It needs a certificate that is still valid."""
    async with session.database() as db:
        await LifecycleStore(db).unbar(device_id, whoami(), reason)
    session.out.result({"device_id": device_id, "barred": False}, f"{device_id}: what it says is used again")


# --- the end ---------------------------------------------------------------------------------------------------------


@command(app, "decommission")
async def decommission_device(
    session: Session,
    device_id: DeviceArgument,
    reason: ReasonOption = "",
    wipe_within: Annotated[
        str, typer.Option(metavar="DURATION", help="How long the device has to wipe its credentials; 0: do not ask.")
    ] = "10m",
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is done.")] = False,
) -> ExitStatus:
    """End a device: out of every rollout, credentials wiped if it answers, revoked, retired, its serial number buried."""
    within = duration_of("--wipe-within", wipe_within)
    assert within is not None
    request = DecommissionDeviceInput(device_id=device_id, actor=whoami(), reason=reason, wipe_within=within)
    client = await session.temporal()
    running = client.get_workflow_handle(decommission_workflow_id(device_id))
    try:
        await _check(session, device_id, why_not_decommission)
        handle = await start_decommission(client, request)
    except WorkflowAlreadyStartedError as error:
        raise ConflictError(
            f"cannot decommission {device_id}: that is under way already; see {session.ui_link(running.id) or running.id}"
        ) from error
    if not wait:
        shown = {"device_id": device_id, "workflow_id": handle.id, "retired": False}
        session.out.result(
            shown, f"{device_id} is being decommissioned; 'device show {device_id}' says when it is retired"
        )
        session.say_process(handle.id)
        return ExitStatus.SUCCEEDED
    result = await _result(handle, timedelta(days=1))
    if result is None:
        return ExitStatus.WAITING
    text = (
        f"{device_id} is retired: {_many(result.certificates_revoked, 'certificate')} revoked, "
        f"{_many(result.executions_removed, 'update')} stopped; {result.reason}"
    )
    session.out.result(result, text)
    return ExitStatus.SUCCEEDED


@command(app, "release")
async def release_serial(
    session: Session,
    serial: Annotated[str, typer.Argument(metavar="SERIAL", help="Serial number of a decommissioned device.")],
    reason: ReasonOption = "",
) -> None:
    """Let the serial number of a decommissioned device enrol again."""
    async with session.database() as db:
        device_id = await LifecycleStore(db).release(serial, whoami(), reason)
    shown = {"serial_number": serial, "device_id": device_id}
    session.out.result(shown, f"{serial} may enrol again; it was the serial number of {device_id}")


# --- inside ----------------------------------------------------------------------------------------------------------


async def _check(session: Session, device_id: str, why_not: Callable[[Standing], str | None]) -> None:
    async with session.database() as db:
        await LifecycleStore(db).check(device_id, why_not)


async def _result(handle: WorkflowHandle[Any, Any], patience: timedelta | None) -> Any:
    """The workflow's result; None when it has none within `patience`, or nobody is to wait."""
    if patience is None:
        return None
    try:
        return await asyncio.wait_for(handle.result(), patience.total_seconds())
    except TimeoutError:
        return None
    except WorkflowFailureError as error:
        cause = error.cause.__cause__ or error.cause
        said = cause.message if isinstance(cause, ApplicationError) else str(cause)
        raise RefusedError(f"{handle.id} ended without a result: {said}") from error


async def _sign_soon(session: Session) -> None:
    """Have a revocation list signed now. The engine and the brokers' ACL act without one."""
    try:
        await trigger_crl_upkeep(await session.temporal())
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        session.out.say("no schedule signs revocation lists here; 'ca crl --sign' signs one")


async def _changed(db: Database, device_id: str, changes: list[str]) -> dict[str, Any]:
    """What is wanted now, with the changes: read and written apart, so of two at one time the last one stands."""
    config, _ = await ConfiguringStore(db).history(device_id, 1)
    return changed_config(config.desired or {}, changes)


def changed_config(before: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """A configuration with `KEY=VALUE` changes; dots lead into objects, null takes a key out.

    >>> changed_config({"led": {"on": True}, "unit": "C"}, ["led.on=false", "interval=5", "unit=null", "name=pump a"])
    {'led': {'on': False}, 'interval': 5, 'name': 'pump a'}
    """
    config: dict[str, Any] = json.loads(json.dumps(before))
    for change in changes:
        path, equals, text = change.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise InvalidInputError(f"not a change: {change!r}, expected KEY=VALUE, as in interval=5 or led.on=true")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        inner = config
        for key in keys[:-1]:
            found = inner.get(key)
            inner[key] = found if isinstance(found, dict) else {}
            inner = inner[key]
        if value is None:
            inner.pop(keys[-1], None)
        else:
            inner[keys[-1]] = value
    return config


def _status_of(result: ConfigureDeviceResult) -> ExitStatus:
    return {
        ConfigureOutcome.APPLIED: ExitStatus.SUCCEEDED,
        ConfigureOutcome.TIMED_OUT: ExitStatus.WAITING,
        ConfigureOutcome.REFUSED: ExitStatus.REFUSED,
    }[result.outcome]


def _shown_config(config: DeviceConfig) -> dict[str, Any]:
    return {
        "device_id": config.device_id,
        "state": config.state,
        "wanted_version": config.desired_version,
        "wanted": config.desired,
        "reported_version": config.reported_version,
        "reported": config.reported,
    }


def _facts_of_config(config: DeviceConfig) -> list[tuple[str, object]]:
    reported = datetime.fromtimestamp(config.reported_at, UTC) if config.reported_at else None
    return [
        ("device", config.device_id),
        ("state", config.state),
        ("wanted", f"version {config.desired_version}" if config.desired_version else "nothing"),
        ("runs", f"version {config.reported_version}" if reported else "has not said"),
        ("reported", ago(reported, datetime.now(UTC))),
    ]


def _state(certificate: CertificateView, now: datetime) -> str:
    if certificate.state == "valid" and certificate.not_after <= now:
        return "ended"
    return certificate.state
