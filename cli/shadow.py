"""`shadow get | set | wait | delete | history | list`: what is wanted of a device, and what it says it is.

With `--wait` a workflow writes what is wanted and waits for the device's word: it goes on where this program ends.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from cli.command import Session, command, whoami
from cli.given import duration_of, object_in
from cli.output import ExitStatus, ago, table, when
from domain.shadow import Document
from domain.shadow_messages import Message, announce, delete_message, get_body
from domain.standing import why_not_want
from domain.strict_json import parse_object
from models.errors import InvalidInputError, NotFoundError, RefusedError, UnavailableError
from models.ids import SHADOW_NAME
from models.protocol import CONFIG_SHADOW
from models.shadow import SyncOutcome, SyncShadowInput, SyncShadowResult
from store.lifecycle import LifecycleStore
from store.shadows import (
    ShadowUpdate,
    delete_shadow,
    get_shadow,
    list_shadows,
    set_desired,
    shadow_history,
)
from transport.publisher import Publisher
from workflows.shadow_client import Sync, find_shadow_sync, start_shadow_sync

app = typer.Typer(
    help="Shadows: what is wanted of a device, what it says it is, and the difference.", no_args_is_help=True
)

DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="Device id.")]
NameOption = Annotated[
    str, typer.Option("--name", metavar="NAME", help="A named shadow; the classic one where not given.")
]
VersionOption = Annotated[
    int | None, typer.Option("--version", metavar="N", help="Only if the shadow is at this version.", min=0)
]
GRACE = timedelta(seconds=30)
"""Beyond the limit of a wait: for a worker that is restarted meanwhile."""


@command(app, "get")
async def get(session: Session, device_id: DeviceArgument, name: NameOption = "") -> None:
    """Show a shadow: what is wanted, what is reported, and what differs."""
    _check_name(name)
    async with session.database() as db, db.pool.connection() as connection:
        document = await get_shadow(connection, device_id, name)
    now = datetime.now(UTC)
    rows = [(path, *cells) for path, *cells in _lines(document, now)]
    columns = ("key", "wanted", "set", "reported", "said", "")
    shown = [table("", columns, rows)] if rows else []
    session.out.result({"device_id": device_id, "name": name, **get_body(document)}, shown)
    differs = len(_leaves(document.delta()))
    session.out.say(
        f"version {document.version}; "
        + (f"{differs} key{'' if differs == 1 else 's'} not as wanted" if differs else "the device is as it is wanted")
    )


@command(app, "set")
async def set_shadow(
    session: Session,
    device_id: DeviceArgument,
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="As in power=on led.level=3; JSON, or else text; KEY= takes the key out.",
            show_default=False,
        ),
    ] = None,
    unset: Annotated[list[str] | None, typer.Option("--unset", metavar="KEY", help="Take a key out. Repeat.")] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Merge this JSON object instead; - reads standard input.")
    ] = None,
    name: NameOption = "",
    version: VersionOption = None,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the audit.")] = "",
    wait: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Wait so long for the device to report it (else status 5).")
    ] = None,
) -> ExitStatus:
    """Change what is wanted of a device, and tell it.

    What is wanted stays wanted: a device that is away is given it when it comes back. With --wait it is also waited for,
    by a process of its own: if this command ends, the same command again, or 'shadow wait', joins it.
    """
    _check_name(name)
    patience = duration_of("--wait", wait)
    if bool(changes or unset) == (file is not None):
        raise InvalidInputError("cannot change a shadow: expected either KEY=VALUE and --unset KEY, or --file")
    patch = object_in(file, "a change") if file is not None else patch_of(changes or [], unset or [])
    if patience is None:
        return await _write(session, device_id, name, patch, version, reason)
    async with session.database() as db:
        await LifecycleStore(db).check(device_id, why_not_want)
    asked = SyncShadowInput(
        device_id=device_id,
        shadow=name,
        patch=patch,
        actor=whoami(),
        reason=reason,
        limit=patience,
        expected_version=version,
    )
    handle = await start_shadow_sync(await session.temporal(), asked)
    return await _await(session, handle, patience + GRACE)


@command(app, "wait")
async def wait_for_shadow(
    session: Session,
    device_id: DeviceArgument,
    token: Annotated[str, typer.Option("--token", metavar="TOKEN", help="As 'shadow set --wait' has said.")],
    name: NameOption = "",
    within: Annotated[str, typer.Option(metavar="DURATION", help="How long (else status 5).")] = "1d",
) -> ExitStatus:
    """Join a wait that 'shadow set --wait' has begun, or see how it has ended."""
    _check_name(name)
    handle = find_shadow_sync(await session.temporal(), device_id, name, token)
    try:
        await handle.describe()
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        raise NotFoundError(f"no wait {handle.id}: 'shadow set --wait' says the token of each as it begins") from error
    return await _await(session, handle, duration_of("--wait", within) or timedelta(days=1), joined=True)


@command(app, "delete")
async def delete(
    session: Session, device_id: DeviceArgument, name: NameOption = "", version: VersionOption = None
) -> None:
    """Delete a shadow, with all that is wanted and reported. Its version goes on for two days."""
    _check_name(name)
    async with session.database() as db, db.pool.connection() as connection:
        deleted = await delete_shadow(connection, device_id, name, whoami(), version)
    await _tell(session, device_id, [delete_message(device_id, name, deleted.before, deleted.at)])
    shown = {"device_id": device_id, "name": name, "version": deleted.before.version}
    session.out.result(shown, f"{_named(device_id, name)} is deleted; it was at version {deleted.before.version}")


@command(app, "history")
async def show_history(
    session: Session,
    device_id: DeviceArgument,
    name: NameOption = "",
    limit: Annotated[int, typer.Option(min=1, help="Most updates to show.")] = 20,
) -> None:
    """List what was accepted for a shadow, the newest first: by whom, and what was sent."""
    async with session.database() as db, db.pool.connection() as connection:
        found = await shadow_history(connection, device_id, name, limit)
    data = {
        "device_id": device_id,
        "name": name,
        "updates": [{"version": e.version, "at": e.at, "actor": e.actor, "change": e.change} for e in found],
    }
    rows = [(e.version, when(e.at), e.actor, "deleted" if e.change is None else json.dumps(e.change)) for e in found]
    columns = ("version", "at", "by", "update")
    session.out.result(data, [table("", columns, rows, right=("version",))] if rows else [])
    if not found:
        session.out.say(f"nothing has been accepted for the {_named(device_id, name)}, or all of it was long ago")


@command(app, "list")
async def list_of_device(session: Session, device_id: DeviceArgument) -> None:
    """List a device's shadows. That of its configuration is 'device configuration'."""
    async with session.database() as db, db.pool.connection() as connection:
        found = await list_shadows(connection, device_id)
    now, shown, rows = datetime.now(UTC), [], []
    for line in found:
        differs = len(_leaves(Document(line.desired, line.reported).delta()))
        shown.append({"name": line.name, "version": line.version, "updated_at": line.updated_at, "differs": differs})
        rows.append((line.name or "(classic)", line.version, ago(line.updated_at, now), differs or "in sync"))
    columns = ("shadow", "version", "updated", "differs")
    tables = [table("", columns, rows, right=("version", "differs"))] if rows else []
    session.out.result({"device_id": device_id, "shadows": shown}, tables)
    if not found:
        session.out.say(f"{device_id} has no shadow; 'shadow set {device_id} KEY=VALUE' makes one")


