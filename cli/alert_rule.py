"""`alert rule list | show | set | enable | disable | delete | test`: when a heartbeat gives cause for an alert."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from cli.command import Session, command, whoami
from cli.device import filter_of
from cli.given import duration_of
from cli.output import as_dict, facts, table
from cli.spec import parse_model
from domain.mistakes import faults_of, path_of
from models.alerting import AlertRuleSpec, AlertRuleView, RuleTrial, Severity
from models.device import DeviceFilter
from models.errors import InvalidInputError, Mistake, NotFoundError, SpecError
from store.alert_rules import AlertRuleStore
from store.engine import Database

app = typer.Typer(help="Alert rules: what heartbeats are judged by.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The rule's name, as 'alert rule list' shows it.")]
Condition = Annotated[
    str | None,
    typer.Argument(metavar="CONDITION", help="As 'cpuTemperature > 80 for 2 heartbeats, clear < 75 for 3 heartbeats'."),
]
File = Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Read the rule from this YAML file instead.")]
Type = Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Only for devices of this type.")]
Site = Annotated[list[str] | None, typer.Option("--site", metavar="SITE", help="Only for these sites; repeat.")]
Tag = Annotated[
    list[str] | None, typer.Option("--tag", metavar="TAG=VALUE", help="Only for devices with this tag; repeat.")
]


@command(app, "list")
async def list_rules(session: Session) -> None:
    """List the rules."""
    async with session.database() as db:
        rules = await AlertRuleStore(db).find()
    rows = [
        (
            rule.spec.name,
            rule.spec.condition,
            rule.spec.severity,
            _target(rule.spec.target),
            "yes" if rule.spec.enabled else "no",
            rule.standing,
        )
        for rule in rules
    ]
    columns = ("rule", "when", "severity", "devices", "enabled", "alerts")
    shown = [table("", columns, rows, ("alerts",))] if rows else []
    session.out.result({"rules": [_as_json(rule) for rule in rules]}, shown)
    session.out.say(f"{len(rules)} rule{'' if len(rules) == 1 else 's'}")


@command(app, "show")
async def show_rule(session: Session, name: Name) -> None:
    """Show a rule."""
    async with session.database() as db:
        rule = await AlertRuleStore(db).get(name)
    pairs = [
        ("rule", rule.spec.name),
        ("when", rule.spec.condition),
        ("severity", rule.spec.severity),
        ("devices", _target(rule.spec.target)),
        ("enabled", "yes" if rule.spec.enabled else "no"),
        ("alerts standing", rule.standing),
        ("revision", rule.revision),
        ("made by", rule.created_by),
        ("changed", rule.updated_at),
    ]
    session.out.result(_as_json(rule), facts(pairs))


@command(app, "set")
async def set_rule(
    session: Session,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Small letters, digits and dashes.")] = None,
    condition: Condition = None,
    file: File = None,
    severity: Annotated[
        Severity, typer.Option("--severity", metavar="SEVERITY", help="info, warning or critical.")
    ] = Severity.WARNING,
    type_: Type = None,
    site: Site = None,
    tag: Tag = None,
) -> None:
    """Create a rule, or replace the one of this name. The gateway judges by it within a few seconds.

    Alerts that stand go on under it. What is not given is the default, not what the former rule had.
    """
    rule = _given(name, condition, file, severity, filter_of(type_, site or [], tag or [], [], [], [], None))
    async with session.database() as db:
        await AlertRuleStore(db).set(rule, whoami())
    session.out.result({"set": as_dict(rule)}, f"{rule.name}: {rule.condition}, {rule.severity}")


@command(app, "enable")
async def enable_rule(session: Session, name: Name) -> None:
    """Judge by a rule again."""
    async with session.database() as db:
        await AlertRuleStore(db).enable(name, True, whoami())
    session.out.result({"enabled": name}, f"enabled: {name}")


@command(app, "disable")
async def disable_rule(session: Session, name: Name) -> None:
    """Do not judge by a rule for now; alerts of it that stand are resolved."""
    async with session.database() as db:
        await AlertRuleStore(db).enable(name, False, whoami())
    session.out.result({"disabled": name}, f"disabled: {name}")


@command(app, "delete")
async def delete_rule(session: Session, name: Name) -> None:
    """Forget a rule; alerts of it that stand are resolved."""
    async with session.database() as db:
        await AlertRuleStore(db).delete(name, whoami())
    session.out.result({"deleted": name}, f"deleted: {name}")


@command(app, "test")
async def test_rule(
    session: Session,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A rule there is, or a name for CONDITION.")
    ] = None,
    condition: Condition = None,
    file: File = None,
    since: Annotated[str, typer.Option("--since", metavar="DURATION", help="Heartbeats of the last so long.")] = "7d",
    type_: Type = None,
    site: Site = None,
    tag: Tag = None,
) -> None:
    """Say what a rule would have made of the heartbeats that are kept. Changes nothing.

    Devices are taken as they are now: those that match the rule's target today.
    """
    async with session.database() as db:
        rule = await _tried(db, name, condition, file, filter_of(type_, site or [], tag or [], [], [], [], None))
        trial = await AlertRuleStore(db).trial(rule, duration_of("--since", since))
    session.out.result({"rule": as_dict(rule), "since": since, **as_dict(trial)}, _in_words(rule, trial, since))


async def _tried(
    db: Database, name: str | None, condition: str | None, file: Path | None, target: DeviceFilter
) -> AlertRuleSpec:
    if name is not None and condition is None and file is None:
        return (await AlertRuleStore(db).get(name)).spec
    return _given(name or "trial", condition, file, Severity.WARNING, target)


def _in_words(rule: AlertRuleSpec, trial: RuleTrial, since: str) -> str:
    first = f", first {', '.join(trial.first)}" if trial.first else ""
    return (
        f"{rule.condition}: in the last {since}, {trial.alerting} of {trial.devices} devices would have given "
        f"{trial.alerts} alerts{first}; {trial.still_open} would stand now ({trial.heartbeats} heartbeats)"
    )


def _given(
    name: str | None, condition: str | None, file: Path | None, severity: Severity, target: DeviceFilter
) -> AlertRuleSpec:
    """The rule that a file or the words of a command say."""
    if file is not None:
        if condition is not None:
            raise InvalidInputError("cannot read the rule: expected either a condition or --file, got both")
        return _read(file)
    if name is None or condition is None:
        raise InvalidInputError("cannot read the rule: expected its name and its condition, or --file")
    document: dict[str, Any] = {"name": name, "when": condition, "severity": severity, "target": target}
    try:
        return AlertRuleSpec.model_validate(document)
    except ValidationError as error:
        mistakes = [
            Mistake(path_of(fault.where) if fault.where else "when", fault.message)
            for fault in faults_of(error, AlertRuleSpec)
        ]
        raise SpecError(f"rule {name}", mistakes) from error


def _read(file: Path) -> AlertRuleSpec:
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot read the rule {file}: there is no such file") from error
    except OSError as error:
        raise InvalidInputError(f"cannot read the rule {file}: {error.strerror}") from error
    return parse_model(data, str(file), AlertRuleSpec)


def _target(target: DeviceFilter) -> str:
    given = target.model_dump(mode="json", exclude_defaults=True)
    parts = [f"{key} {', '.join(value)}" for key, value in given.items() if isinstance(value, list)]
    parts += [f"{key} {value}" for key, value in given.items() if isinstance(value, str)]
    parts += [f"{key} {value}" for key, value in given.get("tags", {}).items()]
    return "; ".join(parts) or "all"


def _as_json(rule: AlertRuleView) -> dict[str, Any]:
    return {**as_dict(rule), "when": rule.spec.condition}
