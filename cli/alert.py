"""`alert list | show | acknowledge | resolve`: what a person has to look at. Rules and channels: cli/alert_rule.py,
cli/alert_channel.py.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from cli import alert_channel, alert_rule
from cli.command import Session, command, whoami
from cli.output import ago, as_dict, facts, table
from models.alerting import AlertGroup, AlertQuery, Severity
from models.errors import InvalidInputError
from models.identity import AlertView
from models.ids import notify_workflow_id
from store.alerts import AlertStore

app = typer.Typer(help="Alerts: list, show, acknowledge, resolve; their rules and channels.", no_args_is_help=True)
app.add_typer(alert_rule.app, name="rule")
app.add_typer(alert_channel.app, name="channel")

MANY = 5
"""Alerts of one rule that are still shown one by one."""

Numbers = Annotated[
    list[int] | None, typer.Argument(metavar="NO...", help="Numbers of alerts, as 'alert list' shows them.")
]
Rule = Annotated[str | None, typer.Option("--rule", metavar="NAME", help="Of this rule.")]
Device = Annotated[str | None, typer.Option("--device", metavar="ID", help="Of this device, or other subject.")]
Least = Annotated[
    Severity | None, typer.Option("--severity", metavar="SEVERITY", help="At least info, warning or critical.")
]
Site = Annotated[str | None, typer.Option("--site", metavar="SITE", help="Of devices of this site.")]
All = Annotated[bool, typer.Option("--all", help="All that stand and match --rule, --device, --severity, --site.")]
Count = Annotated[
    int | None, typer.Option("--count", min=1, help="How many that are, for --all; 'alert list' tells, and so does it.")
]


@command(app, "list")
async def list_alerts(
    session: Session,
    rule: Rule = None,
    device: Device = None,
    severity: Least = None,
    site: Site = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every alert by itself, and those that are resolved too.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Most alerts to show by themselves.")] = 50,
) -> None:
    """List alerts that stand, the one that came last first; where a rule has many, one line for all of them.

    One alert of each rule and subject stands at a time, however often it recurs.
    """
    wanted = AlertQuery(rule=rule, device=device, severity=severity, site=site)
    async with session.database() as db:
        store = AlertStore(db)
        groups = await store.groups(wanted, everything=everything)
        alerts = await store.find(wanted, everything=everything, limit=limit)
        folded = [] if everything or rule or device else [group for group in groups if group.count > MANY]
        if folded:
            few = [group.rule for group in groups if group.count <= MANY]
            found = [await store.find(wanted.model_copy(update={"rule": name}), limit=limit) for name in few]
            alerts = sorted((a for each in found for a in each), key=lambda a: a.last_at, reverse=True)[:limit]
    now = datetime.now(UTC)
    shown: list[Table] = []
    if folded:
        shown.append(_grouped(folded, now))
    if alerts:
        shown.append(_listed(alerts, now))
    data = {"alerts": [as_dict(a) for a in alerts], "groups": [as_dict(group) for group in groups]}
    session.out.result(data, shown)
    total = sum(group.count for group in groups)
    session.out.say(f"{total} alert{'' if total == 1 else 's'}{_more(total, folded, len(alerts))}")


def _more(total: int, folded: Sequence[AlertGroup], shown: int) -> str:
    if folded:
        return f"; 'alert list --rule {folded[0].rule}' shows those of a rule, --all every one"
    return f", {shown} shown; --limit shows more" if shown < total else ""


def _grouped(groups: Sequence[AlertGroup], now: datetime) -> Table:
    rows = [
        (
            group.rule,
            ", ".join(group.severities),
            group.count,
            group.acknowledged,
            dict(sorted(group.sites.items(), key=lambda item: -item[1])[:5]),
            group.first_subject,
            ago(group.first_at, now),
            ago(group.last_at, now),
        )
        for group in groups
    ]
    columns = ("rule", "severity", "alerts", "acknowledged", "sites", "first", "since", "last")
    return table("", columns, rows, ("alerts", "acknowledged"))


def _listed(alerts: Sequence[AlertView], now: datetime) -> Table:
    rows = [
        (
            a.alert_no,
            a.severity,
            a.state,
            a.rule,
            a.subject,
            a.text.removeprefix(f"{a.subject}: "),
            a.occurrences,
            ago(a.last_at, now),
            _by(a),
        )
        for a in alerts
    ]
    columns = ("no", "severity", "state", "rule", "subject", "what", "times", "last", "by")
    return table("", columns, rows, ("no", "times"))


@command(app, "show")
async def show_alert(session: Session, number: Annotated[int, typer.Argument(metavar="NO")]) -> None:
    """Show an alert, and who was told of it."""
    async with session.database() as db:
        alert = await AlertStore(db).get(number)
        told = await AlertStore(db).told(number)
    pairs = [
        ("rule", alert.rule),
        ("subject", alert.subject),
        ("severity", alert.severity),
        ("state", alert.state),
        ("what", alert.text),
        ("times", alert.occurrences),
        ("opened", alert.opened_at),
        ("last", alert.last_at),
        ("acknowledged", alert.acknowledged_at),
        ("by", alert.acknowledged_by),
        ("resolved", alert.resolved_at),
        ("resolved by", alert.resolved_by),
    ]
    rows = [(each.event, each.at, each.handed_over_at, _notification(each.digest)) for each in told]
    shown = [facts(pairs), table("", ("event", "at", "told at", "notification"), rows)]
    session.out.result({**as_dict(alert), "told": [as_dict(each) for each in told]}, shown)


def _notification(digest: str | None) -> str:
    if digest is None:
        return "waits"
    return "to nobody: no channels" if digest == "none" else notify_workflow_id(digest)


@command(app, "acknowledge")
async def acknowledge_alerts(
    session: Session,
    numbers: Numbers = None,
    rule: Rule = None,
    device: Device = None,
    severity: Least = None,
    site: Site = None,
    everything: All = False,
    count: Count = None,
) -> None:
    """Say that you look at it: it stands until it is resolved, and everybody sees who has taken it."""
    wanted = AlertQuery(rule=rule, device=device, severity=severity, site=site)
    async with session.database() as db:
        store = AlertStore(db)
        found = await _meant(store, numbers, wanted, everything, count, "acknowledge")
        await _done(session, found, "acknowledged", store.acknowledge)


@command(app, "resolve")
async def resolve_alerts(
    session: Session,
    numbers: Numbers = None,
    rule: Rule = None,
    device: Device = None,
    severity: Least = None,
    site: Site = None,
    everything: All = False,
    count: Count = None,
) -> None:
    """Say that it is over. If it comes again, it is a new alert."""
    wanted = AlertQuery(rule=rule, device=device, severity=severity, site=site)
    async with session.database() as db:
        store = AlertStore(db)
        found = await _meant(store, numbers, wanted, everything, count, "resolve")
        await _done(session, found, "resolved", store.resolve)


async def _meant(
    store: AlertStore, numbers: list[int] | None, wanted: AlertQuery, everything: bool, count: int | None, what: str
) -> list[int]:
    """The alerts that are meant: those named, or all that match, whose number a person has confirmed."""
    if not everything:
        if not numbers or wanted != AlertQuery():
            raise InvalidInputError(
                f"cannot {what}: expected numbers of alerts, or --all with --rule, --device, --severity or --site"
            )
        return numbers
    if numbers:
        raise InvalidInputError(f"cannot {what}: expected either numbers of alerts or --all, got both")
    found = await store.numbers(wanted)
    if count != len(found):
        given = "no --count was given" if count is None else f"--count says {count}"
        raise InvalidInputError(
            f"cannot {what} all: {len(found)} alerts match and {given}; if it is these, say --count {len(found)}"
        )
    return found


async def _done(
    session: Session, numbers: list[int], done: str, act: Callable[[Sequence[int], str], Awaitable[list[int]]]
) -> None:
    settled = await act(numbers, whoami())
    listed = ", ".join(map(str, settled)) if len(settled) <= 20 else f"{len(settled)} alerts"
    session.out.result({done: settled}, f"{done}: {listed}")


def _by(alert: AlertView) -> str:
    return alert.resolved_by or alert.acknowledged_by or ""
