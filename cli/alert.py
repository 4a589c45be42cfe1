"""`alert list | acknowledge | resolve`: what a person has to look at."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated

import typer

from cli.command import Session, command, whoami
from cli.output import ago, as_dict, table
from models.identity import AlertView
from store.alerts import AlertStore

app = typer.Typer(help="Alerts: list, acknowledge, resolve.", no_args_is_help=True)

Numbers = Annotated[list[int], typer.Argument(metavar="NO...", help="Numbers of alerts, as 'alert list' shows them.")]


@command(app, "list")
async def list_alerts(
    session: Session,
    everything: Annotated[bool, typer.Option("--all", help="Also those that are resolved.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Most alerts to show.")] = 50,
) -> None:
    """List alerts that stand, the one that came last first. One of each rule and subject, however often it recurs."""
    async with session.database() as db:
        alerts = await AlertStore(db).find(everything=everything, limit=limit)
    now = datetime.now(UTC)
    rows = [
        (a.alert_no, a.state, a.rule, a.subject, a.text, a.occurrences, ago(a.last_at, now), _by(a)) for a in alerts
    ]
    columns = ("no", "state", "rule", "subject", "what", "times", "last", "by")
    session.out.result(
        {"alerts": [as_dict(a) for a in alerts]}, [table("", columns, rows, ("no", "times"))] if rows else []
    )
    session.out.say(f"{len(alerts)} alert{'' if len(alerts) == 1 else 's'}")


@command(app, "acknowledge")
async def acknowledge_alerts(session: Session, numbers: Numbers) -> None:
    """Say that you look at it: it stands until it is resolved, and everybody sees who has taken it."""
    async with session.database() as db:
        await _each(session, numbers, "acknowledged", AlertStore(db).acknowledge)


@command(app, "resolve")
async def resolve_alerts(session: Session, numbers: Numbers) -> None:
    """Say that it is over. If it comes again, it is a new alert."""
    async with session.database() as db:
        await _each(session, numbers, "resolved", AlertStore(db).resolve)


async def _each(session: Session, numbers: list[int], done: str, act: Callable[[int, str], Awaitable[None]]) -> None:
    for number in numbers:
        await act(number, whoami())
    listed = ", ".join(map(str, numbers))
    session.out.result({done: numbers}, f"{done}: {listed}")


def _by(alert: AlertView) -> str:
    return alert.resolved_by or alert.acknowledged_by or ""
