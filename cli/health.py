"""`health`, `device health`, `device-type list | set`: who is there, and how they are."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from cli.command import Session, command, whoami
from cli.device import app as devices
from cli.given import duration_of
from cli.output import ago, facts, rough, size, table, when
from cli.presence import presence_facts
from domain.presence import MAX_GAP
from models.errors import InvalidInputError
from models.health import DeviceTypeView, FleetHealth, HealthGroup
from models.quantities import format_duration
from store.health import HealthStore

app = typer.Typer(help="Device types: how long their devices may be silent.", no_args_is_help=True)

BESIDE_COURSE = 72
"""Columns that name and numbers of a measurement take beside its course."""
LEAST_COURSE = 8
_BARS = "▁▂▃▄▅▆▇█"
SETTING = "setting"
"""Written for a limit: what TIDEGATE_OFFLINE_MINUTES says."""


async def show_health(session: Session) -> None:
    """How the fleet is: online, offline, never heard, by site and type; and whether devices can be heard at all.

    A device is offline when it was silent beyond its limit while the gateway could hear it. Retired and barred devices
    are not counted.
    """
    async with session.database() as db:
        fleet = await HealthStore(db).fleet()
    now = datetime.now(UTC)
    columns = ("devices", "online", "offline", "never heard")
    shown = [
        facts(
            [
                ("devices", fleet.devices),
                ("online", fleet.online),
                ("offline", fleet.offline),
                ("never heard", fleet.never_heard),
                ("listening", _listening(fleet, now)),
            ]
        ),
        *(
            table("", (name, *columns), [_row(group) for group in groups], columns)
            for name, groups in (("site", fleet.sites), ("type", fleet.types))
            if groups
        ),
    ]
    session.out.result(fleet, shown)


@command(devices, "health")
async def show_device_health(
    session: Session,
    device_id: Annotated[str, typer.Argument(metavar="DEVICE", help="Device id.")],
    since: Annotated[str, typer.Option(metavar="DURATION", help="How far to look back.")] = "24h",
) -> None:
    """A device's heartbeats of some time: how many, how far apart, and what it measured."""
    async with session.database() as db:
        health = await HealthStore(db).device(device_id, duration_of("--since", since))
    now = datetime.now(UTC)
    longest = health.longest_silence_seconds
    shown = [
        facts(
            [
                *presence_facts(health.presence, timedelta(minutes=session.settings.offline_minutes), now),
                ("heartbeats", f"{health.heartbeats} since {when(health.since)}"),
                ("boots", health.boots),
                ("longest silence", None if longest is None else rough(timedelta(seconds=longest))),
            ]
        )
    ]
    if health.measurements:
        room = max(LEAST_COURSE, session.out.console.width - BESIDE_COURSE)
        rows = [
            (
                m.name,
                *(_number(m.name, value) for value in (m.least, m.mean, m.most, m.newest)),
                sparkline(narrowed(m.course, room)),
            )
            for m in health.measurements
        ]
        numbers = ("least", "mean", "most", "newest")
        shown.append(table("", ("measured", *numbers, f"last {since}"), rows, numbers))
    session.out.result(health, shown)


@command(app, "list")
async def list_device_types(session: Session) -> None:
    """List device types and how long their devices may be silent before they count as offline."""
    async with session.database() as db:
        types = await HealthStore(db).types()
    rows = [(t.device_type, t.devices, _limit(t, session)) for t in types]
    session.out.result(
        {"device_types": [t.model_dump() for t in types]},
        [table("", ("type", "devices", "offline after"), rows, ("devices",))] if rows else [],
    )
    session.out.say(f"{len(types)} type{'' if len(types) == 1 else 's'}")


@command(app, "set")
async def set_device_type(
    session: Session,
    device_type: Annotated[str, typer.Argument(metavar="TYPE", help="Device type.")],
    offline_after: Annotated[
        str,
        typer.Option(metavar="DURATION", help=f"Silence after which a device counts as offline; or '{SETTING}'."),
    ],
) -> None:
    """Say how long devices of a type may be silent. The next sweep, within a minute, goes by it."""
    limit = None if offline_after == SETTING else duration_of("--offline-after", offline_after)
    if limit is not None and limit < MAX_GAP:
        raise InvalidInputError(
            f"--offline-after: {offline_after} is too short, expected {format_duration(MAX_GAP)} or more: shorter gaps of "
            "the gateway itself cannot be told from a device's"
        )
    async with session.database() as db:
        await HealthStore(db).set_limit(device_type, limit, whoami())
    said = "as TIDEGATE_OFFLINE_MINUTES says" if limit is None else f"after {format_duration(limit)}"
    session.out.result(
        {"device_type": device_type, "offline_after_seconds": limit and limit.total_seconds()},
        f"devices of type {device_type} count as offline {said} of silence",
    )


def narrowed(course: Sequence[float | None], width: int) -> list[float | None]:
    """A course in at most so many points: neighbours become one, with the highest of their values.

    >>> narrowed([1, 2, None, 8, None, None, 5], 4)
    [2, 8, None, 5]
    """
    each = -(-len(course) // width)
    parts = [[value for value in course[at : at + each] if value is not None] for at in range(0, len(course), each)]
    return [max(part, default=None) for part in parts]


def sparkline(course: Sequence[float | None]) -> str:
    """A course as a line of bars, from its least to its most; a blank where nothing was said.

    >>> sparkline([1, 2, None, 8])
    '▁▂ █'
    """
    said = [value for value in course if value is not None]
    if not said:
        return ""
    least, span = min(said), max(said) - min(said)
    return "".join(
        " " if value is None else _BARS[0 if span == 0 else round((value - least) / span * (len(_BARS) - 1))]
        for value in course
    )


def _listening(fleet: FleetHealth, now: datetime) -> str:
    if fleet.pulsed_at is None:
        return "no: the gateway's pulse has never come"
    if not fleet.listening:
        return f"no: the gateway's last pulse came {ago(fleet.pulsed_at, now)}; nobody is declared offline meanwhile"
    return f"yes, without a gap since {when(fleet.covered_since)}"


def _row(group: HealthGroup) -> tuple[object, ...]:
    return group.name, group.devices, group.online, group.offline, group.never_heard


def _limit(view: DeviceTypeView, session: Session) -> str:
    if view.offline_after_seconds is None:
        return f"{rough(timedelta(minutes=session.settings.offline_minutes))} ({SETTING})"
    return rough(timedelta(seconds=view.offline_after_seconds))


def _number(name: str, value: float) -> str:
    return size(round(value)) if name == "freeMemory" else f"{value:.1f}".removesuffix(".0")
