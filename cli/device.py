"""`device import | list | show | lookup | enroll`: the registry, and a device played by hand."""

import asyncio
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from pydantic import ValidationError

from cli.command import Session, command
from cli.given import duration_of
from cli.output import ago, facts, printable, table
from cli.presence import presence_facts
from domain.device_rows import MAX_LINE_BYTES, Format, format_of
from domain.mistakes import faults_of, path_of
from models.device import DeviceFacts, DeviceFilter, DeviceStatus
from models.errors import InvalidInputError, Mistake, NotFoundError, SpecError
from models.health import DeviceShown
from models.quantities import parse_duration
from store.health import HealthStore
from store.registry import Registry
from store.shadows import list_shadows

app = typer.Typer(
    help="Devices: import, list, show, look up, enrol one by hand, configure, rotate, decommission.",
    no_args_is_help=True,
)

LOOKUP_SECONDS = 1.0
"""For Redis: a command looks up once, over a connection that it has yet to make."""
_TAG = re.compile(r"\s*([^<>=!]+?)\s*(<=|>=|!=|=|<|>)\s*(.*)", re.DOTALL)


@command(app, "import")
async def import_devices(
    session: Session,
    file: Annotated[str, typer.Argument(help="CSV or JSON lines, one device each; - reads standard input.")],
    form: Annotated[
        Format | None, typer.Option("--format", help="Taken from the ending or the first byte where not given.")
    ] = None,
) -> None:
    """Create and update devices from a file: all of it, or nothing.

    A CSV needs the columns device_id, device_type, serial_number and site_id; others are manufacturer, zone, status,
    firmware_version, firmware_sha256, config, and tags.KEY (or tags with k=v;k=v). A column that is missing, or a cell
    that is empty, leaves what the registry has. Importing a file again updates.
    """
    with _opened(file) as stream:
        lines = _lines(stream)
        first = next(lines, b"")
        async with session.database() as db:
            result = await Registry(db).import_devices(
                _with_first(first, lines), file if file != "-" else "standard input", form or format_of(file, first)
            )
    text = f"{result.rows} devices: {result.created} created, {result.updated} updated, {result.unchanged} unchanged"
    session.out.result(result, text)


@command(app, "list")
async def list_devices(
    session: Session,
    type_: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help="Device type, the hardware releases are for.")
    ] = None,
    site: Annotated[list[str] | None, typer.Option(metavar="SITE", help="Site; repeat for any of several.")] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(metavar="TAG=VALUE", help="Tag; also TAG<VALUE, <=, >, >=, != as text. Repeat: all must match."),
    ] = None,
    status: Annotated[
        list[DeviceStatus] | None,
        typer.Option(metavar="STATUS", help=f"One of {', '.join(DeviceStatus)}; repeat for any of several."),
    ] = None,
    version: Annotated[
        list[str] | None, typer.Option(metavar="VERSION", help="Firmware version; repeat for any of several.")
    ] = None,
    id_: Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="Device id; repeat for several.")] = None,
    inactive: Annotated[str | None, typer.Option(metavar="DURATION", help="No heartbeat for so long: 30m.")] = None,
    drifted: Annotated[
        bool, typer.Option("--drifted", help="Only those that run another configuration than they should.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Only those that are silent beyond their type's limit.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="Most devices to show; 0 only counts.")] = 50,
    after: Annotated[str | None, typer.Option(metavar="ID", help="Begin behind this device id.")] = None,
) -> None:
    """List devices: all that are not retired, or those that match every option given."""
    devices = filter_of(type_, site or [], tag or [], status or [], version or [], id_ or [], inactive)
    async with session.database() as db:
        page = await Registry(db).find(devices, limit=limit, after=after, drifted=drifted, offline=offline)
    now = datetime.now(UTC)
    rows = [
        (
            d.device_id,
            d.device_type,
            d.site_id,
            d.zone,
            d.status,
            d.firmware_version,
            ago(d.last_heartbeat, now),
            d.tags,
        )
        for d in page.devices
    ]
    columns = ("device", "type", "site", "zone", "status", "firmware", "heartbeat", "tags")
    session.out.result(page, [table("", columns, rows)] if rows else [])
    if len(page.devices) < page.total:
        more = (
            f"; the next begin with --after {printable(page.devices[-1].device_id)}" if page.devices and limit else ""
        )
        session.out.say(f"{len(page.devices)} of {page.total} devices{more}")
    else:
        session.out.say(f"{page.total} device{'' if page.total == 1 else 's'}")


@command(app, "show")
async def show_device(
    session: Session,
    device_id: Annotated[str | None, typer.Argument(help="Device id.")] = None,
    serial: Annotated[str | None, typer.Option(help="Find it by its serial number instead.")] = None,
) -> None:
    """Show everything the registry has on one device."""
    if (device_id is None) == (serial is None):
        raise InvalidInputError("cannot show a device: expected either a device id or --serial")
    async with session.database() as db:
        registry = Registry(db)
        device = await (registry.get(device_id) if device_id is not None else registry.get_by_serial(serial or ""))
        presence = await HealthStore(db).presence(device.device_id)
        async with db.pool.connection() as connection:
            shadows = await list_shadows(connection, device.device_id)
    limit, now = timedelta(minutes=session.settings.offline_minutes), datetime.now(UTC)
    session.out.result(
        DeviceShown(**device.model_dump(), presence=presence),
        facts([*_facts_of(device), *presence_facts(presence, limit, now)]),
    )
    if shadows:
        session.out.say(f"its shadows: 'shadow list {device.device_id}'")


@command(app, "lookup")
async def look_up_device(
    session: Session,
    device_id: Annotated[str | None, typer.Argument(help="Device id.")] = None,
    serial: Annotated[str | None, typer.Option(help="Find it by its serial number instead.")] = None,
) -> None:
    """Look a device up as programs do: in Redis where TIDEGATE_REDIS_URL is set and a worker keeps it right.

    Says where the answer came from (source: redis or postgresql) and why. It has no heartbeat, which is never cached, and
    may be two seconds old; 'device show' asks the registry itself.
    """
    from store.lookup import DeviceLookup  # the client of Redis takes a while to import

    if (device_id is None) == (serial is None):
        raise InvalidInputError("cannot look a device up: expected either a device id or --serial")
    async with session.database() as db:
        lookup = DeviceLookup(db, session.settings.redis_url, timeout_seconds=LOOKUP_SECONDS)
        try:
            found = await (lookup.get(device_id) if device_id is not None else lookup.get_by_serial(serial or ""))
        finally:
            await lookup.close()
    shown = [*_facts_of(found.device), ("source", f"{found.source}: {found.why}")]
    session.out.result(found, facts(shown))


@command(app, "enroll")
async def enroll_device(
    session: Session,
    serial: Annotated[str, typer.Argument(metavar="SERIAL", help="Serial number.")],
    claim: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory with claim.key, claim.pem and ca.pem, of 'claim create'.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Gets key.pem, cert.pem, ca.pem and thing-name.")],
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Enrolment server (TIDEGATE_ENROLMENT_URL).", show_default=False),
    ] = None,
    wait: Annotated[
        str, typer.Option(metavar="DURATION", help="How long to ask again while it waits (else status 5).")
    ] = "60s",
) -> None:
    """Play a device by hand: make a key, ask for a certificate with a claim certificate, and keep both.

    Repeat it after an interruption: the key that is there is used again.
    """
    from cli.enroll import enroll

    address = url or session.enrolment_url()
    seconds = duration_of("--wait", wait).total_seconds()
    made = await asyncio.to_thread(enroll, address, serial, claim, out, seconds, session.out.say)
    session.out.result(
        {
            "device_id": made.device_id,
            "expires": made.expires,
            "key": str(made.key),
            "certificate": str(made.certificate),
            "ca": str(made.ca),
        },
        facts(
            [
                ("thing name", made.device_id),
                ("certificate", f"{made.certificate}, until {made.expires}"),
                ("key", f"{made.key} (keep it secret)"),
                ("ca", made.ca),
            ]
        ),
    )
    host, port = session.endpoints.mqtt_host or "BROKER", session.endpoints.mqtt_port or 8883
    session.out.say(
        f"next: connect with any MQTT client, as in\n  mosquitto_pub -h {host} -p {port} --cafile {made.ca} "
        f"--cert {made.certificate} --key {made.key} -i {made.device_id} -q 1 -t 'devices/{made.device_id}/heartbeat' "
        f'-m \'{{"deviceId": "{made.device_id}", "uptime": 1}}\''
    )