# --- inside ----------------------------------------------------------------------------------------------------------


async def _write(
    session: Session, device_id: str, name: str, patch: dict[str, Any], version: int | None, reason: str
) -> ExitStatus:
    async with session.database() as db, db.pool.connection() as connection:
        done = await set_desired(connection, device_id, name, patch, whoami(), version, reason)
    await _tell(session, device_id, _announced(device_id, name, done))
    delta = done.after.delta()
    data = {"device_id": device_id, "name": name, "version": done.after.version, "wanted": patch, "delta": delta}
    differs = f"; not reported yet: {json.dumps(delta)}" if delta else "; the device reports it already"
    session.out.result(data, f"{_named(device_id, name)} is at version {done.after.version}{differs}")
    return ExitStatus.SUCCEEDED


def _announced(device_id: str, name: str, done: ShadowUpdate) -> list[Message]:
    return announce(device_id, name, done.before, done.after, done.patch, done.at)


async def _tell(session: Session, device_id: str, messages: Sequence[Message]) -> None:
    """Publish what has been committed. It is a hint: without it the device sees it when it asks."""
    try:
        publisher = await Publisher.connect(session.settings)
    except (UnavailableError, InvalidInputError) as error:
        session.out.say(f"{device_id} was not told, and is given it when it asks: {error}")
        return
    try:
        for topic, payload in messages:
            await publisher.publish(topic, payload)
    finally:
        await publisher.close()


async def _await(session: Session, handle: Sync, patience: timedelta, *, joined: bool = False) -> ExitStatus:
    device_id, name, token = _parts(handle.id)
    again = f"shadow wait {device_id} --token {token}" + (f" --name {name}" if name else "")
    if not joined:
        session.out.say(f"waiting for {device_id}; should this end before it does, '{again}' joins")
        session.say_process(handle.id)
    result: SyncShadowResult | None = None
    with suppress(TimeoutError):
        result = await _result(handle, patience)
    if result is None:
        shown = {"device_id": device_id, "shadow": name, "workflow_id": handle.id, "outcome": None}
        session.out.result(shown, f"{handle.id} has no result yet: is a worker running? '{again}' joins it")
        return ExitStatus.WAITING
    session.out.result(result, result.reason)
    return {
        SyncOutcome.CONFIRMED: ExitStatus.SUCCEEDED,
        SyncOutcome.TIMED_OUT: ExitStatus.WAITING,
        SyncOutcome.REFUSED: ExitStatus.REFUSED,
    }[result.outcome]


async def _result(handle: Sync, patience: timedelta) -> SyncShadowResult:
    try:
        return await asyncio.wait_for(handle.result(), patience.total_seconds())
    except WorkflowFailureError as error:
        cause = error.cause.__cause__ or error.cause
        said = cause.message if isinstance(cause, ApplicationError) else str(cause)
        raise RefusedError(f"{handle.id} ended without a result: {said}") from error


def _parts(workflow_id: str) -> tuple[str, str, str]:
    device_id, name, token = workflow_id.removeprefix("shadow:").split("/")
    return device_id, name, token


def patch_of(changes: Sequence[str], unset: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` changes as a patch; dots lead into objects, `KEY=` and null take a key out.

    >>> patch_of(["power=on", "led.level=3", "led.on=true", "old="], ["door.lock"])
    {'power': 'on', 'led': {'level': 3, 'on': True}, 'old': None, 'door': {'lock': None}}
    """
    patch: dict[str, Any] = {}
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals:
            raise InvalidInputError(f"not a change: {change!r}, expected KEY=VALUE, as in power=on or led.level=3")
        _put(patch, path, _value(text) if text else None)
    for path in unset:
        _put(patch, path, None)
    try:
        return parse_object(json.dumps(patch))
    except ValueError as error:
        raise InvalidInputError(f"cannot use the changes: {error}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _put(patch: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    if not all((*above, last)):
        raise InvalidInputError(f"not a key: {path!r}, expected names with dots between them, as in led.level")
    inner = patch
    for key in above:
        inner = inner.setdefault(key, {})
        if not isinstance(inner, dict):
            raise InvalidInputError(f"cannot change {path!r}: {key!r} is given a value of its own as well")
    if last in inner:
        raise InvalidInputError(f"cannot change {path!r}: it is given twice, expected once")
    inner[last] = value


def _check_name(name: str) -> None:
    if name == CONFIG_SHADOW:
        raise InvalidInputError(
            "the shadow config is a device's configuration; use 'device configuration' and 'device configure'"
        )
    if name and not SHADOW_NAME.fullmatch(name):
        raise InvalidInputError(
            f"not a shadow's name: {name!r}, expected 1 to 64 of the characters $ a-z A-Z 0-9 : _ -"
        )


def _named(device_id: str, name: str) -> str:
    return f"shadow {name} of {device_id}" if name else f"shadow of {device_id}"


def _leaves(state: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Values by path; arrays are whole."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = value
    return found


def _lines(document: Document, now: datetime) -> Iterator[tuple[str, ...]]:
    """A row for each key on either side, in the order in which they are wanted."""
    wanted, reported = _leaves(document.desired or {}), _leaves(document.reported or {})
    differs = _leaves(document.delta())
    for path in [*wanted, *(path for path in reported if path not in wanted)]:
        yield (
            path,
            json.dumps(wanted[path]) if path in wanted else "",
            _since(document.desired_metadata, path, now) if path in wanted else "",
            json.dumps(reported[path]) if path in reported else "",
            _since(document.reported_metadata, path, now) if path in reported else "",
            "differs" if path in differs else "",
        )


def _since(metadata: Any, path: str, now: datetime) -> str:
    """When a leaf was set; of an array, its first element."""
    for key in path.split("."):
        metadata = metadata.get(key) if isinstance(metadata, Mapping) else None
    while isinstance(metadata, list) and metadata:
        metadata = metadata[0]
    at = metadata.get("timestamp") if isinstance(metadata, Mapping) else None
    return ago(datetime.fromtimestamp(at, UTC), now) if isinstance(at, int) else ""