def filter_of(
    type_: str | None,
    site: list[str],
    tag: list[str],
    status: list[DeviceStatus],
    version: list[str],
    id_: list[str],
    inactive: str | None,
    doing: str = "list devices",
) -> DeviceFilter:
    """The options of `device list`, and of others, as a filter; raises SpecError naming each option that is wrong."""
    tags: dict[str, str] = {}
    for written in tag:
        key, condition = tag_of(written)
        if key in tags:
            raise InvalidInputError(f"cannot {doing}: --tag {printable(key)} is given twice, expected once")
        tags[key] = condition
    try:
        minutes = None if inactive is None else max(1, -(-int(parse_duration(inactive).total_seconds()) // 60))
        return DeviceFilter(
            type=type_,
            sites=tuple(site),
            tags=tags,
            statuses=tuple(status),
            versions=tuple(version),
            ids=tuple(id_),
            inactive_minutes=minutes,
        )
    except ValidationError as error:
        raise SpecError("options", [Mistake(path_of(f.where), f.message) for f in faults_of(error)]) from error
    except (ValueError, OverflowError) as error:
        raise InvalidInputError(f"cannot {doing}: --inactive: {error}") from error


def tag_of(written: str) -> tuple[str, str]:
    """A `--tag` as key and condition of a filter.

    >>> tag_of("environment=production"), tag_of("maintenance-due < 2026-03-12")
    (('environment', 'production'), ('maintenance-due', '<2026-03-12'))
    """
    match = _TAG.fullmatch(written)
    if match is None:
        raise InvalidInputError(f"not a tag: {written!r}, expected TAG=VALUE, or one of < <= > >= != between the two")
    key, operator, value = match.groups()
    return key, value if operator == "=" else operator + value


def _facts_of(device: DeviceFacts) -> Iterator[tuple[str, object]]:
    for name in type(device).model_fields:
        if name in ("last_heartbeat", "uptime", "offline_since"):
            continue  # presence says it, with all else that the device said
        value = getattr(device, name)
        if isinstance(value, dict):
            for key, inner in value.items():
                yield f"{name}.{printable(key)}", inner
        else:
            yield name, value


def _opened(file: str) -> BinaryIO:
    if file == "-":
        return sys.stdin.buffer
    try:
        return Path(file).open("rb")
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot import {file}: there is no such file") from error
    except OSError as error:
        raise InvalidInputError(f"cannot import {file}: {error.strerror}") from error


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines of at most MAX_LINE_BYTES + 1 bytes; what a longer one has more is skipped, so that it is never held."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES + 1)


def _with_first(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest
